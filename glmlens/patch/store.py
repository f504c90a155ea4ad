"""Finished cells of a sweep on disk, so that it can go on where it was interrupted."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glmlens.patch.sites import PatchError


@dataclass
class Store:
    """Finished cells on disk, under a key that says what they are cells of."""

    path: Path | None
    key: str
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def at(path: str | Path | None, said: tuple) -> "Store":
        """The store at a path, with what is in it; PatchError when that is of another sweep."""
        store = Store(None if path is None else Path(path), hashlib.sha256(repr(said).encode()).hexdigest())
        if store.path is not None and store.path.exists():
            with np.load(store.path) as file:
                store.parts = dict(file)
            if str(store.parts.pop("key")) != store.key:
                raise PatchError(f"{path} holds cells of another sweep: give another file, or remove it")
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
            np.savez(file, key=np.array(self.key), **self.parts)  # pyright: ignore[reportArgumentType]
        os.replace(beside, self.path)
