"""Evict entries of a KV cache: by position, outside a window, or all but the most attended (heavy hitters)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glmlens.cache.selection import (
    CacheError,
    CacheSelection,
    HookList,
    Indices,
    count_past_entries,
    restrict_to_recalled,
)
from glmlens.hook_points import Point
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import ENTRY_FIELDS, KVCache, unmask_positions
from glmlens.lens import Lens

KeepRule = Callable[[KVCache], Bool[Tensor, "batch key"]]
"""A function of a cache that returns which of its entries to keep."""


def keep_window(n: Integer, sinks: Integer = 0) -> KeepRule:
    """Return a rule that keeps the last n positions of every row, and the first `sinks` (attention sinks).

    Xiao et al. 2023, StreamingLLM, arXiv 2309.17453, section 3.2.
    """
    n, sinks = (read_integer(m, what, least=0, error=CacheError) for m, what in ((n, "n"), (sinks, "sinks")))

    def keep(kv: KVCache) -> Bool[Tensor, "batch key"]:
        positions = kv.positions[:, : kv.length]
        next_position = kv.next_positions().unsqueeze(1)
        return (positions >= next_position - n) | (positions < sinks)

    return keep


def keep_heavy_hitters(attention: Float[Tensor, "batch key"], n: Integer, recent: Integer = 0) -> KeepRule:
    """Return a rule that keeps the n entries with the most attention, and the last `recent` positions.

    `attention` [batch, key] is summed over queries, and over the heads and layers you choose, for the first entries of
    the cache; see `analysis.sum_attention`. Entries after those are kept. Zhang et al. 2023, H2O, arXiv 2306.14048,
    section 4.
    """
    n, recent = (read_integer(m, what, least=0, error=CacheError) for m, what in ((n, "n"), (recent, "recent")))

    def keep(kv: KVCache) -> Bool[Tensor, "batch key"]:
        n_scored = attention.shape[1]
        if attention.shape[0] != kv.batch or n_scored > kv.length:
            raise CacheError(f"attention is {tuple(attention.shape)}; this cache has {(kv.batch, kv.length)} entries")
        positions = kv.positions[:, : kv.length]
        kept = keep_window(recent)(kv) if recent else torch.zeros_like(positions, dtype=torch.bool)
        kept[:, n_scored:] = True
        # Entries that are kept anyway, and padding, do not compete for the n places.
        candidates = attention.masked_fill((kept | (positions < 0))[:, :n_scored], -torch.inf)
        return kept.scatter(1, candidates.topk(min(n, n_scored), 1).indices, True)

    return keep


@dataclass(frozen=True)
class EvictOperation:
    """Remove entries from a cache; see `evict`."""

    keep: KeepRule
    selection: CacheSelection

    def __call__(self, kv: KVCache) -> KVCache:
        if self.selection.layer is not None or self.selection.kv is not None:
            raise CacheError("layers and heads share a cache's entries: .hooks(lens) hides them from some at a step")
        self.selection.check_entries_exist(kv)
        positions = kv.positions[:, : kv.length]
        original = unmask_positions(positions)
        newest = original == kv.next_positions().unsqueeze(1) - 1
        # The newest entry of a row, if evicted, stays as -2 - position: masked, but the next token still gets the
        # position after it. Any other evicted entry becomes padding (-1).
        evicted = torch.where(newest, -2 - original, -1)
        new_positions = torch.where(self.compute_keep_mask(kv), positions, evicted)
        columns = (new_positions != -1).any(0)  # a column goes when no row keeps its entry
        return replace(select_cache_columns(kv, columns), positions=new_positions[:, columns])

    def compute_keep_mask(self, kv: KVCache) -> Bool[Tensor, "batch key"]:
        """Return which entries to keep, never padding. Raise CacheError unless `keep` returns bool [batch, key]."""
        positions = kv.positions[:, : kv.length]
        kept = self.keep(kv)
        if kept.shape != positions.shape or kept.dtype != torch.bool:
            raise CacheError(
                f"keep returned {kept.dtype} {tuple(kept.shape)}; expected bool {tuple(positions.shape)}, by entry"
            )
        return kept & (positions >= 0)

    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList:
        """Return hooks that mask the scores of evicted entries, so that a run attends as if they were not in the cache.

        `keep` gets a cache that holds positions only, including those that this step writes unless own=False. All
        queries of a step lack the same entries; a query that would see none sees its own. Raises CacheError unless
        attention="eager": the other path has no scores to mask.
        """
        layers = self.selection.list_layers(lens.cfg.n_layers, lens.cfg.n_kv_heads)
        if lens.model.attention != "eager":
            raise CacheError(
                "entries are masked in scores, which attention='sdpa' does not compute: load with attention='eager' or "
                "evict them from the cache between steps, timeline.record_timeline(..., at={step: this})"
            )

        def hide(x: Tensor, point: Point) -> Tensor:
            assert point.key_positions is not None
            past = count_past_entries(point, own)
            positions = point.key_positions[:, :past]
            lowest = torch.finfo(x.dtype).min
            # `keep` is a function of a cache: give it one with positions, but no layers and no channels.
            no_channels = x.new_empty(0, positions.shape[0], past, 0, 0)
            positions_only = KVCache(keys=no_channels, values=no_channels, positions=positions, length=past)
            evicted = ~self.compute_keep_mask(positions_only) if past else positions < 0
            evicted = torch.nn.functional.pad(evicted, (0, x.shape[-1] - past))  # keep what this step writes
            heads = self.selection.mask_heads(lens.cfg.n_kv_heads, x.device).repeat_interleave(lens.cfg.n_groups)
            masked = x.masked_fill(evicted[:, None, None] & heads[:, None, None], lowest)
            # A softmax over lowest scores alone would attend to all of them: such a query gets its own entry back.
            sees_nothing = masked.amax(-1, keepdim=True) <= lowest / 2
            return torch.where(sees_nothing & mask_own_entries(x.shape[2], x.shape[3], x.device), x, masked)

        edit = restrict_to_recalled(hide, steps, self.selection.position)
        return [(f"blocks.{layer}.attn.scores", edit) for layer in layers]


def mask_own_entries(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """Return True at the entry that each query wrote itself; the queries are the last tokens of the keys."""
    everywhere = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return everywhere.tril(keys - queries).triu(keys - queries)  # one diagonal, shifted by the past entries


def select_cache_columns(kv: KVCache, mask: Bool[Tensor, "key"]) -> KVCache:
    """Return a cache with the columns of `mask` only."""
    chosen = mask.nonzero().squeeze(1)
    return replace(
        kv,
        keys=kv.keys[:, :, chosen],
        values=kv.values[:, :, chosen],
        length=len(chosen),
        **{name: getattr(kv, name)[:, chosen] for name in ENTRY_FIELDS},
    )


def evict(
    keep: KeepRule | None = None, *, position: Indices = None, layer: Indices = None, kv: Indices = None
) -> EvictOperation:
    """Evict the entries at `position`, or all but those for which `keep(kv)` [batch, key] is True.

    `keep_window(n, sinks)` and `keep_heavy_hitters(attention, n, recent)` return such functions. The remaining entries
    keep their positions, and the next token gets the position it would have had, also when the newest entry is evicted.
    All layers and heads share a cache's entries: with `layer` or `kv` (as each head of H2O evicts its own entries) use
    `.hooks(lens)`, which masks them. Raises CacheError unless exactly one of `keep` and `position` is given.
    """
    if (keep is None) == (position is None):
        raise CacheError(
            "give position=, what to evict, or a function that returns what to keep: cache.keep_window(64, sinks=4)"
        )
    selection = CacheSelection.from_indices(layer, kv, position)

    def keep_others(kv: KVCache) -> Bool[Tensor, "batch key"]:
        return ~selection.mask_entries(kv.positions[:, : kv.length])

    return EvictOperation(keep or keep_others, selection)
