"""Figures of a KV cache: how long its entries are, who reads them, and which of them can go."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from typing_extensions import Unpack

from glmlens.integers import Integer, read_integer
from glmlens.plot.arrays import Labels, as_labelled, to_float_array
from glmlens.plot.bars import bars
from glmlens.plot.heatmaps import draw_heatmap
from glmlens.plot.lines import line_trace, style_value_axis
from glmlens.plot.style import MOST_CELLS, Look, apply_style, escape_text
from glmlens.results import Labelled

SMALLEST_COST = 1e-6  # nats: what is less is drawn here, on an axis of powers


def cache_norms(
    kv: Any,
    labels: Labels = None,
    *,
    of: str = "keys",
    row: Integer = 0,
    max_cells: int = MOST_CELLS,
    **look: Unpack[Look],
) -> go.Figure:
    """The length of every entry's "keys" or "values" [layer, pos], over all its key-value heads, with what it weighs.

    `kv` is a KVCache, of which row `row` is drawn. Every entry of every layer weighs the same.
    """
    if of not in ("keys", "values"):
        raise ValueError(f"of is {of!r}; choose from 'keys', 'values'")
    row = read_integer(row, "row", size=kv.batch)
    stored = getattr(kv, of)[:, row, : kv.length]
    positions = kv.positions[row, : kv.length].tolist()
    lengths = np.linalg.norm(to_float_array(stored).astype(np.float64).reshape(*stored.shape[:2], -1), axis=-1)
    bytes_each = 2 * stored.element_size() * stored.shape[2] * stored.shape[3]
    named = labels if labels is not None else {"pos": [str(p) if p >= 0 else "padding" for p in positions]}
    data = as_labelled(lengths, ("layer", "pos"), named)
    total = bytes_each * stored.shape[0] * stored.shape[1]
    note = f"{bytes_each:,} bytes an entry and layer, {total:,} in all; {kv.length:,} of {kv.capacity:,} entries taken"
    more = (
        f"%{{customdata:,}} bytes, key and value<br>{stored.shape[2]} key-value heads",
        np.full(data.shape, bytes_each),
    )
    what = f"length of {of}"
    if max(data.shape) > max_cells:
        return draw_heatmap(
            data, what, False, max_cells=max_cells, look=look, name=f"Length of cached {of}", notes=(note,)
        )
    return draw_heatmap(data, what, False, look=look, hover=more, name=f"Length of cached {of}", notes=(note,))


def cache_reads(
    reads: Any, show: str = "weighted", *, layer: Integer | str | None = None, max_cells: int = MOST_CELLS,
    **look: Unpack[Look],
) -> go.Figure:  # fmt: skip
    """How the next token's step reads every entry: [layer, key], summed over heads, or of one layer [head, key].

    `reads` is the result of `who_reads`; `show` is "attention", "weighted" or "direct" (in logits, signed).
    """
    sheets = reads.sheets()
    if show not in sheets:
        raise ValueError(f"show is {show!r}; this result has {', '.join(sheets)}")
    data = sheets[show]
    where = "summed over heads" if layer is None else f"layer {layer}"
    if layer is None:
        labels = {axis: data.labels[axis] for axis in ("layer", "key")}
        with np.errstate(invalid="ignore"):  # of opposite infinities
            data = Labelled(to_float_array(data.values).sum(1), ("layer", "key"), labels, data.about)
    else:
        data = data.at(layer=layer)
    words = {"attention": "attention", "weighted": "length written", "direct": "logits"}
    name = f"Who reads which entry to say {data.about.get('direction', 'the next token')}: {where}"
    about = {key: said for key, said in data.about.items() if key != "direction"}
    plain = Labelled(data.values, data.axes, data.labels, about)
    return draw_heatmap(plain, words.get(show, show), show == "direct", max_cells=max_cells, look=look, name=name)


def leave_one_out(result: Any, show: str = "kl", *, max_cells: int = MOST_CELLS, **look: Unpack[Look]) -> go.Figure:
    """What the next token loses with each entry [layer and kv head, key], or with each position: a bar each.

    `result` is that of `leave_one_out`; `show` is "kl" (nats) or "logit" (signed). What was not asked for stays empty.
    """
    sheets = result.sheets()
    if show not in sheets:
        raise ValueError(f"show is {show!r}; this result has {', '.join(sheets)}")
    data, what = sheets[show], {"kl": "nats", "logit": "logits"}[show]
    name = f"What is lost without one entry: {data.about.get('metric', show)}"
    if data.axes == ("key",):
        data = Labelled(data.values, data.axes, data.labels, data.about)
        return bars(data, what=what, top=60, **({"title": name} | look))  # type: ignore[arg-type]
    rows = [f"{layer}.{kv}" for layer in data.labels["layer"] for kv in data.labels["kv"]]
    labels = {"layer.kv": rows, "key": data.labels["key"]}
    flat = Labelled(to_float_array(data.values).reshape(len(rows), -1), ("layer.kv", "key"), labels, data.about)
    return draw_heatmap(flat, what, show == "logit", max_cells=max_cells, look=look, text=False, name=name)


def eviction(results: Any, **look: Unpack[Look]) -> go.Figure:
    """What dropping the n most dispensable entries costs, in nats on an axis of powers; `results` by name, or one.

    A result is that of `droppable`. Costs under a millionth are drawn there; the number is in the hover.
    """
    found: Mapping[str, Any] = results if isinstance(results, Mapping) else {"": results}
    figure = go.Figure()
    for i, (name, result) in enumerate(found.items()):
        figure.add_scatter(**eviction_trace(i, name, result))
    style_value_axis(figure, "KL(with all ‖ without), nats", None)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_xaxes(title="entries dropped, the most dispensable first", rangemode="tozero")
    figure.update_layout(showlegend=len(found) > 1)
    first = next(iter(found.values())).sheets()["together"]
    about = {key: said for key, said in first.about.items() if key in ("prompt", "model")}
    return apply_style(figure, "What dropping entries costs the next token: KL, nats", about, **look)


def eviction_trace(i: int, name: str, result: Any) -> dict[str, Any]:
    costs = result.sheets()["together"]
    values = to_float_array(costs.values)
    alone = result.sheets()["alone"].labels["entry"]
    counts = [int(n) for n in costs.labels["dropped"]]
    last = [f"the last of them {escape_text(alone[n - 1], 40)}" if n else "none" for n in counts]
    said = [f"{value:.4g} nats<br>{word}" for value, word in zip(values, last, strict=True)]
    hover = f"%{{x:,}} dropped<br>%{{customdata}}<extra>{escape_text(name, 40)}</extra>"
    drawn = line_trace(i, name, np.maximum(values, SMALLEST_COST), "nats")
    return {**drawn, "x": counts, "customdata": said, "hovertemplate": hover}
