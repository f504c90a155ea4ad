"""Record values and gradients of named tensors in one forward and one backward pass."""

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
    """Values of a run at named points, gradients of its summed metric there, and the metric per example."""

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
    """Run forward and backward; return values and gradients at `names`, and values alone at `record_names`.

    The gradient is 0 at a point from which hooks let none pass to the metric. Tokens are of one length.
    """
    measured: list[Tensor] = []

    def measure_once(logits: Tensor) -> Tensor:
        # With logits_to_keep=1 there is one position already, and selecting the last leaves it.
        measured.append(metric.measure(logits, torch.arange(len(tokens), device=tokens.device)))
        return measured[0]

    recorded = list(dict.fromkeys((*names, *record_names)))
    _, acts = lens.run_with_cache(
        tokens,
        recorded,
        hooks,
        gradients_of=measure_once,
        logits_to_keep=None if metric.everywhere else 1,
        attention_mask=torch.ones_like(tokens),
    )
    gradients = {name: acts.gradients[name] for name in names}
    return RecordedGradients(values=dict(acts), gradients=gradients, metric=measured[0].detach())
