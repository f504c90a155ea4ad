"""Numbers in, Plotly figures out. Knows axes and labels, no models, and shows nothing by itself."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

Numbers = Any
"""A numpy array, or what becomes one: nested lists, a CPU tensor."""
GREY = "#808080"  # reads on white and on black


def head_scores(scores: Numbers, title: str, what: str = "score") -> go.Figure:
    """Scores [layer, head] as a heatmap, layer 0 at the bottom."""
    layers, heads = np.shape(scores)
    heat = go.Heatmap(
        z=np.asarray(scores, np.float32),
        x=np.arange(heads),
        y=np.arange(layers),
        colorscale="Viridis",
        zmin=0,
        hovertemplate=f"layer %{{y}}, head %{{x}}<br>{shown(what)} %{{z:.3f}}<extra></extra>",
    )
    figure = go.Figure(heat, layout(title, 110 + 34 * layers))
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(title="layer", dtick=1)
    return figure


def grid(
    values: Numbers, rows: Sequence[str], columns: Sequence[str], title: str, axes: tuple[str, str], what: str
) -> go.Figure:
    """Signed numbers [row, column] as a heatmap with zero in the middle, the first row at the bottom."""
    z = np.asarray(values, np.float32)
    most = float(np.nanmax(np.abs(z), initial=1e-9))
    y, x = np.arange(len(rows)), np.arange(len(columns))
    heat = go.Heatmap(
        z=z,
        x=x,
        y=y,
        text=np.vectorize("{:.2f}".format)(z),
        texttemplate="%{text}",
        colorscale="RdBu",
        zmin=-most,
        zmax=most,
        hovertemplate=f"{shown(axes[0])} %{{y}}, {shown(axes[1])} %{{x}}<br>{shown(what)} %{{z:.3f}}<extra></extra>",
    )
    figure = go.Figure(heat, layout(title, 130 + 34 * len(rows)))
    figure.update_xaxes(title=shown(axes[1]), tickvals=x, ticktext=[shown(label) for label in columns])
    figure.update_yaxes(title=shown(axes[0]), tickvals=y, ticktext=[shown(label) for label in rows])
    return figure


def attention_pattern(pattern: Numbers, labels: Sequence[str], title: str) -> go.Figure:
    """One head's attention [query, key] as a heatmap, the first query on top; labels are of the tokens."""
    ticks = [shown(label) for label in labels]
    position = np.arange(len(ticks))
    hover = [[f"{query} ({i}) attends to {key} ({j})" for j, key in enumerate(ticks)] for i, query in enumerate(ticks)]
    heat = go.Heatmap(
        z=np.asarray(pattern, np.float32),
        x=position,
        y=position,
        customdata=np.array(hover, dtype=object),
        colorscale="Viridis",
        zmin=0,
        zmax=1,
        hovertemplate="%{customdata}<br>%{z:.1%}<extra></extra>",
    )
    figure = go.Figure(heat, layout(title, 180 + 16 * len(ticks)))
    figure.update_xaxes(title="key", tickvals=position, ticktext=ticks, tickangle=-60)
    figure.update_yaxes(title="query", tickvals=position, ticktext=ticks, autorange="reversed")
    return figure


def shown(text: str) -> str:
    """Text that Plotly shows as it is: markup escaped, and no mathematics begun."""
    return escape(text, quote=False).replace("$", "&#36;")


def layout(title: str, height: int) -> go.Layout:
    """Transparent, in grey text, so that it reads in a light and in a dark notebook; nothing is offered for upload."""
    return go.Layout(
        title={"text": shown(title), "font": {"size": 15}},
        height=height,
        margin={"l": 90, "r": 20, "t": 60, "b": 90},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY},
        xaxis={"showgrid": False, "zeroline": False},
        yaxis={"showgrid": False, "zeroline": False},
        modebar={"remove": ["sendChartToCloud"]},
    )
