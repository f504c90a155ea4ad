"""Copy the tutorials and notebooks to a folder of the user's, and start JupyterLab there (`glmlens lab`)."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from glmlens.errors import GlmlensError
from glmlens.file_io import FileError, dump_json, expand_path, read_json, write_bytes

BUNDLED_FILES = (
    Path(__file__).parent / "lab_files"
)  # only in an installed package; a checkout has the folders beside it
LAB_FOLDERS = ("tutorials", "notebooks")
LAB_SUFFIXES = (".ipynb", ".md", ".png")
LAB_MANIFEST = ".glmlens-lab.json"
MOST_BYTES = 64_000_000  # larger files cannot be copies and are not hashed


class LabError(GlmlensError):
    """The folder cannot be written, or JupyterLab is not installed. The message says what to do."""


@dataclass
class CopyReport:
    """The names of copied files by what happened to each.

    `new` and `updated` were written. `unchanged` were up to date. `preserved` differ from the last copy: the user
    edited them, or they were never a copy, so they were not overwritten.
    """

    new: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    preserved: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{len(self.new)} new, {len(self.updated)} updated, {len(self.unchanged)} unchanged"
        lines = [
            f"\nnot overwritten, because you edited it: {name} (rename it to get a fresh copy)"
            for name in self.preserved
        ]
        return counts + "".join(lines)


def list_originals() -> Iterator[tuple[str, Path]]:
    """Yield the files to copy: the name in the user's folder, and the path of the original."""
    root = BUNDLED_FILES if BUNDLED_FILES.exists() else Path(__file__).parents[1]
    for part in LAB_FOLDERS:
        if not (root / part / "README.md").exists():
            raise LabError(f"{root / part}: no such folder; this glmlens was installed without its notebooks")
        for path in sorted((root / part).rglob("*")):
            if path.suffix in LAB_SUFFIXES and not any(x.startswith(".") for x in path.relative_to(root).parts):
                yield path.relative_to(root).as_posix(), path


def copy_lab(folder: Path) -> CopyReport:
    """Copy tutorials and notebooks to a folder. Files that the user edited since an earlier copy are not overwritten.

    A manifest in the folder holds the hash of every copied file. Raises LabError if the folder cannot be written.
    """
    folder = expand_path(folder, LabError)
    report = CopyReport()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = read_lab_manifest(folder / LAB_MANIFEST)
        for name, path in list_originals():
            data = path.read_bytes()
            outcome = update_file(folder / name, data, known.get(name))
            getattr(report, outcome).append(name)
            if outcome != "preserved":
                known[name] = hash_bytes(data)
        write_bytes(folder / LAB_MANIFEST, dump_json({"files": known}))
    except FileError as e:
        raise LabError(f"{e}; give another folder: glmlens lab FOLDER") from e
    except OSError as e:
        raise LabError(f"{folder}: {e.strerror or e}; give another folder: glmlens lab FOLDER") from e
    return report


def update_file(target: Path, data: bytes, known: str | None) -> str:
    """Write a file if it does not exist, or if its hash is `known`, that of the last copy.

    Return what was done, as the name of the field of CopyReport.
    """
    if not os.path.lexists(target):
        write_bytes(target, data)
        return "new"
    if target.is_symlink() or not target.is_file() or target.stat().st_size > MOST_BYTES:
        return "preserved"
    present = hash_bytes(target.read_bytes())
    if present == hash_bytes(data):
        return "unchanged"
    if present != known:
        return "preserved"
    write_bytes(target, data)  # atomic: half a notebook would count as edited the next time
    return "updated"


def read_lab_manifest(path: Path) -> dict[str, str]:
    """Return the hashes of the copied files by name.

    An unreadable manifest gives none, so that no file of the folder is overwritten.
    """
    try:
        files = read_json(path)["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def hash_bytes(data: bytes) -> str:
    """Return the SHA-256 of data in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def start_jupyterlab(
    folder: Path, *, browser: bool = True, port: int | None = None, options: Sequence[str] = ()
) -> None:
    """Replace this process by a JupyterLab in the folder; return only by raising.

    `options` are passed on to `jupyter lab`. Raises LabError if jupyterlab is not installed.
    """
    if find_spec("jupyterlab") is None:
        raise LabError(f'JupyterLab is not installed: pip install "jupyterlab>=4.4" (the files are in {folder})')
    root = expand_path(folder, LabError).resolve()
    argv = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    argv += [] if browser else ["--no-browser"]
    argv += [] if port is None else [f"--port={port}"]
    os.execv(sys.executable, [*argv, *options])
