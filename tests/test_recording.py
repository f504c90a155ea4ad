"""Recordings: labelled, stored little and derived exactly, kept on disk."""

import os
import re

import pytest
import torch
from conftest import small_lens

import glmlens
from glmlens.hook_points import HookError


@pytest.fixture(scope="module")
def inside():
    return glmlens.load(dtype="float32")


def truth(lens, tokens, hooks=(), **forward):
    """What hooks see at every point, each in turn, after those given."""
    seen = {}

    def spy(x, point):
        seen[point.name] = x.clone()
        return x

    lens.run_with_hooks(tokens, [*hooks, ("*", spy), ("*attn.result", spy)], **forward)
    return seen


def same(acts, seen):
    """The names at which a recording differs from what was seen."""
    return [name for name, x in seen.items() if not torch.equal(acts[name], x)]


# Stored little, derived exactly.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_what_is_derived_is_bit_for_bit_what_was_there(model_type, attention, dtype, tokens):
    lens = small_lens(model_type, attention, dtype)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    for forward in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(9) * 2}):
        _, acts = lens.run_with_cache(tokens, **forward)
        assert same(acts, truth(lens, tokens, **forward)) == []
        derived = [name for name in acts if name not in acts.stored]
        assert len(derived) > len(acts.stored)


def test_what_is_derived_with_every_channel_turning_is_what_was_there(tokens):
    lens = small_lens(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0})
    _, acts = lens.run_with_cache(tokens)
    assert same(acts, truth(lens, tokens)) == []


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_an_edit_anywhere_leaves_no_derived_value_wrong(model_type, tokens):
    lens = small_lens(model_type)

    def edit(x, point):
        return x * 1.5 + 0.1

    points = [p.name for p in lens.points() if p.layer in (None, 1)] + ["blocks.1.attn.result"]
    assert len(points) > 25
    for name in points:
        _, acts = lens.run_with_cache(tokens, hooks={name: edit})
        wrong = same(acts, truth(lens, tokens, [(name, edit)])) if name != "blocks.1.attn.result" else []
        assert wrong == [], f"after an edit at {name}"


def test_with_a_cache_before_it_what_is_derived_is_what_was_there(lens, tokens):
    before, now = tokens[:, :4], tokens[:, 4:]
    kv = lens.new_kv(2)
    lens(before, kv=kv)
    _, acts = lens.run_with_cache(now, kv=kv.fork(8))
    assert same(acts, truth(lens, now, kv=kv.fork(8))) == []


def test_a_run_over_some_layers_derives_what_was_there(lens, tokens):
    resid = lens(tokens, stop_layer=1)
    forward = {"start_layer": 1, "attention_mask": torch.ones(2, 9)}
    _, acts = lens.run_with_cache(resid, **forward)
    assert same(acts, truth(lens, resid, **forward)) == []
    assert "blocks.1.resid_pre" in acts.stored


def test_only_what_follows_from_the_other_points_asked_for_is_left_out(lens, tokens):
    _, acts = lens.run_with_cache(tokens, ["resid_mid", "blocks.0.attn.pattern"])
    assert set(acts.stored) == set(acts)
    _, acts = lens.run_with_cache(tokens, ["resid_pre", "resid_post"])
    assert list(acts.stored) == ["blocks.0.resid_pre", *(f"blocks.{i}.resid_post" for i in range(3))]


def test_what_follows_can_be_read_without_having_been_named(tokens):
    lens = small_lens(attention="sdpa")
    eager = glmlens.Lens(glmlens.GLM(lens.cfg, "eager"))
    eager.model.load_state_dict(lens.model.state_dict())
    _, acts = lens.run_with_cache(tokens)
    assert "attn.pattern" not in acts
    seen = truth(eager, tokens)
    for i in range(3):
        assert torch.allclose(acts["attn.pattern", i], seen[f"blocks.{i}.attn.pattern"], atol=1e-6)
        assert torch.equal(acts[f"blocks.{i}.attn.result"].shape and acts["attn.result", i], acts["attn.result"][i])
    assert acts["attn.pattern"].shape == (3, 2, 4, 9, 9)
    assert torch.allclose(acts["attn.result"].sum(3)[0], seen["blocks.0.attn_out"], atol=1e-5)


def test_check_predicts_the_bytes_that_are_held(any_lens, tokens):
    for names, hooks in (("all", None), ("resid_post", None), ("all", {"blocks.1.resid_mid": lambda x, point: x * 2})):
        check = any_lens.check(tokens, names, hooks)
        _, acts = any_lens.run_with_cache(tokens, names, hooks)
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in acts.stored.values()}
        assert check.bytes == acts.bytes == sum(held.values())
        assert [p.name for p in check.points] == list(acts)
        assert [p.name for p in check.stored] == list(acts.stored)


def test_on_the_real_model_all_is_derived_as_it_was(real_model):
    lens = glmlens.load(real_model, dtype="float32")
    text = "When Mary and John went to the store, John gave a drink to"
    _, acts = lens.run_with_cache(text)
    seen = truth(lens, text)
    assert same(acts, seen) == []
    assert acts.bytes < 0.5 * sum(x.nbytes for x in seen.values())


# Labelled.


PROMPTS = ["Then Mary met John. Mary had a key", "Mary saw the river"]


def test_a_place_is_found_by_position_by_text_and_by_name(inside):
    _, acts = inside.run_with_cache(PROMPTS)
    assert acts.labels[1] == ["[gMASK]", "<sop>", "Mary", "·saw", "·the", "·river"]
    last = acts.at(-1)
    assert last["resid_post"].shape == (4, 2, 192)
    assert torch.equal(last["resid_post", 3], acts["resid_post", 3][:, -1])
    mary = acts.at("Mary", occurrence=0)
    assert mary.positions.tolist() == [3, 2]
    padding = acts.tokens.shape[1] - 6
    assert torch.equal(mary["attn.pattern", 0][1], acts["attn.pattern", 0][1, :, 2 + padding])
    assert torch.equal(mary["kv.k", 1][1], acts["kv.k", 1][1, 2 + padding])
    assert torch.equal(acts.at(2)["mlp.post", 0][1], acts["mlp.post", 0][1, 2 + padding])
    with pytest.raises(HookError, match=r"'Mary' stands at \[3, 7\] in row 0: say which"):
        acts.at("Mary")
    with pytest.raises(HookError, match="'river' is no token of row 0"):
        acts.at("river")
    with pytest.raises(HookError, match="occurrence 4 asked for"):
        acts.at("Mary", occurrence=4)
    with pytest.raises(HookError, match="position 9 asked for; the rows end with"):
        acts.at(9)


def test_a_tasks_names_are_places_in_a_recording_of_it(inside):
    examples = glmlens.tasks.ioi.examples(inside, 5)
    _, acts = inside.run_with_cache(examples, ["resid_post", "attn.pattern"])
    assert torch.equal(acts.at("S2").positions, examples.at("S2"))
    for i, example in enumerate(examples):
        _, alone = inside.run_with_cache(example.tokens, "resid_post")
        assert torch.allclose(acts.at("S2")["resid_post"][:, i], alone["resid_post"][:, 0, example.at("S2")], atol=1e-4)
    assert torch.equal(acts.row(2).at("IO").positions, examples.at("IO")[2:3])


def test_a_row_is_the_recording_of_its_prompt_alone(inside):
    _, acts = inside.run_with_cache(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        row, (_, alone) = acts.row(i), inside.run_with_cache(prompt)
        assert torch.equal(row.tokens, alone.tokens)
        for name in alone:
            assert row[name].shape == alone[name].shape
            assert float((row[name] - alone[name]).abs().max()) <= 1e-5 * max(1, float(alone[name].abs().max())), name


def test_texts_chats_lists_and_token_tensors_give_the_same_answers(inside):
    text = inside.render([{"role": "user", "content": "What is the capital of France?"}])
    ways = [text, [{"role": "user", "content": "What is the capital of France?"}], inside.to_tokens(text)]
    ways += [inside.to_tokens(text)[0].tolist(), [text], [inside.to_tokens(text)[0].tolist()]]
    first, *others = (inside.run_with_cache(way) for way in ways)
    for logits, acts in others:
        assert torch.equal(logits, first[0])
        assert same(acts, dict(first[1])) == []
    padded, acts = inside.run_with_cache(
        [text, "Mary saw the river and went home to see it all again one more time today"]
    )
    assert torch.allclose(padded[0, -1], first[0][0, -1], atol=1e-4)
    assert torch.allclose(acts.row(0)["resid_post"], first[1]["resid_post"], atol=1e-4)


def test_the_table_is_short_in_text_and_in_html(inside):
    _, acts = inside.run_with_cache(PROMPTS[0])
    assert len(repr(acts).splitlines()) < 40
    assert re.search(r"blocks\.0-3\.attn\.pattern +batch head query key +\(1, 8, 11, 11\) +derived", repr(acts))
    page = acts._repr_html_()
    assert page.count("<tr>") == len(acts.summary_table()) + 1
    assert f"{len(acts)} points" in page


def test_a_recording_can_be_moved_and_detached(lens, tokens):
    _, acts = lens.run_with_cache(tokens)
    half = acts.to(dtype=torch.bfloat16)
    assert set(half) == set(half.stored) == set(acts)
    assert all(torch.equal(half[name], acts[name].bfloat16()) for name in acts)
    assert acts.to("cpu") is acts
    meta = acts.to("meta")
    assert meta["resid_post"].is_meta
    assert meta.run_info.positions.is_meta
    assert same(acts.detach(), dict(acts)) == []


# Gradients.


def metric(logits):
    return logits[:, -1, 5] - logits[:, -1, 7]


def adding(push):
    return lambda x, point: x + push


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_gradients_are_what_small_changes_do(model_type, tokens):
    lens = small_lens(model_type, dtype=torch.float64)
    names = ["embed", "resid_post", "attn.z", "attn.pattern", "mlp.post", "kv.k_new", "attn.result", "logits"]
    logits, acts = lens.run_with_cache(tokens, names, gradients_of=metric)
    assert torch.equal(logits, lens(tokens))
    assert not any(x.requires_grad for x in acts.values())
    draw = torch.Generator().manual_seed(3)
    for name in [n for n in acts if not n.startswith(("blocks.0", "blocks.2"))]:
        push = torch.randn(acts[name].shape, generator=draw, dtype=torch.float64)
        if name.endswith("pattern"):
            push = push.tril()
        up, down = (metric(lens.run_with_hooks(tokens, {name: adding(s * push)})).sum() for s in (1e-5, -1e-5))
        slope = (up - down) / 2e-5
        assert float((acts.gradients[name] * push).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-8), name


def test_gradients_go_through_hooks(lens, tokens):
    _, acts = lens.run_with_cache(
        tokens, "resid_post", {"blocks.2.resid_post": lambda x, p: x * 0}, gradients_of=metric
    )
    assert float(acts.gradients["resid_post", 1].abs().max()) == 0.0
    assert float(acts.gradients["resid_post", 2].abs().max()) > 0.0


def test_gradients_begin_anew_where_a_hook_puts_a_value(lens, tokens):
    value = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(4))
    hooks = {"blocks.1.resid_post": lambda x, point: value.clone()}
    _, acts = lens.run_with_cache(tokens, "resid_post", hooks, gradients_of=metric)
    mask = torch.ones(2, 9)
    _, alone = lens.run_with_cache(value, "resid_post", start_layer=2, attention_mask=mask, gradients_of=metric)
    assert float(acts.gradients["resid_post", 0].abs().max()) == 0.0
    assert torch.allclose(acts.gradients["resid_post", 2], alone.gradients["resid_post", 2])
    leaf = value.clone().requires_grad_()
    metric(lens(leaf, start_layer=2, attention_mask=mask)).sum().backward()
    assert torch.allclose(acts.gradients["resid_post", 1], leaf.grad, rtol=1e-4, atol=1e-6)


def test_gradients_that_were_not_asked_for_are_an_error(lens, tokens):
    _, acts = lens.run_with_cache(tokens)
    with pytest.raises(HookError, match="gradients_of=metric"):
        _ = acts.gradients
    with pytest.raises(HookError, match="must give a number that follows from the logits"):
        lens.run_with_cache(tokens, gradients_of=lambda logits: 3.0)


# Disk.


def test_a_saved_recording_reads_as_it_was(inside, tmp_path):
    _, acts = inside.run_with_cache(PROMPTS)
    acts.save(tmp_path / "a")
    again = glmlens.load_activations(tmp_path / "a", inside)
    assert list(again) == list(acts)
    assert same(again, dict(acts)) == []
    assert again.labels == acts.labels
    assert again.bytes == acts.bytes
    alone = glmlens.load_activations(tmp_path / "a")
    assert torch.equal(alone["mlp_out"], acts["mlp_out"])
    with pytest.raises(HookError, match="with the model it would follow: load with lens="):
        alone["resid_mid"]
    with pytest.raises(FileExistsError, match="holds a recording already"):
        acts.save(tmp_path / "a")


def test_a_saved_generation_reads_as_it_was(inside, tmp_path):
    run = inside.generate(PROMPTS[1], 4, names=["resid_post", "kv.k"], stop_ids=())
    run.acts.save(tmp_path)
    again = glmlens.load_activations(tmp_path, inside)
    assert torch.equal(again["resid_post"], run.acts["resid_post"])
    assert all(torch.equal(a, b) for a, b in zip(again["kv.k", 0], run.acts["kv.k", 0], strict=True))
    assert torch.equal(again.tokens, run.tokens[:, :-1])


def test_a_recording_of_another_model_is_refused(inside, lens, tokens, tmp_path):
    _, acts = lens.run_with_cache(tokens)
    acts.save(tmp_path)
    with pytest.raises(
        ValueError, match=f"was recorded with model {lens.model_hash}; this lens has {inside.model_hash}"
    ):
        glmlens.load_activations(tmp_path, inside)
    os.remove(tmp_path / "manifest.json")
    with pytest.raises(FileNotFoundError, match="holds no whole recording"):
        glmlens.load_activations(tmp_path)
