"""Circuits: exact runs by masks, and what is said of them."""

import numpy as np
import pytest
import torch
from conftest import small_lens
from test_patch_edges import CLEAN, CORRUPT, PAIR, written_apart

from glmlens import circuits
from glmlens.circuits.circuit import FaithfulnessCurve
from glmlens.circuits.graph import Graph


@pytest.fixture(params=["glm", "glm4"], scope="module")
def lens64(request):
    return small_lens(request.param, dtype=torch.float64)


@pytest.fixture(scope="module")
def scores(lens64):
    return circuits.attribute_edges(lens64, CLEAN, CORRUPT, metric=PAIR)


def test_the_whole_graph_is_the_model_and_no_edge_is_the_ablated_run(lens64):
    exact = circuits.CircuitEvaluator(lens64, CLEAN, CORRUPT, metric=PAIR)
    torch.testing.assert_close(
        exact.run_circuit(circuits.full_circuit(exact.graph)), lens64(CLEAN), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(exact.run_circuit(exact.empty_circuit()), lens64(CORRUPT), rtol=1e-12, atol=1e-12)
    assert exact.faithfulness(circuits.full_circuit(exact.graph)) == pytest.approx(1, abs=1e-12)
    assert exact.faithfulness(exact.empty_circuit()) == 0
    assert exact.completeness(circuits.full_circuit(exact.graph)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("edge", [("embed", "0.v1"), ("0.head2", "2.q3"), ("1.mlp", "2.k0"), ("0.head1", "0.mlp"),
                                  ("2.head3", "logits")])  # fmt: skip
def test_one_edge_left_out_is_that_readers_stream_moved_by_that_writer(lens64, edge):
    exact, graph = circuits.CircuitEvaluator(lens64, CLEAN, CORRUPT, metric=PAIR), Graph.from_config(lens64.cfg)
    one, other = (lens64.W_E[tokens] for tokens in (CLEAN, CORRUPT))
    a, b = (written_apart(lens64, embed)[1] for embed in (one, other))
    offsets = torch.zeros(len(graph.readers), *one.shape, dtype=torch.float64)
    writer, reader = graph.writers.index(edge[0]), graph.readers.index(edge[1])
    offsets[reader] = b[writer] - a[writer]
    found = exact.run_circuit(circuits.full_circuit(graph).remove_edge(edge))
    torch.testing.assert_close(found, written_apart(lens64, one, offsets)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations_are_what_every_edge_carries(lens64, ablation):
    exact = circuits.CircuitEvaluator(lens64, CLEAN, CORRUPT, metric=PAIR, ablation=ablation)
    last = lens64.run_with_cache(CORRUPT, "resid_post")[1]["resid_post", 2]
    resid = torch.zeros_like(last) if ablation == "zero" else last.mean(0, keepdim=True).expand_as(last)
    expected = lens64(resid, start_layer=3, attention_mask=torch.ones_like(CLEAN))
    torch.testing.assert_close(exact.run_circuit(exact.empty_circuit()), expected, rtol=1e-10, atol=1e-10)


def test_circuits_are_the_edges_that_were_asked_for(scores):
    best = circuits.top_edges(scores, 12)
    assert set(best.edges()) == {edge for edge, _ in scores.top(12)}
    need = circuits.top_edges(scores, 5, by="need")
    assert max(scores[edge] for edge in need.edges()) <= sorted(scores.scores.flatten().tolist())[4]
    found = circuits.greedy_circuit(scores, 30)
    assert found.n_edges == 30
    assert found.prune().n_edges > 0
    heard = {"logits"}
    by_hand = set()
    while len(by_hand) < 30:  # the definition, edge by edge
        open_edges = [e for e in scores.graph.edges() if e[1] in heard and e not in by_hand]
        edge = max(open_edges, key=lambda e: abs(scores[e]))
        by_hand.add(edge)
        layer, _, part = edge[0].partition(".")
        if part == "mlp":
            heard.add(edge[0])
        elif part:
            h = int(part.removeprefix("head"))
            heard |= {f"{layer}.q{h}", f"{layer}.k{h // 2}", f"{layer}.v{h // 2}"}
    assert set(found.edges()) == by_hand


def test_pruning_leaves_what_lies_on_a_path(lens64, scores):
    graph = scores.graph
    mask = torch.zeros_like(graph.mask)
    path = [("embed", "0.k1"), ("0.head2", "1.mlp"), ("1.mlp", "logits")]
    dangling = [("embed", "2.q0"), ("1.head0", "logits"), ("0.mlp", "1.v0")]
    for writer, reader in path + dangling:
        mask[graph.readers.index(reader), graph.writers.index(writer)] = True
    assert set(circuits.Circuit(graph, mask).prune().edges()) == set(path)
    exact = circuits.CircuitEvaluator(lens64, CLEAN, CORRUPT, metric=PAIR)
    torch.testing.assert_close(  # what dangles makes no difference: it writes what is ablated, or is not read
        exact.run_circuit(circuits.Circuit(graph, mask)), exact.run_circuit(circuits.Circuit(graph, mask).prune())
    )


def test_minimality_is_what_each_edge_is_worth(lens64, scores):
    exact, circuit = circuits.CircuitEvaluator(lens64, CLEAN, CORRUPT, metric=PAIR), circuits.top_edges(scores, 4)
    found = dict(exact.minimality(circuit))
    assert set(found) == set(circuit.edges())
    for edge, worth in found.items():
        left = exact.faithfulness(circuit.remove_edge(edge))
        assert worth == pytest.approx(abs(exact.faithfulness(circuit) - left))


def test_the_areas_are_those_of_the_curve(lens64, scores):
    exact = circuits.CircuitEvaluator(lens64, CLEAN, CORRUPT, metric=PAIR)
    curve = exact.curve(scores, (0.01, 0.1, 0.5, 1.0))
    f = curve.values
    assert f[-1] == pytest.approx(1, abs=1e-9)
    assert curve.cpr == pytest.approx(0.09 * (f[0] + f[1]) / 2 + 0.4 * (f[1] + f[2]) / 2 + 0.5 * (f[2] + f[3]) / 2)
    d = np.abs(1 - f)
    assert curve.cmd == pytest.approx(0.09 * (d[0] + d[1]) / 2 + 0.4 * (d[1] + d[2]) / 2 + 0.5 * (d[2] + d[3]) / 2)
    assert {"granularity", "component", "ablation", "positions", "direction", "set"} <= curve.about.keys()
    flat = FaithfulnessCurve(np.ones(10), ("share",), {"share": [f"{k:g}" for k in circuits.FRACTIONS]})
    assert (flat.cpr, flat.cmd) == (pytest.approx(0.999), 0)
