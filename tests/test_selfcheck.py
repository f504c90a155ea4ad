"""The self-check passes on sound models, and names the fault of others."""

from dataclasses import replace

import pytest
import torch
from conftest import small_lens, write_checkpoint

import glmlens
from glmlens import analysis, model


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_sound_model_passes(tmp_path, seed, attention):
    write_checkpoint(tmp_path, seed)
    lens = glmlens.load(tmp_path, attention=attention)
    result = analysis.selfcheck(lens)
    assert all(row.holds for row in result.rows)
    assert result.about["model"] == lens.model_hash


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_model_inside_passes_in_every_dtype(dtype):
    analysis.selfcheck(glmlens.load(dtype=dtype))


def test_padded_prompts_pass():
    lens = glmlens.load(dtype="float32")
    analysis.selfcheck(lens, ["The capital of France is", "When Mary and John went to the store, John gave a drink to"])


@pytest.mark.weights
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_passes(real_model, dtype):
    analysis.selfcheck(glmlens.load(real_model, dtype=dtype), "The capital of France is the city of Paris.")


def test_it_shows_what_it_measured_once(capsys):
    shown = repr(analysis.selfcheck(small_lens()))
    assert capsys.readouterr().out == ""  # a notebook shows the result of a cell
    assert "identity hooks change nothing" in shown
    assert "(at most 1e-05)" in shown
    assert "FAILED" not in shown


# ---- every fault is found by its check ----


def wrong_shape(lens, monkeypatch):
    lens.model.cfg = replace(lens.cfg, d_mlp=40)


def missing_bias(lens, monkeypatch):
    lens.model.cfg = replace(lens.cfg, qkv_bias=False)


def another_dtype(lens, monkeypatch):
    lens.model.blocks[1].ln1.weight = torch.nn.Parameter(lens.model.blocks[1].ln1.weight.double(), requires_grad=False)


def not_a_number(lens, monkeypatch):
    lens.model.blocks[1].mlp.down.weight[0, 0] = torch.nan


def untied(lens, monkeypatch):
    lens.model.cfg = replace(lens.cfg, tied=True)


def changed_by_hooks(lens, monkeypatch):
    """A model that computes something else when a hook is there."""
    plain = model.scope_hook

    def scope_hook(hook, scope):
        lens.model.blocks[0].ln1.eps = lens.cfg.rms_eps if hook is model.off else 1e-2
        return plain(hook, scope)

    monkeypatch.setattr(model, "scope_hook", scope_hook)


def leaking(lens, monkeypatch):
    """Attention that does not sum to 1."""
    plain = lens.model.blocks[1].attn.attend

    def attend(q, k, v, mask, hook):
        return plain(q, k, v, mask, lambda name, x: hook(name, x * 0.99 if name == "attn.pattern" else x))

    lens.model.blocks[1].attn.attend = attend


def acausal(lens, monkeypatch):
    """Attention to later tokens."""
    plain = lens.model.blocks[1].attn.attend
    lens.model.blocks[1].attn.attend = lambda q, k, v, mask, hook: plain(q, k, v, 0 * mask, hook)


def hidden_bias(lens, monkeypatch):
    """Logits that are not W_U times the normalised stream alone."""
    lens.model.unembed.bias = torch.nn.Parameter(torch.full((lens.cfg.d_vocab,), 0.1), requires_grad=False)


def hidden_contribution(lens, monkeypatch):
    """A contribution to the residual stream from no part of the model."""
    plain = lens.model.blocks[1].forward

    def forward(resid, angles, mask, kv, hook):
        return plain(resid + 0.01, angles, mask, kv, hook)

    lens.model.blocks[1].forward = forward


def wrong_cache(lens, monkeypatch):
    """A cache that stores other values than those that were run."""
    plain = model.LayerKV.update
    monkeypatch.setattr(model.LayerKV, "update", lambda self, k, v: plain(self, k, v * 1.001))


def absolute_angles(lens, monkeypatch):
    """Angles that depend on the absolute position, not only on the distance."""
    plain = model.rotary_angles

    def angles(positions, *rest):
        cos, sin = plain(positions, *rest)
        return cos * (1 + 0.01 * positions[..., None]), sin

    monkeypatch.setattr(model, "rotary_angles", angles)


FAULTS = {
    wrong_shape: "parameters are those of the config",
    missing_bias: "parameters are those of the config",
    another_dtype: "parameters are those of the config",
    not_a_number: "every weight is finite",
    untied: "embedding and unembedding are tied as in the config",
    changed_by_hooks: "identity hooks change nothing",
    leaking: "attention of every query sums to 1",
    acausal: "no attention to later tokens or padding",
    hidden_bias: "parameters are those of the config",
    hidden_contribution: "the residual stream is the sum of its contributions",
    wrong_cache: "one token at a time equals one pass",
    absolute_angles: "scores depend only on distance",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_by_the_check_that_is_about_it(fault, monkeypatch):
    lens = small_lens()
    fault(lens, monkeypatch)
    with pytest.raises(analysis.SelfCheckError) as raised:
        analysis.selfcheck(lens)
    assert FAULTS[fault] in str(raised.value)
    assert "(at most " in str(raised.value)


def test_a_wrong_sum_is_found_by_every_split_of_a_logit(monkeypatch):
    lens = small_lens()
    hidden_bias(lens, monkeypatch)
    with pytest.raises(analysis.SelfCheckError) as raised:
        analysis.selfcheck(lens)
    for by in ("component", "head", "neuron", "source"):
        assert f"a logit is the sum of its parts by {by}" in str(raised.value)
