"""Changing: sites, interventions and sweeps; paths, edges and circuits; worlds side by side; steering."""

from glmlens.patch.changes import Add, Apply, Change, Mean, Noise, Put, Remove, Resample, Scale, Swap, Zero
from glmlens.patch.evaluate import Cost, evaluate
from glmlens.patch.interventions import Intervention, generate, load, run, save
from glmlens.patch.metrics import Metric
from glmlens.patch.sites import PatchError, Site
from glmlens.patch.sweep import Sweep, check, sweep

__all__ = [
    "Add", "Apply", "Change", "Cost", "Intervention", "Mean", "Metric", "Noise", "PatchError", "Put", "Remove",
    "Resample", "Scale", "Site", "Swap", "Sweep", "Zero", "check", "evaluate", "generate", "load", "run", "save", "sweep",
]  # fmt: skip
