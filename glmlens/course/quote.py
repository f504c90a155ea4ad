"""Passages of source code as they are in the file, so that a text that quotes them cannot fall behind."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any


@dataclass(frozen=True)
class Quote:
    """Lines of a file; in a notebook, coloured code under the name of the file."""

    text: str
    file: str
    first: int
    last: int

    @property
    def line_range(self) -> str:
        """Its lines, in words."""
        return f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"

    def __repr__(self) -> str:
        return f"# {self.file}, {self.line_range}\n{self.text}"

    def _repr_markdown_(self) -> str:
        return f"`{self.file}`, {self.line_range}\n\n```python\n{self.text}\n```"


def source(target: Any, first: str = "", last: str = "") -> Quote:
    """The source of a function or class, from the line that contains `first` to the next one that contains `last`.

    With `first` alone that line, by default all of it. Raises ValueError for a passage that is not there.
    """
    lines, number = inspect.getsourcelines(target)
    start = find_passage(first, lines, 0, target) if first else 0
    end = find_passage(last, lines, start, target) if last else start if first else len(lines) - 1
    text = dedent("".join(lines[start : end + 1])).rstrip()
    return Quote(text, find_source_file(target), number + start, number + end)


def find_passage(passage: str, lines: list[str], start: int, target: Any) -> int:
    """The first line from `start` on that contains the passage."""
    found = [i for i in range(start, len(lines)) if passage in lines[i]]
    if not found:
        raise ValueError(f"no line of {target.__qualname__} contains {passage!r}")
    return found[0]


def find_source_file(target: Any) -> str:
    """The file that a function or class is in: "glmlens/model.py"."""
    path, module = Path(inspect.getsourcefile(inspect.unwrap(target)) or "?"), target.__module__
    return Path(*path.parts[-1 - module.count(".") :]).as_posix() if "." in module else path.name
