"""Recordings, generations and timelines through pickle and torch.save: the values, and no model."""

import io
import pickle

import numpy as np
import pytest
import torch
from conftest import small_lens

import glmlens
from glmlens import timeline
from glmlens.hook_points import HookError

TOKENS = torch.tensor([[2, 3, 4, 5, 6, 7]])
PROMPT = "When Mary and John went to the"


def by_pickle(x):
    return pickle.loads(pickle.dumps(x))


def by_torch(x, **how):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, **how)


WAYS = [by_pickle, by_torch, lambda x: by_torch(x, weights_only=True), lambda x: by_torch(x, weights_only=False)]


def equal(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(map(torch.equal, a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hooks", [None, {"blocks.1.attn.z": lambda x, point: x * 2}])
def test_a_recording_comes_back_with_all_that_was_named_and_where_it_stood(way, hooks):
    lens = glmlens.load()
    _, acts = lens.run_with_cache([PROMPT, "The"], "all", hooks)
    again = way(acts)
    assert list(again) == list(acts)
    assert all(equal(again[name], acts[name]) for name in acts)
    assert again.labels == acts.labels
    assert torch.equal(again.row(0).at(" Mary")["resid_post"], acts.row(0).at(" Mary")["resid_post"])
    assert again.run_info.model is None
    assert again.run_info.model_hash() == lens.model_hash
    assert again.run_info.edited_points == acts.run_info.edited_points
    assert "derived" not in repr(again)
    assert all(equal(by_pickle(again)[name], acts[name]) for name in acts)


def test_gradients_and_recordings_without_tokens_come_back():
    lens = small_lens()
    _, acts = lens.run_with_cache(TOKENS, "resid_post", gradients_of=lambda logits: logits[:, -1, 3])
    again = by_pickle(acts)
    assert torch.equal(again.gradients["resid_post"], acts.gradients["resid_post"])
    _, acts = lens.run_with_cache(inputs_embeds=lens.W_E[TOKENS], names="resid_post")
    assert torch.equal(by_torch(acts)["resid_post"], acts["resid_post"])


def test_a_pickle_weighs_what_it_holds_and_no_model():
    lens = glmlens.load()
    _, acts = lens.run_with_cache(PROMPT, "blocks.0.attn.z")
    assert len(pickle.dumps(acts)) < acts.bytes + 10_000 < sum(p.nbytes for p in lens.model.parameters()) / 10


@pytest.mark.parametrize("way", WAYS)
def test_a_generation_comes_back_and_its_cache_can_be_gone_on_with(way):
    lens = glmlens.load()
    run = lens.generate(PROMPT, 5, names=["resid_post", "attn.pattern", "kv.k"])
    again = way(run)
    assert (again.text, again.stopped, again.prompt_length) == (run.text, run.stopped, run.prompt_length)
    assert torch.equal(again.tokens, run.tokens)
    assert all(equal(again.acts[name], run.acts[name]) for name in run.acts)
    on = [lens.generate(run.tokens[:, -1:], 4, kv=one.kv).tokens for one in (run, again)]
    assert torch.equal(*on)


@pytest.mark.parametrize("way", WAYS)
def test_a_timeline_comes_back_and_asks_for_its_lens_where_weights_are_needed(way):
    lens = glmlens.load()
    line = timeline.record_timeline(lens, PROMPT, 6, temperature=1.0, seed=3, names="resid_post")
    again = way(line)
    assert (again.text, again.tokens, again.events) == (line.text, line.tokens, line.events)
    assert torch.equal(again.logits, line.logits)
    assert repr(again) == repr(line)
    for ask in (
        lambda a: a.probability(),
        lambda a: a.entropy(),
        lambda a: a.attention(1, 2),
        lambda a: a.probability(a.tokens[0]),
    ):
        assert np.array_equal(ask(again).values, ask(line).values)
        assert ask(again).about == ask(line).about
    for ask in (again.logit_lens, lambda: again.rerun(2, token=5), lambda: again.probability(" the")):
        with pytest.raises(HookError, match="pickled without its model"):
            ask()
    with pytest.raises(ValueError, match="this timeline is of model"):
        again.with_lens(small_lens())
    whole = again.with_lens(lens)
    assert np.array_equal(whole.logit_lens().values, line.logit_lens().values)
    assert whole.rerun(2, token=5).tokens == line.rerun(2, token=5).tokens


def test_an_edited_timeline_is_not_run_again_without_its_edits():
    lens = small_lens()
    hooks = {"blocks.1.attn_out": lambda x, point: x * 2}
    line = timeline.record_timeline(lens, TOKENS, 4, hooks=hooks, stop_ids=())
    again = by_pickle(line).with_lens(lens)
    with pytest.raises(HookError, match="pickled without its edits"):
        again.rerun(1, token=5)
    assert again.rerun(1, token=5, hooks=hooks, at={}).tokens == line.rerun(1, token=5).tokens


def test_a_recording_loaded_without_its_lens_is_shown(tmp_path):
    lens = small_lens()
    _, acts = lens.run_with_cache(TOKENS)
    acts.save(tmp_path / "acts")
    again = glmlens.load_activations(tmp_path / "acts")
    for text in (repr(again), again._repr_html_()):
        assert "resid_post" in text
        assert "not to be had" in text
    with pytest.raises(HookError, match="load with lens="):
        again["resid_post"]
