"""A figure on the page that becomes other figures, and says which of its cells is clicked."""

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go

Cell = tuple[int | tuple[int, int], int | tuple[int, int]]

MARK = {"type": "rect", "line": {"color": "#000000", "width": 3}}
HALO = {"type": "rect", "line": {"color": "#ffffff", "width": 5}}
CONFIG = {"displaylogo": False, "showSendToCloud": False, "responsive": True}
LOADED = 60  # seconds after which a figure is not in use: no page still loads it, no click still goes through it
TOOLS = 24  # pixels that the row of tools takes
MOST = 256  # cells along an axis: a FigureWidget sends every number as text


class Chart:
    """A figure that becomes other figures; `box` is where it stands on the page.

    A FigureWidget weighs 5 MB, and what is sent to one whose page is still loading is lost there. So it is made with a
    figure in it, takes on others of the same kinds of traces, and makes room for a new one when they differ.
    `clicked(row, column)` is called for a click on a heatmap, `clicked(i)` for one on a bar or a point.
    """

    def __init__(self, clicked: Callable[..., Any] | None = None):
        self.box, self.clicked = W.VBox(), clicked
        self.widget: go.FigureWidget | None = None
        self.left: list[tuple[float, go.FigureWidget]] = []  # no longer shown, since when

    def draw(self, figure: go.Figure, cell: Cell | None = None) -> None:
        """Show this figure, with a frame around a cell (row, column), each a number or the two ends of a range."""
        layout: Any = figure.layout
        layout.update(shapes=framed(cell), title=one_title(layout.title), autosize=layout.width is None)
        layout.update(title_pad_t=TOOLS + 4, margin_t=(layout.margin.t or 100) + TOOLS - 8)  # below the tools
        blank_nan(figure)
        if self.widget is not None and kinds(self.widget) == kinds(figure):
            self.change(self.widget, figure)
            return
        last, self.widget = self.widget, go.FigureWidget(figure)
        self.widget._config = CONFIG
        for trace in self.widget.data:
            if hasattr(trace, "on_click") and self.clicked:
                trace.on_click(self.heard)
        self.box.children = (self.widget,)
        if last is not None:
            self.left.append((time.monotonic(), last))
        while self.left and time.monotonic() - self.left[0][0] > LOADED:
            discard(self.left.pop(0)[1])

    def change(self, widget: Any, figure: go.Figure) -> None:
        """Turn the figure on the page into this one; first in the state that a page begins with."""
        soon: Any = go.Figure(widget)
        turn(soon, figure)
        widget._widget_layout, widget._widget_data = deepcopy(soon._layout_obj._props), deepcopy(soon._data)
        with widget.batch_update():
            turn(widget, figure)

    def mark(self, cell: Cell | None) -> None:
        """Move the frame to another cell."""
        widget: Any = self.widget
        soon: Any = go.Figure(widget)
        soon.layout.shapes = framed(cell)
        widget._widget_layout = deepcopy(soon._layout_obj._props)
        widget.layout.shapes = framed(cell)

    def close(self) -> None:
        """Let go of the figure and of who is told of clicks."""
        self.clicked, self.box.children = None, ()
        for widget in (self.widget, *(widget for _, widget in self.left)):
            discard(widget)
        self.widget, self.left = None, []

    def heard(self, trace: Any, points: Any, device: Any) -> None:
        """Every trace is told of a click; the one that was hit has a point."""
        if points.point_inds and self.clicked:
            place = points.point_inds[0]
            self.clicked(*map(int, place if isinstance(place, list | tuple) else [place]))


def block(n: int) -> int:
    """How many of n things in a row are drawn as one cell."""
    return -(-n // MOST)


def one_title(title: Any) -> dict[str, Any]:
    """A title with the lines under it in one text: a figure that becomes another writes a subtitle over its title."""
    lines = f"<br><span style='font-size:12px'>{title.subtitle.text}</span>" if title.subtitle.text else ""
    return {"text": f"{title.text or ''}{lines}", "subtitle": {"text": None}}


def discard(widget: Any) -> None:
    """Take a figure away from the page: anywidget itself keeps the empty FigureWidget for ever."""
    if widget is not None:
        widget.data, widget.layout = (), {}
        W.Widget.close(widget)


def turn(old: Any, new: Any) -> None:
    """Make one figure another that has the same kinds of traces."""
    for mine, wanted in zip(old.data, new.data, strict=True):
        become(mine, wanted)
    become(old.layout, new.layout)


def blank_nan(figure: Any) -> None:
    """Put nothing in the place of every nan of a heatmap: a page is sent JSON, which has none."""
    for trace in figure.data:
        z = np.asarray(trace.z) if trace.type == "heatmap" else np.zeros(0)
        if z.dtype.kind == "f" and np.isnan(z).any():
            sent = z.astype(object)
            sent[np.isnan(z)] = None
            trace.z = sent


def kinds(figure: Any) -> list[Any]:
    """The kind of every trace, and all that is set: a page that unsets something before it has drawn does not draw."""
    return [(trace.type, given(trace)) for trace in figure.data] + [given(figure.layout)]


def given(part: Any) -> set[str]:
    """The properties that are set; asking a figure for one that is not gives an empty one."""
    return set(part.to_plotly_json()) - {"uid", "type"}


def become(old: Any, new: Any) -> None:
    """Make the properties of one part of a figure those of another that has the same ones."""
    for name in given(new):
        if name != "template" or old[name] != new[name]:
            old[name] = new[name]


def framed(cell: Cell | None) -> list[dict[str, Any]]:
    """A frame that is seen on light and on dark cells."""
    if cell is None:
        return []
    (y0, y1), (x0, x1) = ((at, at) if isinstance(at, int) else at for at in cell)
    corners = {"x0": x0 - 0.5, "x1": x1 + 0.5, "y0": y0 - 0.5, "y1": y1 + 0.5}
    return [HALO | corners, MARK | corners]
