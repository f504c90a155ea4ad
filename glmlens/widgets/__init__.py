"""Interactive explorers for notebooks: run a `Lens` and look at the result with mouse and keyboard.

Each explorer is an ipywidgets box. Clicks, sliders and keys call its `select`; `run` runs the model again.
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
