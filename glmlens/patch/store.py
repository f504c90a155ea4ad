"""Finished cells of a sweep on disk, so that it can go on where it was interrupted."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glmlens.patch.keys import differing
from glmlens.patch.sites import PatchError


@dataclass
class Store:
    """Finished cells on disk, under keys that say what they are cells of."""

    path: Path | None
    keys: Mapping[str, str]
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def at(path: str | Path | None, keys: Mapping[str, str]) -> "Store":
        """The store at a path, with what is in it; PatchError when that is of another sweep, saying what differs."""
        store = Store(None if path is None else Path(path), keys)
        if store.path is not None and store.path.exists():
            with np.load(store.path) as file:
                store.parts = dict(file)
            other = differing(keys_of(str(store.parts.pop("key", ""))), keys)
            if other:
                raise PatchError(
                    f"{path} holds cells of another sweep, with other {' and '.join(other)}: give another file, or "
                    "remove it"
                )
        return store

    def load(self, name: str, values: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.parts:
            return values, moved
        return torch.from_numpy(self.parts[name].copy()), torch.from_numpy(self.parts[f"{name} moved"].copy())

    def save(self, name: str, values: Tensor, moved: Tensor) -> None:
        if self.path is None:
            return
        self.parts |= {name: values.numpy(), f"{name} moved": moved.numpy()}
        beside = self.path.with_name(f".{self.path.name}.part")
        with beside.open("wb") as file:
            np.savez(file, key=np.array(json.dumps(self.keys)), **self.parts)  # pyright: ignore[reportArgumentType]
        os.replace(beside, self.path)


def keys_of(said: str) -> dict[str, str]:
    """The keys that a file was written under; none where an older version wrote it."""
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
