"""A figure on the page that becomes other figures, and says which of its cells is clicked."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import plotly.graph_objects as go

MARK = {"type": "rect", "line": {"color": "#000000", "width": 3}}
HALO = {"type": "rect", "line": {"color": "#ffffff", "width": 5}}
MOST = 256  # cells along an axis: a FigureWidget sends every number as text


class Chart:
    """A FigureWidget of 5 MB that is sent once: `draw` turns it into another figure.

    `clicked(row, column)` is called for a click on a heatmap, `clicked(i)` for one on a bar or a point.
    """

    def __init__(self, clicked: Callable[..., Any] | None = None):
        self.widget, self.clicked = go.FigureWidget(), clicked

    def draw(self, figure: go.Figure, cell: tuple[int, int] | None = None) -> None:
        """Show this figure, with a frame around a cell (row, column)."""
        widget = self.widget
        figure.update_layout(shapes=framed(cell), title=one_title(figure["layout"]["title"]))
        figure.update_layout(modebar={"orientation": "v"})
        if kinds(widget) == kinds(figure):
            with widget.batch_update():
                for old, new in zip(widget.data, figure.data, strict=True):
                    become(old, new)
                become(widget.layout, figure.layout)
            self.remember()
            return
        widget.data = ()
        widget.layout = figure.layout
        widget.add_traces(figure.data)
        for trace in widget.data:
            if hasattr(trace, "on_click") and self.clicked:
                trace.on_click(self.heard)
        self.remember()

    def remember(self) -> None:
        """Put what is drawn into the state that a page begins with: what is sent while it still loads is lost there."""
        widget: Any = self.widget
        widget._widget_layout, widget._widget_data = deepcopy(widget._layout_obj._props), deepcopy(widget._data)

    def mark(self, cell: tuple[int, int] | None) -> None:
        """Move the frame to another cell."""
        self.widget.layout.shapes = framed(cell)
        self.remember()

    def close(self) -> None:
        """Let go of the figure and of who is told of clicks: anywidget itself keeps the empty FigureWidget for ever."""
        self.clicked, self.widget.data, self.widget.layout = None, (), {}

    def heard(self, trace: Any, points: Any, device: Any) -> None:
        """Every trace is told of a click; the one that was hit has a point."""
        if points.point_inds and self.clicked:
            place = points.point_inds[0]
            self.clicked(*map(int, place if isinstance(place, list | tuple) else [place]))


def one_title(title: Any) -> dict[str, Any]:
    """A title with the lines under it in one text: a figure that becomes another writes a subtitle over its title."""
    lines = f"<br><span style='font-size:12px'>{title.subtitle.text}</span>" if title.subtitle.text else ""
    return {"text": f"{title.text or ''}{lines}", "subtitle": {"text": None}}


def kinds(figure: Any) -> list[str]:
    return [trace.type for trace in figure.data]


def become(old: Any, new: Any) -> None:
    """Make the properties of one part of a figure those of another; what it no longer has is unset."""
    wanted = {name: new[name] for name in new if new[name] is not None and name not in ("uid", "type")}
    for name in old:
        if name not in ("uid", "type", "template") and name not in wanted and old[name] is not None:
            old[name] = None
    if "template" in wanted and old["template"] == wanted["template"]:
        wanted.pop("template")
    for name, value in wanted.items():
        old[name] = value


def framed(cell: tuple[int, int] | None) -> list[dict[str, Any]]:
    """A frame that is seen on light and on dark cells."""
    if cell is None:
        return []
    row, column = cell
    corners = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    return [HALO | corners, MARK | corners]
