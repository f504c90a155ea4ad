"""Loading: exactly the file, as views of it, or one clear error."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import reference, rewrite_json, small_lens, write_checkpoint
from safetensors.torch import load_file, save_file

import glmlens
from glmlens import analysis, only, patch
from glmlens.config import CheckpointError
from glmlens.hook_points import HookError


def shard(folder, parts=3):
    """Rewrite a checkpoint as shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({name: tensors[name].clone() for name in names[i::parts]}, folder / file)
        weight_map |= dict.fromkeys(names[i::parts], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


TOKENS = torch.arange(2, 14)[None]


@pytest.mark.parametrize("seed", [2, 3])
def test_one_file_and_shards_are_the_same_model(tmp_path, seed):
    write_checkpoint(tmp_path, seed)
    expected = glmlens.load(tmp_path)(TOKENS)
    shard(tmp_path)
    assert torch.equal(glmlens.load(tmp_path)(TOKENS), expected)


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_parameters_are_views_of_the_file(tmp_path, seed):
    write_checkpoint(tmp_path, seed)
    lens = glmlens.load(tmp_path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    file = str(tmp_path / "model.safetensors")
    mapped = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1] == file]
    for p in lens.model.parameters():
        assert any(start <= p.data_ptr() and p.data_ptr() + p.nbytes <= end for start, end in mapped)
    before = (tmp_path / "model.safetensors").read_bytes()
    lens.W_Q[0].add_(1)  # mapped privately: an edit never reaches the file
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_stacked_weights_are_views_by_name(tmp_path):
    write_checkpoint(
        tmp_path, 2, num_hidden_layers=2, attention_bias=True, num_attention_heads=4, num_key_value_heads=2
    )
    lens, c = glmlens.load(tmp_path), glmlens.load(tmp_path).cfg
    shapes = {
        "W_Q": (2, 4, c.d_model, c.d_head), "W_K": (2, 2, c.d_model, c.d_head), "W_V": (2, 2, c.d_model, c.d_head),
        "W_O": (2, 4, c.d_head, c.d_model), "b_Q": (2, 4, c.d_head), "b_K": (2, 2, c.d_head), "b_V": (2, 2, c.d_head),
        "W_gate": (2, c.d_model, c.d_mlp), "W_up": (2, c.d_model, c.d_mlp), "W_down": (2, c.d_mlp, c.d_model),
    }  # fmt: skip
    parameters = {p.untyped_storage().data_ptr() for p in lens.model.parameters()}
    for name, shape in shapes.items():
        stacked = getattr(lens, name)
        assert stacked.shape == shape == tuple(stacked.stack().shape)
        assert stacked[1].untyped_storage().data_ptr() in parameters
        assert torch.equal(stacked[-1], stacked.stack()[-1])
        with pytest.raises(TypeError, match="stack"):
            stacked[:]
    assert lens.W_Q[1, 3].shape == (c.d_model, c.d_head)
    x = torch.randn(5, c.d_model)
    _, acts = lens.run_with_cache(TOKENS, ["ln1.normalized", "attn.q", "attn.z", "attn.result", "mlp.post", "mlp.up"])
    x = acts["ln1.normalized", 1]
    torch.testing.assert_close(x @ lens.W_Q[1, 3] + lens.b_Q[1, 3], acts["attn.q", 1][:, :, 3])
    torch.testing.assert_close(acts["attn.z", 1][:, :, 2] @ lens.W_O[1, 2], acts["attn.result", 1][:, :, 2])
    assert lens.W_E.shape == (c.d_vocab, c.d_model)
    assert lens.W_U.shape == (c.d_model, c.d_vocab)
    write_checkpoint(tmp_path, 2, attention_bias=False)
    with pytest.raises(AttributeError, match="no biases"):
        glmlens.load(tmp_path).b_Q  # noqa: B018


def test_dtype_and_device_are_names_or_torch_objects(checkpoint_folder):
    for dtype in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        assert glmlens.load(checkpoint_folder, dtype=dtype).dtype == torch.bfloat16
    assert glmlens.load(checkpoint_folder, device=torch.device("cpu")).device.type == "cpu"
    there = glmlens.load(checkpoint_folder, device="meta")
    assert there.device.type == "meta"
    assert there(TOKENS).is_meta
    with pytest.raises(CheckpointError, match="expected one of float64, float32"):
        glmlens.load(checkpoint_folder, dtype="float33")
    with pytest.raises(ValueError, match="choose from 'eager', 'sdpa'"):
        glmlens.load(checkpoint_folder, attention="flash")


def test_a_cast_model_equals_one_that_transformers_casts_while_loading(tmp_path):
    write_checkpoint(tmp_path, 5)
    ours, theirs = glmlens.load(tmp_path, dtype="bfloat16"), reference(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(ours(TOKENS), theirs(TOKENS).logits)


def test_a_lens_moves(checkpoint_folder):
    lens = glmlens.load(checkpoint_folder)
    expected = lens(TOKENS)
    assert lens.to("cpu") is lens
    assert torch.equal(lens(TOKENS), expected)
    lens.to(dtype=torch.float64)
    assert lens(TOKENS).dtype == torch.float64
    assert lens.to("meta").device.type == "meta"


ROPES = [
    ({"rope_theta": 5e6}, 5e6, 8),
    ({"rope_theta": 5e6, "partial_rotary_factor": 1.0}, 5e6, 16),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25}}, 2e4, 4),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, 2e4, 8),
    ({"rope_theta": 5e6, "partial_rotary_factor": 1.0, "rope_parameters": {"rope_theta": 3e4}}, 3e4, 16),
    ({"rope_parameters": {"rope_theta": 3e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0}, 3e4, 8),
    ({"rope_theta": 5e6, "rope_scaling": None}, 5e6, 8),
    ({"rope_theta": 5e6, "partial_rotary_factor": None}, 5e6, 16),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "partial_rotary_factor": None}, 2e4, 16),
    ({"rope_parameters": {"rope_theta": 2e4, "partial_rotary_factor": 0.25}, "partial_rotary_factor": None}, 2e4, 4),
    ({}, 1e4, 8),
]


@pytest.mark.parametrize("glm4", [False, True], ids=["glm", "glm4"])
@pytest.mark.parametrize(("fields", "theta", "rotated"), ROPES)
def test_rope_fields_in_both_spellings_and_nested_wins(tmp_path, fields, theta, rotated, glm4):
    """The same reading as transformers', checked by logits."""
    write_checkpoint(tmp_path, 2, head_dim=16, num_hidden_layers=2, glm4=glm4)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "rope_theta", "partial_rotary_factor"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    lens = glmlens.load(tmp_path)
    assert (lens.cfg.rope_theta, lens.cfg.d_rotary) == (theta, rotated)
    with torch.no_grad():
        assert torch.equal(lens(TOKENS), reference(tmp_path)(TOKENS).logits)


def test_dtype_is_read_in_both_spellings(tmp_path):
    write_checkpoint(tmp_path, 2, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        plain = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
        (tmp_path / "config.json").write_text(json.dumps(plain | {name: "bfloat16"}))
        assert glmlens.load(tmp_path).dtype == torch.bfloat16
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert glmlens.load(tmp_path).dtype == torch.bfloat16


def broken(folder, tensors, **changed):
    kept = {name: x for name, x in (tensors | changed).items() if x is not None}
    save_file({name: x.contiguous() for name, x in kept.items()}, folder / "model.safetensors")


def wrong(case, folder):
    """Break a checkpoint in one way; what the error must say."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    tensors = load_file(file)
    k = "model.layers.0.self_attn.k_proj.weight"
    if case == "unknown tensor":
        broken(folder, tensors, **{"model.layers.0.extra": torch.zeros(3)})
        return ["model.safetensors", "'model.layers.0.extra'", "no place"]
    if case == "layer too many":
        broken(folder, tensors, **{"model.layers.9.mlp.down_proj.weight": torch.zeros(3)})
        return ["'model.layers.9.mlp.down_proj.weight'", "no place"]
    if case == "missing tensor":
        broken(folder, tensors, **{k: None})
        return ["model.safetensors", repr(k), "not found"]
    if case == "wrong shape":
        broken(folder, tensors, **{k: tensors[k][:-1].clone()})
        return ["model.safetensors", repr(k), str(tuple(tensors[k].shape)), str(tuple(tensors[k][:-1].shape))]
    if case == "quantised tensor":
        broken(folder, tensors, **{k: tensors[k].to(torch.int8)})
        return [repr(k), "I8", "quantised"]
    if case == "quantised config":
        rewrite_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
        return ["config.json", "quantised"]
    if case == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return ["model.safetensors", "not a whole safetensors file"]
    if case == "empty":
        file.write_bytes(b"")
        return ["model.safetensors", "not a whole safetensors file"]
    if case == "no weights":
        file.rename(folder / "pytorch_model.bin")
        return ["found neither", "pytorch_model.bin", "never pickle"]
    if case == "missing shard":
        gone = sorted(set(shard(folder).values()))[1]
        (folder / gone).unlink()
        return ["index.json", gone, "does not exist"]
    if case == "shard outside":
        shard(folder)
        stated = json.loads(index.read_text())
        stated["weight_map"][k] = "../" + stated["weight_map"][k]
        index.write_text(json.dumps(stated))
        return ["index.json", "'../model-", "not a file of this folder"]
    if case == "shard elsewhere":
        shard(folder)
        stated = json.loads(index.read_text())
        stated["weight_map"][k] = "/etc/model.safetensors"
        index.write_text(json.dumps(stated))
        return ["index.json", "/etc/model.safetensors", "not a file of this folder"]
    if case == "index is wrong":
        shard(folder)
        stated = json.loads(index.read_text())
        files = sorted(set(stated["weight_map"].values()))
        stated["weight_map"][k] = next(f for f in files if f != stated["weight_map"][k])
        index.write_text(json.dumps(stated))
        return [repr(k), "expected here by the index"]
    if case == "tensor in two shards":
        stated = shard(folder)
        other = folder / next(f for f in sorted(set(stated.values())) if f != stated[k])
        save_file(load_file(other) | {k: tensors[k].clone()}, other)
        return [repr(k), "is here too"]
    if case == "rope is no object":
        rewrite_json(folder / "config.json", rope_parameters="x")
        return ["config.json", "rope_parameters is 'x'"]
    if case == "rotary factor":
        rewrite_json(folder / "config.json", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": None})
        return ["config.json", "partial_rotary_factor is null"]
    if case == "stop ids":
        rewrite_json(folder / "config.json", eos_token_id="ab")
        return ["config.json", "eos_token_id is 'ab'"]
    if case == "generation config":
        (folder / "generation_config.json").write_text('{"pad_token_id": 1.5}')
        return ["generation_config.json", "pad_token_id is 1.5"]
    if case == "tokenizer config":
        (folder / "tokenizer_config.json").write_text("[]")
        return ["tokenizer_config.json", "expected an object"]
    if case == "huge":
        rewrite_json(folder / "config.json", vocab_size=10**30)
        return ["config.json", "vocab_size is 1000"]
    if case == "index without a map":
        file.unlink()
        index.write_text("{}")
        return ["index.json", "weight_map"]
    if case == "model_type":
        rewrite_json(folder / "config.json", model_type="mamba")
        return ["config.json", "'mamba'", "'glm'", "'qwen2'"]
    if case == "rope_type":
        rewrite_json(folder / "config.json", rope_parameters={"rope_type": "longrope", "factor": 4.0})
        return ["config.json", "'longrope'", "'default', 'linear', 'llama3', 'yarn'"]
    if case == "hidden_act":
        rewrite_json(folder / "config.json", hidden_act="gelu")
        return ["config.json", "'gelu'"]
    if case == "size":
        rewrite_json(folder / "config.json", hidden_size=-4)
        return ["config.json", "hidden_size is -4"]
    if case == "not json":
        (folder / "config.json").write_text("{")
        return ["config.json", "JSON"]
    if case == "no config":
        (folder / "config.json").unlink()
        return ["config.json", "not found"]
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        "unknown tensor", "layer too many", "missing tensor", "wrong shape", "quantised tensor", "quantised config",
        "truncated", "empty", "no weights", "missing shard", "shard outside", "shard elsewhere", "index is wrong",
        "tensor in two shards", "rope is no object", "rotary factor", "stop ids", "generation config",
        "tokenizer config", "huge",
        "index without a map", "model_type", "rope_type", "hidden_act", "size", "not json", "no config",
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_one_clear_error(checkpoint_folder, case):
    told = wrong(case, checkpoint_folder)
    with pytest.raises(CheckpointError) as error:
        glmlens.load(checkpoint_folder)
    for part in told:
        assert part in str(error.value)


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_contradict_it(tmp_path):
    write_checkpoint(tmp_path, 2, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = glmlens.load(tmp_path)(TOKENS)
    broken(tmp_path, tensors, **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert torch.equal(glmlens.load(tmp_path)(TOKENS), expected)
    broken(tmp_path, tensors, **{"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        glmlens.load(tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_is_named_when_it_is_first_heard_of(tmp_path, bad):
    write_checkpoint(tmp_path, 2)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 2] = bad
    broken(tmp_path, tensors)
    lens = glmlens.load(tmp_path)
    told = r"blocks\.0\.mlp\.down\.weight: 1 of its .* numbers are nan or infinite"
    for ask in (lens, lens.generate, lens.run_with_cache, lambda t: lens.generate(t, temperature=1.0)):
        with pytest.raises(CheckpointError, match=told):
            ask(TOKENS)


def test_a_weight_beyond_float16_is_not_blamed_on_the_file(tmp_path):
    write_checkpoint(tmp_path, 2)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 2] = 70_000.0
    broken(tmp_path, tensors)
    with pytest.raises(
        CheckpointError, match=r"down_proj.weight': 1 of its .* numbers are beyond 65,504, where float16"
    ):
        glmlens.load(tmp_path, dtype="float16")
    lens = glmlens.load(tmp_path)
    assert lens(TOKENS).isfinite().all()
    with pytest.raises(
        CheckpointError, match=r"down\.weight: 1 of its .* float16 ends at 65,504: load with dtype='bfl"
    ):
        lens.to(dtype="float16").generate(TOKENS)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 0}])
def test_a_generation_does_not_go_on_from_nan(sampling):
    lens = small_lens(dtype=torch.float16)
    lens.model.blocks[1].mlp.down.weight.fill_(60_000)
    told = "the logits are nan.*a sum went beyond 65,504, where float16 ends: load with dtype='bfloat16'"
    with pytest.raises(HookError, match=told) as error:
        lens.generate(TOKENS, 5, **sampling)
    assert torch.equal(error.value.run.tokens, TOKENS)
    lens = small_lens()
    broken_at_2 = only(lambda x, point: x * torch.nan, steps=2)
    with pytest.raises(HookError, match="a hook made them so") as error:
        lens.generate(TOKENS, 5, hooks={"blocks.0.mlp_out": broken_at_2}, stop_ids=(), **sampling)
    assert error.value.run.new_tokens.shape == (1, 2)  # what was said before it is kept
    with pytest.raises(HookError, match="the logits are nan"):
        list(lens.stream(TOKENS, 5, hooks={"blocks.0.mlp_out": broken_at_2}, stop_ids=(), **sampling))


def test_an_edit_that_makes_weights_no_numbers_is_heard_of_also_after_an_overflow():
    lens = small_lens()
    lens.run_with_hooks(TOKENS, {"blocks.0.resid_pre": lambda x, point: x * torch.nan})
    lens(TOKENS)
    lens.model.blocks[1].mlp.down.weight[3, 2] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.down\.weight: 1 of its"):
        lens(TOKENS)


@pytest.mark.parametrize(
    "ask",
    [
        lambda lens: lens.run_with_cache(TOKENS, "blocks.2.attn.pattern", logits=False),
        lambda lens: lens.run_with_cache(TOKENS, "resid_post", gradients_of=lambda logits: logits[:, -1, 3]),
        lambda lens: lens.loss(TOKENS),
        lambda lens: patch.sweep(lens, TOKENS, TOKENS.flip(1), "resid_pre", over=("layer",), metric=(3, 6)),
        lambda lens: patch.run_with_interventions(
            lens, TOKENS, patch.Intervention(patch.Site("attn.z", layer=0), patch.Zero())
        ),
        lambda lens: patch.attribution_patch(lens, TOKENS, TOKENS.flip(1), "resid_pre", over=("layer",), metric=(3, 6)),
        lambda lens: analysis.distance_profile(lens, TOKENS),
        lambda lens: analysis.logit_lens(lens, TOKENS),
        lambda lens: analysis.score_parts(lens, TOKENS, 2, 0),
    ],
    ids=["recording", "gradients", "loss", "sweep", "run", "attribution", "profile", "logit lens", "score parts"],
)
def test_every_instrument_hears_of_a_weight_that_is_no_number(ask):
    lens = small_lens()
    lens.model.blocks[1].mlp.down.weight[3, 2] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.down\.weight: 1 of its"):
        ask(lens)


def test_a_sweep_hears_of_an_unembedding_that_is_no_number():
    lens = small_lens()
    lens.model.unembed.weight[3, 2] = torch.nan
    with pytest.raises(CheckpointError, match=r"unembed\.weight: 1 of its"):
        patch.sweep(lens, TOKENS, TOKENS.flip(1), "resid_pre", over=("layer",), metric=(3, 6))


def test_weights_that_are_no_numbers_have_no_eigenvalues():
    """In a process of its own: LAPACK can end it."""
    code = """
import torch
from conftest import small_lens
from glmlens import analysis
lens = small_lens()
lens.model.unembed.weight[3, 2] = torch.nan
for ask in (lambda: analysis.copying_scores(lens), lambda: analysis.head_scores(lens)):
    try:
        ask()
    except ValueError as e:
        print(e)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nan or infinite") == 2


def test_logits_that_a_hook_makes_no_numbers_are_what_was_asked_for(checkpoint_folder):
    lens = glmlens.load(checkpoint_folder)
    logits = lens.run_with_hooks(TOKENS, {"blocks.0.resid_pre": lambda x, point: x * torch.nan})
    assert logits.isnan().all()
    assert lens(TOKENS).isfinite().all()


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_an_error(name):
    with pytest.raises(CheckpointError, match="no such folder"):
        glmlens.load(name)


HUB = """
import glmlens, math, torch
lens = glmlens.load("some-org/some-glm")
print(math.fsum(lens(torch.arange(2, 14)[None]).flatten().tolist()))
try:
    glmlens.load("some-org/another")
except glmlens.CheckpointError as e:
    print(e)
"""


def test_a_hub_id_opens_from_the_hub_cache(tmp_path):
    """A folder laid out as huggingface_hub lays out its cache, blobs and symbolic links, with no network."""
    repo, commit = tmp_path / "models--some-org--some-glm", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    write_checkpoint(snapshot, 2)
    expected = math.fsum(glmlens.load(snapshot)(TOKENS).flatten().tolist())
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repo / "blobs" / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert float(lines[0]) == expected
    assert lines[1].startswith("some-org/another: neither a folder here nor available from the hub")


# The high-water mark of the process itself: ru_maxrss would also remember the one that started it.
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"


def peak(code):
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured on Linux")
    done = subprocess.run([sys.executable, "-c", f"{code}\n{PEAK}"], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.weights
def test_loading_maps_the_file_and_copies_nothing(real_model):
    base = peak("import torch")
    file = (real_model / "model.safetensors").stat().st_size
    used = peak(f"import glmlens, torch; glmlens.load({str(real_model)!r})(torch.arange(16)[None])")
    assert used < 1.15 * (file + base)


def test_the_full_9b_is_checked_in_seconds_and_little_memory():
    code = """
import glmlens, json, pathlib, tempfile, torch
raw = {"model_type": "glm", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
       "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
       "dtype": "bfloat16"}
with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(raw))
    lens = glmlens.load(folder, device="meta")
check = lens.check(torch.arange(1024)[None], names="all", hooks={"blocks.*.attn.z": lambda x, point: x * 0})
assert sum(p.numel() for p in lens.model.parameters()) == 9_399_951_360
assert len(check.fires[0][1]) == 40
assert 13e9 < check.points.bytes < 14e9
assert check.bytes < 0.4 * check.points.bytes
"""
    assert peak(code) < 1e9


def sized(*options):
    """What `python -m benchmarks.size` measures of a small copy of GLM-4-9B's shapes."""
    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "size.py").exists() or not Path("/proc/self/status").exists():
        pytest.skip("the benchmark is not here, or memory cannot be measured")
    command = [sys.executable, "-m", "benchmarks.size", "--tokens", "8", "--threads", "1", *options]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_logits_of_a_batch_copy_no_weight(keep):
    """PyTorch copies the unembedding for every row whose last positions are apart in memory, in bfloat16 on a CPU."""
    code = """
import glmlens, torch
from glmlens.model import Unembed
cfg = glmlens.GLMConfig.from_dict({"model_type": "glm", "vocab_size": 200_000, "hidden_size": 64,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16,
    "num_key_value_heads": 1})
W_U = Unembed(cfg).to(torch.bfloat16).requires_grad_(False)
x = torch.randn(8, 5, 64, dtype=torch.bfloat16)
"""
    without = peak(code + f"W_U(x[:, :{keep}].contiguous())")
    with_gap = peak(code + f"W_U(x[:, -{keep}:])")
    weight, logits = 200_000 * 64 * 2, 8 * keep * 200_000 * 2
    assert (
        with_gap - without < logits + 0.5 * weight
    )  # the logits a second time, and of eight copies of the weight none


def test_a_model_in_shards_is_run_within_the_memory_of_its_weights():
    """Beside what the same process takes with a model of nothing."""
    nothing, found = sized("--scale", "16", "--depth", "1"), sized("--scale", "4", "--depth", "3", "--shard", "0.1")
    assert found["weights"] > 10 * nothing["weights"]
    assert found["generate"]["peak"] - nothing["generate"]["peak"] < 1.1 * found["weights"]
    assert found["generate"]["own"] - nothing["generate"]["own"] < 0.2 * found["weights"]  # of the file, no copy
    assert found["load"]["peak"] - found["import"]["peak"] < 0.1 * found["weights"]  # pages come when they are read
