"""glmlens: a GLM you can read, with every tensor in it named."""

import os
from importlib import import_module
from typing import Any

from glmlens.config import CheckpointError, GLMConfig
from glmlens.deprecated import resolve_old_names
from glmlens.errors import GlmlensError
from glmlens.hook_points import HookError, Point
from glmlens.hooks import Hook, off, only
from glmlens.kv_cache import KVCache
from glmlens.lens import GenerationResult, Lens, load
from glmlens.model import GLM
from glmlens.recording.activations import Activations, load_activations
from glmlens.recording.harvest import load_harvest

__all__ = [
    "GLM",
    "Activations",
    "CheckpointError",
    "GLMConfig",
    "GenerationResult",
    "GlmlensError",
    "Hook",
    "HookError",
    "KVCache",
    "Lens",
    "Point",
    "load",
    "load_activations",
    "load_harvest",
    "off",
    "only",
]


# On Linux, torch then asks the kernel for large pages: most of what a recording costs is being handed memory. It counts
# until torch makes its first tensor; an environment that says otherwise is obeyed.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


OLD_NAMES = {"Run": "glmlens.lens.GenerationResult", "report": "glmlens.html_report.save_html"}
LAZY_SUBPACKAGES = ("analysis", "cache", "circuits", "patch", "plot", "tasks", "timeline", "widgets")


def __getattr__(name: str) -> Any:
    """Import a subpackage when it is first used (`glmlens.plot` loads Plotly), and resolve old names with a warning."""
    if name in LAZY_SUBPACKAGES:
        return import_module(f"glmlens.{name}")
    if name == "save_html":
        return import_module("glmlens.html_report").save_html
    return resolve_old_names("glmlens", OLD_NAMES)(name)
