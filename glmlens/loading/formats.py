"""What each published format calls the tensors of a GLM: one table per format from its names to ours.

A name of theirs that stands for several of ours is split into them by rows, as views. Where several of theirs stand for
one of ours, they are joined by rows in the order of the table, which copies them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor

from glmlens.config import GLMConfig

BASE_PREFIX = "model."  # what a checkpoint of the model without any head leaves out
ATTENTION_NAMES = {
    f"model.layers.{{i}}.self_attn.{theirs}.{part}": f"blocks.{{i}}.attn.{ours}.{part}"
    for theirs, ours in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}.items()
    for part in ("weight", "bias")
}
GLM_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.ln1.weight",
    **ATTENTION_NAMES,
    "model.layers.{i}.post_self_attn_layernorm.weight": "blocks.{i}.ln1_post.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.ln2.weight",
    "model.layers.{i}.mlp.gate_up_proj.weight": "blocks.{i}.mlp.gate_up.weight",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.down.weight",
    "model.layers.{i}.post_mlp_layernorm.weight": "blocks.{i}.ln2_post.weight",
    "model.norm.weight": "ln_final.weight",
    "lm_head.weight": "unembed.weight",
}
LLAMA_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.ln1.weight",
    **ATTENTION_NAMES,
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.ln2.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.mlp.gate_up.weight",
    "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.mlp.gate_up.weight",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.down.weight",
    "model.norm.weight": "ln_final.weight",
    "lm_head.weight": "unembed.weight",
}
CHATGLM_QKV = "blocks.{i}.attn.query.X blocks.{i}.attn.key.X blocks.{i}.attn.value.X"
CHATGLM_NAMES = {
    "transformer.embedding.word_embeddings.weight": "embed.weight",
    "transformer.encoder.layers.{i}.input_layernorm.weight": "blocks.{i}.ln1.weight",
    "transformer.encoder.layers.{i}.self_attention.query_key_value.weight": CHATGLM_QKV.replace("X", "weight"),
    "transformer.encoder.layers.{i}.self_attention.query_key_value.bias": CHATGLM_QKV.replace("X", "bias"),
    "transformer.encoder.layers.{i}.self_attention.dense.weight": "blocks.{i}.attn.out.weight",
    "transformer.encoder.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.ln2.weight",
    "transformer.encoder.layers.{i}.mlp.dense_h_to_4h.weight": "blocks.{i}.mlp.gate_up.weight",
    "transformer.encoder.layers.{i}.mlp.dense_4h_to_h.weight": "blocks.{i}.mlp.down.weight",
    "transformer.encoder.final_layernorm.weight": "ln_final.weight",
    "transformer.output_layer.weight": "unembed.weight",
}
CLASS_HEAD_NAMES = {"score.weight": "unembed.weight", "score.bias": "unembed.bias"}


@dataclass(frozen=True)
class WeightFormat:
    """The names of one format. `half_split`: rotary turns channel c with channel c + d/2, and not with its neighbour.

    The rows of q and k are then put in another order, q and k alike: a copy, and the same scores, since q · k is a sum
    over channels in whatever order. `unused` tensors follow from the config.
    """

    tensor_names: Mapping[str, str]
    half_split: bool = False
    unused: str = "model.layers.{i}.self_attn.rotary_emb.inv_freq"


WEIGHT_FORMATS = {
    "glm": WeightFormat(GLM_NAMES),
    "glm4": WeightFormat(GLM_NAMES),
    "chatglm": WeightFormat(CHATGLM_NAMES, unused="transformer.rotary_pos_emb.inv_freq"),
    "llama": WeightFormat(LLAMA_NAMES, half_split=True),
    "qwen2": WeightFormat(LLAMA_NAMES, half_split=True),
}


def map_tensor_names(cfg: GLMConfig) -> dict[str, list[str]]:
    """Every name that this checkpoint may have, and those of our parameters that it stands for."""
    names = {**WEIGHT_FORMATS[cfg.model_type].tensor_names, **(CLASS_HEAD_NAMES if cfg.labels else {})}
    return {
        theirs.format(i=i): ours.format(i=i).split()
        for theirs, ours in names.items()
        for i in (range(cfg.n_layers) if "{i}" in theirs else [0])
        if not (cfg.labels and theirs in ("lm_head.weight", "transformer.output_layer.weight"))
    }


def list_unused_tensors(cfg: GLMConfig) -> set[str]:
    """Names of tensors that a checkpoint may have and nobody needs."""
    return {WEIGHT_FORMATS[cfg.model_type].unused.format(i=i) for i in range(cfg.n_layers)}


def reorder_rotary_rows(x: Shaped[Tensor, "row *model"], ours: str, cfg: GLMConfig) -> Shaped[Tensor, "row *model"]:
    """The rows of a parameter of ours as they turn here: pairs side by side.

    Su et al. 2021 (arXiv 2104.09864), equation 15, pairs neighbours; a half-split rotary pairs (c, c + d/2), and
    turns pair c by the same angle, position · theta^(-2c/d).
    """
    turned = ours.rpartition(".")[0].endswith(("attn.query", "attn.key"))
    if not (turned and WEIGHT_FORMATS[cfg.model_type].half_split):
        return x
    return rearrange(x, "(head two pair) ... -> (head pair two) ...", two=2, pair=cfg.d_head // 2)
