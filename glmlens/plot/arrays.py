"""Convert numbers to labelled arrays, and pool large ones: a block of cells is drawn as its largest number."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmlens.plot.style import infinite_note
from glmlens.results import Labelled

Numbers = Any
"""A Labelled result, a numpy array, or what converts to one: nested lists, a tensor of any dtype and device."""
Labels = Mapping[str, Sequence[str]] | Sequence[str] | None
Limits = tuple[int | float, int | float]
POSITION_AXES = ("pos", "query", "key", "step")


def to_float_array(x: Numbers) -> np.ndarray:
    """Return x as a float32 array; numbers too large for float32 become infinite."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.dtype.is_floating_point else x  # numpy has no bfloat16
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32)


def as_labelled(data: Numbers, axes: Sequence[str], labels: Labels = None) -> Labelled:
    """Return numbers as a Labelled with these axes; a Labelled keeps its own axes, if it has as many.

    `labels` is a mapping by axis, or the labels of tokens for all axes of positions. Raises ValueError for another
    number of axes.
    """
    if isinstance(data, Labelled):
        result = Labelled(to_float_array(data.values), data.axes, data.labels, data.about)
    else:
        values = to_float_array(data)
        check_axes(values.ndim, values.shape, axes)
        result = Labelled(values, tuple(axes))
    check_axes(result.values.ndim, dict(zip(result.axes, result.shape, strict=True)), axes)
    given = labels if isinstance(labels, Mapping) else number_token_labels(result, labels)
    about = {**describe_token_labels(labels), **result.about}
    return Labelled(result.values, result.axes, {**result.labels, **given}, about)


def describe_token_labels(labels: Labels) -> dict[str, str]:
    """Return token labels as the prompt shown under the title."""
    return {} if labels is None or isinstance(labels, Mapping) else {"prompt": " ".join(labels)}


def check_axes(n: int, shape: object, axes: Sequence[str]) -> None:
    """Raise ValueError unless there are as many axes."""
    if n != len(axes):
        raise ValueError(f"expected {' '.join(axes)}, got {n} axes: {shape}; select along the others with data.at(...)")


def number_token_labels(data: Labelled, labels: Sequence[str] | None) -> dict[str, Sequence[str]]:
    """Return token labels for all axes of positions, each with its position in front: "3 ·the"."""
    if labels is None:
        return {}
    return {axis: [f"{i} {label}" for i, label in enumerate(labels)] for axis in data.axes if axis in POSITION_AXES}


def pool_blocks(data: Labelled, max_cells: int) -> tuple[Labelled, str]:
    """Pool two axes to at most `max_cells` each, and return the note that says so ("" if nothing was pooled).

    A block of neighbours becomes one cell with its number of largest magnitude, so that a lone peak stays visible.
    """
    rows, columns = (-(-n // max_cells) for n in data.shape)
    if rows == columns == 1:
        return data, ""
    labels = {a: label_blocks(data.labels[a], k) for a, k in zip(data.axes, (rows, columns), strict=True)}
    size = " x ".join(f"{n:,}" for n in data.shape)
    counted = infinite_note(data.values)
    note = f"each cell shows the largest number of {rows} x {columns}: there are {size} ({' x '.join(data.axes)})" + (
        f" · {counted}" if counted else ""
    )
    return Labelled(largest_by_block(data.values, rows, columns), data.axes, labels, data.about), note


def label_blocks(labels: Sequence[str], k: int) -> list[str]:
    """Return a label for every k neighbours: the first and the last of them."""
    ends = ((labels[i], labels[min(i + k, len(labels)) - 1]) for i in range(0, len(labels), k))
    return [first if first == last else f"{first} … {last}" for first, last in ends]


def largest_by_block(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the number of largest magnitude of every block; nan for a block without finite numbers."""
    values = np.where(np.isinf(values), np.nan, values)
    ends = [(0, -n % k) for n, k in zip(values.shape, (rows, columns), strict=True)]
    padded = np.pad(values, ends, constant_values=np.nan) if any(end for _, end in ends) else values
    parts = padded.reshape(-1, rows, padded.shape[1] // columns, columns)
    # fmax and fmin skip nan. Rows are reduced first: that reads memory in order.
    top, bottom = (extreme.reduce(extreme.reduce(parts, 1), 2) for extreme in (np.fmax, np.fmin))
    return np.where(np.abs(bottom) > np.abs(top), bottom, top)


def metric_title(data: Labelled) -> str:
    """Return the metric of a result, or the names of its axes."""
    return data.about.get("metric") or " x ".join(data.axes)
