"""What `glmlens lab` does: the course and the benches in a folder of your own, and JupyterLab there."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from glmlens.errors import GlmlensError
from glmlens.storage import FileError, dump_json, expand_path, read_json, write_bytes

BUNDLED_FILES = Path(__file__).parent / "lab_files"  # in a wheel; a checkout has them beside the package
LAB_FOLDERS = ("tutorials", "notebooks")
LAB_SUFFIXES = (".ipynb", ".md", ".png")
LAB_MANIFEST = ".glmlens-lab.json"
MOST_BYTES = 64_000_000  # of a file that may be one of the copies


class LabError(GlmlensError):
    """The folder or JupyterLab cannot be had; the message says what to do."""


@dataclass
class CopyReport:
    """What became of each file: new, updated, the same as before, or kept because it is not as it was copied."""

    new: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    preserved: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{len(self.new)} new, {len(self.updated)} updated, {len(self.unchanged)} as they are here"
        kept = [f"\nkept as you left it: {name} (to have it as it is here, rename yours)" for name in self.preserved]
        return counts + "".join(kept)


def list_originals() -> Iterator[tuple[str, Path]]:
    """The name of every file in a folder of yours, and where it lies here."""
    root = BUNDLED_FILES if BUNDLED_FILES.exists() else Path(__file__).parents[1]
    for part in LAB_FOLDERS:
        if not (root / part / "README.md").exists():
            raise LabError(f"{root / part}: not here; this glmlens was installed without its notebooks")
        for path in sorted((root / part).rglob("*")):
            if path.suffix in LAB_SUFFIXES and not any(at.startswith(".") for at in path.relative_to(root).parts):
                yield path.relative_to(root).as_posix(), path


def copy_lab(folder: Path) -> CopyReport:
    """Copy tutorials and notebooks to a folder, and overwrite only what is as an earlier copy left it.

    A manifest in the folder knows what was copied. Raises LabError where nothing can be written.
    """
    folder, done = expand_path(folder, LabError), CopyReport()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = read_manifest(folder / LAB_MANIFEST)
        for name, path in list_originals():
            data = path.read_bytes()
            getattr(done, update_file(folder / name, data, known.get(name))).append(name)
            if name not in done.preserved:
                known[name] = hash_bytes(data)
        write_bytes(folder / LAB_MANIFEST, dump_json({"files": known}))
    except FileError as e:
        raise LabError(f"{e}; give another folder: glmlens lab FOLDER") from e
    except OSError as e:
        raise LabError(f"{folder}: {e.strerror or e}; give another folder: glmlens lab FOLDER") from e
    return done


def update_file(target: Path, data: bytes, known: str | None) -> str:
    """Write a file where there is none, or where there is what is known; what was done, in a word."""
    if not os.path.lexists(target):
        write_bytes(target, data)
        return "new"
    if target.is_symlink() or not target.is_file() or target.stat().st_size > MOST_BYTES:
        return "kept"
    there = hash_bytes(target.read_bytes())
    if there == hash_bytes(data):
        return "same"
    if there != known:
        return "kept"
    write_bytes(target, data)  # whole or not at all: half a notebook would be taken for an edited one
    return "updated"


def read_manifest(path: Path) -> dict[str, str]:
    """What was copied to a folder, by name; nothing where that cannot be read, so that everything there is kept."""
    try:
        files = read_json(path)["files"]
        return {str(name): str(known) for name, known in files.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def start_jupyterlab(
    folder: Path, *, browser: bool = True, port: int | None = None, options: Sequence[str] = ()
) -> None:
    """Become a JupyterLab in this folder: what is printed and how it ends is from here on its own.

    `options` go to `jupyter lab` as they are. Raises LabError without jupyterlab.
    """
    if find_spec("jupyterlab") is None:
        raise LabError(f'JupyterLab is not installed: pip install "jupyterlab>=4.4" (the files are in {folder})')
    root = expand_path(folder, LabError).resolve()
    argv = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    argv += [] if browser else ["--no-browser"]
    argv += [] if port is None else [f"--port={port}"]
    os.execv(sys.executable, [*argv, *options])
