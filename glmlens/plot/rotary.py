"""Figures of rotary embeddings: scores by frequency pair, patterns by position alone, effects of rotary edits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from typing_extensions import Unpack

from glmlens.integers import Integer, read_integer
from glmlens.plot.arrays import pool_blocks, to_float_array
from glmlens.plot.bars import bars
from glmlens.plot.heatmaps import draw_heatmap
from glmlens.plot.lines import lines
from glmlens.plot.style import MAGNITUDE, MOST_CELLS, Look, apply_style, color_bar, escape_text
from glmlens.results import Labelled

PATTERN_TITLES = {
    "pattern": "full pattern",
    "rotary_alone": "rotated channels only",
    "content_alone": "unrotated channels only",
    "position_alone": "position only",
}
TARGET_TITLES = {
    "previous": "previous token",
    "duplicate": "earlier occurrence",
    "induction": "token after an earlier occurrence",
}
CYCLIC_COLORS = [
    [0, "#2f1436"],
    [0.25, "#6276ba"],
    [0.5, "#e2d9e2"],
    [0.75, "#b2614f"],
    [1, "#2f1436"],
]  # -pi and pi have one colour


def score_by_pair(
    parts: Any, query: Integer | str | None = None, *, max_cells: int = MOST_CELLS, **look: Unpack[Look]
) -> go.Figure:
    """Draw the contribution of each frequency pair, and of the unrotated channels, to one query's scores [part, key].

    `parts` is the result of `analysis.score_parts`. `query` is the position of a query or its label, by default the
    last one. Labels of pairs give their wavelength in tokens. Keys after the query stay empty.
    """
    label, data = select_query(parts, "part", query)
    named = Labelled(to_float_array(data.values).T, ("part", "key"), data.labels, drop_fields(data.about, "metric"))
    name = f"Score of query {label} by frequency pair"
    return draw_heatmap(named, "part of the score", signed=True, down=True, max_cells=max_cells, look=look, name=name)


def rotary_angles(
    parts: Any, query: Integer | str | None = None, *, max_cells: int = MOST_CELLS, **look: Unpack[Look]
) -> go.Figure:
    """Draw the rotation angle of each pair between one query and every key [pair, key], in radians from -pi to pi.

    `parts` is the result of `analysis.score_parts`, and `query` as in `score_by_pair`. -pi and pi have the same colour.
    """
    label, data = select_query(parts, "angle", query)
    with np.errstate(invalid="ignore"):
        # Wrap to [-pi, pi).
        angles = (to_float_array(data.values).T + np.pi) % (2 * np.pi) - np.pi
    named = Labelled(angles, ("pair", "key"), data.labels, drop_fields(data.about, "metric"))
    name = f"Angle between query {label} and every key"
    limits = (-np.pi, np.pi)
    figure = draw_heatmap(
        named, "radians", signed=False, down=True, limits=limits, max_cells=max_cells, look=look, name=name
    )
    return figure.update_traces(colorscale=CYCLIC_COLORS, selector={"type": "heatmap"})


def select_query(parts: Any, sheet: str, query: Integer | str | None) -> tuple[str, Labelled]:
    """Return the label of a query, by default the last, and its numbers of a sheet [query, key, part or pair]."""
    sheet_data = parts.sheets()[sheet]
    data = sheet_data.at(query=sheet_data.labels["query"][-1] if query is None else query)
    return data.about["query"], data


def drop_fields(about: Any, *keys: str) -> dict[str, str]:
    """Return the fields of `about` without some."""
    return {key: text for key, text in about.items() if key not in keys}


def rotary_patterns(parts: Any, *, max_cells: int = 128, **look: Unpack[Look]) -> go.Figure:
    """Draw a head's pattern, and its patterns from rotated channels, unrotated channels or position alone.

    `parts` is the result of `analysis.score_parts`. All have one colour scale, from 0 to 1; the first query is on top.
    """
    sheets = [parts.sheets()[name] for name in PATTERN_TITLES]
    small = [pool_blocks(Labelled(to_float_array(x.values), x.axes, x.labels, x.about), max_cells) for x in sheets]
    figure = make_subplots(
        2, 2, subplot_titles=list(PATTERN_TITLES.values()), shared_xaxes=True, shared_yaxes=True, vertical_spacing=0.07,
        horizontal_spacing=0.04,
    ).update_annotations(font_size=12)  # fmt: skip
    for i, (words, (data, _)) in enumerate(zip(PATTERN_TITLES.values(), small, strict=True)):
        figure.add_trace(pattern_heatmap(data, words), 1 + i // 2, 1 + i % 2)
    data, note = small[0]
    label_pattern_axes(figure, data.labels["query"], data.labels["key"])
    figure.update_layout(coloraxis={"colorscale": MAGNITUDE, "cmin": 0, "cmax": 1, "colorbar": color_bar("attention")})
    about = {**data.about, "metric": "attention"}
    tall: Look = {"height": 700}
    return apply_style(figure, "Content against position", about, (note,), extra_space=24, **(tall | look))  # type: ignore[arg-type]


def pattern_heatmap(data: Labelled, words: str) -> go.Heatmap:
    """Return one pattern, `words` in its hover."""
    hover = f"query %{{y}}, key %{{x}}<br>attention %{{z:.4g}}<extra>{words}</extra>"
    at = {"x": np.arange(data.shape[1]), "y": np.arange(data.shape[0])}
    return go.Heatmap(z=data.values, hovertemplate=hover, hoverongaps=False, coloraxis="coloraxis", **at)


def label_pattern_axes(figure: go.Figure, queries: Sequence[str], keys: Sequence[str]) -> None:
    """Label every axis at integer places with at most 24 labels, the first query on top."""
    for axis, labels in (("xaxes", keys), ("yaxes", queries)):
        step = -(-len(labels) // 24)
        ticks = {"tickvals": list(range(len(labels)))[::step], "ticktext": [escape_text(t, 14) for t in labels[::step]]}
        getattr(figure, f"update_{axis}")(**ticks)
    figure.update_yaxes(range=[len(queries) - 0.5, -0.5]).update_yaxes(title="query", col=1)
    figure.update_xaxes(tickangle=-55).update_xaxes(title="key", row=2)


def attention_by_distance(
    profile: Any, layer: Integer | str, *, show: str = "attention", **look: Unpack[Look]
) -> go.Figure:
    """Draw the attention by distance alone of every head of a layer, a line per head.

    `profile` is the result of `analysis.distance_profile`. `show` is "attention", or "score" (before the softmax).
    """
    if show not in ("attention", "score"):
        raise ValueError(f"show is {show!r}; choose from 'attention', 'score'")
    data = profile.sheets()[show].at(layer=layer)
    heads = [f"head {head}" for head in data.labels["head"]]
    metric = f"{show.capitalize()} by distance alone, layer {data.about['layer']}"
    about = {**drop_fields(data.about, "direction"), "metric": metric}
    axis = "distance, tokens"
    series = Labelled(data.values, ("head", axis), {"head": heads, axis: data.labels["distance"]}, about)
    return lines(series, along=axis, what=show, **look)


def pair_use(use: Any, kind: str = "induction", *, top: Integer = 24, **look: Unpack[Look]) -> go.Figure:
    """Draw how much each frequency pair raises the score of a target token [head, part], for the `top` heads.

    `use` is the result of `analysis.pair_use`. `kind` is the target: "previous", "duplicate" or "induction". Heads are
    ordered by the sum of their parts, the largest on top; those need not attend there most, see `analysis.pair_use`.
    """
    sheets = use.sheets()
    if kind not in sheets:
        raise ValueError(f"kind is {kind!r}; this result has {', '.join(sheets)}")
    data = sheets[kind]
    values = to_float_array(data.values).reshape(-1, data.shape[2])
    sums = np.where(np.isfinite(values), values, 0).sum(1)
    # Rank heads by the sum over pairs; parts that are not finite count as zero.
    order = np.argsort(-sums, kind="stable")[: read_integer(top, "top", least=1)]
    heads = [f"{layer}.{head}" for layer in data.labels["layer"] for head in data.labels["head"]]
    labels = {"head": [heads[i] for i in order], "part": data.labels["part"]}
    best = Labelled(values[order], ("head", "part"), labels, drop_fields(data.about, "direction"))
    note = f"the {len(order)} heads with the largest sums, of {len(heads):,}" if len(order) < len(heads) else ""
    name = f"Rotary pairs that raise the score of the {TARGET_TITLES.get(kind, kind)}"
    return draw_heatmap(best, "score", signed=True, down=True, look=look, name=name, notes=(note,))


def breakage(result: Any, show: str = "kl", **look: Unpack[Look]) -> go.Figure:
    """Draw the effect of each rotary edit, a bar each, first on top: `show` is "kl", "loss" (nats) or "agreement"."""
    sheets = result.sheets()
    if show not in sheets:
        raise ValueError(f"show is {show!r}; this result has {', '.join(sheets)}")
    data = sheets[show]
    units = {"kl": "nats", "loss": "nats", "agreement": "share of positions with the same next token"}
    title = f"Effect of rotary edits: {units[show] if show == 'agreement' else data.about.get('metric', show)}"
    known: Look = {"title": title}
    return bars(data, what=units.get(show, show), top=len(data.labels[data.axes[0]]), **(known | look))
