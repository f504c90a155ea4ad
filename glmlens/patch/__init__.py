"""Changing: sites, interventions and sweeps; paths, edges and circuits; worlds side by side; steering."""

from glmlens.patch import rotary
from glmlens.patch.attribute import attribute
from glmlens.patch.changes import Add, Apply, Change, Mean, Noise, Put, Remove, Resample, Scale, Swap, Zero
from glmlens.patch.circuits import FRACTIONS, Circuit, Curve, Exact, greedy, top, whole
from glmlens.patch.edges import EdgeScores, edges
from glmlens.patch.evaluate import Cost, evaluate
from glmlens.patch.graph import Graph
from glmlens.patch.interventions import Intervention, load, save
from glmlens.patch.metrics import Metric
from glmlens.patch.moments import scheduled
from glmlens.patch.paths import path_patch
from glmlens.patch.running import generate, run
from glmlens.patch.sites import PatchError, Site
from glmlens.patch.steer import Steering, steering
from glmlens.patch.sweep import Sweep, check, sweep
from glmlens.patch.timeline import Parting, Timeline, parting, timeline
from glmlens.patch.worlds import Worlds, worlds

__all__ = [
    "FRACTIONS",
    "Add",
    "Apply",
    "Change",
    "Circuit",
    "Cost",
    "Curve",
    "EdgeScores",
    "Exact",
    "Graph",
    "Intervention",
    "Mean",
    "Metric",
    "Noise",
    "Parting",
    "PatchError",
    "Put",
    "Remove",
    "Resample",
    "Scale",
    "Site",
    "Steering",
    "Swap",
    "Sweep",
    "Timeline",
    "Worlds",
    "Zero",
    "attribute",
    "check",
    "edges",
    "evaluate",
    "generate",
    "greedy",
    "load",
    "parting",
    "path_patch",
    "rotary",
    "run",
    "save",
    "scheduled",
    "steering",
    "sweep",
    "timeline",
    "top",
    "whole",
    "worlds",
]  # fmt: skip
