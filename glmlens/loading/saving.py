"""Write a model as a checkpoint that transformers opens: `glm`, or `glm4` if it has sandwich norms.

A model loaded from `chatglm`, `llama` or `qwen2` is saved as `glm`: the same function with the same numbers, its rows
in the order of a GLM.
"""

import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from glmlens.config import ROPE_SCALING_FIELDS, GLMConfig
from glmlens.file_io import dump_json, refuse_strange, sync_path
from glmlens.loading.formats import BASE_PREFIX, map_tensor_names
from glmlens.model import GLM
from glmlens.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # bytes of a file of weights
ARCHITECTURE_SUFFIXES = {
    "vocab": "ForCausalLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@contextmanager
def create_folder_atomically(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder` that gets its name at the end, or is removed on an error.

    Raises FileExistsError unless `folder` is new or empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: this folder is not empty; name one that is new or empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.new")
    new.mkdir()
    try:
        yield new
        for path in (*new.iterdir(), new):
            sync_path(path)
        # An empty folder of this name makes room; os.replace fails if something was written to it meanwhile.
        if folder.exists():
            folder.rmdir()
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def make_config_json(model: GLM) -> dict[str, Any]:
    """Return the config.json of a model, with rotary fields where transformers 4.x and where 5.x looks for them."""
    c = model.cfg
    rule = make_scaling_json(c)
    rotary = {"rope_theta": c.rope_theta, "partial_rotary_factor": find_rotary_factor(c)}
    sandwich = "Glm4" if c.sandwich else "Glm"
    raw = {
        "architectures": [sandwich + ARCHITECTURE_SUFFIXES.get(c.head, "Model")], "model_type": sandwich.lower(),
        "vocab_size": c.d_vocab, "hidden_size": c.d_model, "intermediate_size": c.d_mlp,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.d_head, "attention_bias": c.qkv_bias, "tie_word_embeddings": c.tied, "hidden_act": "silu",
        "rms_norm_eps": c.rms_eps, "max_position_embeddings": c.n_ctx,
        **rotary, "rope_parameters": {**rule, **rotary},
        "dtype": str(model.ln_final.weight.dtype).removeprefix("torch."),
        "bos_token_id": None, "eos_token_id": list(c.eos_token_ids) or None, "pad_token_id": c.pad_token_id,
    }  # fmt: skip
    # transformers 4.x reads the scaling from here, 5.x from rope_parameters.
    if c.rope_scaling.kind != "default":
        raw["rope_scaling"] = rule
    if c.labels:
        raw["id2label"] = {str(i): label for i, label in enumerate(c.labels)}
        raw["label2id"] = {label: i for i, label in enumerate(c.labels)}
        raw |= {"problem_type": c.problem_type, "token_classification_bias": c.head_bias or c.head != "token"}
    return raw


def make_scaling_json(cfg: GLMConfig) -> dict[str, Any]:
    """Return the rope scaling as an object of config.json, without numbers that are None."""
    s = cfg.rope_scaling
    numbers = {theirs: getattr(s, ours) for ours, theirs in ROPE_SCALING_FIELDS[s.kind].items()}
    return {"rope_type": s.kind, **{name: value for name, value in numbers.items() if value is not None}}


def find_rotary_factor(cfg: GLMConfig) -> float:
    """Return a partial_rotary_factor for which int(d_head · factor) is d_rotary in spite of rounding."""
    # The quotient may be rounded down so that the product is just below d_rotary: then take the next float.
    factor = cfg.d_rotary / cfg.d_head
    return factor if int(cfg.d_head * factor) == cfg.d_rotary else math.nextafter(factor, 1.0)


def collect_tensors(model: GLM) -> dict[str, Tensor]:
    """Return every parameter by its name in transformers' `glm` or `glm4`."""
    c = replace(model.cfg, model_type="glm4" if model.cfg.sandwich else "glm")
    ours = dict(model.named_parameters())
    base = BASE_PREFIX if c.head == "none" else ""
    return {theirs.removeprefix(base): ours[n].detach() for theirs, [n] in map_tensor_names(c).items() if n in ours}


def write_weights(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write one file, or several of at most `shard_bytes` each (a larger tensor alone in one) and their index."""
    # Fill shards in order: a tensor that does not fit begins the next one.
    shards: list[dict[str, Tensor]] = [{}]
    for name, x in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + x.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = x
    n = len(shards)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if n == 1 else f"model-{i + 1:05}-of-{n:05}.safetensors"
        save_file({name: x.contiguous() for name, x in shard.items()}, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes files that only their owner may read
        weight_map |= dict.fromkeys(shard, file)
    if n > 1:
        size = sum(x.nbytes for x in tensors.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )


def write_tokenizer(folder: Path, tokenizer: Tokenizer, source: Path | None) -> None:
    """Copy the files that the tokenizer came from, or write new ones if transformers could not read those."""
    if source is not None and (source / "tokenizer.json").exists():
        for name in TOKENIZER_FILES:
            refuse_strange(source / name)
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        return
    (folder / "tokenizer.json").write_text(tokenizer.engine.to_str(pretty=True), encoding="utf-8")
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **tokenizer.named_tokens}
    chat = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
    write_json(folder / "tokenizer_config.json", {**stated, **chat})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as JSON with the indent of transformers."""
    path.write_bytes(dump_json(content, indent=2))
