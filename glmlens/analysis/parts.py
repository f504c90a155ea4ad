"""The ways to take a model apart: what each part of a layer adds along a direction of the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.activations import Activations
from glmlens.analysis.pattern import pattern, pattern_points
from glmlens.analysis.rows import Rows, exact, finest
from glmlens.lens import Lens
from glmlens.model import RMSNorm

SUBLAYERS = {"attn": ("attn_out", "ln1_post"), "mlp": ("mlp_out", "ln2_post")}


def along(part: Float[Tensor, "batch model"], pull: Float[Tensor, "batch model"]) -> Float[Tensor, "batch"]:
    """A few channels of real models are so large that a product in float32 would add to what stays unexplained."""
    return einsum(finest(part), pull, "batch model, batch model -> batch").to(exact(part).dtype)


@dataclass(frozen=True)
class At:
    """A run as it was at one column of every row."""

    lens: Lens
    acts: Activations
    rows: Rows
    columns: Tensor

    def before_post_norm(
        self, layer: int, name: str, pull: Float[Tensor, "batch model"]
    ) -> Float[Tensor, "batch model"]:
        """The pull on what a sublayer says before the norm on its output (glm4), which is linear given its scale."""
        norm = self.lens.model.blocks[layer].get_submodule(name)
        if not isinstance(norm, RMSNorm):
            return pull
        return pull * finest(norm.weight) * finest(self.acts[name + ".scale", layer])

    def pull_on_z(self, layer: int, pull: Float[Tensor, "batch model"]) -> Float[Tensor, "batch head d"]:
        W_O, pull = exact(self.lens.W_O[layer]), self.before_post_norm(layer, "ln1_post", pull)
        return einsum(W_O, pull.to(W_O.dtype), "head d model, batch model -> batch head d")


def by_layer(at: At, layer: int, pull: Tensor) -> Float[Tensor, "batch"]:
    return by_sublayer(at, layer, pull).sum(1)


def by_sublayer(at: At, layer: int, pull: Tensor) -> Float[Tensor, "batch sublayer"]:
    return torch.stack([along(at.acts[name, layer], pull) for name, _ in SUBLAYERS.values()], 1)


def by_mlp(at: At, layer: int, pull: Tensor) -> Float[Tensor, "batch"]:
    return along(at.acts["mlp_out", layer], pull)


def by_head(at: At, layer: int, pull: Tensor) -> Float[Tensor, "batch head"]:
    z = exact(at.acts["attn.z", layer])
    return einsum(z, at.pull_on_z(layer, pull), "batch head d, batch head d -> batch head")


def by_neuron(at: At, layer: int, pull: Tensor) -> Float[Tensor, "batch mlp"]:
    W_down, pull = exact(at.lens.W_down[layer]), at.before_post_norm(layer, "ln2_post", pull)
    on_neurons = einsum(W_down, pull.to(W_down.dtype), "mlp model, batch model -> batch mlp")
    return exact(at.acts["mlp.post", layer]) * on_neurons


def by_source(at: At, layer: int, pull: Tensor) -> Float[Tensor, "batch head key"]:
    """pattern[query, key] · v[key] of every head, through W_O: b_V is in v, and attention sums to 1."""
    key_positions = at.rows.positions
    query = key_positions.gather(1, at.columns[:, None])
    weight = exact(pattern(at.acts, layer, query, key_positions).squeeze(2))
    on_z = rearrange(at.pull_on_z(layer, pull), "batch (kv group) d -> batch kv group d", kv=at.lens.cfg.n_kv_heads)
    said = einsum(exact(at.acts["kv.v", layer]), on_z, "batch key kv d, batch kv group d -> batch kv group key")
    return weight * rearrange(said, "batch kv group key -> batch (kv group) key")


Parts = Callable[[At, int, Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """A way to take the model apart: the axes of its parts, what they are made of, and the sublayer left whole."""

    axes: tuple[str, ...]
    parts: Parts
    points: tuple[str, ...]
    whole: str | None = None

    def rest_points(self, lens: Lens) -> list[str]:
        return [f"blocks.{i}.{SUBLAYERS[self.whole][0]}" for i in range(lens.cfg.n_layers)] if self.whole else []

    def rest_labels(self, lens: Lens) -> list[str]:
        return [f"layer {i}, {self.whole}" for i in range(lens.cfg.n_layers)] if self.whole else []


SPLITS = {
    "layer": Split(("layer",), by_layer, ("attn_out", "mlp_out")),
    "component": Split(("layer", "sublayer"), by_sublayer, ("attn_out", "mlp_out")),
    "head": Split(("layer", "head"), by_head, ("attn.z",), "mlp"),
    "mlp": Split(("layer",), by_mlp, ("mlp_out",), "attn"),
    "neuron": Split(("layer", "mlp"), by_neuron, ("mlp.post",), "attn"),
    "source": Split(("layer", "head", "key"), by_source, ("kv.v",), "mlp"),
}


def points_for(lens: Lens, split: Split) -> list[str]:
    """The points that this split of this model is made of."""
    whole = [SUBLAYERS[split.whole][0]] if split.whole else []
    post = [f"{norm}.scale" for _, norm in SUBLAYERS.values()] if lens.cfg.sandwich else []
    seen = pattern_points(lens) if "key" in split.axes else []
    return ["embed", *dict.fromkeys([*split.points, *whole, *post, *seen]), "ln_final.scale", "ln_final.normalized"]
