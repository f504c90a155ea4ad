"""Old names of patching and circuits work for one release and warn with the new name."""

import pytest
import torch
from conftest import small_lens

from glmlens import circuits, patch, timeline
from glmlens.patch import Site, rotary

TOKENS = torch.randint(10, 101, (1, 9), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(10, 101, (1, 9), generator=torch.Generator().manual_seed(3))
PAIR = (5, 6)
ONE = patch.Intervention(Site("attn.z", layer=1, pos="S2"), patch.Zero())
NAMES = {"S2": 4}


@pytest.fixture(scope="module")
def lens():
    return small_lens()


def test_positions_by_name_are_still_taken_as_names(lens):
    site = Site("attn.z", layer=1, pos="S2")
    asked = {"over": ("head",), "metric": PAIR}
    calls = (
        lambda **names: patch.sweep(lens, TOKENS, OTHER, site, progress=False, **asked, **names).values.tolist(),
        lambda **names: patch.check_sweep(lens, TOKENS, OTHER, site, **asked, **names),
        lambda **names: patch.evaluate(lens, TOKENS, [[ONE]], PAIR, progress=False, **names).tolist(),
        lambda **names: patch.run_with_interventions(lens, TOKENS, ONE, **names).tolist(),
    )
    for call in calls:
        with pytest.warns(DeprecationWarning, match=r"\(names=\) is now called position_names="):
            old = call(names=NAMES)
        assert old == call(position_names=NAMES)


def test_rotary_edits_are_still_taken_as_surgeries(lens):
    edits = {"frozen": rotary.freeze(lens, pair=1)}
    with pytest.warns(DeprecationWarning, match=r"breakage\(surgeries=\) is now called rotary_edits="):
        old = rotary.breakage(lens, TOKENS, surgeries=edits)
    assert old.loss.values.tolist() == rotary.breakage(lens, TOKENS, rotary_edits=edits).loss.values.tolist()


def test_old_attributes_are_the_new_ones(lens):
    runs = patch.run_side_by_side(lens, {"a": TOKENS, "b": OTHER})
    for thing, old, new in (
        (patch.Cost(1, 2, 3, 4, 5, 6), "waves", "batches"),
        (Site("kv.k", layer=1, head=0), "ungrouped", "by_query_head"),
        (runs, "names", "run_names"),
    ):
        with pytest.warns(DeprecationWarning, match=rf"\.{old} is now called \.{new}"):
            assert getattr(thing, old) == getattr(thing, new)


def test_old_methods_are_the_new_ones(lens):
    vector = patch.fit_steering(lens, TOKENS, OTHER)
    with pytest.warns(DeprecationWarning, match=r"normalized is now called \.normalize"):
        assert torch.equal(vector.normalized().vectors, vector.normalize().vectors)
    exact = circuits.CircuitEvaluator(lens, TOKENS, OTHER, metric=PAIR)
    every = circuits.full_circuit(exact.graph)
    with pytest.warns(DeprecationWarning, match=r"without is now called \.remove_edge"):
        assert every.without(("embed", "logits")).n_edges == every.n_edges - 1
    with pytest.warns(DeprecationWarning, match=r"logits is now called \.run_circuit"):
        assert torch.equal(exact.logits(every), exact.run_circuit(every))
    with pytest.warns(DeprecationWarning, match=r"metric_of is now called \.measure_circuit"):
        assert torch.equal(exact.metric_of(every), exact.measure_circuit(every))
    with pytest.warns(DeprecationWarning, match=r"choices is now called \.describe_choices"):
        assert exact.choices() == exact.describe_choices()


def test_the_rule_of_rotary_edits_and_the_hooks_of_a_schedule_keep_their_old_names(lens):
    with pytest.warns(DeprecationWarning, match=r"rotary\.turning is now called glmlens\.patch\.rotary\.rotary_edit"):
        assert rotary.turning is rotary.rotary_edit
    with pytest.warns(DeprecationWarning, match=r"schedule_edits\(what=\) is now called hooks="):
        scheduled = timeline.schedule_edits(lens, what={"blocks.0.attn.z": lambda z, point: z}, steps=1)
    assert [name for name, _ in scheduled] == ["blocks.0.attn.z"]
