"""Widgets with code of their own on the page, which go on hearing the kernel."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import anywidget
import traitlets as T

WIDGETS_FOLDER = Path(__file__).parent


def read_javascript(name: str) -> str:
    """What a widget of ours runs on the page: a file beside this one, and what keeps it hearing the kernel."""
    return "\n".join((WIDGETS_FOLDER / file).read_text(encoding="utf-8") for file in ("keep_listening.js", name))


class PageWidget(anywidget.AnyWidget):
    """A widget with code of its own, which knows its name on the page."""

    page_id = T.Unicode().tag(sync=True)

    def __init__(self, **traits: Any):
        name = uuid4().hex
        super().__init__(model_id=name, page_id=name, **traits)
