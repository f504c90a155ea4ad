"""Attribution patching: estimate what a sweep would measure, for every place at once, from gradients.

Nanda 2022 (Attribution patching: activation patching at industrial scale); its corrections for saturated attention and
for cancelling paths are AtP*, Kramár et al. 2024 (arXiv 2403.00745), section 3.1 and 3.2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.prompt_batch import upcast
from glmlens.hooks import Hooks
from glmlens.lens import Lens
from glmlens.patch.gradients import RecordedGradients, record_gradients
from glmlens.patch.metrics import Metric
from glmlens.patch.pairs import PromptPairs
from glmlens.patch.sites import PatchError, move_position_first, position_first_axes, repeat_kv
from glmlens.patch.sweep_axes import place_label
from glmlens.results import Labelled, list_axes
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

ATP_STAR_POINTS = {"attn.q": "queries", "kv.k": "keys"}
ATP_STAR_INPUTS = ("attn.q_rot", "attn.q_pass", "kv.k", "attn.scores")
SUBLAYER_OUTPUTS = ("attn_out", "mlp_out")
QK_EINSUM = "batch query head d, batch key head d -> batch head query key"

Estimator = Callable[[Hooks | None], Tensor]
"""From the hooks of one backward pass to estimates [example, layer, position, rest]."""


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
    """Estimate how the metric changes when the other run's value is put in at each place: Δvalue · gradient.

    `point` is a layer's, as "attn.z"; what `over` does not name is summed. "noise" changes the clean run, "denoise" the
    corrupt one. `method="atp*"` is for `attn.q` and `kv.k`: the attention pattern that the change would make is
    computed exactly, and the gradient is taken there (for `kv.k` over "head" by query head, over "kv" by group).
    `drop` is GradDrop: the mean magnitude over backward passes of which each leaves out one layer's contribution, so
    that effects that cancel are not missed. Values are means over pairs, in the metric's unit. Raise PatchError for a
    point or an axis that cannot be attributed.
    """
    over = list_axes(over)
    if len(set(over)) != len(over):
        raise PatchError(f"over {over}: one axis is there twice")
    if drop and lens.cfg.n_layers < 2:
        raise PatchError("GradDrop leaves one layer out of several: a model of one layer has no others, drop=False")
    pairs = PromptPairs.build(lens, clean, corrupt, metric).require_one_length()
    if direction not in ("noise", "denoise"):
        raise PatchError(f"direction is {direction!r}; choose 'noise' or 'denoise'")
    base, source = (pairs.clean, pairs.corrupt) if direction == "noise" else (pairs.corrupt, pairs.clean)
    if method not in ("atp", "atp*") or (method == "atp*" and point not in ATP_STAR_POINTS):
        raise PatchError(f"method is {method!r} at {point}; choose 'atp', or 'atp*' at {' or '.join(ATP_STAR_POINTS)}")
    star_keys = method == "atp*" and point == "kv.k"
    by_group = star_keys and "kv" in over
    axes = position_first_axes(point, by_query_head=star_keys)
    shown = ["layer", *("kv" if by_group and axis == "head" else axis for axis in axes[1:])]
    if set(over) - set(shown) or not is_layer_point(lens, point):
        raise PatchError(f"over {tuple(over)}: {point} has {', '.join(shown)}; a layer's point is attributed")
    if method == "atp*":
        estimate = atp_star(lens, base, source, pairs.metric, point, by_group=by_group)
    else:
        estimate = atp(lens, base, source, pairs.metric, point)

    def sum_axes(estimates: Tensor) -> Tensor:
        """Sum the axes that `over` does not name, the last first, so that the places of the others stay."""
        for i in [i for i, axis in enumerate(shown, 1) if axis not in over][::-1]:
            estimates = estimates.sum(i)
        return estimates

    values = grad_drop(estimate, lens, point, sum_axes) if drop else sum_axes(estimate(None))
    left = [axis for axis in shown if axis in over]
    values = values.mean(0).permute([left.index(axis) for axis in over])
    return label_estimate(
        lens, values, over, pairs.clean,
        metric=pairs.metric, point=point, direction=direction, method=method + (" with GradDrop" if drop else ""),
    )  # fmt: skip


def atp(
    lens: Lens, base: Int[Tensor, "example pos"], source: Int[Tensor, "example pos"], metric: Metric, point: str
) -> Estimator:
    """Return the estimator (a' - a) ⊙ ∂m/∂a at a point of every layer: a of the base run, a' of the source run."""
    names = [f"blocks.{i}.{point}" for i in range(lens.cfg.n_layers)]
    source_acts = record_sources(lens, source, names)

    def estimate(hooks: Hooks | None) -> Tensor:
        run = record_gradients(lens, base, metric, names, hooks, record_names=names)
        by_layer = [
            move_position_first(name, (source_acts[name] - run.values[name]) * run.gradients[name]) for name in names
        ]
        return torch.stack(by_layer, 1)

    return estimate


def atp_star(
    lens: Lens,
    base: Int[Tensor, "example pos"],
    source: Int[Tensor, "example pos"],
    metric: Metric,
    point: str,
    *,
    by_group: bool,
) -> Estimator:
    """Return the estimator through the exact change of the attention pattern, for queries or keys.

    `by_group` sums the query heads that read one key head. Raise PatchError where no pattern is computed.
    """
    if lens.model.attention != "eager":
        raise PatchError("'atp*' needs the pattern: load with attention='eager'")
    n_layers = lens.cfg.n_layers
    estimate_layer = estimate_query_change if point == "attn.q" else estimate_key_change
    patterns = [f"blocks.{i}.attn.pattern" for i in range(n_layers)]
    # Some models have no attn.q_pass: all channels of a query are rotated.
    available = {p.name for p in lens.points()}
    inputs = [f"blocks.{i}.{p}" for i in range(n_layers) for p in dict.fromkeys((*ATP_STAR_INPUTS, point))]
    inputs = [name for name in inputs if name in available]
    source_acts = record_sources(lens, source, inputs)

    def estimate(hooks: Hooks | None) -> Tensor:
        run = record_gradients(lens, base, metric, patterns, hooks, record_names=inputs)
        estimates = torch.stack([estimate_layer(lens, run, source_acts, i) for i in range(n_layers)], 1)
        if by_group:  # [example, layer, position, head, one] -> [example, layer, position, kv, one]
            estimates = estimates.unflatten(3, (-1, lens.cfg.n_groups)).sum(4)
        return estimates

    return estimate


def grad_drop(estimate: Estimator, lens: Lens, point: str, sum_axes: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean magnitude of summed estimates over backward passes that each leave out one layer.

    AtP*, section 3.2. The mean divides by the number of layers less one, since each layer is left out once.
    """
    total: Tensor | None = None
    for layer in range(lens.cfg.n_layers):
        estimates = estimate(detach_layer(layer))
        if point in SUBLAYER_OUTPUTS:
            # The point lies behind the detach: autograd still gives it a gradient, which this pass leaves out.
            estimates[:, layer] = 0
        # Axes are summed before the magnitude is taken: an effect is that of all the places summed.
        magnitudes = sum_axes(estimates).abs() / (lens.cfg.n_layers - 1)
        total = magnitudes if total is None else total + magnitudes
    assert total is not None
    return total


def detach_layer(layer: int) -> Hooks:
    """Return hooks under which no gradient passes through what a layer adds to the residual stream."""
    return [(f"blocks.{layer}.{local}", lambda x, point: x.detach()) for local in SUBLAYER_OUTPUTS]


def record_sources(lens: Lens, source: Int[Tensor, "example pos"], names: Sequence[str]) -> Mapping[str, Any]:
    """Run the source prompts once and record the points `names`."""
    return lens.run_with_cache(source, names, logits=False, attention_mask=torch.ones_like(source))[1]


def is_layer_point(lens: Lens, point: str) -> bool:
    """Whether this is the local name of a point that every layer has."""
    return any(p.local == point and p.layer is not None for p in lens.points())


def label_estimate(
    lens: Lens, values: Tensor, over: Sequence[str], clean: Tensor, *, metric: Metric, point: str, direction: str,
    method: str,
) -> Labelled:  # fmt: skip
    """Return the estimate with the labels that a sweep over the same places has."""
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


def concatenate_query_channels(acts: Mapping[str, Any], layer: int) -> Float[Tensor, "batch pos head d"]:
    """Return queries after rotary: the rotated channels, then the others."""
    names = [f"blocks.{layer}.{p}" for p in ("attn.q_rot", "attn.q_pass")]
    return torch.cat([acts[name] for name in names if name in acts], -1)


def repeat_keys(lens: Lens, acts: Mapping[str, Any], layer: int) -> Float[Tensor, "batch key head d"]:
    """Return the keys as every query head reads them."""
    return repeat_kv(acts[f"blocks.{layer}.kv.k"], lens.cfg.n_groups)


def upcast_scores(run: RecordedGradients, layer: int) -> Float[Tensor, "batch head query key"]:
    """Return the attention scores in at least float32."""
    return upcast(run.values[f"blocks.{layer}.attn.scores"])


def estimate_query_change(lens: Lens, run: RecordedGradients, source: Mapping[str, Any], layer: int) -> Tensor:
    """Return (A' - A) · ∂m/∂A, A' the pattern with the other query (AtP*, section 3.1.1): [batch, query, head, one]."""
    slope = run.gradients[f"blocks.{layer}.attn.pattern"]
    scores = upcast_scores(run, layer)
    moved = concatenate_query_channels(source, layer) - concatenate_query_channels(run.values, layer)
    change = einsum(moved, repeat_keys(lens, run.values, layer), QK_EINSUM) * lens.cfg.d_head**-0.5
    changed = ((scores + change).softmax(-1) - scores.softmax(-1)) * slope
    return rearrange(changed.sum(-1), "batch head query -> batch query head 1")


def estimate_key_change(lens: Lens, run: RecordedGradients, source: Mapping[str, Any], layer: int) -> Tensor:
    """Return Σ over queries of (A' - A) · ∂m/∂A, A' the pattern with one other key (AtP*, section 3.1.2).

    A key moves one score by δ, so that A'ₖ = σ(sₖ + δ - log Σⱼ≠ₖ exp sⱼ), and the others share the rest of the
    attention as before: [batch, key, head, one].
    """
    slope = run.gradients[f"blocks.{layer}.attn.pattern"]
    scores = upcast_scores(run, layer)
    moved = repeat_keys(lens, source, layer) - repeat_keys(lens, run.values, layer)
    delta = einsum(concatenate_query_channels(run.values, layer), moved, QK_EINSUM) * lens.cfg.d_head**-0.5
    rest, others = leave_one_key_out(scores, slope)
    taken = (scores + delta - rest).sigmoid()
    before = (scores.softmax(-1) * slope).sum(-1, keepdim=True)
    change = taken * slope + (1 - taken) * others - before
    return rearrange(change.sum(2), "batch head key -> batch key head 1")


def leave_one_key_out(scores: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every key, log Σ exp of the other keys' scores, and the mean of their slopes weighted by attention.

    Both are sums over all keys less the key itself. For the key with the largest score that difference may cancel to
    0, so for that one the others are summed anew.
    """
    top = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), True)
    grown = (scores - scores.amax(-1, keepdim=True)).exp()
    many = grown.sum(-1, keepdim=True) - grown  # at least 1, but for the largest itself
    rest = scores.amax(-1, keepdim=True) + many.log()
    others = ((grown * slope).sum(-1, keepdim=True) - grown * slope) / many
    without = scores.masked_fill(top, torch.finfo(scores.dtype).min)
    mean = (without.softmax(-1) * slope).sum(-1, keepdim=True)
    return torch.where(top, without.logsumexp(-1, keepdim=True), rest), torch.where(top, mean, others)
