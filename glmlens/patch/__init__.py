"""Changing: sites, interventions and sweeps; paths, edges and circuits; worlds side by side; steering."""

from glmlens.patch import rotary
from glmlens.patch.changes import Add, Apply, Change, Mean, Noise, Put, Remove, Resample, Scale, Swap, Zero
from glmlens.patch.edges import EdgeScores, edges
from glmlens.patch.evaluate import Cost, evaluate
from glmlens.patch.graph import Graph
from glmlens.patch.interventions import Intervention, generate, load, run, save
from glmlens.patch.metrics import Metric
from glmlens.patch.sites import PatchError, Site
from glmlens.patch.steer import Steering, steering
from glmlens.patch.sweep import Sweep, check, sweep
from glmlens.patch.timeline import Parting, Timeline, parting, scheduled, timeline
from glmlens.patch.worlds import Worlds, worlds

__all__ = [
    "Add", "Apply", "Change", "Cost", "EdgeScores", "Graph", "Intervention", "Mean", "Metric", "Noise", "Parting",
    "PatchError", "Put", "Remove", "Resample", "Scale", "Site", "Steering", "Swap", "Sweep", "Timeline", "Worlds",
    "Zero",
    "check", "edges", "evaluate", "generate", "load", "parting", "rotary", "run", "save", "scheduled", "steering",
    "sweep", "timeline", "worlds",
]  # fmt: skip
