"""Attention patterns and scores, also of a model with attention="sdpa", which does not compute them."""

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
    """Return the points to record for `layer_pattern` ("attn.pattern") or `layer_scores` ("attn.scores").

    With attention="eager" that is the point itself, else the queries and keys it is computed from.
    """
    if lens.model.attention == "eager":
        return [which]
    return ["attn.q_rot", *(["attn.q_pass"] if lens.cfg.d_rotary < lens.cfg.d_head else []), "kv.k"]


def layer_pattern(
    acts: Mapping[str, Tensor], layer: int, positions: QueryPositions, key_positions: KeyPositions
) -> AttentionPattern:
    """Return a layer's attention pattern: as recorded, or computed from the recorded queries and keys by `eager`.

    `positions` are the absolute positions of the recorded queries, `key_positions` those of the keys: -1 at padding.
    """
    return derive_attention(acts, layer, positions, key_positions, "attn.pattern")


def layer_scores(
    acts: Mapping[str, Tensor], layer: int, positions: QueryPositions, key_positions: KeyPositions
) -> AttentionPattern:
    """Return a layer's attention scores, before the softmax; see `layer_pattern`."""
    return derive_attention(acts, layer, positions, key_positions, "attn.scores")


def derive_attention(
    acts: Mapping[str, Tensor], layer: int, positions: QueryPositions, key_positions: KeyPositions, which: str
) -> AttentionPattern:
    """Return the point `which` of a layer, recorded or recomputed; see `layer_pattern`."""
    recorded = acts.get(f"blocks.{layer}.{which}")
    if recorded is not None:
        return recorded if recorded.ndim == 4 else recorded.unsqueeze(2)  # recorded at one query: no query axis
    channels = [acts.get(f"blocks.{layer}.{name}") for name in ("attn.q_rot", "attn.q_pass")]
    q = torch.cat([x for x in channels if x is not None], -1)  # no q_pass where all channels are rotated
    if q.ndim == 3:
        q = q.unsqueeze(1)
    k = acts[f"blocks.{layer}.kv.k"]
    mask = additive_mask(positions, key_positions, q.dtype)
    # Neither point depends on values, so keys stand in for them.
    return capture_point(which, lambda hook: eager(q, k, k, mask, hook))
