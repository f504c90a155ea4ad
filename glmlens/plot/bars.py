"""Bar charts: direct logit attribution, and any signed numbers along one axis."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from typing_extensions import Unpack

from glmlens.integers import Integer, read_integer
from glmlens.plot.arrays import Labels, Numbers, as_labelled, metric_title, to_float_array
from glmlens.plot.style import FAINT, NEGATIVE, POSITIVE, Look, apply_style, escape_text, format_signed, set_ticks
from glmlens.results import Labelled, list_axes


def bars(
    data: Numbers, labels: Labels = None, *, what: str = "value", top: Integer = 30, **look: Unpack[Look]
) -> go.Figure:
    """Draw signed numbers along one axis, first on top; of more than `top`, the largest and the sum of the others."""
    result = as_labelled(data, ("part",), labels)
    top = read_integer(top, "top", least=1)
    names, values, note = keep_largest_bars(result.labels[result.axes[0]], result.values, top)
    title = metric_title(result)
    return draw_bars(names, values, what=what, title=title, about=result.about, notes=[note], look=look)


def logit_attribution(
    result: Any,
    *,
    over: str | Sequence[str] | None = None,
    prompt: Integer | str | None = None,
    top: Integer = 30,
    **look: Unpack[Look],
) -> go.Figure:
    """Draw direct logit attribution: the contribution of each part, all in the model's order or the `top` largest.

    `over` names the axes to keep, summing the others: "key" gives contributions by source position, "layer" by layer.
    Of several prompts the mean is drawn, or one by `prompt`. The bars sum to the model's logit (or difference), less
    what the result leaves unexplained.
    """
    # Sum over prompts would grow with their number: take the mean, or one of them.
    if "prompt" in result.axes:
        if prompt is None:
            result = result.mean()
        prompt_of = prompt
    else:
        prompt_of = None
    top = read_integer(top, "top", least=1)
    values, rest = (
        x if prompt_of is None else x.at(prompt=prompt_of) for x in (to_plain_labelled(result), result.rest)
    )
    parts = sum_over_axes(values, over)
    names, numbers = flatten_places(parts)
    names = [*rest.labels["part"][:1], *names, *rest.labels["part"][1:]]  # the embedding comes first
    numbers = np.concatenate([rest.values[:1], numbers, rest.values[1:]])
    names, numbers, note = keep_largest_bars(names, numbers, top)
    total = float(np.ravel(result.total)[0 if prompt_of is None else result.place("prompt", prompt_of)])
    name = f"Direct logit attribution: {result.about.get('direction', 'the answer')}"
    about = {key: text for key, text in result.about.items() if key in ("prompt", "metric", "model")}
    notes = [note, f"total {total:.3f} logits"]
    return draw_bars(names, to_float_array(numbers), what="logits", title=name, about=about, notes=notes, look=look)


def to_plain_labelled(result: Labelled) -> Labelled:
    """Return a result of a subclass as a plain Labelled."""
    return Labelled(result.values, result.axes, result.labels, result.about)


def sum_over_axes(data: Labelled, over: str | Sequence[str] | None) -> Labelled:
    """Sum along all axes but `over`; raise ValueError for an axis that the result does not have."""
    if over is None:
        return data
    over = list_axes(over)
    unknown = [axis for axis in over if axis not in data.axes]
    if unknown:
        raise ValueError(f"over {unknown}; this result has {', '.join(data.axes)}")
    summed = tuple(i for i, axis in enumerate(data.axes) if axis not in over)
    kept = tuple(axis for axis in data.axes if axis in over)
    return Labelled(np.nansum(data.values, summed), kept, {axis: data.labels[axis] for axis in kept}, data.about)


def flatten_places(data: Labelled) -> tuple[list[str], np.ndarray]:
    """Return names and numbers of all places, in order: "0 attn", "head 3.1", "neuron 2.17", "key 5 ·the"."""
    words = {"sublayer": "", "layer": "layer ", "head": "head ", "mlp": "neuron ", "key": "key "}
    last = data.axes[-1]
    # Build the names axis by axis, in the order in which ravel() goes through the values.
    names = [""]
    for axis in data.axes:
        labels = data.labels[axis]
        joint = {"sublayer": " ", "key": " ← "}.get(axis, ".")
        names = [f"{name}{joint}{label}" if name else str(label) for name in names for label in labels]
    word = {"key": "head " if len(data.axes) > 1 else "", "sublayer": ""}.get(last, words.get(last, ""))
    return [f"{word}{name}" for name in names], data.values.ravel()


def keep_largest_bars(names: Sequence[str], values: np.ndarray, top: int) -> tuple[list[str], np.ndarray, str]:
    """Keep the `top` largest bars and one for the sum of the others, and return the note that says so."""
    if len(names) <= top:
        return list(names), values, ""
    order = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")
    first, others = order[:top], order[top:]
    with np.errstate(invalid="ignore"):  # sums of opposite infinities
        kept = np.append(values[first], np.nansum(values[others]))
    named = [str(names[int(i)]) for i in first]
    return [*named, f"{len(others):,} others"], kept, f"the {top} largest of {len(names):,}"


def draw_bars(
    names: Sequence[str],
    values: np.ndarray,
    *,
    what: str,
    title: str,
    about: Any,
    notes: Sequence[str],
    look: Look,
) -> go.Figure:
    """Draw one horizontal bar per name, its number beside it."""
    known = values[np.isfinite(values)]
    low, high = float(known.min(initial=0)), float(known.max(initial=0))
    room = 0.1 * (high - low or 1.0)  # for the numbers beside the bars
    # Two decimals up to a range of 100, and signs only where some bar is negative.
    form = "{:+.2f}" if high - low < 100 else "{:+,.0f}"
    form = form if low < 0 else form.replace("+", "")
    colors = [POSITIVE if value > 0 else NEGATIVE for value in values]
    bar = go.Bar(
        x=values,
        y=np.arange(len(names)),
        orientation="h",
        marker={"color": colors},
        text=[format_signed(form, value) for value in values.tolist()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate=f"%{{y}}<br>%{{x:+.4g}} {escape_text(what)}<extra></extra>",
    )
    figure = go.Figure(bar)
    set_ticks(figure, "y", names, "", max_ticks=60, max_length=30, first_on_top=True)
    ends = [low - room * (low < 0), high + room * (high > 0)]
    figure.update_xaxes(
        range=ends, title=escape_text(what), zeroline=True, zerolinecolor=FAINT, gridcolor=FAINT, showgrid=True
    )
    tall: Look = {"height": 90 + 19 * len(names)}
    return apply_style(figure, title, about, notes, **(tall | look))  # type: ignore[arg-type]
