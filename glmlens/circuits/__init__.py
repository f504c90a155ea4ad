"""Circuits: a GLM as a graph, scores of its edges, path patching, and how much of a task a set of edges carries."""

from glmlens.circuits.circuit import (
    FRACTIONS,
    Circuit,
    CircuitEvaluator,
    FaithfulnessCurve,
    full_circuit,
    greedy_circuit,
    top_edges,
)
from glmlens.circuits.edge_attribution import EdgeScores, attribute_edges
from glmlens.circuits.graph import Graph
from glmlens.circuits.path_patching import path_patch

__all__ = [
    "FRACTIONS",
    "Circuit",
    "CircuitEvaluator",
    "EdgeScores",
    "FaithfulnessCurve",
    "Graph",
    "attribute_edges",
    "full_circuit",
    "greedy_circuit",
    "path_patch",
    "top_edges",
]
