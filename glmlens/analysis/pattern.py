"""Attention patterns and scores, also of a model whose attention path never writes them down."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.derive import caught
from glmlens.lens import Lens
from glmlens.model import additive_mask, eager

Queries = Int[Tensor, "batch query"]
Keys = Int[Tensor, "batch key"]
Pattern = Float[Tensor, "batch head query key"]


def pattern_points(lens: Lens, which: str = "attn.pattern") -> list[str]:
    """The points from which `pattern` (or, of "attn.scores", `scores`) is had: itself, or what it is made of."""
    if lens.model.attention == "eager":
        return [which]
    return ["attn.q_rot", *(["attn.q_pass"] if lens.cfg.d_rotary < lens.cfg.d_head else []), "kv.k"]


def pattern(acts: Mapping[str, Tensor], layer: int, at: Queries, key_at: Keys) -> Pattern:
    """The pattern of a layer: as recorded, or else made of the recorded queries and keys as `eager` makes it.

    `at` are the absolute positions of the queries that were recorded, and `key_at` of the keys: -1 at padding.
    """
    return attention(acts, layer, at, key_at, "attn.pattern")


def scores(acts: Mapping[str, Tensor], layer: int, at: Queries, key_at: Keys) -> Pattern:
    """The scores of a layer, before the softmax; see `pattern`."""
    return attention(acts, layer, at, key_at, "attn.scores")


def attention(acts: Mapping[str, Tensor], layer: int, at: Queries, key_at: Keys, which: str) -> Pattern:
    recorded = acts.get(f"blocks.{layer}.{which}")
    if recorded is not None:
        return recorded if recorded.ndim == 4 else recorded.unsqueeze(2)  # taken at one query
    parts = [acts.get(f"blocks.{layer}.{name}") for name in ("attn.q_rot", "attn.q_pass")]
    q = torch.cat([part for part in parts if part is not None], -1)
    q, k = q if q.ndim == 4 else q.unsqueeze(1), acts[f"blocks.{layer}.kv.k"]
    return caught(which, lambda hook: eager(q, k, k, additive_mask(at, key_at, q.dtype), hook))
