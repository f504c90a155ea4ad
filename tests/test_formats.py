"""Every published format is the same model, opened without its code."""

import json
import subprocess
import sys
import warnings
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import HEADED, padded_prompts, reference, rewrite_json, small_config, small_lens, write_checkpoint
from safetensors.torch import load_file, save_file
from test_loading import TOKENS, shard
from test_numbers import recorded
from torch.testing import assert_close

import glmlens
from glmlens import analysis
from glmlens.config import CheckpointError
from glmlens.loading import checkpoint
from glmlens.loading.saving import collect_tensors

CHATGLM = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True, "fp32_residual_connection": False, "multi_query_attention": True,
    "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 1, "original_rope": True, "tie_word_embeddings": False,
}  # fmt: skip


def as_chatglm(folder, ratio=1, dtype="float32"):
    """Rewrite a `glm` checkpoint as the original code would have written it."""
    raw, old = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    new = {
        "transformer.embedding.word_embeddings.weight": old["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": old["model.norm.weight"],
        "transformer.output_layer.weight": old["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.zeros(raw["head_dim"] // 4),
    }
    for i in range(raw["num_hidden_layers"]):
        theirs, ours = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias") if raw["attention_bias"] else ("weight",):
            parts = [old[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            new[f"{theirs}.self_attention.query_key_value.{kind}"] = torch.cat(parts)
        new |= {
            f"{theirs}.self_attention.dense.weight": old[f"{ours}.self_attn.o_proj.weight"],
            f"{theirs}.mlp.dense_h_to_4h.weight": old[f"{ours}.mlp.gate_up_proj.weight"],
            f"{theirs}.mlp.dense_4h_to_h.weight": old[f"{ours}.mlp.down_proj.weight"],
            f"{theirs}.input_layernorm.weight": old[f"{ours}.input_layernorm.weight"],
            f"{theirs}.post_attention_layernorm.weight": old[f"{ours}.post_attention_layernorm.weight"],
        }
    save_file({name: x.contiguous() for name, x in new.items()}, folder / "model.safetensors")
    fields = {
        "padded_vocab_size": raw["vocab_size"], "hidden_size": raw["hidden_size"],
        "ffn_hidden_size": raw["intermediate_size"], "num_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"], "multi_query_group_num": raw["num_key_value_heads"],
        "kv_channels": raw["head_dim"], "seq_length": 512, "layernorm_epsilon": raw["rms_norm_eps"],
        "add_qkv_bias": raw["attention_bias"], "torch_dtype": dtype, "rope_ratio": ratio,
        "eos_token_id": [1], "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(CHATGLM | fields))


def runs(lens, theirs, seed, equal, start=0):
    """Compare the logits of prompts of several shapes, padded on the left, whose positions count from `start`."""
    for tokens, mask, positions in padded_prompts(lens.cfg.d_vocab, seed, start):
        with torch.no_grad():
            expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
        options = {"position_ids": positions} if start else {}
        found = lens(tokens, **options, **({"attention_mask": mask} if len(tokens) > 1 else {}))
        equal(found[mask.bool()], expected[mask.bool()])


def exactly(found, expected):
    assert torch.equal(found, expected)


def nearly(found, expected):
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(6))
def test_chatglm_is_glm_bit_for_bit(tmp_path, seed, dtype):
    """The same weights as `glm`, which transformers runs, and as the original code keeps them.

    A product with a single row of float32 depends in its last bit on where the weights lie, so transformers is given
    them where they lie here.
    """
    ratio = [1, 50, 500][seed % 3]
    rope = {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}
    fields = {"glm4": False, "tie_word_embeddings": False, "rope_parameters": rope, "num_key_value_heads": 1 + seed % 2}
    write_checkpoint(tmp_path, seed, dtype, **fields)
    theirs = reference(tmp_path)
    as_chatglm(tmp_path, ratio, str(dtype).removeprefix("torch."))
    lens = glmlens.load(tmp_path)
    assert (lens.cfg.rope_theta, lens.dtype) == (10000.0 * ratio, dtype)
    runs(lens, theirs, seed, nearly)
    given = collect_tensors(lens.model)
    assert given.keys() == theirs.state_dict().keys()
    assert all(torch.equal(given[name], x) for name, x in theirs.state_dict().items())
    theirs.load_state_dict(given, assign=True)
    runs(lens, theirs, seed, exactly)


@pytest.mark.parametrize(("name", "eps"), [("glm2", 1e-5), ("glm4", 1.5625e-7)])
def test_a_chatglm_folder_says_what_the_original_code_said(fixtures, tmp_path, name, eps):
    weights, pairs = recorded(fixtures / "chatglm" / f"{name}_model.data")
    layer = "transformer.encoder.layers.0"
    tensors = {
        "transformer.embedding.word_embeddings.weight": weights["embed"],
        "transformer.output_layer.weight": torch.zeros(5, 32),
        "transformer.encoder.final_layernorm.weight": weights["ln_final"],
        f"{layer}.input_layernorm.weight": weights["ln1"],
        f"{layer}.self_attention.query_key_value.weight": weights["qkv"],
        f"{layer}.self_attention.query_key_value.bias": weights["qkv_bias"],
        f"{layer}.self_attention.dense.weight": weights["out"],
        f"{layer}.post_attention_layernorm.weight": weights["ln2"],
        f"{layer}.mlp.dense_h_to_4h.weight": weights["gate_up"],
        f"{layer}.mlp.dense_4h_to_h.weight": weights["down"],
    }
    save_file(tensors, tmp_path / "model.safetensors")
    fields = {
        "padded_vocab_size": 5, "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 1, "num_attention_heads": 8,
        "multi_query_group_num": 2, "kv_channels": 4, "layernorm_epsilon": eps,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(CHATGLM | fields))
    lens = glmlens.load(tmp_path)
    kv = lens.new_kv()
    for tokens, expected in pairs:
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}  # id 0 is a token here, no padding
        _, acts = lens.run_with_cache(given, "ln_final.normalized", kv=kv)
        assert_close(acts["ln_final.normalized"], expected, rtol=0, atol=1e-6)


def test_the_real_config_of_glm_4_9b_chat_is_read(fixtures):
    folder = fixtures / "glm4-tokenizer"
    lens = glmlens.load(folder, device="meta")
    assert (lens.cfg.rope_theta, lens.cfg.rms_eps, lens.cfg.n_ctx) == (5e6, 1.5625e-07, 131072)
    assert (lens.cfg.n_kv_heads, lens.cfg.d_rotary, lens.cfg.qkv_bias) == (2, 64, True)
    assert sum(p.numel() for p in lens.model.parameters()) == 9_399_951_360
    from glmlens.loading.checkpoint import map_checkpoint_tensors

    there = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(there) - set(map_checkpoint_tensors(lens.model)) <= {"transformer.rotary_pos_emb.inv_freq"}
    assert set(map_checkpoint_tensors(lens.model)) <= set(there)


def test_a_chatglm_checkpoint_is_mapped_and_never_copied(tmp_path):
    write_checkpoint(tmp_path, 2, glm4=False, tie_word_embeddings=False, attention_bias=True)
    as_chatglm(tmp_path)
    lens = glmlens.load(tmp_path)
    with open("/proc/self/maps") as maps:
        file = str(tmp_path / "model.safetensors")
        mapped = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if line.split()[-1] == file]
    for p in lens.model.parameters():
        assert any(start <= p.data_ptr() and p.data_ptr() + p.nbytes <= end for start, end in mapped)


def write_llama(folder, kind, seed, **changes):
    """A random `llama` or `qwen2` checkpoint as transformers writes it."""
    import transformers

    make_config, make = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[kind]
    fields = {
        "vocab_size": 99, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": [1, 2, 4][seed % 3], "tie_word_embeddings": seed % 2 == 0, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": [1e4, 1e6][seed % 2]},
    }  # fmt: skip
    if kind == "llama" and seed % 3 == 0:
        fields["head_dim"] = 16  # not hidden_size / num_attention_heads
    torch.manual_seed(seed)
    model = make(make_config(**fields | changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_llama_family_is_a_glm(tmp_path, kind, seed):
    write_llama(tmp_path, kind, seed)
    lens = glmlens.load(tmp_path)
    assert lens.cfg.d_rotary == lens.cfg.d_head
    runs(lens, reference(tmp_path), seed, nearly)


def test_pairs_of_channels_of_a_llama_lie_side_by_side(tmp_path):
    """What is read at attn.q is transformers' own q, with channel c + d/2 beside channel c."""
    write_llama(tmp_path, "qwen2", 0)
    lens, theirs, seen = glmlens.load(tmp_path), reference(tmp_path), []
    theirs.model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, x, out: seen.append(out))
    with torch.no_grad():
        theirs(TOKENS)
    q = seen[0].unflatten(-1, (4, 2, 6)).transpose(-1, -2).flatten(-2)
    assert_close(lens.run_with_cache(TOKENS, "attn.q")[1]["attn.q", 1], q, rtol=0, atol=1e-5)


def test_old_llama_checkpoints_may_hold_their_frequencies(tmp_path):
    write_llama(tmp_path, "llama", 1)
    expected = glmlens.load(tmp_path)(TOKENS)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(glmlens.load(tmp_path)(TOKENS), expected)


@pytest.mark.parametrize("write", [lambda f: write_llama(f, "llama", 0), as_chatglm], ids=["llama", "chatglm"])
def test_shards_may_part_what_is_joined_and_fused(tmp_path, write):
    write_checkpoint(tmp_path, 2, glm4=False, tie_word_embeddings=False)
    write(tmp_path)
    expected = glmlens.load(tmp_path)(TOKENS)
    shard(tmp_path)
    assert torch.equal(glmlens.load(tmp_path)(TOKENS), expected)


@pytest.mark.parametrize("glm4", [False, True])
def test_a_model_without_a_head_says_its_normalised_stream(tmp_path, glm4):
    import transformers

    write_checkpoint(tmp_path, 2, glm4=glm4, tie_word_embeddings=False)
    base = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    base.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    lens = glmlens.load(tmp_path)
    assert "logits" not in [point.name for point in lens.points()]
    with torch.no_grad():
        assert torch.equal(lens(TOKENS), base(TOKENS).last_hidden_state)
    with pytest.raises(AttributeError, match="no unembedding"):
        lens.W_U  # noqa: B018
    for asked in (lambda: lens.generate(TOKENS), lambda: lens.loss(TOKENS), lambda: lens.log_probs(TOKENS)):
        with pytest.raises(ValueError, match="no head"):
            asked()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_llama_family_opens_without_a_head_and_with_one_of_classes(tmp_path, kind):
    import transformers

    write_llama(tmp_path, kind, 1)
    base = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    base.save_pretrained(tmp_path / "base")
    base.config.num_labels = 3
    classes = transformers.AutoModelForSequenceClassification.from_config(base.config).eval()
    classes.save_pretrained(tmp_path / "classes")
    with torch.no_grad():
        nearly(glmlens.load(tmp_path / "base")(TOKENS), base(TOKENS).last_hidden_state)
        nearly(glmlens.load(tmp_path / "classes").classify(TOKENS), classes(TOKENS).logits)


def test_a_tied_model_without_a_head_is_a_language_model(tmp_path):
    import transformers

    write_checkpoint(tmp_path, 2, tie_word_embeddings=True)
    expected = glmlens.load(tmp_path)(TOKENS)
    transformers.AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert torch.equal(glmlens.load(tmp_path)(TOKENS), expected)


@pytest.mark.parametrize("kind", ["glm", "chatglm", "llama"])
def test_tensors_are_read_one_at_a_time(tmp_path, monkeypatch, kind):
    """In another dtype, as on another device, no tensor of the file outlives its own conversion."""
    write_checkpoint(tmp_path, 2, glm4=False, tie_word_embeddings=False)
    if kind == "chatglm":
        as_chatglm(tmp_path)
    elif kind == "llama":
        write_llama(tmp_path, kind, 1)
    expected, handed = glmlens.load(tmp_path).to(dtype="float64"), []

    class File:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            assert all(x() is None for x in handed), name
            x = self.file.get_tensor(name)
            handed.append(weakref.ref(x))
            return x

    @contextmanager
    def watched(path):
        with open_weights(path) as file:
            yield File(file)

    open_weights = checkpoint.open_weights
    monkeypatch.setattr(checkpoint, "open_weights", watched)
    lens = glmlens.load(tmp_path, dtype="float64")
    assert len(handed) >= 10
    assert torch.equal(lens(TOKENS), expected(TOKENS))


REFUSED = [
    ("chatglm", {"position_encoding_2d": True, "multi_query_attention": None}, "the first ChatGLM-6B"),
    ("chatglm", {"pre_seq_len": 128}, "no prefix encoder"),
    ("chatglm", {"quantization_bit": 4}, "quantised"),
    ("chatglm", {"rmsnorm": False}, "RMSNorm"),
    ("chatglm", {"post_layer_norm": False}, "norm before its unembedding"),
    ("chatglm", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
    ("chatglm", {"add_bias_linear": True}, "biases on q, k and v only"),
    ("chatglm", {"multi_query_attention": False}, "multi_query_attention is False, expected True"),
    ("chatglm", {"fp32_residual_connection": True}, "fp32_residual_connection is True"),
    ("chatglm", {"multi_query_group_num": 3}, "not a multiple of multi_query_group_num 3"),
    ("chatglm", {"padded_vocab_size": None}, "padded_vocab_size is missing"),
    ("chatglm", {"num_layers": -1}, "num_layers is -1"),
    ("chatglm", {"rope_ratio": 0}, "rope_ratio is 0"),
    ("chatglm", {"architectures": ["ChatGLMForSequenceClassification"]}, "the language model only"),
    ("llama", {"attention_bias": True}, "a bias to the output of attention"),
    ("llama", {"mlp_bias": True}, "no biases"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; in this format it is always 1.0"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "every layer of a GLM has 'full_attention'"),
    ("chatglm", {"rope_ratio": 1e308}, "rope_ratio is 1e+308"),
    ("glm", {"model_type": ["glm"]}, "model_type is ['glm']"),
    ("glm", {"architectures": [5]}, "architectures is [5]"),
    ("glm", {"architectures": {"a": 1}}, "architectures is {'a': 1}"),
    ("glm", {"architectures": ["GlmForTokenClassification"], "id2label": {"1": "x"}}, "id2label"),
    ("glm", {"architectures": ["GlmForTokenClassification"], "num_labels": 1 << 40}, "num_labels is 1099511627776"),
    ("glm", {"architectures": ["GlmForTokenClassification"], "problem_type": "x"}, "problem_type is 'x'"),
]


@pytest.mark.parametrize(("kind", "fields", "told"), REFUSED, ids=[f"{k} {next(iter(f))}" for k, f, _ in REFUSED])
def test_what_no_glm_can_be_is_one_clear_error(tmp_path, kind, fields, told):
    write_checkpoint(tmp_path, 2, glm4=False, tie_word_embeddings=False)
    if kind == "chatglm":
        as_chatglm(tmp_path)
    elif kind != "glm":
        write_llama(tmp_path, kind, 0)
    rewrite_json(tmp_path / "config.json", **fields)
    with pytest.raises(CheckpointError) as error:
        glmlens.load(tmp_path)
    assert told in str(error.value)
    assert "config.json" in str(error.value)


# The conversions of GLM-4-9B-chat that lost its theta.


@pytest.mark.parametrize(("context", "right"), [(131072, "5e6"), (1048576, "1e8")])
def test_a_theta_that_a_conversion_lost_is_obeyed_with_a_warning_that_says_what_to_pass(tmp_path, context, right):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    write_checkpoint(tmp_path, 2, glm4=False, max_position_embeddings=context, rope_parameters=rope)
    with pytest.warns(UserWarning, match=f"load\\(..., rope_theta={right}\\)") as said:
        lens = glmlens.load(tmp_path)
    assert len(said) == 1
    assert lens.cfg.rope_theta == 1e4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen, kept = glmlens.load(tmp_path, rope_theta=float(right)), glmlens.load(tmp_path, rope_theta=1e4)
    assert chosen.cfg.rope_theta == float(right)
    assert torch.equal(kept(TOKENS), lens(TOKENS))
    rewrite_json(tmp_path / "config.json", rope_parameters=rope | {"rope_theta": float(right)})
    assert torch.equal(glmlens.load(tmp_path)(TOKENS), chosen(TOKENS))
    with pytest.raises(CheckpointError, match="rope_theta is -1"):
        glmlens.load(tmp_path, rope_theta=-1)


def test_the_warning_points_at_the_call(tmp_path):
    write_checkpoint(tmp_path, 2, glm4=False, max_position_embeddings=131072, rope_parameters={"rope_theta": 1e4})
    code = f"import glmlens\nfor _ in range(2): glmlens.load({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("<string>:2: UserWarning: ")
    assert done.stderr.count("UserWarning") == 1


def test_no_other_checkpoint_is_suspected(tmp_path):
    for kind, fields in {"glm4": {"max_position_embeddings": 131072}, "glm": {"max_position_embeddings": 8192}}.items():
        write_checkpoint(tmp_path, 2, glm4=kind == "glm4", **fields)
        glmlens.load(tmp_path)  # a warning would be an error here


def test_every_format_and_head_passes_the_checks_of_a_glm(every_lens):
    found = analysis.selfcheck(every_lens)
    assert all(row.holds for row in found.rows)
    assert len(found.rows) == (14 if every_lens.cfg.d_logits else 9)


def test_heads_are_scored_with_every_head(every_lens):
    found = analysis.head_scores(every_lens)
    assert np.isnan(found.copying.values).all() == (every_lens.cfg.head != "vocab")
    assert not np.isnan(found.induction.values).any()
    assert "induction" in repr(found)


def test_what_reads_logits_says_that_there_are_none():
    lens = small_lens(**HEADED["none"])
    for asked in (lambda: analysis.logit_lens(lens, TOKENS), lambda: analysis.logit_attribution(lens, TOKENS, 1)):
        with pytest.raises(ValueError, match="unembedding"):
            asked()


def test_every_format_has_a_table_and_a_reading():
    from glmlens import config
    from glmlens.loading import formats

    assert formats.WEIGHT_FORMATS.keys() == config.CONFIG_FORMATS.keys()
    for kind in formats.WEIGHT_FORMATS:
        assert small_config(kind).model_type == kind
