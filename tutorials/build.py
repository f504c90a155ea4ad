"""Build the notebooks of all tutorials and workbenches: python -m tutorials.build [FOLDER ...].

Each source is a .py file in jupytext's percent format, which people edit; the .ipynb file beside it is built from it.
The same source gives the same bytes.
"""

import hashlib
import sys
from collections import Counter
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
FOLDERS = (HERE, HERE.parent / "notebooks")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources(folder: Path = HERE) -> list[Path]:
    """Return the percent-format files of a folder, those that begin with a cell, in order."""
    return sorted(path for path in folder.glob("*.py") if path.read_text(encoding="utf-8").startswith("# %%"))


def notebook(source: Path) -> str:
    """Return the text of the notebook built from a source; a cell id is the hash of its text; only tags are stored."""
    book = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    book.metadata = METADATA
    seen = Counter()
    for cell in book.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] += 1
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        # cells with the same text are numbered, so that ids are unique
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    nbformat.validate(book)
    return nbformat.writes(book) + "\n"


def main(*folders: str) -> None:
    """Write the notebooks of all folders, by default of the course and the workbenches."""
    for folder in map(Path, folders or FOLDERS):
        for source in sources(folder):
            source.with_suffix(".ipynb").write_text(notebook(source), encoding="utf-8")
            print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(*sys.argv[1:])
