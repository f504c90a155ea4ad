"""Recorded generation: what a timeline says of a step is what a pass over the text so far says."""

import math

import numpy as np
import pytest
import torch
from conftest import small_lens
from torch.testing import assert_close

import glmlens
from glmlens import analysis, cache, only, patch
from glmlens.hook_points import HookError
from glmlens.patch import Intervention, Site
from glmlens.timeline import find_divergence, record_timeline, schedule_edits


def close(found, expected, atol=1e-9):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert_close(found, expected, rtol=0, atol=atol * max(1.0, float(expected.abs().max())))


@pytest.fixture(params=[("glm", "eager"), ("glm4", "sdpa")], ids="-".join)
def lens(request):
    return small_lens(*request.param, dtype=torch.float64)


def all_tokens(line):
    return torch.cat([line.prompt, torch.tensor([line.tokens])], 1)


def double(x, point):
    return x * 2


def test_a_timeline_says_what_a_plain_generation_says(lens, tokens):
    run = lens.generate(tokens[:1], 6, stop_ids=())
    line = record_timeline(lens, tokens[:1], 6, stop_ids=())
    assert line.tokens == run.new_tokens[0].tolist()
    logits = lens(run.tokens[:, :-1])[0, 8:].log_softmax(-1)
    close(line.logits.log_softmax(-1), logits)
    close(line.entropy().values, -(logits.exp() * logits).sum(-1))
    for step, token in enumerate(line.tokens):
        assert math.isclose(line.probability().values[step], float(logits[step, token].exp()), abs_tol=1e-12)
    assert np.allclose(line.probability(7).values, logits[:, 7].exp())


def test_the_lens_and_the_attention_of_a_step_are_those_of_one_pass(lens, tokens):
    eager = small_lens(lens.cfg.model_type, dtype=torch.float64)
    line = record_timeline(lens, tokens[:1], 5, stop_ids=())
    _, acts = eager.run_with_cache(all_tokens(line)[:, :-1], ["attn.pattern", "resid_post"])
    for layer, head in [(0, 1), (2, 2)]:
        close(line.attention(layer, head).values, acts["attn.pattern", layer][0, head, 8:])
    read = eager.model.unembed(eager.model.ln_final(acts["resid_post"][:, 0, 8:])).softmax(-1)
    for step, token in enumerate(line.tokens):
        close(line.logit_lens().values[:, step], read[:, step, token])


def test_edits_are_noted_as_they_were_applied(lens, tokens):
    hooks = {"blocks.1.attn_out": only(double, steps=[1, 3]), "blocks.2.mlp_out": lambda x, point: x}
    line = record_timeline(lens, tokens[:1], 4, hooks=hooks, stop_ids=())
    doubled = [event for event in line.events if event.edit_name == "double"]
    assert [(e.step, e.point, e.changed) for e in doubled] == [
        (1, "blocks.1.attn_out", True),
        (3, "blocks.1.attn_out", True),
    ]
    same = [event for event in line.events if event.point == "blocks.2.mlp_out"]
    assert [(e.step, e.changed) for e in same] == [(i, False) for i in range(4)]
    plain = lens.generate(tokens[:1], 4, hooks=hooks, stop_ids=())
    assert line.tokens == plain.new_tokens[0].tolist()
    with pytest.raises(HookError, match="never came"):
        record_timeline(lens, tokens[:1], 3, hooks={"blocks.1.attn_out": only(double, positions=90)}, stop_ids=())


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_rerun_from_a_step_is_the_whole_run_with_the_change_from_that_step_on(lens, tokens, step):
    line = record_timeline(lens, tokens[:1], 7, stop_ids=())
    hooks = {"blocks.0.attn_out": only(double, steps=range(step, 7))}
    again = line.rerun(step, hooks=hooks)
    expected = record_timeline(lens, tokens[:1], 7, hooks=hooks, stop_ids=())
    assert again.tokens == expected.tokens
    close(again.logits, expected.logits)
    assert [e.step for e in again.events] == list(range(step, 7))
    assert again.steps[:step] == line.steps[:step]
    assert line.rerun(step).tokens == line.tokens


def test_a_rerun_keeps_the_edits_that_had_their_say_before_it(lens, tokens):
    hooks = {"blocks.1.attn_out": only(double, steps=0), "blocks.0.mlp_out": only(double, steps=[1, 4])}
    line = record_timeline(lens, tokens[:1], 6, hooks=hooks, at={3: cache.reposition(lens, 2)}, stop_ids=())
    for step in (2, 3, 4):
        again = line.rerun(step)
        close(again.logits, line.logits)
        assert again.events == line.events
    again = line.rerun(3, at={4: cache.evict(position=2)})
    assert [e.step for e in again.events if e.point == "the cache"] == [3, 4]


def test_a_rerun_computes_nothing_of_what_came_before(lens, tokens, monkeypatch):
    line = record_timeline(lens, tokens[:1], 5, stop_ids=())
    ran = []
    forward = lens.model.forward

    def counted(given, *args, **options):
        ran.append(given.shape[1])
        return forward(given, *args, **options)

    monkeypatch.setattr(lens.model, "forward", counted)
    line.rerun(3)
    assert ran == [1, 1]


def test_another_token_at_a_step_is_the_prompt_that_goes_on_from_it(lens, tokens):
    line = record_timeline(lens, tokens[:1], 6, stop_ids=())
    other = (line.tokens[2] + 1) % 100
    again = line.rerun(2, token=other)
    assert again.tokens[:3] == [*line.tokens[:2], other]
    prompt = torch.cat([tokens[:1], torch.tensor([again.tokens[:3]])], 1)
    assert again.tokens[3:] == lens.generate(prompt, 3, stop_ids=()).new_tokens[0].tolist()


def test_an_operation_on_the_cache_between_steps_is_one_by_hand(lens, tokens):
    op = cache.ablate(layer=1, position=[2, 5])
    line = record_timeline(lens, tokens[:1], 6, at={2: op, 4: cache.evict(position=3)}, stop_ids=())
    first = lens.generate(tokens[:1], 2, stop_ids=())
    second = lens.generate(first.tokens[:, -1:], 2, kv=op(first.kv), stop_ids=())
    third = lens.generate(second.tokens[:, -1:], 2, kv=cache.evict(position=3)(second.kv), stop_ids=())
    assert line.tokens == [run.new_tokens[0, i].item() for run in (first, second, third) for i in range(2)]
    assert [event.step for event in line.events] == [2, 4]
    attention = line.attention(0, 0).values
    assert (attention[:4, 3] > 0).all()
    assert (attention[4:, 3] == 0).all()
    assert np.allclose(attention.sum(1), 1)


def test_an_operation_before_the_last_token_of_the_prompt_is_run_is_one_on_its_memory(lens, tokens):
    line = record_timeline(lens, tokens[:1], 2, at={0: cache.evict(position=1)}, stop_ids=())
    kv = lens.new_kv()
    lens(tokens[:1, :-1], kv=kv)
    run = lens.generate(tokens[:1, -1:], 2, kv=cache.evict(position=1)(kv), stop_ids=())
    assert line.tokens == run.new_tokens[0].tolist()


def changes():
    """One of every kind that means something at positions of one run."""
    axis = tuple(1.0 if i == 3 else 0.0 for i in range(48))
    other = tuple(range(9, 22))  # as many as are run
    return [
        patch.Zero(), patch.Scale(3), patch.Add(tuple([1.0] * 48)), patch.Remove(axis), patch.Swap(other),
        patch.Noise(2.0, seed=4), patch.Mean((other,)), patch.Resample((other, other[::-1])), patch.Put(axis),
    ]  # fmt: skip


@pytest.mark.parametrize("change", changes(), ids=lambda change: type(change).__name__)
def test_interventions_in_generation_are_those_of_a_forward(lens, tokens, change):
    one = Intervention(Site("resid_post", layer=1, pos=[4, 10]), change)
    line = record_timeline(lens, tokens[:1], 5, interventions=one, stop_ids=())
    logits = patch.run_with_interventions(lens, all_tokens(line)[:, :-1], one)
    close(line.logits, logits[0, 8:])
    assert [(event.step, event.changed) for event in line.events] == [(0, True), (2, True)]
    assert {event.edit_name for event in line.events} == {str(one)}


def test_a_schedule_restricts_any_change_to_steps_and_positions(lens, tokens):
    one = Intervention(Site("attn_out", layer=0), patch.Zero())
    for what in (one, [one], {"blocks.0.attn_out": lambda x, point: 0 * x}):
        hooks = schedule_edits(lens, what, steps=[2, 3])
        line = record_timeline(lens, tokens[:1], 5, hooks=hooks, stop_ids=())
        assert [event.step for event in line.events if event.changed] == [2, 3]
        at = patch.run_with_interventions(
            lens, all_tokens(line)[:, :-1], Intervention(Site("attn_out", layer=0, pos=[10, 11]), patch.Zero())
        )
        close(line.logits, at[0, 8:])
    hooks = schedule_edits(lens, one, positions=[10, 11])
    assert record_timeline(lens, tokens[:1], 5, hooks=hooks, stop_ids=()).tokens == line.tokens


def test_two_runs_part_where_their_words_first_differ(lens, tokens):
    a = record_timeline(lens, tokens[:1], 6, stop_ids=())
    assert find_divergence(a, a) is None
    other = (a.tokens[3] + 5) % 100
    b = a.rerun(3, token=other)
    found = find_divergence(a, b)
    assert (found.step, found.tokens) == (3, (a.tokens[3], other))
    assert np.allclose(found.kl.values, 0)  # so far both had said the same
    assert found.layer is None
    c = a.rerun(2, hooks={"blocks.1.resid_post": only(lambda x, point: -x, steps=range(2, 6))})
    found = find_divergence(a, c)
    assert found is not None
    assert found.step >= 2
    assert found.layer == 1 or found.layer == 2
    p = a.logits[found.step].softmax(-1)
    assert found.probability.values[0, 1] == pytest.approx(float(p[found.tokens[1]]))


def test_the_memory_of_a_step_can_be_asked_who_reads_it(lens, tokens):
    line = record_timeline(lens, tokens[:1], 4, stop_ids=())
    found = analysis.cache_reads(lens, line.restore_state(2))
    for layer, head in [(0, 0), (2, 3)]:
        close(found.attention.values[layer, head], line.attention(layer, head).values[2, :11])
    by_prompt = analysis.leave_one_out(lens, all_tokens(line)[:, :11], by="position")
    close(analysis.leave_one_out(lens, line.restore_state(2), by="position").kl.values, by_prompt.kl.values)


SAMPLED = {"temperature": 5.0, "top_k": 50, "repetition_penalty": 1.3, "stop_ids": ()}


@pytest.mark.parametrize("seed", [{}, {"seed": 7}], ids=str)
def test_a_sampled_run_is_run_again_as_it_was_drawn(lens, tokens, seed):
    line = record_timeline(lens, tokens[:1], 6, **SAMPLED, **seed)
    if seed:
        plain = lens.generate(tokens[:1], 6, **SAMPLED, **seed)
        assert line.tokens == plain.new_tokens[0].tolist()
    for step in range(6):
        assert line.rerun(step).tokens == line.tokens
        assert line.rerun(step, token=line.tokens[step]).tokens == line.tokens
    with_operation = record_timeline(lens, tokens[:1], 6, at={3: cache.reposition(lens, 0)}, **SAMPLED, seed=7)
    assert with_operation.tokens == record_timeline(lens, tokens[:1], 6, **SAMPLED, seed=7).tokens
    assert (
        record_timeline(lens, tokens[:1], 6, **SAMPLED).tokens != record_timeline(lens, tokens[:1], 6, **SAMPLED).tokens
    )


def test_a_steering_in_a_timeline_is_one_in_a_forward(lens, tokens):
    vector = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steer = Intervention(Site("resid_post", layer=1), patch.Add(tuple(vector.tolist())))
    line = record_timeline(lens, tokens[:1], 5, hooks=schedule_edits(lens, steer, steps=[2, 4]), stop_ids=())
    there = Intervention(Site("resid_post", layer=1, pos=[10, 12]), patch.Add(tuple(vector.tolist())))
    close(line.logits, patch.run_with_interventions(lens, all_tokens(line)[:, :-1], there)[0, 8:])
    assert [(e.step, e.changed) for e in line.events] == [(2, True), (4, True)]


def test_it_stops_where_a_generation_stops(lens, tokens):
    said = lens.generate(tokens[:1], 6, stop_ids=()).new_tokens[0].tolist()
    stop = said[2]
    line = record_timeline(lens, tokens[:1], 6, at={1: cache.reposition(lens, 0)}, stop_ids=[stop])
    assert line.tokens == said[: said.index(stop) + 1]


@pytest.fixture(scope="module")
def demo():
    return glmlens.load(dtype="float32")


STORY = "The capital of France is"


def test_it_stops_at_a_string_where_a_generation_stops_wherever_it_is_cut(demo):
    """Also at one that begins before a step at which the cache is operated on, or in what a rerun goes on from."""
    plain = record_timeline(demo, STORY, 9, stop_ids=())
    whole, options = plain.text, {"stop_ids": (), "stop_strings": [plain.text[4:13]]}
    run = demo.generate(STORY, 9, **options)
    assert 2 < run.new_tokens.shape[1] < 9
    for at in ({}, *({step: cache.reposition(demo, 0)} for step in range(1, run.new_tokens.shape[1]))):
        line = record_timeline(demo, STORY, 9, at=at, **options)
        assert line.tokens == run.new_tokens[0].tolist()
        assert line.text == run.text == whole[:4]
    for step in range(len(line.tokens)):
        assert line.rerun(step).tokens == line.rerun(step, token=line.tokens[step]).tokens == line.tokens
    with pytest.raises(ValueError, match="empty stop string"):
        record_timeline(demo, STORY, 3, stop_strings="")


def test_attention_names_the_tokens_at_its_keys(demo):
    said = demo.to_labels(demo.generate(STORY, 4, stop_ids=()).tokens)
    line = record_timeline(demo, STORY, 4, stop_ids=())
    assert list(line.attention(1, 0).labels["key"]) == [f"{i} {word}" for i, word in enumerate(said[:-1])]
    moved = record_timeline(demo, STORY, 4, at={2: cache.reposition(demo, 2)}, stop_ids=())
    labels = moved.attention(1, 0).labels["key"]  # of two caches
    assert [labels[i] for i in (1, 3, 8)] == [f"1 {said[1]}", f"3 {said[3]} / {said[1]}", f"8 {said[6]}"]


def test_an_operation_that_writes_in_place_reaches_no_other_run(lens, tokens):
    line = record_timeline(lens, tokens[:1], 5, stop_ids=())

    def empty(kv):
        kv.keys.zero_()
        kv.values.zero_()
        return kv

    changed = line.rerun(2, at={3: empty})
    assert [event.edit_name for event in changed.events] == ["empty"]
    assert record_timeline(lens, tokens[:1], 5, at={3: empty}, stop_ids=()).tokens == changed.tokens
    assert line.rerun(2).tokens == line.tokens
    close(changed.rerun(2, at={}).logits, line.logits)


@pytest.mark.parametrize("at", [{}, {0: cache.ablate()}], ids=["plain", "in pieces"])
def test_interrupting_gives_what_there_is_and_where_there_is_nothing_goes_through(lens, tokens, at):
    def interrupt(step):
        def edit(x, point):
            if point.step == step:
                raise KeyboardInterrupt
            return x

        return {"blocks.1.attn_out": edit}

    line = record_timeline(lens, tokens[:1], 5, hooks=interrupt(3), at=at, stop_ids=())
    assert line.tokens == record_timeline(lens, tokens[:1], 5, at=at, stop_ids=()).tokens[:3]
    assert line.attention(1, 1).shape[0] == 3
    with pytest.raises(KeyboardInterrupt):
        record_timeline(lens, tokens[:1], 5, hooks=interrupt(0), at=at, stop_ids=())


def test_what_cannot_be_is_an_error_that_says_so(lens, tokens):
    line = record_timeline(lens, tokens[:1], 3, stop_ids=())
    with pytest.raises(IndexError, match="0 to 2"):
        line.rerun(3)
    with pytest.raises(ValueError, match="one prompt"):
        record_timeline(lens, tokens, 3)
    with pytest.raises(ValueError, match="this run has 0 to 2"):
        record_timeline(lens, tokens[:1], 3, at={3: cache.evict(position=1)})
    with pytest.raises(ValueError, match=r"operations at steps \[1\]; this run has 2 to 2"):
        line.rerun(2, at={1: cache.reposition(lens, 0)})
    with pytest.raises(ValueError, match=r"this run has 2 to 2"):
        line.rerun(1, token=3, at={1: cache.reposition(lens, 0)})
    with pytest.raises(patch.PatchError, match="returned NoneType"):
        record_timeline(lens, tokens[:1], 3, at={1: lambda kv: None}, stop_ids=())
    for layer, head in [(3, 0), (-1, 0), (0, 4)]:
        with pytest.raises(IndexError, match="there are 3 layers of 4 heads"):
            line.attention(layer, head)
    with pytest.raises(ValueError, match="this model has 0 to 100"):
        line.probability(101)
    with pytest.raises(TypeError, match="use rerun"):
        record_timeline(lens, tokens[:1], 3, kv=lens.new_kv())
    hooked = record_timeline(lens, tokens[:1], 3, hooks={"blocks.1.kv.k": double}, stop_ids=())
    hooked.attention(0, 0)
    with pytest.raises(HookError, match=r"names='attn.pattern'"):
        hooked.attention(1, 0)
