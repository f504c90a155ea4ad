"""Values and gradients of named tensors in one forward and one backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.hooks import Hooks
from glmlens.lens import Lens
from glmlens.patch.metrics import Metric


@dataclass(frozen=True)
class RecordedGradients:
    """What a run had at named points, and how its summed metric changes with it; `metric` is per example."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    metric: Float[Tensor, "example"]


def record_gradients(
    lens: Lens,
    tokens: Int[Tensor, "example pos"],
    metric: Metric,
    names: Sequence[str],
    hooks: Hooks | None = None,
    record_names: Sequence[str] = (),
) -> RecordedGradients:
    """Run with a backward pass to the points `names`, whose gradient is 0 where hooks cut the graph; `also` record."""
    found: list[Tensor] = []

    def measure_once(logits: Tensor) -> Tensor:
        # With logits_to_keep=1 there is one position already, and selecting the last leaves it.
        found.append(metric.measure(logits, torch.arange(len(tokens), device=tokens.device)))
        return found[0]

    last, asked = None if metric.everywhere else 1, list(dict.fromkeys((*names, *record_names)))
    every = torch.ones_like(tokens)  # prompts of one length
    _, acts = lens.run_with_cache(
        tokens, asked, hooks, gradients_of=measure_once, logits_to_keep=last, attention_mask=every
    )
    return RecordedGradients(dict(acts), {name: acts.gradients[name] for name in names}, found[0].detach())
