"""The numbers are the published model's own."""

import numpy as np
import pytest
import torch
from conftest import padded_prompts, reference, small_lens, write_checkpoint
from torch.testing import assert_close

import glmlens
from glmlens.losses import next_token_loss
from glmlens.model import GLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(40))
def test_residuals_patterns_and_logits_equal_transformers_bit_for_bit(tmp_path, seed, dtype):
    write_checkpoint(tmp_path, seed, dtype)
    theirs, ours = reference(tmp_path), glmlens.load(tmp_path)
    assert ours.dtype == theirs.dtype == dtype
    for tokens, mask, positions in padded_prompts(theirs.config.vocab_size, seed):
        options = {"position_ids": positions, "output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            expected = theirs(tokens, attention_mask=mask, **options)
        padding = {"attention_mask": mask} if len(tokens) > 1 else {}
        logits, acts = ours.run_with_cache(tokens, ["resid_pre", "attn.pattern", "ln_final.normalized"], **padding)
        real = mask.bool()
        assert torch.equal(logits[real], expected.logits[real])
        for layer in range(ours.cfg.n_layers):
            assert torch.equal(acts["resid_pre", layer][real], expected.hidden_states[layer][real])
            pattern, theirs_pattern = acts["attn.pattern", layer], expected.attentions[layer]
            assert torch.equal(pattern.transpose(1, 2)[real], theirs_pattern.transpose(1, 2)[real])
        assert torch.equal(acts["ln_final.normalized"][real], expected.hidden_states[-1][real])


def test_d_vocab_may_equal_d_model(tmp_path):
    write_checkpoint(tmp_path, 4, vocab_size=64, hidden_size=64)
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.equal(glmlens.load(tmp_path)(tokens), reference(tmp_path)(tokens).logits)


@pytest.mark.parametrize("seed", range(12))
def test_sdpa_agrees_with_eager(tmp_path, seed):
    write_checkpoint(tmp_path, seed)
    eager, sdpa = glmlens.load(tmp_path), glmlens.load(tmp_path, attention="sdpa")
    tokens = torch.randint(0, eager.cfg.d_vocab, (3, 17), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    for given in (torch.ones_like(tokens), mask):
        a, b = eager(tokens, attention_mask=given), sdpa(tokens, attention_mask=given)
        real = given.bool()
        assert_close(b[real], a[real], rtol=0, atol=1e-5 * float(a.abs().max()))
        assert torch.isfinite(b).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", range(12))
def test_prefill_chunks_and_steps_equal_one_pass(tmp_path, seed, attention):
    write_checkpoint(tmp_path, seed)
    lens = glmlens.load(tmp_path, attention=attention)
    tokens = torch.randint(0, lens.cfg.d_vocab, (2, 19), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    full, kv = lens(tokens, attention_mask=mask), lens.new_kv(batch=2, capacity=8)
    ends = [5, 6, 11, *range(12, 20)]
    parts = [lens(tokens[:, a:b], attention_mask=mask[:, a:b], kv=kv) for a, b in zip([0, *ends], ends, strict=False)]
    real = mask.bool()
    assert_close(torch.cat(parts, 1)[real], full[real], rtol=0, atol=1e-5 * float(full.abs().max()))


def recorded(path):
    """The weights and the input-output pairs of a one-layer model, as the original code left them."""
    data, at = path.read_bytes(), 0

    def take(*shape, dtype=np.float32):
        nonlocal at
        count = int(np.prod(shape))
        values = np.frombuffer(data, dtype, count, at).reshape(shape).copy()
        at += 4 * count
        return torch.from_numpy(values)

    weights = {
        "embed": take(5, 32), "ln1": take(32), "qkv": take(48, 32), "qkv_bias": take(48), "out": take(32, 32),
        "ln2": take(32), "gate_up": take(96, 32), "down": take(32, 48), "ln_final": take(32),
    }  # fmt: skip
    pairs = [(take(1, n, dtype=np.int32).long(), take(1, n, 32)) for n in (3, 1, 1)]
    assert at == len(data)
    return weights, pairs


@pytest.mark.parametrize(("name", "eps"), [("glm2", 1e-5), ("glm4", 1.5625e-7)])
def test_outputs_recorded_from_the_original_code_are_reproduced(fixtures, name, eps):
    weights, pairs = recorded(fixtures / "chatglm" / f"{name}_model.data")
    cfg = glmlens.GLMConfig.from_dict(
        {
            "model_type": "glm", "vocab_size": 5, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": eps,
        }
    )  # fmt: skip
    model = GLM(cfg)
    q, k, v = weights["qkv"].split([32, 8, 8])
    bq, bk, bv = weights["qkv_bias"].split([32, 8, 8])
    block = "blocks.0."
    state = {
        "embed.weight": weights["embed"], "unembed.weight": torch.zeros(5, 32), "ln_final.weight": weights["ln_final"],
        block + "ln1.weight": weights["ln1"], block + "ln2.weight": weights["ln2"],
        block + "attn.query.weight": q, block + "attn.key.weight": k, block + "attn.value.weight": v,
        block + "attn.query.bias": bq, block + "attn.key.bias": bk, block + "attn.value.bias": bv,
        block + "attn.out.weight": weights["out"],
        block + "mlp.gate_up.weight": weights["gate_up"], block + "mlp.down.weight": weights["down"],
    }  # fmt: skip
    model.load_state_dict(state)
    lens = glmlens.Lens(model)
    kv = lens.new_kv()
    for tokens, expected in pairs:
        every = torch.ones_like(tokens)  # the padding id 0 is a token here
        _, acts = lens.run_with_cache(tokens, "ln_final.normalized", kv=kv, attention_mask=every)
        assert_close(acts["ln_final.normalized"], expected, rtol=0, atol=1e-6)


def test_the_residual_stream_is_the_sum_of_what_was_added(lens, tokens):
    _, acts = lens.run_with_cache(tokens)
    total = acts["embed"] + acts["attn_out"].sum(0) + acts["mlp_out"].sum(0)
    assert_close(total, acts["resid_post"][-1], rtol=0, atol=1e-5 * float(total.abs().max()))
    assert torch.equal(acts["resid_mid"], acts["resid_pre"] + acts["attn_out"])
    assert torch.equal(acts["resid_post"], acts["resid_mid"] + acts["mlp_out"])


def test_heads_sum_to_what_attention_writes(tokens):
    lens = small_lens("glm")
    _, acts = lens.run_with_cache(tokens, ["attn.result", "attn_out"])
    for layer in range(lens.cfg.n_layers):
        assert_close(acts["attn.result", layer].sum(2), acts["attn_out", layer], rtol=0, atol=1e-5)


def test_a_run_can_start_from_the_residual_stream_and_stop_before_a_layer(any_lens, tokens):
    full = any_lens(tokens)
    resid, mask = any_lens(tokens, stop_layer=2), torch.ones_like(tokens)
    assert torch.equal(any_lens(resid, start_layer=2, attention_mask=mask), full)
    entering = any_lens(tokens, stop_layer=1)
    assert torch.equal(any_lens(entering, start_layer=1, stop_layer=2, attention_mask=mask), resid)
    last = any_lens(tokens, stop_layer=any_lens.cfg.n_layers)
    assert torch.equal(any_lens(last, start_layer=any_lens.cfg.n_layers, attention_mask=mask), full)


def test_a_run_over_part_of_the_layers_reads_the_cache_and_leaves_it(lens, tokens):
    kv = lens.new_kv(batch=2)
    full = lens(tokens)
    lens(tokens[:, :6], kv=kv)
    resid = lens(tokens, stop_layer=1)[:, 6:]
    for _ in range(2):
        found = lens(resid, start_layer=1, kv=kv, attention_mask=torch.ones(2, 3))
        assert_close(found, full[:, 6:], rtol=0, atol=1e-5 * float(full.abs().max()))
        assert kv.length == 6


def test_embeddings_may_be_given_instead_of_tokens(any_lens, tokens):
    embeds = any_lens.W_E[tokens]
    assert torch.equal(any_lens(inputs_embeds=embeds), any_lens(tokens))


@pytest.mark.parametrize("keep", [1, 3, 0, torch.tensor([0, 4])], ids=str)
def test_logits_only_for_the_positions_asked(lens, tokens, keep):
    full, some = lens(tokens), lens(tokens, logits_to_keep=keep)
    expected = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    assert_close(some, expected, rtol=0, atol=1e-5 * float(full.abs().max()))


@pytest.mark.parametrize(("batch", "keep"), [(1, 1), (1, 3), (2, 1), (5, 1), (5, 3)])
def test_the_last_logits_in_bfloat16_are_those_of_transformers(tmp_path, batch, keep):
    config = write_checkpoint(tmp_path, 4, torch.bfloat16, hidden_size=576, vocab_size=2000)
    theirs, ours = reference(tmp_path), glmlens.load(tmp_path)
    tokens = torch.randint(0, config.vocab_size, (batch, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(tokens, logits_to_keep=keep), theirs(tokens, logits_to_keep=keep).logits)


def test_scores_depend_only_on_distance():
    lens = small_lens(dtype=torch.float64)
    tokens = torch.arange(2, 14)[None]
    shifted = torch.arange(12)[None] + 100
    assert_close(lens(tokens, position_ids=shifted), lens(tokens), rtol=0, atol=1e-9)


def test_float64_is_float64_throughout(tokens):
    lens = small_lens(dtype=torch.float64)
    _, acts = lens.run_with_cache(tokens)
    assert {x.dtype for x in acts.values()} == {torch.float64}
    single = small_lens(dtype=torch.float32)(tokens)
    assert 0 < float((lens(tokens) - single).abs().max()) < 1e-4


def test_left_padding_changes_no_real_row(any_lens, tokens):
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(tokens)], 1)
    expected = any_lens(tokens)
    found = any_lens(padded, attention_mask=mask)
    assert torch.isfinite(found).all()
    assert_close(found[:, 4:], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_log_probs_are_those_of_transformers(tmp_path, dtype):
    config = write_checkpoint(tmp_path, 6, dtype)
    theirs, ours = reference(tmp_path), glmlens.load(tmp_path)
    tokens = torch.randint(0, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        expected = theirs(tokens, labels=labels)
        summed = theirs(tokens, labels=labels, num_items_in_batch=torch.tensor(7))
    assert torch.equal(ours.loss(tokens, labels), expected.loss)
    assert torch.equal(next_token_loss(ours(tokens), labels, num_items=7), summed.loss)
    each = torch.log_softmax(expected.logits[:, :-1].float(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert torch.equal(ours.log_probs(tokens), each)
    assert_close(ours.loss(tokens), -ours.log_probs(tokens).mean())


def test_the_whole_forward_runs_on_the_meta_device(any_lens, tokens):
    from glmlens.loading.checkpoint import build_meta_model

    there = glmlens.Lens(build_meta_model(any_lens.cfg, any_lens.model.attention, torch.bfloat16))
    kv = there.new_kv(batch=2)
    mask = torch.ones_like(tokens)
    for options in ({}, {"attention_mask": mask.to("meta")}, {"kv": kv}, {"kv": kv}):
        out = there(tokens.to("meta"), **options)
        assert out.is_meta
        assert out.shape == (2, 9, 101)


@pytest.mark.cuda
def test_a_gpu_agrees_with_the_cpu(any_lens, tokens):
    here = any_lens(tokens)
    there = any_lens.to("cuda")(tokens)
    assert_close(there.cpu(), here, rtol=0, atol=1e-4 * float(here.abs().max()))


def test_padding_counts_for_nothing_in_a_loss():
    lens = glmlens.load(dtype="float32")
    texts = ["John gave a drink to Mary.", "Paris", "The capital of France is Paris."]
    each = [lens.log_probs(text)[0] for text in texts]
    assert_close(lens.loss(texts), -torch.cat(each).mean())
    together = lens.log_probs(texts)
    for row, alone in zip(together, each, strict=True):
        assert row.isnan().sum() == together.shape[1] - len(alone)
        assert_close(row[-len(alone) :], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stop_layer": -1}, "layers 0 to -1"),
        ({"stop_layer": 99}, "this model has 0 to 3"),
        ({"logits_to_keep": -1}, "logits_to_keep is -1"),
        ({"inputs_embeds": torch.zeros(2, 9, 48)}, "stand for tokens"),
        ({"start_layer": 1}, "residual stream"),
    ],
)
def test_a_forward_that_makes_no_sense_is_an_error(lens, tokens, options, told):
    with pytest.raises(ValueError, match=told):
        lens(tokens, **options)
    with pytest.raises(ValueError, match="layers -1"):
        lens(lens(tokens, stop_layer=1), start_layer=-1)
    with pytest.raises(TypeError, match="no prompt"):
        lens()
