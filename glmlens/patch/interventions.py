"""Interventions: a site and a change, as data; compiled to writes, and saved as JSON."""

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmlens.file_io import expand_path, field_of, list_of, read_json, write_json
from glmlens.hook_points import axes_of
from glmlens.lens import Lens
from glmlens.patch.replacement_values import (
    Change,
    ChangeTarget,
    Functions,
    as_change,
    change_from_json,
    change_to_json,
)
from glmlens.patch.sites import PatchError, Site, SiteResolver, move_position_first, position_axis, repeat_kv
from glmlens.text.prompt_kinds import is_whole_number

PositionNames = Mapping[str, int]


@dataclass(frozen=True)
class Intervention:
    """One change at one site, as plain data that can be printed, compared and saved.

    `site` may be the name of a point. Raise PatchError for what is no site or no change.
    """

    site: Site | Any
    do: Change | Any

    def __post_init__(self) -> None:
        site: Any = self.site
        if not isinstance(site, Site | str):
            raise PatchError(f"{site!r:.60} is no site: give Site('resid_post', layer=3, pos='end') or a point's name")
        object.__setattr__(self, "site", Site(site) if isinstance(site, str) else site)
        object.__setattr__(self, "do", as_change(self.do))

    def __str__(self) -> str:
        return f"{self.site} <- {self.do}"


def as_interventions(asked: Any) -> list[Intervention]:
    """Return one intervention or several as a list; raise PatchError for anything else."""
    listed = [asked] if isinstance(asked, Intervention) else asked
    if isinstance(listed, str | bytes | Mapping | Site) or not isinstance(listed, Iterable):
        raise PatchError(f"{asked!r:.60} is no intervention: give Intervention(site, change), or several in a list")
    listed = list(listed)
    for one in listed:
        if not isinstance(one, Intervention):
            raise PatchError(f"{one!r:.60} is no intervention: give Intervention(site, change)")
    return listed


def read_position_names(names: Any, length: int) -> dict[str, int]:
    """Return positions by name in a prompt of this length, with "end"; raise PatchError for one outside it."""
    if not isinstance(names, Mapping):
        raise PatchError(f"position_names are positions by name, {{'S2': 9}}, not {names!r:.60}")
    for name, place in names.items():
        if not isinstance(name, str) or not is_whole_number(place) or not 0 <= place < length:
            raise PatchError(f"position_names: {name!r} is {place!r:.60}; the prompt has positions 0 to {length - 1}")
    return {"end": length - 1, **{name: int(place) for name, place in names.items()}}


@dataclass(frozen=True, eq=False)
class Write:
    """An intervention at one tensor: the positions and the indices along the axes after them.

    None means all positions or all indices. `source` is what its change takes from other runs, [pos or 1, rest].
    `origin` is the point that the intervention names, where the write was moved to another tensor of equal numbers.
    """

    name: str
    positions: Tensor | None
    rest_indices: tuple[Tensor | None, ...]
    do: Change
    source: Tensor | None = None
    by_query_head: bool = False
    origin: str = ""

    @property
    def uses_key_positions(self) -> bool:
        """Whether its positions are those of keys."""
        return position_axis(axes_of(self.name)) == "key"

    @property
    def by_query(self) -> bool:
        """Whether its positions are those of queries, and the axes after them head and key."""
        return "query" in axes_of(self.name)

    def with_positions(self, positions: Tensor) -> "Write":
        """Return the same write at other positions."""
        return replace(self, positions=positions)

    def apply_to_row(self, x: Tensor, slots: Tensor, positions: Tensor, column: Callable[[Tensor], Tensor]) -> Tensor:
        """Change one row [position, rest] of a tensor in place; return whether any number changed.

        `slots` are the indices of `positions` in the row; `column` maps key positions to columns. Raise PatchError for
        a change that returns another shape, dtype or device.
        """
        here = list(self.rest_indices)  # indices in this row
        rest = list(self.rest_indices)  # indices in what a change makes for these positions and keys alone
        keys = None
        if self.by_query:  # the axes are head, key; in which column a key is depends on the call
            keys = self.rest_indices[1]
            assert keys is not None, "the keys of a call are known before it is changed"
            here[1], rest[1] = column(keys), None
        places = broadcast_indices(slots, here, x.shape[1:])
        widths = tuple(x.shape[1:2] if self.by_query else x.shape[1:])
        target = ChangeTarget(
            name=self.origin or self.name,
            positions=positions,
            widths=widths,
            keys=keys,
            select=lambda source: self.select_source(source, positions, keys),
            choose=lambda part: part[broadcast_indices(every_index(part), rest, part.shape[1:])],
        )  # fmt: skip
        old = x[places]
        new: Any = self.do.replace_values(old.clone(), target, self.source)
        if not isinstance(new, Tensor):
            raise PatchError(f"{self.name}: {self.do} returned {type(new).__name__}; expected a tensor")
        if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            made, expected = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (new, old))
            raise PatchError(f"{self.name}: {self.do} made {made}; expected {expected}")
        x[places] = new
        return (new != old).any()

    def select_source(self, source: Tensor, positions: Tensor, keys: Tensor | None) -> Tensor:
        """Return these places of another run's tensor [pos, rest]; raise PatchError for a position it has not got."""
        last = max(int(positions.max()), -1 if keys is None else int(keys.max()))
        if last >= len(source):
            raise PatchError(
                f"{self.name}: {self.do} has positions 0 to {len(source) - 1}, and position {last} is to be changed: "
                "name the positions that are meant, Site(..., pos=)"
            )
        return source[broadcast_indices(positions, self.rest_indices, source.shape[1:])]

    def into_group(
        self, x: Tensor, slots: Tensor, positions: Tensor, column: Callable[[Tensor], Tensor], group: int
    ) -> Tensor:
        """Change keys or values by group in a row that has them as every query head reads them."""
        # The query heads of a group hold equal numbers: change one of each, and repeat it.
        grouped = x[:, ::group].clone()
        changed = self.apply_to_row(grouped, slots, positions, column)
        x.copy_(repeat_kv(grouped[None], group)[0])
        return changed


def refuse_mixed(writes: Sequence[Write]) -> None:
    """Raise PatchError for keys or values of one layer that are changed both by query head and by group."""
    by_head = {write.name for write in writes if write.by_query_head}
    both = sorted({write.name for write in writes if not write.by_query_head} & by_head) if by_head else []
    if both:
        raise PatchError(f"{', '.join(both)} both by query head and by group: say all of it in heads")


def every_index(x: Tensor) -> Tensor:
    """Return the indices along the first axis of a tensor."""
    return torch.arange(len(x), device=x.device)


def broadcast_indices(slots: Tensor, rest: Sequence[Tensor | None], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return index tensors that select slots along the first axis and, combined, the choices along the next ones.

    Each is shaped to broadcast along an axis of its own, so that indexing gives the outer product of the choices.
    """
    last = max((i for i, chosen in enumerate(rest) if chosen is not None), default=-1)
    full = [slots]
    for chosen, size in zip(rest[: last + 1], sizes, strict=False):
        full.append(torch.arange(size, device=slots.device) if chosen is None else chosen)
    return tuple(t.view([-1 if i == j else 1 for j in range(len(full))]) for i, t in enumerate(full))


@dataclass
class InterventionCompiler:
    """Compile interventions to writes; record each prompt that their changes take values from once.

    `sources` holds these values by change, point and whether they are by query head.
    """

    lens: Lens
    resolver: SiteResolver = field(init=False)
    sources: dict[tuple[Change, str, bool], Tensor] = field(default_factory=dict)
    changes: dict[Change, Change] = field(default_factory=dict)  # with what they take from the model

    def __post_init__(self) -> None:
        self.resolver = SiteResolver(self.lens)

    def record_sources(self, interventions: Iterable[Intervention], length: int | None) -> None:
        """Run the prompts of all these changes and record the points that they are put in at."""
        wanted: dict[Change, set[tuple[str, bool]]] = {}
        for one in interventions:
            if one.do.prompts:
                names = self.resolver.resolve_names(one.site)
                wanted.setdefault(one.do, set()).update((name, one.site.by_query_head) for name in names)
        for change, places in wanted.items():
            missing = {place for place in places if (change, *place) not in self.sources}
            if missing:
                self.record_source(change, missing, length)

    def record_source(self, change: Change, places: set[tuple[str, bool]], length: int | None) -> None:
        """Run the prompts of one change; raise PatchError for prompts of lengths that it cannot combine."""
        lengths = sorted(set(map(len, change.prompts)))
        aligned = change.needs_same_length or any("query" in axes_of(name) for name, _ in places)
        if aligned and (len(lengths) > 1 or length not in (None, lengths[0])):
            raise PatchError(f"{change}: its prompts have {lengths} tokens, the prompt that it changes {length}")
        values: dict[tuple[str, bool], list[Tensor]] = {place: [] for place in places}
        for tokens in change.prompts:
            row = torch.tensor([tokens], device=self.lens.device)
            _, acts = self.lens.run_with_cache(
                row, sorted({name for name, _ in places}), logits=False, attention_mask=torch.ones_like(row)
            )
            for name, split in places:
                x = move_position_first(name, acts[name])[0]
                values[name, split].append(repeat_kv(x[None], self.lens.cfg.n_groups)[0] if split else x)
        for place, rows in values.items():
            # Rows of several lengths can only be averaged over all positions: one after the other, as one prompt.
            same = len({len(row) for row in rows}) == 1
            self.sources[(change, *place)] = change.reduce_source(torch.stack(rows) if same else torch.cat(rows)[None])

    def compile_writes(
        self, intervention: Intervention, length: int | None, position_names: PositionNames
    ) -> list[Write]:
        """Return the writes of an intervention in a prompt of this length whose positions have these names."""
        chosen = self.resolver.resolve(intervention.site, length, position_names)
        at = None if chosen.positions is None else torch.tensor(chosen.positions, device=self.lens.device)
        split = chosen.by_query_head
        if intervention.do not in self.changes:
            self.changes[intervention.do] = intervention.do.in_lens(self.lens)
        do = self.changes[intervention.do]
        return [
            Write(
                name=name,
                positions=at,
                rest_indices=chosen.rest_indices,
                do=do,
                source=self.sources.get((intervention.do, name, split)),
                by_query_head=split,
            )
            for name in chosen.names
        ]


INTERVENTIONS_FORMAT = "glmlens.interventions"


def save_interventions(
    path: str | Path, interventions: Sequence[Intervention] | Any, lens: Lens, *, functions: Functions | None = None
) -> None:
    """Write interventions to a JSON file, with the hashes of the model and tokenizer that they are for.

    Of `Apply(fn)` the file holds a name and never code: that in `functions`, {"halve": fn}, or else the function's own.
    On an error no file is left half written. Raise PatchError for a function without a name, for two functions of one
    name, and for what cannot be saved.
    """
    interventions, functions = as_interventions(interventions), functions or {}
    sites = [{name: list(places) for name, places in one.site.chosen_places().items()} for one in interventions]
    changes = [change_to_json(one.do, functions) for one in interventions]
    named = {data["fn"]: one.do for one, data in zip(interventions, changes, strict=True) if "fn" in data}
    for one, data in zip(interventions, changes, strict=True):
        if "fn" in data and vars(named[data["fn"]])["fn"] is not vars(one.do)["fn"]:
            raise PatchError(
                f"two functions are called {data['fn']!r}: name them apart, save_interventions(..., functions={{...}})"
            )
    data = {
        "format": INTERVENTIONS_FORMAT,
        "model": lens.model_hash,
        "tokenizer": lens.tokenizer_hash,
        "interventions": [
            {"site": {"point": one.site.point, **site}, "do": change}
            for one, site, change in zip(interventions, sites, changes, strict=True)
        ],
    }
    write_json(path, data, PatchError, indent=None)


def load_interventions(
    path: str | Path, lens: Lens, *, other_model: bool = False, functions: Functions | None = None
) -> list[Intervention]:
    """Read the interventions that `save_interventions` wrote.

    No code is read from a file: the functions of `Apply` come from `functions`, {"halve": fn}, by the names in the
    file. Raise PatchError on another model or tokenizer unless `other_model`, for a file that holds no interventions
    and for a function that is not given; FileNotFoundError without a file.
    """
    data, where = read_json(expand_path(path, PatchError), error=PatchError), str(path)
    if data.get("format") != INTERVENTIONS_FORMAT:
        raise PatchError(f"{path} holds no interventions that glmlens saved")
    for what, here in (("model", lens.model_hash), ("tokenizer", lens.tokenizer_hash)):
        saved_hash = field_of(data, what, str, where, PatchError)
        if saved_hash != here and not other_model:
            raise PatchError(f"{path} is for {what} {saved_hash}, this is {here}. If that is meant, other_model=True")
    loaded = []
    for number, one in enumerate(list_of(data, "interventions", dict, where, PatchError)):
        which = f"{path}: intervention {number}"
        site, do = (field_of(one, part, dict, which, PatchError) for part in ("site", "do"))
        refuse_other_kinds(site, SITE_KINDS, which)
        refuse_other_kinds(do, CHANGE_KINDS, which)
        try:
            loaded.append(Intervention(Site(**site), change_from_json(do, functions or {})))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as e:
            raise PatchError(f"{which}: {e}") from e
    return loaded


Kinds = Mapping[str, tuple[Callable[[Any], bool], str]]
"""By field: whether a value from JSON may stand there, and what is expected."""


def refuse_other_kinds(data: Mapping[str, Any], kinds: Kinds, where: str) -> None:
    """Raise PatchError for a field of a saved site or change whose value cannot stand there."""
    for name, value in data.items():
        fits, expected = kinds.get(name, (is_places, "whole numbers or names of positions"))
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


def is_name(value: Any) -> bool:
    return isinstance(value, str)


SITE_KINDS: Kinds = {"point": (is_name, "a name")}
CHANGE_KINDS: Kinds = {
    **dict.fromkeys(("kind", "fn"), (is_name, "a name")),
    **dict.fromkeys(("scale", "factor"), (is_number, "a number")),
    "unit": (lambda value: value is None or is_number(value), "a number or null"),
    "key": (lambda value: value is None or is_name(value), "a text or null"),
    "by_position": (lambda value: isinstance(value, bool), "true or false"),
    "seed": (lambda value: is_ids([value]), "a whole number"),
    "tokens": (is_ids, "token ids"),
    "prompts": (lambda value: isinstance(value, list) and all(map(is_ids, value)), "lists of token ids"),
    "value": (lambda value: is_number(value) or is_vector(value), "a number or a vector"),
    "direction": (is_vector, "a vector"),
}
