"""Interventions: a site and a change, as data; compiled to writes, run as hooks, saved as JSON."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from glmlens.hooks import axes_of
from glmlens.lens import Lens
from glmlens.patch.changes import Change, Where, from_data, to_data
from glmlens.patch.sites import Atlas, PatchError, Site, position_axis, seated, ungrouped

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
            _, acts = self.lens.run_with_cache(
                row, sorted({name for name, _ in places}), logits=False, attention_mask=torch.ones_like(row)
            )
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
    """Write interventions to a JSON file, with the hashes of the model and tokenizer that they are for."""
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
    Path(path).write_text(json.dumps(data, ensure_ascii=False))


def load(path: str | Path, lens: Lens, *, other_model: bool = False) -> list[Intervention]:
    """The interventions that `save` wrote; PatchError on another model or tokenizer, unless `other_model`."""
    data = json.loads(Path(path).read_text())
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PatchError(f"{path} holds no interventions that glmlens saved")
    for what, here in (("model", lens.model_hash), ("tokenizer", lens.tokenizer_hash)):
        if data[what] != here and not other_model:
            raise PatchError(f"{path} is for {what} {data[what]}, this is {here}. If that is meant, other_model=True")
    return [Intervention(Site(**one["site"]), from_data(one["do"])) for one in data["interventions"]]
