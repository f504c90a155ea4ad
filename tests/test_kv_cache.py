"""The cache: two tensors and a length, entries at absolute positions."""

import pytest
import torch
from conftest import small_lens
from safetensors.torch import save_file
from torch.testing import assert_close

import glmlens
from glmlens import patch, timeline
from glmlens.kv_cache import KVCache


def test_a_fork_never_writes_into_its_parent(lens, tokens):
    kv = lens.new_kv(batch=2)
    lens(tokens[:, :6], kv=kv)
    keys, positions = kv.keys.clone(), kv.positions.clone()
    child = kv.fork()
    a = lens(tokens[:, 6:], kv=child)
    child.keys.fill_(3)
    assert torch.equal(kv.keys, keys)
    assert torch.equal(kv.positions, positions)
    assert (kv.length, child.length) == (6, 9)
    assert torch.equal(lens(tokens[:, 6:], kv=kv), a)


def test_truncation_forgets_what_came_after(lens, tokens):
    kv = lens.new_kv(batch=2)
    lens(tokens, kv=kv)
    kv.truncate(5)
    full = lens(tokens)
    assert_close(lens(tokens[:, 5:], kv=kv), full[:, 5:], rtol=0, atol=1e-5 * float(full.abs().max()))
    with pytest.raises(ValueError, match="holds 9 entries"):
        kv.truncate(10)


def test_a_saved_cache_continues_as_the_one_it_was(lens, tokens, tmp_path):
    kv = lens.new_kv(batch=2)
    lens(tokens[:, :5], kv=kv)
    kv.save(tmp_path / "memory.safetensors")
    again = glmlens.KVCache.load(tmp_path / "memory.safetensors")
    assert (again.length, again.bytes) == (kv.length, kv.bytes)
    assert torch.equal(lens(tokens[:, 5:], kv=again), lens(tokens[:, 5:], kv=kv))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a KV cache"):
        glmlens.KVCache.load(tmp_path / "other.safetensors")


def test_a_cache_saved_without_tokens_and_calls_is_one_that_does_not_know_them(lens, tokens, tmp_path):
    kv = lens.new_kv(batch=2)
    lens(tokens[:, :5], kv=kv)
    parts = {"keys": kv.keys[:, :, :5], "values": kv.values[:, :, :5], "positions": kv.positions[:, :5]}
    kept = {name: x.contiguous() for name, x in parts.items()}
    save_file(kept, tmp_path / "memory.safetensors", {"format": "glmlens.KVCache"})
    again = glmlens.KVCache.load(tmp_path / "memory.safetensors")
    assert bool((again.tokens == -1).all())
    assert torch.equal(lens(tokens[:, 5:], kv=again), lens(tokens[:, 5:], kv=kv))


def test_it_grows_when_it_is_full(lens, tokens):
    kv = lens.new_kv(batch=2, capacity=1)
    for i in range(9):
        last = lens(tokens[:, i : i + 1], kv=kv)
    assert kv.length == 9
    full = lens(tokens)
    assert_close(last[:, 0], full[:, -1], rtol=0, atol=1e-5 * float(full.abs().max()))


def test_it_holds_rotated_keys_with_their_absolute_positions(lens):
    tokens = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = (tokens > 0).long()
    kv = lens.new_kv(batch=2)
    _, acts = lens.run_with_cache(tokens, ["kv.k_new", "kv.v_new"], attention_mask=mask, kv=kv)
    assert kv.positions[:, :5].tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert torch.equal(kv.keys[1, :, :5], acts["kv.k_new", 1])
    assert torch.equal(kv.values[2, :, :5], acts["kv.v_new", 2])
    assert kv.next_positions().tolist() == [3, 5]


def test_what_is_seen_follows_positions_not_columns(any_lens, tokens):
    """Entries stored in another order are the same memory."""
    kv = any_lens.new_kv(batch=2)
    any_lens(tokens[:, :6], kv=kv)
    expected = any_lens(tokens[:, 6:], kv=kv.fork())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for memory in (kv.keys, kv.values):
        memory[:, :, :6] = memory[:, :, order]
    kv.positions[:, :6] = kv.positions[:, order]
    found = any_lens(tokens[:, 6:], kv=kv)
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_an_entry_edited_before_continuing_equals_a_patch_in_one_full_pass(any_lens, tokens):
    kv = any_lens.new_kv(batch=2)
    any_lens(tokens[:, :6], kv=kv)
    kv.values[1, :, 3] += 1
    kv.keys[1, :, 3] *= 2
    found = any_lens(tokens[:, 6:], kv=kv)

    def plus(x, point):
        return x + 1

    def twice(x, point):
        return x * 2

    hooks = {
        "blocks.1.kv.v_new": glmlens.only(plus, positions=3),
        "blocks.1.kv.k_new": glmlens.only(twice, positions=3),
    }
    resid = any_lens.run_with_cache(tokens[:, :6], "blocks.1.resid_post")[1]["blocks.1.resid_post"]

    def as_it_was(x, point):  # the tokens before the edit read the entry as it was
        return torch.cat([resid, x[:, 6:]], 1)

    expected = any_lens.run_with_hooks(tokens, {**hooks, "blocks.1.resid_post": as_it_was})[:, 6:]
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_cache_of_another_shape_is_an_error_that_says_how(lens, tokens):
    with pytest.raises(ValueError, match="batch 1, not 2"):
        lens(tokens, kv=lens.new_kv(batch=1))
    other = small_lens(num_key_value_heads=4)
    with pytest.raises(ValueError, match="kv heads 4, not 2"):
        lens(tokens, kv=other.new_kv(batch=2))
    with pytest.raises(ValueError, match=r"dtype torch.float64, not torch.float32"):
        lens(tokens, kv=small_lens(dtype=torch.float64).new_kv(batch=2))


def test_every_entry_knows_its_token_and_the_call_that_wrote_it(lens, tokens, tmp_path):
    kv = lens.new_kv(batch=2, capacity=1)
    for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        lens(part, kv=kv)
    calls = [0] * 5 + [1] + [2] * 3
    kv.save(tmp_path / "memory.safetensors")
    for again in (kv, kv.fork(20), glmlens.KVCache.load(tmp_path / "memory.safetensors")):
        assert torch.equal(again.tokens[:, :9], tokens)
        assert again.calls[:, :9].tolist() == [calls, calls]
    kv.truncate(6)
    lens(tokens[:, :2], kv=kv)
    assert kv.calls[0, :8].tolist() == [0] * 5 + [1, 2, 2]
    lens(kv=kv, inputs_embeds=lens.W_E[tokens[:, :1]])
    assert kv.tokens[:, 8].tolist() == [-1, -1]


def test_the_calls_of_a_generation_are_its_steps(lens, tokens):
    run = lens.generate(tokens[:1], 4, stop_ids=())
    assert run.kv.calls[0, : run.kv.length].tolist() == [0] * 9 + [1, 2, 3]
    assert torch.equal(run.kv.tokens[:, : run.kv.length], run.tokens[:, :-1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cache_grows_by_itself_and_no_bit_depends_on_its_capacity(attention):
    lens = small_lens(attention=attention, max_position_embeddings=1024)
    tokens = torch.arange(2, 14)[None]
    whole = KVCache.empty(lens.cfg, 1, 2000, lens.dtype, "cpu")
    expected = lens.generate(tokens, 600, kv=whole, stop_ids=(), names=["resid_post"])
    found = lens.generate(tokens, 600, stop_ids=(), names=["resid_post"])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.acts["resid_post"], expected.acts["resid_post"])
    assert found.kv.length == 611
    assert found.kv.capacity < 2 * 611


@pytest.mark.parametrize("begun", [False, True])
def test_ten_million_tokens_cost_no_memory_before_they_are_said(begun):
    lens, tokens = small_lens(), torch.arange(2, 14)[None]
    kv = lens.new_kv() if begun else None
    every = tuple(range(101))
    run = lens.generate(tokens, 10**7, kv=kv, stop_ids=every)  # whatever comes first ends it
    assert run.stopped == "stop"
    assert run.kv.capacity <= 300
    assert next(iter(lens.stream(tokens, 10**7, stop_ids=every))).index == 0
    assert timeline.record_timeline(lens, tokens, 10**7, stop_ids=every).steps[0].kv.capacity <= 300
    edit = patch.Intervention(patch.Site("kv.k", layer=0), patch.Zero())
    assert patch.generate_with_interventions(lens, tokens, 10**7, edit, stop_ids=every).kv.capacity <= 300


def test_a_cache_of_another_kind_model_or_device_is_one_clear_error():
    from transformers import DynamicCache

    lens, tokens = small_lens(), torch.arange(2, 14)[None]
    other = small_lens(num_hidden_layers=2)
    for kv, error, told in [
        (
            DynamicCache(),
            TypeError,
            "kv is a DynamicCache of transformers; expected a KVCache: make one with lens.new_kv",
        ),
        ((torch.zeros(2), torch.zeros(2)), TypeError, "kv is a tuple of builtins"),
        (KVCache.empty(lens.cfg, 1, 8, lens.dtype, "meta"), ValueError, "device meta, not cpu"),
        (KVCache.empty(lens.cfg, 1, 8, torch.bfloat16, "cpu"), ValueError, "dtype torch.bfloat16, not torch.float32"),
        (other.new_kv(), ValueError, "layers 2, not 3"),
        (lens.new_kv(batch=2), ValueError, "batch 2, not 1"),
    ]:
        # The tests check annotations too, and say the same of generate's kv= before it is called.
        says = (lens.generate,) if isinstance(kv, KVCache) else ()
        for ask in (lens, lens.run_with_cache, lens.run_with_hooks, lens.check, *says):
            with pytest.raises(error, match=told):
                ask(tokens, kv=kv)
        assert not isinstance(kv, KVCache) or kv.length == 0
