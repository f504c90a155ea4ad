"""Recordings of activations, labelled by point, layer, position and token."""

import html
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from glmlens.deprecated import rename_method
from glmlens.file_io import expand_path
from glmlens.hook_points import HookError, axes_of, local_name
from glmlens.integers import Integer, read_integer
from glmlens.recording.run_info import RunInfo
from glmlens.recording.saved_activations import (
    LazyValues,
    PointValue,
    read_recording,
    run_info_from_plain,
    run_info_to_plain,
    write_recording,
)
from glmlens.text_tables import format_bytes, format_ranges, format_table


class NotRecordedError(HookError, KeyError):
    """A point that is not in a recording."""

    __str__ = HookError.__str__  # KeyError's own would show the message in quotes


class Activations(Mapping[str, Any]):
    """Activations of one run at the named points, in the order in which the points fire.

    `acts["blocks.3.attn.pattern"]` and `acts["attn.pattern", 3]` are those of one layer. `acts["resid_post"]` is all
    layers stacked: [layer, batch, pos, model]. `acts.at("Mary")` and `acts.at("S2")` are the activations at one
    position, `acts.row(2)` those of one prompt. After a generation `kv.k` and `kv.v` are lists with a tensor per step.

    Points that follow from stored ones are not stored but recomputed on access, bit for bit. With attention="sdpa",
    scores and pattern are recomputed too, to within 1e-6 of those inside the kernel.
    """

    def __init__(
        self,
        values: Mapping[str, PointValue],
        names: Sequence[str] | None = None,
        run_info: RunInfo | None = None,
        gradients: "Activations | None" = None,
    ):
        self.stored = values
        self.names = list(values if names is None else names)
        self.run_info = run_info
        self._gradients = gradients

    # ---- reading ----

    def __getitem__(self, key: str | tuple[str, Integer]) -> Any:
        # Derived residual streams go to the first map: each layer's follows from the layer before.
        return self._read(key, ChainMap({}, cast(Any, self.stored)))

    def _read(self, key: str | tuple[str, Integer], available: ChainMap[str, Any]) -> Any:
        """Return the value of a point, stored or derived; derived residual streams are cached in `available`."""
        if isinstance(key, tuple):
            return self._read(self._full_name(*key), available)
        if key in self.stored:
            return self.stored[key]
        if self._is_derivable(key):
            return cast(RunInfo, self.run_info).derive(key, available)
        # No full name: all layers of a layer-local name, stacked.
        layers = self.layers(key) or [i for i in self._model_layers() if self._is_derivable(f"blocks.{i}.{key}")]
        if not layers:
            raise self._not_recorded_error(key)
        if layers != list(range(len(layers))):
            raise HookError(f"{key!r} was recorded at layers {layers} only: ask for one, acts[{key!r}, {layers[0]}]")
        parts = [self._read(f"blocks.{i}.{key}", available) for i in layers]
        if any(isinstance(part, list) for part in parts):
            raise HookError(f"{key!r} is a list with a tensor per step: ask for a layer, acts[{key!r}, {layers[0]}]")
        return torch.stack(cast(list[Tensor], parts))

    def _full_name(self, local: str, layer: Integer) -> str:
        """Return the full name of a point in a layer; a negative layer counts from the last one."""
        layer = read_integer(layer, "layer", error=HookError)
        if layer < 0:
            layers = self.layers(local) or self._model_layers()
            layer += max(layers, default=0) + 1
        return f"blocks.{layer}.{local}"

    def _is_derivable(self, name: str) -> bool:
        return self.run_info is not None and self.run_info.is_derivable(name, self.stored)

    def _model_layers(self) -> list[int]:
        """Return the layers of the model; none where the model is not known."""
        if self.run_info is None or self.run_info.model is None:
            return []
        return list(range(len(self.run_info.model.blocks)))

    def _not_recorded_error(self, key: str) -> NotRecordedError:
        local = local_name(key)
        if self.run_info is not None and self.run_info.model is None and (key in self.names or self.layers(local)):
            return NotRecordedError(f"{key!r} is not stored here; with the model it would follow: load with lens=")
        near = get_close_matches(key, [*self.names, *map(local_name, self.names)], 3, 0.5)
        hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
        return NotRecordedError(f"{key!r} was not recorded: name it in names= when you run.{hint}")

    def layers(self, local: str) -> list[int]:
        """Return the layers at which the point of this layer-local name was recorded."""
        names = (name for name in self.names if name.startswith("blocks.") and local_name(name) == local)
        return [int(name.split(".")[1]) for name in names]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, key: object) -> bool:
        return key in self.names or (isinstance(key, str) and bool(self.layers(key)))

    @property
    def gradients(self) -> "Activations":
        """The gradient of the metric at every named point, each in the shape of its point."""
        if self._gradients is None:
            raise HookError("no gradients were asked for: run with gradients_of=metric")
        return self._gradients

    # ---- positions ----

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The token ids of the run, padding included."""
        tokens = self.require_run_info().tokens
        if tokens is None:
            raise HookError("this run entered with a residual stream or embeddings: it has no tokens")
        return tokens

    @property
    def labels(self) -> list[list[str]]:
        """A label for every token of every row, without padding."""
        run_info = self.require_run_info()
        tokenizer = run_info.tokenizer
        rows = [row[at >= 0].tolist() for row, at in zip(self.tokens, run_info.positions, strict=True)]
        return [tokenizer.labels(row) if tokenizer else [f"⟨{i}⟩" for i in row] for row in rows]

    def at(self, where: Integer | str, occurrence: Integer | None = None) -> "AtPosition":
        """Return the recording at one position of every row.

        `where` is an absolute position (negative: from the end), a task's name for one, or the text of a token. At a
        point with a query axis it is the query's position. Raises HookError for a text that is no token of a row, or
        several of its tokens when no `occurrence` (0 is the first, -1 the last) is given.
        """
        return AtPosition(self, self.find(where, occurrence))

    def find(self, where: Integer | str, occurrence: Integer | None = None) -> Int[Tensor, "batch"]:
        """Return the absolute position in every row; see `at`."""
        run_info = self.require_run_info()
        if not isinstance(where, str):
            return self._find_position(read_integer(where, "position", error=HookError))
        if occurrence is not None:
            occurrence = read_integer(occurrence, "occurrence", error=HookError)
        elif run_info.find_named_positions is not None:
            try:
                return run_info.find_named_positions(where).to(run_info.positions.device)
            except ValueError:  # no name of the task: it may be the text of a token
                pass
        rows = range(len(run_info.positions))
        positions = torch.tensor([self._find_token(row, where, occurrence) for row in rows])
        return positions.to(run_info.positions.device)

    def _find_position(self, position: int) -> Int[Tensor, "batch"]:
        """Return one absolute position in every row; HookError where a row does not have it."""
        positions = self.require_run_info().positions
        last = positions.amax(1)
        found = last + 1 + position if position < 0 else torch.full_like(last, position)
        missing = (found[:, None] != positions).all(1)
        if bool(missing.any()):
            raise HookError(f"position {position} asked for; the rows end with {last.tolist()}")
        return found

    def _find_token(self, row: int, text: str, occurrence: int | None) -> int:
        """Return the absolute position of a token's text in one row."""
        run_info = self.require_run_info()
        if run_info.tokenizer is None:
            raise HookError(f"no tokenizer to find {text!r} with: give an absolute position")
        real = run_info.positions[row] >= 0
        tokens = run_info.tokenizer.decode_each(self.tokens[row][real].tolist())
        # An exact match counts first; only without one are spaces around the texts ignored.
        matches = [i for i, token in enumerate(tokens) if token == text] or [
            i for i, token in enumerate(tokens) if token.strip() == text.strip() != ""
        ]
        if not matches:
            raise HookError(f"{text!r} is no token of row {row}: {tokens}")
        if occurrence is None and len(matches) > 1:
            raise HookError(f"{text!r} stands at {matches} in row {row}: say which, at({text!r}, occurrence=0)")
        if not -len(matches) <= (occurrence or 0) < len(matches):
            raise HookError(f"{text!r} stands {len(matches)} times in row {row}; occurrence {occurrence} asked for")
        return int(run_info.positions[row][real][matches[occurrence or 0]])

    def row(self, i: Integer) -> "Activations":
        """Return the recording of one prompt, with a batch of one and without padding."""
        run_info = self.require_run_info()
        i = read_integer(i, "row", error=HookError)
        n_rows = len(run_info.positions)
        if not -n_rows <= i < n_rows:
            raise HookError(f"row {i} asked for; this recording has {n_rows}")
        i %= n_rows
        columns = run_info.positions[i] >= 0
        key_columns = run_info.key_positions[i] >= 0

        def drop_padding(name: str, x: Any) -> Tensor:
            for dim, axis in enumerate(axes_of(name)):
                if axis in ("pos", "query", "key"):
                    x = x.movedim(dim, 0)[key_columns if axis == "key" else columns].movedim(0, dim)
            return x

        find_named = run_info.find_named_positions
        row_info = replace(
            run_info,
            tokens=None if run_info.tokens is None else run_info.tokens[i : i + 1, columns],
            positions=run_info.positions[i : i + 1, columns],
            key_positions=run_info.key_positions[i : i + 1, key_columns],
            find_named_positions=find_named and (lambda name: find_named(name)[i : i + 1]),
        )
        if any(isinstance(self._outline(name), list) for name in self.stored):
            raise HookError("this recording has a tensor per step at kv.k and kv.v: rows of it cannot be taken")
        values = {name: drop_padding(name, x[i : i + 1]) for name, x in self.stored.items()}
        return Activations(values, self.names, row_info, self._gradients and self._gradients.row(i))

    def require_run_info(self) -> RunInfo:
        """Return the run info; HookError for a recording that was constructed without one."""
        if self.run_info is None:
            raise HookError("this recording was made by hand: it knows no tokens and no positions")
        return self.run_info

    # ---- copies ----

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Activations":
        """Return the recording on another device or in another dtype.

        It no longer refers to the model, so that every named point is stored.
        """
        if dtype is None and (device is None or torch.device(device) == self.device):
            return self
        return self._store_mapped(lambda x: x.to(device=device or x.device, dtype=dtype or x.dtype))

    def store_all(self) -> "Activations":
        """Return the recording with every named point stored, so that later edits of the weights do not affect it."""
        return self._store_mapped(lambda x: x)

    def _store_mapped(self, fn: Callable[[Tensor], Tensor]) -> "Activations":
        """Return a recording of `fn` of every named point, without the model."""
        run_info = self.run_info and replace(self.run_info, model=None, unchanged=lambda: True)
        return self._map_tensors(dict(self), fn, run_info)

    def __reduce__(self) -> Any:
        """Pickle what `store_all` holds, detached: values, tokens, positions, texts and the model's hash, no model.

        A task's names of positions are not pickled.
        """
        return restore_activations, (self.to_plain_data(),)

    def to_plain_data(self) -> dict[str, Any]:
        """Return the recording as dicts, lists and tensors alone, which torch.load reads with weights_only too."""
        acts = self.store_all().detach()
        return {
            "values": dict(acts.stored),
            "names": list(acts.names),
            "of": None if self.run_info is None else run_info_to_plain(self.run_info),
            "gradients": self._gradients and self._gradients.to_plain_data(),
        }

    def cpu(self) -> "Activations":
        """Return the recording on the CPU; see `to`."""
        return self.to("cpu")

    def detach(self) -> "Activations":
        """Return the recording without its autograd graph."""
        return self._map_tensors(self.stored, Tensor.detach, self.run_info)

    def _map_tensors(
        self, values: Mapping[str, PointValue], fn: Callable[[Tensor], Tensor], run_info: RunInfo | None
    ) -> "Activations":
        """Return a recording of `fn` of every value, and of the gradients; `run_info` moves to the device of these."""
        mapped = {name: [fn(x) for x in v] if isinstance(v, list) else fn(v) for name, v in values.items()}
        gradients = self._gradients
        if gradients is not None:
            gradients = gradients._map_tensors(gradients.stored, fn, gradients.run_info)
        device = find_device(mapped)
        if run_info is not None and device is not None:
            run_info = run_info.to(device)
        return Activations(mapped, self.names, run_info, gradients)

    @property
    def device(self) -> torch.device | None:
        """The device of the values; None where there are none."""
        return find_device(self.stored)

    @property
    def bytes(self) -> int:
        """The bytes of the stored values. Derived points count nothing, memory shared by several points counts once."""
        if isinstance(self.stored, LazyValues):
            return sum(x.nbytes for x in iterate_tensors({name: self.stored.outline(name) for name in self.stored}))
        sizes = {
            (x.untyped_storage().data_ptr(), x.storage_offset(), x.nbytes): x.nbytes
            for x in iterate_tensors(self.stored)
        }
        return sum(sizes.values())

    # ---- disk ----

    def save(self, folder: str | Path) -> Path:
        """Write the recording to a folder, atomically, as safetensors and a manifest; return the folder.

        Raises FileExistsError when there is a recording already.
        """
        folder = expand_path(folder)
        write_recording(folder, self.stored, self.names, self.require_run_info())
        return folder

    def _outline(self, name: str) -> PointValue:
        """Return a stored value for its shape, dtype and bytes alone: one on disk is not read for that."""
        return self.stored.outline(name) if isinstance(self.stored, LazyValues) else self.stored[name]

    # ---- display ----

    def __repr__(self) -> str:
        return f"{self._title()}\n{format_table(self.summary_table())}"

    def _title(self) -> str:
        n_derived = sum(name not in self.stored for name in self.names)
        title = f"Activations: {len(self)} points, {format_bytes(self.bytes)}"
        return f"{title}, {n_derived} derived" if n_derived else title

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("name", "axes", "shape", "bytes"))
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in self.summary_table())
        return f"<div>{html.escape(self._title())}<table><tr>{head}</tr>{body}</table></div>"

    rows = rename_method("rows", "summary_table")

    def summary_table(self) -> list[tuple[str, str, str, str]]:
        """Return a line per point, layers together: name, axes, shape, bytes."""
        names_by_point: dict[str, list[str]] = {}
        for name in self.names:
            names_by_point.setdefault(local_name(name), []).append(name)
        lines = []
        for local, names in names_by_point.items():
            layers = self.layers(local)
            stored = [self._outline(name) for name in names if name in self.stored]
            n_bytes = sum(x.nbytes for value in stored for x in (value if isinstance(value, list) else [value]))
            first = stored[0] if stored else self._derive_or_none(names[0])
            if isinstance(first, list):
                shape = f"{tuple(first[-1].shape)} x {len(first)} steps"
            else:
                shape = "not to be had" if first is None else str(tuple(first.shape))
            lines.append(
                (
                    f"blocks.{format_ranges(layers)}.{local}" if layers else local,
                    " ".join(axes_of(local)),
                    shape,
                    format_bytes(n_bytes) if stored else "derived",
                )
            )
        return lines

    def _derive_or_none(self, name: str) -> Any:
        """Return a derived point's value; None without the model, or once its weights were edited."""
        try:
            return self[name]
        except HookError:
            return None


@dataclass(frozen=True)
class AtPosition:
    """A recording at one position of every row: values lack the axis `pos` (or `query`; or `key` at kv.k and kv.v)."""

    acts: Activations
    positions: Int[Tensor, "batch"]

    def __getitem__(self, key: str | tuple[str, Integer]) -> Tensor:
        x, local = self.acts[key], local_name(key[0] if isinstance(key, tuple) else key)
        if isinstance(x, list):
            raise HookError(f"{local!r} is a list with a tensor per step: take a step first")
        # A layer-local name gives all layers stacked, with an axis more than the point has.
        is_stacked = (
            isinstance(key, str) and key == local and local not in ("embed", "logits") and x.ndim > len(axes_of(local))
        )
        axes = ("layer", *axes_of(local)) if is_stacked else axes_of(local)
        axis = next(axis for axis in ("pos", "query", "key") if axis in axes)
        columns = self.find_columns(axis)
        # With batch and position in front, one index picks a column per row.
        rows = x.movedim((axes.index("batch"), axes.index(axis)), (0, 1))
        picked = rows[torch.arange(len(columns), device=x.device), columns]
        return picked.movedim(0, 1) if is_stacked else picked

    def find_columns(self, axis: str) -> Int[Tensor, "batch"]:
        """Return the index of the position along this axis, in every row."""
        run_info = self.acts.require_run_info()
        positions = run_info.key_positions if axis == "key" else run_info.positions
        return (positions == self.positions[:, None]).int().argmax(1)

    def __repr__(self) -> str:
        return f"positions {self.positions.tolist()} of {self.acts!r}"


def restore_activations(state: dict[str, Any]) -> Activations:
    """Return the recording that was pickled, from `Activations.to_plain_data`."""
    return Activations(
        state["values"],
        state["names"],
        run_info=None if state["of"] is None else run_info_from_plain(state["of"]),
        gradients=state["gradients"] and restore_activations(state["gradients"]),
    )


torch.serialization.add_safe_globals([restore_activations])  # safe: it only puts plain values together


def iterate_tensors(values: Mapping[str, PointValue]) -> Iterator[Tensor]:
    """Yield every tensor of these values, those in lists too."""
    for value in values.values():
        yield from value if isinstance(value, list) else [value]


def find_device(values: Mapping[str, PointValue]) -> torch.device | None:
    """Return the device of the first tensor; None where there is none."""
    return next((x.device for x in iterate_tensors(values)), None)


def load_activations(folder: str | Path, lens: Any = None) -> Activations:
    """Return the recording that `acts.save(folder)` wrote; each value is read when it is accessed.

    With the lens that it was recorded from, derived points are recomputed as before and texts can be found. Raises
    FileNotFoundError, FileError for files that are not as they were saved, and ValueError for a lens with another model
    or tokenizer.
    """
    folder = expand_path(folder)
    saved = read_recording(folder)
    run_info = saved.run_info
    if lens is not None:
        for what, of_file, of_lens in (
            ("model", run_info.model_hash(), lens.model_hash),
            ("tokenizer", saved.tokenizer_hash, lens.tokenizer_hash),
        ):
            if of_lens != of_file:
                raise ValueError(f"{folder} was recorded with {what} {of_file}; this lens has {of_lens}")
        run_info = replace(run_info, model=lens.model, tokenizer=lens.tokenizer)
    return Activations(saved.values, saved.names, run_info)
