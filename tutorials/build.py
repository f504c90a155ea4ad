"""Every tutorial and every bench as a notebook: python -m tutorials.build [FOLDER ...].

Each is a .py in the percent format of jupytext, which is what people edit; the .ipynb beside it is made of it.
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
    """The percent-format files of a folder, in order: those with cells."""
    return sorted(path for path in folder.glob("*.py") if path.read_text(encoding="utf-8").startswith("# %%"))


def notebook(source: Path) -> str:
    """The text of the notebook that is made of a source; a cell is known by what it says; only tags are stored."""
    made = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    made.metadata, seen = METADATA, Counter()
    for cell in made.cells:
        said = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[said] += 1
        cell.metadata = {"tags": tags} if (tags := cell.metadata.get("tags")) else {}
        cell.id = said if seen[said] == 1 else f"{said}-{seen[said]}"
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def main(*folders: str) -> None:
    """Write the notebooks of all folders, by default of the course and the benches."""
    for folder in map(Path, folders or FOLDERS):
        for source in sources(folder):
            source.with_suffix(".ipynb").write_text(notebook(source), encoding="utf-8")
            print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(*sys.argv[1:])
