"""Change keys and values of a KV cache: edit, ablate, swap between runs, quantise."""

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
from glmlens.dtypes import upcast
from glmlens.hook_points import Point
from glmlens.hooks import Edit
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens

EntryEdit = Callable[[Float[Tensor, "batch key kv d"], Int[Tensor, "batch key"], int], Tensor]
"""A function of a layer's keys or values, their absolute positions and the layer number that returns new ones."""


@dataclass(frozen=True)
class EditOperation:
    """Replace keys or values of some entries; see `edit`."""

    selection: CacheSelection
    keys: EntryEdit | None = None
    values: EntryEdit | None = None

    def __call__(self, kv: KVCache) -> KVCache:
        self.selection.check_entries_exist(kv)
        edited = kv.fork()
        positions = kv.positions[:, : kv.length]
        for layer in self.selection.list_layers(kv.keys.shape[0], kv.keys.shape[3]):
            for tensor, change in ((edited.keys, self.keys), (edited.values, self.values)):
                if change is not None:
                    present = tensor[layer, :, : kv.length]
                    tensor[layer, :, : kv.length] = self.apply_change(present, positions, layer, change)
        return edited

    def apply_change(self, x: Tensor, positions: Int[Tensor, "batch key"], layer: int, change: EntryEdit) -> Tensor:
        """Return `x` with the selected entries taken from `change`. Raise CacheError for a result that does not fit."""
        new: Any = change(x.clone(), positions, layer)
        if not isinstance(new, Tensor):
            raise CacheError(f"the edit returned {type(new).__name__}; expected a tensor of shape {tuple(x.shape)}")
        if (new.shape, new.dtype, new.device) != (x.shape, x.dtype, x.device):
            returned, expected = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (new, x))
            raise CacheError(f"the edit returned {returned}; expected {expected}")
        # The edit gets the whole layer; only the selected positions and heads of its result are used.
        at_positions = self.selection.mask_entries(positions)[:, :, None]
        selected = at_positions & self.selection.mask_heads(x.shape[2], x.device)
        return torch.where(selected.unsqueeze(-1), new, x)

    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList:
        """Return hooks that change the keys and values a run reads at some steps; the run's cache is not changed.

        See `Operation` for `own`.
        """
        hooks: HookList = []
        steps = to_index_tuple(steps, "steps")
        for layer in self.selection.list_layers(lens.cfg.n_layers, lens.cfg.n_kv_heads):
            for point, change in (("kv.k", self.keys), ("kv.v", self.values)):
                if change is not None:
                    edit = restrict_edit(self.make_hook(layer, change, own), steps, self.selection.position)
                    hooks.append((f"blocks.{layer}.{point}", edit))
        return hooks

    def make_hook(self, layer: int, change: EntryEdit, own: bool) -> Edit:
        """Return an edit of a layer's `kv.k` or `kv.v` that applies `change`."""

        def edit_recalled(x: Tensor, point: Point) -> Tensor:
            assert point.key_positions is not None
            past = count_past_entries(point, own)
            # Without past entries there is nothing to edit, and a mean over none would be nan.
            new = self.apply_change(x[:, :past], point.key_positions[:, :past], layer, change) if past else x[:, :0]
            return torch.cat([new, x[:, past:]], 1)

        return edit_recalled


def edit(
    *,
    keys: EntryEdit | None = None,
    values: EntryEdit | None = None,
    layer: Indices = None,
    kv: Indices = None,
    position: Indices = None,
) -> EditOperation:
    """Replace keys and values of some entries with the results of functions.

    `keys(x, positions, layer)` gets the keys of a whole layer [batch, key, kv, d] and returns as many; only those of
    the selected entries are used. Keys are as cached: already rotated to their position. Raises CacheError without a
    function.
    """
    if keys is None and values is None:
        raise CacheError("nothing to do: give keys= or values=, functions of (x, positions, layer)")
    return EditOperation(CacheSelection.from_indices(layer, kv, position), keys, values)


def ablate(*, how: str = "zero", layer: Indices = None, kv: Indices = None, position: Indices = None) -> EditOperation:
    """Replace the values of some entries by "zero", or by the "mean" of the row's values in that layer and head.

    Keys are not changed, so in the same layer attention stays the same.
    """
    if how not in ("zero", "mean"):
        raise CacheError(f"how is {how!r}; choose from 'zero', 'mean'")

    def change(x: Tensor, positions: Tensor, layer: int) -> Tensor:
        if how == "zero":
            return torch.zeros_like(x)
        is_entry = (positions >= 0)[:, :, None, None]  # padding does not count in the mean
        mean = (x * is_entry).sum(1, keepdim=True) / is_entry.sum(1, keepdim=True)
        return mean.expand_as(x)

    return EditOperation(CacheSelection.from_indices(layer, kv, position), values=change)


def swap(other: KVCache, *, layer: Indices = None, kv: Indices = None, position: Indices = None) -> EditOperation:
    """Replace entries by those of another run at the same positions. Raises CacheError where it has none."""
    selection = CacheSelection.from_indices(layer, kv, position)

    def take_from(tensor: Tensor) -> EntryEdit:
        def change(x: Tensor, positions: Tensor, layer: int) -> Tensor:
            other_positions = other.positions[:, : other.length]
            if other_positions.shape[0] != positions.shape[0]:
                raise CacheError(f"the other cache has {other_positions.shape[0]} rows, this one {positions.shape[0]}")
            same_position = positions[:, :, None] == other_positions[:, None]
            selected = selection.mask_entries(positions)
            if not bool(same_position.any(2)[selected].all()):
                raise CacheError(
                    f"the other cache has entries at {format_position_range(other_positions)} alone: give position="
                )
            # argmax of 0 and 1 is the first column of the other cache with the same position.
            columns = same_position.int().argmax(2)[:, :, None, None].expand(x.shape)
            return tensor[layer].gather(1, columns)

        return change

    return EditOperation(selection, take_from(other.keys), take_from(other.values))


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
    """Round keys and values to `bits` bits, exactly as if they were stored as such integers and read back.

    Asymmetric, per key-value head: round((x - min) / step) with step = (max - min) / (2^bits - 1). The minimum and
    maximum are over the channels of a "token", or over each "channel" of `group` entries in a row (Liu et al. 2024,
    KIVI, arXiv 2402.02750, sections 2.1 and 3: keys by channel, values by token). None leaves keys or values unchanged.
    Groups are of the selected entries, counted from the first of each row, without padding; the last group of a row may
    be smaller. Raises CacheError for bits outside 1 to 16, an empty group or another rule.
    """
    bits, group = (read_integer(n, what, error=CacheError) for n, what in ((bits, "bits"), (group, "group")))
    if bits not in range(1, 17) or group < 1:
        raise CacheError(f"bits is {bits}, group {group}; expected 1 to 16 bits and groups of at least 1 entry")
    for side in (keys, values):
        if side not in ("channel", "token", None):
            raise CacheError(f"numbers are rounded by 'channel' or by 'token', not by {side!r}")
    selection = CacheSelection.from_indices(layer, kv, position)

    def by_token(x: Tensor, positions: Tensor, layer: int) -> Tensor:
        exact = upcast(x)
        return quantise_values(x, bits, exact.amin(3, keepdim=True), exact.amax(3, keepdim=True))

    def by_channel(x: Tensor, positions: Tensor, layer: int) -> Tensor:
        low, high = find_group_ranges(upcast(x), selection.mask_entries(positions), group)
        return quantise_values(x, bits, low, high)

    rules = {"token": by_token, "channel": by_channel, None: None}
    return EditOperation(selection, rules[keys], rules[values])


def find_group_ranges(x: Tensor, selected: Bool[Tensor, "batch key"], group: int) -> tuple[Tensor, Tensor]:
    """Return the minimum and maximum of each number's group: `group` selected entries in a row, one channel."""
    # Number the groups of each row from 1; group 0 collects the entries that are not selected.
    number = torch.where(selected, (selected.cumsum(1) - 1) // group + 1, 0)[:, :, None, None].expand(x.shape)
    per_group = x.new_zeros(x.shape[0], 2 + x.shape[1] // group, *x.shape[2:])
    ranges = (per_group.scatter_reduce(1, number, x, how, include_self=False) for how in ("amin", "amax"))
    low, high = (values.gather(1, number) for values in ranges)  # back from groups to entries
    return low, high


def quantise_values(x: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """Return `x` rounded to the nearest of 2^bits evenly spaced values from `low` to `high`, in x's dtype."""
    step = (high - low) / (2**bits - 1)
    stored = ((upcast(x) - low) / torch.where(step > 0, step, 1)).round()  # all alike: step 0, stored as 0
    return (stored * step + low).to(x.dtype)
