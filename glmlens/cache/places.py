"""Which entries of a cache an operation is about, and when it holds."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from glmlens.hooks import Edit, Only, Point, only
from glmlens.integers import Integers, read_integers
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens

Which = Integers
"""Whole numbers from 0: of layers, of key-value heads, absolute positions, steps; None means all."""
Edits = list[tuple[str, Edit]]


class CacheError(ValueError):
    """An operation on a cache that cannot mean what was asked; the message says what to type instead."""


@runtime_checkable
class Operation(Protocol):
    """What can be done to a cache, or to what a run recalls.

    The hooks hold at all steps or some; with own=False they leave what a step itself writes, so that those of one step
    do what the operation does to the cache before it.
    """

    def __call__(self, kv: KVCache) -> KVCache: ...
    def hooks(self, lens: Lens, *, steps: Which = None, own: bool = True) -> Edits: ...


@dataclass(frozen=True)
class Places:
    """Entries by layer, key-value head and absolute position; None means all."""

    layer: tuple[int, ...] | None = None
    kv: tuple[int, ...] | None = None
    position: tuple[int, ...] | None = None

    @staticmethod
    def at(layer: Which = None, kv: Which = None, position: Which = None) -> "Places":
        return Places(listed(layer, "layer"), listed(kv, "kv"), listed(position, "position"))

    def entries(self, positions: Int[Tensor, "batch key"]) -> Bool[Tensor, "batch key"]:
        """Where along the entries; padding is never meant."""
        if self.position is None:
            return positions >= 0
        return torch.isin(positions, torch.tensor(self.position, device=positions.device))

    def heads(self, n_kv_heads: int, device: torch.device) -> Bool[Tensor, "kv"]:
        chosen = torch.ones(n_kv_heads, dtype=torch.bool, device=device)
        return chosen if self.kv is None else torch.isin(chosen.cumsum(0) - 1, torch.tensor(self.kv, device=device))

    def layers(self, n_layers: int, n_kv_heads: int) -> list[int]:
        """The layers meant; CacheError for a layer or head that is not there."""
        for axis, asked, size in (("layer", self.layer, n_layers), ("kv", self.kv, n_kv_heads)):
            if asked is not None and max(asked) >= size:
                raise CacheError(f"{axis} {max(asked)} asked for; there are {size}, 0 to {size - 1}")
        return list(range(n_layers)) if self.layer is None else list(self.layer)

    def there(self, kv: KVCache) -> None:
        """Raise CacheError for a position of which no row has an entry."""
        at = kv.positions[:, : kv.length]
        for position in self.position or ():
            if not bool((at == position).any()):
                raise CacheError(f"no entry at position {position}; there are {entries_of(at)}")


def listed(asked: Any, what: str) -> tuple[int, ...] | None:
    """The whole numbers asked for; CacheError for what is none, for none at all, and for one below 0."""
    if isinstance(asked, str):
        raise CacheError(
            f"{what} is {asked!r}: give whole numbers, 3 or [3, 5] or range(3, 9); those of a text are "
            f"cache.find(lens, kv, {asked!r})"
        )
    return None if asked is None else read_integers(asked, what, error=CacheError)


def entries_of(at: Int[Tensor, "batch key"]) -> str:
    """Where there are entries, for people."""
    there = at[at >= 0]
    return f"{int(there.min())} to {int(there.max())}" if len(there) else "none"


def past_of(point: Point, own: bool) -> int:
    """How many entries, from the first, an operation is about: all that a step recalls, or without its `own`."""
    assert point.key_positions is not None
    assert point.positions is not None
    return point.key_positions.shape[1] - (0 if own else point.positions.shape[1])


@dataclass(frozen=True)
class Recalled(Only):
    """An edit of all of a tensor, at the steps that recall an entry at one of its positions."""

    def selects(self, point: Point) -> Tensor | None:
        assert point.key_positions is not None
        if self.steps is not None and point.step not in self.steps:
            return None
        wanted = sorted(self.positions or ())
        there = torch.isin(point.key_positions, torch.tensor(wanted, device=point.key_positions.device))
        return there if self.positions is None or bool(there.any()) else None

    def merged(self, new: Tensor, x: Tensor, point: Point, where: Tensor | None) -> Tensor:
        return x if where is None else new


def scheduled(edit: Edit, steps: Which, positions: Which = None) -> Edit:
    """The edit at these steps and positions alone, so that a run that never comes to them says so."""
    return edit if steps is None and positions is None else only(edit, steps=steps, positions=positions)


def recalled(edit: Edit, steps: Which, positions: Which) -> Edit:
    """The edit, of a whole tensor, at these steps alone and where entries at these positions are recalled."""
    held = scheduled(edit, steps, positions)
    return Recalled(edit, held.steps, held.positions) if isinstance(held, Only) else held
