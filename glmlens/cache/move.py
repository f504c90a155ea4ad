"""Move cached entries to other positions: keys are cached after rotation, so they rotate on by the difference."""

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
from glmlens.dtypes import at_least_float32
from glmlens.hook_points import Point
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache, unmask_positions
from glmlens.lens import Lens
from glmlens.rotary_rules import compute_pair_frequencies, rerotate_channels


@dataclass(frozen=True)
class RepositionOperation:
    """Rotate cached keys to other positions; see `reposition`."""

    cfg: GLMConfig
    to: Callable[[Int[Tensor, "batch key"]], Int[Tensor, "batch key"]]
    selection: CacheSelection

    def __call__(self, kv: KVCache) -> KVCache:
        self.selection.check_entries_exist(kv)
        moved = kv.fork()
        positions = unmask_positions(kv.positions[:, : kv.length])
        new = self.compute_positions(positions)
        for layer in range(kv.keys.shape[0]):
            moved.keys[layer, :, : kv.length] = self.rotate_keys(kv.keys[layer, :, : kv.length], positions, new)
        # An evicted newest entry (stored as -2 - position) moves too, and stays evicted.
        moved.positions[:, : kv.length] = torch.where(kv.positions[:, : kv.length] < -1, -2 - new, new)
        return moved

    def compute_positions(self, positions: Int[Tensor, "batch key"]) -> Int[Tensor, "batch key"]:
        """Return the new positions. Raise CacheError for one below 0; padding stays -1."""
        new = torch.where(positions >= 0, self.to(positions), positions)
        if bool(((new < 0) & (positions >= 0)).any()):
            raise CacheError(f"entries would move to before position 0; they are at {format_position_range(positions)}")
        return new

    def rotate_keys(self, k: Float[Tensor, "batch key kv d"], old_positions: Tensor, new_positions: Tensor) -> Tensor:
        """Return keys rotated from their old positions to the new ones; the channels without rotary stay."""
        # In float64 where the device has it: angles are large, and float32 would lose digits of their cosine.
        dtype = at_least_float32(k.dtype) if k.device.type == "mps" else torch.float64
        frequencies = compute_pair_frequencies(self.cfg, dtype, k.device)
        angle = (new_positions - old_positions).to(dtype)[:, :, None] * frequencies
        no_rotation = torch.ones_like(angle), torch.zeros_like(angle)  # cos and sin of 0
        rotated = rerotate_channels(k[..., : self.cfg.d_rotary], no_rotation, (angle.cos(), angle.sin()))
        return torch.cat([rotated, k[..., self.cfg.d_rotary :]], -1)

    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList:
        """Return hooks that rotate the keys a run reads. See `Operation` for `own`.

        The positions of queries, and which keys they may see, do not change: a shift of all entries alike, which in a
        cache changes no score, here moves the keys away from the queries.
        """

        def rotate_recalled(x: Tensor, point: Point) -> Tensor:
            past = count_past_entries(point, own)
            assert point.key_positions is not None
            positions = point.key_positions[:, :past]
            rotated = self.rotate_keys(x[:, :past], positions, self.compute_positions(positions))
            return torch.cat([rotated, x[:, past:]], 1)

        edit = restrict_edit(rotate_recalled, steps, self.selection.position)
        return [(f"blocks.{layer}.kv.k", edit) for layer in range(self.cfg.n_layers)]


def reposition(
    lens: Lens, by: Integer | None = None, *, position: Indices = None, to: Callable[[Tensor], Tensor] | None = None
) -> RepositionOperation:
    """Move entries `by` a number of positions (all, or those at `position`), or to `to(positions)`.

    `to` is any function of positions [batch, key]. Keys are cached after rotation, so they rotate on by the difference.
    Raises CacheError unless exactly one of `by` and `to` is given.
    """
    if (by is None) == (to is None):
        raise CacheError("give by=, how far to move, or to=, a function from positions to positions")
    if to is not None:
        return RepositionOperation(lens.cfg, to, CacheSelection())
    selection = CacheSelection.from_indices(position=position)
    distance = read_integer(by, "by", error=CacheError)

    def shift_selected(positions: Tensor) -> Tensor:
        return torch.where(selection.mask_entries(positions), positions + distance, positions)

    return RepositionOperation(lens.cfg, shift_selected, selection)


def close_gaps(lens: Lens) -> RepositionOperation:
    """Move the entries of every row to positions 0, 1, 2, ..., as StreamingLLM counts positions inside its cache.

    Xiao et al. 2023, arXiv 2309.17453, section 3.2.
    """

    def compute_closed_positions(positions: Tensor) -> Tensor:
        padding_last = torch.where(positions >= 0, positions, torch.iinfo(positions.dtype).max)
        return padding_last.argsort(1).argsort(1)  # the rank of each position in its row

    return RepositionOperation(lens.cfg, compute_closed_positions, CacheSelection())
