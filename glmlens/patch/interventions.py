"""Interventions: a site and a change, as data; compiled to writes, run as hooks, saved as JSON."""

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmlens.hooks import axes_of
from glmlens.lens import Lens
from glmlens.patch.changes import Change, Where, from_data, to_data
from glmlens.patch.sites import Atlas, PatchError, Site, position_axis, seated, ungrouped
from glmlens.storage import expand_path, field_of, list_of, read_json, write_json

Names = Mapping[str, int]


@dataclass(frozen=True)
class Intervention:
    """One change at one site: plain data, which prints, compares and saves."""

    site: Site
    do: Change

    def __str__(self) -> str:
        return f"{self.site} <- {self.do}"


@dataclass(frozen=True, eq=False)
class Write:
    """An intervention at one tensor: the positions and the indices along the axes after them.

    `kept` is what its change keeps of other runs, [pos or 1, the whole rest].
    """

    name: str
    positions: Tensor | None
    rest: tuple[Tensor | None, ...]
    do: Change
    kept: Tensor | None = None
    ungrouped: bool = False
    length: int | None = None  # of the prompt, where it is known

    @property
    def by_key(self) -> bool:
        """Whether its positions are those of keys."""
        return position_axis(axes_of(self.name)) == "key"

    def at(self, positions: Tensor) -> "Write":
        return replace(self, positions=positions)

    def into(self, x: Tensor, slots: Tensor, positions: Tensor, column: Callable[[Tensor], Tensor]) -> Tensor:
        """Change one row [position, rest] of a tensor in place; whether any number in it is another now.

        `slots` is where `positions` stand in the row, `column` where keys stand.
        """
        rest, sizes = list(self.rest), list(x.shape[1:])
        if "query" in axes_of(self.name):  # head key: what keys there are depends on the call
            rest[1] = None if rest[1] is None else column(rest[1])
            sizes[1] = sizes[1] if self.length is None else self.length
        places = grid(slots, rest, x.shape[1:])
        old = x[places]
        at = Where(self.name, positions, tuple(sizes), lambda t: t[grid(positions, self.rest, t.shape[1:])])
        new = self.do.new(old.clone(), at, self.kept)
        if new.shape != old.shape or new.dtype != old.dtype:
            raise PatchError(
                f"{self.name}: {self.do} made {new.dtype} {tuple(new.shape)} of {old.dtype} {tuple(old.shape)}"
            )
        x[places] = new
        return (new != old).any()


def grid(slots: Tensor, rest: Sequence[Tensor | None], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Indices that select slots along the first axis and, each by each, what is chosen along the next ones."""
    last = max((i for i, chosen in enumerate(rest) if chosen is not None), default=-1)
    full = [slots]
    for chosen, size in zip(rest[: last + 1], sizes, strict=False):
        full.append(torch.arange(size, device=slots.device) if chosen is None else chosen)
    return tuple(t.view([-1 if i == j else 1 for j in range(len(full))]) for i, t in enumerate(full))


@dataclass
class Compiler:
    """Turns interventions into writes, running each other prompt that they need once."""

    lens: Lens
    atlas: Atlas = field(init=False)
    kept: dict[tuple[Change, str, bool], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.atlas = Atlas(self.lens)

    def prepare(self, interventions: Iterable[Intervention], length: int | None) -> None:
        """Run the prompts of all these changes, recording what they put where."""
        wanted: dict[Change, set[tuple[str, bool]]] = {}
        for one in interventions:
            if one.do.prompts:
                names = self.atlas.names(one.site)
                wanted.setdefault(one.do, set()).update((name, one.site.ungrouped) for name in names)
        for change, places in wanted.items():
            missing = {place for place in places if (change, *place) not in self.kept}
            if missing:
                self.run(change, missing, length)

    def run(self, change: Change, places: set[tuple[str, bool]], length: int | None) -> None:
        lengths = sorted(set(map(len, change.prompts)))
        aligned = change.aligned or any("query" in axes_of(name) for name, _ in places)
        if aligned and (len(lengths) > 1 or length not in (None, lengths[0])):
            raise PatchError(f"{change}: its prompts have {lengths} tokens, the prompt that it changes {length}")
        values: dict[tuple[str, bool], list[Tensor]] = {place: [] for place in places}
        for tokens in change.prompts:
            row = torch.tensor([tokens], device=self.lens.device)
            _, acts = self.lens.run_with_cache(row, sorted({name for name, _ in places}), logits=False)
            for name, split in places:
                x = seated(name, acts[name])[0]
                values[name, split].append(ungrouped(x[None], self.lens.cfg.n_groups)[0] if split else x)
        for place, rows in values.items():
            same = len({len(row) for row in rows}) == 1
            self.kept[(change, *place)] = change.of(torch.stack(rows) if same else torch.cat(rows)[None])

    def writes(self, one: Intervention, length: int | None, names: Names) -> list[Write]:
        """The writes of an intervention in a prompt of this length whose positions have these names."""
        chosen = self.atlas.choose(one.site, length, names)
        at = None if chosen.positions is None else torch.tensor(chosen.positions, device=self.lens.device)
        split = chosen.ungrouped
        return [
            Write(name, at, chosen.rest, one.do, self.kept.get((one.do, name, split)), split, length)
            for name in chosen.names
        ]


FORMAT = "glmlens.interventions"


def save(path: str | Path, interventions: Sequence[Intervention], lens: Lens) -> None:
    """Write interventions to a JSON file, with the hashes of the model and tokenizer that they are for.

    It is written whole or not at all. Raises PatchError for what cannot be saved.
    """
    sites = [{name: list(places) for name, places in one.site.given().items()} for one in interventions]
    data = {
        "format": FORMAT,
        "model": lens.model_hash,
        "tokenizer": lens.tokenizer_hash,
        "interventions": [
            {"site": {"point": one.site.point, **site}, "do": to_data(one.do)}
            for one, site in zip(interventions, sites, strict=True)
        ],
    }
    write_json(path, data, PatchError, indent=None)


def load(path: str | Path, lens: Lens, *, other_model: bool = False) -> list[Intervention]:
    """The interventions that `save` wrote; PatchError on another model or tokenizer, unless `other_model`.

    Raises FileNotFoundError, and PatchError for a file that holds no such interventions.
    """
    data, where = read_json(expand_path(path, PatchError), error=PatchError), str(path)
    if data.get("format") != FORMAT:
        raise PatchError(f"{path} holds no interventions that glmlens saved")
    for what, here in (("model", lens.model_hash), ("tokenizer", lens.tokenizer_hash)):
        found = field_of(data, what, str, where, PatchError)
        if found != here and not other_model:
            raise PatchError(f"{path} is for {what} {found}, this is {here}. If that is meant, other_model=True")
    loaded = []
    for number, one in enumerate(list_of(data, "interventions", dict, where, PatchError)):
        which = f"{path}: intervention {number}"
        site, do = (field_of(one, part, dict, which, PatchError) for part in ("site", "do"))
        refuse_other_kinds(site, which)
        refuse_other_kinds(do, which)
        try:
            loaded.append(Intervention(Site(**site), from_data(do)))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as e:
            raise PatchError(f"{which}: {e}") from e
    return loaded


def refuse_other_kinds(data: Mapping[str, Any], where: str) -> None:
    """Raise PatchError for a field of a saved site or change whose value is of another kind than that field has."""
    for name, value in data.items():
        fits, expected = KINDS.get(name, (is_places, "whole numbers or names of positions"))
        if not fits(value):
            raise PatchError(f"{where}: expected {expected} as {name!r}, found {reprlib.repr(value)}")


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)


def is_vector(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 2**63 for i in value)


def is_places(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(place, str) or is_ids([place]) for place in value)


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("point", "kind", "fn"), (lambda value: isinstance(value, str), "a name")),
    **dict.fromkeys(("scale", "unit", "factor"), (is_number, "a number")),
    "by_position": (lambda value: isinstance(value, bool), "true or false"),
    "seed": (lambda value: is_ids([value]), "a whole number"),
    "tokens": (is_ids, "token ids"),
    "prompts": (lambda value: isinstance(value, list) and all(map(is_ids, value)), "lists of token ids"),
    "value": (lambda value: is_number(value) or is_vector(value), "a number or a vector"),
    "direction": (is_vector, "a vector"),
}
