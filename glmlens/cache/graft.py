"""Read and find entries of a KV cache, and graft them from one prompt's cache into another's."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glmlens.cache.edit import swap
from glmlens.cache.evict import select_cache_columns
from glmlens.cache.move import reposition
from glmlens.cache.selection import (
    CacheError,
    CacheSelection,
    HookList,
    Indices,
    format_position_range,
    to_index_tuple,
    token_label,
)
from glmlens.integers import Integer, Integers, read_integer
from glmlens.kv_cache import ENTRY_FIELDS, KVCache, unmask_positions
from glmlens.lens import Lens


def read_entry(kv: KVCache, layer: Integer, head: Integer, position: Integer) -> tuple[Tensor, Tensor]:
    """Return the key and the value [batch, d] at a layer, key-value head and absolute position, for every row.

    Raises CacheError where a row has no such entry.
    """
    indices = (("layer", layer), ("head", head), ("position", position))
    layer, head, position = (read_integer(n, what, least=0, error=CacheError) for what, n in indices)
    CacheSelection.from_indices(layer, head, position).list_layers(kv.keys.shape[0], kv.keys.shape[3])
    positions = kv.positions[:, : kv.length]
    at_position = positions == position
    if not bool(at_position.any(1).all()):
        raise CacheError(
            f"not every row has an entry at position {position}; there are {format_position_range(positions)}"
        )
    rows = torch.arange(kv.batch, device=positions.device)
    columns = at_position.int().argmax(1)
    return kv.keys[layer, rows, columns, head], kv.values[layer, rows, columns, head]


def find_entries(lens: Lens, kv: KVCache, text: str, occurrence: Integer | None = None) -> list[int]:
    """Return the absolute positions of a text in a cache of one row, such as an entity's name of several tokens.

    Raises CacheError for a text that is not in the cache, or occurs there several times when no `occurrence` (0 the
    first, -1 the last) is given.
    """
    if lens.tokenizer is None or kv.batch != 1:
        raise CacheError("texts are found in caches of one row, with a tokenizer: give positions")
    if not isinstance(text, str):
        raise TypeError(f"find_entries finds a text; got {type(text).__name__} {text!r:.60}")
    wanted = lens.to_tokens(text, prefix=False)[0].tolist()
    cached = kv.tokens[0, : kv.length].tolist()
    starts = [i for i in range(len(cached) - len(wanted) + 1) if cached[i : i + len(wanted)] == wanted]
    if not starts or (occurrence is None and len(starts) > 1):
        problem = f"is at {kv.positions[0, starts].tolist()}: choose one, occurrence=0" if starts else "is not there"
        raise CacheError(f"{text!r} {problem}; the entries are {[token_label(lens, token) for token in cached]}")
    occurrence = None if occurrence is None else read_integer(occurrence, "occurrence", error=CacheError)
    if not -len(starts) <= (occurrence or 0) < len(starts):
        raise CacheError(f"{text!r} occurs {len(starts)} times; occurrence {occurrence} asked for")
    start = starts[occurrence or 0]
    return kv.positions[0, start : start + len(wanted)].tolist()


def list_entries(lens: Lens, kv: KVCache, row: Integer = 0) -> list[tuple[int, str, int]]:
    """Return every entry of a row: its absolute position, the label of its token, and the call (step) that wrote it."""
    row = read_integer(row, "row", size=kv.batch, error=CacheError)
    columns = (getattr(kv, name)[row, : kv.length].tolist() for name in ENTRY_FIELDS)
    entries = zip(*columns, strict=True)
    return [(position, token_label(lens, token), call) for position, token, call in entries if position >= 0]


EntrySpan = str | Integers
"""Adjacent absolute positions, or a text that occurs once."""


@dataclass(frozen=True)
class GraftOperation:
    """Replace some entries by those of another run; see `graft`."""

    lens: Lens
    source: KVCache
    of: EntrySpan
    at: EntrySpan

    def __call__(self, kv: KVCache) -> KVCache:
        replaced = resolve_span(self.lens, kv, self.at)
        grafted = self.take_source_entries()
        positions = kv.positions[0, : kv.length]
        before = select_cache_columns(kv, (positions >= 0) & (positions < replaced[0]))
        # An evicted newest entry comes along: the next token takes its position from it.
        after = select_cache_columns(kv, unmask_positions(positions) > replaced[-1])
        # Entries after the graft move by the difference in length, so that no position is free or taken twice.
        moved_after = reposition(self.lens, grafted.length - len(replaced))(after)
        return concatenate_caches([before, self.reposition_entries(grafted, replaced[0]), moved_after])

    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList:
        """Return hooks that replace the entries a run reads by as many others. See `Operation` for `own`.

        Raises CacheError for a graft of another length, or one `at` a text.
        """
        if isinstance(self.at, str):
            raise CacheError(f"{self.at!r}: a hook has no text to find it in; give at=, its positions")
        replaced = sorted(to_index_tuple(self.at, "position") or ())
        grafted = self.take_source_entries()
        if len(replaced) != grafted.length:
            raise CacheError(
                f"{grafted.length} entries in the place of {len(replaced)}: hooks cannot change how many entries a "
                f"step reads; do it between steps, timeline.record_timeline(..., at={{step: this}})"
            )
        moved = self.reposition_entries(grafted, replaced[0])
        return swap(moved, position=replaced).hooks(lens, steps=steps, own=own)

    def take_source_entries(self) -> KVCache:
        """Return a cache of the source's entries `of`."""
        span = resolve_span(self.lens, self.source, self.of)
        positions = self.source.positions[0, : self.source.length]
        return select_cache_columns(self.source, (positions >= span[0]) & (positions <= span[-1]))

    def reposition_entries(self, entries: KVCache, to: int) -> KVCache:
        """Return the entries moved so that the first is at position `to`."""
        return reposition(self.lens, to - int(entries.positions[0, 0]))(entries)


def graft(lens: Lens, source: KVCache, *, of: EntrySpan, at: EntrySpan) -> GraftOperation:
    """Replace the entries `at` by the source's entries `of`, such as one entity's entries by another's.

    Both are adjacent positions, or a text that occurs once, in caches of one row. The grafted keys are rotated to their
    new positions, and so are the entries after them when the lengths differ. The operation raises CacheError for
    positions or texts that are not there.
    """
    return GraftOperation(lens, source, of, at)


def resolve_span(lens: Lens, kv: KVCache, where: EntrySpan) -> list[int]:
    """Return the positions of a span. Raise CacheError unless they are adjacent and in a cache of one row."""
    if isinstance(where, str):
        positions = find_entries(lens, kv, where)
    else:
        positions = sorted(to_index_tuple(where, "position") or ())
    if kv.batch != 1 or not positions or positions != list(range(positions[0], positions[0] + len(positions))):
        raise CacheError(f"a graft is of adjacent positions in a cache of one row; got {positions} of {kv.batch} rows")
    CacheSelection.from_indices(position=positions).check_entries_exist(kv)
    return positions


def concatenate_caches(caches: list[KVCache]) -> KVCache:
    """Return one cache with the entries of several, in this order."""
    return replace(
        caches[0],
        keys=torch.cat([cache.keys for cache in caches], 2),
        values=torch.cat([cache.values for cache in caches], 2),
        length=sum(cache.length for cache in caches),
        **{name: torch.cat([getattr(cache, name) for cache in caches], 1) for name in ENTRY_FIELDS},
    )
