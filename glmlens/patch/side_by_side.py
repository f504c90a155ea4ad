"""Run several prompts side by side in one batch, with hooks that see every run at a point and can exchange values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from glmlens.deprecated import rename_attribute
from glmlens.hook_points import Point
from glmlens.hooks import Edit, Hooks, list_edits
from glmlens.lens import Lens, PointNames
from glmlens.patch.apply import read_allowed_effects
from glmlens.patch.pairs import describe_length_mismatch
from glmlens.patch.replacement_values import TokenIds, to_token_ids
from glmlens.patch.sites import PatchError
from glmlens.recording.activations import Activations
from glmlens.text.prompts import Prompt

SideBySideHook = Callable[[dict[str, Tensor], Point], Mapping[str, Tensor] | Any]
"""From what every run has at a point, [pos, rest] each, to what some of them should have instead."""


@dataclass(frozen=True, eq=False)
class SideBySideRuns:
    """Runs side by side: `logits[name]` [pos, vocab], and `acts` with a row per run, in the order of `run_names`."""

    run_names: tuple[str, ...]
    logits: Mapping[str, Float[Tensor, "pos vocab"]] = field(repr=False)
    acts: Activations = field(repr=False)

    names = rename_attribute("names", "run_names")

    def __getitem__(self, name: str) -> Float[Tensor, "pos vocab"]:
        return self.logits[name]


def run_side_by_side(
    lens: Lens,
    prompts: Mapping[str, Prompt] | Any,
    hooks: Mapping[str, SideBySideHook] | Sequence[tuple[str, SideBySideHook]] = (),
    *,
    names: PointNames = (),
    allow: str | Sequence[str] = (),
) -> SideBySideRuns:
    """Run prompts of one length side by side, with hooks that see all of them at once.

    `hooks` are {"blocks.3.attn.z": fn}, where `fn(here, point)` gets {run: tensor [pos, rest]} and returns what
    runs should have instead, {"patched": here["clean"]}; the others stay. They run in the order given, so a later
    one sees the changes of an earlier one. `names` are recorded, as by `run_with_cache`. Raise PatchError for prompts
    of different lengths, for a run that is not there, and for a hook that changed nothing unless allow="no change".
    """
    if not isinstance(prompts, Mapping) or not prompts:
        raise PatchError('runs are prompts by name, {"clean": prompt, "patched": prompt}')
    rows: dict[str, TokenIds] = {}
    for name, prompt in prompts.items():
        tokenised = to_token_ids(lens, prompt)
        if len(tokenised) != 1:
            raise PatchError(f"run {name!r} is of {len(tokenised)} prompts: give one prompt for every run")
        rows[name] = tokenised[0]
    first = next(iter(rows.values()))
    for row in rows.values():
        if len(row) != len(first):
            raise PatchError(describe_length_mismatch(lens, first, row))
    tokens = torch.tensor(list(rows.values()), device=lens.device)
    changed: set[str] = set()  # patterns whose hook changed a number
    listed, allow = list_edits(cast(Hooks, hooks)), read_allowed_effects(allow)
    ordinary = [
        (pattern, wrap_exchange(pattern, cast(SideBySideHook, fn), list(rows), changed)) for pattern, fn in listed
    ]
    logits, acts = lens.run_with_cache(tokens, names, ordinary, attention_mask=torch.ones_like(tokens))
    idle = [pattern for pattern, _ in listed if pattern not in changed]
    if idle and "no change" not in allow:
        raise PatchError(f"the hook at {idle[0]!r} changed nothing. If that is meant, allow='no change'")
    assert logits is not None
    return SideBySideRuns(tuple(rows), dict(zip(rows, logits, strict=True)), acts)


def wrap_exchange(pattern: str, fn: SideBySideHook, run_names: list[str], changed: set[str]) -> Edit:
    """Return an ordinary hook that passes every run's row to `fn`, and adds to `changed` if a number changed."""

    def hook(x: Tensor, point: Point) -> Tensor:
        rows = dict(zip(run_names, x.clone(), strict=True))
        replacements: Any = fn(rows, point)
        if not isinstance(replacements, Mapping):
            raise PatchError(
                f"{point.name}: the hook returned {type(replacements).__name__}; expected the runs that change, "
                "{name: tensor}, or {} for none"
            )
        for name, new in replacements.items():
            if name not in run_names:
                raise PatchError(f"no run is called {name!r}; there are {', '.join(run_names)}")
            row = x[run_names.index(name)]
            if not isinstance(new, Tensor):
                raise PatchError(f"{point.name}: {type(new).__name__} for {name!r}; expected a tensor")
            if (new.shape, new.dtype, new.device) != (row.shape, row.dtype, row.device):
                found, expected = (f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (new, row))
                raise PatchError(f"{point.name}: {found} for {name!r}; expected {expected}")
            if not torch.equal(row, new):
                changed.add(pattern)
            row.copy_(new)
        return x

    hook.__name__ = getattr(fn, "__name__", "side-by-side hook")
    return hook
