"""Write the API reference as HTML from docstrings and signatures, with pdoc: python -m tutorials.reference FOLDER.

Warnings are errors: an annotation that cannot be resolved, or a name in `__all__` that does not exist.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import glmlens

MODULES = ("glmlens", "glmlens.hooks", "glmlens.hook_points", *(f"glmlens.{part}" for part in glmlens.LAZY_SUBPACKAGES))


def write_reference(folder: Path, modules: tuple[str, ...] = MODULES) -> Path:
    """Write a page for each of these modules, their index and the data of its search; return the index."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*modules, output_directory=folder)
    return folder / "index.html"


if __name__ == "__main__":
    print(write_reference(Path(sys.argv[1])))
