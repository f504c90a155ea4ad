"""Finished cells of a sweep on disk, so that it can go on where it was interrupted."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from glmlens.patch.checkpoint_keys import differing
from glmlens.patch.sites import PatchError
from glmlens.storage import TensorFile, expand_path, write_tensors

FORMAT = "glmlens.Sweep"


@dataclass
class SweepCheckpoint:
    """Finished cells on disk, under keys that say what they are cells of."""

    path: Path | None
    keys: Mapping[str, str]
    arrays: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def open(path: str | Path | None, keys: Mapping[str, str]) -> "SweepCheckpoint":
        """The store at a path, with what is in it; PatchError when that is of another sweep, saying what differs."""
        where = None if path is None else expand_path(path, PatchError)
        store = SweepCheckpoint(where, keys)
        if where is not None and os.path.lexists(where):
            file = TensorFile(where, OtherFile)
            file.expect_format(FORMAT, "holds no cells of a sweep")
            other = differing(read_keys(file.metadata.get("key", "")), keys)
            if other:
                raise OtherFile(f"{path} holds cells of another sweep, with other {' and '.join(other)}")
            store.arrays = {name: file.read(name) for name in file.names}
        return store

    def load_cells(self, name: str, values: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        """The finished cells of this name, or those given where there are none."""
        if name not in self.arrays:
            return values, changed
        kept = self.arrays[name], self.arrays.get(f"{name} moved", values)
        for found, expected in zip(kept, (values, changed), strict=True):
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise OtherFile(
                    f"{self.path}: cells of {found.dtype} {tuple(found.shape)}, "
                    f"expected {expected.dtype} {tuple(expected.shape)}"
                )
        return kept[0].clone(), kept[1].clone()

    def save_cells(self, name: str, values: Tensor, changed: Tensor) -> None:
        if self.path is None:
            return
        self.arrays |= {name: values, f"{name} moved": changed}
        metadata = {"format": FORMAT, "key": json.dumps(self.keys)}
        # Without waiting for the disk: what a power cut takes is run again, and a sweep saves often.
        write_tensors(self.path, self.arrays, metadata, PatchError, sync=False)


class OtherFile(PatchError):
    """A checkpoint that cannot be gone on with."""

    def __init__(self, why: str):
        super().__init__(f"{why}: give another file, or remove it")


def read_keys(text: str) -> dict[str, str]:
    """The keys that a file was written under; none where they cannot be read."""
    try:
        keys = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return keys if isinstance(keys, dict) else {}
