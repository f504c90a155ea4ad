"""A figure on the page that becomes other figures, and says which of its cells is clicked."""

from collections.abc import Callable
from typing import Any

import ipywidgets as W
import plotly.graph_objects as go
import traitlets as T
from plotly.offline import get_plotlyjs

from glmlens.widgets.anywidget_base import PageWidget, read_javascript

CellIndex = tuple[int | tuple[int, int], int | tuple[int, int]]

FRAME = {"type": "rect", "line": {"color": "#000000", "width": 3}}
FRAME_HALO = {"type": "rect", "line": {"color": "#ffffff", "width": 5}}
PLOTLY_CONFIG = {"displaylogo": False, "showSendToCloud": False}
TOOLBAR_PIXELS = 24  # pixels that the row of tools takes
MAX_CELLS = 256  # cells along an axis


class PlotlyWidget(PageWidget):
    """A figure of plotly.js on the page, as JSON; a click comes as a message, {"click": where}."""

    _esm = read_javascript("chart.js")
    figure, library = T.Unicode().tag(sync=True), T.Unicode().tag(sync=True)
    config = T.Dict().tag(sync=True)


class PlotlyLibrary:
    """plotly.js for all charts of the page, 5 MB: in a plain widget that stays."""

    widget: Any = None

    @classmethod
    def model_id(cls) -> str:
        if cls.widget is None or cls.widget.comm is None:
            cls.widget = W.Text(get_plotlyjs())
        return cls.widget.model_id


class Chart:
    """A figure that becomes other figures; `box` is where it stands on the page and `figure` what is seen.

    A plotly FigureWidget weighs 5 MB each, and is deaf for ever on a page that took two seconds to load it; here the
    library comes once, and a figure is sent whole. `clicked(row, column)` is called for a click on a heatmap,
    `clicked(i)` for one on a bar or a point.
    """

    def __init__(self, clicked: Callable[..., Any] | None = None):
        self.box, self.on_click = W.VBox(), clicked
        self.drawing: PlotlyWidget | None = None
        self.figure: Any = None

    def draw(self, figure: go.Figure, cell: CellIndex | None = None) -> None:
        """Show this figure, with a frame around a cell (row, column), each a number or the two ends of a range."""
        layout: Any = figure.layout
        layout.update(title=merge_subtitle(layout.title), autosize=layout.width is None)
        layout.update(
            title_pad_t=TOOLBAR_PIXELS + 4, margin_t=(layout.margin.t or 100) + TOOLBAR_PIXELS - 8
        )  # below the tools
        self.figure = figure
        self.mark(cell)

    def mark(self, cell: CellIndex | None) -> None:
        """Move the frame to another cell."""
        self.figure.layout.shapes = frame_shapes(cell)
        text = self.figure.to_json()
        if self.drawing is not None:
            self.drawing.set_trait("figure", text)
            return
        self.drawing = PlotlyWidget(figure=text, library=PlotlyLibrary.model_id(), config=PLOTLY_CONFIG)
        self.drawing.on_msg(self.on_message)
        self.box.children = (self.drawing,)

    def close(self) -> None:
        """Let go of the figure and of who is told of clicks."""
        self.on_click, self.figure, self.box.children = None, None, ()
        if self.drawing is not None:
            self.drawing.on_msg(self.on_message, remove=True)
            self.drawing.set_trait("figure", "")
            for widget in (self.drawing.layout, self.drawing):
                widget.close()
            self.drawing = None

    def on_message(self, drawing: Any, message: Any, buffers: Any) -> None:
        if self.on_click and isinstance(message, dict) and "click" in message:
            self.on_click(*map(int, message["click"]))


def block_size(n: int) -> int:
    """How many of n things in a row are drawn as one cell."""
    return -(-n // MAX_CELLS)


def merge_subtitle(title: Any) -> dict[str, Any]:
    """A title with the lines under it in one text: a figure that becomes another writes a subtitle over its title."""
    lines = f"<br><span style='font-size:12px'>{title.subtitle.text}</span>" if title.subtitle.text else ""
    return {"text": f"{title.text or ''}{lines}", "subtitle": {"text": None}}


def frame_shapes(cell: CellIndex | None) -> list[dict[str, Any]]:
    """A frame that is seen on light and on dark cells."""
    if cell is None:
        return []
    (y0, y1), (x0, x1) = ((at, at) if isinstance(at, int) else at for at in cell)
    corners = {"x0": x0 - 0.5, "x1": x1 + 0.5, "y0": y0 - 0.5, "y1": y1 + 0.5}
    return [FRAME_HALO | corners, FRAME | corners]
