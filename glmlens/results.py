"""What an analysis leaves: labelled numbers that know what they are of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Labelled:
    """Numbers with a name for every axis and a label for every place along it.

    `values[axis0, axis1, ...]`; `labels[axis]` has as many entries as that axis; `about` says what the numbers are of:
    metric and unit, direction, positions, prompt, model.
    """

    values: np.ndarray
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)

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

    def at(self, **where: int | str) -> Any:
        """The numbers at a place along some axes, by index or label, `at(layer=3)`; a number when all are named.

        Raises KeyError for an unknown axis or label, and for a label that stands twice.
        """
        rest = self
        for axis, place in where.items():
            rest = rest._one(axis, place)
        return rest.values.item() if not rest.axes else rest

    def _one(self, axis: str, place: int | str) -> "Labelled":
        if axis not in self.axes:
            raise KeyError(f"no axis {axis!r}; there are {', '.join(self.axes)}")
        along, labels = self.axes.index(axis), list(self.labels[axis])
        if isinstance(place, str):
            if labels.count(place) != 1:
                raise KeyError(f"{place!r} stands {labels.count(place)} times along {axis}: give its index")
            place = labels.index(place)
        if not -len(labels) <= place < len(labels):
            raise KeyError(f"{axis} {place} asked for; there are {len(labels)}")
        axes = tuple(a for a in self.axes if a != axis)
        about = {**self.about, axis: labels[place]}
        return Labelled(np.asarray(self.values.take(place, along)), axes, {a: self.labels[a] for a in axes}, about)

    def top(self, n: int = 5, *, largest: bool | None = None) -> list[tuple[tuple[str, ...], float]]:
        """The n entries that are largest in magnitude (or largest, or smallest), each with its labels; never nan."""
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

    def stride(self, axis: str, step: int) -> "Self":
        """Every step-th place along an axis."""
        along = self.axes.index(axis)
        kept = tuple(slice(None, None, step if i == along else 1) for i in range(len(self.axes)))
        return replace(self, values=self.values[kept], labels={**self.labels, axis: self.labels[axis][::step]})

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per number: a column with the label for every axis, and `value`. Needs pandas."""
        import pandas

        places = np.indices(self.shape).reshape(len(self.axes), -1)
        columns = {axis: np.array(self.labels[axis], dtype=object)[places[i]] for i, axis in enumerate(self.axes)}
        return pandas.DataFrame({**columns, "value": self.values.ravel()})

    def __repr__(self) -> str:
        axes = " ".join(f"{axis} {n}" for axis, n in zip(self.axes, self.shape, strict=True))
        about = "".join(f"\n  {what}: {said}" for what, said in self.about.items())
        most = "".join(f"\n  {' '.join(place)}: {value:.4g}" for place, value in self.top(3)) if self.axes else ""
        return f"{type(self).__name__} [{axes}]{about}\n  largest:{most}"
