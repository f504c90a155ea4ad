"""Finished cells of a sweep on disk, so that it can go on where it was interrupted."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from glmlens.patch.sites import PatchError
from glmlens.storage import TensorFile, expand_path, write_tensors

FORMAT = "glmlens.Sweep"


@dataclass
class Store:
    """Finished cells on disk, under a key that says what they are cells of."""

    path: Path | None
    key: str
    parts: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def at(path: str | Path | None, said: tuple) -> "Store":
        """The store at a path, with what is in it; PatchError when that is of another sweep, or no store."""
        where = None if path is None else expand_path(path, PatchError)
        store = Store(where, hashlib.sha256(repr(said).encode()).hexdigest())
        if where is not None and os.path.lexists(where):
            file = TensorFile(where, OtherFile)
            file.expect_format(FORMAT, "holds no cells of a sweep")
            if file.metadata.get("key") != store.key:
                raise PatchError(f"{path} holds cells of another sweep: give another file, or remove it")
            store.parts = {name: file.read(name) for name in file.names}
        return store

    def load(self, name: str, values: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The finished cells of this name, or those given where there are none."""
        if name not in self.parts:
            return values, moved
        kept = self.parts[name], self.parts.get(f"{name} moved", values)
        for found, expected in zip(kept, (values, moved), strict=True):
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise OtherFile(
                    f"{self.path}: cells of {found.dtype} {tuple(found.shape)}, "
                    f"expected {expected.dtype} {tuple(expected.shape)}"
                )
        return kept[0].clone(), kept[1].clone()

    def save(self, name: str, values: Tensor, moved: Tensor) -> None:
        if self.path is None:
            return
        self.parts |= {name: values, f"{name} moved": moved}
        # Without waiting for the disk: what a power cut takes is run again, and a sweep saves often.
        write_tensors(self.path, self.parts, {"format": FORMAT, "key": self.key}, PatchError, sync=False)


class OtherFile(PatchError):
    """A checkpoint that cannot be gone on with."""

    def __init__(self, why: str):
        super().__init__(f"{why}: give another file, or remove it")
