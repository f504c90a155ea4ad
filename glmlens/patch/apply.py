"""Run interventions as ordinary hooks, on one prompt or in a generation; raise for one that had no effect."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from glmlens.deprecated import rename_keyword
from glmlens.hook_points import Point
from glmlens.hooks import Edit, list_edits
from glmlens.integers import Integer
from glmlens.kv_cache import KVCache, LayerKV
from glmlens.lens import Lens
from glmlens.lens.generation import GenerationResult
from glmlens.patch.interventions import (
    Intervention,
    InterventionCompiler,
    PositionNames,
    Write,
    as_interventions,
    read_position_names,
    refuse_mixed,
)
from glmlens.patch.replacement_values import TokenIds, to_token_ids
from glmlens.patch.sites import PatchError, move_position_first, repeat_kv
from glmlens.text.prompts import Prompt

ALLOWED = ("never fired", "no change")


def read_allowed_effects(allow: str | Sequence[str]) -> tuple[str, ...]:
    """Return the effects that may be missing, as a tuple; raise PatchError for an unknown one."""
    listed = (allow,) if isinstance(allow, str) else tuple(allow)
    unknown = [word for word in listed if word not in ALLOWED]
    if unknown:
        raise PatchError(f"allow={unknown[0]!r}; what can be allowed is {' and '.join(map(repr, ALLOWED))}")
    return listed


@dataclass
class AppliedInterventions:
    """Interventions compiled to ordinary hooks, which note which of them ran and which changed a number.

    `fired` and `changed` hold indices of interventions. `ends` is the last prompt position of every row, known once the
    prompt has been run; `late` holds the writes of interventions that name it, by intervention and end.
    """

    lens: Lens
    interventions: Sequence[Intervention]
    compiler: InterventionCompiler
    hooks: list[tuple[str, Edit]] = field(default_factory=list)
    fired: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)
    ends: list[int] | None = None
    late: dict[tuple[int, int], dict[str, Write]] = field(default_factory=dict)

    @staticmethod
    def compile(
        lens: Lens,
        interventions: Sequence[Intervention],
        length: int | None = None,
        position_names: PositionNames | None = None,
        *,
        end_when_run: bool = False,
    ) -> "AppliedInterventions":
        """Compile interventions to hooks for `run_with_hooks` or, without a length, for `generate`.

        With `end_when_run`, "end" is the last position of every row of the first call, known only when it runs.
        """
        applied = AppliedInterventions(lens, interventions, InterventionCompiler(lens))
        applied.compiler.record_sources(interventions, length)
        writes = []
        for i, one in enumerate(interventions):
            # Position 0 stands for an end that is not known yet: the hook compiles its write again.
            named = [place for places in one.site.chosen_places().values() for place in places]
            late = end_when_run and "end" in named
            for write in applied.compiler.compile_writes(one, length, {"end": 0} if late else position_names or {}):
                writes.append(write)
                applied.hooks.append((write.name, InterventionHook(applied, i, write, late)))
        refuse_mixed(writes)
        return applied

    def write_at_end(self, i: int, name: str, row: int) -> Write:
        """Return the write of an intervention that names "end", in one row."""
        assert self.ends is not None
        end = self.ends[row]
        if (i, end) not in self.late:
            writes = self.compiler.compile_writes(self.interventions[i], None, {"end": end})
            self.late[i, end] = {write.name: write for write in writes}
        return self.late[i, end][name]

    def require_effects(self, allow: Sequence[str]) -> None:
        """Raise PatchError for an intervention that never fired or changed nothing, unless that is allowed by name."""
        for i, one in enumerate(self.interventions):
            if i not in self.fired and "never fired" not in allow:
                raise PatchError(f"{one}: never fired. If that is meant, allow='never fired'")
            if i in self.fired and i not in self.changed and "no change" not in allow:
                raise PatchError(f"{one}: changed nothing. If that is meant, allow='no change'")

    def make_cache(self, batch: int, capacity: int) -> KVCache | None:
        """Return the cache that interventions by query head need, or None where there are none."""
        if not any(one.site.by_query_head for one in self.interventions):
            return None
        kv = self.lens.new_kv(batch, capacity)
        return UngroupedCache.from_cache(kv, self.lens.cfg.n_groups)


@dataclass
class InterventionHook:
    """One write of an intervention as an edit; with `late`, its positions are known once the prompt has been run."""

    applied: AppliedInterventions
    index: int
    write: Write
    late: bool = False

    def __post_init__(self) -> None:
        self.__name__ = str(self.applied.interventions[self.index])

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        applied, cfg = self.applied, self.applied.lens.cfg
        ungrouped = False  # whether keys or values are there as every query head reads them
        if self.write.uses_key_positions:
            ungrouped = x.shape[2] == cfg.n_heads != cfg.n_kv_heads
            if self.write.by_query_head and not ungrouped and cfg.n_groups > 1:
                raise PatchError(
                    f"{self.write.name} by query head needs a cache that is not grouped: use run_with_interventions"
                )
        rows = move_position_first(point.name, x)
        positions, key_positions = self.positions_of(point), cast(Tensor, point.key_positions)
        for i, (row, here, keys) in enumerate(zip(rows, positions, key_positions, strict=True)):
            write = self.write_of_row(i, point)
            slots = match_positions(write, here).nonzero().squeeze(1)
            if not len(slots):
                continue
            column = lambda asked, keys=keys: find_key_columns(asked, keys)  # noqa: E731 - one of two
            if write.by_query and write.rest_indices[1] is None:  # every key of this call, and no padding
                real = (keys >= 0).nonzero().squeeze(1)
                write, column = (
                    replace(write, rest_indices=(write.rest_indices[0], keys[real])),
                    lambda asked, real=real: real,
                )
            applied.fired.add(self.index)
            if ungrouped and not write.by_query_head:
                changed = write.into_group(row, slots, here[slots], column, cfg.n_groups)
            else:
                changed = write.apply_to_row(row, slots, here[slots], column)
            if bool(changed):
                applied.changed.add(self.index)
        return x

    def write_of_row(self, row: int, point: Point) -> Write:
        """Return this write in one row of a call; of the first call the last positions are the prompts' ends."""
        if not self.late:
            return self.write
        if self.applied.ends is None:
            self.applied.ends = cast(Tensor, point.positions).amax(1).tolist()
        return self.applied.write_at_end(self.index, self.write.name, row)

    def applies_at(self, point: Point) -> bool:
        """Whether this call has any of the write's positions."""
        rows = enumerate(self.positions_of(point))
        return any(bool(match_positions(self.write_of_row(i, point), here).any()) for i, here in rows)

    def positions_of(self, point: Point) -> Tensor:
        """Return the absolute positions along the axis of the write, [row, slot]."""
        return cast(Tensor, point.key_positions if self.write.uses_key_positions else point.positions)


def match_positions(write: Write, where: Tensor) -> Tensor:
    """Return a mask of the absolute positions that a write is for; padding, at -1, never is."""
    return where >= 0 if write.positions is None else torch.isin(where, write.positions)


def find_key_columns(positions: Tensor, keys: Tensor) -> Tensor:
    """Return the columns of the keys at these positions; raise PatchError for one that this call does not attend to."""
    matches = (keys[None] == positions[:, None]).int()
    if not bool(matches.any(1).all()):
        raise PatchError(
            f"key positions {positions[~matches.any(1)].tolist()} asked for; this call can attend to {keys.tolist()}"
        )
    return matches.argmax(1)


@dataclass(eq=False, repr=False)
class UngroupedCache(KVCache):
    """A KV cache that returns keys and values as every query head reads them, [batch, key, head, d]."""

    group_size: int = 1

    @staticmethod
    def from_cache(kv: KVCache, group_size: int) -> "UngroupedCache":
        """Return an ungrouped cache with the fields of `kv`."""
        return UngroupedCache(**{f.name: getattr(kv, f.name) for f in fields(kv)}, group_size=group_size)

    def layer(self, index: int) -> LayerKV:
        return UngroupedLayerKV(self, index, self.group_size)

    def fork(self, room: Integer = 0) -> "UngroupedCache":
        return UngroupedCache.from_cache(super().fork(room), self.group_size)


torch.serialization.add_safe_globals([UngroupedCache])  # a pickled generation may hold one


@dataclass(frozen=True)
class UngroupedLayerKV(LayerKV):
    """One layer of an ungrouped cache: entries are stored by key head and repeated when they are read."""

    group_size: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().update(k, v)
        return repeat_kv(k, self.group_size), repeat_kv(v, self.group_size)


@rename_keyword("names", "position_names")
def run_with_interventions(
    lens: Lens,
    prompt: Prompt,
    interventions: Sequence[Intervention] | Intervention | Any,
    *,
    position_names: PositionNames | Any = None,
    allow: str | Sequence[str] = (),
) -> Tensor:
    """Run one prompt with interventions and return its logits [batch, pos, vocab].

    Interventions hold in the order of the forward; at one point, in the order given. `position_names` are positions by
    name, {"S2": 9}, and "end" is the last. Raise PatchError for an intervention that "never fired" or made "no change",
    unless `allow` names that.
    """
    (tokens,) = require_one_prompt(lens, prompt)
    asked, allow = as_interventions(interventions), read_allowed_effects(allow)
    applied = AppliedInterventions.compile(
        lens, asked, len(tokens), read_position_names(position_names or {}, len(tokens))
    )
    row = torch.tensor([tokens], device=lens.device)
    kv = applied.make_cache(1, len(tokens))
    logits = lens.run_with_hooks(row, applied.hooks, kv=kv, attention_mask=torch.ones_like(row))
    applied.require_effects(allow)
    return logits


def generate_with_interventions(
    lens: Lens,
    prompt: Prompt,
    max_new_tokens: int,
    interventions: Sequence[Intervention] | Intervention | Any,
    *,
    allow: str | Sequence[str] = (),
    **options: Any,
) -> GenerationResult:
    """Generate with interventions at absolute positions; `options` are those of `lens.generate`.

    "end" is the last position of each prompt. A site without positions holds at every position, generated ones too.
    Raise PatchError as `run_with_interventions` does.
    """
    asked, allow = as_interventions(interventions), read_allowed_effects(allow)
    applied = AppliedInterventions.compile(lens, asked, end_when_run=True)
    if options.get("kv") is None and any(one.site.by_query_head for one in asked):
        tokens, _ = lens.to_batch(prompt)
        options["kv"] = applied.make_cache(
            tokens.shape[0], tokens.shape[1] + min(max_new_tokens, 256)
        )  # a first capacity; it grows
    done = lens.generate(
        prompt, max_new_tokens, hooks=[*applied.hooks, *list_edits(options.pop("hooks", None))], **options
    )
    applied.require_effects(allow)
    return done


def require_one_prompt(lens: Lens, prompt: Prompt) -> tuple[TokenIds, ...]:
    """Return the token ids of a prompt in a tuple of one; raise PatchError for several prompts."""
    rows = to_token_ids(lens, prompt)
    if len(rows) != 1:
        raise PatchError(f"one prompt at a time here, not {len(rows)}; patch.sweep takes many")
    return rows
