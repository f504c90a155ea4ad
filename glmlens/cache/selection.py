"""Select entries of a KV cache by layer, key-value head and absolute position, and limit hooks to them."""

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
"""Whole numbers from 0: layers, key-value heads, absolute positions or steps; None means all."""
HookList = list[tuple[str, Edit]]


class CacheError(GlmlensError, ValueError):
    """An operation on a cache that is not possible; the message gives what to type instead."""


@runtime_checkable
class Operation(Protocol):
    """An operation on a cache: call it to get a new cache, or take its hooks to edit the entries that a run reads.

    The hooks apply at all steps or at some. With own=False they leave the entries that a step itself writes: each step
    then reads what it would read from the cache on which the operation was done before that step.
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
        """Return the selection of these layers, key-value heads and positions; see `to_index_tuple` for errors."""
        return CacheSelection(
            layer=to_index_tuple(layer, "layer"),
            kv=to_index_tuple(kv, "kv"),
            position=to_index_tuple(position, "position"),
        )

    def mask_entries(self, positions: Int[Tensor, "batch key"]) -> Bool[Tensor, "batch key"]:
        """Return which entries are selected by position; padding (position -1) never is."""
        if self.position is None:
            return positions >= 0
        return torch.isin(positions, torch.tensor(self.position, device=positions.device))

    def mask_heads(self, n_kv_heads: int, device: torch.device) -> Bool[Tensor, "kv"]:
        """Return which key-value heads are selected."""
        every_head = torch.ones(n_kv_heads, dtype=torch.bool, device=device)
        if self.kv is None:
            return every_head
        head_numbers = every_head.cumsum(0) - 1
        return torch.isin(head_numbers, torch.tensor(self.kv, device=device))

    def list_layers(self, n_layers: int, n_kv_heads: int) -> list[int]:
        """Return the selected layers. Raise CacheError for a layer or key-value head that the model does not have."""
        for axis, selected, size in (("layer", self.layer, n_layers), ("kv", self.kv, n_kv_heads)):
            if selected is not None and max(selected) >= size:
                raise CacheError(f"{axis} {max(selected)} asked for; there are {size}, 0 to {size - 1}")
        return list(range(n_layers)) if self.layer is None else list(self.layer)

    def check_entries_exist(self, kv: KVCache) -> None:
        """Raise CacheError for a selected position at which no row has an entry."""
        positions = kv.positions[:, : kv.length]
        for position in self.position or ():
            if not bool((positions == position).any()):
                raise CacheError(f"no entry at position {position}; there are {format_position_range(positions)}")


def to_index_tuple(indices: Any, what: str) -> tuple[int, ...] | None:
    """Return whole numbers as a tuple, None as None. Raise CacheError for anything else, none at all or one below 0."""
    if isinstance(indices, str):
        raise CacheError(
            f"{what} is {indices!r}: give whole numbers, 3 or [3, 5] or range(3, 9); the positions of a text are "
            f"cache.find_entries(lens, kv, {indices!r})"
        )
    return None if indices is None else read_integers(indices, what, error=CacheError)


def token_label(lens: Lens, token: int) -> str:
    """Return the label of a token id, or "⟨id⟩" without a tokenizer and for an id that is unknown (-1)."""
    return lens.tokenizer.label(token) if lens.tokenizer and token >= 0 else f"⟨{token}⟩"


def format_position_range(positions: Int[Tensor, "batch key"]) -> str:
    """Return the range of positions with entries as text: "0 to 8", or "none"."""
    real = positions[positions >= 0]
    return f"{int(real.min())} to {int(real.max())}" if len(real) else "none"


def count_past_entries(point: Point, own: bool) -> int:
    """Return how many entries, from the first, an operation edits: all that a step reads, or without its `own`."""
    assert point.key_positions is not None
    assert point.positions is not None
    written_by_this_step = point.positions.shape[1]
    return point.key_positions.shape[1] - (0 if own else written_by_this_step)


@dataclass(frozen=True)
class RecalledEntriesEdit(Only):
    """An edit of a whole tensor, applied only at steps that read an entry at one of `positions`.

    `Only` restricts an edit to query positions at points with a query axis. Here `positions` are those of keys, and the
    result is never merged with the tensor before the edit.
    """

    def select_positions(self, point: Point) -> Tensor | None:
        """Return which keys are at `positions`, or None at a step that is not asked for or reads none of them."""
        assert point.key_positions is not None
        if self.steps is not None and point.step not in self.steps:
            return None
        wanted = torch.tensor(sorted(self.positions or ()), device=point.key_positions.device)
        selected = torch.isin(point.key_positions, wanted)
        return selected if self.positions is None or bool(selected.any()) else None

    def merge(self, new: Tensor, x: Tensor, point: Point, where: Tensor | None) -> Tensor:
        """Return all of `new` where the edit applies, else `x`."""
        return x if where is None else new


def restrict_edit(edit: Edit, steps: Indices, positions: Indices = None) -> Edit:
    """Return the edit at these steps and positions only. A run that never reaches them is then a HookError."""
    return edit if steps is None and positions is None else only(edit, steps=steps, positions=positions)


def restrict_to_recalled(edit: Edit, steps: Indices, positions: Indices) -> Edit:
    """Return an edit of a whole tensor at these steps only, and only where entries at these positions are read."""
    restricted = restrict_edit(edit, steps, positions)
    if not isinstance(restricted, Only):
        return restricted
    return RecalledEntriesEdit(edit, restricted.steps, restricted.positions)
