"""The KV cache as an object: its entries read, changed, moved, dropped and carried over, none of it in place.

An operation is a value: `op(kv)` is a new cache, and `op.hooks(lens)` are the hooks that do the same to what a run
recalls, at all steps or some. `Places` says to which entries: of which layers, key-value heads and absolute positions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.angles import frequencies, turned_on
from glmlens.config import GLMConfig
from glmlens.hooks import Edit, Point, only
from glmlens.kv_cache import OF_ENTRIES, KVCache
from glmlens.lens import Lens

Which = int | Iterable[int] | None
Edits = list[tuple[str, Edit]]
Change = Callable[[Float[Tensor, "batch key kv d"], Int[Tensor, "batch key"], int], Tensor]
"""From the keys or values of a layer, the absolute positions of their entries and the layer's number to new ones."""


class CacheError(ValueError):
    """An operation on a cache that cannot mean what was asked; the message says what to type instead."""


@runtime_checkable
class Operation(Protocol):
    """What can be done to a cache, or to what a run recalls."""

    def __call__(self, kv: KVCache) -> KVCache: ...
    def hooks(self, lens: Lens, *, steps: Which = None) -> Edits: ...


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
        for position in self.position or ():
            if not bool((kv.positions[:, : kv.length] == position).any()):
                raise CacheError(f"no entry at position {position}; there are {entries_of(kv)}")


def listed(asked: Which, what: str) -> tuple[int, ...] | None:
    if asked is None:
        return None
    found = (asked,) if isinstance(asked, int) else tuple(int(i) for i in asked)
    if not found or min(found) < 0:
        raise CacheError(f"{what} is {found}: give whole numbers from 0, or leave {what}= out to mean all")
    return found


def entries_of(kv: KVCache) -> str:
    there = kv.positions[:, : kv.length]
    return f"{int(there.min())} to {int(there.max())}" if kv.length else "none"


# ---- changing entries ----


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
        new = change(x.clone(), at, layer)
        if new.shape != x.shape or new.dtype != x.dtype:
            raise CacheError(f"the edit returned {new.dtype} {tuple(new.shape)}; expected {x.dtype} {tuple(x.shape)}")
        meant = self.places.entries(at)[:, :, None] & self.places.heads(x.shape[2], x.device)
        return torch.where(meant.unsqueeze(-1), new, x)

    def hooks(self, lens: Lens, *, steps: Which = None) -> Edits:
        """The same for what a run recalls, at some steps: its memory stays as it is."""
        found: Edits = []
        for layer in self.places.layers(lens.cfg.n_layers, lens.cfg.n_kv_heads):
            for point, change in (("kv.k", self.keys), ("kv.v", self.values)):
                if change is not None:
                    edit = scheduled(self.hook(layer, change), steps, self.places.position)
                    found.append((f"blocks.{layer}.{point}", edit))
        return found

    def hook(self, layer: int, change: Change) -> Edit:
        def recall(x: Tensor, point: Point) -> Tensor:
            assert point.key_positions is not None
            return self.changed(x, point.key_positions, layer, change)

        return recall


def scheduled(edit: Edit, steps: Which, positions: Which = None) -> Edit:
    """The edit at these steps and positions alone, so that a run that never comes to them says so."""
    return edit if steps is None and positions is None else only(edit, steps=steps, positions=positions)


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
                raise CacheError(f"the other cache has entries at {entries_of(other)} alone: give position=")
            columns = there.int().argmax(2)[:, :, None, None].expand(x.shape)
            return memory[layer].gather(1, columns)

        return change

    places = Places.at(layer, kv, position)
    return Edited(places, taken(other.keys), taken(other.values))


def quantise(
    bits: int = 8,
    *,
    keys: str | None = "channel",
    values: str | None = "token",
    group: int = 32,
    layer: Which = None,
    kv: Which = None,
    position: Which = None,
) -> Edited:
    """Round to what `bits`-bit whole numbers can hold, exactly as if they had been stored so and read again.

    Asymmetric, per key-value head: round((x - min) / step) with step = (max - min) / (2^bits - 1), over the channels
    of a "token" or over a "channel" of `group` entries in a row (Liu et al. 2024, KIVI, arXiv 2402.02750, sections 2.1
    and 3: keys by channel, values by token). None leaves them alone. A last group that is not full is a group.
    """
    if bits not in range(1, 17):
        raise CacheError(f"bits is {bits}; expected 1 to 16")
    for side in (keys, values):
        if side not in ("channel", "token", None):
            raise CacheError(f"numbers are rounded by 'channel' or by 'token', not by {side!r}")
    made = [None if by is None else rounded_by(by, bits, group) for by in (keys, values)]
    return Edited(Places.at(layer, kv, position), *made)


def rounded_by(by: str, bits: int, group: int) -> Change:
    def change(x: Tensor, at: Tensor, layer: int) -> Tensor:
        if by == "token":
            return rounded(x, bits, 3)
        return torch.cat([rounded(part, bits, 1) for part in x.split(group, 1)], 1)

    return change


def rounded(x: Tensor, bits: int, along: int) -> Tensor:
    """x as whole numbers from 0 to 2^bits - 1 hold it, one scale and zero along an axis, read again."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = exact.amin(along, keepdim=True), exact.amax(along, keepdim=True)
    step = (high - low) / (2**bits - 1)
    stored = ((exact - low) / torch.where(step > 0, step, 1)).round()
    return (stored * step + low).to(x.dtype)


# ---- moving entries ----


@dataclass(frozen=True)
class Moved:
    """Keys turned to other positions; see `reposition`."""

    cfg: GLMConfig
    to: Callable[[Int[Tensor, "batch key"]], Int[Tensor, "batch key"]]

    def __call__(self, kv: KVCache) -> KVCache:
        made, at = kv.fork(), kv.positions[:, : kv.length]
        new = torch.where(at >= 0, self.to(at), -1)
        if bool(((new < 0) & (at >= 0)).any()):
            raise CacheError(f"entries would come to stand before position 0; they are at {entries_of(kv)}")
        for layer in range(kv.keys.shape[0]):
            made.keys[layer, :, : kv.length] = self.turned(kv.keys[layer, :, : kv.length], at, new)
        made.positions[:, : kv.length] = new
        return made

    def turned(self, k: Float[Tensor, "batch key kv d"], at: Tensor, new: Tensor) -> Tensor:
        """Keys that stand at other positions: the rotated channels turn on by the difference of the angles."""
        exact = torch.promote_types(k.dtype, torch.float32)
        exact = exact if k.device.type == "mps" else torch.float64  # a difference of large angles loses digits
        angle = (new - at).to(exact)[:, :, None] * frequencies(self.cfg, exact, k.device)
        still = torch.ones_like(angle), torch.zeros_like(angle)
        turned = turned_on(k[..., : self.cfg.d_rotary], still, (angle.cos(), angle.sin()))
        return torch.cat([turned, k[..., self.cfg.d_rotary :]], -1)

    def hooks(self, lens: Lens, *, steps: Which = None) -> Edits:
        """The same for the keys that a run recalls. Whom a query may see stays as it was."""

        def recall(x: Tensor, point: Point) -> Tensor:
            at = point.key_positions
            assert at is not None
            return self.turned(x, at, torch.where(at >= 0, self.to(at), -1))

        edit = scheduled(recall, steps)
        return [(f"blocks.{layer}.kv.k", edit) for layer in range(self.cfg.n_layers)]


def reposition(
    lens: Lens, by: int | None = None, *, position: Which = None, to: Callable[[Tensor], Tensor] | None = None
) -> Moved:
    """Move entries by so many positions: all, or those at `position`; or `to(positions)`, any function of them.

    Keys are remembered after they have turned, so they turn on by the difference.
    """
    if (by is None) == (to is None):
        raise CacheError("give by=, how far to move, or to=, a function from positions to positions")
    if to is not None:
        return Moved(lens.cfg, to)
    places, far = Places.at(position=position), int(by or 0)
    return Moved(lens.cfg, lambda at: torch.where(places.entries(at), at + far, at))


def close_up(lens: Lens) -> Moved:
    """Move entries together so that no position between them is free, as StreamingLLM counts positions inside its cache
    (Xiao et al. 2023, arXiv 2309.17453, section 3.2)."""

    def to(at: Tensor) -> Tensor:
        real = torch.where(at >= 0, at, torch.iinfo(at.dtype).max)
        return real.argsort(1).argsort(1)

    return Moved(lens.cfg, to)


# ---- dropping entries ----

Keep = Callable[[KVCache], Bool[Tensor, "batch key"]]


def window(n: int, sinks: int = 0) -> Keep:
    """The last n positions of every row, and the first `sinks` (Xiao et al. 2023, arXiv 2309.17453, section 3.2)."""

    def keep(kv: KVCache) -> Bool[Tensor, "batch key"]:
        at, last = kv.positions[:, : kv.length], kv.next_positions().unsqueeze(1)
        return (at >= last - n) | (at < sinks)

    return keep


def heavy_hitters(attention: Float[Tensor, "batch key"], n: int, recent: int = 0) -> Keep:
    """The n entries that were attended to most in sum, and the last `recent` positions (Zhang et al. 2023, H2O, arXiv
    2306.14048, section 4): `attention` [batch, key] is that sum over queries, of the heads and layers you choose."""

    def keep(kv: KVCache) -> Bool[Tensor, "batch key"]:
        if attention.shape != (kv.batch, kv.length):
            raise CacheError(f"attention is {tuple(attention.shape)}; this cache has {(kv.batch, kv.length)} entries")
        late = window(recent)(kv) if recent else torch.zeros_like(kv.positions[:, : kv.length], dtype=torch.bool)
        rest = attention.masked_fill(late | (kv.positions[:, : kv.length] < 0), -torch.inf)
        most = torch.zeros_like(late).scatter(1, rest.topk(min(n, kv.length), 1).indices, True)
        return late | most

    return keep


@dataclass(frozen=True)
class Evicted:
    """A cache without some entries; see `evict`."""

    keep: Keep

    def __call__(self, kv: KVCache) -> KVCache:
        at = kv.positions[:, : kv.length]
        kept = self.keep(kv) & (at >= 0)
        if kept.shape != at.shape:
            raise CacheError(f"keep made {tuple(kept.shape)}; expected one per entry, {tuple(at.shape)}")
        newest = torch.where(kept, at, -1).amax(1) == at.amax(1)
        if not bool(newest.all()):
            raise CacheError("the newest entry cannot be dropped: the next token would take its position")
        made = kv.fork()
        made.positions[:, : kv.length] = torch.where(kept, at, -1)
        return columns(made, kept.any(0))

    def hooks(self, lens: Lens, *, steps: Which = None) -> Edits:
        """The same for what a run can attend to: scores of dropped entries are as if they were not there.

        `keep` is asked about a cache that knows positions alone. Needs attention="eager", which writes scores.
        """
        edit = scheduled(self.hide, steps)
        return [(f"blocks.{layer}.attn.scores", edit) for layer in range(lens.cfg.n_layers)]

    def hide(self, x: Tensor, point: Point) -> Tensor:
        assert point.key_positions is not None
        at = point.key_positions
        blank = x.new_empty(0, at.shape[0], at.shape[1], 0, 0)
        hidden = ~self.keep(KVCache(blank, blank, at, at.shape[1]))
        return x.masked_fill(hidden[:, None, None], torch.finfo(x.dtype).min)


def columns(kv: KVCache, kept: Bool[Tensor, "key"]) -> KVCache:
    """The cache with some of its columns alone."""
    chosen = kept.nonzero().squeeze(1)
    return KVCache(
        kv.keys[:, :, chosen],
        kv.values[:, :, chosen],
        length=len(chosen),
        **{name: getattr(kv, name)[:, chosen] for name in OF_ENTRIES},
    )


def evict(keep: Keep | None = None, *, position: Which = None) -> Evicted:
    """Drop the entries at these positions, or all but those that `keep(kv)` [batch, key] says.

    `window(n, sinks)` and `heavy_hitters(attention, n, recent)` are such functions. Entries keep their positions; what
    comes after them sees the rest as before. CacheError where a row would lose its newest entry.
    """
    if (keep is None) == (position is None):
        raise CacheError("give position=, what to drop, or a function that says what to keep: window(64, sinks=4)")
    if keep is not None:
        return Evicted(keep)
    places = Places.at(position=position)

    def others(kv: KVCache) -> Bool[Tensor, "batch key"]:
        return ~places.entries(kv.positions[:, : kv.length])

    return Evicted(others)


# ---- reading, and carrying over ----


def read(kv: KVCache, layer: int, head: int, position: int) -> tuple[Tensor, Tensor]:
    """The key and the value [batch, d] that every row has at a layer, key-value head and absolute position."""
    Places.at(layer, head, position).layers(kv.keys.shape[0], kv.keys.shape[3])
    there = kv.positions[:, : kv.length] == position
    if not bool(there.any(1).all()):
        raise CacheError(f"not every row has an entry at position {position}; there are {entries_of(kv)}")
    rows, at = torch.arange(kv.batch, device=there.device), there.int().argmax(1)
    return kv.keys[layer, rows, at, head], kv.values[layer, rows, at, head]


def find(lens: Lens, kv: KVCache, text: str, occurrence: int | None = None) -> list[int]:
    """The absolute positions at which a text stands in a cache of one row, such as an entity's name of several tokens.

    CacheError for a text that is not there, or that stands there more often when no `occurrence` (0 the first, -1 the
    last) is given.
    """
    if lens.tokenizer is None or kv.batch != 1:
        raise CacheError("texts are found in caches of one row, with a tokenizer: give positions")
    asked, said = lens.to_tokens(text, prefix=False)[0].tolist(), kv.tokens[0, : kv.length].tolist()
    starts = [i for i in range(len(said) - len(asked) + 1) if said[i : i + len(asked)] == asked]
    if not starts or (occurrence is None and len(starts) > 1):
        where = f"stands at {kv.positions[0, starts].tolist()}: say which, occurrence=0" if starts else "is not there"
        raise CacheError(f"{text!r} {where}; the entries are {[label(lens, i) for i in said]}")
    if not -len(starts) <= (occurrence or 0) < len(starts):
        raise CacheError(f"{text!r} stands there {len(starts)} times; occurrence {occurrence} asked for")
    start = starts[occurrence or 0]
    return kv.positions[0, start : start + len(asked)].tolist()


def label(lens: Lens, token: int) -> str:
    return lens.tokenizer.label(token) if lens.tokenizer and token >= 0 else f"⟨{token}⟩"


def entries(lens: Lens, kv: KVCache, row: int = 0) -> list[tuple[int, str, int]]:
    """Every entry of a row: its absolute position, its token as people read it, and the call (step) that wrote it."""
    listed = (getattr(kv, name)[row, : kv.length].tolist() for name in OF_ENTRIES)
    return [(at, label(lens, token), call) for at, token, call in zip(*listed, strict=True) if at >= 0]


def graft(lens: Lens, kv: KVCache, at: Iterable[int], source: KVCache, of: Iterable[int]) -> KVCache:
    """A cache in which the entries `at` are gone and the source's entries `of` stand in their place.

    The keys turn to where they now stand, and so do those after them when there are more or fewer than before. Both
    are runs of adjacent positions, in caches of one row. Raises CacheError otherwise, and for `at` with the newest
    entry: run that anew, as it is what the next token follows from.
    """
    here, there = run_of(kv, at), run_of(source, of)
    if here[-1] == int(kv.positions[0, : kv.length].max()):
        raise CacheError("the newest entry follows from those before it: leave it out of what is replaced")
    place, theirs = (c.positions[0, : c.length] for c in (kv, source))
    more = len(there) - len(here)
    new = reposition(lens, here[0] - there[0])(columns(source, (theirs >= there[0]) & (theirs <= there[-1])))
    after = columns(kv, place > here[-1])
    parts = [columns(kv, (place >= 0) & (place < here[0])), new, reposition(lens, more)(after)]
    return joined(parts)


def run_of(kv: KVCache, positions: Iterable[int]) -> list[int]:
    found = sorted(positions)
    if kv.batch != 1 or not found or found != list(range(found[0], found[0] + len(found))):
        raise CacheError(f"a graft is of adjacent positions in a cache of one row; got {found} of {kv.batch} rows")
    Places.at(position=found).there(kv)
    return found


def joined(parts: list[KVCache]) -> KVCache:
    """The entries of caches one after another."""
    return KVCache(
        torch.cat([part.keys for part in parts], 2),
        torch.cat([part.values for part in parts], 2),
        length=sum(part.length for part in parts),
        **{name: torch.cat([getattr(part, name) for part in parts], 1) for name in OF_ENTRIES},
    )


__all__ = [
    "CacheError", "Operation", "ablate", "close_up", "edit", "entries", "evict", "find", "graft", "heavy_hitters",
    "quantise", "read", "reposition", "swap", "window",
]  # fmt: skip
