"""Values and gradients of named tensors in one forward and one backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.hooks import Hooks, Point, pairs
from glmlens.lens import Lens
from glmlens.patch.metrics import Metric


@dataclass(frozen=True)
class Gradients:
    """What a run had at named points, and how its summed metric changes with it; `metric` is per example."""

    values: dict[str, Tensor]
    slopes: dict[str, Tensor]
    metric: Float[Tensor, "example"]


def gradients(
    lens: Lens,
    tokens: Int[Tensor, "example pos"],
    metric: Metric,
    names: Sequence[str],
    hooks: Hooks | None = None,
    also: Sequence[str] = (),
    cut: bool = False,
) -> Gradients:
    """Run with a backward pass to the points `names`; `also` are recorded without their gradient.

    With `cut`, hooks may have cut the graph, and the gradient of what no longer leads to the metric is 0.
    """
    last = None if metric.everywhere else 1
    leaf: dict[str, Tensor] = {}

    def embed(x: Tensor, point: Point) -> Tensor:
        """The parameters are frozen: a graph begins where something asks for a gradient."""
        leaf["embed"] = x.detach().requires_grad_()
        return leaf["embed"]

    recorded = [name for name in dict.fromkeys((*names, *also)) if name != "embed"]
    with torch.enable_grad():
        logits, acts = lens.run_with_cache(tokens, recorded, [*pairs(hooks), ("embed", embed)], logits_to_keep=last)
        assert logits is not None
        read = logits if metric.columns is None else logits[..., metric.columns]
        measured = metric(read, torch.arange(len(tokens), device=tokens.device))
        found = {**leaf, **{name: acts[name] for name in recorded}}
        wanted = [found[name] if found[name].requires_grad or not cut else zero_slope(found[name]) for name in names]
        slopes = torch.autograd.grad(measured.sum(), wanted, allow_unused=cut, materialize_grads=cut)
    values = {name: x.detach() for name, x in found.items()}
    return Gradients(values, dict(zip(names, slopes, strict=True)), measured.detach())


def zero_slope(x: Tensor) -> Tensor:
    """A stand-in for what was detached, which leads nowhere."""
    return x.detach().requires_grad_()
