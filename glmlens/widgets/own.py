"""Widgets with code of their own on the page, which go on hearing the kernel."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import anywidget
import traitlets as T

HERE = Path(__file__).parent


def code(name: str) -> str:
    """What a widget of ours runs on the page: a file beside this one, and what keeps it hearing the kernel."""
    return "\n".join((HERE / file).read_text(encoding="utf-8") for file in ("hear.js", name))


class Own(anywidget.AnyWidget):
    """A widget with code of its own, which knows its name on the page."""

    own = T.Unicode().tag(sync=True)

    def __init__(self, **traits: Any):
        name = uuid4().hex
        super().__init__(model_id=name, own=name, **traits)
