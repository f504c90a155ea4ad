"""Figures and text into one HTML file that needs nothing else."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from glmlens.storage import expand_path, write_bytes

HTML_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
pre.text {{ white-space: pre-wrap; background: #8080801a; padding: .8rem 1rem; border-radius: 6px; font-size: 14px; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #80808055; padding: .15rem .6rem; text-align: left; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
HTML_BIDI_CONTROLS = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
FIGURE_CONFIG = {"showSendToCloud": False, "displaylogo": False, "responsive": True}


def save_html(path: str | Path, title: str, parts: Sequence[Any], *, offline: bool = True) -> Path:
    """Write figures, text and results, in order, to one self-contained file; returns the file.

    A part is a Plotly figure, text (a line that begins with "# " is a heading), something that a notebook would show as
    HTML, or anything else with a repr. Text is shown as it is, never as markup. The file holds plotly.js (5 MB) once;
    with `offline=False` it is fetched from the network when the file is opened. It is written whole or not at all.
    """
    body: list[str] = []
    drawn = 0
    for part in parts:
        if hasattr(part, "to_plotly_json"):
            body.append(render_figure(part, drawn, offline))
            drawn += 1
        else:
            body.append(render_part(part))
    path = expand_path(path)
    write_bytes(path, sanitise_text(HTML_TEMPLATE.format(title=escape(title), body="\n".join(body))).encode("utf-8"))
    return path


def render_figure(part: Any, number: int, offline: bool) -> str:
    """A figure as HTML; the first one brings plotly.js."""
    script = (True if offline else "cdn") if number == 0 else False
    name = f"figure-{number}"
    html = part.to_html(full_html=False, include_plotlyjs=script, config=FIGURE_CONFIG, auto_play=False, div_id=name)
    return f"<section>{html}</section>"


def render_part(part: Any) -> str:
    """Text or a result as HTML."""
    if not isinstance(part, str) and (as_html := getattr(part, "_repr_html_", lambda: None)()) is not None:
        return f"<section>{as_html}</section>"
    text = part if isinstance(part, str) else repr(part)
    if text.startswith("# ") and "\n" not in text:
        return f"<h2>{escape(text[2:])}</h2>"
    return f'<pre class="text">{escape(text)}</pre>'


def sanitise_text(text: str) -> str:
    """Text that can be written: half a character is the replacement character, and what turns the line is a number."""
    text = HTML_BIDI_CONTROLS.sub(lambda found: f"⟨{ord(found[0]):04X}⟩", text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
