"""Circuits: the strongest edges between components of a model, layers from bottom to top."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from typing_extensions import Unpack

from glmlens.integers import Integer, read_integer
from glmlens.plot.style import FAINT, NEGATIVE, POSITIVE, Look, apply_style, escape_text

Edge = tuple[str, str]
LABEL_BACKGROUND = "#5f5f5f"
CURVE_STEPS = np.linspace(0, 1, 24)  # points along an edge


def circuit(scores: Any, *, top: Integer = 20, **look: Unpack[Look]) -> go.Figure:
    """Draw the `top` edges of largest magnitude as lines from writers to readers.

    Width is magnitude; red is positive, blue negative. `scores` is an EdgeScores, or pairs of (writer, reader) and
    score, as its `top` returns. Layers go upwards: queries, keys and values below the heads they feed, MLPs above the
    heads. The dot on an edge shows its score on hover. Raises ValueError if no score is finite.
    """
    top = read_integer(top, "top", least=1)
    edges = scores.top(top) if hasattr(scores, "top") else strongest_edges(scores, top)
    given = len(edges)
    edges = [(edge, score) for edge, score in edges if np.isfinite(score)]
    if not edges:
        raise ValueError("there are no edges to draw" + (": no score is a finite number" if given else ""))
    about = {key: text for key, text in getattr(scores, "about", {}).items() if key in ("metric", "model", "pairs")}
    places = place_nodes({name for edge, _ in edges for name in edge})
    most = max(abs(score) for _, score in edges) or 1.0
    figure = go.Figure()
    # Draw strong edges last, over the weak ones.
    for (writer, reader), score in sorted(edges, key=lambda edge: abs(edge[1])):
        figure.add_scatter(**edge_trace(places[writer], places[reader], score, most))
    graph = getattr(scores, "graph", None)
    figure.add_scatter(**head_links(places, graph.n_heads // graph.n_kv_heads if graph else 0))
    figure.add_scatter(**edge_dots(places, edges))
    figure.update_layout(annotations=node_labels(places))
    layers = sorted({y for _, y in places.values()})
    figure.update_xaxes(visible=False, range=[-0.08, 1.08])
    figure.update_yaxes(visible=False)
    figure.update_layout(showlegend=False)
    skipped = given - len(edges)
    note = f"{skipped:,} more have no finite score" if skipped else ""
    sign = str(getattr(scores, "about", {}).get("sign", ""))
    tall: Look = {"height": 90 + 46 * len(layers)}
    return apply_style(
        figure, f"The {len(edges)} strongest edges: red positive, blue negative", about, (sign, note), **(tall | look)
    )  # type: ignore[arg-type]


def strongest_edges(scores: Mapping[Edge, float] | Sequence[tuple[Edge, float]], top: int) -> list[tuple[Edge, float]]:
    """Return the `top` edges of largest magnitude."""
    pairs = scores.items() if isinstance(scores, Mapping) else scores
    scored = [(edge, float(score)) for edge, score in pairs]
    return sorted(scored, key=lambda pair: -np.nan_to_num(abs(pair[1]), posinf=0))[:top]


def node_height(name: str) -> int:
    """Return the height of a component: the embedding lowest, three rows per layer, the logits on top."""
    layer, _, part = name.partition(".")
    if not part:
        return -1 if name == "embed" else 10**9
    return 3 * int(layer) + (2 if part == "mlp" else 1 if part.startswith("head") else 0)


def node_order(name: str) -> tuple[str, int]:
    """Return the sort key of a component along its row: queries, keys, values, each by number."""
    part = name.partition(".")[2]
    kind = part.rstrip("0123456789")
    return {"q": "0", "k": "1", "v": "2"}.get(kind, kind), int(part[len(kind) :] or 0)


def place_nodes(names: set[str]) -> dict[str, tuple[float, int]]:
    """Return x and y of every component: rows without empty ones, evenly spread along each."""
    rows: dict[int, list[str]] = {}
    for name in sorted(names, key=node_order):
        rows.setdefault(node_height(name), []).append(name)
    places = {}
    for y, high in enumerate(sorted(rows)):
        for i, name in enumerate(rows[high]):
            # Every second row is shifted, so that edges do not run through nodes.
            places[name] = ((i + 0.5 + 0.18 * (y % 2)) / (len(rows[high]) + 0.18), y)
    return places


def edge_trace(start: tuple[float, int], end: tuple[float, int], score: float, most: float) -> dict[str, Any]:
    """Return an edge as a curve, vertical at both ends."""
    (x0, y0), (x1, y1) = start, end
    # Smoothstep: its derivative is zero at both ends.
    smooth = 3 * CURVE_STEPS**2 - 2 * CURVE_STEPS**3
    width = 1 + 6 * abs(score) / most
    color = POSITIVE if score > 0 else NEGATIVE
    return {
        "x": x0 + (x1 - x0) * smooth,
        "y": y0 + (y1 - y0) * CURVE_STEPS,
        "mode": "lines",
        "line": {"width": width, "color": color},
        "opacity": 0.65,
        "hoverinfo": "skip",
    }


def edge_dots(places: Mapping[str, tuple[float, int]], edges: Sequence[tuple[Edge, float]]) -> dict[str, Any]:
    """Return a dot on every edge, its score on hover."""
    ends = [(places[writer], places[reader]) for (writer, reader), _ in edges]
    share = [0.35 + 0.3 * (i % 5) / 4 for i in range(len(edges))]  # at different heights, to keep them apart
    texts = [
        f"{escape_text(writer)} → {escape_text(reader)}<br>score {score:+.4g}" for (writer, reader), score in edges
    ]
    return {
        "x": [a[0] + (b[0] - a[0]) * (3 * t**2 - 2 * t**3) for (a, b), t in zip(ends, share, strict=True)],
        "y": [a[1] + (b[1] - a[1]) * t for (a, b), t in zip(ends, share, strict=True)],
        "mode": "markers",
        "marker": {"size": 7, "color": [POSITIVE if score > 0 else NEGATIVE for _, score in edges]},
        "customdata": texts,
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def head_links(places: Mapping[str, tuple[float, int]], group: int) -> dict[str, Any]:
    """Return thin lines to heads from their queries and, if `group` (heads per KV head) is not 0, keys and values."""
    x: list[float | None] = []
    y: list[float | None] = []
    for name, (x0, y0) in places.items():
        layer, _, part = name.partition(".")
        for head in heads_of_part(part, group):
            if f"{layer}.head{head}" in places:
                x1, y1 = places[f"{layer}.head{head}"]
                x += [x0, x1, None]
                y += [y0, y1, None]
    return {"x": x, "y": y, "mode": "lines", "line": {"width": 1, "color": FAINT}, "hoverinfo": "skip"}


def heads_of_part(part: str, group: int) -> list[int]:
    """Return the heads that a component such as "q3" or "v1" belongs to."""
    kind, number = part[:1], part[1:]
    if kind not in ("q", "k", "v") or not number.isdigit():
        return []
    return [int(number)] if kind == "q" else list(range(int(number) * group, (int(number) + 1) * group))


def node_labels(places: Mapping[str, tuple[float, int]]) -> list[dict[str, Any]]:
    """Return the names of the components, white on grey: readable over any edge and on any page."""
    style = {"showarrow": False, "bgcolor": LABEL_BACKGROUND, "borderpad": 3, "font": {"size": 11, "color": "#ffffff"}}
    return [{"x": x, "y": y, "text": escape_text(name), **style} for name, (x, y) in places.items()]
