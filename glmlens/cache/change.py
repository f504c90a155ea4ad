"""Entries with other keys and values: edited, ablated, swapped between runs, rounded to few bits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.cache.places import CacheError, Edits, Places, Which, entries_of, listed, past_of, scheduled
from glmlens.hooks import Edit, Point
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens

Change = Callable[[Float[Tensor, "batch key kv d"], Int[Tensor, "batch key"], int], Tensor]
"""From the keys or values of a layer, the absolute positions of their entries and the layer's number to new ones."""


@dataclass(frozen=True)
class Edited:
    """New keys and values for some entries; see `edit`."""

    places: Places
    keys: Change | None = None
    values: Change | None = None

    def __call__(self, kv: KVCache) -> KVCache:
        self.places.there(kv)
        made, at = kv.fork(), kv.positions[:, : kv.length]
        for layer in self.places.layers(kv.keys.shape[0], kv.keys.shape[3]):
            for memory, change in ((made.keys, self.keys), (made.values, self.values)):
                if change is not None:
                    now = memory[layer, :, : kv.length]
                    memory[layer, :, : kv.length] = self.changed(now, at, layer, change)
        return made

    def changed(self, x: Tensor, at: Int[Tensor, "batch key"], layer: int, change: Change) -> Tensor:
        new: Any = change(x.clone(), at, layer)
        if not isinstance(new, Tensor):
            raise CacheError(f"the edit returned {type(new).__name__}; expected a tensor of shape {tuple(x.shape)}")
        if (new.shape, new.dtype, new.device) != (x.shape, x.dtype, x.device):
            found, expected = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (new, x))
            raise CacheError(f"the edit returned {found}; expected {expected}")
        meant = self.places.entries(at)[:, :, None] & self.places.heads(x.shape[2], x.device)
        return torch.where(meant.unsqueeze(-1), new, x)

    def hooks(self, lens: Lens, *, steps: Which = None, own: bool = True) -> Edits:
        """The same for what a run recalls, at some steps: its memory stays as it is. See `Operation` for `own`."""
        found: Edits = []
        steps = listed(steps, "steps")
        for layer in self.places.layers(lens.cfg.n_layers, lens.cfg.n_kv_heads):
            for point, change in (("kv.k", self.keys), ("kv.v", self.values)):
                if change is not None:
                    edit = scheduled(self.hook(layer, change, own), steps, self.places.position)
                    found.append((f"blocks.{layer}.{point}", edit))
        return found

    def hook(self, layer: int, change: Change, own: bool) -> Edit:
        def recall(x: Tensor, point: Point) -> Tensor:
            assert point.key_positions is not None
            past = past_of(point, own)
            new = self.changed(x[:, :past], point.key_positions[:, :past], layer, change) if past else x[:, :0]
            return torch.cat([new, x[:, past:]], 1)

        return recall


def edit(
    *,
    keys: Change | None = None,
    values: Change | None = None,
    layer: Which = None,
    kv: Which = None,
    position: Which = None,
) -> Edited:
    """Give entries the keys and values that functions make of the present ones.

    `keys(x, positions, layer)` gets those of a whole layer [batch, key, kv, d] and returns as many; only the entries
    meant are taken over. Keys are as remembered, after they have turned.
    """
    if keys is None and values is None:
        raise CacheError("nothing to do: give keys= or values=, functions of (x, positions, layer)")
    return Edited(Places.at(layer, kv, position), keys, values)


def ablate(*, how: str = "zero", layer: Which = None, kv: Which = None, position: Which = None) -> Edited:
    """Make entries say nothing: "zero" values, or the "mean" of the row's values there are. Who attends stays."""
    if how not in ("zero", "mean"):
        raise CacheError(f"how is {how!r}; choose from 'zero', 'mean'")

    def change(x: Tensor, at: Tensor, layer: int) -> Tensor:
        real = (at >= 0)[:, :, None, None]
        mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return torch.zeros_like(x) if how == "zero" else mean.expand_as(x)

    return Edited(Places.at(layer, kv, position), values=change)


def swap(other: KVCache, *, layer: Which = None, kv: Which = None, position: Which = None) -> Edited:
    """Give entries the keys and values that another run has at the same position. CacheError where it has none."""

    def taken(memory: Tensor) -> Change:
        def change(x: Tensor, at: Tensor, layer: int) -> Tensor:
            theirs, asked = other.positions[:, : other.length], places.entries(at)
            if theirs.shape[0] != at.shape[0]:
                raise CacheError(f"the other cache has {theirs.shape[0]} rows, this one {at.shape[0]}")
            there = at[:, :, None] == theirs[:, None]
            if not bool(there.any(2)[asked].all()):
                raise CacheError(f"the other cache has entries at {entries_of(theirs)} alone: give position=")
            columns = there.int().argmax(2)[:, :, None, None].expand(x.shape)
            return memory[layer].gather(1, columns)

        return change

    places = Places.at(layer, kv, position)
    return Edited(places, taken(other.keys), taken(other.values))


def quantise(
    bits: Integer = 8,
    *,
    keys: str | None = "channel",
    values: str | None = "token",
    group: Integer = 32,
    layer: Which = None,
    kv: Which = None,
    position: Which = None,
) -> Edited:
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
    places = Places.at(layer, kv, position)

    def by_token(x: Tensor, at: Tensor, layer: int) -> Tensor:
        exact = exactly(x)
        return rounded(x, bits, exact.amin(3, keepdim=True), exact.amax(3, keepdim=True))

    def by_channel(x: Tensor, at: Tensor, layer: int) -> Tensor:
        return rounded(x, bits, *ranges(exactly(x), places.entries(at), group))

    rules = {"token": by_token, "channel": by_channel, None: None}
    return Edited(places, rules[keys], rules[values])


def exactly(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ranges(x: Tensor, meant: Bool[Tensor, "batch key"], group: int) -> tuple[Tensor, Tensor]:
    """Of every entry and channel, the least and the largest number in its group of so many that are meant."""
    number = torch.where(meant, (meant.cumsum(1) - 1) // group + 1, 0)[:, :, None, None].expand(x.shape)
    room = x.new_zeros(x.shape[0], 2 + x.shape[1] // group, *x.shape[2:])
    sides = (room.scatter_reduce(1, number, x, how, include_self=False) for how in ("amin", "amax"))
    low, high = (side.gather(1, number) for side in sides)
    return low, high


def rounded(x: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """x as whole numbers from 0 to 2^bits - 1 hold it, from `low` to `high`, read again."""
    exact, step = exactly(x), (high - low) / (2**bits - 1)
    stored = ((exact - low) / torch.where(step > 0, step, 1)).round()
    return (stored * step + low).to(x.dtype)
