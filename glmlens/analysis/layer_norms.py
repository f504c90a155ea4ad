"""Weights of norms, and the norm on a sublayer's output (glm4), which is linear given its recorded scale."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.prompt_batch import upcast_to_float64
from glmlens.dtypes import upcast
from glmlens.model import GLM, RMSNorm


def norm_weight(model: GLM, layer: int, name: str) -> Float[Tensor, "model"] | None:
    """Return the weight of a layer's norm in the model's dtype, or None in a model that has no norm of this name."""
    norm = model.blocks[layer].get_submodule(name)
    return norm.weight if isinstance(norm, RMSNorm) else None


def norm_weight_or_ones(model: GLM, layer: int, name: str) -> Float[Tensor, "model"]:
    """Return the weight of a layer's norm in at least float32, or ones in a model that has no norm of this name."""
    weight = norm_weight(model, layer, name)
    return upcast(model.ln_final.weight.new_ones(model.cfg.d_model) if weight is None else weight)


def scale_by_post_norm(
    acts: Mapping[str, Tensor], model: GLM, layer: int, name: str, x: Float[Tensor, "*batch model"]
) -> Float[Tensor, "*batch model"]:
    """Return x * weight * recorded scale of the norm on a sublayer's output, or x where the model has no such norm.

    This takes a direction on the residual stream to the one on the sublayer's output before its norm. The product is in
    float64 where the device has it. `acts` hold the norm's `scale` at the same places as x.
    """
    weight = norm_weight(model, layer, name)
    if weight is None:
        return x
    scale = acts[f"blocks.{layer}.{name}.scale"].reshape(*x.shape[:-1], 1)
    return x * upcast_to_float64(weight) * upcast_to_float64(scale)
