"""Figures and text into one HTML file that needs nothing else."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; background: #8080801a; padding: .8rem 1rem; border-radius: 6px; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def save_html(path: str | Path, title: str, parts: Sequence[Any]) -> Path:
    """Write Plotly figures and text, in order, to one self-contained file; text is shown as it is, never as markup."""
    body, script = [], True
    for part in parts:
        if isinstance(part, str):
            body.append(f"<pre>{escape(part)}</pre>")
        else:
            config = {"showSendToCloud": False, "displaylogo": False, "responsive": True}
            body.append(part.to_html(full_html=False, include_plotlyjs=script, config=config))
            script = False
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PAGE.format(title=escape(title), body="\n".join(body)), encoding="utf-8")
    return path
