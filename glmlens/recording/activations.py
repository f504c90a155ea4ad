"""Recordings: labelled activations, what follows from them, and both on disk."""

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
from glmlens.hook_points import HookError, axes_of, local_name
from glmlens.integers import Integer, read_integer
from glmlens.model import GLM
from glmlens.recording.derive import RunContext, derive_point, is_derivable, make_underivable_check
from glmlens.storage import (
    FileError,
    TensorFile,
    expand_path,
    field_of,
    list_of,
    lock_folder,
    read_json,
    write_json,
    write_tensors,
)
from glmlens.text.tokenizer import RowTexts, Tokenizer
from glmlens.text_tables import format_bytes, format_ranges, format_table

PointValue = Tensor | list[Tensor]
RECORDING_MANIFEST, RECORDING_FILE, FORMAT = "manifest.json", "activations.safetensors", "glmlens.Activations 2"


class NotRecordedError(HookError, KeyError):
    """A point that a recording has not got."""

    __str__ = HookError.__str__


@dataclass(frozen=True, eq=False)
class RunInfo:
    """What a recording is of: the run's tokens and positions, the model and tokenizer, and how it was edited.

    `positions` [batch, pos] are absolute, -1 for padding. `named` gives the positions of a task's names. `model` is
    None when only its hash is known: nothing can be derived then.
    """

    tokens: Int[Tensor, "batch pos"] | None
    positions: Int[Tensor, "batch pos"]
    key_positions: Int[Tensor, "batch key"]
    model: GLM | None = None
    model_hash: Callable[[], str] = lambda: "unknown"
    tokenizer: Tokenizer | RowTexts | None = None
    find_named_positions: Callable[[str], Int[Tensor, "batch"]] | None = None
    edited_points: frozenset[str] = frozenset()
    past_entries: bool = False
    unchanged: Callable[[], bool] = lambda: True  # whether the model's weights are those of the run
    over_steps: bool = False  # joined over the steps of a generation: nothing is derived, each step had its own shape

    def is_derivable(self, name: str, stored: Mapping[str, Any]) -> bool:
        """Whether the point of this full name follows from what is stored."""
        if self.model is None or self.over_steps or not name.startswith(("blocks.", "ln_final.")):
            return False
        return is_derivable(
            name, self.model, stored, make_underivable_check(self.edited_points, self.model, self.past_entries)
        )

    def derive(self, name: str, available: ChainMap[str, Any]) -> Tensor | None:
        """The value that follows from what is there; HookError if the weights are not those of the run any more."""
        assert self.model is not None
        if not self.unchanged():
            raise HookError(
                f"{name!r} is not stored but computed from the weights, and they were edited after this run: name it "
                f"alone in names= when you run, or call acts.store_all() before the edit"
            )
        origin = RunContext(self.model, self.positions, self.key_positions)
        return derive_point(
            name, origin, available, make_underivable_check(self.edited_points, self.model, self.past_entries)
        )

    def to(self, device: torch.device) -> "RunInfo":
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(
            self, tokens=tokens, positions=self.positions.to(device), key_positions=self.key_positions.to(device)
        )


class Activations(Mapping[str, Any]):
    """What a run left at the points that were named, in the order in which they fired.

    `acts["blocks.3.attn.pattern"]` and `acts["attn.pattern", 3]` are one layer's; `acts["resid_post"]` is all layers
    stacked: [layer, batch, pos, model]. `acts.at("Mary")` and `acts.at("S2")` are the same at one position,
    `acts.row(2)` one prompt's alone. After a generation `kv.k` and `kv.v` are a list with a tensor per step.

    What follows from other points is not stored but computed when it is asked for, bit for bit what was there; with
    attention="sdpa" scores and pattern follow too, to 1e-6 of what the kernel does inside.
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
        self.run_info, self._gradients = run_info, gradients

    # ---- reading ----

    def __getitem__(self, key: str | tuple[str, Integer]) -> Any:
        return self._read(key, ChainMap({}, cast(Any, self.stored)))

    def _read(self, key: str | tuple[str, Integer], available: ChainMap[str, Any]) -> Any:
        """A point's value; what is derived on the way to many layers is looked up in `there`."""
        if isinstance(key, tuple):
            local, layer = key[0], read_integer(key[1], "layer", error=HookError)
            layers = self.layers(local) or self._all_layers()
            return self._read(f"blocks.{layer + max(layers, default=0) + 1 if layer < 0 else layer}.{local}", available)
        if key in self.stored:
            return self.stored[key]
        if self._is_derivable(key):
            return cast(RunInfo, self.run_info).derive(key, available)
        layers = self.layers(key) or [i for i in self._all_layers() if self._is_derivable(f"blocks.{i}.{key}")]
        if not layers:
            raise self._not_recorded_error(key)
        if layers != list(range(len(layers))):
            raise HookError(f"{key!r} was recorded at layers {layers} only: ask for one, acts[{key!r}, {layers[0]}]")
        parts = [self._read(f"blocks.{i}.{key}", available) for i in layers]
        if any(isinstance(part, list) for part in parts):
            raise HookError(f"{key!r} is a list with a tensor per step: ask for a layer, acts[{key!r}, {layers[0]}]")
        return torch.stack(cast(list[Tensor], parts))

    def _is_derivable(self, name: str) -> bool:
        return self.run_info is not None and self.run_info.is_derivable(name, self.stored)

    def _all_layers(self) -> list[int]:
        return (
            [] if self.run_info is None or self.run_info.model is None else list(range(len(self.run_info.model.blocks)))
        )

    def _not_recorded_error(self, key: str) -> NotRecordedError:
        local = local_name(key)
        if self.run_info is not None and self.run_info.model is None and (key in self.names or self.layers(local)):
            return NotRecordedError(f"{key!r} is not stored here; with the model it would follow: load with lens=")
        near = get_close_matches(key, [*self.names, *map(local_name, self.names)], 3, 0.5)
        hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
        return NotRecordedError(f"{key!r} was not recorded: name it in names= when you run.{hint}")

    def layers(self, local: str) -> list[int]:
        """The layers at which this point was recorded."""
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
        """The gradient of the metric at every point that was named, of the same shapes."""
        if self._gradients is None:
            raise HookError("no gradients were asked for: run with gradients_of=metric")
        return self._gradients

    # ---- places ----

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The token ids that were run, padding among them."""
        if self.require_run_info().tokens is None:
            raise HookError("this run entered with a residual stream or embeddings: it has no tokens")
        return cast(Tensor, self.require_run_info().tokens)

    @property
    def labels(self) -> list[list[str]]:
        """For every row, a label for every token, without padding."""
        of = self.require_run_info()
        rows = [row[at >= 0].tolist() for row, at in zip(self.tokens, of.positions, strict=True)]
        return [of.tokenizer.labels(row) if of.tokenizer else [f"⟨{i}⟩" for i in row] for row in rows]

    def at(self, where: Integer | str, occurrence: Integer | None = None) -> "AtPosition":
        """The same recording at one position of every row: absolute, a task's name for it, or the text of a token.

        Positions are the query's where there is one. Raises HookError for a text that a row says never, or several
        times when no `occurrence` (0 the first, -1 the last) is given.
        """
        return AtPosition(self, self.find(where, occurrence))

    def find(self, where: Integer | str, occurrence: Integer | None = None) -> Int[Tensor, "batch"]:
        """The absolute position of a place in every row; see `at`."""
        of = self.require_run_info()
        if not isinstance(where, str):
            where = read_integer(where, "position", error=HookError)
            last = of.positions.amax(1)
            found = last + 1 + where if where < 0 else torch.full_like(last, where)
            missing = (found[:, None] != of.positions).all(1)
            if bool(missing.any()):
                raise HookError(f"position {where} asked for; the rows end with {last.tolist()}")
            return found
        occurrence = None if occurrence is None else read_integer(occurrence, "occurrence", error=HookError)
        if of.find_named_positions is not None and occurrence is None:
            try:
                return of.find_named_positions(where).to(of.positions.device)
            except ValueError:
                pass
        return torch.tensor([self._find_token(row, where, occurrence) for row in range(len(of.positions))]).to(
            of.positions.device
        )

    def _find_token(self, row: int, text: str, occurrence: int | None) -> int:
        of = self.require_run_info()
        if of.tokenizer is None:
            raise HookError(f"no tokenizer to find {text!r} with: give an absolute position")
        real = of.positions[row] >= 0
        said = of.tokenizer.decode_each(self.tokens[row][real].tolist())
        places = [i for i, token in enumerate(said) if token == text] or [
            i for i, token in enumerate(said) if token.strip() == text.strip() != ""
        ]
        if not places:
            raise HookError(f"{text!r} is no token of row {row}: {said}")
        if occurrence is None and len(places) > 1:
            raise HookError(f"{text!r} stands at {places} in row {row}: say which, at({text!r}, occurrence=0)")
        if not -len(places) <= (occurrence or 0) < len(places):
            raise HookError(f"{text!r} stands {len(places)} times in row {row}; occurrence {occurrence} asked for")
        return int(of.positions[row][real][places[occurrence or 0]])

    def row(self, i: Integer) -> "Activations":
        """The recording of one prompt alone, without its padding and with a batch of one."""
        of, i = self.require_run_info(), read_integer(i, "row", error=HookError)
        if not -len(of.positions) <= i < len(of.positions):
            raise HookError(f"row {i} asked for; this recording has {len(of.positions)}")
        i %= len(of.positions)
        columns, keys = (at[i] >= 0 for at in (of.positions, of.key_positions))

        def cut(name: str, x: Any) -> Tensor:
            for along, axis in enumerate(axes_of(name)):
                if axis in ("pos", "query", "key"):
                    x = x.movedim(along, 0)[(keys if axis == "key" else columns)].movedim(0, along)
            return x

        named = of.find_named_positions and (lambda name: cast(Any, of.find_named_positions)(name)[i : i + 1])
        mine = replace(
            of,
            tokens=None if of.tokens is None else of.tokens[i : i + 1, columns],
            positions=of.positions[i : i + 1, columns],
            key_positions=of.key_positions[i : i + 1, keys],
            find_named_positions=named,
        )
        if any(isinstance(self._outline(name), list) for name in self.stored):
            raise HookError("this recording has a tensor per step at kv.k and kv.v: rows of it cannot be taken")
        values = {name: cut(name, x[i : i + 1]) for name, x in self.stored.items()}
        return Activations(values, self.names, mine, self._gradients and self._gradients.row(i))

    def require_run_info(self) -> RunInfo:
        if self.run_info is None:
            raise HookError("this recording was made by hand: it knows no tokens and no positions")
        return self.run_info

    # ---- moving ----

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Activations":
        """The recording on another device or in another dtype: away from its model, so all that was named is stored."""
        if dtype is None and (device is None or torch.device(device) == self.device):
            return self
        return self._stored(lambda x: x.to(device=device or x.device, dtype=dtype or x.dtype))

    def store_all(self) -> "Activations":
        """The recording with every named point stored, away from its model: later edits of weights cannot reach it."""
        return self._stored(lambda x: x)

    def _stored(self, fn: Callable[[Tensor], Tensor]) -> "Activations":
        stored = self._map_tensors(dict(self), fn)
        stored.run_info = stored.run_info and replace(stored.run_info, model=None, unchanged=lambda: True)
        return stored

    def __reduce__(self) -> Any:
        """Pickle what `store_all` holds, detached: values, tokens, positions, texts and the model's hash, no model.

        Names of a task's positions are not kept.
        """
        return restore_activations, (pickled(self),)

    def cpu(self) -> "Activations":
        return self.to("cpu")

    def detach(self) -> "Activations":
        """The recording without the graph behind it."""
        return self._map_tensors(self.stored, Tensor.detach)

    def _map_tensors(self, values: Mapping[str, PointValue], fn: Callable[[Tensor], Tensor]) -> "Activations":
        made = {name: [fn(x) for x in v] if isinstance(v, list) else fn(v) for name, v in values.items()}
        gradients = self._gradients and self._gradients._map_tensors(self._gradients.stored, fn)
        of = self.run_info if self.run_info is None or (at := find_device(made)) is None else self.run_info.to(at)
        return Activations(made, self.names, of, gradients)

    @property
    def device(self) -> torch.device | None:
        """Where the values are; None where there are none."""
        return find_device(self.stored)

    @property
    def bytes(self) -> int:
        """What is held for it: what is derived weighs nothing, what is shared weighs once."""
        if isinstance(self.stored, LazyValues):
            return sum(x.nbytes for x in iterate_tensors({name: self.stored.outline(name) for name in self.stored}))
        held = {
            (x.untyped_storage().data_ptr(), x.storage_offset(), x.nbytes): x.nbytes
            for x in iterate_tensors(self.stored)
        }
        return sum(held.values())

    # ---- disk ----

    def save(self, folder: str | Path) -> Path:
        """Write the recording to a folder, whole or not at all: the values as safetensors, and a manifest.

        Raises FileExistsError when there is a recording already.
        """
        folder, of = expand_path(folder), self.require_run_info()
        flat = {
            f"{name}@{i}" if isinstance(value, list) else name: x
            for name, value in self.stored.items()
            for i, x in enumerate(value if isinstance(value, list) else [value])
        }
        places = {"positions": of.positions, "key_positions": of.key_positions, "tokens": of.tokens}
        flat |= {f"of.{name}": x for name, x in places.items() if x is not None}
        manifest = {
            "format": FORMAT, "model": of.model_hash(), "edited": sorted(of.edited_points),
            "tokenizer": of.tokenizer.fingerprint() if of.tokenizer else "none", "names": self.names,
            "past_entries": of.past_entries, "by_steps": of.over_steps,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder, "a recording"):
            if (folder / RECORDING_MANIFEST).exists():
                raise FileExistsError(f"{folder} holds a recording already: give another folder")
            # The manifest comes last and knows the values' header: without it, or with another's, they are none.
            write_json(
                folder / RECORDING_MANIFEST, {**manifest, "values": write_tensors(folder / RECORDING_FILE, flat)}
            )
        return folder

    def _outline(self, name: str) -> PointValue:
        """What is stored at a point, of which only shapes, dtypes and bytes are asked: nothing is read for that."""
        return self.stored.outline(name) if isinstance(self.stored, LazyValues) else self.stored[name]

    # ---- showing ----

    def __repr__(self) -> str:
        return f"{self._title()}\n{format_table(self.summary_table())}"

    def _title(self) -> str:
        derived = len(self.names) - len([name for name in self.names if name in self.stored])
        return f"Activations: {len(self)} points, {format_bytes(self.bytes)}" + (
            f", {derived} derived" if derived else ""
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("name", "axes", "shape", "bytes"))
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in self.summary_table())
        return f"<div>{html.escape(self._title())}<table><tr>{head}</tr>{body}</table></div>"

    rows = rename_method("rows", "summary_table")

    def summary_table(self) -> list[tuple[str, str, str, str]]:
        """A line per point, layers together: name, axes, shape, bytes."""
        lines: dict[str, list[str]] = {}
        for name in self.names:
            lines.setdefault(local_name(name), []).append(name)
        out = []
        for local, names in lines.items():
            layers, held = self.layers(local), [self._outline(name) for name in names if name in self.stored]
            which = f"blocks.{format_ranges(layers)}.{local}" if layers else local
            weight = format_bytes(sum(x.nbytes for v in held for x in (v if isinstance(v, list) else [v])))
            first = held[0] if held else self._shown(names[0])
            per_step = f" x {len(first)} steps" if isinstance(first, list) else ""
            last = first[-1] if isinstance(first, list) else first
            shape = "not to be had" if last is None else str(tuple(last.shape)) + per_step
            out.append((which, " ".join(axes_of(local)), shape, weight if held else "derived"))
        return out

    def _shown(self, name: str) -> Any:
        """A derived point's value; None where it cannot be derived: without the model, or when weights were edited."""
        try:
            return self[name]
        except HookError:
            return None


@dataclass(frozen=True)
class AtPosition:
    """A recording at one position of every row: its values lack the axis `pos` (or `query`; or `key` at kv.k, kv.v)."""

    acts: Activations
    positions: Int[Tensor, "batch"]

    def __getitem__(self, key: str | tuple[str, Integer]) -> Tensor:
        x, local = self.acts[key], local_name(key[0] if isinstance(key, tuple) else key)
        if isinstance(x, list):
            raise HookError(f"{local!r} is a list with a tensor per step: take a step first")
        stacked = (
            isinstance(key, str) and key == local and local not in ("embed", "logits") and x.ndim > len(axes_of(local))
        )
        axes = ("layer", *axes_of(local)) if stacked else axes_of(local)
        axis = next(axis for axis in ("pos", "query", "key") if axis in axes)
        columns = self.find_columns(axis)
        rows = x.movedim((axes.index("batch"), axes.index(axis)), (0, 1))
        picked = rows[torch.arange(len(columns), device=x.device), columns]
        return picked.movedim(0, 1) if stacked else picked

    def find_columns(self, axis: str) -> Int[Tensor, "batch"]:
        """Where along this axis the positions lie."""
        of = cast(RunInfo, self.acts.run_info)
        there = of.key_positions if axis == "key" else of.positions
        return (there == self.positions[:, None]).int().argmax(1)

    def __repr__(self) -> str:
        return f"positions {self.positions.tolist()} of {self.acts!r}"


def pickled(acts: Activations) -> dict[str, Any]:
    """A recording as dictionaries, lists and tensors alone, so that torch.load reads it with weights_only too."""
    acts, of = acts.store_all().detach(), acts.run_info
    texts = None
    if of is not None and of.tokenizer is not None and of.tokens is not None:
        texts = RowTexts.of(
            of.tokenizer, [row[at >= 0].tolist() for row, at in zip(of.tokens, of.positions, strict=True)]
        )
    places = None if of is None else {
        "tokens": of.tokens, "positions": of.positions, "key_positions": of.key_positions,
        "model_hash": of.model_hash(), "edited": sorted(of.edited_points), "past_entries": of.past_entries,
        "by_steps": of.over_steps, "tokenizer": texts and {"hash": texts.hash, "rows": dict(texts.rows)},
    }  # fmt: skip
    gradients = acts._gradients and pickled(acts._gradients)
    return {"values": dict(acts.stored), "names": list(acts.names), "of": places, "gradients": gradients}


def restore_activations(state: dict[str, Any]) -> Activations:
    """The recording that was pickled."""
    of = None
    if state["of"] is not None:
        places = dict(state["of"])
        model_hash, texts = places.pop("model_hash"), places.pop("tokenizer")
        tokenizer = RowTexts(**texts) if texts else None
        places["edited"] = frozenset(places["edited"])
        of = RunInfo(**places, model_hash=lambda: model_hash, tokenizer=tokenizer)
    gradients = state["gradients"] and restore_activations(state["gradients"])
    return Activations(state["values"], state["names"], of, gradients)


torch.serialization.add_safe_globals([restore_activations])  # which runs nothing: plain values come in


def iterate_tensors(values: Mapping[str, PointValue]) -> Iterator[Tensor]:
    for value in values.values():
        yield from value if isinstance(value, list) else [value]


def find_device(values: Mapping[str, PointValue]) -> torch.device | None:
    return next((x.device for x in iterate_tensors(values)), None)


class LazyValues(Mapping[str, PointValue]):
    """The values in a recording's file, each read when it is asked for."""

    def __init__(self, path: Path):
        self.file = TensorFile(path)
        self.parts: dict[str, list[str]] = {}
        for key in self.file.names:
            name, _, step = key.partition("@")
            if step and not step.isdecimal():
                raise FileError(f"{path}: {key!r:.80} is no point of a recording")
            if not key.startswith("of."):
                self.parts.setdefault(name, []).append(key)

    def __getitem__(self, name: str) -> PointValue:
        return self._collect(name, self.file.read)

    def outline(self, name: str) -> PointValue:
        """The value on the meta device: its shapes and dtype, unread."""
        return self._collect(name, self.file.outline)

    def _collect(self, name: str, read: Callable[[str], Tensor]) -> PointValue:
        keys = self.parts[name]
        if keys == [name]:
            return read(name)
        return [read(key) for key in sorted(keys, key=lambda key: int(key.partition("@")[2] or -1))]

    def __contains__(self, name: object) -> bool:
        return name in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def load_activations(folder: str | Path, lens: Any = None) -> Activations:
    """The recording that `acts.save(folder)` wrote, read piece by piece as it is asked for.

    With the lens that it was recorded from, what follows from it is computed as before and texts are found. Raises
    FileNotFoundError, FileError for files that are not as they were saved, and ValueError for a lens with another model
    or tokenizer.
    """
    folder = expand_path(folder)
    path = folder / RECORDING_MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{folder} holds no whole recording: there is no {RECORDING_MANIFEST}") from e
    if manifest.get("format") != FORMAT:
        raise FileError(
            f"{folder} is {manifest.get('format')!r:.80}, not a recording that acts.save wrote ({FORMAT!r})"
        )
    where = str(path)
    hashes = {what: field_of(manifest, what, str, where) for what in ("model", "tokenizer")}
    if lens is not None:
        for what, found in (("model", lens.model_hash), ("tokenizer", lens.tokenizer_hash)):
            if found != hashes[what]:
                raise ValueError(f"{folder} was recorded with {what} {hashes[what]}; this lens has {found}")
    names, edited = (list_of(manifest, what, str, where) for what in ("names", "edited"))
    flags = {what: field_of(manifest, what, bool, where) for what in ("past_entries", "by_steps")}
    values = LazyValues(folder / RECORDING_FILE)
    if values.file.header != field_of(manifest, "values", str, where):
        raise FileError(
            f"{folder / RECORDING_FILE} is not the file that {RECORDING_MANIFEST} was written with: record again"
        )
    places = values.file.read_all("a recording", ("of.positions", "of.key_positions"), ("of.tokens",))
    refuse_other_shapes(folder, names, values, places)
    of = RunInfo(
        places.get("of.tokens"), places["of.positions"], places["of.key_positions"], model=lens and lens.model,
        model_hash=lambda: hashes["model"], tokenizer=lens and lens.tokenizer, edited_points=frozenset(edited), **flags,
    )  # fmt: skip
    return Activations(values, names, of)


def refuse_other_shapes(folder: Path, names: Sequence[str], values: LazyValues, places: Mapping[str, Tensor]) -> None:
    """Raise FileError unless points, positions and shapes of a recording in a folder are those of one run."""
    positions = places["of.positions"]
    for name, x in places.items():
        along = x.shape if name == "of.key_positions" else positions.shape
        if x.dtype != torch.long or x.ndim != 2 or len(x) != len(positions) or x.shape != along:
            raise FileError(
                f"{folder / RECORDING_FILE}: {name} is {x.dtype} {tuple(x.shape)}: not the positions of a run"
            )
    for name in (*names, *values):
        try:
            axes = axes_of(name)
        except (LookupError, ValueError) as e:
            raise FileError(f"{folder}: {name!r:.80} is no point of a model") from e
        for key in values.parts.get(name, ()):
            shape = values.file.shape(key)
            if len(shape) != len(axes) or shape[0] != len(positions):
                raise FileError(f"{folder / RECORDING_FILE}: {key} is {shape}; expected {' '.join(axes)}")
