"""Quote passages of source code from the file itself, so that a quote is never out of date."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any


@dataclass(frozen=True)
class Quote:
    """Lines of a source file. A notebook shows them as highlighted code under the file's name and line numbers."""

    text: str
    file: str
    first: int
    last: int

    @property
    def line_range(self) -> str:
        """The line numbers as text: "line 3" or "lines 3 to 9"."""
        return f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"

    def __repr__(self) -> str:
        return f"# {self.file}, {self.line_range}\n{self.text}"

    def _repr_markdown_(self) -> str:
        return f"`{self.file}`, {self.line_range}\n\n```python\n{self.text}\n```"


def source(target: Any, first: str = "", last: str = "") -> Quote:
    """Return the source of a function or class, from the line that contains `first` to the next that contains `last`.

    With `first` only, return that line; with neither, all lines. Raises ValueError if no line contains the passage.
    """
    lines, number = inspect.getsourcelines(target)
    start = find_passage(first, lines, 0, target) if first else 0
    end = start if first else len(lines) - 1
    if last:
        end = find_passage(last, lines, start, target)
    text = dedent("".join(lines[start : end + 1])).rstrip()
    return Quote(text=text, file=find_source_file(target), first=number + start, last=number + end)


def find_passage(passage: str, lines: list[str], start: int, target: Any) -> int:
    """Return the index of the first line from `start` on that contains the passage."""
    for i in range(start, len(lines)):
        if passage in lines[i]:
            return i
    raise ValueError(f"no line of {target.__qualname__} contains {passage!r}")


def find_source_file(target: Any) -> str:
    """Return the file in which a function or class is defined, from the package on: "glmlens/model.py"."""
    path = Path(inspect.getsourcefile(inspect.unwrap(target)) or "?")
    depth = target.__module__.count(".")  # of "glmlens.model": one folder above the file
    return Path(*path.parts[-1 - depth :]).as_posix() if depth else path.name
