"""Patch activations: sites, interventions, sweeps, attribution patching, runs side by side, steering, rotary edits."""

from glmlens.deprecated import resolve_old_names
from glmlens.patch import rotary
from glmlens.patch.apply import generate_with_interventions, run_with_interventions
from glmlens.patch.attribution_patching import attribution_patch
from glmlens.patch.evaluate import Cost, evaluate
from glmlens.patch.interventions import Intervention, load_interventions, save_interventions
from glmlens.patch.metrics import Metric
from glmlens.patch.replacement_values import Add, Apply, Change, Mean, Noise, Put, Remove, Resample, Scale, Swap, Zero
from glmlens.patch.side_by_side import SideBySideRuns, run_side_by_side
from glmlens.patch.sites import PatchError, Site
from glmlens.patch.steering_vectors import SteeringVector, fit_steering
from glmlens.patch.sweep import Sweep, check_sweep, sweep

__all__ = [
    "Add",
    "Apply",
    "Change",
    "Cost",
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
    "Zero",
    "attribution_patch",
    "check_sweep",
    "evaluate",
    "fit_steering",
    "generate_with_interventions",
    "load_interventions",
    "rotary",
    "run_side_by_side",
    "run_with_interventions",
    "save_interventions",
    "sweep",
]  # fmt: skip

OLD_NAMES = {
    "Circuit": "glmlens.circuits.Circuit",
    "Curve": "glmlens.circuits.FaithfulnessCurve",
    "EdgeScores": "glmlens.circuits.EdgeScores",
    "Exact": "glmlens.circuits.CircuitEvaluator",
    "FRACTIONS": "glmlens.circuits.FRACTIONS",
    "Graph": "glmlens.circuits.Graph",
    "Parting": "glmlens.timeline.Divergence",
    "Steering": "glmlens.patch.SteeringVector",
    "Timeline": "glmlens.timeline.Timeline",
    "Worlds": "glmlens.patch.SideBySideRuns",
    "attribute": "glmlens.patch.attribution_patch",
    "check": "glmlens.patch.check_sweep",
    "edges": "glmlens.circuits.attribute_edges",
    "generate": "glmlens.patch.generate_with_interventions",
    "greedy": "glmlens.circuits.greedy_circuit",
    "load": "glmlens.patch.load_interventions",
    "parting": "glmlens.timeline.find_divergence",
    "path_patch": "glmlens.circuits.path_patch",
    "run": "glmlens.patch.run_with_interventions",
    "save": "glmlens.patch.save_interventions",
    "scheduled": "glmlens.timeline.schedule_edits",
    "steering": "glmlens.patch.fit_steering",
    "timeline": "glmlens.timeline.record_timeline",
    "top": "glmlens.circuits.top_edges",
    "whole": "glmlens.circuits.full_circuit",
    "worlds": "glmlens.patch.run_side_by_side",
}
__getattr__ = resolve_old_names("glmlens.patch", OLD_NAMES)
