"""Checks of the exercises of tutorial 10, your own checkpoint."""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from glmlens.config import GLMConfig
from glmlens.course.feedback import demand, exercise, load_lens, to_number
from glmlens.lens import Lens
from glmlens.lens.forward import PointNames
from glmlens.loading.checkpoint import build_meta_model
from glmlens.recording.activations import NotRecordedError

GLM_4_9B = {
    "model_type": "glm", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip


@cache
def build_large_lens() -> Lens:
    """Return a lens on GLM-4-9B without weights: shapes and sizes only."""
    return Lens(build_meta_model(GLMConfig.from_dict(GLM_4_9B), "eager", torch.bfloat16))


@exercise("a function of cfg, weights, memory and size")
def exercise_10_1(longest: Callable[[GLMConfig, int, int, int], int | float]) -> str:
    for lens, size, memory in (
        (load_lens(), 4, 10**9),
        (build_large_lens(), 2, 24 * 10**9),
        (build_large_lens(), 2, 16 * 10**9),
    ):
        weights = sum(p.nbytes for p in lens.model.parameters())
        entry = lens.new_kv(1, 1)
        free = max(0, memory - weights)
        n_groups = lens.cfg.n_groups
        right = free // (entry.keys.nbytes + entry.values.nbytes)
        value = to_number(longest(lens.cfg, weights, memory, size))
        result = f"of {memory / 1e9:g} GB the weights take {weights / 1e9:.3g} GB: {value:,.0f} tokens"
        demand(value >= 0, f"{result}: when the weights do not fit, it is 0")
        # Query heads counted in place of KV heads give too few tokens, by the factor n_groups.
        demand(abs(value * n_groups - right) > n_groups or not right, f"{result}: which heads have cache entries?")
        other = "more fit" if value < right else "fewer fit"
        demand(abs(value - right) <= 1, f"{result}; {other}. What else takes memory, and how large is one entry?")
    return "126,955 tokens of GLM-4-9B on a card of 24 GB, none on one of 16 GB"


@exercise("a number of tokens")
def exercise_10_2(tokens: int | float) -> str:
    cfg = build_large_lens().cfg
    value = to_number(tokens)
    weights = sum(p.nbytes for p in build_large_lens().model.parameters())
    right = math.sqrt(weights / (2 * cfg.n_layers * cfg.n_heads))
    prompt = torch.zeros(1, max(1, round(value)), dtype=torch.long)
    size = build_large_lens().check(prompt, "attn.pattern").bytes
    result = f"at {value:,.0f} tokens the patterns take {size / 1e9:.3g} GB, the weights {weights / 1e9:.1f} GB"
    demand(abs(value - right) < 0.01 * right, result)
    return result


@exercise("names, or a list of them")
def exercise_10_3(names: PointNames) -> str:
    size = build_large_lens().check(torch.zeros(1, 1024, dtype=torch.long), names).bytes
    _, acts = load_lens().run_with_cache("Mary went to the", names)
    try:
        derived = acts["attn.result"]
    except NotRecordedError:
        derived = None
    demand(derived is not None, "attn.result cannot be derived from these: from what would you compute it by hand?")
    demand(size <= 0.5e9, f"it can be derived from these, but they take {size / 1e9:.1f} GB")
    return f"{size / 1e9:.2f} GB, and attn.result can be derived from them, up to rounding"


@exercise("a function of a folder and candidates")
def exercise_10_4(find_theta: Callable[[Path, Sequence[float]], float]) -> str:
    with tempfile.TemporaryDirectory() as name:
        # A checkpoint whose config.json has a wrong rope_theta.
        folder = load_lens().save(Path(name) / "lost")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e6}), encoding="utf-8")
        value = to_number(find_theta(folder, [5e6, 500.0, 10_000.0]))
    demand(value != 5e6, "this is the value in its config.json; it was not trained with it")
    demand(value == 10_000.0, f"it was not trained with {value:,.0f}: measure something that depends on positions")
    return f"trained with {value:,.0f}"
