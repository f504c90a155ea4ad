"""Rules by which checkpoints reach past their training: the same angles as the published model's, everywhere."""

import json

import pytest
import torch
from conftest import reference, rewrite_json, small_config, small_lens, write_checkpoint
from test_formats import exactly, nearly, runs, write_llama
from torch.testing import assert_close

import glmlens
from glmlens import analysis, cache
from glmlens.config import CheckpointError
from glmlens.patch import rotary as surgery
from glmlens.rotary_frequencies import rope_frequencies
from glmlens.rotary_rules import compute_pair_frequencies

LONG = torch.arange(60, 100)[None]  # past the 64 positions that the rules below say were trained
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SCALED = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn by thirds": {**YARN, "factor": 3.0, "truncate": False},
    "yarn with betas": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn with a factor": {**YARN, "attention_factor": 1.5},
    "yarn with scales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn by contexts": {**YARN, "factor": None},
    "yarn of a few tokens": {**YARN, "original_max_position_embeddings": 4},
}
each = pytest.mark.parametrize("rule", SCALED.values(), ids=SCALED)
some = pytest.mark.parametrize("rule", [SCALED["linear"], LLAMA3, YARN], ids=["linear", "llama3", "yarn"])
THETA = {"rope_theta": 10000.0}


def scaled(rule, **fields):
    """Fields of a config with this rule, as transformers 5 spells them."""
    return {"rope_parameters": {**rule, **THETA, **fields}}


@pytest.mark.parametrize(("glm4", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=["glm", "glm4"])
@each
def test_logits_equal_transformers_bit_for_bit_before_and_past_the_trained_context(tmp_path, rule, glm4, dtype):
    write_checkpoint(tmp_path, 5, dtype, glm4=glm4, head_dim=32, max_position_embeddings=256, **scaled(rule))
    lens, theirs = glmlens.load(tmp_path), reference(tmp_path)
    for start in (0, 50, 500):
        runs(lens, theirs, start, exactly, start)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@some
def test_the_llama_family_turns_by_the_same_rules(tmp_path, kind, rule):
    write_llama(tmp_path, kind, 1, **scaled(rule))
    lens, theirs = glmlens.load(tmp_path), reference(tmp_path)
    assert lens.cfg.rope_scaling.kind == rule["rope_type"]
    for start in (0, 500):
        runs(lens, theirs, start, nearly, start)


@each
def test_frequencies_and_factor_are_those_of_transformers_to_the_bit(rule):
    from transformers import GlmConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**rule, **THETA, "partial_rotary_factor": 0.5}
    cfg = small_config(head_dim=128, max_position_embeddings=256, rope_parameters=rope)
    theirs = GlmConfig(head_dim=128, max_position_embeddings=256, rope_parameters=rope)
    expected, factor = ROPE_INIT_FUNCTIONS[rule["rope_type"]](theirs, torch.device("cpu"))
    found = rope_frequencies(cfg, torch.float32, torch.device("cpu"))
    assert torch.equal(found[0], expected)
    assert found[1] == factor
    plain = rope_frequencies(small_config(head_dim=128), torch.float32, torch.device("cpu"))
    assert factor != 1 or not torch.equal(expected, plain[0])


def test_a_rule_is_read_as_old_and_new_files_spell_it(tmp_path):
    """`rope_scaling` beside `rope_theta` as a model's card says to add it; `rope_parameters`; and where both stand."""
    write_checkpoint(tmp_path, 5, head_dim=32)
    raw = {k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items() if k != "rope_parameters"}
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    other = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    spelt = [
        {"rope_scaling": old, "rope_theta": 2e4},
        {"rope_scaling": YARN, "rope_theta": 2e4},
        {"rope_parameters": {**YARN, "rope_theta": 2e4}},
        {"rope_scaling": None, "rope_parameters": {**old, "rope_theta": 2e4}},
        {"rope_scaling": {**old, "rope_theta": 2e4}, "rope_parameters": other},
        {"rope_scaling": {k: old[k] for k in ("type", "factor")}, "rope_theta": 2e4, "max_position_embeddings": 64},
        {"rope_scaling": old | {"original_max_position_embeddings": 32}, "rope_theta": 2e4}
        | {"original_max_position_embeddings": 64},
    ]
    said = []
    for fields in spelt:
        (tmp_path / "config.json").write_text(json.dumps(raw | fields))
        said.append(glmlens.load(tmp_path)(LONG, position_ids=LONG))
        with torch.no_grad():
            assert torch.equal(said[-1], reference(tmp_path)(LONG, position_ids=LONG).logits)
    assert all(torch.equal(x, said[0]) for x in said)


REFUSED = [
    ({"rope_type": "dynamic", "factor": 2.0}, "up to 512 positions nothing changes"),
    ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [2.0]}, "rope_type is 'longrope'"),
    ({"rope_type": "linear"}, "factor is missing"),
    ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5; expected a number from 1 to 1,000,000"),
    ({"rope_type": "yarn", "factor": "4"}, "factor is '4'"),
    ({**YARN, "factor": 1e300}, "factor is 1e+300"),
    ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
    ({**YARN, "beta_fast": 1.0}, "beta_fast is 1.0; expected more than beta_slow, 1.0"),
    ({**YARN, "beta_slow": 1e-300}, "beta_slow is 1e-300"),
    ({**YARN, "attention_factor": -1.0}, "attention_factor is -1.0"),
    ({**YARN, "mscale": 1.0, "mscale_all_dim": -1.0}, "mscale_all_dim is -1.0"),
    ({**YARN, "truncate": 1}, "truncate is 1"),
    ({**YARN, "rope_theta": 1.0}, "rope_theta is 1.0; with 'yarn' expected a number above 1"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
    ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor is 1.0; expected more than low_freq_factor, 1.0"),
    ({"full_attention": YARN}, "'full_attention'"),
]


@pytest.mark.parametrize(("rule", "told"), REFUSED, ids=[told for _, told in REFUSED])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_a_rule_that_cannot_be_kept_is_one_clear_error(field, rule, told):
    with pytest.raises(CheckpointError) as error:
        small_config(**{"rope_parameters": None, field: rule})
    assert told in str(error.value)
    assert "config.json" in str(error.value)


def test_another_theta_goes_with_the_rule(tmp_path):
    write_checkpoint(tmp_path, 5, **scaled(YARN))
    lens = glmlens.load(tmp_path, rope_theta=5e5)
    rewrite_json(tmp_path / "config.json", rope_parameters={**YARN, "rope_theta": 5e5})
    assert torch.equal(glmlens.load(tmp_path)(LONG), lens(LONG))
    with pytest.raises(CheckpointError, match="rope_theta is 1\\.0; expected a number above 1"):
        glmlens.load(tmp_path, rope_theta=1.0)


@each
def test_a_saved_model_turns_by_its_rule_in_transformers_too(tmp_path, rule):
    write_checkpoint(tmp_path / "a", 5, head_dim=32, **scaled(rule))
    lens = glmlens.load(tmp_path / "a")
    lens.save(tmp_path / "b")
    assert glmlens.load(tmp_path / "b").cfg == lens.cfg
    runs(lens, reference(tmp_path / "b"), 0, exactly, 60)
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw["rope_scaling"]["rope_type"] == rule["rope_type"]  # where transformers 4.x looks for it
    assert raw["rope_scaling"].items() <= raw["rope_parameters"].items()


def test_models_that_turn_otherwise_have_other_hashes():
    rules = [{}, *({"rope_scaling": rule} for rule in SCALED.values())]
    assert len({small_lens(**rule).model_hash for rule in rules}) == len(rules)


# ---- everything that knows of angles ----


@pytest.fixture
def lens(rule):
    return small_lens(dtype=torch.float64, head_dim=32, **scaled(rule))


@some
def test_steps_from_a_cache_equal_one_pass(lens, rule):
    full, kv = lens(LONG, position_ids=LONG), lens.new_kv()
    steps = [lens(LONG[:, i : i + 1], kv=kv, position_ids=LONG[:, i : i + 1]) for i in range(40)]
    assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-9)


@some
def test_the_parts_of_a_score_sum_to_it_and_each_is_a_wave(lens, rule):
    tokens = LONG % 101
    _, acts = lens.run_with_cache(tokens, "attn.scores")
    found = analysis.score_parts(lens, tokens, 1, 2)
    seen = torch.ones(40, 40).tril().bool()
    expected = acts["attn.scores", 1][0, 2][seen]
    assert_close(torch.tensor(found.part.values).sum(-1)[seen].double(), expected, rtol=0, atol=1e-4)
    waves = found.amplitude.values * torch.cos(torch.tensor(found.phase.values + found.angle.values)).numpy()
    assert_close(torch.tensor(waves)[seen], torch.tensor(found.part.values)[..., :-1][seen], rtol=0, atol=1e-4)
    lengths = 2 * torch.pi / rope_frequencies(lens.cfg, torch.float64, torch.device("cpu"))[0]
    assert_close(analysis.wavelengths(lens), lengths)


@some
def test_a_profile_of_one_query_and_key_is_their_score_at_every_distance(lens, rule):
    """With the same token everywhere, the mean query and key of the first layer are those of every position."""
    tokens = torch.full((1, 30), 7)
    _, acts = lens.run_with_cache(tokens, "attn.scores")
    found = analysis.distance_profile(lens, tokens)
    assert_close(
        torch.tensor(found.score.values[0]).double(), acts["attn.scores", 0][0, :, -1].flip(-1), rtol=0, atol=1e-5
    )
    amplitude, phase = (torch.tensor(x.values[0]).double() for x in (found.amplitude, found.phase))
    angle = 3 * compute_pair_frequencies(lens.cfg, torch.float64, torch.device("cpu"))
    at_three = (amplitude * torch.cos(phase + angle)).sum(-1) + torch.tensor(found.content.values[0])
    assert_close(at_three, acts["attn.scores", 0][0, :, -1, -4], rtol=0, atol=1e-5)


@some
def test_the_weights_between_a_query_and_a_key_are_the_score(lens, rule):
    _, acts = lens.run_with_cache(LONG, ["attn.scores", "ln1.normalized"])
    x = acts["ln1.normalized", 1][0]
    on_query, on_key, constant = analysis.qk_ov_circuits.QK_bias(lens, 1, 2, distance=9)
    whole = analysis.QK(lens, 1, 2, distance=9)
    found = x[30] @ whole.A @ whole.B @ x[21] + x[30] @ on_query + x[21] @ on_key + constant
    assert_close(found, acts["attn.scores", 1][0, 2, 30, 21])


@some
def test_surgery_that_moves_nothing_changes_nothing_and_a_shift_is_other_positions(lens, rule):
    plain = lens(LONG)
    for place in ({}, {"head": 1}, {"kv": 1}, {"of": "q"}, {"of": "k"}):
        assert_close(lens.run_with_hooks(LONG, surgery.shift(lens, 0, **place)), plain, rtol=0, atol=1e-9)
    moved = lens.run_with_hooks(LONG, surgery.shift(lens, 25))
    assert_close(moved, plain, rtol=0, atol=1e-9)
    by_hand = lens.run_with_cache(LONG, "rotary.cos", position_ids=torch.arange(25, 65))[1]["rotary.cos", 0]
    cos = lens.run_with_cache(LONG, "rotary.cos", surgery.shift(lens, 25))[1]["rotary.cos", 0]
    assert_close(cos, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("place", [{}, {"head": [0, 1, 2, 3]}, {"kv": [0, 1]}])
def test_a_stretched_model_is_one_whose_config_says_so(kind, place):
    plain = small_lens(dtype=torch.float64, head_dim=32)
    rule = {"linear": {"rope_type": "linear", "factor": 4.0}, "yarn": YARN}[kind]
    loaded = small_lens(dtype=torch.float64, head_dim=32, **scaled(rule))
    found = plain.run_with_hooks(LONG, surgery.stretch(plain, kind, 4.0, context=64, **place))
    assert_close(found, loaded(LONG), rtol=0, atol=1e-9)
    assert float((loaded(LONG) - plain(LONG)).abs().max()) > 1e-3


@some
def test_a_repositioned_cache_is_that_of_the_prompt_at_those_positions(lens, rule):
    one, other = lens.new_kv(), lens.new_kv()
    lens(LONG, kv=one)
    lens(LONG, kv=other, position_ids=LONG)
    moved = cache.reposition(lens, 60)(one)
    assert_close(moved.keys[:, :, :40], other.keys[:, :, :40], rtol=0, atol=1e-9)
