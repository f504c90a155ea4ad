"""Write figures and text to one self-contained HTML file."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from glmlens.file_io import expand_path, write_bytes

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
    """Write figures, text and results in order to one self-contained HTML file. Return its path.

    A part is a Plotly figure, text (a line that begins with "# " is a heading), an object with an HTML representation
    for notebooks, or anything else with a repr. Text is escaped, never read as markup. The file contains plotly.js
    (5 MB) once; with `offline=False` it loads plotly.js from the network when it is opened. The file is written
    atomically.
    """
    body: list[str] = []
    n_figures = 0
    for part in parts:
        if hasattr(part, "to_plotly_json"):
            body.append(render_figure(part, n_figures, offline))
            n_figures += 1
        else:
            body.append(render_part(part))
    path = expand_path(path)
    write_bytes(path, sanitise_text(HTML_TEMPLATE.format(title=escape(title), body="\n".join(body))).encode("utf-8"))
    return path


def render_figure(part: Any, number: int, offline: bool) -> str:
    """Return a Plotly figure as HTML. The first figure of a report (number 0) includes plotly.js."""
    script: bool | str = False
    if number == 0:
        script = True if offline else "cdn"
    name = f"figure-{number}"  # a fixed id instead of a random one: equal parts give equal files
    html = part.to_html(full_html=False, include_plotlyjs=script, config=FIGURE_CONFIG, auto_play=False, div_id=name)
    return f"<section>{html}</section>"


def render_part(part: Any) -> str:
    """Return text or a result as HTML."""
    html = None if isinstance(part, str) else getattr(part, "_repr_html_", lambda: None)()
    if html is not None:
        return f"<section>{html}</section>"
    text = part if isinstance(part, str) else repr(part)
    if text.startswith("# ") and "\n" not in text:
        return f"<h2>{escape(text[2:])}</h2>"
    return f'<pre class="text">{escape(text)}</pre>'


def sanitise_text(text: str) -> str:
    """Return text that can be encoded and displayed safely.

    Lone surrogates become the replacement character. Characters that reverse the direction of a line become their
    code points in ⟨⟩.
    """
    text = HTML_BIDI_CONTROLS.sub(lambda match: f"⟨{ord(match[0]):04X}⟩", text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
