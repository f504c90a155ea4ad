"""The ways to take a model apart: what each part of a layer adds along a direction of the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, pattern_points
from glmlens.analysis.batch import PromptBatch, upcast, upcast_to_float64
from glmlens.lens import Lens
from glmlens.model import RMSNorm
from glmlens.recording.activations import Activations

SUBLAYERS = {"attn": ("attn_out", "ln1_post"), "mlp": ("mlp_out", "ln2_post")}


def project_onto(part: Float[Tensor, "batch model"], direction: Float[Tensor, "batch model"]) -> Float[Tensor, "batch"]:
    """A few channels of real models are so large that a product in float32 would add to what stays unexplained."""
    return einsum(upcast_to_float64(part), direction, "batch model, batch model -> batch").to(upcast(part).dtype)


@dataclass(frozen=True)
class RunColumns:
    """A run as it was at one column of every row."""

    lens: Lens
    acts: Activations
    rows: PromptBatch
    columns: Tensor

    def pull_before_post_norm(
        self, layer: int, name: str, pull: Float[Tensor, "batch model"]
    ) -> Float[Tensor, "batch model"]:
        """The pull on what a sublayer says before the norm on its output (glm4), which is linear given its scale."""
        norm = self.lens.model.blocks[layer].get_submodule(name)
        if not isinstance(norm, RMSNorm):
            return pull
        return pull * upcast_to_float64(norm.weight) * upcast_to_float64(self.acts[name + ".scale", layer])

    def pull_on_z(self, layer: int, pull: Float[Tensor, "batch model"]) -> Float[Tensor, "batch head d"]:
        W_O, pull = upcast(self.lens.W_O[layer]), self.pull_before_post_norm(layer, "ln1_post", pull)
        return einsum(W_O, pull.to(W_O.dtype), "head d model, batch model -> batch head d")


def split_by_layer(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch"]:
    return split_by_sublayer(run, layer, pull).sum(1)


def split_by_sublayer(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch sublayer"]:
    return torch.stack([project_onto(run.acts[name, layer], pull) for name, _ in SUBLAYERS.values()], 1)


def split_by_mlp(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch"]:
    return project_onto(run.acts["mlp_out", layer], pull)


def split_by_head(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch head"]:
    z = upcast(run.acts["attn.z", layer])
    return einsum(z, run.pull_on_z(layer, pull), "batch head d, batch head d -> batch head")


def split_by_neuron(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch mlp"]:
    W_down, pull = upcast(run.lens.W_down[layer]), run.pull_before_post_norm(layer, "ln2_post", pull)
    on_neurons = einsum(W_down, pull.to(W_down.dtype), "mlp model, batch model -> batch mlp")
    return upcast(run.acts["mlp.post", layer]) * on_neurons


def split_by_source(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch head key"]:
    """pattern[query, key] · v[key] of every head, through W_O: b_V is in v, and attention sums to 1."""
    key_positions = run.rows.positions
    query = key_positions.gather(1, run.columns[:, None])
    weight = upcast(layer_pattern(run.acts, layer, query, key_positions).squeeze(2))
    on_z = rearrange(run.pull_on_z(layer, pull), "batch (kv group) d -> batch kv group d", kv=run.lens.cfg.n_kv_heads)
    said = einsum(upcast(run.acts["kv.v", layer]), on_z, "batch key kv d, batch kv group d -> batch kv group key")
    return weight * rearrange(said, "batch kv group key -> batch (kv group) key")


SplitFunction = Callable[[RunColumns, int, Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """A way to take the model apart: the axes of its parts, what they are made of, and the sublayer left whole."""

    axes: tuple[str, ...]
    compute_parts: SplitFunction
    points: tuple[str, ...]
    unsplit_sublayer: str | None = None

    def rest_points(self, lens: Lens) -> list[str]:
        return (
            [f"blocks.{i}.{SUBLAYERS[self.unsplit_sublayer][0]}" for i in range(lens.cfg.n_layers)]
            if self.unsplit_sublayer
            else []
        )

    def rest_labels(self, lens: Lens) -> list[str]:
        return (
            [f"layer {i}, {self.unsplit_sublayer}" for i in range(lens.cfg.n_layers)] if self.unsplit_sublayer else []
        )


SPLITS = {
    "layer": Split(("layer",), split_by_layer, ("attn_out", "mlp_out")),
    "component": Split(("layer", "sublayer"), split_by_sublayer, ("attn_out", "mlp_out")),
    "head": Split(("layer", "head"), split_by_head, ("attn.z",), "mlp"),
    "mlp": Split(("layer",), split_by_mlp, ("mlp_out",), "attn"),
    "neuron": Split(("layer", "mlp"), split_by_neuron, ("mlp.post",), "attn"),
    "source": Split(("layer", "head", "key"), split_by_source, ("kv.v",), "mlp"),
}


def points_of_split(lens: Lens, split: Split) -> list[str]:
    """The points that this split of this model is made of."""
    whole = [SUBLAYERS[split.unsplit_sublayer][0]] if split.unsplit_sublayer else []
    post = [f"{norm}.scale" for _, norm in SUBLAYERS.values()] if lens.cfg.sandwich else []
    seen = pattern_points(lens) if "key" in split.axes else []
    return ["embed", *dict.fromkeys([*split.points, *whole, *post, *seen]), "ln_final.scale", "ln_final.normalized"]
