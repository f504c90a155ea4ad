"""Interventions as ordinary hooks: one prompt, or a generation, and an error for what came to nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor

from glmlens.hooks import Edit, Point
from glmlens.kv_cache import KVCache, LayerKV
from glmlens.lens import Lens
from glmlens.patch.changes import Ids, ids
from glmlens.patch.interventions import Compiler, Intervention, Names, Write
from glmlens.patch.sites import PatchError, seated, ungrouped
from glmlens.prompt import Prompt
from glmlens.run import Run


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
                applied.hooks.append((write.name, Applying(applied, i, write)))
        return applied

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


@dataclass
class Applying:
    """One write of an intervention as an edit, which notes whether it fired and whether it changed anything."""

    applied: Applied
    i: int
    write: Write

    def __post_init__(self) -> None:
        self.__name__ = str(self.applied.interventions[self.i])

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        write, applied = self.write, self.applied
        if write.ungrouped and x.shape[2] != applied.lens.cfg.n_heads:
            raise PatchError(f"{write.name} by query head needs a cache that is not grouped: use patch.run")
        where, keys_of = self.where(point), cast(Tensor, point.key_positions)
        for row, here, reached, keys in zip(seated(point.name, x), where, self.reached(where), keys_of, strict=True):
            slots = reached.nonzero().squeeze(1)
            if len(slots):
                applied.fired.add(self.i)
                if bool(write.into(row, slots, here[slots], lambda k, keys=keys: columns(k, keys))):
                    applied.changed.add(self.i)
        return x

    def holds(self, point: Point) -> bool:
        """Whether this call has any of the positions that are meant."""
        return bool(self.reached(self.where(point)).any())

    def where(self, point: Point) -> Tensor:
        return cast(Tensor, point.key_positions if self.write.by_key else point.positions)

    def reached(self, where: Tensor) -> Tensor:
        return where >= 0 if self.write.positions is None else torch.isin(where, self.write.positions)


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


torch.serialization.add_safe_globals([Ungrouped])  # a pickled generation may hold one


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
        options["kv"] = applied.kv(tokens.shape[0], tokens.shape[1] + min(max_new_tokens, 256))  # it grows
    done = lens.generate(prompt, max_new_tokens, hooks=[*applied.hooks, *options.pop("hooks", ())], **options)
    applied.finish((allow,) if isinstance(allow, str) else allow)
    return done


def one_prompt(lens: Lens, prompt: Prompt) -> tuple[Ids, ...]:
    found = ids(lens, prompt)
    if len(found) != 1:
        raise PatchError(f"one prompt at a time here, not {len(found)}; patch.sweep takes many")
    return found
