"""Which entries of a cache an operation is about, and when it holds."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from glmlens.errors import GlmlensError
from glmlens.hook_points import Point
from glmlens.hooks import Edit, Only, only
from glmlens.integers import Integers, read_integers
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens

Indices = Integers
"""Whole numbers from 0: of layers, of key-value heads, absolute positions, steps; None means all."""
HookList = list[tuple[str, Edit]]


class CacheError(GlmlensError, ValueError):
    """An operation on a cache that cannot mean what was asked; the message says what to type instead."""


@runtime_checkable
class Operation(Protocol):
    """What can be done to a cache, or to what a run recalls.

    The hooks hold at all steps or some; with own=False they leave what a step itself writes, so that those of one step
    do what the operation does to the cache before it.
    """

    def __call__(self, kv: KVCache) -> KVCache: ...
    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList: ...


@dataclass(frozen=True)
class CacheSelection:
    """Entries by layer, key-value head and absolute position; None means all."""

    layer: tuple[int, ...] | None = None
    kv: tuple[int, ...] | None = None
    position: tuple[int, ...] | None = None

    @staticmethod
    def from_indices(layer: Indices = None, kv: Indices = None, position: Indices = None) -> "CacheSelection":
        return CacheSelection(
            to_index_tuple(layer, "layer"), to_index_tuple(kv, "kv"), to_index_tuple(position, "position")
        )

    def mask_entries(self, positions: Int[Tensor, "batch key"]) -> Bool[Tensor, "batch key"]:
        """Where along the entries; padding is never meant."""
        if self.position is None:
            return positions >= 0
        return torch.isin(positions, torch.tensor(self.position, device=positions.device))

    def mask_heads(self, n_kv_heads: int, device: torch.device) -> Bool[Tensor, "kv"]:
        chosen = torch.ones(n_kv_heads, dtype=torch.bool, device=device)
        return chosen if self.kv is None else torch.isin(chosen.cumsum(0) - 1, torch.tensor(self.kv, device=device))

    def list_layers(self, n_layers: int, n_kv_heads: int) -> list[int]:
        """The layers meant; CacheError for a layer or head that is not there."""
        for axis, asked, size in (("layer", self.layer, n_layers), ("kv", self.kv, n_kv_heads)):
            if asked is not None and max(asked) >= size:
                raise CacheError(f"{axis} {max(asked)} asked for; there are {size}, 0 to {size - 1}")
        return list(range(n_layers)) if self.layer is None else list(self.layer)

    def check_entries_exist(self, kv: KVCache) -> None:
        """Raise CacheError for a position of which no row has an entry."""
        at = kv.positions[:, : kv.length]
        for position in self.position or ():
            if not bool((at == position).any()):
                raise CacheError(f"no entry at position {position}; there are {format_position_range(at)}")


def to_index_tuple(indices: Any, what: str) -> tuple[int, ...] | None:
    """The whole numbers asked for; CacheError for what is none, for none at all, and for one below 0."""
    if isinstance(indices, str):
        raise CacheError(
            f"{what} is {indices!r}: give whole numbers, 3 or [3, 5] or range(3, 9); those of a text are "
            f"cache.find(lens, kv, {indices!r})"
        )
    return None if indices is None else read_integers(indices, what, error=CacheError)


def format_position_range(positions: Int[Tensor, "batch key"]) -> str:
    """Where there are entries, for people."""
    there = positions[positions >= 0]
    return f"{int(there.min())} to {int(there.max())}" if len(there) else "none"


def count_past_entries(point: Point, own: bool) -> int:
    """How many entries, from the first, an operation is about: all that a step recalls, or without its `own`."""
    assert point.key_positions is not None
    assert point.positions is not None
    return point.key_positions.shape[1] - (0 if own else point.positions.shape[1])


@dataclass(frozen=True)
class RecalledEntriesEdit(Only):
    """An edit of all of a tensor, at the steps that recall an entry at one of its positions."""

    def select_positions(self, point: Point) -> Tensor | None:
        assert point.key_positions is not None
        if self.steps is not None and point.step not in self.steps:
            return None
        wanted = sorted(self.positions or ())
        there = torch.isin(point.key_positions, torch.tensor(wanted, device=point.key_positions.device))
        return there if self.positions is None or bool(there.any()) else None

    def merge(self, new: Tensor, x: Tensor, point: Point, where: Tensor | None) -> Tensor:
        return x if where is None else new


def restrict_edit(edit: Edit, steps: Indices, positions: Indices = None) -> Edit:
    """The edit at these steps and positions alone, so that a run that never comes to them says so."""
    return edit if steps is None and positions is None else only(edit, steps=steps, positions=positions)


def restrict_to_recalled(edit: Edit, steps: Indices, positions: Indices) -> Edit:
    """The edit, of a whole tensor, at these steps alone and where entries at these positions are recalled."""
    held = restrict_edit(edit, steps, positions)
    return RecalledEntriesEdit(edit, held.steps, held.positions) if isinstance(held, Only) else held
