"""Results of analyses: numpy arrays with named axes, labels, and a description of what was measured."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from glmlens.integers import Integer, read_integer

if TYPE_CHECKING:
    import pandas
    from typing_extensions import Self

FROM_THE_END = ("pos", "query", "key", "step")  # axes along which "end" and negative numbers count from the end


@dataclass(frozen=True, eq=False)
class Labelled:
    """An array with a name for every axis and a label for every index along it.

    `values[axis0, axis1, ...]`; `labels[axis]` has one label per index; `about` describes the numbers: metric and unit,
    direction, positions, prompt, model. `chosen` names the axes along which only some indices were selected, so that
    the last one need not be the end of the prompt.
    """

    values: np.ndarray
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    chosen: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.axes):
            raise ValueError(f"values have {self.values.ndim} axes {self.values.shape}, named {self.axes}")
        sizes = dict(zip(self.axes, self.values.shape, strict=True))
        # An axis without labels is labelled by its indices.
        full = {axis: list(self.labels.get(axis, map(str, range(n)))) for axis, n in sizes.items()}
        wrong = [f"{axis} {len(full[axis])}, not {n}" for axis, n in sizes.items() if len(full[axis]) != n]
        wrong += [f"no axis {axis!r}" for axis in self.labels if axis not in sizes]
        if wrong:
            raise ValueError(f"labels do not fit the axes {sizes}: {', '.join(wrong)}")
        # The dataclass is frozen: this sets the completed labels once.
        object.__setattr__(self, "labels", full)
        object.__setattr__(self, "about", dict(self.about))

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of every axis."""
        return self.values.shape

    def at(self, **where: Any) -> Any:
        """Return the numbers at one label along some axes, `at(layer=3, pos="end")`; a float if all axes are given.

        A number selects the label with that number (layer 3, position 3), not an index of the array. A string selects a
        label or the token of a label (" Mary" selects "5 ·Mary"); along pos, query, key and step, "end" and -1 are the
        end and -2 the position before it. Raises KeyError with the labels if none matches, or several do.
        """
        rest = self
        for axis, asked in where.items():
            rest = rest.take(axis, rest.place(axis, asked))
        return rest.values.item() if not rest.axes else rest

    def place(self, axis: str, asked: Any) -> int:
        """Return the index along an axis of the label that a number or a string selects; KeyError as in `at`."""
        if axis not in self.axes:
            raise KeyError(f"no axis {axis!r}; there are {', '.join(self.axes)}")
        labels = list(map(str, self.labels[axis]))
        if isinstance(asked, str):
            matches = [i for i, label in enumerate(labels) if label == asked]
            if not matches and asked == "end" and axis in FROM_THE_END:
                return self._count_back(axis, -1)
            matches = matches or find_texts(labels, asked)
        else:
            number = read_integer(asked, axis, error=KeyError)
            if number < 0 and axis in FROM_THE_END:
                return self._count_back(axis, number)
            matches = find_numbers(labels, number, axis)
        if len(matches) != 1:
            if matches:
                same = ", ".join(labels[i] for i in matches[:8])
                raise KeyError(f"{asked!r} stands {len(matches)} times along {axis}, at {same}: give one of these")
            raise KeyError(f"{asked!r} is no label along {axis}, which has {list_labels(labels)}")
        return matches[0]

    def _count_back(self, axis: str, back: int) -> int:
        """Return the index of a label counted back from the end of the prompt: -1 is the end.

        Positions are counted by the labels' numbers. Raises KeyError if they do not reach the end of every prompt.
        """
        labels = list(map(str, self.labels[axis]))
        along = self.axes.index(axis)
        if axis in self.chosen:
            raise KeyError(f"only some places along {axis} were asked for: give one of {list_labels(labels)}")
        last = number_of(labels[-1], axis) if labels else None
        if last is None:
            raise KeyError(f"the labels along {axis} have no numbers: give one of {list_labels(labels)}")
        (place,) = find_numbers(labels, last + 1 + back, axis) or (None,)
        if place is None or last + 1 + back < 0:
            raise KeyError(f"{axis} {back} asked for; there are {list_labels(labels)}")
        # Prompts may differ in length: refuse if the last index holds no number for one of them.
        ends = np.moveaxis(self.values, along, 0)[-1]
        lead = [i for i, name in enumerate(a for a in self.axes if a != axis) if name == "prompt"]
        ends = np.moveaxis(ends, lead[0], 0).reshape(ends.shape[lead[0]], -1) if lead else ends.reshape(1, -1)
        if ends.size and is_nothing(ends).all(1).any():  # past the end of a shorter prompt, or not measured
            raise KeyError(f"{labels[-1]!r}, the last along {axis}, has no numbers (of some prompt): give a number")
        return place

    def take(self, axis: str, place: int) -> "Labelled":
        """Return the result at one index along an axis, without that axis; `about` keeps the label."""
        axes = tuple(a for a in self.axes if a != axis)
        return Labelled(
            values=np.asarray(self.values.take(place, self.axes.index(axis))),
            axes=axes,
            labels={a: self.labels[a] for a in axes},
            about={**self.about, axis: self.labels[axis][place]},
            chosen=self.chosen,
        )

    def top(self, n: Integer = 5, *, largest: bool | None = None) -> list[tuple[tuple[str, ...], float]]:
        """Return the n entries of largest magnitude, each with its labels; nan is left out.

        With `largest` True they are the largest, with False the smallest.
        """
        n = read_integer(n, "n", least=1)
        # Sort by the key in descending order; nan sorts last and is left out.
        flat = self.values.ravel().astype(float)
        key = {None: np.abs(flat), True: flat, False: -flat}[largest]
        order = [i for i in np.argsort(-np.where(np.isnan(key), -np.inf, key), kind="stable") if not np.isnan(flat[i])]
        places = [np.unravel_index(i, self.shape) for i in order[:n]]
        return [(self.labels_at(place), float(self.values[place])) for place in places]

    def labels_at(self, place: Sequence[Any]) -> tuple[str, ...]:
        """Return the labels, one per axis, of an entry given by its indices."""
        return tuple(self.labels[axis][int(i)] for axis, i in zip(self.axes, place, strict=True))

    def clip(self, low: float, high: float) -> "Self":
        """Return a copy with every number clipped to the range from low to high."""
        return replace(self, values=self.values.clip(low, high))

    def stride(self, axis: str, step: Integer) -> "Self":
        """Return every step-th index along an axis, from the first; along `layer` the last one too, the output."""
        if axis not in self.axes:
            raise KeyError(f"no axis {axis!r}; there are {', '.join(self.axes)}")
        n = self.shape[self.axes.index(axis)]
        last = {n - 1} if axis == "layer" and n else set[int]()
        return self.keep(axis, sorted({*range(0, n, read_integer(step, "step", least=1))} | last))

    def keep(self, axis: str, places: Sequence[int]) -> "Self":
        """Return some indices along an axis, with their labels."""
        along = self.axes.index(axis)
        labels = [self.labels[axis][i] for i in places]
        keeps_end = bool(len(places)) and places[-1] == self.shape[along] - 1
        chosen = self.chosen if keeps_end else tuple(dict.fromkeys((*self.chosen, axis)))
        values = self.values.take(list(places), along)
        return replace(self, values=values, labels={**self.labels, axis: labels}, chosen=chosen)

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return a DataFrame with one row per number: a column of labels for every axis, and `value`. Needs pandas."""
        import pandas

        places = np.indices(self.shape).reshape(len(self.axes), -1)
        columns = {axis: np.array(self.labels[axis], dtype=object)[places[i]] for i, axis in enumerate(self.axes)}
        return pandas.DataFrame({**columns, "value": self.values.ravel()})

    def __repr__(self) -> str:
        axes = " ".join(f"{axis} {n}" for axis, n in zip(self.axes, self.shape, strict=True))
        about = "".join(f"\n  {name}: {text}" for name, text in self.about.items())
        top = self.top(3) if self.axes and self.values.dtype.kind != "U" else []  # "U": an array of strings
        largest = "".join(f"\n  {' '.join(place)}: {value:.4g}" for place, value in top)
        heading = "\n  largest:" if largest else ""
        return f"{type(self).__name__} [{axes}]{about}{heading}{largest}"


@dataclass(frozen=True, eq=False)
class LabelledGroup:
    """Several labelled results over the same axes, each a field, with one description for all.

    The axes of each field are those of the largest one, or the first few of them.
    """

    about: Mapping[str, str]

    def sheets(self) -> dict[str, Labelled]:
        """Return the labelled fields by name, without those that were not computed (None)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Labelled)}

    def stride(self, axis: str, step: Integer) -> "Self":
        """Return every step-th index along an axis (along `layer` the last one too) of all fields that have it."""
        having = {name: sheet for name, sheet in self.sheets().items() if axis in sheet.axes}
        if not having:
            raise KeyError(f"no axis {axis!r} in any of {', '.join(self.sheets())}")
        return replace(self, **{name: sheet.stride(axis, step) for name, sheet in having.items()})

    def clip(self, low: float, high: float) -> "Self":
        """Return a copy with every float (not ids, ranks or strings) clipped to the range from low to high."""
        measured = {n: sheet for n, sheet in self.sheets().items() if sheet.values.dtype.kind == "f"}
        return replace(self, **{n: sheet.clip(low, high) for n, sheet in measured.items()})

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return a DataFrame with a column of labels for every axis and a column for every field. Needs pandas."""
        largest = max(self.sheets().values(), key=lambda sheet: len(sheet.axes))
        frame = largest.to_dataframe().drop(columns="value")
        for name, sheet in self.sheets().items():
            # A field without the last axes holds for every index along them.
            spread = sheet.values.reshape(sheet.shape + (1,) * (len(largest.axes) - len(sheet.axes)))
            frame[name] = np.broadcast_to(spread, largest.shape).ravel()
        return frame


def list_axes(axes: Any) -> tuple[str, ...]:
    """Return axes as a tuple; a string holds one, or several separated by spaces: "layer pos"."""
    return tuple(axes.split()) if isinstance(axes, str) else tuple(axes)


def number_of(label: str, axis: str) -> int | None:
    """Return the number at the beginning of a label, 5 in "5 ·the", "5" and "pair 5 (6.28 tokens)", or None."""
    number = re.fullmatch(rf"(?:(?:pair|{re.escape(axis)}) )?(\d+)(?: .*)?", label, re.DOTALL)
    return int(number[1]) if number else None


def find_numbers(labels: Sequence[str], number: int, axis: str) -> list[int]:
    """Return the indices of the labels that are a number, or else of those that begin with it."""
    exact = [i for i, label in enumerate(labels) if label == str(number)]
    return exact or [i for i, label in enumerate(labels) if number_of(label, axis) == number]


def find_texts(labels: Sequence[str], text: str) -> list[int]:
    """Return the indices of the labels that are a number and this text, or else the text without spaces around it."""
    tokens = [re.sub(r"^\d+ ", "", label) for label in labels]
    # Labels show white space as · ↵ → (a token " the" is "·the").
    drawn = text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    same = [i for i, token in enumerate(tokens) if token in (text, drawn)]
    bare = text.strip(" ·")
    return same or [i for i, token in enumerate(tokens) if bare and token.strip(" ·") == bare]


def list_labels(labels: Sequence[str], limit: int = 40) -> str:
    """Return the first `limit` labels and the last one as text for an error message."""
    return ", ".join(labels[:limit]) + (f", … {labels[-1]}" if len(labels) > limit else "")


def is_nothing(values: np.ndarray) -> np.ndarray:
    """Return where an array holds no value: nan in floats, -1 in integers (ids and ranks), "" in strings."""
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype.kind in "iU":
        return values == (-1 if values.dtype.kind == "i" else "")
    return np.zeros(values.shape, bool)
