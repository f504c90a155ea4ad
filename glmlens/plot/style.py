"""The style of every figure: readable on light and dark pages, text shown literally, no upload button."""

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any, TypedDict

import numpy as np
import plotly.colors
import plotly.graph_objects as go
import plotly.io

GREY = "#808080"  # readable on white and on black
FAINT = "rgba(128,128,128,0.25)"
MAGNITUDE = "Viridis"
POSITIVE, NEGATIVE = "#D6604D", "#4393C3"
SIGNED = (  # straight lines in CIELAB from a grey: distance in colour is proportional to distance from zero
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
EQUAL_CONTRAST_LUMINANCE = 0.179  # background luminance at which black and white text have equal contrast
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")  # Okabe and Ito 2008
MOST_CELLS = 256  # cells along an axis; more are pooled
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
    """Keywords of every figure: its title and the line under it (plain text), and its size in pixels.

    `about` describes plain numbers under the title by "prompt", "metric" and "model", as results do themselves.
    """

    title: str
    subtitle: str
    about: Mapping[str, str]
    height: int
    width: int


def escape_text(text: object, max_length: int | None = None) -> str:
    """Return text that Plotly and HTML show literally: escaped markup, no MathJax, no template fields."""
    return escape_markup(truncate(show_control_characters(str(text)), max_length))


def truncate(text: str, max_length: int | None) -> str:
    """Return at most `max_length` characters, "…" for the rest."""
    return text if max_length is None or len(text) <= max_length else text[: max_length - 1] + "…"


def escape_markup(text: str) -> str:
    """Escape HTML, "$" (MathJax) and "%{" (a field of a hover template)."""
    return escape(text, quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def show_control_characters(text: str) -> str:
    """Replace newlines and tabs by symbols, and surrogates, control and bidirectional characters by their number."""
    return "".join(WHITESPACE_SYMBOLS.get(c) or (f"⟨{ord(c):04X}⟩" if is_control_character(c) else c) for c in text)


def is_control_character(c: str) -> bool:
    """Whether a character is a control character, a surrogate, or changes the direction or line of text."""
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
    """Apply the template, and write the title and below it the prompt, metric, model and notes.

    `name` is the default title, `facts` what the result says of itself. `extra_space` is in pixels, between these lines
    and the figure. `height` is that of the plot; the lines above come on top.
    """
    notes = [*notes, *mask_infinite(figure)]
    head = name if title is None else title
    described = subtitle_lines({**facts, **(about or {})}, head) if subtitle is None else [subtitle]
    lines = [line for line in (*described, " · ".join(filter(None, notes))) if line]
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
    """Return a line for the prompt and one for metric, direction, pairs and model, less what the title says already."""
    first = [about["prompt"]] if "prompt" in about else []
    words = {"metric": "{}", "direction": "{}", "pairs": "{} pairs", "model": "model {}"}
    texts = [
        word.format(about[what])
        for what, word in words.items()
        if about.get(what) and about[what].lower() not in title.lower()
    ]
    return first + ([" · ".join(texts)] if texts else [])


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
    """Label the integer places of an axis ("x" or "y"): in full on hover, and shortened along the axis.

    At most `max_ticks` labels of `max_length` characters are drawn. Labels are never coordinates, because Plotly merges
    equal ones. With `first_on_top` the first place is on top.
    """
    n = len(labels)
    step = max(1, -(-len(labels) // max_ticks))
    places = list(range(n))
    ends = [n - 0.5, -0.5] if first_on_top else [-0.5, n - 0.5]
    full = {"tickvals": places, "ticktext": [escape_text(label, 60) for label in labels], "range": ends}
    brief = {"tickvals": places[::step], "ticktext": [escape_text(label, max_length) for label in labels[::step]]}
    # Labels that would overlap are drawn at an angle; a character is about 7 pixels wide.
    steep = axis == "x" and 7 * sum(min(len(label), max_length) + 1 for label in labels[::step]) > 700
    style = {"title": {"text": escape_text(title)}, **({"tickangle": -55} if steep else {})}
    if step == 1 and brief["ticktext"] == full["ticktext"]:
        figure.update_layout({f"{axis}axis": full | style})
        return
    # The hover reads the labels of the trace's own axis, so shortened ones need an axis of their own.
    over = {"overlaying": axis, "matches": axis, "side": "bottom" if axis == "x" else "left", "range": ends}
    figure.update_layout({f"{axis}axis": full | {"showticklabels": False}, f"{axis}axis2": brief | over | style})
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
    """Return the note that counts infinite numbers, which are not drawn; "" if there are none."""
    count = int(np.isinf(values).sum())
    return count_infinite(count) if count else ""


def count_infinite(count: int) -> str:
    """Return the note for so many infinite numbers."""
    return f"{count:,} infinite {'number is' if count == 1 else 'numbers are'} left empty"


def finite_most(values: np.ndarray, least: float = 0.0) -> float:
    """Return the largest magnitude of the finite numbers, at least `least`."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=least))


def format_signed(form: str, value: float) -> str:
    """Return a number as text; one that rounds to zero has no sign."""
    if not np.isfinite(value):
        return str(value)
    text = form.format(value)
    return text if any(c in "123456789" for c in text) else form.replace("+", "").format(0.0)


def color_bar(what: str) -> dict[str, Any]:
    """Return the colour bar, `what` wrapped as its title."""
    lines = [*map(escape_text, wrap(what, 12)), "\u00a0"]  # an empty line keeps the title off the highest tick
    small = {"exponentformat": "power", "minexponent": 5}
    return {"title": {"text": "<br>".join(lines)}, "thickness": 12, "outlinewidth": 0, **small}


def color_scale(values: Any, signed: bool) -> dict[str, Any]:
    """Return the colour scale of numbers: zero in the middle if signed, else from zero or the smallest negative one."""
    finite = values[np.isfinite(values)]
    if signed:
        most = float(np.abs(finite).max(initial=0)) or 1.0
        return {"colorscale": SIGNED, "zmin": -most, "zmax": most}
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return {"colorscale": MAGNITUDE, "zmin": min(low, 0.0), "zmax": high if high > min(low, 0.0) else 1.0}


def text_colors(values: np.ndarray, colorscale: Any, zmin: int | float, zmax: int | float) -> list[str]:
    """Return black or white for every number, whichever contrasts more with its colour (luminance as in WCAG 2.2)."""
    at, names = zip(
        *plotly.colors.get_colorscale(colorscale) if isinstance(colorscale, str) else colorscale, strict=True
    )
    stops = np.array([plotly.colors.hex_to_rgb(name) for name in names]) / 255
    share = np.clip((values - zmin) / (zmax - zmin), 0, 1)
    color = np.stack([np.interp(share, at, stops[:, i]) for i in range(3)], -1)
    # sRGB to relative luminance.
    light = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    return np.where(light > EQUAL_CONTRAST_LUMINANCE, "#000000", "#ffffff").tolist()
