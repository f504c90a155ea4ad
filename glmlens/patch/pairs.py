"""Pairs of a clean and a corrupt prompt of the same length, and what is measured of them."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from glmlens.lens import Lens
from glmlens.patch.evaluate import describe_length_mismatch, of_task
from glmlens.patch.metrics import Metric, as_metric
from glmlens.patch.sites import PatchError
from glmlens.patch.values import to_token_ids


def prepare_pairs(
    lens: Lens, clean: Any, corrupt: Any, metric: Any
) -> tuple[Int[Tensor, "example pos"], Int[Tensor, "example pos"], Metric]:
    """Pairs of one length as tokens, and what to measure; PatchError for several lengths."""
    clean, corrupt, metric, _ = of_task(clean, corrupt, metric, ())
    if corrupt is None:
        raise PatchError("no corrupt prompts: give one for every clean one")
    one, other = to_token_ids(lens, clean), to_token_ids(lens, corrupt)
    if len(one) != len(other):
        raise PatchError(f"{len(one)} clean and {len(other)} corrupt prompts: they are compared in pairs")
    for a, b in zip(one, other, strict=True):
        if len(a) != len(b):
            raise PatchError(describe_length_mismatch(lens, a, b))
    if len(set(map(len, one))) > 1:
        raise PatchError(
            f"prompts of {sorted(set(map(len, one)))} tokens: take one length, as examples.of_length() does"
        )
    rows = (torch.tensor(row, device=lens.device) for row in (one, other))
    return *rows, as_metric(metric, lens, len(one))  # type: ignore[return-value]
