"""Entries with other keys and values: edited, ablated, swapped between runs, rounded to few bits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.cache.selection import (
    CacheError,
    CacheSelection,
    HookList,
    Indices,
    count_past_entries,
    format_position_range,
    restrict_edit,
    to_index_tuple,
)
from glmlens.hook_points import Point
from glmlens.hooks import Edit
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens

EntryEdit = Callable[[Float[Tensor, "batch key kv d"], Int[Tensor, "batch key"], int], Tensor]
"""From the keys or values of a layer, the absolute positions of their entries and the layer's number to new ones."""


@dataclass(frozen=True)
class EditOperation:
    """New keys and values for some entries; see `edit`."""

    selection: CacheSelection
    keys: EntryEdit | None = None
    values: EntryEdit | None = None

    def __call__(self, kv: KVCache) -> KVCache:
        self.selection.check_entries_exist(kv)
        made, at = kv.fork(), kv.positions[:, : kv.length]
        for layer in self.selection.list_layers(kv.keys.shape[0], kv.keys.shape[3]):
            for memory, change in ((made.keys, self.keys), (made.values, self.values)):
                if change is not None:
                    now = memory[layer, :, : kv.length]
                    memory[layer, :, : kv.length] = self.apply_change(now, at, layer, change)
        return made

    def apply_change(self, x: Tensor, positions: Int[Tensor, "batch key"], layer: int, change: EntryEdit) -> Tensor:
        new: Any = change(x.clone(), positions, layer)
        if not isinstance(new, Tensor):
            raise CacheError(f"the edit returned {type(new).__name__}; expected a tensor of shape {tuple(x.shape)}")
        if (new.shape, new.dtype, new.device) != (x.shape, x.dtype, x.device):
            found, expected = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (new, x))
            raise CacheError(f"the edit returned {found}; expected {expected}")
        meant = self.selection.mask_entries(positions)[:, :, None] & self.selection.mask_heads(x.shape[2], x.device)
        return torch.where(meant.unsqueeze(-1), new, x)

    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList:
        """The same for what a run recalls, at some steps: its memory stays as it is. See `Operation` for `own`."""
        found: HookList = []
        steps = to_index_tuple(steps, "steps")
        for layer in self.selection.list_layers(lens.cfg.n_layers, lens.cfg.n_kv_heads):
            for point, change in (("kv.k", self.keys), ("kv.v", self.values)):
                if change is not None:
                    edit = restrict_edit(self.make_hook(layer, change, own), steps, self.selection.position)
                    found.append((f"blocks.{layer}.{point}", edit))
        return found

    def make_hook(self, layer: int, change: EntryEdit, own: bool) -> Edit:
        def recall(x: Tensor, point: Point) -> Tensor:
            assert point.key_positions is not None
            past = count_past_entries(point, own)
            new = self.apply_change(x[:, :past], point.key_positions[:, :past], layer, change) if past else x[:, :0]
            return torch.cat([new, x[:, past:]], 1)

        return recall


def edit(
    *,
    keys: EntryEdit | None = None,
    values: EntryEdit | None = None,
    layer: Indices = None,
    kv: Indices = None,
    position: Indices = None,
) -> EditOperation:
    """Give entries the keys and values that functions make of the present ones.

    `keys(x, positions, layer)` gets those of a whole layer [batch, key, kv, d] and returns as many; only the entries
    meant are taken over. Keys are as remembered, after they have turned.
    """
    if keys is None and values is None:
        raise CacheError("nothing to do: give keys= or values=, functions of (x, positions, layer)")
    return EditOperation(CacheSelection.from_indices(layer, kv, position), keys, values)


def ablate(*, how: str = "zero", layer: Indices = None, kv: Indices = None, position: Indices = None) -> EditOperation:
    """Make entries say nothing: "zero" values, or the "mean" of the row's values there are. Who attends stays."""
    if how not in ("zero", "mean"):
        raise CacheError(f"how is {how!r}; choose from 'zero', 'mean'")

    def change(x: Tensor, positions: Tensor, layer: int) -> Tensor:
        real = (positions >= 0)[:, :, None, None]
        mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return torch.zeros_like(x) if how == "zero" else mean.expand_as(x)

    return EditOperation(CacheSelection.from_indices(layer, kv, position), values=change)


def swap(other: KVCache, *, layer: Indices = None, kv: Indices = None, position: Indices = None) -> EditOperation:
    """Give entries the keys and values that another run has at the same position. CacheError where it has none."""

    def take_from(memory: Tensor) -> EntryEdit:
        def change(x: Tensor, at: Tensor, layer: int) -> Tensor:
            theirs, asked = other.positions[:, : other.length], places.mask_entries(at)
            if theirs.shape[0] != at.shape[0]:
                raise CacheError(f"the other cache has {theirs.shape[0]} rows, this one {at.shape[0]}")
            there = at[:, :, None] == theirs[:, None]
            if not bool(there.any(2)[asked].all()):
                raise CacheError(
                    f"the other cache has entries at {format_position_range(theirs)} alone: give position="
                )
            columns = there.int().argmax(2)[:, :, None, None].expand(x.shape)
            return memory[layer].gather(1, columns)

        return change

    places = CacheSelection.from_indices(layer, kv, position)
    return EditOperation(places, take_from(other.keys), take_from(other.values))


def quantise(
    bits: Integer = 8,
    *,
    keys: str | None = "channel",
    values: str | None = "token",
    group: Integer = 32,
    layer: Indices = None,
    kv: Indices = None,
    position: Indices = None,
) -> EditOperation:
    """Round to what `bits`-bit whole numbers can hold, exactly as if they had been stored so and read again.

    Asymmetric, per key-value head: round((x - min) / step) with step = (max - min) / (2^bits - 1), over the channels
    of a "token" or over a "channel" of `group` entries in a row (Liu et al. 2024, KIVI, arXiv 2402.02750, sections 2.1
    and 3: keys by channel, values by token). None leaves them alone. Groups are of the entries meant, counted from the
    first of each row, without padding; a last group that is not full is a group.
    """
    bits, group = (read_integer(n, what, error=CacheError) for n, what in ((bits, "bits"), (group, "group")))
    if bits not in range(1, 17) or group < 1:
        raise CacheError(f"bits is {bits}, group {group}; expected 1 to 16 bits and groups of at least 1 entry")
    for side in (keys, values):
        if side not in ("channel", "token", None):
            raise CacheError(f"numbers are rounded by 'channel' or by 'token', not by {side!r}")
    places = CacheSelection.from_indices(layer, kv, position)

    def by_token(x: Tensor, positions: Tensor, layer: int) -> Tensor:
        exact = upcast(x)
        return quantise_values(x, bits, exact.amin(3, keepdim=True), exact.amax(3, keepdim=True))

    def by_channel(x: Tensor, positions: Tensor, layer: int) -> Tensor:
        return quantise_values(x, bits, *find_group_ranges(upcast(x), places.mask_entries(positions), group))

    rules = {"token": by_token, "channel": by_channel, None: None}
    return EditOperation(places, rules[keys], rules[values])


def upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def find_group_ranges(x: Tensor, meant: Bool[Tensor, "batch key"], group: int) -> tuple[Tensor, Tensor]:
    """Of every entry and channel, the least and the largest number in its group of so many that are meant."""
    number = torch.where(meant, (meant.cumsum(1) - 1) // group + 1, 0)[:, :, None, None].expand(x.shape)
    room = x.new_zeros(x.shape[0], 2 + x.shape[1] // group, *x.shape[2:])
    sides = (room.scatter_reduce(1, number, x, how, include_self=False) for how in ("amin", "amax"))
    low, high = (side.gather(1, number) for side in sides)
    return low, high


def quantise_values(x: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """x as whole numbers from 0 to 2^bits - 1 hold it, from `low` to `high`, read again."""
    exact, step = upcast(x), (high - low) / (2**bits - 1)
    stored = ((exact - low) / torch.where(step > 0, step, 1)).round()
    return (stored * step + low).to(x.dtype)
