"""The API reference as HTML, of docstrings and signatures, by pdoc: python -m tutorials.reference FOLDER.

A warning is an error: an annotation that cannot be read, or a name that is exported and not there.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import glmlens

MODULES = ("glmlens", "glmlens.hooks", *(f"glmlens.{part}" for part in glmlens.LAZY_SUBPACKAGES))


def reference(folder: Path, modules: tuple[str, ...] = MODULES) -> Path:
    """Write a page for each of these modules, their index and what a search in it needs; returns the index."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*modules, output_directory=folder)
    return folder / "index.html"


if __name__ == "__main__":
    print(reference(Path(sys.argv[1])))
