"""Numbers of any kind as labelled ones, and the one rule for size: blocks of cells, each with its largest number."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmlens.plot.style import infinite_note
from glmlens.results import Labelled

Numbers = Any
"""A Labelled result, a numpy array, or what becomes one: nested lists, a tensor of any floating type and device."""
Labels = Mapping[str, Sequence[str]] | Sequence[str] | None
Limits = tuple[int | float, int | float]
POSITION_AXES = ("pos", "query", "key", "step")


def to_float_array(x: Numbers) -> np.ndarray:
    """x as a float32 array; what is too large for that is infinite."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.dtype.is_floating_point else x
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32)


def as_labelled(data: Numbers, axes: Sequence[str], labels: Labels = None) -> Labelled:
    """Numbers with these axes, from a result that has as many or from a plain array.

    `labels` is a mapping by axis, or the labels of tokens, for all axes of positions. Raises ValueError for another
    number of axes.
    """
    if isinstance(data, Labelled):
        found = Labelled(to_float_array(data.values), data.axes, data.labels, data.about)
    else:
        values = to_float_array(data)
        check_axes(values.ndim, values.shape, axes)
        found = Labelled(values, tuple(axes))
    check_axes(found.values.ndim, dict(zip(found.axes, found.shape, strict=True)), axes)
    given = labels if isinstance(labels, Mapping) else number_token_labels(found, labels)
    return Labelled(
        found.values, found.axes, {**found.labels, **given}, {**describe_token_labels(labels), **found.about}
    )


def describe_token_labels(labels: Labels) -> dict[str, str]:
    """The labels of tokens are a prompt."""
    return {} if labels is None or isinstance(labels, Mapping) else {"prompt": " ".join(labels)}


def check_axes(n: int, shape: object, axes: Sequence[str]) -> None:
    if n != len(axes):
        raise ValueError(
            f"expected {' '.join(axes)}, got {n} axes: {shape}; take one place of the others: data.at(...)"
        )


def number_token_labels(data: Labelled, labels: Sequence[str] | None) -> dict[str, Sequence[str]]:
    """One sequence of token labels for all axes of positions, each with its number in front."""
    if labels is None:
        return {}
    return {axis: [f"{i} {label}" for i, label in enumerate(labels)] for axis in data.axes if axis in POSITION_AXES}


def pool_blocks(data: Labelled, max_cells: int) -> tuple[Labelled, str]:
    """At most so many places along each of two axes, and the sentence that says so ("" if nothing was done).

    Blocks of neighbours are drawn as one cell with the number that is largest in magnitude, so that a lone peak stays.
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
    """A label for every k neighbours: the first and the last of them."""
    ends = ((labels[i], labels[min(i + k, len(labels)) - 1]) for i in range(0, len(labels), k))
    return [first if first == last else f"{first} … {last}" for first, last in ends]


def largest_by_block(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The number largest in magnitude of every block; nan where a block has none that is finite."""
    values = np.where(np.isinf(values), np.nan, values)
    ends = [(0, -n % k) for n, k in zip(values.shape, (rows, columns), strict=True)]
    padded = np.pad(values, ends, constant_values=np.nan) if any(end for _, end in ends) else values
    parts = padded.reshape(-1, rows, padded.shape[1] // columns, columns)
    top, bottom = (extreme.reduce(extreme.reduce(parts, 1), 2) for extreme in (np.fmax, np.fmin))  # whole rows first
    return np.where(np.abs(bottom) > np.abs(top), bottom, top)


def metric_title(data: Labelled) -> str:
    """What numbers say that they are, or the names of their axes."""
    return data.about.get("metric") or " x ".join(data.axes)
