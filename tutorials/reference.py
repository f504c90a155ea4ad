"""Write the API reference as HTML, from docstrings and signatures, with pdoc: python -m tutorials.reference FOLDER.

Warnings are errors: an annotation that cannot be resolved, or an exported name that does not exist.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import glmlens

MODULES = ("glmlens", "glmlens.hooks", *(f"glmlens.{part}" for part in glmlens.LAZY_SUBPACKAGES))


def reference(folder: Path, modules: tuple[str, ...] = MODULES) -> Path:
    """Write a page for each module, the index and its search data; return the path of the index."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*modules, output_directory=folder)
    return folder / "index.html"


if __name__ == "__main__":
    print(reference(Path(sys.argv[1])))
