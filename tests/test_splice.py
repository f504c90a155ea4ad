"""Dictionaries spliced into a run: nothing changes until a feature is edited, and then exactly what was asked."""

import pytest
import torch
from conftest import small_lens

import glmlens
from glmlens.hook_points import HookError
from glmlens.recording.sparse_dictionaries import Dictionary


def dictionary(width=20, d_model=48, seed=3, dtype=torch.float32, **changes):
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=draw).to(dtype) / 5

    parts = {"W_enc": numbers(d_model, width), "b_enc": numbers(width), "W_dec": numbers(width, d_model)}
    parts |= {"b_dec": numbers(d_model), "b_in": numbers(d_model), "threshold": numbers(width).abs()}
    return Dictionary(**parts | changes)


WAYS = [("blocks.1.resid_post", None), ("blocks.1.mlp_out", "blocks.1.ln2.normalized"), ("blocks.0.attn_out", None)]


@pytest.mark.parametrize(("writes", "reads"), WAYS)
def test_a_dictionary_changes_nothing_until_a_feature_is_edited(any_lens, tokens, writes, reads):
    spliced = any_lens.with_dictionary(writes, dictionary(), reads=reads)
    logits, acts = spliced.run_with_cache(tokens)
    plain, before = any_lens.run_with_cache(tokens)
    assert torch.equal(logits, plain)
    assert all(torch.equal(acts[name], before[name]) for name in before)
    assert [name for name in acts if name not in before] == [f"{writes}.features", f"{writes}.error"]
    assert acts[f"{writes}.features"].shape == (2, 9, 20)
    assert any_lens.dictionaries == ()
    assert torch.equal(spliced.run_with_hooks(tokens, {f"{writes}.features": lambda x, point: x}), plain)


@pytest.mark.parametrize(("writes", "reads"), WAYS)
def test_features_and_error_make_what_was_there(lens, tokens, writes, reads):
    coder = dictionary()
    _, acts = lens.with_dictionary(writes, coder, reads=reads).run_with_cache(tokens)
    said = acts[f"{writes}.features"] @ coder.W_dec + coder.b_dec
    assert torch.allclose(said + acts[f"{writes}.error"], acts[writes], atol=1e-5)
    x = acts[reads or writes]
    found = ((x - coder.b_in) @ coder.W_enc + coder.b_enc).relu()
    assert torch.allclose(acts[f"{writes}.features"], found * (found > coder.threshold), atol=1e-5)
    assert 0 < float((acts[f"{writes}.features"] > 0).float().mean()) < 1


@pytest.mark.parametrize(("writes", "reads"), WAYS)
def test_an_edited_feature_moves_the_point_by_its_direction(lens, tokens, writes, reads):
    coder = dictionary()
    spliced = lens.with_dictionary(writes, coder, reads=reads)

    def more(x, point):
        assert point.axes == ("batch", "pos", "feature")
        x[:, 4, 7] += 3
        return x

    logits, acts = spliced.run_with_cache(tokens, hooks={f"{writes}.features": more})

    def push(x, point):
        x[:, 4] += 3 * coder.W_dec[7]
        return x

    expected, pushed = lens.run_with_cache(tokens, hooks={writes: push})
    assert torch.allclose(logits, expected, atol=1e-3)
    assert not torch.allclose(logits, lens(tokens), atol=1e-1)
    for name in (writes, "blocks.1.resid_post", "blocks.2.attn.pattern"):
        assert torch.allclose(acts[name], pushed[name], atol=1e-4), name


def test_without_its_error_the_model_says_what_the_reconstruction_says(lens, tokens):
    coder = dictionary()
    spliced = lens.with_dictionary("blocks.1.resid_post", coder)
    logits = spliced.run_with_hooks(tokens, {"blocks.1.resid_post.error": lambda x, point: x * 0})
    expected = lens.run_with_hooks(tokens, {"blocks.1.resid_post": lambda x, point: coder.decode(coder.encode(x))})
    assert torch.allclose(logits, expected, atol=1e-4)


def test_features_are_edited_at_every_step_of_a_generation(tokens):
    lens = small_lens()
    spliced = lens.with_dictionary("blocks.1.resid_post", dictionary())
    run = spliced.generate(tokens[:1], 5, names="blocks.1.resid_post.features", stop_ids=())
    assert torch.equal(run.tokens, lens.generate(tokens[:1], 5, stop_ids=()).tokens)
    assert run.acts["blocks.1.resid_post.features"].shape == (1, 13, 20)
    hooks = {"blocks.1.resid_post.features": lambda x, point: x + 2}
    steered = spliced.generate(tokens[:1], 5, hooks=hooks, stop_ids=())
    whole = spliced.run_with_hooks(steered.tokens[:, :-1], hooks)[:, 8:].argmax(-1)
    assert torch.equal(whole, steered.new_tokens)


def test_check_and_points_know_the_features(lens, tokens):
    spliced = lens.with_dictionary("blocks.1.resid_post", dictionary())
    point = next(p for p in spliced.points(tokens) if p.name.endswith("features"))
    assert point.shape == (2, 9, 20)
    check = spliced.check(tokens, "all", {"blocks.1.resid_post.features": lambda x, point: x + 1})
    _, acts = spliced.run_with_cache(tokens, hooks={"blocks.1.resid_post.features": lambda x, point: x + 1})
    assert check.bytes == acts.bytes


def test_a_dictionary_reads_as_it_was_saved(tmp_path, lens, tokens):
    coder = dictionary()
    coder.save(tmp_path / "d.safetensors")
    again = Dictionary.load(tmp_path / "d.safetensors")
    assert all(torch.equal(getattr(again, name), getattr(coder, name)) for name in vars(coder))
    from safetensors.torch import save_file

    save_file({"W_enc": coder.W_enc}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="has W_enc; a dictionary also needs W_dec, b_dec, b_enc"):
        Dictionary.load(tmp_path / "bad.safetensors")


def test_a_dictionary_where_none_can_stand_is_an_error(lens):
    for writes, reads, message in (
        ("blocks.1.attn.z", None, "is batch pos head d; a coder reads batch pos model"),
        ("resid_post", None, "name it in full"),
        ("blocks.0.attn_out", "blocks.0.mlp_out", "comes after"),
    ):
        with pytest.raises(HookError, match=message):
            lens.with_dictionary(writes, dictionary(), reads=reads)
    once = lens.with_dictionary("blocks.0.attn_out", dictionary())
    with pytest.raises(HookError, match="its features would have the same name"):
        once.with_dictionary("blocks.0.attn_out", dictionary())
    assert isinstance(once, glmlens.Lens)
