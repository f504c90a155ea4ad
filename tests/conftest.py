"""Small GLMs with random weights, checkpoints that transformers writes, and real data where it lies beside us."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glmlens
from glmlens.config import CHATGLM_FIELD_NAMES
from glmlens.model import GLM

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: threads would only wait for each other
    torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=500, help="how many broken checkpoints and saved files to load")


LONGEST = (  # the files that take longest begin: a core that gets one of them at the end would finish alone
    *("patch_real_model", "notebooks_in_jupyterlab", "real_model", "runs_in_jupyterlab", "widgets_in_jupyterlab"),
    *("card", "fuzz", "harvest", "demo", "cli", "compile", "tutorials", "loading", "long_prompts"),
)


def pytest_collection_modifyitems(items):
    files = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: files.index(item.path.name) if item.path.name in files else len(files))
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def small_config(model_type="glm", **changes):
    raw = {
        "model_type": model_type,
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }
    if model_type in ("llama", "qwen2"):
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    raw |= changes
    if model_type == "chatglm":
        raw = {CHATGLM_FIELD_NAMES.get(name, name): value for name, value in raw.items() if name != "rope_parameters"}
        raw |= {"multi_query_attention": True, "add_qkv_bias": True}
    return glmlens.GLMConfig.from_dict(raw)


def small_lens(model_type="glm", attention="eager", dtype=torch.float32, seed=0, **changes):
    """A GLM with random weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = GLM(small_config(model_type, **changes), attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1) + (1.0 if "ln" in name else 0.0))
    return glmlens.Lens(model.to(dtype))


@pytest.fixture(params=["glm", "glm4"])
def lens(request):
    return small_lens(request.param)


@pytest.fixture(params=[("glm", "eager"), ("glm4", "eager"), ("glm", "sdpa"), ("glm4", "sdpa")], ids="-".join)
def any_lens(request):
    return small_lens(*request.param)


HEADED = {
    "sequence": {"architectures": ["GlmForSequenceClassification"], "id2label": {"0": "bad", "1": "so", "2": "good"}},
    "token": {"architectures": ["GlmForTokenClassification"], "id2label": {"0": "bad", "1": "so", "2": "good"}},
    "none": {"architectures": ["GlmModel"]},
}
STRETCHED = {
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}  # fmt: skip
KINDS = HEADED | STRETCHED
ARCHITECTURES = ["glm", "glm4", "chatglm", "llama", "qwen2", *KINDS]


def lens_of(architecture, attention="eager"):
    return small_lens("glm" if architecture in KINDS else architecture, attention, **KINDS.get(architecture, {}))


@pytest.fixture(params=ARCHITECTURES)
def every_lens(request):
    """A lens of every format, and a GLM with every other head and by every rule of slower turning."""
    return lens_of(request.param)


@pytest.fixture(params=[(a, b) for a in ARCHITECTURES for b in ("eager", "sdpa")], ids="-".join)
def every_lens_by_both_paths(request):
    return lens_of(*request.param)


@pytest.fixture
def tokens():
    return torch.randint(2, 101, (2, 9), generator=torch.Generator().manual_seed(1))


def write_checkpoint(folder, seed, dtype=torch.float32, **changes):
    """A random checkpoint as transformers writes it, of a shape drawn from `seed`; its config."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    draw = random.Random(seed)
    heads = draw.choice([2, 4, 6])
    fields = {
        "vocab_size": draw.choice([99, 130, 257]),
        "hidden_size": draw.choice([32, 48, 64, 80]),
        "intermediate_size": draw.choice([37, 64, 96]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2, heads]),
        "head_dim": draw.choice([8, 16, 32, 64]),
        "attention_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": draw.choice([1e-5, 1.5625e-7]),
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "eos_token_id": [1],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": draw.choice([1e4, 5e6]),
            "partial_rotary_factor": draw.choice([0.25, 0.5, 1.0]),
        },
    }
    glm4 = changes.pop("glm4", seed % 2 == 1)
    make_config = transformers.Glm4Config if glm4 else transformers.GlmConfig
    make = transformers.Glm4ForCausalLM if glm4 else transformers.GlmForCausalLM
    torch.manual_seed(seed)
    model = make(make_config(**fields | changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return model.config


def reference(folder, attention="eager", dtype="auto"):
    """transformers' own reading of a checkpoint."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype).eval()


def padded_prompts(d_vocab, seed, start=0):
    """Random prompts of several shapes, padded on the left: tokens, their mask, and positions counted from `start`."""
    draw = torch.Generator().manual_seed(seed)
    for batch, pos in [(1, 1), (1, 7), (2, 13), (3, 33)]:
        tokens = torch.randint(0, d_vocab, (batch, pos), generator=draw)
        mask = torch.ones_like(tokens)
        for row in range(1, batch):
            mask[row, : int(torch.randint(0, pos - 1, (), generator=draw))] = 0
        yield tokens, mask, (mask.cumsum(1) - 1).clamp(min=0) + start


@pytest.fixture
def checkpoint_folder(tmp_path):
    write_checkpoint(tmp_path, 3)
    return tmp_path


@pytest.fixture(scope="session")
def real_model():
    """The folder of a real 135M language model in GLM form, made once and kept in the user's cache."""
    tool = SHARED / "tools" / "real_model"
    if not tool.exists():
        pytest.skip("the tool that makes the real model is not here")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "glmlens-tests" / "smollm2-135m-bfloat16"
    if not (cache / "PROVENANCE.json").exists():
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        made = subprocess.run(
            ["bash", str(tool), str(cache)],
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"the real model could not be made: {made.stderr[-300:]}")
    return cache


@pytest.fixture(scope="session")
def lab():
    """One JupyterLab in a browser for all tests, each with a cell of its own."""
    from lab import Lab, missing

    if missing():
        pytest.skip(f"no {missing()} here")
    lab = Lab()
    yield lab
    lab.close()


@pytest.fixture
def fixtures():
    folder = SHARED / "fixtures"
    if not folder.exists():
        pytest.skip("the recorded data is not here")
    return folder


@pytest.fixture(scope="session")
def templates():
    """The chat templates of published GLMs, by name, where a page that quotes them lies beside us."""
    page = next(SHARED.glob("*/glm.md"), None)
    if page is None:
        pytest.skip("the published chat templates are not here")
    found = re.findall(r"\*\*([^*\n]+)\*\*[^\n]*\n```jinja\n(.*?)\n```", page.read_text(encoding="utf-8"), re.S)
    return {name.split()[0]: template for name, template in found}


def rewrite_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
