"""Entries dropped: by position, outside a window, or all but those that were attended to most."""

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


def keep_window(n: Integer, sinks: Integer = 0) -> KeepRule:
    """The last n positions of every row, and the first `sinks` (Xiao et al. 2023, arXiv 2309.17453, section 3.2)."""
    n, sinks = (read_integer(m, what, least=0, error=CacheError) for m, what in ((n, "n"), (sinks, "sinks")))

    def keep(kv: KVCache) -> Bool[Tensor, "batch key"]:
        at, last = kv.positions[:, : kv.length], kv.next_positions().unsqueeze(1)
        return (at >= last - n) | (at < sinks)

    return keep


def keep_heavy_hitters(attention: Float[Tensor, "batch key"], n: Integer, recent: Integer = 0) -> KeepRule:
    """The n entries that were attended to most in sum, and the last `recent` positions (Zhang et al. 2023, H2O, arXiv
    2306.14048, section 4): `attention` [batch, key] is that sum over queries, of the heads and layers you choose.

    Entries that came after those it speaks of are kept.
    """
    n, recent = (read_integer(m, what, least=0, error=CacheError) for m, what in ((n, "n"), (recent, "recent")))

    def keep(kv: KVCache) -> Bool[Tensor, "batch key"]:
        told = attention.shape[1]
        if attention.shape[0] != kv.batch or told > kv.length:
            raise CacheError(f"attention is {tuple(attention.shape)}; this cache has {(kv.batch, kv.length)} entries")
        at = kv.positions[:, : kv.length]
        late = keep_window(recent)(kv) if recent else torch.zeros_like(at, dtype=torch.bool)
        late[:, told:] = True
        rest = attention.masked_fill((late | (at < 0))[:, :told], -torch.inf)
        return late.scatter(1, rest.topk(min(n, told), 1).indices, True)

    return keep


@dataclass(frozen=True)
class EvictOperation:
    """A cache without some entries; see `evict`."""

    keep: KeepRule
    selection: CacheSelection

    def __call__(self, kv: KVCache) -> KVCache:
        if self.selection.layer is not None or self.selection.kv is not None:
            raise CacheError("layers and heads share a cache's entries: .hooks(lens) hides them from some at a step")
        self.selection.check_entries_exist(kv)
        at = kv.positions[:, : kv.length]
        newest = unmask_positions(at) == kv.next_positions().unsqueeze(1) - 1
        left = torch.where(self.compute_keep_mask(kv), at, torch.where(newest, -2 - unmask_positions(at), -1))
        stays = (left != -1).any(0)
        return replace(select_cache_columns(kv, stays), positions=left[:, stays])

    def compute_keep_mask(self, kv: KVCache) -> Bool[Tensor, "batch key"]:
        at, kept = kv.positions[:, : kv.length], self.keep(kv)
        if kept.shape != at.shape or kept.dtype != torch.bool:
            raise CacheError(f"keep made {kept.dtype} {tuple(kept.shape)}; expected bool {tuple(at.shape)}, by entry")
        return kept & (at >= 0)

    def hooks(self, lens: Lens, *, steps: Indices = None, own: bool = True) -> HookList:
        """The same for what a run can attend to: scores of dropped entries are as if they were not there.

        `keep` is asked about a cache that knows positions alone, those that this step writes among them unless
        own=False. All queries of the step lack the same; one to which nothing would be left sees itself. CacheError
        unless attention="eager", which alone has scores to hide.
        """
        layers = self.selection.list_layers(lens.cfg.n_layers, lens.cfg.n_kv_heads)
        if lens.model.attention != "eager":
            raise CacheError(
                "entries are hidden in scores, which attention='sdpa' never writes: load with attention='eager', or "
                "drop them from the cache between steps, patch.timeline(..., at={step: this})"
            )

        def hide(x: Tensor, point: Point) -> Tensor:
            assert point.key_positions is not None
            past = count_past_entries(point, own)
            at, least = point.key_positions[:, :past], torch.finfo(x.dtype).min
            blank = x.new_empty(0, at.shape[0], past, 0, 0)
            hidden = ~self.compute_keep_mask(KVCache(blank, blank, at, past)) if past else at < 0
            heads = self.selection.mask_heads(lens.cfg.n_kv_heads, x.device).repeat_interleave(lens.cfg.n_groups)
            hidden = torch.nn.functional.pad(hidden, (0, x.shape[-1] - past))
            new = x.masked_fill(hidden[:, None, None] & heads[:, None, None], least)
            blind = new.amax(-1, keepdim=True) <= least / 2
            return torch.where(blind & mask_own_entries(x.shape[2], x.shape[3], x.device), x, new)

        edit = restrict_to_recalled(hide, steps, self.selection.position)
        return [(f"blocks.{layer}.attn.scores", edit) for layer in layers]


def mask_own_entries(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """Where the entry is that each of the last queries wrote itself."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries).triu(keys - queries)


def select_cache_columns(kv: KVCache, mask: Bool[Tensor, "key"]) -> KVCache:
    """The cache with some of its columns alone."""
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
    """Drop the entries at these positions, or all but those that `keep(kv)` [batch, key] says.

    `window(n, sinks)` and `heavy_hitters(attention, n, recent)` are such functions. Entries keep their positions; what
    comes after them stands where it would have stood, the newest dropped or not, and sees the rest as before. From some
    layers and key-value heads alone, as each head of H2O drops its own, entries are hidden by `.hooks(lens)`.
    """
    if (keep is None) == (position is None):
        raise CacheError("give position=, what to drop, or a function that says what to keep: window(64, sinks=4)")
    places = CacheSelection.from_indices(layer, kv, position)

    def others(kv: KVCache) -> Bool[Tensor, "batch key"]:
        return ~places.mask_entries(kv.positions[:, : kv.length])

    return EvictOperation(keep or others, places)
