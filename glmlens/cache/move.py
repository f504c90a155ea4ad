"""Entries at other positions: their keys are remembered after they have turned, so they turn on by the difference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.cache.selection import (
    CacheError,
    CacheSelection,
    HookList,
    Indices,
    count_past_entries,
    format_position_range,
    restrict_edit,
)
from glmlens.config import GLMConfig
from glmlens.hook_points import Point
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache, unmask_positions
from glmlens.lens import Lens
from glmlens.rotary_rules import compute_pair_frequencies, rerotate_channels


@dataclass(frozen=True)
class RepositionOperation:
    """Keys turned to other positions; see `reposition`."""

    cfg: GLMConfig
    to: Callable[[Int[Tensor, "batch key"]], Int[Tensor, "batch key"]]
    selection: CacheSelection

    def __call__(self, kv: KVCache) -> KVCache:
        self.selection.check_entries_exist(kv)
        made, at = kv.fork(), unmask_positions(kv.positions[:, : kv.length])
        new = self.compute_positions(at)
        for layer in range(kv.keys.shape[0]):
            made.keys[layer, :, : kv.length] = self.rotate_keys(kv.keys[layer, :, : kv.length], at, new)
        made.positions[:, : kv.length] = torch.where(kv.positions[:, : kv.length] < -1, -2 - new, new)
        return made

    def compute_positions(self, positions: Int[Tensor, "batch key"]) -> Int[Tensor, "batch key"]:
        """Where entries come to stand."""
        new = torch.where(positions >= 0, self.to(positions), positions)
        if bool(((new < 0) & (positions >= 0)).any()):
            raise CacheError(
                f"entries would come to stand before position 0; they are at {format_position_range(positions)}"
            )
        return new

    def rotate_keys(self, k: Float[Tensor, "batch key kv d"], old_positions: Tensor, new_positions: Tensor) -> Tensor:
        """Keys that stand at other positions: the rotated channels turn on by the difference of the angles."""
        exact = torch.promote_types(k.dtype, torch.float32)
        exact = exact if k.device.type == "mps" else torch.float64  # a difference of large angles loses digits
        angle = (new_positions - old_positions).to(exact)[:, :, None] * compute_pair_frequencies(
            self.cfg, exact, k.device
        )
        still = torch.ones_like(angle), torch.zeros_like(angle)
        turned = rerotate_channels(k[..., : self.cfg.d_rotary], still, (angle.cos(), angle.sin()))
        return torch.cat([turned, k[..., self.cfg.d_rotary :]], -1)

    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList:
        """The same for the keys that a run recalls. See `Operation` for `own`.

        Whom a query may see, and where it stands itself, stays as it was: moving all entries alike, which changes
        nothing in a cache, moves them away from it here.
        """

        def recall(x: Tensor, point: Point) -> Tensor:
            past = count_past_entries(point, own)
            assert point.key_positions is not None
            at = point.key_positions[:, :past]
            return torch.cat([self.rotate_keys(x[:, :past], at, self.compute_positions(at)), x[:, past:]], 1)

        edit = restrict_edit(recall, steps, self.selection.position)
        return [(f"blocks.{layer}.kv.k", edit) for layer in range(self.cfg.n_layers)]


def reposition(
    lens: Lens, by: Integer | None = None, *, position: Indices = None, to: Callable[[Tensor], Tensor] | None = None
) -> RepositionOperation:
    """Move entries by so many positions: all, or those at `position`; or `to(positions)`, any function of them.

    Keys are remembered after they have turned, so they turn on by the difference.
    """
    if (by is None) == (to is None):
        raise CacheError("give by=, how far to move, or to=, a function from positions to positions")
    if to is not None:
        return RepositionOperation(lens.cfg, to, CacheSelection())
    places, far = CacheSelection.from_indices(position=position), read_integer(by, "by", error=CacheError)
    return RepositionOperation(lens.cfg, lambda at: torch.where(places.mask_entries(at), at + far, at), places)


def close_gaps(lens: Lens) -> RepositionOperation:
    """Move entries together so that no position between them is free, as StreamingLLM counts positions inside its cache
    (Xiao et al. 2023, arXiv 2309.17453, section 3.2)."""

    def compute_closed_positions(positions: Tensor) -> Tensor:
        real = torch.where(positions >= 0, positions, torch.iinfo(positions.dtype).max)
        return real.argsort(1).argsort(1)

    return RepositionOperation(lens.cfg, compute_closed_positions, CacheSelection())
