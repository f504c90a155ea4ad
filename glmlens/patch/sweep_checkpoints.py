"""Store finished cells of a sweep on disk, so that it can continue where it was interrupted."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from glmlens.file_io import TensorFile, expand_path, write_tensors
from glmlens.patch.sites import PatchError
from glmlens.patch.sweep_checkpoint_keys import find_differing_keys

FORMAT = "glmlens.Sweep"


@dataclass
class SweepCheckpoint:
    """Finished cells on disk, with keys of everything that they depend on; without a path nothing is stored."""

    path: Path | None
    keys: Mapping[str, str]
    arrays: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def open(path: str | Path | None, keys: Mapping[str, str]) -> "SweepCheckpoint":
        """Open the file at a path and read its cells; raise PatchError for those of another sweep."""
        where = None if path is None else expand_path(path, PatchError)
        store = SweepCheckpoint(where, keys)
        if where is not None and os.path.lexists(where):
            file = TensorFile(where, OtherFile)
            file.expect_format(FORMAT, "holds no cells of a sweep")
            differing = find_differing_keys(read_keys(file.metadata.get("key", "")), keys)
            if differing:
                raise OtherFile(f"{path} holds cells of another sweep, with other {' and '.join(differing)}")
            store.arrays = {name: file.read(name) for name in file.names}
        return store

    def load_cells(self, name: str, values: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the finished cells of this name, or those given where there are none.

        Raise PatchError for cells of another shape or dtype.
        """
        if name not in self.arrays:
            return values, changed
        # "moved" is the name in files for `changed`
        stored = self.arrays[name], self.arrays.get(f"{name} moved", values)
        for array, expected in zip(stored, (values, changed), strict=True):
            if array.shape != expected.shape or array.dtype != expected.dtype:
                raise OtherFile(
                    f"{self.path}: cells of {array.dtype} {tuple(array.shape)}, "
                    f"expected {expected.dtype} {tuple(expected.shape)}"
                )
        return stored[0].clone(), stored[1].clone()

    def save_cells(self, name: str, values: Tensor, changed: Tensor) -> None:
        """Write all cells to the file, those of this name as given."""
        if self.path is None:
            return
        self.arrays |= {name: values, f"{name} moved": changed}
        metadata = {"format": FORMAT, "key": json.dumps(self.keys)}
        # A sweep saves after every batch, so do not wait for the disk: cells lost in a power cut are run again.
        write_tensors(self.path, self.arrays, metadata, PatchError, sync=False)


class OtherFile(PatchError):
    """A checkpoint that this sweep cannot continue."""

    def __init__(self, why: str):
        super().__init__(f"{why}: give another file, or remove it")


def read_keys(text: str) -> dict[str, str]:
    """Return the keys that a file was written with; none where they cannot be read."""
    try:
        keys = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return keys if isinstance(keys, dict) else {}
