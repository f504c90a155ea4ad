"""From a folder to a GLM whose every parameter is a view of the memory-mapped file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from glmlens.config import CheckpointError, GLMConfig
from glmlens.model import GLM

# One table from transformers' names for `glm` and `glm4` to ours.
NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.ln1.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attn.query.weight",
    "model.layers.{i}.self_attn.q_proj.bias": "blocks.{i}.attn.query.bias",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attn.key.weight",
    "model.layers.{i}.self_attn.k_proj.bias": "blocks.{i}.attn.key.bias",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attn.value.weight",
    "model.layers.{i}.self_attn.v_proj.bias": "blocks.{i}.attn.value.bias",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attn.out.weight",
    "model.layers.{i}.post_self_attn_layernorm.weight": "blocks.{i}.ln1_post.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.ln2.weight",
    "model.layers.{i}.mlp.gate_up_proj.weight": "blocks.{i}.mlp.gate_up.weight",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.down.weight",
    "model.layers.{i}.post_mlp_layernorm.weight": "blocks.{i}.ln2_post.weight",
    "model.norm.weight": "ln_final.weight",
    "lm_head.weight": "unembed.weight",
}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_HEADER = MOST_TEXT = (
    4_000_000  # bytes: those of GLM-4-9B are 35,000, and reading JSON takes up to 30 times its size
)
MOST_TOKENIZER = 64_000_000


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str = "eager",
) -> GLM:
    """The GLM in `folder`, frozen. On the meta device only its config is read.

    Everything is checked before anything is read. Raises CheckpointError naming the file, the tensor, what was
    expected and what was found.
    """
    device = torch.device(device)
    cfg = GLMConfig.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    if dtype is None and cfg.dtype is not None:
        dtype = dtype_named(cfg.dtype, f"{folder / 'config.json'}: ")
    model = blank(cfg, attention, dtype or torch.float32)
    if device.type == "meta":
        return model

    ours = checkpoint_names(model)
    expected = {name: model.get_parameter(ours[name]) for name in ours}
    found = checked(files_of(folder), expected, cfg)
    dtype = dtype or FLOATS[found["model.embed_tokens.weight"][1]]
    size = sum(p.numel() for p in expected.values()) * dtype.itemsize
    with tqdm(total=size, desc=f"loading {folder.name}", unit="B", unit_scale=True, delay=2) as bar:
        for path in dict.fromkeys(path for path, _ in found.values()):
            with opened(path) as file:
                for name in (name for name in ours if found[name][0] == path):
                    set_parameter(model, ours[name], file.get_tensor(name).to(device, dtype))
                    bar.update(expected[name].numel() * dtype.itemsize)
    if cfg.tied:
        model.unembed.weight = model.embed.weight
        refuse_another_unembedding(found)
    return model


def refuse_another_unembedding(found: "Found") -> None:
    """Raise CheckpointError if a tied checkpoint holds an lm_head that is not its embedding."""
    pair = [found.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    if pair[0] and pair[1]:
        with opened(pair[0][0]) as one, opened(pair[1][0]) as other:
            if not torch.equal(one.get_tensor("model.embed_tokens.weight"), other.get_tensor("lm_head.weight")):
                raise CheckpointError(
                    f"{pair[1][0]}: tensor 'lm_head.weight' is not the embedding, but tie_word_embeddings is true"
                )


def blank(cfg: GLMConfig, attention: str, dtype: torch.dtype) -> GLM:
    """A frozen GLM on the meta device: every shape, no numbers."""
    try:
        with torch.device("meta"), NoDraws():
            return GLM(cfg, attention).to(dtype).requires_grad_(False).eval()
    except RuntimeError as e:
        raise CheckpointError(f"config.json: no model can have these sizes: {e}: {cfg}") from e


class NoDraws(TorchFunctionMode):
    """Inside, initialisers draw nothing: on meta there is nothing to fill, and to find that out costs torch 2 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = getattr(func, "__module__", None) == nn.init.__name__
        return None if draws else func(*args, **(kwargs or {}))


def checkpoint_names(model: GLM) -> dict[str, str]:
    """The checkpoint's name of every parameter of this model, and ours."""
    ours = {name for name, _ in model.named_parameters()}  # a tied unembedding is listed once, as the embedding
    table = {
        theirs.format(i=i): name.format(i=i)
        for theirs, name in NAMES.items()
        for i in (range(model.cfg.n_layers) if "{i}" in name else [0])
    }
    return {theirs: name for theirs, name in table.items() if name in ours}


def set_parameter(model: GLM, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


Found = dict[str, tuple[Path, str]]


def checked(files: dict[str, Path], expected: dict[str, nn.Parameter], cfg: GLMConfig) -> Found:
    """Where each expected tensor is and its dtype; CheckpointError unless just these are there, in these shapes."""
    found: Found = {}
    for path in dict.fromkeys(files.values()):
        with opened(path) as file:
            there = list(file.keys())
            for name in there:
                if name not in expected and not (cfg.tied and name == "lm_head.weight"):
                    raise CheckpointError(f"{path}: tensor {name!r} has no place in this {cfg.model_type!r}")
                if files.get(name) != path and name in expected:
                    raise CheckpointError(f"{path}: tensor {name!r} is here too, beside the one in {files.get(name)}")
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                like = expected.get(name, expected["model.embed_tokens.weight"])
                if shape != tuple(like.shape):
                    raise CheckpointError(f"{path}: tensor {name!r}: expected shape {tuple(like.shape)}, found {shape}")
                if dtype not in FLOATS:
                    raise CheckpointError(
                        f"{path}: tensor {name!r}: expected one of {', '.join(FLOATS)}, found {dtype}; "
                        f"glmlens does not open quantised weights"
                    )
                found[name] = path, dtype
            for name in (name for name, at in files.items() if at == path and name not in there):
                raise CheckpointError(f"{path}: tensor {name!r}: expected here by the index, not found")
    missing = [name for name in expected if name not in found]
    if missing:
        where = ", ".join(str(path) for path in dict.fromkeys(files.values()))
        raise CheckpointError(f"{where}: {len(missing)} tensors not found, of which the first is {missing[0]!r}")
    return found


def files_of(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by the index where there is one."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        with opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.exists():
        other = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" There is {other[0]}: glmlens opens safetensors only, never pickle." if other else ""
        raise CheckpointError(f"{folder}: found neither model.safetensors nor model.safetensors.index.json.{hint}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to files, found {shards!r:.80}")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: tensor {name!r} is said to be in {shard!r}, not a file of this folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: tensor {name!r} is said to be in {shard!r}, which is not there")
    return {name: folder / shard for name, shard in shards.items()}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The safetensors file, memory-mapped; what is wrong with it is a CheckpointError that names it."""
    refuse_strange(path)
    try:
        with path.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > MOST_HEADER:  # safetensors would take 20 times its size in memory to say what is in it
            raise CheckpointError(
                f"{path}: its header is said to be {header:,} bytes; expected {MOST_HEADER:,} at most"
            )
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, MemoryError) as e:
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes): not a whole safetensors file: {e}") from e


def refuse_strange(path: Path, most: int | None = None) -> None:
    """Raise CheckpointError if there is something at `path` but not a file, or one of more than `most` bytes."""
    if os.path.lexists(path) and not path.is_file():
        raise CheckpointError(f"{path}: expected a file, found a folder, a pipe, a device or a link to nowhere")
    if most is not None and path.exists() and path.stat().st_size > most:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; expected {most:,} at most")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or CheckpointError."""
    refuse_strange(path, MOST_TEXT)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: not found") from e
    except (ValueError, OSError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON: {e}") from e
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def dtype_named(dtype: str | torch.dtype, where: str = "") -> torch.dtype:
    """The float dtype of this name ("bfloat16", "torch.bfloat16") or itself."""
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or found not in FLOATS.values():
        names = ", ".join(str(f).removeprefix("torch.") for f in FLOATS.values())
        raise CheckpointError(f"{where}dtype is {dtype!r}; expected one of {names}")
    return found
