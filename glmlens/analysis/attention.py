"""Attention patterns and scores, also of a model whose attention path never writes them down."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.lens import Lens
from glmlens.model import additive_mask, eager
from glmlens.recording.derive import capture_point

QueryPositions = Int[Tensor, "batch query"]
KeyPositions = Int[Tensor, "batch key"]
AttentionPattern = Float[Tensor, "batch head query key"]


def pattern_points(lens: Lens, which: str = "attn.pattern") -> list[str]:
    """The points from which `pattern` (or, of "attn.scores", `scores`) is had: itself, or what it is made of."""
    if lens.model.attention == "eager":
        return [which]
    return ["attn.q_rot", *(["attn.q_pass"] if lens.cfg.d_rotary < lens.cfg.d_head else []), "kv.k"]


def layer_pattern(
    acts: Mapping[str, Tensor], layer: int, positions: QueryPositions, key_positions: KeyPositions
) -> AttentionPattern:
    """The pattern of a layer: as recorded, or else made of the recorded queries and keys as `eager` makes it.

    `at` are the absolute positions of the queries that were recorded, and `key_at` of the keys: -1 at padding.
    """
    return derive_attention(acts, layer, positions, key_positions, "attn.pattern")


def layer_scores(
    acts: Mapping[str, Tensor], layer: int, positions: QueryPositions, key_positions: KeyPositions
) -> AttentionPattern:
    """The scores of a layer, before the softmax; see `pattern`."""
    return derive_attention(acts, layer, positions, key_positions, "attn.scores")


def derive_attention(
    acts: Mapping[str, Tensor], layer: int, positions: QueryPositions, key_positions: KeyPositions, which: str
) -> AttentionPattern:
    recorded = acts.get(f"blocks.{layer}.{which}")
    if recorded is not None:
        return recorded if recorded.ndim == 4 else recorded.unsqueeze(2)  # taken at one query
    parts = [acts.get(f"blocks.{layer}.{name}") for name in ("attn.q_rot", "attn.q_pass")]
    q = torch.cat([part for part in parts if part is not None], -1)
    q, k = q if q.ndim == 4 else q.unsqueeze(1), acts[f"blocks.{layer}.kv.k"]
    return capture_point(which, lambda hook: eager(q, k, k, additive_mask(positions, key_positions, q.dtype), hook))
