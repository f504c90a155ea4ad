"""The KV cache as an object: its entries read, changed, moved, dropped and carried over, none of it in place.

An operation is a value: `op(kv)` is a new cache, and `op.hooks(lens)` are the hooks that do the same to what a run
recalls, at all steps or some. The places are layers, key-value heads and absolute positions.
"""

from glmlens.cache.change import ablate, edit, quantise, swap
from glmlens.cache.drop import evict, heavy_hitters, window
from glmlens.cache.graft import entries, find, graft, read
from glmlens.cache.move import close_up, reposition
from glmlens.cache.places import CacheError, Operation, Places

__all__ = [
    "CacheError", "Operation", "Places", "ablate", "close_up", "edit", "entries", "evict", "find", "graft",
    "heavy_hitters", "quantise", "read", "reposition", "swap", "window",
]  # fmt: skip
