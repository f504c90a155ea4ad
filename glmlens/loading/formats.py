"""The names of a GLM's tensors in every published format: one table per format from its names to ours.

A tensor of theirs that holds several of ours is split by rows, into views. Several of theirs that make up one of ours
are concatenated by rows in the order of the table, which copies them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor

from glmlens.config import GLMConfig

BASE_PREFIX = "model."  # the prefix that names do not have in a checkpoint of the model without a head
# `{i}` is the layer. Names are theirs: ours.
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
# gate and up are two tensors here, and one of ours: their rows are concatenated.
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
# q, k and v are one tensor here, and three of ours: its rows are split.
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
    """The tensor names of one format, and its rotary layout.

    With `half_split`, rotary pairs channel c with channel c + d/2, and not with its neighbour. The rows of q and k are
    then reordered, q and k alike: this copies them and keeps the scores, since q · k is a sum over channels in any
    order. `unused` tensors are constants that the config determines.
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
    """Return every tensor name that a checkpoint of this config may have, and the names of our parameters in it."""
    names = {**WEIGHT_FORMATS[cfg.model_type].tensor_names, **(CLASS_HEAD_NAMES if cfg.labels else {})}
    return {
        theirs.format(i=i): ours.format(i=i).split()
        for theirs, ours in names.items()
        for i in (range(cfg.n_layers) if "{i}" in theirs else [0])
        # A class head takes the place of the unembedding.
        if not (cfg.labels and theirs in ("lm_head.weight", "transformer.output_layer.weight"))
    }


def list_unused_tensors(cfg: GLMConfig) -> set[str]:
    """Return the names of tensors that a checkpoint may have and that the config determines."""
    return {WEIGHT_FORMATS[cfg.model_type].unused.format(i=i) for i in range(cfg.n_layers)}


def reorder_rotary_rows(x: Shaped[Tensor, "row *model"], ours: str, cfg: GLMConfig) -> Shaped[Tensor, "row *model"]:
    """Return the rows of our parameter `ours` in the order of adjacent rotary pairs; a copy if they are reordered.

    Su et al. 2021 (arXiv 2104.09864), equation 15, pairs neighbours; a half-split rotary pairs (c, c + d/2), and
    rotates pair c by the same angle, position · theta^(-2c/d).
    """
    rotated = ours.rpartition(".")[0].endswith(("attn.query", "attn.key"))
    if not (rotated and WEIGHT_FORMATS[cfg.model_type].half_split):
        return x
    # From the first halves of all pairs, then the second ones, to pair after pair.
    return rearrange(x, "(head two pair) ... -> (head pair two) ...", two=2, pair=cfg.d_head // 2)
