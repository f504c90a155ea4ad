"""A plotly figure on the page that can be replaced by another, and reports clicks."""

from collections.abc import Callable
from typing import Any

import ipywidgets as W
import plotly.graph_objects as go
import traitlets as T
from plotly.offline import get_plotlyjs

from glmlens.widgets.anywidget_base import PageWidget, read_javascript

CellIndex = tuple[int | tuple[int, int], int | tuple[int, int]]

# A black frame with a white halo, seen on light and on dark cells.
FRAME = {"type": "rect", "line": {"color": "#000000", "width": 3}}
FRAME_HALO = {"type": "rect", "line": {"color": "#ffffff", "width": 5}}
PLOTLY_CONFIG = {"displaylogo": False, "showSendToCloud": False}
TOOLBAR_PIXELS = 24  # height of the row of plotly tools
MAX_CELLS = 256  # cells drawn along an axis; more positions are pooled into blocks


class PlotlyWidget(PageWidget):
    """A figure of plotly.js on the page, as JSON; a click sends {"click": [row, column]} or {"click": [i]}."""

    _esm = read_javascript("chart.js")
    figure = T.Unicode().tag(sync=True)
    library = T.Unicode().tag(sync=True)
    config = T.Dict().tag(sync=True)


class PlotlyLibrary:
    """plotly.js, 5 MB, for all charts of the page: the value of a plain text widget that is never closed."""

    widget: Any = None

    @classmethod
    def model_id(cls) -> str:
        """Return the id of the widget, made at the first call."""
        if cls.widget is None or cls.widget.comm is None:
            cls.widget = W.Text(get_plotlyjs())
        return cls.widget.model_id


class Chart:
    """A figure on the page that `draw` replaces. `box` is its place in a layout, `figure` the figure drawn last.

    A plotly FigureWidget sends 5 MB each, and stops receiving messages on a page that took two seconds to load it. Here
    the library is sent once, and each figure as a whole. A click on a heatmap calls `on_click(row, column)`, one on a
    bar or a point `on_click(i)`.
    """

    def __init__(self, on_click: Callable[..., Any] | None = None):
        self.box = W.VBox()
        self.on_click = on_click
        self.drawing: PlotlyWidget | None = None
        self.figure: Any = None

    def draw(self, figure: go.Figure, cell: CellIndex | None = None) -> None:
        """Draw a figure, with a frame around a cell (row, column); each is a number or the two ends of a range."""
        layout: Any = figure.layout
        layout.update(title=merge_subtitle(layout.title), autosize=layout.width is None)
        # Move the title below the row of tools.
        layout.update(title_pad_t=TOOLBAR_PIXELS + 4, margin_t=(layout.margin.t or 100) + TOOLBAR_PIXELS - 8)
        self.figure = figure
        self.mark(cell)

    def mark(self, cell: CellIndex | None) -> None:
        """Move the frame to another cell, and send the figure; the widget is made at the first call."""
        self.figure.layout.shapes = frame_shapes(cell)
        text = self.figure.to_json()
        if self.drawing is not None:
            self.drawing.set_trait("figure", text)
            return
        self.drawing = PlotlyWidget(figure=text, library=PlotlyLibrary.model_id(), config=PLOTLY_CONFIG)
        self.drawing.on_msg(self.on_message)
        self.box.children = (self.drawing,)

    def close(self) -> None:
        """Close the widget, and drop the references to the figure and the callback."""
        self.on_click = None
        self.figure = None
        self.box.children = ()
        if self.drawing is not None:
            self.drawing.on_msg(self.on_message, remove=True)
            self.drawing.set_trait("figure", "")
            for widget in (self.drawing.layout, self.drawing):
                widget.close()
            self.drawing = None

    def on_message(self, drawing: Any, message: Any, buffers: Any) -> None:
        """Call `on_click` for a click on the page."""
        if self.on_click and isinstance(message, dict) and "click" in message:
            self.on_click(*map(int, message["click"]))


def block_size(n: int) -> int:
    """Return how many of n neighbouring positions are drawn as one cell."""
    return -(-n // MAX_CELLS)


def merge_subtitle(title: Any) -> dict[str, Any]:
    """Return title and subtitle as one text: plotly.react draws a changed subtitle over the title."""
    lines = f"<br><span style='font-size:12px'>{title.subtitle.text}</span>" if title.subtitle.text else ""
    return {"text": f"{title.text or ''}{lines}", "subtitle": {"text": None}}


def frame_shapes(cell: CellIndex | None) -> list[dict[str, Any]]:
    """Return the shapes of a frame around a cell; none without a cell."""
    if cell is None:
        return []
    (y0, y1), (x0, x1) = ((at, at) if isinstance(at, int) else at for at in cell)
    corners = {"x0": x0 - 0.5, "x1": x1 + 0.5, "y0": y0 - 0.5, "y1": y1 + 0.5}
    return [FRAME_HALO | corners, FRAME | corners]
