"""Attribution patching: what a sweep would find, estimated for every place at once from gradients.

Nanda 2022 (Attribution patching: activation patching at industrial scale); its corrections for saturated attention and
for cancelling paths are AtP*, Kramár et al. 2024 (arXiv 2403.00745), section 3.1 and 3.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from glmlens.hooks import Hooks
from glmlens.lens import Lens
from glmlens.patch.gradients import RecordedGradients, record_gradients
from glmlens.patch.grid import place_label
from glmlens.patch.metrics import Metric
from glmlens.patch.pairs import prepare_pairs
from glmlens.patch.sites import PatchError, move_position_first, position_first_axes
from glmlens.results import Labelled, list_axes
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

ATP_STAR_POINTS = {"attn.q": "queries", "kv.k": "keys"}
ATP_STAR_INPUTS = ("attn.q_rot", "attn.q_pass", "kv.k", "attn.scores")
QK_EINSUM = "batch query head d, batch key head d -> batch head query key"


def attribution_patch(
    lens: Lens,
    clean: Prompt | Examples,
    corrupt: Prompt | str | None,
    point: str,
    *,
    over: str | Sequence[str] = ("layer", "pos"),
    metric: Any = None,
    direction: str = "noise",
    method: str = "atp",
    drop: bool = False,
) -> Labelled:
    """The change of the metric that putting the other run's value in each place should make: Δvalue · gradient.

    `point` is a layer's, as "attn.z"; what `over` does not name is summed. "noise" changes the clean run, "denoise" the
    corrupt one. `method="atp*"` is for `attn.q` and `kv.k`: the attention pattern that the change would make is
    computed exactly, and the gradient is taken there (for `kv.k` over "head" by query head, over "kv" by group).
    `drop` is GradDrop: the mean magnitude over backward passes of which each leaves out one layer's contribution, so
    that effects that cancel are seen. Values are means over pairs; all in the metric's unit.
    """
    over = list_axes(over)
    if len(set(over)) != len(over):
        raise PatchError(f"over {over}: one axis is there twice")
    if drop and lens.cfg.n_layers < 2:
        raise PatchError("GradDrop leaves one layer out of several: a model of one layer has no others, drop=False")
    one, other, read = prepare_pairs(lens, clean, corrupt, metric)
    if direction not in ("noise", "denoise"):
        raise PatchError(f"direction is {direction!r}; choose 'noise' or 'denoise'")
    base, source = (one, other) if direction == "noise" else (other, one)
    if method not in ("atp", "atp*") or (method == "atp*" and point not in ATP_STAR_POINTS):
        raise PatchError(f"method is {method!r} at {point}; choose 'atp', or 'atp*' at {' or '.join(ATP_STAR_POINTS)}")
    axes = position_first_axes(point, by_query_head=method == "atp*" and point == "kv.k")
    names = [f"blocks.{i}.{point}" for i in range(lens.cfg.n_layers)]
    by_group = method == "atp*" and point == "kv.k" and "kv" in over
    shown = ["layer", *("kv" if by_group and axis == "head" else axis for axis in axes[1:])]
    if set(over) - set(shown) or not is_layer_point(lens, point):
        raise PatchError(f"over {tuple(over)}: {point} has {', '.join(shown)}; a layer's point is attributed")
    if method == "atp*":
        if lens.model.attention != "eager":
            raise PatchError("'atp*' needs the pattern: load with attention='eager'")
        estimate, needed = ATP_STAR_ESTIMATORS[point], [f"blocks.{i}.attn.pattern" for i in range(lens.cfg.n_layers)]
    else:
        estimate, needed = estimate_linearly, names
    also = [f"blocks.{i}.{p}" for i in range(lens.cfg.n_layers) for p in (*ATP_STAR_INPUTS, point)]
    also = [n for n in dict.fromkeys(also) if n in {p.name for p in lens.points()} and (method == "atp*" or n in names)]
    _, there = lens.run_with_cache(source, also, logits=False, attention_mask=torch.ones_like(source))
    passes: list[Hooks | None] = [None] if not drop else [detach_layer(lens, i) for i in range(lens.cfg.n_layers)]
    total: Tensor | None = None
    for dropped, hooks in enumerate(passes):
        run = record_gradients(lens, base, read, needed, hooks, also)
        found = torch.stack([estimate(lens, run, there, i, point) for i in range(lens.cfg.n_layers)], 1)
        if drop and point in SUBLAYER_OUTPUTS:  # where the gradient was cut, it begins anew
            found[:, dropped] = 0
        if by_group:
            found = found.unflatten(3, (-1, lens.cfg.n_groups)).sum(4)
        for i in [i for i, axis in enumerate(shown, 1) if axis not in over][::-1]:
            found = found.sum(i)
        found = found.abs() / (len(passes) - 1) if drop else found
        total = found if total is None else total + found
    assert total is not None
    left = [axis for axis in shown if axis in over]
    total = total.mean(0).permute([left.index(axis) for axis in over])
    return label_estimate(lens, total, over, one, read, point, direction, method + (" with GradDrop" if drop else ""))


SUBLAYER_OUTPUTS = ("attn_out", "mlp_out")


def is_layer_point(lens: Lens, point: str) -> bool:
    return any(p.local == point and p.layer is not None for p in lens.points())


def label_estimate(
    lens: Lens, values: Tensor, over: Sequence[str], clean: Tensor, metric: Metric, point: str, direction: str,
    method: str,
) -> Labelled:  # fmt: skip
    """The estimate with the labels that a sweep over the same places has."""
    prompts = [tuple(row) for row in clean.tolist()]
    labels = {
        axis: [place_label(lens, axis, place, prompts) for place in range(size)]
        for axis, size in zip(over, values.shape, strict=True)
    }
    about = {
        "metric": metric.name,
        "value": "estimated change of the metric, Δvalue · gradient" + (", magnitudes" if "Drop" in method else ""),
        "site": point,
        "direction": f"{direction}: gradient at the run that is changed",
        "method": method,
        "pairs": str(len(prompts)),
        "model": lens.model_hash,
    }
    return Labelled(values.double().cpu().numpy(), tuple(over), labels, about)


def estimate_linearly(lens: Lens, run: RecordedGradients, source: Mapping[str, Any], layer: int, point: str) -> Tensor:
    """(a' - a) ⊙ ∂m/∂a, [batch, position, rest]."""
    name = f"blocks.{layer}.{point}"
    return move_position_first(name, (source[name] - run.values[name]) * run.gradients[name])


def detach_layer(lens: Lens, layer: int) -> Hooks:
    """Hooks under which no gradient passes what a layer adds to the residual stream."""
    return [(f"blocks.{layer}.{local}", lambda x, point: x.detach()) for local in SUBLAYER_OUTPUTS]


def concatenate_query_channels(lens: Lens, acts: Mapping[str, Any], layer: int) -> Float[Tensor, "batch pos head d"]:
    """The whole query as it meets the keys."""
    names = [f"blocks.{layer}.{p}" for p in ("attn.q_rot", "attn.q_pass")]
    return torch.cat([acts[name] for name in names if name in acts], -1)


def repeat_keys(lens: Lens, acts: Mapping[str, Any], layer: int) -> Float[Tensor, "batch key head d"]:
    return repeat(acts[f"blocks.{layer}.kv.k"], "batch key kv d -> batch key (kv group) d", group=lens.cfg.n_groups)


def upcast_scores(lens: Lens, run: RecordedGradients, layer: int) -> Float[Tensor, "batch head query key"]:
    """The scores, exact enough for a softmax."""
    scores = run.values[f"blocks.{layer}.attn.scores"]
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def estimate_query_change(
    lens: Lens, run: RecordedGradients, source: Mapping[str, Any], layer: int, point: str
) -> Tensor:
    """(A' - A) · ∂m/∂A with the pattern A' of the other query (AtP*, section 3.1.1): [batch, query, head, one]."""
    slope, scores = run.gradients[f"blocks.{layer}.attn.pattern"], upcast_scores(lens, run, layer)
    moved = concatenate_query_channels(lens, source, layer) - concatenate_query_channels(lens, run.values, layer)
    change = einsum(moved, repeat_keys(lens, run.values, layer), QK_EINSUM) * lens.cfg.d_head**-0.5
    changed = ((scores + change).softmax(-1) - scores.softmax(-1)) * slope
    return rearrange(changed.sum(-1), "batch head query -> batch query head 1")


def estimate_key_change(
    lens: Lens, run: RecordedGradients, source: Mapping[str, Any], layer: int, point: str
) -> Tensor:
    """Σ over queries of (A' - A) · ∂m/∂A, A' the pattern with one other key (AtP*, section 3.1.2).

    A key moves one score by δ, so that A'ₖ = σ(sₖ + δ - log Σⱼ≠ₖ exp sⱼ), and the others share the rest of the
    attention as before: [batch, key, head, one].
    """
    slope, scores = run.gradients[f"blocks.{layer}.attn.pattern"], upcast_scores(lens, run, layer)
    moved = repeat_keys(lens, source, layer) - repeat_keys(lens, run.values, layer)
    delta = einsum(concatenate_query_channels(lens, run.values, layer), moved, QK_EINSUM) * lens.cfg.d_head**-0.5
    rest, others = leave_one_key_out(scores, slope)
    taken = (scores + delta - rest).sigmoid()
    before = (scores.softmax(-1) * slope).sum(-1, keepdim=True)
    change = taken * slope + (1 - taken) * others - before
    return rearrange(change.sum(2), "batch head key -> batch key head 1")


def leave_one_key_out(scores: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Of all keys but one, for every one: log Σ exp of their scores, and the mean of their slopes by attention."""
    top = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), True)
    grown = (scores - scores.amax(-1, keepdim=True)).exp()
    many = grown.sum(-1, keepdim=True) - grown  # at least 1, but without the largest, where it may cancel to 0
    rest = scores.amax(-1, keepdim=True) + many.log()
    others = ((grown * slope).sum(-1, keepdim=True) - grown * slope) / many
    without = scores.masked_fill(top, torch.finfo(scores.dtype).min)
    mean = (without.softmax(-1) * slope).sum(-1, keepdim=True)
    return torch.where(top, without.logsumexp(-1, keepdim=True), rest), torch.where(top, mean, others)


ATP_STAR_ESTIMATORS = {"attn.q": estimate_query_change, "kv.k": estimate_key_change}
