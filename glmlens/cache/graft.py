"""Entries read and found, and carried from one prompt's cache into another's."""

from collections.abc import Iterable

import torch
from torch import Tensor

from glmlens.cache.drop import columns
from glmlens.cache.move import reposition
from glmlens.cache.places import CacheError, Places, entries_of
from glmlens.kv_cache import OF_ENTRIES, KVCache
from glmlens.lens import Lens


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
