"""Splits of a model into parts: the contribution of each part of a layer along a direction of the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, pattern_points
from glmlens.analysis.layer_norms import scale_by_post_norm
from glmlens.analysis.prompt_batch import PromptBatch, upcast_to_float64
from glmlens.dtypes import upcast
from glmlens.lens import Lens
from glmlens.recording.activations import Activations

SUBLAYERS = {"attn": ("attn_out", "ln1_post"), "mlp": ("mlp_out", "ln2_post")}


def project_onto(part: Float[Tensor, "batch model"], direction: Float[Tensor, "batch model"]) -> Float[Tensor, "batch"]:
    """Return the dot product of every row, in at least float32.

    It is summed in float64: a few channels of real models are so large that float32 would add rounding error to what
    stays unexplained.
    """
    return einsum(upcast_to_float64(part), direction, "batch model, batch model -> batch").to(upcast(part).dtype)


@dataclass(frozen=True)
class RunColumns:
    """A run recorded at one column of every row."""

    lens: Lens
    acts: Activations
    rows: PromptBatch
    columns: Tensor

    def pull_before_post_norm(
        self, layer: int, name: str, pull: Float[Tensor, "batch model"]
    ) -> Float[Tensor, "batch model"]:
        """Return the pull on a sublayer's output before the norm on it (glm4); without such a norm the pull itself."""
        return scale_by_post_norm(self.acts, self.lens.model, layer, name, pull)

    def pull_on_z(self, layer: int, pull: Float[Tensor, "batch model"]) -> Float[Tensor, "batch head d"]:
        """Return the pull on each head's z: how much a unit of each channel adds along the direction."""
        W_O = upcast(self.lens.W_O[layer])
        pull = self.pull_before_post_norm(layer, "ln1_post", pull)
        return einsum(W_O, pull.to(W_O.dtype), "head d model, batch model -> batch head d")


def split_by_layer(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch"]:
    """Return the contribution of a whole layer."""
    return split_by_sublayer(run, layer, pull).sum(1)


def split_by_sublayer(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch sublayer"]:
    """Return the contributions of a layer's attention and MLP."""
    return torch.stack([project_onto(run.acts[name, layer], pull) for name, _ in SUBLAYERS.values()], 1)


def split_by_mlp(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch"]:
    """Return the contribution of a layer's MLP."""
    return project_onto(run.acts["mlp_out", layer], pull)


def split_by_head(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch head"]:
    """Return the contribution of every head: z times the pull on it."""
    z = upcast(run.acts["attn.z", layer])
    return einsum(z, run.pull_on_z(layer, pull), "batch head d, batch head d -> batch head")


def split_by_neuron(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch mlp"]:
    """Return the contribution of every neuron: its activation times the pull on it through W_down."""
    W_down = upcast(run.lens.W_down[layer])
    pull = run.pull_before_post_norm(layer, "ln2_post", pull)
    on_neurons = einsum(W_down, pull.to(W_down.dtype), "mlp model, batch model -> batch mlp")
    return upcast(run.acts["mlp.post", layer]) * on_neurons


def split_by_source(run: RunColumns, layer: int, pull: Tensor) -> Float[Tensor, "batch head key"]:
    """Return the contribution of every head and key: pattern[query, key] · v[key] through W_O.

    The recorded v includes b_V. Attention sums to 1, so b_V is counted once.
    """
    key_positions = run.rows.positions
    query = key_positions.gather(1, run.columns[:, None])
    weight = upcast(layer_pattern(run.acts, layer, query, key_positions).squeeze(2))
    on_z = rearrange(run.pull_on_z(layer, pull), "batch (kv group) d -> batch kv group d", kv=run.lens.cfg.n_kv_heads)
    # The query heads of a group share a value: project it once for each head, without repeating it.
    per_value = einsum(upcast(run.acts["kv.v", layer]), on_z, "batch key kv d, batch kv group d -> batch kv group key")
    return weight * rearrange(per_value, "batch kv group key -> batch (kv group) key")


SplitFunction = Callable[[RunColumns, int, Tensor], Tensor]
"""A function of a recorded run, a layer and a pull [batch, model] that returns the contributions of a layer's parts."""


@dataclass(frozen=True)
class Split:
    """One way to split the model: the axes of its parts, the points they need, and the sublayer that is not split."""

    axes: tuple[str, ...]
    compute_parts: SplitFunction
    points: tuple[str, ...]
    unsplit_sublayer: str | None = None

    def rest_points(self, lens: Lens) -> list[str]:
        """Return the output points of the sublayers that are not split."""
        if self.unsplit_sublayer is None:
            return []
        output, _ = SUBLAYERS[self.unsplit_sublayer]
        return [f"blocks.{i}.{output}" for i in range(lens.cfg.n_layers)]

    def rest_labels(self, lens: Lens) -> list[str]:
        """Return the labels of `rest_points`."""
        if self.unsplit_sublayer is None:
            return []
        return [f"layer {i}, {self.unsplit_sublayer}" for i in range(lens.cfg.n_layers)]


SPLITS = {
    "layer": Split(("layer",), split_by_layer, ("attn_out", "mlp_out")),
    "component": Split(("layer", "sublayer"), split_by_sublayer, ("attn_out", "mlp_out")),
    "head": Split(("layer", "head"), split_by_head, ("attn.z",), "mlp"),
    "mlp": Split(("layer",), split_by_mlp, ("mlp_out",), "attn"),
    "neuron": Split(("layer", "mlp"), split_by_neuron, ("mlp.post",), "attn"),
    "source": Split(("layer", "head", "key"), split_by_source, ("kv.v",), "mlp"),
}


def points_of_split(lens: Lens, split: Split) -> list[str]:
    """Return the points to record for a split of this model."""
    unsplit = [SUBLAYERS[split.unsplit_sublayer][0]] if split.unsplit_sublayer else []
    post_norms = [f"{norm}.scale" for _, norm in SUBLAYERS.values()] if lens.cfg.sandwich else []
    pattern = pattern_points(lens) if "key" in split.axes else []
    names = dict.fromkeys([*split.points, *unsplit, *post_norms, *pattern])  # each once, in order
    return ["embed", *names, "ln_final.scale", "ln_final.normalized"]
