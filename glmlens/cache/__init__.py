"""Operations on the KV cache: read, edit, move, evict and graft entries. None of them changes a cache in place.

An operation is an object: `op(kv)` returns a new cache, and `op.hooks(lens)` returns hooks that do the same to the
entries a run reads, at all steps or at some. Entries are selected by layer, key-value head and absolute position.
"""

from glmlens.cache.edit import ablate, edit, quantise, swap
from glmlens.cache.evict import evict, keep_heavy_hitters, keep_window
from glmlens.cache.graft import find_entries, graft, list_entries, read_entry
from glmlens.cache.move import close_gaps, reposition
from glmlens.cache.selection import CacheError, CacheSelection, Operation
from glmlens.deprecated import resolve_old_names

__all__ = [
    "CacheError",
    "CacheSelection",
    "Operation",
    "ablate",
    "close_gaps",
    "edit",
    "evict",
    "find_entries",
    "graft",
    "keep_heavy_hitters",
    "keep_window",
    "list_entries",
    "quantise",
    "read_entry",
    "reposition",
    "swap",
]  # fmt: skip

OLD_NAMES = {
    "close_up": "glmlens.cache.close_gaps",
    "entries": "glmlens.cache.list_entries",
    "find": "glmlens.cache.find_entries",
    "Places": "glmlens.cache.CacheSelection",
    "heavy_hitters": "glmlens.cache.keep_heavy_hitters",
    "read": "glmlens.cache.read_entry",
    "window": "glmlens.cache.keep_window",
}
__getattr__ = resolve_old_names("glmlens.cache", OLD_NAMES)
