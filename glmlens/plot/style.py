"""One look for every figure: it reads in light and in dark, shows text as it is, and offers nothing for upload."""

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any, TypedDict

import numpy as np
import plotly.colors
import plotly.graph_objects as go
import plotly.io

GREY = "#808080"  # reads on white and on black
FAINT = "rgba(128,128,128,0.25)"
MAGNITUDE = "Viridis"
POSITIVE, NEGATIVE = "#D6604D", "#4393C3"
SIGNED = (  # straight lines in CIELAB from a grey: a colour is as far from it as its number is from zero
    (0, "#0364e2"),
    (0.1, "#5c7ae2"),
    (0.2, "#8491e1"),
    (0.3, "#a5a9e0"),
    (0.4, "#c2c3df"),
    (0.5, "#dddddd"),
    (0.6, "#e1bcb4"),
    (0.7, "#df9b8c"),
    (0.8, "#da7a66"),
    (0.9, "#d15741"),
    (1, "#c52c1d"),
)
EQUAL_CONTRAST_LUMINANCE = 0.179  # luminance on which black and white are read equally well
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")  # Okabe and Ito 2008
MOST_CELLS = 256  # along an axis
LINE_LENGTH = 110  # characters of a line under the title
WHITESPACE_SYMBOLS = {"\n": "↵", "\r": "␍", "\t": "→"}
BIDI_CHARACTERS = {
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
    "\u200e",
    "\u200f",
    "\u2028",
    "\u2029",
}

AXIS_STYLE = {
    "showgrid": False,
    "zeroline": False,
    "automargin": True,
    "ticks": "",
    "ticklabelstandoff": 4,
    "title": {"standoff": 8},
    "linecolor": FAINT,
}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": GREY, "family": "system-ui, sans-serif", "size": 12},
        "colorway": SERIES,
        "xaxis": AXIS_STYLE,
        "yaxis": AXIS_STYLE,
        "hoverlabel": {"bgcolor": "#222222", "bordercolor": GREY, "font": {"color": "#ffffff"}, "align": "left"},
        "modebar": {
            "remove": ["sendChartToCloud", "select2d", "lasso2d"],
            "bgcolor": "rgba(0,0,0,0)",
            "color": GREY,
            "activecolor": GREY,
        },
        "legend": {"bgcolor": "rgba(0,0,0,0)"},
        "showlegend": False,
        "title": {
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 12, "l": 12},
            "font": {"size": 15},
        },
    }
)
plotly.io.templates["glmlens"] = TEMPLATE


class Look(TypedDict, total=False):
    """What every figure takes: its title and the line under it (HTML-free text), and its size in pixels.

    `about` says what plain numbers are of, under the title: "prompt", "metric", "model", as results say it themselves.
    """

    title: str
    subtitle: str
    about: Mapping[str, str]
    height: int
    width: int


def escape_text(text: object, max_length: int | None = None) -> str:
    """Text that Plotly and HTML show as it is: markup escaped, no mathematics or field begun."""
    return escape_markup(truncate(show_control_characters(str(text)), max_length))


def truncate(text: str, max_length: int | None) -> str:
    return text if max_length is None or len(text) <= max_length else text[: max_length - 1] + "…"


def escape_markup(text: str) -> str:
    return escape(text, quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def show_control_characters(text: str) -> str:
    """Newlines and tabs drawn; half characters, control characters and those that turn the line round by number."""
    return "".join(WHITESPACE_SYMBOLS.get(c) or (f"⟨{ord(c):04X}⟩" if is_control_character(c) else c) for c in text)


def is_control_character(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs") or c in BIDI_CHARACTERS


def apply_style(
    figure: go.Figure,
    name: str,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    *,
    about: Mapping[str, str] | None = None,
    extra_space: int = 0,
    title: str | None = None,
    subtitle: str | None = None,
    height: int = 400,
    width: int | None = None,
) -> go.Figure:
    """The figure under its title: what it is, and below that the prompt, the metric, the model and the notes.

    `room` is of pixels between these and the figure.
    """
    notes = [*notes, *mask_infinite(figure)]
    head = name if title is None else title
    said = subtitle_lines({**facts, **(about or {})}, head) if subtitle is None else [subtitle]
    lines = [line for line in (*said, " · ".join(filter(None, notes))) if line]
    small = "<br>".join(escape_text(line, LINE_LENGTH) for line in lines)
    above = 52 + 17 * len(lines) + extra_space
    figure.update_layout(
        template=TEMPLATE,
        title={"text": escape_text(head, 90), "subtitle": {"text": small, "font": {"size": 12}}},
        height=height + above,
        width=width,
        margin={"l": 70, "r": 20, "t": above, "b": 50},
    )
    return figure


def subtitle_lines(about: Mapping[str, str], title: str) -> list[str]:
    """What a result says of itself, less what is in the title: a line for the prompt and a line for the rest."""
    first = [about["prompt"]] if "prompt" in about else []
    words = {"metric": "{}", "direction": "{}", "pairs": "{} pairs", "model": "model {}"}
    said = [
        word.format(about[what])
        for what, word in words.items()
        if about.get(what) and about[what].lower() not in title.lower()
    ]
    return first + ([" · ".join(said)] if said else [])


def set_ticks(
    figure: go.Figure,
    axis: str,
    labels: Sequence[str],
    title: str,
    *,
    max_ticks: int = 36,
    max_length: int = 16,
    first_on_top: bool = False,
) -> None:
    """Integer places with these labels: whole on hover, and along the axis, of `most` characters, as many as have room.

    A label is never a coordinate. `axis` is "x" or "y"; with `down` the first place is on top.
    """
    n, step = len(labels), max(1, -(-len(labels) // max_ticks))
    places = list(range(n))
    ends = [n - 0.5, -0.5] if first_on_top else [-0.5, n - 0.5]
    full = {"tickvals": places, "ticktext": [escape_text(label, 60) for label in labels], "range": ends}
    brief = {"tickvals": places[::step], "ticktext": [escape_text(label, max_length) for label in labels[::step]]}
    steep = axis == "x" and 7 * sum(min(len(label), max_length) + 1 for label in labels[::step]) > 700
    said = {"title": {"text": escape_text(title)}, **({"tickangle": -55} if steep else {})}
    if step == 1 and brief["ticktext"] == full["ticktext"]:
        figure.update_layout({f"{axis}axis": full | said})
        return
    over = {"overlaying": axis, "matches": axis, "side": "bottom" if axis == "x" else "left", "range": ends}
    figure.update_layout({f"{axis}axis": full | {"showticklabels": False}, f"{axis}axis2": brief | over | said})
    nowhere = {"x": [None], "y": [None], f"{axis}axis": f"{axis}2"}  # an axis is drawn only if a trace is on it
    figure.add_scatter(**nowhere, hoverinfo="skip", showlegend=False)


def mask_infinite(figure: go.Figure) -> list[str]:
    """Make what is infinite in a figure nan, which is left empty, and return the notes that say so.

    Axes and colours would stretch to infinity otherwise, and JSON has no such numbers.
    """
    count, drawn, finite = 0, 0, 0
    traces: Any = figure.data
    for trace in traces:
        for name in ("z", "y", "x", "customdata"):
            values = getattr(trace, name, None)
            if values is None:
                continue
            array = np.asarray(values)
            if array.dtype.kind != "f":
                continue
            if name != "customdata":
                drawn, finite = drawn + array.size, finite + int(np.isfinite(array).sum())
            if np.isinf(array).any():
                count += int(np.isinf(array).sum())
                trace[name] = np.where(np.isinf(array), np.nan, array)
    notes = [count_infinite(count)] if count else []
    return [*notes, "no number here is finite: there is nothing to draw"] if drawn and not finite else notes


def infinite_note(values: np.ndarray) -> str:
    """The sentence that says how many numbers are infinite and so not drawn; "" where none is."""
    count = int(np.isinf(values).sum())
    return count_infinite(count) if count else ""


def count_infinite(count: int) -> str:
    return f"{count:,} infinite {'number is' if count == 1 else 'numbers are'} left empty"


def finite_most(values: np.ndarray, least: float = 0.0) -> float:
    """The largest magnitude of the finite numbers, or `least`."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=least))


def format_signed(form: str, value: float) -> str:
    """A number as text; what is rounded to nothing has no sign."""
    if not np.isfinite(value):
        return str(value)
    text = form.format(value)
    return text if any(c in "123456789" for c in text) else form.replace("+", "").format(0.0)


def color_bar(what: str) -> dict[str, Any]:
    """The bar that tells what the colours stand for."""
    lines = [*map(escape_text, wrap(what, 12)), "\u00a0"]  # an empty line keeps the highest number free
    small = {"exponentformat": "power", "minexponent": 5}
    return {"title": {"text": "<br>".join(lines)}, "thickness": 12, "outlinewidth": 0, **small}


def color_scale(values: Any, signed: bool) -> dict[str, Any]:
    """A colour scale for these numbers: zero in the middle if they are signed, else from zero or their smallest."""
    known = values[np.isfinite(values)]
    if signed:
        most = float(np.abs(known).max(initial=0)) or 1.0
        return {"colorscale": SIGNED, "zmin": -most, "zmax": most}
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return {"colorscale": MAGNITUDE, "zmin": min(low, 0.0), "zmax": high if high > min(low, 0.0) else 1.0}


def text_colors(values: np.ndarray, colorscale: Any, zmin: int | float, zmax: int | float) -> list[str]:
    """Black or white for every number, whichever is read better on its colour (luminance as in WCAG 2.2)."""
    at, names = zip(
        *plotly.colors.get_colorscale(colorscale) if isinstance(colorscale, str) else colorscale, strict=True
    )
    stops = np.array([plotly.colors.hex_to_rgb(name) for name in names]) / 255
    share = np.clip((values - zmin) / (zmax - zmin), 0, 1)
    color = np.stack([np.interp(share, at, stops[:, i]) for i in range(3)], -1)
    light = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    return np.where(light > EQUAL_CONTRAST_LUMINANCE, "#000000", "#ffffff").tolist()
