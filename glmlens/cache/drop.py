"""Entries dropped: by position, outside a window, or all but those that were attended to most."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glmlens.cache.places import CacheError, Edits, Places, Which, past_of, scheduled
from glmlens.hooks import Point
from glmlens.kv_cache import OF_ENTRIES, KVCache
from glmlens.lens import Lens

Keep = Callable[[KVCache], Bool[Tensor, "batch key"]]


def window(n: int, sinks: int = 0) -> Keep:
    """The last n positions of every row, and the first `sinks` (Xiao et al. 2023, arXiv 2309.17453, section 3.2)."""

    def keep(kv: KVCache) -> Bool[Tensor, "batch key"]:
        at, last = kv.positions[:, : kv.length], kv.next_positions().unsqueeze(1)
        return (at >= last - n) | (at < sinks)

    return keep


def heavy_hitters(attention: Float[Tensor, "batch key"], n: int, recent: int = 0) -> Keep:
    """The n entries that were attended to most in sum, and the last `recent` positions (Zhang et al. 2023, H2O, arXiv
    2306.14048, section 4): `attention` [batch, key] is that sum over queries, of the heads and layers you choose.

    Entries that came after those it speaks of are kept.
    """

    def keep(kv: KVCache) -> Bool[Tensor, "batch key"]:
        told = attention.shape[1]
        if attention.shape[0] != kv.batch or told > kv.length:
            raise CacheError(f"attention is {tuple(attention.shape)}; this cache has {(kv.batch, kv.length)} entries")
        at = kv.positions[:, : kv.length]
        late = window(recent)(kv) if recent else torch.zeros_like(at, dtype=torch.bool)
        late[:, told:] = True
        rest = attention.masked_fill((late | (at < 0))[:, :told], -torch.inf)
        return late.scatter(1, rest.topk(min(n, told), 1).indices, True)

    return keep


@dataclass(frozen=True)
class Evicted:
    """A cache without some entries; see `evict`."""

    keep: Keep
    places: Places

    def __call__(self, kv: KVCache) -> KVCache:
        if self.places != Places():
            raise CacheError("layers and heads share a cache's entries: .hooks(lens) hides them from some at a step")
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

    def hooks(self, lens: Lens, *, steps: Which = None, own: bool = True) -> Edits:
        """The same for what a run can attend to: scores of dropped entries are as if they were not there.

        `keep` is asked about a cache that knows positions alone, those that this step writes among them unless
        own=False, and all queries of the step lack the same. Needs attention="eager", which writes scores.
        """
        layers = self.places.layers(lens.cfg.n_layers, lens.cfg.n_kv_heads)

        def hide(x: Tensor, point: Point) -> Tensor:
            assert point.key_positions is not None
            past = past_of(point, own)
            at = point.key_positions[:, :past]
            blank = x.new_empty(0, at.shape[0], past, 0, 0)
            hidden = ~self.keep(KVCache(blank, blank, at, past)) if past else at < 0
            heads = self.places.heads(lens.cfg.n_kv_heads, x.device).repeat_interleave(lens.cfg.n_groups)
            hidden = torch.nn.functional.pad(hidden, (0, x.shape[-1] - past))
            return x.masked_fill(hidden[:, None, None] & heads[:, None, None], torch.finfo(x.dtype).min)

        return [(f"blocks.{layer}.attn.scores", scheduled(hide, steps)) for layer in layers]


def columns(kv: KVCache, kept: Bool[Tensor, "key"]) -> KVCache:
    """The cache with some of its columns alone."""
    chosen = kept.nonzero().squeeze(1)
    return replace(
        kv,
        keys=kv.keys[:, :, chosen],
        values=kv.values[:, :, chosen],
        length=len(chosen),
        **{name: getattr(kv, name)[:, chosen] for name in OF_ENTRIES},
    )


def evict(keep: Keep | None = None, *, position: Which = None, layer: Which = None, kv: Which = None) -> Evicted:
    """Drop the entries at these positions, or all but those that `keep(kv)` [batch, key] says.

    `window(n, sinks)` and `heavy_hitters(attention, n, recent)` are such functions. Entries keep their positions; what
    comes after them sees the rest as before. CacheError where a row would lose its newest entry. From some layers and
    key-value heads alone, as each head of H2O drops its own, entries are hidden by `.hooks(lens)`.
    """
    if (keep is None) == (position is None):
        raise CacheError("give position=, what to drop, or a function that says what to keep: window(64, sinks=4)")
    if keep is not None:
        return Evicted(keep, Places.at(layer, kv))
    places = Places.at(position=position)

    def others(kv: KVCache) -> Bool[Tensor, "batch key"]:
        return ~places.entries(kv.positions[:, : kv.length])

    return Evicted(others, Places.at(layer, kv))
