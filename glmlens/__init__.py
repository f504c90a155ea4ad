"""glmlens: a GLM you can read, with every tensor in it named."""

import os
from importlib import import_module
from types import ModuleType

from glmlens.config import CheckpointError, GLMConfig
from glmlens.hooks import Hook, HookError, Point, off, only
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens, Run, load
from glmlens.model import GLM
from glmlens.record import Activations

__all__ = [
    "GLM",
    "Activations",
    "CheckpointError",
    "GLMConfig",
    "Hook",
    "HookError",
    "KVCache",
    "Lens",
    "Point",
    "Run",
    "load",
    "off",
    "only",
]


# On Linux, torch then asks the kernel for large pages: most of what a recording costs is being handed memory. It counts
# until torch makes its first tensor; an environment that says otherwise is obeyed.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> ModuleType:
    """Load `glmlens.analysis` and `glmlens.plot`, which brings Plotly, when they are first used."""
    if name in ("analysis", "plot"):
        return import_module(f"glmlens.{name}")
    raise AttributeError(f"module 'glmlens' has no attribute {name!r}")
