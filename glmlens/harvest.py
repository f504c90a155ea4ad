"""Activations of any number of prompts on disk: written in shards, resumed after being killed, read piece by piece."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from glmlens.activations import Activations
from glmlens.hooks import HookError, axes_of, local_name, resolve
from glmlens.prompt_kinds import check_one_prompt, plain_data, read_prompts

MANIFEST = "harvest.json"


@runtime_checkable
class Runs(Protocol):
    """What harvesting asks of a lens."""

    def points(self, prompt: Any = None) -> Sequence[Any]: ...
    def run_with_cache(
        self, prompt: Any = None, names: Any = "all", *, logits: bool = True
    ) -> tuple[Tensor | None, Activations]: ...


@dataclass(frozen=True)
class Harvest:
    """Activations on disk, a row per token: `h["resid_post", 3]` is [token, model], read when it is asked for.

    `h.tokens`, `h.positions` (absolute) and `h.prompts` (the index of the prompt) are [token]. `h.batches(name, n)`
    reads a shard at a time.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return self.manifest["names"]

    def __len__(self) -> int:
        """How many tokens there are."""
        return sum(shard["tokens"] for shard in self.manifest["shards"])

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        return torch.cat(list(self.shards(self._name(key)))) if len(self) else torch.empty(0)

    @property
    def tokens(self) -> Int[Tensor, "token"]:
        return torch.cat(list(self.shards("of.tokens")))

    @property
    def positions(self) -> Int[Tensor, "token"]:
        return torch.cat(list(self.shards("of.positions")))

    @property
    def prompts(self) -> Int[Tensor, "token"]:
        return torch.cat(list(self.shards("of.prompts")))

    def batches(self, key: str | tuple[str, int], size: int = 4096) -> Iterator[Tensor]:
        """The rows in order, `size` at a time, with no more than a shard in memory."""
        for shard in self.shards(self._name(key)):
            yield from shard.split(size)

    def shards(self, name: str) -> Iterator[Tensor]:
        for shard in self.manifest["shards"]:
            with safe_open(self.folder / shard["file"], framework="pt") as file:
                yield file.get_tensor(name)

    def _name(self, key: str | tuple[str, int]) -> str:
        name = f"blocks.{key[1]}.{key[0]}" if isinstance(key, tuple) else key
        if name not in self.names:
            raise HookError(f"{name!r} was not harvested; there are {', '.join(self.names[:6])}")
        return name

    def __repr__(self) -> str:
        done = "" if self.manifest["done"] else ", not finished"
        what = f"{len(self):,} tokens of {self.manifest['prompts']:,} prompts at {len(self.names)} points"
        return f"Harvest({what}, model {self.manifest['model']}, {self.folder}{done})"


def load_harvest(folder: str | Path) -> Harvest:
    """The harvest in a folder, finished or not. Raises FileNotFoundError."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"{folder} holds no harvest: there is no {MANIFEST}")
    return Harvest(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


@dataclass
class Shard:
    """The rows of the prompts since the last shard was written."""

    names: list[str]
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    tokens: int = 0
    prompts: int = 0
    texts: Any = field(default_factory=hashlib.sha256)

    def add(self, acts: Activations, texts: Sequence[Any], first: int) -> None:
        """Take the real tokens of a batch of prompts, of which `first` is the index of the first."""
        assert acts.of is not None
        real = acts.of.positions >= 0
        index = torch.arange(first, first + len(texts), device=real.device)[:, None].expand_as(real)
        rows = {"of.tokens": acts.tokens[real], "of.positions": acts.of.positions[real], "of.prompts": index[real]}
        rows |= {name: acts[name][real] for name in self.names}
        self.parts.append({name: x.cpu() for name, x in rows.items()})
        self.tokens += int(real.sum())
        self.prompts += len(texts)
        for text in texts:
            self.texts.update(said(text))

    def write(self, folder: Path, number: int) -> dict[str, Any]:
        """Write the shard, whole or not at all; its line in the manifest."""
        file = f"shard-{number:05}.safetensors"
        save_file(
            {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}, folder / f"{file}.new"
        )
        os.replace(folder / f"{file}.new", folder / file)
        return {"file": file, "tokens": self.tokens, "prompts": self.prompts, "texts": self.texts.hexdigest()}


def said(prompt: Any) -> bytes:
    """A prompt as bytes, to tell it from others."""
    return repr(plain_data(prompt)).encode() + b"\0"


def harvest(
    lens: Runs,
    prompts: Iterable[Any],
    names: str | Sequence[str],
    out: str | Path,
    *,
    hashes: Mapping[str, str],
    batch: int = 16,
    shard_tokens: int = 16_384,
) -> Harvest:
    """Run prompts one batch after the other and write what was at the named points to shards in `out`.

    Every prompt is a text, a chat or a row of token ids; of a row of a dataset it is `row["text"]`. `hashes` tell the
    model and tokenizer from others. Memory holds one batch and one shard. A shard is written whole, then said in the
    manifest: killed at any moment, the same call goes on after the last shard, nothing lost and nothing twice.
    Interrupting writes what there is and returns it.
    Raises TypeError for what is no prompt, HookError for a point without a row per token, and ValueError when `out`
    holds the harvest of another model, tokenizer, set of points or prompts.
    """
    prompts = read_prompts(prompts)
    folder, points = Path(out), resolve(names, [point.name for point in lens.points()])
    for name in points:
        if "pos" not in axes_of(name) or local_name(name) in ("kv.k", "kv.v"):
            raise HookError(f"{name!r} has no row per token ({' '.join(axes_of(name))}): it cannot be harvested")
    manifest = begun(folder, hashes, points)
    left = unseen(iter(prompts), manifest["shards"], folder)
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
                    close(folder, manifest, shard)
                    shard = Shard(points)
            manifest["done"] = True
        except KeyboardInterrupt:
            pass
        close(folder, manifest, shard)
    return Harvest(folder, manifest)


def begun(folder: Path, hashes: Mapping[str, str], points: list[str]) -> dict[str, Any]:
    """The manifest to go on from: the one in the folder if it is of the same model and points, or a new one."""
    mine = {"format": "glmlens.Harvest 1", **hashes, "names": points}
    if not (folder / MANIFEST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        return {**mine, "prompts": 0, "done": False, "shards": []}
    found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for what, asked in mine.items():
        if found.get(what) != asked:
            raise ValueError(
                f"{folder} is a harvest with {what} {found.get(what)!r}, not {asked!r}: give another folder"
            )
    return {**found, "done": False}


def unseen(prompts: Iterator[Any], shards: list[dict[str, Any]], folder: Path) -> Iterator[Any]:
    """The prompts after those of the shards, which must be the same as before."""
    for shard in shards:
        texts = hashlib.sha256()
        for prompt in itertools.islice(prompts, shard["prompts"]):
            texts.update(said(prompt))
        if texts.hexdigest() != shard["texts"]:
            raise ValueError(
                f"{folder / shard['file']} was made of other prompts: give another folder, or the same prompts"
            )
    return prompts


def close(folder: Path, manifest: dict[str, Any], shard: Shard) -> None:
    """Write the shard if it holds anything, and then the manifest that says so."""
    if shard.parts:
        manifest["shards"] = [*manifest["shards"], shard.write(folder, len(manifest["shards"]))]
        manifest["prompts"] += shard.prompts
    (folder / f"{MANIFEST}.new").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(folder / f"{MANIFEST}.new", folder / MANIFEST)
