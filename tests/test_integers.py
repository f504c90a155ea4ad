"""Whole numbers from people: every kind of layers, heads, positions, steps and counts is read right, or refused."""

import numpy as np
import pytest
import torch
from conftest import small_lens

from glmlens import analysis, cache, circuits, patch, timeline
from glmlens.analysis.prompt_batch import PromptBatch
from glmlens.hooks import only
from glmlens.integers import read_integer, read_integers
from glmlens.patch import rotary

LENS = small_lens()
TOKENS = torch.tensor([[5, 8, 13, 21, 34, 55, 8, 13, 2]])
OTHER = torch.tensor([[5, 8, 14, 21, 34, 55, 8, 14, 2]])
N, LAYERS, HEADS, KV = TOKENS.shape[1], LENS.cfg.n_layers, LENS.cfg.n_heads, LENS.cfg.n_kv_heads
PAIRS = LENS.cfg.d_rotary // 2
LOGITS, ACTS = LENS.run_with_cache(TOKENS)
LINE = timeline.record_timeline(LENS, TOKENS, 4)
PROFILE = analysis.distance_profile(LENS, TOKENS)
SCORES = analysis.head_scores(LENS, rows=2, length=4, words=range(2, 40))
LENSES = analysis.logit_lens(LENS, TOKENS)
EDGES = circuits.attribute_edges(LENS, TOKENS, OTHER, metric=(3, 7))
PROBE = analysis.probe(torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(0)), [0, 1] * 20)
REFUSED = (ValueError, TypeError, KeyError, IndexError)


def remembered():
    kv = LENS.new_kv()
    LENS(TOKENS, kv=kv)
    return kv


KEPT = remembered()


def cut(length):
    kv = KEPT.fork()
    kv.truncate(length)
    return kv.length


def edited(edits):
    return LENS.run_with_hooks(TOKENS, edits)


def nothing(x, point):
    return torch.zeros_like(x)


def at_sites(**places):
    return patch.run_with_interventions(LENS, TOKENS, patch.Intervention(patch.Site(**places), patch.Zero()))


def harvested(tmp, **options):
    return LENS.harvest([[1, 2, 3], [4, 5]], "resid_post", tmp, **options)["resid_post", 1]


ONE = {  # what takes one number of 0, 1, 2, ... and refuses one below 0
    "Labelled.at layer": lambda n: SCORES.induction.at(layer=n).values,
    "Labelled.at head": lambda n: SCORES.induction.at(head=n).values,
    "LogitLens.at": lambda n: LENSES.kl.at(layer=n).values,
    "OV layer": lambda n: analysis.OV(LENS, n, 1).A,
    "OV head": lambda n: analysis.OV(LENS, 1, n).A,
    "QK layer": lambda n: analysis.QK(LENS, n, 1).A,
    "QK head": lambda n: analysis.QK(LENS, 1, n).A,
    "QK distance": lambda n: analysis.QK(LENS, 1, 1, n).A,
    "QK_bias distance": lambda n: analysis.QK_bias(LENS, 1, 1, n)[0],
    "score_parts layer": lambda n: analysis.score_parts(LENS, TOKENS, n, 1).score.values,
    "score_parts head": lambda n: analysis.score_parts(LENS, TOKENS, 1, n).score.values,
    "Probe.direction": lambda n: PROBE.direction(n, 1),
    "Timeline.attention layer": lambda n: LINE.attention(n, 1).values,
    "Timeline.attention head": lambda n: LINE.attention(1, n).values,
    "Timeline.moment": lambda n: LINE.step_record(n).logits,
    "Timeline.memory": lambda n: LINE.restore_state(n).token,
    "Timeline.rerun": lambda n: torch.tensor(LINE.rerun(n, token=7).tokens),
    "Timeline.rerun token": lambda n: torch.tensor(LINE.rerun(1, token=n).tokens),
    "timeline at": lambda n: torch.tensor(timeline.record_timeline(LENS, TOKENS, 3, at={n: lambda kv: kv}).tokens),
    "rotary.freeze at": lambda n: edited(rotary.freeze(LENS, at=n)),
    "cache.read layer": lambda n: cache.read_entry(KEPT, n, 1, 1)[0],
    "cache.read position": lambda n: cache.read_entry(KEPT, 1, 1, n)[0],
    "start_layer": lambda n: LENS(ACTS["resid_pre", 1], start_layer=n),
    "stop_layer": lambda n: LENS(TOKENS, stop_layer=n),
    "truncate": lambda n: torch.tensor(cut(n)),
    "fork": lambda n: torch.tensor(KEPT.fork(n).length),
    "window": lambda n: cache.evict(cache.keep_window(2, sinks=n))(KEPT).positions,
    "answer": lambda n: analysis.logit_attribution(LENS, TOKENS, n).values,
    "metric": lambda n: patch.evaluate(LENS, TOKENS, [], metric=(n, 7)),
    "plot.attention_by_distance": lambda n: np.array(plotted("attention_by_distance", PROFILE, n)),
}
FROM_END = {  # what also counts from the end
    "Labelled.at pos": lambda n: LENSES.kl.at(pos=n).values,
    "acts[point, layer]": lambda n: ACTS["attn.z", n],
    "Activations.at": lambda n: ACTS.at(n)["resid_post", 1],
    "attribution position": lambda n: analysis.logit_attribution(LENS, TOKENS, 3, position=n).values,
    "accumulated_residual": lambda n: analysis.accumulated_residual(LENS, TOKENS, position=n).values,
    "W_Q[layer]": lambda n: LENS.W_Q[n],
}
COUNTS = {  # what takes how many, at least one
    "max_new_tokens": lambda n: LENS.generate(TOKENS, n).tokens,
    "timeline": lambda n: torch.tensor(timeline.record_timeline(LENS, TOKENS, n).tokens),
    "rerun max_new_tokens": lambda n: torch.tensor(LINE.rerun(1, max_new_tokens=n + 1).tokens),
    "new_kv": lambda n: LENS.new_kv(n).positions,
    "top_k": lambda n: LENS.generate(TOKENS, 2, temperature=1.0, top_k=n, seed=0).tokens,
    "logit_lens top": lambda n: analysis.logit_lens(LENS, TOKENS, top=n).token.values,
    "distances": lambda n: analysis.distance_profile(LENS, TOKENS, distances=n).score.values,
    "head_scores rows": lambda n: analysis.head_scores(LENS, rows=n, length=4, words=range(2, 40)).induction.values,
    "Labelled.top": lambda n: np.array([value for _, value in SCORES.induction.top(n)]),
    "stride": lambda n: LENSES.kl.stride("pos", n).values,
    "edges steps": lambda n: (
        circuits.attribute_edges(LENS, TOKENS, OTHER, metric=(3, 7), method="eap-ig", steps=n).scores
    ),
    "EdgeScores.top": lambda n: np.array([value for _, value in EDGES.top(n)]),
}
SEVERAL = {  # what takes several: the function, and how many there are where a mask can be read
    "only positions": (lambda n: edited({"resid_mid": only(nothing, positions=n)}), None),
    "only steps": (lambda n: LENS.generate(TOKENS, 4, hooks={"resid_mid": only(nothing, steps=n)}).tokens, None),
    "Site layer": (lambda n: at_sites(point="resid_mid", layer=n), None),
    "Site pos": (lambda n: at_sites(point="resid_mid", pos=n), None),
    "Site head": (lambda n: at_sites(point="attn.z", layer=1, head=n), None),
    "steering layers": (lambda n: patch.fit_steering(LENS, TOKENS, OTHER, layers=n).vectors, None),
    "rotary layer": (lambda n: edited(rotary.silence(LENS, layer=n)), LAYERS),
    "rotary head": (lambda n: edited(rotary.silence(LENS, head=n)), HEADS),
    "rotary pair": (lambda n: edited(rotary.silence(LENS, pair=n)), PAIRS),
    "cache position": (lambda n: cache.ablate(position=n)(KEPT).values, None),
    "cache layer": (lambda n: cache.ablate(layer=n)(KEPT).values, None),
    "cache steps": (lambda n: LENS.generate(TOKENS, 4, hooks=cache.ablate().hooks(LENS, steps=n)).tokens, None),
    "score_parts query": (lambda n: analysis.score_parts(LENS, TOKENS, 1, 1, query=n).score.values, N),
    "leave_one_out": (lambda n: analysis.leave_one_out(LENS, TOKENS, positions=n).kl.values, N - 1),
    "scheduled": (lambda n: edited(timeline.schedule_edits(LENS, {"resid_mid": nothing}, positions=n)), None),
}  # fmt: skip
NONE = [True, np.bool_(True), torch.tensor(True), 1.0, 5.9, np.float32(1), torch.tensor(1.0), float("nan"), "1", b"1"]
NONE += [None, [1, 2], torch.tensor([1, 2]), {1: 2}, object()]


def plotted(name, *args):
    from glmlens import plot

    return getattr(plot, name)(*args).data[0].y


def numbers(x):
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=float)


def is_same(a, b):
    return np.array_equal(numbers(a), numbers(b), equal_nan=True)


@pytest.mark.parametrize("name", [*ONE, *FROM_END, *COUNTS])
def test_a_number_of_any_kind_is_that_number_and_what_is_none_is_refused(name):
    take = {**ONE, **FROM_END, **COUNTS}[name]
    right = take(1)
    kinds = [np.int64(1), np.uint8(1), torch.tensor(1)]
    for one in kinds if name == "timeline at" else [*kinds, np.array(1)]:  # an array is no key of a dict
        assert is_same(take(one), right), repr(one)
    text = (
        "Labelled.at",
        "LogitLens.at",
        "Activations.at",
        "answer",
        "metric",
        "plot.",
        "rerun token",
        "Probe.direction",
    )
    for_each = ("answer", "attribution position", "accumulated_residual", "metric")  # several are one for each prompt
    for wrong in NONE:
        if (isinstance(wrong, str) and any(part in name for part in text)) or wrong is None:
            continue  # a text there is a label, a token or a name
        if isinstance(wrong, list | torch.Tensor) and np.ndim(wrong) and name in for_each:
            continue
        if name == "rerun max_new_tokens" and not isinstance(wrong, int | float):
            continue  # the table adds one to it
        if name == "rerun max_new_tokens" and wrong is True:
            continue
        with pytest.raises(REFUSED):
            take(wrong)
    if name in ONE and name not in ("timeline at",):
        with pytest.raises(REFUSED):
            take(-1)
    if name in COUNTS:
        for wrong in (0, -1):
            if name != "rerun max_new_tokens" or wrong < 0:
                with pytest.raises(REFUSED):
                    take(wrong)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_numbers_of_any_kind_are_those_and_a_mask_is_never_zero_and_one(name):
    take, size = SEVERAL[name]
    last = 2 if size is None or size > 2 else 1
    right = take(list(range(last + 1))[1:])
    some = list(range(1, last + 1))
    ways = [tuple(some), range(1, last + 1), np.array(some), np.array(some, np.int32), torch.tensor(some)]
    ways += [[np.int64(n) for n in some], [torch.tensor(n) for n in some], iter(some), slice(1, last + 1)]
    for way in ways:
        assert is_same(take(way), right), repr(way)
    assert is_same(take(1), take([1]))
    assert is_same(take(np.int64(1)), take([1]))
    assert is_same(take(torch.tensor(1)), take([1]))
    mask = [i in some for i in range(size or N)]
    for masked in (mask, np.array(mask), torch.tensor(mask)):
        if size is None:
            with pytest.raises(REFUSED, match="mask"):
                take(masked)
        else:
            assert is_same(take(masked), right)
            with pytest.raises(REFUSED, match="mask"):
                take(masked[:-1])
    wrong = [True, False, 5.9, [5.9], [1, 2.0], "1", ["1"], [True, 1], [], (), torch.tensor([]), np.array([], int)]
    wrong += [[False] * N, torch.zeros(size or N, dtype=torch.bool), float("nan"), b"1", {1: 2}, [[1, 2]], object()]
    wrong += [torch.tensor([1.0, 2.0]), [None]]
    for one in wrong:
        if isinstance(one, str | list) and "1" in (one if isinstance(one, list) else [one]) and name == "Site pos":
            continue  # the name of a position: refused as one that is not there, see test_patch_interventions
        with pytest.raises(REFUSED):
            take(one)
    if name not in ("score_parts query",):
        with pytest.raises(REFUSED):
            take(-1)


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_a_harvest_takes_its_sizes_in_any_kind(tmp_path, kind):
    found = harvested(tmp_path / "a", batch=kind(1), shard_tokens=kind(2))
    assert torch.allclose(found, harvested(tmp_path / "b"), atol=1e-5)


@pytest.mark.parametrize("wrong", [True, 1.5, "2", 0, -1])
def test_a_harvest_refuses_sizes_that_are_none(tmp_path, wrong):
    for what in ("batch", "shard_tokens"):
        with pytest.raises(ValueError, match=what):
            harvested(tmp_path, **{what: wrong})


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_logits_are_kept_at_positions_of_any_kind(kind):
    assert torch.allclose(LENS(TOKENS, logits_to_keep=kind([2, 5])), LOGITS[:, [2, 5]], atol=1e-5)
    assert torch.allclose(LENS(TOKENS, logits_to_keep=np.int64(3)), LOGITS[:, -3:], atol=1e-5)
    assert torch.allclose(LENS(TOKENS, logits_to_keep=torch.tensor(3)), LOGITS[:, -3:], atol=1e-5)
    mask = torch.arange(N) % 2 == 0
    assert torch.allclose(LENS(TOKENS, logits_to_keep=mask), LOGITS[:, mask], atol=1e-5)
    for wrong in (True, 2.0, "2", [True, False], torch.tensor([1.0])):
        with pytest.raises(ValueError, match="logits_to_keep"):
            LENS(TOKENS, logits_to_keep=wrong)


def test_a_shift_takes_numbers_of_any_kind():
    for by in (2, {3: 2, 4: 1}):
        kinds = by if isinstance(by, int) else {np.int64(p): torch.tensor(far) for p, far in by.items()}
        kinds = np.int64(2) if isinstance(by, int) else kinds
        assert torch.equal(edited(rotary.shift(LENS, kinds)), edited(rotary.shift(LENS, by)))
    for wrong in (True, 1.5, "2", {}, {True: 1}, {3: 1.5}, {-1: 2}):
        with pytest.raises(patch.PatchError):
            rotary.shift(LENS, wrong)


def test_one_position_for_every_prompt_or_one_for_each():
    rows = PromptBatch.from_prompt(LENS, torch.cat([TOKENS, OTHER]))
    assert rows.columns_at(-1).tolist() == rows.columns_at("end").tolist() == [N - 1, N - 1]
    assert rows.columns_at(np.array([2, -1])).tolist() == [2, N - 1]
    with pytest.raises(ValueError, match="3 positions for 2 prompts"):
        rows.columns_at([1, 2, 3])
    for wrong in ([True, False], 1.5, "S2", True):
        with pytest.raises(ValueError, match="position"):
            rows.columns_at(wrong)


def test_an_error_says_what_was_asked_and_what_there_is():
    with pytest.raises(ValueError, match=r"steps is 5.9: give whole numbers, 3 or \[3, 5\] or range\(3, 9\)"):
        read_integers(5.9, "steps")
    with pytest.raises(ValueError, match=r"layer 7 asked for; there are 3, 0 to 2"):
        read_integers([1, 7], "layer", size=3)
    with pytest.raises(ValueError, match=r"a mask of 3 times True or False.*mask.nonzero"):
        read_integers([True, False, True], "pos")
    with pytest.raises(ValueError, match="pos is a mask of 2; there are 3"):
        read_integers([True, False], "pos", size=3)
    with pytest.raises(ValueError, match="came out empty"):
        read_integers([False, False], "pos", size=2)
    with pytest.raises(ValueError, match="its end is not known"):
        read_integers(slice(2, None), "pos")
    with pytest.raises(IndexError, match="layer 3 asked for; there are 3"):
        read_integer(3, "layer", size=3, outside=IndexError)
    assert read_integers(slice(-2, None), "pos", size=5) == (3, 4)
    assert read_integers([True, False, True], "pos", size=3) == (0, 2)
    assert read_integers(-1, "pos", size=3, negative=True) == (-1,)
    with pytest.raises(ValueError, match="-4"):
        read_integers(-4, "pos", size=3, negative=True)
