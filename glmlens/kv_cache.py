"""The KV cache: keys and values of every layer in two tensors, with the position and token of every entry."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from glmlens.config import GLMConfig
from glmlens.file_io import FileError, TensorFile, expand_path, write_tensors
from glmlens.integers import Integer, read_integer
from glmlens.text_tables import format_bytes

ENTRY_FIELDS = ("positions", "tokens", "calls")  # fields [batch, capacity]: one number per entry of a row
FORMAT = "glmlens.KVCache"


@dataclass(eq=False, repr=False)
class KVCache:
    """The keys (after rotation) and values of every layer, and the absolute position of every entry.

    `keys` and `values` are [layer, batch, capacity, kv, d]; only the first `length` entries are in use. Writing past
    the capacity doubles it. `positions` is [batch, capacity], -1 for padding. If the newest entry (position p) is
    evicted it is stored as -2 - p: masked, but the next token still gets p + 1. `tokens` are the token ids of the
    entries, -1 where unknown. `calls` are the numbers of the calls that wrote them, from 0: in a generation, its steps.
    `chosen` [batch] is the token that a generation chose last and has not run, -1 after a stop token.
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
        """Return a cache with room for `capacity` entries per row and no entry."""
        shape = (cfg.n_layers, batch, capacity, cfg.n_kv_heads, cfg.d_head)
        return KVCache(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
            positions=torch.full((batch, capacity), -1, device=device),
        )

    def layer(self, index: int) -> "LayerKV":
        """Return one layer of this cache, which `Attention` writes to."""
        return LayerKV(self, index)

    def next_positions(self) -> Int[Tensor, "batch"]:
        """Return the absolute position of the next token of every row, evicted entries counted too."""
        if not self.length:
            return self.positions.new_zeros(self.batch)
        return unmask_positions(self.positions[:, : self.length]).amax(1) + 1

    def concatenate_positions(self, positions: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch key"]:
        """Return the positions of all entries followed by `positions`, those of a call that is not yet written."""
        return torch.cat([self.positions[:, : self.length], positions], 1)

    def reserve(
        self, positions: Int[Tensor, "batch pos"], tokens: Shaped[Tensor, "batch pos *model"] | None = None
    ) -> Int[Tensor, "batch key"]:
        """Make room for new entries at these positions and return the positions of all entries, the new ones last.

        The caller adds them to `length` once every layer has written them. `tokens` that are not ids (embeddings, a
        residual stream) are stored as unknown, -1.
        """
        end = self.length + positions.shape[1]
        if end > self.capacity:
            self.grow(max(end, 2 * self.capacity))
        self.chosen = None  # the chosen token, if there was one, is among those that are run now
        self.positions[:, self.length : end] = positions
        self.tokens[:, self.length : end] = -1 if tokens is None or tokens.is_floating_point() else tokens
        self.calls[:, self.length : end] = self.calls[:, : self.length].amax() + 1 if self.length else 0
        return self.positions[:, :end]

    def grow(self, capacity: int) -> None:
        """Copy the entries into tensors with room for `capacity` entries per row."""
        more = capacity - self.capacity
        # pad() counts axes from the last: the third pair is the capacity axis of [layer, batch, capacity, kv, d].
        self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, more)) for t in (self.keys, self.values))
        self.positions, self.tokens, self.calls = (
            torch.nn.functional.pad(t, (0, more), value=-1) for t in (self.positions, self.tokens, self.calls)
        )

    def fork(self, room: Integer = 0) -> "KVCache":
        """Return a copy with `room` for more entries; later writes to either do not reach the other."""
        capacity = max(self.capacity, self.length + read_integer(room, "room", least=0))
        shape = (*self.keys.shape[:2], capacity, *self.keys.shape[3:])
        copy = KVCache(
            keys=self.keys.new_zeros(shape),
            values=self.values.new_zeros(shape),
            positions=self.positions.new_full((self.batch, capacity), -1),
            length=self.length,
            chosen=None if self.chosen is None else self.chosen.clone(),
        )
        copy.keys[:, :, : self.length] = self.keys[:, :, : self.length]
        copy.values[:, :, : self.length] = self.values[:, :, : self.length]
        for name in ENTRY_FIELDS:
            getattr(copy, name)[:, : self.length] = getattr(self, name)[:, : self.length]
        return copy

    def truncate(self, length: Integer) -> None:
        """Remove all but the first `length` entries of every row. Raises ValueError if there are fewer."""
        length = read_integer(length, "length")
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self.length} entries")
        self.chosen = self.chosen if length == self.length else None
        self.length = length

    def save(self, path: str | Path) -> None:
        """Write the entries to one safetensors file atomically, unused capacity left out."""
        tensors = {"keys": self.keys[:, :, : self.length], "values": self.values[:, :, : self.length]}
        tensors |= {name: getattr(self, name)[:, : self.length] for name in ENTRY_FIELDS}
        if self.chosen is not None:
            tensors["chosen"] = self.chosen
        write_tensors(path, tensors, {"format": FORMAT})

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> "KVCache":
        """Return the cache that `save` wrote. Raises FileNotFoundError, and FileError for a file that is no cache."""
        file = TensorFile(expand_path(path))
        file.expect_format(FORMAT, "is not a KV cache")
        parts = file.read_all("a cache", ("keys", "values", "positions"), ("tokens", "calls", "chosen"))
        keys = parts["keys"]
        if keys.ndim != 5 or not keys.is_floating_point():
            raise FileError(f"{path}: keys: expected layer batch entry kv d, found {keys.dtype} {tuple(keys.shape)}")
        # keys is [layer, batch, entry, kv, d]: the fields of entries are [batch, entry], `chosen` is [batch].
        expected: dict[str, tuple[torch.Size, torch.dtype]] = {"chosen": (keys.shape[1:2], torch.long)}
        expected |= dict.fromkeys(ENTRY_FIELDS, (keys.shape[1:3], torch.long))
        for name, x in parts.items():
            shape, dtype = expected.get(name, (keys.shape, keys.dtype))  # keys and values are alike
            if x.shape != shape or x.dtype != dtype:
                raise FileError(
                    f"{path}: {name}: expected {dtype} {tuple(shape)}, found {x.dtype} {tuple(x.shape)}: no KV cache"
                )
        return KVCache(**{name: x.to(device) for name, x in parts.items()}, length=keys.shape[2])

    def check_fits(self, cfg: GLMConfig, x: Tensor) -> None:
        """Raise ValueError unless this cache can hold a model's keys and values for x [batch, pos, model]."""
        self.fits_model(cfg, x.shape[0], x.dtype, x.device)

    def fits_model(self, cfg: GLMConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise ValueError unless this cache has the sizes, dtype and device of such a model, and `batch` rows."""
        expected = (cfg.n_layers, batch, cfg.n_kv_heads, cfg.d_head, dtype, device, device)
        layers, rows, _, kv, d = self.keys.shape
        found = (layers, rows, kv, d, self.keys.dtype, self.keys.device, self.positions.device)
        if found != expected:
            # Compare all of them, so that one error lists everything that does not fit.
            names = ("layers", "batch", "kv heads", "d_head", "dtype", "device", "positions on")
            wrong = [f"{n} {f}, not {e}" for n, f, e in zip(names, found, expected, strict=True) if f != e]
            raise ValueError(f"this KV cache has {'; '.join(wrong)}: make one with lens.new_kv(batch=...)")

    @property
    def batch(self) -> int:
        """The number of rows, one per prompt."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """The number of entries per row that fit before the cache grows."""
        return self.keys.shape[2]

    @property
    def bytes(self) -> int:
        """The size of the entries' keys and values in bytes, unused capacity left out."""
        return 2 * self.keys[:, :, : self.length].numel() * self.keys.element_size()

    def __repr__(self) -> str:
        layers, batch, capacity, kv, d = self.keys.shape
        sizes = f"{layers} layers, batch {batch}, {kv} kv heads, d {d}"
        return f"KVCache({self.length} entries of {capacity}; {sizes}, {format_bytes(self.bytes)})"


def refuse_other_caches(kv: object, cfg: GLMConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise TypeError if `kv` is neither None nor a KVCache, and ValueError for a cache of another model's sizes."""
    if kv is None:
        return
    if not isinstance(kv, KVCache):
        raise TypeError(
            f"kv is a {type(kv).__name__} of {type(kv).__module__.split('.')[0]}; expected a KVCache: make one with "
            f"lens.new_kv(batch=...) and run the tokens into it, lens(tokens, kv=kv)"
        )
    kv.fits_model(cfg, kv.batch, dtype, device)


def unmask_positions(positions: Int[Tensor, "*batch key"]) -> Int[Tensor, "*batch key"]:
    """Return the position of every entry, with p for an evicted one stored as -2 - p; -1 for padding."""
    return torch.where(positions < -1, -2 - positions, positions)


@dataclass(frozen=True)
class LayerKV:
    """One layer of a cache."""

    cache: KVCache
    layer: int

    def update(
        self, k: Float[Tensor, "batch pos kv d"], v: Float[Tensor, "batch pos kv d"]
    ) -> tuple[Float[Tensor, "batch key kv d"], Float[Tensor, "batch key kv d"]]:
        """Append this call's keys and values, and return those of all entries as views of the cache.

        Raises ValueError if they require gradients: autograd does not follow writes in place.
        """
        if k.requires_grad or v.requires_grad:
            raise ValueError("gradients do not flow through a KV cache, which is written in place: run without kv=")
        start = self.cache.length
        end = start + k.shape[1]
        keys = self.cache.keys[self.layer, :, :end]
        values = self.cache.values[self.layer, :, :end]
        keys[:, start:] = k
        values[:, start:] = v
        return keys, values
