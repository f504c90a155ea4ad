"""Checks of tutorial 10, your own checkpoint."""

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
    """GLM-4-9B without its numbers."""
    return Lens(build_meta_model(GLMConfig.from_dict(GLM_4_9B), "eager", torch.bfloat16))


@exercise("a function of cfg, weights, memory and size")
def exercise_10_1(longest: Callable[[GLMConfig, int, int, int], int | float]) -> str:
    said = ""
    for one, size, memory in (
        (load_lens(), 4, 10**9),
        (build_large_lens(), 2, 24 * 10**9),
        (build_large_lens(), 2, 16 * 10**9),
    ):
        weights, token = sum(p.nbytes for p in one.model.parameters()), one.new_kv(1, 1)
        room, c = max(0, memory - weights), one.cfg
        right, found = room // (token.keys.nbytes + token.values.nbytes), to_number(longest(c, weights, memory, size))
        said = f"of {memory / 1e9:g} GB the weights take {weights / 1e9:.3g}: {found:,.0f} tokens"
        demand(found >= 0, f"{said}? There is room for none")
        demand(abs(found * c.n_groups - right) > c.n_groups or not right, f"{said}: which heads are remembered?")
        other = f"it is {'more' if found < right else 'fewer'}"
        demand(abs(found - right) <= 1, f"{said}; {other}. What stands beside the cache, and what is an entry?")
    return "126,955 tokens of GLM-4-9B on a card of 24 GB, none on one of 16 GB"


@exercise("a number of tokens")
def exercise_10_2(tokens: int | float) -> str:
    cfg, found = build_large_lens().cfg, to_number(tokens)
    weights = sum(p.nbytes for p in build_large_lens().model.parameters())
    right = math.sqrt(weights / (2 * cfg.n_layers * cfg.n_heads))
    at = build_large_lens().check(torch.zeros(1, max(1, round(found)), dtype=torch.long), "attn.pattern").bytes
    said = f"at {found:,.0f} tokens the patterns weigh {at / 1e9:.3g} GB, the weights {weights / 1e9:.1f} GB"
    demand(abs(found - right) < 0.01 * right, said)
    return said


@exercise("names, or a list of them")
def exercise_10_3(names: PointNames) -> str:
    size = build_large_lens().check(torch.zeros(1, 1024, dtype=torch.long), names).bytes
    _, acts = load_lens().run_with_cache("Mary went to the", names)
    try:
        found = acts["attn.result"]
    except NotRecordedError:
        found = None
    demand(found is not None, "attn.result does not follow from these: from what would you compute it by hand?")
    demand(size <= 0.5e9, f"it follows from these, but they weigh {size / 1e9:.1f} GB")
    return f"{size / 1e9:.2f} GB, and attn.result follows, to rounding"


@exercise("a function of a folder and candidates")
def exercise_10_4(find_theta: Callable[[Path, Sequence[float]], float]) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = load_lens().save(Path(name) / "lost")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e6}), encoding="utf-8")
        found = to_number(find_theta(folder, [5e6, 500.0, 10_000.0]))
    demand(found != 5e6, "this is what its config says, and it was not trained with it")
    demand(found == 10_000.0, f"it was not trained with {found:,.0f}: ask it what depends on where words stand")
    return f"trained with {found:,.0f}"
