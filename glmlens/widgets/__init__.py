"""Panels for a notebook in which a model is asked with the mouse and the keyboard: explorers over a `Lens`.

Each is an ipywidgets box. What a click, a slider or a key does is a call of its `select`; `run` asks the model again.
"""

from glmlens.widgets.attention import AttentionExplorer
from glmlens.widgets.base import Explorer, Stopped
from glmlens.widgets.cache import CacheInspector
from glmlens.widgets.chart import Chart
from glmlens.widgets.generation import GenerationExplorer
from glmlens.widgets.patching import PatchExplorer
from glmlens.widgets.rotary import RotaryExplorer

__all__ = [
    "AttentionExplorer",
    "CacheInspector",
    "Chart",
    "Explorer",
    "GenerationExplorer",
    "PatchExplorer",
    "RotaryExplorer",
    "Stopped",
]
