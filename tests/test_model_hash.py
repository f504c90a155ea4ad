"""An edit of weights is another model: its hash says so, and nothing recorded before is mixed with what comes after."""

import copy
import os
import time
import warnings

import pytest
import torch
from conftest import ARCHITECTURES, lens_of, small_lens, write_checkpoint
from safetensors.torch import load_file, save_file

import glmlens
from glmlens import patch, timeline
from glmlens.config import CheckpointError
from glmlens.hook_points import HookError

TOKENS = torch.arange(2, 14)[None]


def edit_row(p):
    p[0] += 0.5


def edit_through_data(p):
    p.data.flatten()[:: max(1, p.numel() // 1000)] += 0.5


def edit_through_numpy(p):
    p.detach().numpy()[...] *= 1.5


def swap_storage(p):
    p.data = p.data + 0.5


@pytest.mark.parametrize("edit", [edit_row, edit_through_data, edit_through_numpy, swap_storage])
def test_an_edit_of_any_parameter_is_another_model(edit):
    lens = small_lens()
    seen = {lens.model_hash}
    for p in lens.model.parameters():
        edit(p)
        assert lens.model_hash == lens.model_hash
        seen.add(lens.model_hash)
    assert len(seen) == 1 + len(list(lens.model.parameters()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_of_one_number_of_any_parameter_is_another_model(architecture):
    lens = lens_of(architecture)
    for p in lens.model.parameters():
        before, flat = lens.model_hash, p.view(-1)
        flat[-1] += 1
        assert lens.model_hash != before


def test_an_edit_of_one_head_is_seen_in_a_model_whose_parameters_are_larger_than_the_sample():
    lens = small_lens(hidden_size=512, num_attention_heads=16, num_key_value_heads=4, head_dim=64)
    seen = {lens.model_hash}
    for head in range(16):
        lens.W_Q[1, head].mul_(0)
        seen.add(lens.model_hash)
        lens.W_O[2, head].data.mul_(0)  # seen by no counter
        seen.add(lens.model_hash)
    assert len(seen) == 33


def test_the_hash_is_of_the_numbers_and_not_of_how_they_came(tmp_path):
    lens = small_lens()
    before = lens.model_hash
    p = lens.W_Q[1]
    kept = p.clone()
    p.add_(1)
    assert lens.model_hash != before
    edited = lens.model_hash
    lens.save(tmp_path / "edited")
    assert glmlens.load(tmp_path / "edited").W_Q[1].equal(p)
    again = small_lens()
    again.W_Q[1].add_(1)
    assert again.model_hash == edited
    p.copy_(kept)
    assert lens.model_hash == before == copy.deepcopy(lens).model_hash


def test_a_copied_lens_has_a_hash_of_its_own():
    lens = small_lens()
    before = lens.model_hash
    other = copy.deepcopy(lens)
    other.W_Q[0].add_(1)
    assert other.model_hash != before
    assert lens.model_hash == before
    lens.W_Q[0].add_(1)
    assert lens.model_hash == other.model_hash


def test_a_model_made_in_inference_mode_has_a_hash_that_follows_edits():
    with torch.inference_mode():
        lens = small_lens()
        before = lens.model_hash
        lens.W_Q[0].add_(1)
        assert lens.model_hash != before
    with pytest.raises(HookError, match="load it outside"):
        lens.run_with_cache(TOKENS, "resid_post", gradients_of=lambda logits: logits[:, -1, 3])


def test_on_meta_there_is_no_hash():
    with pytest.raises(ValueError, match="load on the CPU"):
        small_lens().to("meta").model_hash  # noqa: B018


def test_a_hash_asked_for_again_reads_little():
    lens = small_lens(hidden_size=1024, vocab_size=20_000)

    def seconds():
        begin = time.perf_counter()
        lens.model_hash  # noqa: B018
        return time.perf_counter() - begin

    first = seconds()
    assert min(seconds() for _ in range(5)) < first / 3


def test_a_recording_made_before_an_edit_stays_what_it_was_or_refuses(tmp_path):
    lens = small_lens()
    _, before = lens.run_with_cache(TOKENS)
    _, kept = lens.run_with_cache(TOKENS)
    kept = kept.store_all()
    _, stored = lens.run_with_cache(TOKENS, ["attn.z"])
    expected = {name: before[name].clone() for name in before}
    was = lens.model_hash
    lens.W_O[1].mul_(2)
    assert lens.model_hash != was
    for name in before:
        assert torch.equal(kept[name], expected[name])
        if name in before.stored:
            assert torch.equal(before[name], expected[name])
            continue
        with pytest.raises(HookError, match="edited after this run"):
            before[name]
    assert "not to be had" in repr(before)
    assert torch.equal(stored["attn.z", 1], expected["blocks.1.attn.z"])
    stored.save(tmp_path / "acts")
    with pytest.raises(ValueError, match=f"recorded with model {was}"):
        glmlens.load_activations(tmp_path / "acts", lens)


def test_a_recording_edited_under_before_its_hash_was_asked_for_says_unknown(tmp_path):
    lens = small_lens()
    _, acts = lens.run_with_cache(TOKENS, ["attn.z"])
    lens.W_O[1].mul_(2)
    acts.save(tmp_path / "acts")
    with pytest.raises(ValueError, match="recorded with model unknown"):
        glmlens.load_activations(tmp_path / "acts", lens)
    assert torch.equal(glmlens.load_activations(tmp_path / "acts")["attn.z", 1], acts["attn.z", 1])


def test_what_was_begun_before_an_edit_is_not_gone_on_with(tmp_path):
    lens = small_lens()
    asked = {"names": ["blocks.1.resid_post"], "out": tmp_path / "harvest"}
    lens.harvest([TOKENS[0].tolist()], **asked)
    patch.SteeringVector("resid_post", (1,), torch.ones(1, 48), lens.model_hash).save(tmp_path / "steering")
    swept = lambda: patch.sweep(  # noqa: E731
        lens, TOKENS, TOKENS.flip(1), "resid_pre", over=("layer",), metric=(3, 6), checkpoint=tmp_path / "sweep"
    )
    swept()
    line = timeline.record_timeline(lens, TOKENS, 3, stop_ids=())
    line.logit_lens()
    was = lens.model_hash
    lens.W_O[1].mul_(2)
    with pytest.raises(ValueError, match="model"):
        lens.harvest([TOKENS[0].tolist()], **asked)
    with pytest.raises(patch.PatchError, match=f"is for model {was}"):
        patch.SteeringVector.load(tmp_path / "steering", lens)
    with pytest.raises((ValueError, FileExistsError), match="sweep"):
        swept()
    assert line.model_hash == was
    for ask in (line.logit_lens, lambda: line.rerun(1, token=5)):
        with pytest.raises(HookError, match="edited after this timeline"):
            ask()
    line.attention(0, 0)  # which follows from the cache alone


def rewrite(path, how):
    tensors = {name: x.clone() + 1 for name, x in load_file(path).items()}
    if how == "in place":
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(before.st_size - 4)
            file.write(b"\0\0\0\0")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif how == "replaced":
        save_file(tensors, path.with_name("new"))
        os.replace(path.with_name("new"), path)
    else:
        path.unlink()


def test_a_file_written_to_under_a_lens_is_noticed_before_a_run(tmp_path):
    write_checkpoint(tmp_path, 2)
    lens, cast = glmlens.load(tmp_path), glmlens.load(tmp_path, dtype="float64")
    kept = copy.deepcopy(lens)
    expected = kept(TOKENS)
    rewrite(tmp_path / "model.safetensors", "in place")
    for ask in (lens, lens.generate, lens.run_with_cache, lens.run_with_hooks, lens.loss):
        with pytest.raises(CheckpointError, match=r"model.safetensors: was written to since it was opened"):
            ask(TOKENS)
    cast(TOKENS)  # its numbers are its own
    assert torch.equal(kept(TOKENS), expected)
    assert glmlens.load(tmp_path)(TOKENS) is not None


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_a_file_replaced_under_a_lens_is_said_once_and_the_lens_stays_as_it_was(tmp_path, how):
    write_checkpoint(tmp_path, 2)
    lens = glmlens.load(tmp_path)
    expected = lens(TOKENS)
    rewrite(tmp_path / "model.safetensors", how)
    with pytest.warns(UserWarning, match="goes on with the one it was opened from"):
        assert torch.equal(lens(TOKENS), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(lens(TOKENS), expected)


def test_a_tied_embedding_is_edited_with_the_unembedding_unless_it_was_parted(tmp_path):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "tied", 2, tie_word_embeddings=True)
    tied, parted = glmlens.load(tmp_path / "tied"), glmlens.load(tmp_path / "tied", untie=True)
    assert tied.cfg.tied
    assert "W_U is W_E" in repr(tied)
    assert not parted.cfg.tied
    assert "W_U is W_E" not in repr(parted)
    assert torch.equal(parted(TOKENS), tied(TOKENS))
    assert parted.model_hash != tied.model_hash
    tied.W_E[5] += 1
    assert torch.equal(tied.W_U.T, tied.W_E)
    before = parted.model_hash
    parted.W_E[5] += 1
    assert parted.model_hash != before
    assert not torch.equal(parted.W_U.T, parted.W_E)
    assert torch.equal(parted.W_U, glmlens.load(tmp_path / "tied").W_U)
    parted.save(tmp_path / "parted")
    again = glmlens.load(tmp_path / "parted")
    assert torch.equal(again(TOKENS), parted(TOKENS))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "parted", attn_implementation="eager").eval()
    assert theirs.config.tie_word_embeddings is False
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, again(TOKENS))
    assert not glmlens.load(tmp_path / "tied", untie=True, device="meta").cfg.tied
