"""Interventions: a site and a change, as data; compiled to writes, run as hooks, saved as JSON."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmlens.hooks import Edit, Point, axes_of
from glmlens.kv_cache import KVCache, LayerKV
from glmlens.lens import Lens
from glmlens.patch.changes import Change, Ids, Where, from_data, ids, to_data
from glmlens.patch.sites import Atlas, PatchError, Site, position_axis, seated, ungrouped
from glmlens.prompt import Prompt
from glmlens.run import Run

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


@dataclass
class Applied:
    """Interventions as ordinary hooks, which note whether they came to anything."""

    lens: Lens
    interventions: Sequence[Intervention]
    hooks: list[tuple[str, Edit]] = field(default_factory=list)
    fired: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)

    @staticmethod
    def to(
        lens: Lens, interventions: Sequence[Intervention], length: int | None = None, names: Names | None = None
    ) -> "Applied":
        """Hooks for `run_with_hooks` or, without a length, for `generate`."""
        compiler, applied = Compiler(lens), Applied(lens, interventions)
        compiler.prepare(interventions, length)
        for i, one in enumerate(interventions):
            for write in compiler.writes(one, length, names or {}):
                applied.hooks.append((write.name, applied.edit(i, write)))
        return applied

    def edit(self, i: int, write: Write) -> Edit:
        def edit(x: Tensor, point: Point) -> Tensor:
            if write.ungrouped and x.shape[2] != self.lens.cfg.n_heads:
                raise PatchError(f"{write.name} by query head needs a cache that is not grouped: use patch.run")
            assert point.positions is not None
            assert point.key_positions is not None
            view, where = seated(point.name, x), point.key_positions if write.by_key else point.positions
            for row, here, keys in zip(view, where, point.key_positions, strict=True):
                reached = here >= 0 if write.positions is None else torch.isin(here, write.positions)
                slots = reached.nonzero().squeeze(1)
                if len(slots):
                    self.fired.add(i)
                    if bool(write.into(row, slots, here[slots], lambda k, keys=keys: columns(k, keys))):
                        self.changed.add(i)
            return x

        edit.__name__ = str(self.interventions[i])
        return edit

    def finish(self, allow: Sequence[str]) -> None:
        """Raise PatchError for an intervention that never fired or changed nothing, unless that is allowed by name."""
        for i, one in enumerate(self.interventions):
            if i not in self.fired and "never fired" not in allow:
                raise PatchError(f"{one}: never fired. If that is meant, allow='never fired'")
            if i in self.fired and i not in self.changed and "no change" not in allow:
                raise PatchError(f"{one}: changed nothing. If that is meant, allow='no change'")

    def kv(self, batch: int, capacity: int) -> KVCache | None:
        """The cache that interventions by query head need."""
        if not any(one.site.ungrouped for one in self.interventions):
            return None
        mixed = {one.site.point for one in self.interventions if one.site.ungrouped}
        if any(one.site.point in mixed and not one.site.ungrouped for one in self.interventions):
            raise PatchError(f"{', '.join(mixed)} both by query head and by group: say all of it in heads")
        kv = self.lens.new_kv(batch, capacity)
        return Ungrouped(**{f.name: getattr(kv, f.name) for f in fields(kv)}, group=self.lens.cfg.n_groups)


def columns(asked: Tensor, keys: Tensor) -> Tensor:
    """Where the keys at these positions stand."""
    found = (keys[None] == asked[:, None]).int()
    if not bool(found.any(1).all()):
        raise PatchError(
            f"key positions {asked[~found.any(1)].tolist()} asked for; this call can attend to {keys.tolist()}"
        )
    return found.argmax(1)


@dataclass(eq=False, repr=False)
class Ungrouped(KVCache):
    """A cache that is recalled as every query head reads it, [batch, key, head, d]."""

    group: int = 1

    def layer(self, index: int) -> LayerKV:
        return UngroupedLayer(self, index, self.group)

    def fork(self, room: int = 0) -> "Ungrouped":
        copy = super().fork(room)
        return Ungrouped(**{f.name: getattr(copy, f.name) for f in fields(copy)}, group=self.group)


@dataclass(frozen=True)
class UngroupedLayer(LayerKV):
    """One layer's part of an ungrouped cache."""

    group: int

    def remember(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().remember(k, v)
        return ungrouped(k, self.group), ungrouped(v, self.group)


def run(
    lens: Lens,
    prompt: Prompt,
    interventions: Sequence[Intervention] | Intervention,
    *,
    names: Names | None = None,
    allow: str | Sequence[str] = (),
) -> Tensor:
    """Logits [batch, pos, vocab] of one prompt with interventions.

    `names` are positions by name. Raises PatchError for an intervention that "never fired" or made "no change",
    unless `allow` says so.
    """
    (tokens,) = one_prompt(lens, prompt)
    asked = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    applied = Applied.to(lens, asked, len(tokens), {"end": len(tokens) - 1, **(names or {})})
    row = torch.tensor([tokens], device=lens.device)
    logits = lens.run_with_hooks(row, applied.hooks, kv=applied.kv(1, len(tokens)))
    applied.finish((allow,) if isinstance(allow, str) else allow)
    return logits


def generate(
    lens: Lens,
    prompt: Prompt,
    max_new_tokens: int,
    interventions: Sequence[Intervention] | Intervention,
    *,
    allow: str | Sequence[str] = (),
    **options: Any,
) -> Run:
    """`lens.generate` with interventions at absolute positions, checked as in `run`; `options` are those of generate.

    A site without positions holds at every position, also of what is generated.
    """
    asked = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    applied = Applied.to(lens, asked)
    if "kv" not in options and any(one.site.ungrouped for one in asked):
        tokens, _ = lens.to_batch(prompt)
        options["kv"] = applied.kv(tokens.shape[0], tokens.shape[1] + max_new_tokens)
    done = lens.generate(prompt, max_new_tokens, hooks=[*applied.hooks, *options.pop("hooks", ())], **options)
    applied.finish((allow,) if isinstance(allow, str) else allow)
    return done


def one_prompt(lens: Lens, prompt: Prompt) -> tuple[Ids, ...]:
    found = ids(lens, prompt)
    if len(found) != 1:
        raise PatchError(f"one prompt at a time here, not {len(found)}; patch.sweep takes many")
    return found


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
