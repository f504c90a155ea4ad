"""Recordings outside memory: their files in a folder, and the plain data in a pickle.

A folder holds `activations.safetensors`, one tensor per stored point (`name@i` for step i of a list) with the run's
tensors as `of.tokens`, `of.positions` and `of.key_positions`, and `manifest.json`, which is written last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmlens.file_io import FileError, TensorFile, field_of, list_of, lock_folder, read_json, write_json, write_tensors
from glmlens.hook_points import axes_of
from glmlens.recording.run_info import RunInfo
from glmlens.text.tokenizer import RowTexts

PointValue = Tensor | list[Tensor]
RECORDING_MANIFEST = "manifest.json"
RECORDING_FILE = "activations.safetensors"
FORMAT = "glmlens.Activations 2"


class LazyValues(Mapping[str, PointValue]):
    """The values in a recording's file, each read when it is accessed."""

    def __init__(self, path: Path):
        self.file = TensorFile(path)
        self.keys_by_name: dict[str, list[str]] = {}
        for key in self.file.names:
            name, _, step = key.partition("@")
            if step and not step.isdecimal():
                raise FileError(f"{path}: {key!r:.80} is no point of a recording")
            if not key.startswith("of."):  # the run's tokens and positions, which are no points
                self.keys_by_name.setdefault(name, []).append(key)

    def __getitem__(self, name: str) -> PointValue:
        return self._collect(name, self.file.read)

    def outline(self, name: str) -> PointValue:
        """Return the value on the meta device: shape and dtype, without reading it."""
        return self._collect(name, self.file.outline)

    def _collect(self, name: str, read: Callable[[str], Tensor]) -> PointValue:
        keys = self.keys_by_name[name]
        if keys == [name]:
            return read(name)
        # The file lists its keys in the order of text, in which step 10 comes before step 2.
        return [read(key) for key in sorted(keys, key=lambda key: int(key.partition("@")[2] or -1))]

    def __contains__(self, name: object) -> bool:
        return name in self.keys_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_by_name)

    def __len__(self) -> int:
        return len(self.keys_by_name)


@dataclass(frozen=True)
class SavedRecording:
    """A recording read from its folder: values read on access, names of points, and the run without its model."""

    values: LazyValues
    names: list[str]
    run_info: RunInfo
    tokenizer_hash: str


def write_recording(folder: Path, values: Mapping[str, PointValue], names: Sequence[str], run_info: RunInfo) -> None:
    """Write a recording to a folder, atomically; FileExistsError when the folder holds one already."""
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, list):
            tensors |= {f"{name}@{i}": x for i, x in enumerate(value)}
        else:
            tensors[name] = value
    run_tensors = {
        "positions": run_info.positions, "key_positions": run_info.key_positions, "tokens": run_info.tokens,
    }  # fmt: skip
    tensors |= {f"of.{name}": x for name, x in run_tensors.items() if x is not None}
    manifest = {
        "format": FORMAT, "model": run_info.model_hash(), "edited": sorted(run_info.edited_points),
        "tokenizer": run_info.tokenizer.fingerprint() if run_info.tokenizer else "none", "names": list(names),
        "past_entries": run_info.past_entries, "by_steps": run_info.over_steps,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "a recording"):
        if (folder / RECORDING_MANIFEST).exists():
            raise FileExistsError(f"{folder} holds a recording already: give another folder")
        # The manifest is written last and holds the header of the values: values without it are no recording.
        header = write_tensors(folder / RECORDING_FILE, tensors)
        write_json(folder / RECORDING_MANIFEST, {**manifest, "values": header})


def read_recording(folder: Path) -> SavedRecording:
    """Read the recording in a folder; FileNotFoundError without one, FileError for files changed since."""
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
    model_hash = field_of(manifest, "model", str, where)
    tokenizer_hash = field_of(manifest, "tokenizer", str, where)
    names = list_of(manifest, "names", str, where)
    edited = list_of(manifest, "edited", str, where)
    past_entries = field_of(manifest, "past_entries", bool, where)
    over_steps = field_of(manifest, "by_steps", bool, where)
    values = LazyValues(folder / RECORDING_FILE)
    if values.file.header != field_of(manifest, "values", str, where):
        raise FileError(
            f"{folder / RECORDING_FILE} is not the file that {RECORDING_MANIFEST} was written with: record again"
        )
    run_tensors = values.file.read_all("a recording", ("of.positions", "of.key_positions"), ("of.tokens",))
    check_shapes(folder, names, values, run_tensors)
    run_info = RunInfo(
        tokens=run_tensors.get("of.tokens"),
        positions=run_tensors["of.positions"],
        key_positions=run_tensors["of.key_positions"],
        model_hash=lambda: model_hash,
        edited_points=frozenset(edited),
        past_entries=past_entries,
        over_steps=over_steps,
    )
    return SavedRecording(values, names, run_info, tokenizer_hash)


def check_shapes(folder: Path, names: Sequence[str], values: LazyValues, run_tensors: Mapping[str, Tensor]) -> None:
    """Raise FileError unless points, positions and shapes in a recording's files can be those of one run."""
    positions = run_tensors["of.positions"]
    for name, x in run_tensors.items():
        expected = x.shape if name == "of.key_positions" else positions.shape
        if x.dtype != torch.long or x.ndim != 2 or len(x) != len(positions) or x.shape != expected:
            raise FileError(
                f"{folder / RECORDING_FILE}: {name} is {x.dtype} {tuple(x.shape)}: not the positions of a run"
            )
    for name in (*names, *values):
        try:
            axes = axes_of(name)
        except (LookupError, ValueError) as e:
            raise FileError(f"{folder}: {name!r:.80} is no point of a model") from e
        for key in values.keys_by_name.get(name, ()):
            shape = values.file.shape(key)
            if len(shape) != len(axes) or shape[0] != len(positions):
                raise FileError(f"{folder / RECORDING_FILE}: {key} is {shape}; expected {' '.join(axes)}")


def run_info_to_plain(run_info: RunInfo) -> dict[str, Any]:
    """Return a run info as tensors, strings, lists and dicts alone; the tokenizer as the texts of the run's tokens.

    The keys are those of pickles that exist: they do not follow the names of `RunInfo`'s fields.
    """
    texts = None
    if run_info.tokenizer is not None and run_info.tokens is not None:
        texts = RowTexts.of(run_info.tokenizer, run_info.list_rows())
    return {
        "tokens": run_info.tokens,
        "positions": run_info.positions,
        "key_positions": run_info.key_positions,
        "model_hash": run_info.model_hash(),
        "edited": sorted(run_info.edited_points),
        "past_entries": run_info.past_entries,
        "by_steps": run_info.over_steps,
        "tokenizer": texts and {"hash": texts.hash, "rows": dict(texts.rows)},
    }


def run_info_from_plain(plain: Mapping[str, Any]) -> RunInfo:
    """Return the run info that `run_info_to_plain` was given, without model and tokenizer."""
    model_hash, texts = plain["model_hash"], plain["tokenizer"]
    return RunInfo(
        tokens=plain["tokens"],
        positions=plain["positions"],
        key_positions=plain["key_positions"],
        model_hash=lambda: model_hash,
        tokenizer=RowTexts(**texts) if texts else None,
        edited_points=frozenset(plain["edited"]),
        past_entries=plain["past_entries"],
        over_steps=plain["by_steps"],
    )
