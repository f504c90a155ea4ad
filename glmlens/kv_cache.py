"""What a GLM remembers of the tokens it has run: two tensors and a length."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.config import GLMConfig
from glmlens.integers import Integer, read_integer
from glmlens.storage import FileError, TensorFile, expand_path, write_tensors
from glmlens.text_tables import format_bytes

ENTRY_FIELDS = ("positions", "tokens", "calls")  # what a cache knows of every entry of a row
FORMAT = "glmlens.KVCache"


@dataclass(eq=False, repr=False)
class KVCache:
    """The keys (after rotation) and values of every layer, and the absolute position of every entry.

    `keys` and `values` are [layer, batch, capacity, kv, d]; `positions` is [batch, capacity], -1 for padding. A dropped
    newest entry stands at -2 - position: nobody sees it, and yet the next one comes after it. Only the first `length`
    entries count. Writing past the capacity doubles it. `tokens` are the ids that entries are of, -1
    where that is unknown, and `calls` the numbers of the calls that wrote them, from 0: in a generation, its steps.
    `chosen` [batch] is the token that a generation chose last and did not run, -1 after a stop token.
    """

    keys: Float[Tensor, "layer batch capacity kv d"]
    values: Float[Tensor, "layer batch capacity kv d"]
    positions: Int[Tensor, "batch capacity"]
    length: int = 0
    tokens: Int[Tensor, "batch capacity"] = field(default=None)  # type: ignore[assignment]
    calls: Int[Tensor, "batch capacity"] = field(default=None)  # type: ignore[assignment]
    chosen: Int[Tensor, "batch"] | None = None

    def __post_init__(self) -> None:
        if self.tokens is None:
            self.tokens = torch.full_like(self.positions, -1)
        if self.calls is None:
            self.calls = torch.zeros_like(self.positions)

    @staticmethod
    def empty(cfg: GLMConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> "KVCache":
        """A cache with room for `capacity` entries per row, holding none."""
        shape = (cfg.n_layers, batch, capacity, cfg.n_kv_heads, cfg.d_head)
        return KVCache(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
            positions=torch.full((batch, capacity), -1, device=device),
        )

    def layer(self, index: int) -> "LayerKV":
        return LayerKV(self, index)

    def next_positions(self) -> Int[Tensor, "batch"]:
        """Per row, the absolute position that follows its last entry, also where that was dropped."""
        if not self.length:
            return self.positions.new_zeros(self.batch)
        return unmask_positions(self.positions[:, : self.length]).amax(1) + 1

    def concatenate_positions(self, positions: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch key"]:
        """The positions of all entries once those of a call at these positions are among them."""
        return torch.cat([self.positions[:, : self.length], positions], 1)

    def reserve(
        self, positions: Int[Tensor, "batch pos"], tokens: Int[Tensor, "batch pos"] | None = None
    ) -> Int[Tensor, "batch key"]:
        """Make room for entries at these positions, of these tokens; they count once `length` includes them.

        Returns the positions of all entries then there.
        """
        end = self.length + positions.shape[1]
        if end > self.capacity:
            self.grow(max(end, 2 * self.capacity))
        self.chosen = None
        self.positions[:, self.length : end] = positions
        self.tokens[:, self.length : end] = -1 if tokens is None else tokens
        self.calls[:, self.length : end] = self.calls[:, : self.length].amax() + 1 if self.length else 0
        return self.positions[:, :end]

    def grow(self, capacity: int) -> None:
        more = capacity - self.capacity
        self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, more)) for t in (self.keys, self.values))
        self.positions, self.tokens, self.calls = (
            torch.nn.functional.pad(t, (0, more), value=-1) for t in (self.positions, self.tokens, self.calls)
        )

    def fork(self, room: Integer = 0) -> "KVCache":
        """A copy with room for more entries: what either remembers from now on, the other never sees."""
        capacity = max(self.capacity, self.length + read_integer(room, "room", least=0))
        shape = (*self.keys.shape[:2], capacity, *self.keys.shape[3:])
        copy = KVCache(
            keys=self.keys.new_zeros(shape),
            values=self.values.new_zeros(shape),
            positions=self.positions.new_full((self.batch, capacity), -1),
            length=self.length,
            chosen=None if self.chosen is None else self.chosen.clone(),
        )
        for new, old in ((copy.keys, self.keys), (copy.values, self.values)):
            new[:, :, : self.length] = old[:, :, : self.length]
        for name in ENTRY_FIELDS:
            getattr(copy, name)[:, : self.length] = getattr(self, name)[:, : self.length]
        return copy

    def truncate(self, length: Integer) -> None:
        """Forget all but the first `length` entries of every row."""
        length = read_integer(length, "length")
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self.length} entries")
        self.chosen = self.chosen if length == self.length else None
        self.length = length

    def save(self, path: str | Path) -> None:
        """Write the entries to one safetensors file, whole or not at all."""
        kept = {"keys": self.keys[:, :, : self.length], "values": self.values[:, :, : self.length]}
        kept |= {name: getattr(self, name)[:, : self.length] for name in ENTRY_FIELDS}
        kept |= {} if self.chosen is None else {"chosen": self.chosen}
        write_tensors(path, kept, {"format": FORMAT})

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> "KVCache":
        """The cache that `save` wrote. Raises FileNotFoundError, and FileError for a file that is not such a cache."""
        file = TensorFile(expand_path(path))
        file.expect_format(FORMAT, "is not a KV cache")
        parts = file.read_all("a cache", ("keys", "values", "positions"), ("tokens", "calls", "chosen"))
        keys = parts["keys"]
        if keys.ndim != 5 or not keys.is_floating_point():
            raise FileError(f"{path}: keys: expected layer batch entry kv d, found {keys.dtype} {tuple(keys.shape)}")
        expected = dict.fromkeys(ENTRY_FIELDS, (keys.shape[1:3], torch.long)) | {
            "chosen": (keys.shape[1:2], torch.long)
        }
        for name, x in parts.items():
            shape, dtype = expected.get(name, (keys.shape, keys.dtype))
            if x.shape != shape or x.dtype != dtype:
                raise FileError(
                    f"{path}: {name}: expected {dtype} {tuple(shape)}, found {x.dtype} {tuple(x.shape)}: no KV cache"
                )
        return KVCache(**{name: x.to(device) for name, x in parts.items()}, length=keys.shape[2])

    def check_fits(self, cfg: GLMConfig, x: Tensor) -> None:
        """Raise ValueError unless this cache can hold what such a model computes from x [batch, pos, model]."""
        self.fits_model(cfg, x.shape[0], x.dtype, x.device)

    def fits_model(self, cfg: GLMConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise ValueError unless this cache is of such a model and of so many rows."""
        expected = (cfg.n_layers, batch, cfg.n_kv_heads, cfg.d_head, dtype, device, device)
        layers, rows, _, kv, d = self.keys.shape
        found = (layers, rows, kv, d, self.keys.dtype, self.keys.device, self.positions.device)
        if found != expected:
            names = ("layers", "batch", "kv heads", "d_head", "dtype", "device", "positions on")
            wrong = [f"{n} {f}, not {e}" for n, f, e in zip(names, found, expected, strict=True) if f != e]
            raise ValueError(f"this KV cache has {'; '.join(wrong)}: make one with lens.new_kv(batch=...)")

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def bytes(self) -> int:
        """What the entries weigh, without unused capacity."""
        return 2 * self.keys[:, :, : self.length].numel() * self.keys.element_size()

    def __repr__(self) -> str:
        layers, batch, capacity, kv, d = self.keys.shape
        sizes = f"{layers} layers, batch {batch}, {kv} kv heads, d {d}"
        return f"KVCache({self.length} entries of {capacity}; {sizes}, {format_bytes(self.bytes)})"


def refuse_other_caches(kv: object, cfg: GLMConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise TypeError for a cache that is no KVCache, and ValueError for one that another model filled."""
    if kv is None:
        return
    if not isinstance(kv, KVCache):
        raise TypeError(
            f"kv is a {type(kv).__name__} of {type(kv).__module__.split('.')[0]}; expected a KVCache: make one with "
            f"lens.new_kv(batch=...) and run the tokens into it, lens(tokens, kv=kv)"
        )
    kv.fits_model(cfg, kv.batch, dtype, device)


def unmask_positions(positions: Int[Tensor, "*batch key"]) -> Int[Tensor, "*batch key"]:
    """Where entries stand or, of those that were dropped, stood; -1 for padding."""
    return torch.where(positions < -1, -2 - positions, positions)


@dataclass(frozen=True)
class LayerKV:
    """One layer's part of a cache."""

    cache: KVCache
    layer: int

    def update(
        self, k: Float[Tensor, "batch pos kv d"], v: Float[Tensor, "batch pos kv d"]
    ) -> tuple[Float[Tensor, "batch key kv d"], Float[Tensor, "batch key kv d"]]:
        """Write this call's keys and values behind the entries, and recall them all as views of the cache."""
        if k.requires_grad or v.requires_grad:
            raise ValueError("gradients do not flow through a KV cache, which is written in place: run without kv=")
        start, end = self.cache.length, self.cache.length + k.shape[1]
        keys, values = self.cache.keys[self.layer, :, :end], self.cache.values[self.layer, :, :end]
        keys[:, start:], values[:, start:] = k, v
        return keys, values
