"""Base class of widgets with their own JavaScript, and the fix that keeps them receiving kernel messages."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import anywidget
import traitlets as T

WIDGETS_FOLDER = Path(__file__).parent


def read_javascript(name: str) -> str:
    """Return the JavaScript of a widget: keep_listening.js followed by the file `name` of this folder."""
    return "\n".join((WIDGETS_FOLDER / file).read_text(encoding="utf-8") for file in ("keep_listening.js", name))


class PageWidget(anywidget.AnyWidget):
    """A widget with its own JavaScript. `page_id` is its model id, by which keep_listening.js finds it on the page."""

    page_id = T.Unicode().tag(sync=True)

    def __init__(self, **traits: Any):
        name = uuid4().hex
        super().__init__(model_id=name, page_id=name, **traits)
