"""Generation is an ordinary forward, step by step, with ordinary hooks."""

import pytest
import torch
from conftest import reference, small_lens, write_checkpoint
from torch.testing import assert_close

import glmlens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(8))
def test_greedy_tokens_are_those_of_transformers_in_padded_batches_too(tmp_path, seed, dtype):
    config = write_checkpoint(tmp_path, seed, dtype, eos_token_id=[1, 5, 7])
    theirs, ours = reference(tmp_path), glmlens.load(tmp_path)
    tokens = torch.randint(8, config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[1, :4], mask[2, :9] = 0, 0
    expected = theirs.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False)
    run = ours.generate(tokens, 24, attention_mask=mask)
    assert torch.equal(run.tokens, expected)
    assert run.prompt_length == 11
    one = ours.generate(tokens[:1], 24)
    assert torch.equal(one.tokens, theirs.generate(tokens[:1], max_new_tokens=24, do_sample=False))


def test_it_stops_at_any_of_several_stop_ids_and_pads_the_rows_that_have(lens, tokens):
    free = lens.generate(tokens, 12, stop_ids=())
    assert free.tokens.shape == (2, 21)
    assert free.stopped == "max_new_tokens"
    stop = [int(free.tokens[0, 11]), int(free.tokens[1, 15])]
    run = lens.generate(tokens, 12, stop_ids=stop)
    assert run.stopped == "stop"
    for row, expected in zip(run.new_tokens.tolist(), free.new_tokens.tolist(), strict=True):
        end = next(i for i, token in enumerate(expected) if token in stop)
        assert row[: end + 1] == expected[: end + 1]
        assert set(row[end + 1 :]) <= {0}


def test_steps_stream_as_they_happen(lens, tokens):
    run = lens.generate(tokens, 6, stop_ids=())
    stream = lens.stream(tokens, 6, stop_ids=())
    first = next(stream)
    assert torch.equal(first.tokens, run.new_tokens[:, 0])
    assert torch.equal(first.logits.argmax(-1), first.tokens)
    assert [step.index for step in stream] == [1, 2, 3, 4, 5]
    assert torch.is_grad_enabled()


def test_it_continues_from_a_cache_and_leaves_that_as_it_was(any_lens, tokens):
    whole = any_lens.generate(tokens, 8, stop_ids=())
    kv = any_lens.new_kv(batch=2, capacity=3)
    any_lens(tokens[:, :5], kv=kv)
    before = (kv.keys.clone(), kv.length)
    for _ in range(2):
        run = any_lens.generate(tokens[:, 5:], 8, kv=kv, stop_ids=())
        assert torch.equal(run.new_tokens, whole.new_tokens)
    assert torch.equal(kv.keys, before[0])
    assert kv.length == before[1]
    more = any_lens.generate(whole.tokens[:, -1:], 4, kv=whole.kv, stop_ids=())
    longer = any_lens.generate(tokens, 12, stop_ids=())
    assert torch.equal(more.new_tokens, longer.new_tokens[:, 8:])


def test_a_recording_covers_every_token_that_was_run(any_lens, tokens):
    run = any_lens.generate(tokens, 5, names="all", stop_ids=())
    _, again = any_lens.run_with_cache(run.tokens[:, :-1])
    assert run.kv.length == 13
    for name, expected in again.items():
        if name == "logits":
            assert run.acts[name].shape == (2, 5, 101)
            assert torch.equal(run.acts[name].argmax(-1), run.new_tokens)
        elif name.endswith((".kv.k", ".kv.v")):
            assert [x.shape[1] for x in run.acts[name]] == [9, 10, 11, 12, 13]
            assert_close(run.acts[name][-1], expected, rtol=0, atol=1e-5)
        else:
            found = run.acts[name]
            if name.endswith("attn.scores"):
                assert (found[:, :, :9, 9:] == float("-inf")).all()
                found, expected = found.tril(), expected.tril()
            assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_recording_is_of_what_happened_under_intervention(any_lens, tokens):
    vector = 3 * torch.randn(48, generator=torch.Generator().manual_seed(0))

    def steer(x, point):
        return x + vector

    hooks = {"blocks.1.resid_post": glmlens.only(steer, positions=range(10, 40))}
    run = any_lens.generate(tokens, 8, names=["resid_post"], hooks=hooks, stop_ids=())
    plain = any_lens.generate(tokens, 8, stop_ids=())
    assert not torch.equal(run.tokens, plain.tokens)
    _, rerun = any_lens.run_with_cache(run.tokens[:, :-1], "resid_post")
    _, steered = any_lens.run_with_cache(run.tokens[:, :-1], "resid_post", hooks)
    recorded = run.acts["resid_post"]
    assert_close(recorded, steered["resid_post"], rtol=0, atol=1e-4)
    assert_close(recorded[1, :, :10], rerun["resid_post"][1, :, :10], rtol=0, atol=1e-4)
    moved = recorded[1, :, 10:] - rerun["resid_post"][1, :, 10:]
    assert_close(moved, vector.expand_as(moved), rtol=0, atol=1e-4)


def test_hooks_know_step_and_absolute_position(lens, tokens):
    seen = []

    def look(x, point):
        seen.append((point.step, point.positions[0].tolist(), x.shape[1], point.key_positions.shape[1]))
        return x

    lens.generate(tokens, 4, hooks={"blocks.0.mlp.post": look}, stop_ids=())
    assert seen == [(0, list(range(9)), 9, 9), (1, [9], 1, 10), (2, [10], 1, 11), (3, [11], 1, 12)]


def test_editing_what_is_written_changes_what_is_remembered(any_lens, tokens):
    def edit(x, point):
        return x + 1

    plain = any_lens.generate(tokens, 5, stop_ids=())
    for new, held in (("kv.k_new", "keys"), ("kv.v_new", "values")):
        hooks = {f"blocks.0.{new}": glmlens.only(edit, positions=4)}
        run = any_lens.generate(tokens, 5, hooks=hooks, names=f"blocks.0.{new[:-4]}", stop_ids=())
        changed = (getattr(run.kv, held)[0, :, :9] - getattr(plain.kv, held)[0, :, :9]).abs() > 0.5
        assert changed.all(-1).all(-1).tolist() == [[i == 4 for i in range(9)]] * 2
        before = getattr(plain.kv, held)[0, :, 4]
        for recalled in run.acts[f"blocks.0.{new[:-4]}"]:
            assert_close(recalled[:, 4], before + 1, rtol=0, atol=1e-5)


def test_editing_what_is_read_changes_this_step_and_nothing_later(any_lens, tokens):
    def edit(x, point):
        x[:, 2] += 5
        return x

    last = any_lens.cfg.n_layers - 1
    plain = any_lens.generate(tokens, 5, stop_ids=(), names=["attn.z", "kv.k", "kv.v"])
    for name in ("kv.k", "kv.v"):
        hooks = {f"blocks.{last}.{name}": glmlens.only(edit, steps=2)}
        run = any_lens.generate(tokens, 5, stop_ids=(), names=["attn.z", "kv.k", "kv.v"], hooks=hooks)
        moved = (run.acts["attn.z", last] - plain.acts["attn.z", last]).abs().amax((0, 2, 3)) > 1e-3
        assert moved[:10].tolist() == [False] * 10
        assert moved[10]
        same = [
            torch.equal(a[:, 2], b[:, 2]) for a, b in zip(run.acts[name, last], plain.acts[name, last], strict=True)
        ]
        assert same == [True, True, False, True, True]
        assert torch.equal(run.kv.keys[:, :, 2], plain.kv.keys[:, :, 2])
        assert torch.equal(run.kv.values[:, :, 2], plain.kv.values[:, :, 2])


@pytest.mark.parametrize("where", ["blocks.1.attn.z", "logits"])
def test_interrupting_returns_what_there_is(lens, tokens, where):
    def interrupt(x, point):
        if point.step == 3:
            raise KeyboardInterrupt
        return x

    run = lens.generate(tokens, 9, names=["resid_post"], hooks={where: interrupt}, stop_ids=())
    assert run.stopped == "interrupted"
    more = lens.generate(run.tokens[:, -1:], 2, kv=run.kv, stop_ids=())
    assert torch.equal(more.new_tokens, lens.generate(tokens, 5, stop_ids=()).new_tokens[:, 3:])
    assert run.new_tokens.shape == (2, 3)
    assert run.acts["resid_post"].shape == (3, 2, 11, 48)
    assert run.kv.length == 11
    assert torch.equal(run.tokens, lens.generate(tokens, 3, stop_ids=()).tokens)


def test_a_failing_hook_keeps_what_was_computed(lens, tokens):
    def fail(x, point):
        if point.step == 2:
            raise ZeroDivisionError
        return x

    with pytest.raises(ZeroDivisionError) as error:
        lens.generate(tokens, 9, hooks={"blocks.1.attn.z": fail}, stop_ids=())
    assert error.value.run.new_tokens.shape == (2, 2)


def test_nothing_to_generate_is_an_error(lens, tokens):
    with pytest.raises(ValueError, match="at least 1"):
        lens.generate(tokens, 0)
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        lens.generate(tokens, 3, attention_mask=mask)
    with pytest.raises(ValueError, match="no tokens"):
        lens.generate(torch.zeros(1, 0, dtype=torch.long))


def test_a_bad_token_id_is_an_error_before_anything_runs(lens):
    with pytest.raises(ValueError, match="this model has 0 to 100"):
        lens(torch.tensor([[3, 101]]))
    with pytest.raises(ValueError, match="this model has 0 to 100"):
        lens.generate(torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match="no tokenizer"):
        lens("text")


def test_small_lens_is_not_degenerate(tokens):
    """The tests above compare runs that could only agree by accident if the model said one thing whatever it reads."""
    lens = small_lens()
    assert len(set(lens.generate(tokens, 12, stop_ids=()).new_tokens.flatten().tolist())) > 5
