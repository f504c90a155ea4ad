"""Changing: sites, interventions and sweeps; paths, edges and circuits; worlds side by side; steering."""

from glmlens.patch import rotary
from glmlens.patch.attribute import attribution_patch
from glmlens.patch.changes import Add, Apply, Change, Mean, Noise, Put, Remove, Resample, Scale, Swap, Zero
from glmlens.patch.circuits import (
    FRACTIONS,
    Circuit,
    CircuitEvaluator,
    FaithfulnessCurve,
    full_circuit,
    greedy_circuit,
    top_edges,
)
from glmlens.patch.edges import EdgeScores, attribute_edges
from glmlens.patch.evaluate import Cost, evaluate
from glmlens.patch.graph import Graph
from glmlens.patch.interventions import Intervention, load_interventions, save_interventions
from glmlens.patch.metrics import Metric
from glmlens.patch.moments import schedule_edits
from glmlens.patch.paths import path_patch
from glmlens.patch.running import generate_with_interventions, run_with_interventions
from glmlens.patch.sites import PatchError, Site
from glmlens.patch.steer import SteeringVector, fit_steering
from glmlens.patch.sweep import Sweep, check_sweep, sweep
from glmlens.patch.timeline import Divergence, Timeline, find_divergence, record_timeline
from glmlens.patch.worlds import SideBySideRuns, run_side_by_side

__all__ = [
    "FRACTIONS",
    "Add",
    "Apply",
    "Change",
    "Circuit",
    "CircuitEvaluator",
    "Cost",
    "Divergence",
    "EdgeScores",
    "FaithfulnessCurve",
    "Graph",
    "Intervention",
    "Mean",
    "Metric",
    "Noise",
    "PatchError",
    "Put",
    "Remove",
    "Resample",
    "Scale",
    "SideBySideRuns",
    "Site",
    "SteeringVector",
    "Swap",
    "Sweep",
    "Timeline",
    "Zero",
    "attribute_edges",
    "attribution_patch",
    "check_sweep",
    "evaluate",
    "find_divergence",
    "fit_steering",
    "full_circuit",
    "generate_with_interventions",
    "greedy_circuit",
    "load_interventions",
    "path_patch",
    "record_timeline",
    "rotary",
    "run_side_by_side",
    "run_with_interventions",
    "save_interventions",
    "schedule_edits",
    "sweep",
    "top_edges",
]  # fmt: skip
