"""Entries at other positions: their keys are remembered after they have turned, so they turn on by the difference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.angles import frequencies, turned_on
from glmlens.cache.places import CacheError, Edits, Places, Which, entries_of, past_of, scheduled
from glmlens.config import GLMConfig
from glmlens.hooks import Point
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache, stood
from glmlens.lens import Lens


@dataclass(frozen=True)
class Moved:
    """Keys turned to other positions; see `reposition`."""

    cfg: GLMConfig
    to: Callable[[Int[Tensor, "batch key"]], Int[Tensor, "batch key"]]
    places: Places

    def __call__(self, kv: KVCache) -> KVCache:
        self.places.there(kv)
        made, at = kv.fork(), stood(kv.positions[:, : kv.length])
        new = self.moved(at)
        for layer in range(kv.keys.shape[0]):
            made.keys[layer, :, : kv.length] = self.turned(kv.keys[layer, :, : kv.length], at, new)
        made.positions[:, : kv.length] = torch.where(kv.positions[:, : kv.length] < -1, -2 - new, new)
        return made

    def moved(self, at: Int[Tensor, "batch key"]) -> Int[Tensor, "batch key"]:
        """Where entries come to stand."""
        new = torch.where(at >= 0, self.to(at), at)
        if bool(((new < 0) & (at >= 0)).any()):
            raise CacheError(f"entries would come to stand before position 0; they are at {entries_of(at)}")
        return new

    def turned(self, k: Float[Tensor, "batch key kv d"], at: Tensor, new: Tensor) -> Tensor:
        """Keys that stand at other positions: the rotated channels turn on by the difference of the angles."""
        exact = torch.promote_types(k.dtype, torch.float32)
        exact = exact if k.device.type == "mps" else torch.float64  # a difference of large angles loses digits
        angle = (new - at).to(exact)[:, :, None] * frequencies(self.cfg, exact, k.device)
        still = torch.ones_like(angle), torch.zeros_like(angle)
        turned = turned_on(k[..., : self.cfg.d_rotary], still, (angle.cos(), angle.sin()))
        return torch.cat([turned, k[..., self.cfg.d_rotary :]], -1)

    def hooks(self, lens: Lens, *, steps: Which = None, own: bool = True) -> Edits:
        """The same for the keys that a run recalls. See `Operation` for `own`.

        Whom a query may see, and where it stands itself, stays as it was: moving all entries alike, which changes
        nothing in a cache, moves them away from it here.
        """

        def recall(x: Tensor, point: Point) -> Tensor:
            past = past_of(point, own)
            assert point.key_positions is not None
            at = point.key_positions[:, :past]
            return torch.cat([self.turned(x[:, :past], at, self.moved(at)), x[:, past:]], 1)

        edit = scheduled(recall, steps, self.places.position)
        return [(f"blocks.{layer}.kv.k", edit) for layer in range(self.cfg.n_layers)]


def reposition(
    lens: Lens, by: Integer | None = None, *, position: Which = None, to: Callable[[Tensor], Tensor] | None = None
) -> Moved:
    """Move entries by so many positions: all, or those at `position`; or `to(positions)`, any function of them.

    Keys are remembered after they have turned, so they turn on by the difference.
    """
    if (by is None) == (to is None):
        raise CacheError("give by=, how far to move, or to=, a function from positions to positions")
    if to is not None:
        return Moved(lens.cfg, to, Places())
    places, far = Places.at(position=position), read_integer(by, "by", error=CacheError)
    return Moved(lens.cfg, lambda at: torch.where(places.entries(at), at + far, at), places)


def close_up(lens: Lens) -> Moved:
    """Move entries together so that no position between them is free, as StreamingLLM counts positions inside its cache
    (Xiao et al. 2023, arXiv 2309.17453, section 3.2)."""

    def to(at: Tensor) -> Tensor:
        real = torch.where(at >= 0, at, torch.iinfo(at.dtype).max)
        return real.argsort(1).argsort(1)

    return Moved(lens.cfg, to, Places())
