"""What an analysis leaves: labelled numbers that know what they are of."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from glmlens.integers import Integer, read_integer

if TYPE_CHECKING:
    import pandas
    from typing_extensions import Self

FROM_THE_END = ("pos", "query", "key", "step")  # axes along which "end" and negative numbers count from the last place


@dataclass(frozen=True, eq=False)
class Labelled:
    """Numbers with a name for every axis and a label for every place along it.

    `values[axis0, axis1, ...]`; `labels[axis]` has as many entries as that axis; `about` says what the numbers are of:
    metric and unit, direction, positions, prompt, model. `chosen` names the axes of which only some places were asked
    for, so that the last of them need not be the end.
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
        full = {axis: list(self.labels.get(axis, map(str, range(n)))) for axis, n in sizes.items()}
        wrong = [f"{axis} {len(full[axis])}, not {n}" for axis, n in sizes.items() if len(full[axis]) != n]
        wrong += [f"no axis {axis!r}" for axis in self.labels if axis not in sizes]
        if wrong:
            raise ValueError(f"labels do not fit the axes {sizes}: {', '.join(wrong)}")
        object.__setattr__(self, "labels", full)
        object.__setattr__(self, "about", dict(self.about))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def at(self, **where: Any) -> Any:
        """The numbers at one place along some axes, `at(layer=3, pos="end")`; a number when all axes are named.

        A number is the one that a label says (layer 3, position 3), never a place in the axis. A text is a label, the
        token of a label ("5 ·Mary" is " Mary" too) or, along pos, query, key and step, "end". There -1 is the end too,
        and -2 the one before it. Raises KeyError with the labels there are for any other, and for one that several
        labels say.
        """
        rest = self
        for axis, asked in where.items():
            rest = rest._take(axis, rest.place(axis, asked))
        return rest.values.item() if not rest.axes else rest

    def place(self, axis: str, asked: Any) -> int:
        """Where along an axis the label is that a number or a text asks for; KeyError as `at` says."""
        if axis not in self.axes:
            raise KeyError(f"no axis {axis!r}; there are {', '.join(self.axes)}")
        labels = list(map(str, self.labels[axis]))
        if isinstance(asked, str):
            found = [i for i, label in enumerate(labels) if label == asked]
            if not found and asked == "end" and axis in FROM_THE_END:
                return self._count_back(axis, -1)
            found = found or find_texts(labels, asked)
        else:
            number = read_integer(asked, axis, error=KeyError)
            if number < 0 and axis in FROM_THE_END:
                return self._count_back(axis, number)
            found = find_numbers(labels, number, axis)
        if len(found) != 1:
            several = f"stands {len(found)} times along {axis}, at {', '.join(labels[i] for i in found[:8])}"
            there = f"is no label along {axis}, which has {list_labels(labels)}"
            raise KeyError(f"{asked!r} {several + ': give one of these' if found else there}")
        return found[0]

    def _count_back(self, axis: str, back: int) -> int:
        """The place that is so many before the end of the prompt (-1 is the end), by the numbers of the labels."""
        labels, along = list(map(str, self.labels[axis])), self.axes.index(axis)
        if axis in self.chosen:
            raise KeyError(f"only some places along {axis} were asked for: give one of {list_labels(labels)}")
        last = number_of(labels[-1], axis) if labels else None
        if last is None:
            raise KeyError(f"the labels along {axis} have no numbers: give one of {list_labels(labels)}")
        (place,) = find_numbers(labels, last + 1 + back, axis) or (None,)
        if place is None or last + 1 + back < 0:
            raise KeyError(f"{axis} {back} asked for; there are {list_labels(labels)}")
        ends = np.moveaxis(self.values, along, 0)[-1]
        lead = [i for i, name in enumerate(a for a in self.axes if a != axis) if name == "prompt"]
        ends = np.moveaxis(ends, lead[0], 0).reshape(ends.shape[lead[0]], -1) if lead else ends.reshape(1, -1)
        if ends.size and is_nothing(ends).all(1).any():  # past the end of a shorter prompt, or not measured
            raise KeyError(f"{labels[-1]!r}, the last along {axis}, has no numbers (of some prompt): give a number")
        return place

    def _take(self, axis: str, place: int) -> "Labelled":
        along = self.axes.index(axis)
        axes = tuple(a for a in self.axes if a != axis)
        values, labels = np.asarray(self.values.take(place, along)), {a: self.labels[a] for a in axes}
        about = {**self.about, axis: self.labels[axis][place]}
        return Labelled(values, axes, labels, about, chosen=self.chosen)

    def top(self, n: Integer = 5, *, largest: bool | None = None) -> list[tuple[tuple[str, ...], float]]:
        """The n entries that are largest in magnitude (or largest, or smallest), each with its labels; never nan."""
        n = read_integer(n, "n", least=1)
        flat = self.values.ravel().astype(float)
        key = {None: np.abs(flat), True: flat, False: -flat}[largest]
        order = [i for i in np.argsort(-np.where(np.isnan(key), -np.inf, key), kind="stable") if not np.isnan(flat[i])]
        places = [np.unravel_index(i, self.shape) for i in order[:n]]
        return [(self.labels_at(place), float(self.values[place])) for place in places]

    def labels_at(self, place: Sequence[Any]) -> tuple[str, ...]:
        """The label along every axis of a place given by its indices."""
        return tuple(self.labels[axis][int(i)] for axis, i in zip(self.axes, place, strict=True))

    def clip(self, low: float, high: float) -> "Self":
        """The same with every number brought between low and high."""
        return replace(self, values=self.values.clip(low, high))

    def stride(self, axis: str, step: Integer) -> "Self":
        """Every step-th place along an axis from the first on; of layers the last one too, which is what comes out."""
        if axis not in self.axes:
            raise KeyError(f"no axis {axis!r}; there are {', '.join(self.axes)}")
        n = self.shape[self.axes.index(axis)]
        last = {n - 1} if axis == "layer" and n else set[int]()
        return self.keep(axis, sorted({*range(0, n, read_integer(step, "step", least=1))} | last))

    def keep(self, axis: str, places: Sequence[int]) -> "Self":
        """Some places along an axis, given by where they are, with their labels."""
        along = self.axes.index(axis)
        labels = [self.labels[axis][i] for i in places]
        whole = bool(len(places)) and places[-1] == self.shape[along] - 1
        chosen = self.chosen if whole else tuple(dict.fromkeys((*self.chosen, axis)))
        values = self.values.take(list(places), along)
        return replace(self, values=values, labels={**self.labels, axis: labels}, chosen=chosen)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per number: a column with the label for every axis, and `value`. Needs pandas."""
        import pandas

        places = np.indices(self.shape).reshape(len(self.axes), -1)
        columns = {axis: np.array(self.labels[axis], dtype=object)[places[i]] for i, axis in enumerate(self.axes)}
        return pandas.DataFrame({**columns, "value": self.values.ravel()})

    def __repr__(self) -> str:
        axes = " ".join(f"{axis} {n}" for axis, n in zip(self.axes, self.shape, strict=True))
        about = "".join(f"\n  {what}: {said}" for what, said in self.about.items())
        shown = self.top(3) if self.axes and self.values.dtype.kind != "U" else []
        most = "".join(f"\n  {' '.join(place)}: {value:.4g}" for place, value in shown)
        return f"{type(self).__name__} [{axes}]{about}{most and chr(10) + '  largest:'}{most}"


@dataclass(frozen=True, eq=False)
class LabelledGroup:
    """Several labelled results about the same places, each a field, and what they say of themselves together.

    The axes of each are those of the largest, or the first few of them.
    """

    about: Mapping[str, str]

    def sheets(self) -> dict[str, Labelled]:
        """The labelled fields by name; one that was not asked for (None) is not among them."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: sheet for name, sheet in found.items() if isinstance(sheet, Labelled)}

    def stride(self, axis: str, step: Integer) -> "Self":
        """Every step-th place along an axis (of layers the last one too), of all sheets that have it."""
        having = {name: sheet for name, sheet in self.sheets().items() if axis in sheet.axes}
        if not having:
            raise KeyError(f"no axis {axis!r} in any of {', '.join(self.sheets())}")
        return replace(self, **{name: sheet.stride(axis, step) for name, sheet in having.items()})

    def clip(self, low: float, high: float) -> "Self":
        """The same with every measured number (not ids, ranks or texts) brought between low and high."""
        measured = {n: sheet for n, sheet in self.sheets().items() if sheet.values.dtype.kind == "f"}
        return replace(self, **{n: sheet.clip(low, high) for n, sheet in measured.items()})

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per place: a column with the label for every axis, and one for every sheet. Needs pandas."""
        largest = max(self.sheets().values(), key=lambda sheet: len(sheet.axes))
        frame = largest.to_dataframe().drop(columns="value")
        for name, sheet in self.sheets().items():
            spread = sheet.values.reshape(sheet.shape + (1,) * (len(largest.axes) - len(sheet.axes)))
            frame[name] = np.broadcast_to(spread, largest.shape).ravel()
        return frame


def list_axes(axes: Any) -> tuple[str, ...]:
    """Axes as a tuple; a bare string holds one, or several between spaces: "layer pos"."""
    return tuple(axes.split()) if isinstance(axes, str) else tuple(axes)


def number_of(label: str, axis: str) -> int | None:
    """The number that a label begins with, as "5 ·the", "5" and "pair 5 (6.28 tokens)" do; None without one."""
    found = re.fullmatch(rf"(?:(?:pair|{re.escape(axis)}) )?(\d+)(?: .*)?", label, re.DOTALL)
    return int(found[1]) if found else None


def find_numbers(labels: Sequence[str], number: int, axis: str) -> list[int]:
    """The places whose label is a number, or else begins with it."""
    whole = [i for i, label in enumerate(labels) if label == str(number)]
    return whole or [i for i, label in enumerate(labels) if number_of(label, axis) == number]


def find_texts(labels: Sequence[str], text: str) -> list[int]:
    """The places whose label is a number and this text, as it is or without the spaces around it."""
    tokens = [re.sub(r"^\d+ ", "", label) for label in labels]
    drawn = text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    same = [i for i, token in enumerate(tokens) if token in (text, drawn)]
    bare = text.strip(" ·")
    return same or [i for i, token in enumerate(tokens) if bare and token.strip(" ·") == bare]


def list_labels(labels: Sequence[str], most: int = 40) -> str:
    """Labels for a message."""
    return ", ".join(labels[:most]) + (f", … {labels[-1]}" if len(labels) > most else "")


def is_nothing(values: np.ndarray) -> np.ndarray:
    """Where there is no number: nan, or among ids and ranks -1, or no text."""
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype.kind in "iU":
        return values == (-1 if values.dtype.kind == "i" else "")
    return np.zeros(values.shape, bool)
