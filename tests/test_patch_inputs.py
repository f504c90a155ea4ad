"""What is passed to patching: the right answer where it can be known, and one clear error where it cannot."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import small_lens

from glmlens import circuits, patch, timeline
from glmlens.patch import Intervention, PatchError, Site, rotary

TOKENS = torch.randint(10, 101, (1, 9), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(10, 101, (1, 9), generator=torch.Generator().manual_seed(3))
VECTOR = tuple(float(i) for i in range(48))
Z = Site("attn.z", layer=1)


@pytest.fixture
def lens():
    return small_lens()


BAD_CHANGES = {
    "Mean()": (lambda: patch.Mean(), "Mean is of no prompt: type Mean.of_prompts"),
    "Mean of texts": (lambda: patch.Mean(("a text", "another")), "Mean holds token ids.*Mean.of_prompts"),
    "Mean of a text": (lambda: patch.Mean("a text"), "Mean holds token ids.*Mean.of_prompts"),
    "Mean of floats": (lambda: patch.Mean(((1.5, 2.0),)), "Mean holds token ids"),
    "Resample()": (lambda: patch.Resample(), "type Resample.of_prompts"),
    "Resample of texts": (lambda: patch.Resample(("a text", "b")), "Resample holds token ids"),
    "Resample by a text": (lambda: patch.Resample(((1, 2),), seed="1"), "seed is '1'; expected a whole number"),
    "Swap of a text": (lambda: patch.Swap("text"), "Swap holds token ids.*Swap.of_prompt"),
    "Swap of an empty text": (lambda: patch.Swap(""), "Swap holds token ids"),
    "Swap of an empty list": (lambda: patch.Swap([]), "Swap is of no prompt"),
    "Swap of several": (lambda: patch.Swap(((1, 2), (3, 4))), "Swap takes one prompt, not 2"),
    "Swap of a dict": (lambda: patch.Swap({"input_ids": [1]}), "Swap holds token ids"),
    "Noise of a text": (lambda: patch.Noise("3"), "scale is '3'; expected a number"),
    "Noise of nan": (lambda: patch.Noise(float("nan")), "scale is nan"),
    "Noise with a text as seed": (lambda: patch.Noise(3, seed=1.5), "seed is 1.5; expected a whole number"),
    "Scale of a text": (lambda: patch.Scale("2"), "factor is '2'; expected a number"),
    "Scale of a bool": (lambda: patch.Scale(True), "factor is True; expected a number"),
    "Scale of a vector": (lambda: patch.Scale([1.0, 2.0]), r"factor is \[1.0, 2.0\]; expected a number"),
    "Put of a text": (lambda: patch.Put("12"), "Put is '12'; expected a vector"),
    "Put of a matrix": (lambda: patch.Put(torch.ones(2, 16)), r"Put is \(2, 16\); expected one vector"),
    "Put of nothing": (lambda: patch.Put(()), "Put is an empty vector"),
    "Put of nan": (lambda: patch.Put([1.0, float("nan")]), "Put is nan"),
    "Add of a number": (lambda: patch.Add(0.5), "expected a vector.*Apply"),
    "Add of a text": (lambda: patch.Add("12"), "expected a vector"),
    "Add of a matrix": (lambda: patch.Add(np.ones((2, 24))), r"\(2, 24\); expected one vector"),
    "Add by a text": (lambda: patch.Add(VECTOR, "2"), "scale is '2'"),
    "Remove of a number": (lambda: patch.Remove(1.0), "expected a vector"),
    "Apply of a name": (lambda: patch.Apply("halved"), "expected a function"),
    "a kind": (lambda: Intervention(Z, patch.Zero), r"Zero is a kind of change: make one, Zero\("),
    "a function": (lambda: Intervention(Z, torch.relu), r"relu is a function: as a change it is Apply\(relu\)"),
    "a number": (lambda: Intervention(Z, 0.0), "0.0 is no change; the changes are Swap, Zero"),
    "no site": (lambda: Intervention(("attn.z", 1), patch.Zero()), "is no site: give Site"),
    "a point by number": (lambda: Site(3), "3 is no point"),
    "a layer alone": (lambda: Site("blocks.3"), "no point is called 'blocks.3'"),
    "a layer by a letter": (lambda: Site("blocks.x.attn.z"), "no point is called"),
}


@pytest.mark.parametrize("what", BAD_CHANGES)
def test_a_change_that_cannot_be_meant_is_one_error_that_says_what_to_type(what):
    make, message = BAD_CHANGES[what]
    with pytest.raises(PatchError, match=f"(?s){message}"):
        make()


def test_changes_take_numbers_and_ids_of_every_library():
    assert (
        patch.Swap([1, 2]) == patch.Swap(torch.tensor([[1, 2]])) == patch.Swap(np.array([1, 2])) == patch.Swap((1, 2))
    )
    assert patch.Mean(torch.tensor([[1, 2], [3, 4]])) == patch.Mean([[1, 2], [3, 4]]) == patch.Mean(((1, 2), (3, 4)))
    assert patch.Mean((np.int64(1), 2)) == patch.Mean(((1, 2),))
    assert patch.Scale(np.float64(2)) == patch.Scale(torch.tensor(2.0)) == patch.Scale(2.0)
    assert patch.Put(torch.tensor(0.5)) == patch.Put(0.5)
    assert patch.Put(np.array([0.5, 1])) == patch.Put(torch.tensor([0.5, 1])) == patch.Put((0.5, 1.0))
    assert Intervention("attn.z", patch.Zero()) == Intervention(Site("attn.z"), patch.Zero())


RUNS = {
    "a site": (lambda lens: patch.run_with_interventions(lens, TOKENS, Z), "is no intervention"),
    "a hook": (
        lambda lens: patch.run_with_interventions(lens, TOKENS, [("blocks.0.attn.z", abs)]),
        "is no intervention",
    ),
    "names that are numbers": (
        lambda lens: run_at(lens, position_names={"S": 40}),
        "position_names: 'S' is 40; .* positions 0 to 8",
    ),
    "names from the end": (lambda lens: run_at(lens, position_names={"S": -1}), "position_names: 'S' is -1"),
    "names that are none": (lambda lens: run_at(lens, position_names=["S"]), "position_names are positions by name"),
    "allow": (lambda lens: run_at(lens, allow="no chang"), "allow='no chang'; what can be allowed is"),
    "nothing returned": (lambda lens: run_at(lens, lambda x: None), "returned NoneType; expected a tensor"),
    "another shape": (lambda lens: run_at(lens, lambda x: x[:1]), "made torch.float32 .* expected"),
    "another dtype": (lambda lens: run_at(lens, lambda x: x.double()), "made torch.float64"),
    "flat variants": (lambda lens: patch.evaluate(lens, TOKENS, [Intervention(Z, patch.Zero())], (5, 6)), "lists of"),
    "no variants": (lambda lens: patch.evaluate(lens, TOKENS, Intervention(Z, patch.Zero()), (5, 6)), "lists of"),
    "names for others": (lambda lens: zero(lens, position_names=[{}, {}]), "1 prompts and 2 names of positions"),
    "sources for others": (lambda lens: zero(lens, sources=OTHER.repeat(2, 1)), "1 prompts and 2 sources"),
    "no metric": (lambda lens: zero(lens, metric=None), "no metric: a metric is"),
    "a metric of texts": (lambda lens: zero(lens, metric=[[" a", " b"], [" c", " d"]]), "is no answer: a metric is"),
    "a metric of letters": (lambda lens: zero(lens, metric="ab"), "a metric is .right, wrong."),
    "a metric of a float": (lambda lens: zero(lens, metric=(5.9, 6)), "5.9 is no answer"),
    "a metric of one": (lambda lens: zero(lens, metric=(5, 5)), "the same token"),
    "a metric of another vocabulary": (lambda lens: zero(lens, metric=(5, 500)), "answer 500; this model has 0 to 100"),
    "a metric that is a class": (lambda lens: zero(lens, metric=patch.Metric), "a metric is"),
    "a metric that sums": (lambda lens: zero(lens, metric=lambda x: x.sum()), "one number per row, \\[row\\]"),
    "a metric that gives floats": (lambda lens: zero(lens, metric=lambda x: [0.5]), "made list of logits"),
    "a metric without a function": (lambda lens: patch.Metric("d", (5, 6)), "expected a name and a function"),
    "answers for others": (
        lambda lens: zero(lens, metric=patch.Metric.of_answers(lens, [(5, 6), (7, 8)])), "answers for 2",
    ),
    "answers that are no pairs": (lambda lens: patch.Metric.of_answers(lens, [5, 6]), "is no pair"),
    "a sweep over a kind": (lambda lens: swept(lens, do=patch.Zero), "Zero is a kind of change"),
    "a sweep over one axis twice": (lambda lens: swept(lens, over=("layer", "layer")), "one axis is there twice"),
    "a sweep of no site": (lambda lens: swept(lens, site=3), "is no site"),
    "nulls by halves": (lambda lens: swept(lens, null=0.5), "null is 0.5: give one whole number"),
    "unequal pairs": (
        lambda lens: circuits.attribute_edges(lens, TOKENS, OTHER.repeat(2, 1), metric=(5, 6)),
        "1 clean and 2",
    ),
    "no other run": (lambda lens: circuits.attribute_edges(lens, TOKENS, None, metric=(5, 6)), "no corrupt prompts"),
    "no steps": (lambda lens: circuits.attribute_edges(lens, TOKENS, OTHER, metric=(5, 6), steps=0), "steps is 0"),
    "no receivers": (lambda lens: circuits.path_patch(lens, TOKENS, OTHER, [], metric=(5, 6)), "no receivers"),
    "a receiver by number": (lambda lens: circuits.path_patch(lens, TOKENS, OTHER, [3], metric=(5, 6)), "is no site"),
    "an axis twice": (
        lambda lens: patch.attribution_patch(lens, TOKENS, OTHER, "attn.z", over=("pos", "pos"), metric=(5, 6)),
        "twice",
    ),
    "a world of two": (
        lambda lens: patch.run_side_by_side(lens, {"a": TOKENS.repeat(2, 1)}),
        "run 'a' is of 2 prompts",
    ),
    "worlds without names": (lambda lens: patch.run_side_by_side(lens, [TOKENS]), "runs are prompts by name"),
    "a world that returns nothing": (
        lambda lens: patch.run_side_by_side(lens, {"a": TOKENS}, {"blocks.0.attn.z": lambda here, point: None}),
        "returned NoneType; expected the runs that change",
    ),
    "a shift by a float": (lambda lens: rotary.shift(lens, 1.5), "by is 1.5: give one whole number"),
    "a shift of nothing": (lambda lens: rotary.shift(lens, {}), "by came out empty.*{4: 3}"),
    "frozen at a text": (lambda lens: rotary.freeze(lens, at="3"), "at is '3': give one whole number"),
    "stretched by a text": (lambda lens: rotary.stretch(lens, "linear", "2"), "factor is '2'"),
    "surgeries without names": (lambda lens: rotary.breakage(lens, TOKENS, [rotary.freeze(lens)]), "no rotary edit"),
    "neither hook nor intervention": (lambda lens: timeline.schedule_edits(lens, [Z]), "hooks are"),
    "ridge below 0": (lambda lens: patch.fit_steering(lens, TOKENS, OTHER, ridge=-1), "ridge is -1"),
    "a steering times a vector": (
        lambda lens: patch.fit_steering(lens, TOKENS, OTHER) * torch.ones(3),
        "factor of a steering vector",
    ),
    "a steering of a layer": (
        lambda lens: patch.fit_steering(lens, TOKENS, OTHER, layers=0)[1],
        "no vector for layer 1",
    ),
    "a steering and a number": (lambda lens: patch.fit_steering(lens, TOKENS, OTHER) + 1, "cannot be added"),
}  # fmt: skip


def run_at(lens, fn=lambda x: x / 2, **options):
    return patch.run_with_interventions(lens, TOKENS, Intervention(Z, patch.Apply(fn)), **options)


def zero(lens, metric=(5, 6), **options):
    return patch.evaluate(lens, TOKENS, [[Intervention(Z, patch.Zero())]], metric, progress=False, **options)


def swept(lens, site="attn.z", over=("layer",), **options):
    return patch.sweep(lens, TOKENS, OTHER, site, over=over, metric=(5, 6), progress=False, **options)


@pytest.mark.parametrize("what", RUNS)
def test_what_patching_cannot_mean_is_one_error_that_says_what_to_type(lens, what):
    call, message = RUNS[what]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(lens)


def test_one_axis_by_its_name_is_that_axis(lens):
    assert swept(lens, over="layer").values.tolist() == swept(lens).values.tolist()
    one = patch.attribution_patch(lens, TOKENS, OTHER, "attn.z", over="layer", metric=(5, 6))
    assert one.axes == ("layer",)
    by_name = circuits.path_patch(lens, TOKENS, OTHER, "logits", metric=(5, 6), progress=False)
    site = circuits.path_patch(lens, TOKENS, OTHER, Site("logits"), metric=(5, 6), progress=False)
    np.testing.assert_array_equal(by_name.values, site.values)


def test_a_receiver_of_some_heads_and_some_channels_receives_every_one_of_them(lens):
    site = Site("attn.q", layer=2, head=(0, 1), d=(2, 3))
    found = circuits.path_patch(lens, TOKENS, OTHER, site, metric=(5, 6), progress=False).values
    parts = [
        circuits.path_patch(lens, TOKENS, OTHER, [site.at(head=h, d=d) for h in (0, 1) for d in (2, 3)], metric=(5, 6),
                         progress=False).values
    ]  # fmt: skip
    np.testing.assert_allclose(found, parts[0], atol=1e-5)


def test_hooks_and_interventions_are_scheduled_together_in_their_order(lens):
    half, zero = ("blocks.1.attn.z", lambda x, point: x + 1), Intervention(Z, patch.Scale(2))
    for order, expected in (([half, zero], lambda x, p: (x + 1) * 2), ([zero, half], lambda x, p: x * 2 + 1)):
        logits = lens.run_with_hooks(TOKENS, timeline.schedule_edits(lens, order))
        torch.testing.assert_close(logits, lens.run_with_hooks(TOKENS, {"blocks.1.attn.z": expected}))


def test_end_is_the_last_position_of_every_prompt_of_a_generation(lens):
    one = Intervention(Site("resid_post", layer=0, pos="end"), patch.Add(VECTOR))
    rows = [TOKENS[0].tolist(), OTHER[0, :5].tolist()]
    run = patch.generate_with_interventions(lens, rows, 4, one, stop_ids=())
    for row, new in zip(rows, run.new_tokens.tolist(), strict=True):
        at = Intervention(one.site.at(pos=len(row) - 1), one.do)
        assert patch.generate_with_interventions(lens, [row], 4, at, stop_ids=()).new_tokens[0].tolist() == new
    kv = lens.new_kv()
    lens(TOKENS[:, :6], kv=kv)
    rest = patch.generate_with_interventions(lens, TOKENS[:, 6:], 4, one, kv=kv, stop_ids=())
    assert rest.new_tokens[0].tolist() == run.new_tokens[0].tolist()
    line = timeline.record_timeline(lens, TOKENS, 4, interventions=one, stop_ids=())
    assert line.tokens == run.new_tokens[0].tolist()
    assert run.new_tokens.tolist() != lens.generate(rows, 4, stop_ids=()).new_tokens.tolist()


def test_values_of_groups_stay_values_of_groups_beside_keys_by_query_head(lens):
    keys, values = (
        Intervention(Site("kv.k", layer=1, head=3), patch.Scale(0.5)),
        Intervention(Site("kv.v", layer=1, kv=1), patch.Scale(3)),
    )
    as_heads = Intervention(Site("kv.v", layer=1, head=(2, 3)), patch.Scale(3))
    torch.testing.assert_close(
        patch.run_with_interventions(lens, TOKENS, [keys, values]),
        patch.run_with_interventions(lens, TOKENS, [keys, as_heads]),
    )


def test_a_file_of_interventions_runs_nothing_that_is_not_given(lens, tmp_path):
    path, done = tmp_path / "these.json", tmp_path / "done"
    (tmp_path / "evil.py").write_text(f"open({str(done)!r}, 'w')\ndef fn(x):\n    return x\n")
    patch.save_interventions(path, [Intervention(Z, patch.Apply(torch.relu))], lens)
    data = json.loads(path.read_text())
    assert data["interventions"][0]["do"] == {"kind": "Apply", "fn": "relu", "key": None}
    data["interventions"][0]["do"]["fn"] = "evil:fn"
    path.write_text(json.dumps(data))
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(tmp_path))
        with pytest.raises(PatchError, match=r"functions={'fn': fn}"):
            patch.load_interventions(path, lens)
    assert not done.exists()
    assert patch.load_interventions(path, lens, functions={"fn": torch.relu}) == [
        Intervention(Z, patch.Apply(torch.relu))
    ]
    halve = lambda x: x / 2  # noqa: E731
    with pytest.raises(PatchError, match="cannot be saved: name its function"):
        patch.save_interventions(path, [Intervention(Z, patch.Apply(halve))], lens)
    patch.save_interventions(path, [Intervention(Z, patch.Apply(halve))], lens, functions={"halve": halve})
    assert patch.load_interventions(path, lens, functions={"halve": halve}) == [Intervention(Z, patch.Apply(halve))]


@pytest.mark.parametrize(
    "one",
    [
        3, {}, {"site": {}, "do": {}}, {"site": {"point": "attn.z"}, "do": {"kind": "Scale"}},
        {"site": {"point": "attn.z", "where": 1}, "do": {"kind": "Zero"}},
        {"site": {"point": "attn.z"}, "do": {"kind": "Scale", "factor": "2"}},
        {"site": {"point": "attn.z"}, "do": {"kind": "Nothing"}}, {"site": "attn.z", "do": 3},
    ],
)  # fmt: skip
def test_a_file_of_broken_interventions_is_one_error(lens, tmp_path, one):
    patch.save_interventions(tmp_path / "x.json", [Intervention(Z, patch.Zero())], lens)
    data = json.loads((tmp_path / "x.json").read_text()) | {"interventions": [one]}
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(PatchError):
        patch.load_interventions(tmp_path / "x.json", lens)


def test_a_callable_without_a_hash_can_be_applied(lens):
    @dataclasses.dataclass
    class Times:
        by: float

        def __call__(self, x):
            return x * self.by

    found = patch.evaluate(lens, TOKENS, [[Intervention(Z, patch.Apply(Times(2.0)))]], (5, 6), progress=False)
    same = patch.evaluate(lens, TOKENS, [[Intervention(Z, patch.Scale(2.0))]], (5, 6), progress=False)
    torch.testing.assert_close(found, same)
