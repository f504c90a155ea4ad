"""Entries read and found, and carried from one prompt's cache into another's."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glmlens.cache.edit import swap
from glmlens.cache.evict import select_cache_columns
from glmlens.cache.move import reposition
from glmlens.cache.selection import CacheError, CacheSelection, HookList, Indices, format_position_range, to_index_tuple
from glmlens.integers import Integer, Integers, read_integer
from glmlens.kv_cache import ENTRY_FIELDS, KVCache, unmask_positions
from glmlens.lens import Lens


def read_entry(kv: KVCache, layer: Integer, head: Integer, position: Integer) -> tuple[Tensor, Tensor]:
    """The key and the value [batch, d] that every row has at a layer, key-value head and absolute position."""
    asked = (("layer", layer), ("head", head), ("position", position))
    layer, head, position = (read_integer(n, what, least=0, error=CacheError) for what, n in asked)
    CacheSelection.from_indices(layer, head, position).list_layers(kv.keys.shape[0], kv.keys.shape[3])
    there = kv.positions[:, : kv.length] == position
    if not bool(there.any(1).all()):
        raise CacheError(
            f"not every row has an entry at position {position}; there are {format_position_range(kv.positions[:, : kv.length])}"
        )
    rows, at = torch.arange(kv.batch, device=there.device), there.int().argmax(1)
    return kv.keys[layer, rows, at, head], kv.values[layer, rows, at, head]


def find_entries(lens: Lens, kv: KVCache, text: str, occurrence: Integer | None = None) -> list[int]:
    """The absolute positions at which a text stands in a cache of one row, such as an entity's name of several tokens.

    CacheError for a text that is not there, or that stands there more often when no `occurrence` (0 the first, -1 the
    last) is given.
    """
    if lens.tokenizer is None or kv.batch != 1:
        raise CacheError("texts are found in caches of one row, with a tokenizer: give positions")
    if not isinstance(text, str):
        raise TypeError(f"what is found in a cache is a text; got {type(text).__name__} {text!r:.60}")
    asked, said = lens.to_tokens(text, prefix=False)[0].tolist(), kv.tokens[0, : kv.length].tolist()
    starts = [i for i in range(len(said) - len(asked) + 1) if said[i : i + len(asked)] == asked]
    if not starts or (occurrence is None and len(starts) > 1):
        where = f"stands at {kv.positions[0, starts].tolist()}: say which, occurrence=0" if starts else "is not there"
        raise CacheError(f"{text!r} {where}; the entries are {[label_entry(lens, i) for i in said]}")
    occurrence = None if occurrence is None else read_integer(occurrence, "occurrence", error=CacheError)
    if not -len(starts) <= (occurrence or 0) < len(starts):
        raise CacheError(f"{text!r} stands there {len(starts)} times; occurrence {occurrence} asked for")
    start = starts[occurrence or 0]
    return kv.positions[0, start : start + len(asked)].tolist()


def label_entry(lens: Lens, token: int) -> str:
    return lens.tokenizer.label(token) if lens.tokenizer and token >= 0 else f"⟨{token}⟩"


def list_entries(lens: Lens, kv: KVCache, row: Integer = 0) -> list[tuple[int, str, int]]:
    """Every entry of a row: its absolute position, its token as people read it, and the call (step) that wrote it."""
    row = read_integer(row, "row", size=kv.batch, error=CacheError)
    listed = (getattr(kv, name)[row, : kv.length].tolist() for name in ENTRY_FIELDS)
    return [(at, label_entry(lens, token), call) for at, token, call in zip(*listed, strict=True) if at >= 0]


EntrySpan = str | Integers
"""Adjacent absolute positions, or the text that stands there, once."""


@dataclass(frozen=True)
class GraftOperation:
    """Another run's entries in the place of some; see `graft`."""

    lens: Lens
    source: KVCache
    of: EntrySpan
    at: EntrySpan

    def __call__(self, kv: KVCache) -> KVCache:
        here, theirs = resolve_span(self.lens, kv, self.at), self.take_source_entries()
        place, more = kv.positions[0, : kv.length], theirs.length - len(here)
        before, after = (
            select_cache_columns(kv, (place >= 0) & (place < here[0])),
            select_cache_columns(kv, unmask_positions(place) > here[-1]),
        )
        return concatenate_caches(
            [before, self.reposition_entries(theirs, here[0]), reposition(self.lens, more)(after)]
        )

    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList:
        """The same for what a run recalls, where as many entries come as go. See `Operation` for `own`."""
        if isinstance(self.at, str):
            raise CacheError(f"{self.at!r}: a hook has no text to find it in; give at=, its positions")
        here, theirs = sorted(to_index_tuple(self.at, "position") or ()), self.take_source_entries()
        if len(here) != theirs.length:
            raise CacheError(
                f"{theirs.length} entries in the place of {len(here)}: what a step recalls cannot change its length; "
                f"do it between steps, patch.timeline(..., at={{step: this}})"
            )
        return swap(self.reposition_entries(theirs, here[0]), position=here).hooks(lens, steps=steps, own=own)

    def take_source_entries(self) -> KVCache:
        there, place = resolve_span(self.lens, self.source, self.of), self.source.positions[0, : self.source.length]
        return select_cache_columns(self.source, (place >= there[0]) & (place <= there[-1]))

    def reposition_entries(self, entries: KVCache, to: int) -> KVCache:
        return reposition(self.lens, to - int(entries.positions[0, 0]))(entries)


def graft(lens: Lens, source: KVCache, *, of: EntrySpan, at: EntrySpan) -> GraftOperation:
    """Put the source's entries `of` in the place of the entries `at`: those of one prompt's entity into another's.

    Both are adjacent positions, or the text that stands there once, in caches of one row. The keys turn to where they
    now stand, and so do those after them when there are more or fewer than before. Raises CacheError for what is not
    there, once it is used.
    """
    return GraftOperation(lens, source, of, at)


def resolve_span(lens: Lens, kv: KVCache, where: EntrySpan) -> list[int]:
    found = find_entries(lens, kv, where) if isinstance(where, str) else sorted(to_index_tuple(where, "position") or ())
    if kv.batch != 1 or not found or found != list(range(found[0], found[0] + len(found))):
        raise CacheError(f"a graft is of adjacent positions in a cache of one row; got {found} of {kv.batch} rows")
    CacheSelection.from_indices(position=found).check_entries_exist(kv)
    return found


def concatenate_caches(parts: list[KVCache]) -> KVCache:
    """The entries of caches one after another."""
    return replace(
        parts[0],
        keys=torch.cat([part.keys for part in parts], 2),
        values=torch.cat([part.values for part in parts], 2),
        length=sum(part.length for part in parts),
        **{name: torch.cat([getattr(part, name) for part in parts], 1) for name in ENTRY_FIELDS},
    )
