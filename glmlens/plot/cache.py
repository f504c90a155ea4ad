"""Figures of a KV cache: norms of its entries, reads by attention heads, leave-one-out effects and eviction."""

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

SMALLEST_COST = 1e-6  # nats: smaller costs are drawn here, on a logarithmic axis


def cache_norms(
    kv: Any,
    labels: Labels = None,
    *,
    of: str = "keys",
    row: Integer = 0,
    max_cells: int = MOST_CELLS,
    **look: Unpack[Look],
) -> go.Figure:
    """Draw the norm of every entry's "keys" or "values" [layer, pos], over all KV heads, and its size in bytes.

    `kv` is a KVCache, of which row `row` is drawn. Every entry of every layer has the same size.
    """
    if of not in ("keys", "values"):
        raise ValueError(f"of is {of!r}; choose from 'keys', 'values'")
    row = read_integer(row, "row", size=kv.batch)
    stored = getattr(kv, of)[:, row, : kv.length]
    positions = kv.positions[row, : kv.length].tolist()
    norms = np.linalg.norm(to_float_array(stored).astype(np.float64).reshape(*stored.shape[:2], -1), axis=-1)
    # Key and value of all KV heads: element size x heads x channels.
    bytes_each = 2 * stored.element_size() * stored.shape[2] * stored.shape[3]
    named = labels if labels is not None else {"pos": [str(p) if p >= 0 else "padding" for p in positions]}
    data = as_labelled(norms, ("layer", "pos"), named)
    total = bytes_each * stored.shape[0] * stored.shape[1]
    note = (
        f"{bytes_each:,} bytes per entry and layer, {total:,} in total; {kv.length:,} of {kv.capacity:,} entries used"
    )
    more = (
        f"%{{customdata:,}} bytes, key and value<br>{stored.shape[2]} key-value heads",
        np.full(data.shape, bytes_each),
    )
    what = f"norm of {of}"
    # Pooled cells have no hover of their own.
    if max(data.shape) > max_cells:
        return draw_heatmap(
            data, what, False, max_cells=max_cells, look=look, name=f"Norm of cached {of}", notes=(note,)
        )
    return draw_heatmap(data, what, False, look=look, hover=more, name=f"Norm of cached {of}", notes=(note,))


def cache_reads(
    reads: Any, show: str = "weighted", *, layer: Integer | str | None = None, max_cells: int = MOST_CELLS,
    **look: Unpack[Look],
) -> go.Figure:  # fmt: skip
    """Draw how the next decoding step reads each entry: [layer, key], summed over heads, or [head, key] of one layer.

    `reads` is the result of `analysis.cache_reads`. `show` is "attention", "weighted" (norm of the attention-weighted
    value) or "direct" (contribution to the next token's logit, signed).
    """
    sheets = reads.sheets()
    if show not in sheets:
        raise ValueError(f"show is {show!r}; this result has {', '.join(sheets)}")
    data = sheets[show]
    where = "summed over heads" if layer is None else f"layer {layer}"
    if layer is None:
        labels = {axis: data.labels[axis] for axis in ("layer", "key")}
        with np.errstate(invalid="ignore"):  # sums of opposite infinities
            data = Labelled(to_float_array(data.values).sum(1), ("layer", "key"), labels, data.about)
    else:
        data = data.at(layer=layer)
    words = {"attention": "attention", "weighted": "weighted value norm", "direct": "logits"}
    name = f"KV-cache reads for {data.about.get('direction', 'the next token')}, {where}"
    about = {key: text for key, text in data.about.items() if key != "direction"}
    plain = Labelled(data.values, data.axes, data.labels, about)
    return draw_heatmap(plain, words.get(show, show), show == "direct", max_cells=max_cells, look=look, name=name)


def leave_one_out(result: Any, show: str = "kl", *, max_cells: int = MOST_CELLS, **look: Unpack[Look]) -> go.Figure:
    """Draw the effect on the next token of leaving out each entry [layer and KV head, key], or each position (bars).

    `result` is that of `analysis.leave_one_out`. `show` is "kl" (nats) or "logit" (drop of its logit, signed). Entries
    that were not measured stay empty.
    """
    sheets = result.sheets()
    if show not in sheets:
        raise ValueError(f"show is {show!r}; this result has {', '.join(sheets)}")
    data = sheets[show]
    what = {"kl": "nats", "logit": "logits"}[show]
    name = f"Leave-one-out effect of each KV-cache entry: {data.about.get('metric', show)}"
    if data.axes == ("key",):
        data = Labelled(data.values, data.axes, data.labels, data.about)
        return bars(data, what=what, top=60, **({"title": name} | look))  # type: ignore[arg-type]
    rows = [f"{layer}.{kv}" for layer in data.labels["layer"] for kv in data.labels["kv"]]
    labels = {"layer.kv": rows, "key": data.labels["key"]}
    flat = Labelled(to_float_array(data.values).reshape(len(rows), -1), ("layer.kv", "key"), labels, data.about)
    return draw_heatmap(flat, what, show == "logit", max_cells=max_cells, look=look, text=False, name=name)


def eviction(results: Any, **look: Unpack[Look]) -> go.Figure:
    """Draw the cost of evicting the n least important entries, in nats on a logarithmic axis; a line per result.

    `results` is a result of `analysis.eviction_curve`, or several by name. Costs under SMALLEST_COST are drawn at it,
    with their number on hover.
    """
    named: Mapping[str, Any] = results if isinstance(results, Mapping) else {"": results}
    figure = go.Figure()
    for i, (name, result) in enumerate(named.items()):
        figure.add_scatter(**eviction_trace(i, name, result))
    style_value_axis(figure, "KL(with all ‖ without), nats", None)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_xaxes(title="entries evicted, least important first", rangemode="tozero")
    figure.update_layout(showlegend=len(named) > 1)
    first = next(iter(named.values())).sheets()["together"]
    about = {key: text for key, text in first.about.items() if key in ("prompt", "model")}
    return apply_style(figure, "Effect of eviction on the next token (KL, nats)", about, **look)


def eviction_trace(i: int, name: str, result: Any) -> dict[str, Any]:
    """Return the line of one result, the entry that was evicted last on hover."""
    costs = result.sheets()["together"]
    values = to_float_array(costs.values)
    alone = result.sheets()["alone"].labels["entry"]
    counts = [int(n) for n in costs.labels["dropped"]]
    last = [f"last evicted {escape_text(alone[n - 1], 40)}" if n else "none" for n in counts]
    texts = [f"{value:.4g} nats<br>{word}" for value, word in zip(values, last, strict=True)]
    hover = f"%{{x:,}} evicted<br>%{{customdata}}<extra>{escape_text(name, 40)}</extra>"
    drawn = line_trace(i, name, np.maximum(values, SMALLEST_COST), "nats")
    return {**drawn, "x": counts, "customdata": texts, "hovertemplate": hover}
