"""Activations of any number of prompts on disk: written in shards, resumed after a kill, read shard by shard."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from glmlens.file_io import (
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
from glmlens.hook_points import HookError, axes_of, local_name, resolve_names
from glmlens.integers import Integer, read_integer
from glmlens.recording.activations import Activations
from glmlens.text.prompt_kinds import check_one_prompt, plain_data, read_prompts

HARVEST_MANIFEST = "harvest.json"
FORMAT = "glmlens.Harvest 2"


@runtime_checkable
class RecordableLens(Protocol):
    """The methods of a lens that harvesting uses."""

    def points(self, prompt: Any = None) -> Sequence[Any]: ...
    def run_with_cache(
        self, prompt: Any = None, names: Any = "all", *, logits: bool = True
    ) -> tuple[Tensor | None, Activations]: ...


@dataclass(frozen=True)
class Harvest:
    """Activations on disk, a row per token: `h["resid_post", 3]` is [token, model], read on access.

    `h.tokens`, `h.positions` (absolute) and `h.prompts` (the index of the prompt) are [token]. `h.batches(name, n)`
    reads a shard at a time.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The full names of the harvested points."""
        return self.manifest["names"]

    def __len__(self) -> int:
        """The number of tokens."""
        return sum(shard["tokens"] for shard in self.manifest["shards"])

    def __getitem__(self, key: str | tuple[str, Integer]) -> Tensor:
        return self._concatenate_shards(self._resolve_key(key))

    @property
    def tokens(self) -> Int[Tensor, "token"]:
        """The token ids."""
        return self._concatenate_shards("of.tokens")

    @property
    def positions(self) -> Int[Tensor, "token"]:
        """The absolute position of each token in its prompt."""
        return self._concatenate_shards("of.positions")

    @property
    def prompts(self) -> Int[Tensor, "token"]:
        """The index of each token's prompt."""
        return self._concatenate_shards("of.prompts")

    def batches(self, key: str | tuple[str, Integer], size: Integer = 4096) -> Iterator[Tensor]:
        """Yield the rows in order, `size` at a time, with at most one shard in memory."""
        size = read_integer(size, "size", least=1)
        for shard in self.shards(self._resolve_key(key)):
            yield from shard.split(size)

    def shards(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of one point, shard by shard. Raises FileError for a shard that was changed."""
        for shard in self.manifest["shards"]:
            file = open_shard(self.folder, shard)
            rows = file.read(name)
            if rows.shape[:1] != (shard["tokens"],):
                raise FileError(f"{file.path}: {name!r} is {tuple(rows.shape)}; expected {shard['tokens']:,} rows")
            yield rows

    def _concatenate_shards(self, name: str) -> Tensor:
        """Return the rows of all shards, copied into one tensor shard by shard."""
        joined = torch.empty(0, dtype=torch.long if name.startswith("of.") else torch.float32)
        begin = 0
        for rows in self.shards(name):
            if not begin:
                joined = rows.new_empty(len(self), *rows.shape[1:])
            if rows.shape[1:] != joined.shape[1:] or rows.dtype != joined.dtype:
                raise FileError(f"{self.folder}: {name!r} is not of one shape and dtype in all shards: harvest again")
            joined[begin : begin + len(rows)] = rows
            begin += len(rows)
        return joined

    def _resolve_key(self, key: str | tuple[str, Integer]) -> str:
        name = f"blocks.{read_integer(key[1], 'layer')}.{key[0]}" if isinstance(key, tuple) else key
        if name not in self.names:
            raise HookError(f"{name!r} was not harvested; there are {', '.join(self.names[:6])}")
        return name

    def __repr__(self) -> str:
        unfinished = "" if self.manifest["done"] else ", not finished"
        counts = f"{len(self):,} tokens of {self.manifest['prompts']:,} prompts at {len(self.names)} points"
        return f"Harvest({counts}, model {self.manifest['model']}, {self.folder}{unfinished})"


def load_harvest(folder: str | Path) -> Harvest:
    """Return the harvest in a folder, finished or not.

    Raises FileNotFoundError, and FileError for files that are not as they were written.
    """
    folder = expand_path(folder)
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{folder} holds no harvest: there is no {HARVEST_MANIFEST}") from e
    return Harvest(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest in a folder; FileError unless every field is as `harvest` writes it."""
    manifest = read_json(folder / HARVEST_MANIFEST)
    where = str(folder / HARVEST_MANIFEST)
    if manifest.get("format") != FORMAT:
        raise FileError(f"{where}: expected {FORMAT!r}, found {manifest.get('format')!r:.80}: harvest again")
    field_of(manifest, "model", str, where)
    field_of(manifest, "tokenizer", str, where)
    field_of(manifest, "done", bool, where)
    list_of(manifest, "names", str, where)
    counted = 0
    for number, shard in enumerate(list_of(manifest, "shards", dict, where)):
        if shard.get("file") != name_shard(number):  # which excludes paths out of this folder
            raise FileError(f"{where}: expected {name_shard(number)!r} as a shard, found {shard.get('file')!r:.80}")
        field_of(shard, "tokens", int, where)
        field_of(shard, "texts", str, where)
        field_of(shard, "header", str, where)
        counted += field_of(shard, "prompts", int, where)
    if counted != field_of(manifest, "prompts", int, where):
        raise FileError(f"{where}: {manifest['prompts']:,} prompts in all; its shards have {counted:,}")
    return manifest


def name_shard(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05}.safetensors"


def open_shard(folder: Path, shard: Mapping[str, Any]) -> TensorFile:
    """Open a shard. Raises FileError unless it is the file that its line in the manifest was written for."""
    path = folder / shard["file"]
    try:
        file = TensorFile(path)
    except FileNotFoundError as e:
        raise FileError(
            f"{path}: not found, though {HARVEST_MANIFEST} names it: bring it back, or harvest again"
        ) from e
    if file.header != shard["header"]:
        raise FileError(
            f"{path} is not the shard that {HARVEST_MANIFEST} was written with: bring that back, or harvest again"
        )
    return file


@dataclass
class Shard:
    """The rows of the prompts since the last shard was written, on the CPU."""

    names: list[str]
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    tokens: int = 0
    prompts: int = 0
    prompt_digest: Any = field(default_factory=hashlib.sha256)

    def add(self, acts: Activations, batch: Sequence[Any], first_index: int) -> None:
        """Add the real tokens of a batch of prompts; `first_index` is the index of its first prompt."""
        assert acts.run_info is not None
        real = acts.run_info.positions >= 0
        index = torch.arange(first_index, first_index + len(batch), device=real.device)[:, None].expand_as(real)
        rows = {
            "of.tokens": acts.tokens[real],
            "of.positions": acts.run_info.positions[real],
            "of.prompts": index[real],
        }
        rows |= {name: acts[name][real] for name in self.names}
        self.parts.append({name: x.cpu() for name, x in rows.items()})
        self.tokens += int(real.sum())
        self.prompts += len(batch)
        for text in batch:
            self.prompt_digest.update(encode_prompt(text))

    def write(self, folder: Path, number: int) -> dict[str, Any]:
        """Write the shard atomically and return its entry in the manifest."""
        rows = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
        header = write_tensors(folder / name_shard(number), rows)
        counts = {"tokens": self.tokens, "prompts": self.prompts}
        return {"file": name_shard(number), **counts, "texts": self.prompt_digest.hexdigest(), "header": header}


def encode_prompt(prompt: Any) -> bytes:
    """Return a prompt as bytes, for the digest that identifies the prompts of a shard."""
    return repr(plain_data(prompt)).encode() + b"\0"


def harvest(
    lens: RecordableLens,
    prompts: Iterable[Any],
    names: str | Sequence[str],
    out: str | Path,
    *,
    hashes: Mapping[str, str],
    batch: Integer = 16,
    shard_tokens: Integer = 16_384,
) -> Harvest:
    """Run prompts batch by batch and write the activations at the named points to shards in `out`.

    Every prompt is a text, a chat or a row of token ids; of a dataset's row pass `row["text"]`. `hashes` identify the
    model and tokenizer. Memory holds one batch and one shard. A shard is written atomically and then entered in the
    manifest: after a kill at any moment the same call continues after the last shard, without loss or duplicates.
    Interrupting writes the rows so far and returns the harvest. The folder is locked during the call.

    Raises TypeError for what is no prompt, HookError for a point without a row per token, and ValueError when `out`
    holds the harvest of another model, tokenizer, set of points or prompts, or files that are not as they were written,
    or when another harvest is under way there.
    """
    prompts = read_prompts(prompts)
    batch, shard_tokens = read_integer(batch, "batch", least=1), read_integer(shard_tokens, "shard_tokens", least=1)
    folder, points = expand_path(out), resolve_names(names, [point.name for point in lens.points()])
    for name in points:
        if "pos" not in axes_of(name) or local_name(name) in ("kv.k", "kv.v"):
            raise HookError(f"{name!r} has no row per token ({' '.join(axes_of(name))}): it cannot be harvested")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "a harvest"):
        manifest = open_manifest(folder, hashes, points)
        left = skip_harvested(iter(prompts), manifest["shards"], folder)
        shard = Shard(points)
        with tqdm(initial=manifest["prompts"], unit=" prompts", desc="harvesting") as bar:
            try:
                while chunk := list(itertools.islice(left, batch)):
                    for i, prompt in enumerate(chunk, manifest["prompts"] + shard.prompts):
                        check_one_prompt(prompt, i)
                    _, acts = lens.run_with_cache(chunk, points, logits=False)
                    shard.add(acts, chunk, manifest["prompts"] + shard.prompts)
                    bar.update(len(chunk))
                    if shard.tokens >= shard_tokens:
                        commit_shard(folder, manifest, shard)
                        shard = Shard(points)
                manifest["done"] = True
            except KeyboardInterrupt:
                pass
            commit_shard(folder, manifest, shard)
    return Harvest(folder, manifest)


def open_manifest(folder: Path, hashes: Mapping[str, str], points: list[str]) -> dict[str, Any]:
    """Return the manifest to continue: that in the folder, or a new one; ValueError for another model or points."""
    expected = {"format": FORMAT, **hashes, "names": points}
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return {**expected, "prompts": 0, "done": False, "shards": []}
    for what, value in expected.items():
        if manifest.get(what) != value:
            raise ValueError(
                f"{folder} is a harvest with {what} {manifest.get(what)!r}, not {value!r}: give another folder"
            )
    for shard in manifest["shards"]:
        open_shard(folder, shard)  # raises FileError for a shard that was changed
    return {**manifest, "done": False}


def skip_harvested(prompts: Iterator[Any], shards: list[dict[str, Any]], folder: Path) -> Iterator[Any]:
    """Return the prompts after those of the shards; ValueError where the first ones are not those of the shards."""
    for shard in shards:
        texts = hashlib.sha256()
        for prompt in itertools.islice(prompts, shard["prompts"]):
            texts.update(encode_prompt(prompt))
        if texts.hexdigest() != shard["texts"]:
            raise ValueError(
                f"{folder / shard['file']} was made of other prompts: give another folder, or the same prompts"
            )
    return prompts


def commit_shard(folder: Path, manifest: dict[str, Any], shard: Shard) -> None:
    """Write the shard if it holds rows, and then the manifest with its entry."""
    refuse_another(folder, manifest)
    if shard.parts:
        manifest["shards"] = [*manifest["shards"], shard.write(folder, len(manifest["shards"]))]
        manifest["prompts"] += shard.prompts
    write_json(folder / HARVEST_MANIFEST, manifest)


def refuse_another(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise FileError if the manifest on disk is not the one that was read or written last.

    The lock excludes other harvests. This check finds them on file systems without locks.
    """
    on_disk = read_manifest(folder)["shards"] if os.path.lexists(folder / HARVEST_MANIFEST) else []
    if on_disk != manifest["shards"]:
        raise FileError(f"{folder}: something else wrote {HARVEST_MANIFEST} meanwhile: nothing more is written there")
