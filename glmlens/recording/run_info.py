"""What a recording knows of its run: tokens, positions, model, tokenizer, and which points were edited."""

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from glmlens.hook_points import HookError
from glmlens.model import GLM
from glmlens.recording.derive import RunContext, derive_point, is_derivable, make_underivable_check
from glmlens.text.tokenizer import RowTexts, Tokenizer


@dataclass(frozen=True, eq=False, kw_only=True)
class RunInfo:
    """The run of a recording: tokens and positions, model and tokenizer, and which points were edited.

    `positions` [batch, pos] are absolute, -1 at padding. `find_named_positions` returns the positions of a task's
    names. `model` is None where only its hash is known: nothing can be derived then. `past_entries` says whether the
    cache held entries before the run, `unchanged()` whether the weights are still those of the run. `over_steps` marks
    recordings joined over the steps of a generation: nothing is derived from them, since each step had its own shape.
    """

    tokens: Int[Tensor, "batch pos"] | None
    positions: Int[Tensor, "batch pos"]
    key_positions: Int[Tensor, "batch key"]
    model: GLM | None = None
    model_hash: Callable[[], str] = lambda: "unknown"
    tokenizer: Tokenizer | RowTexts | None = None
    find_named_positions: Callable[[str], Int[Tensor, "batch"]] | None = None
    edited_points: frozenset[str] = frozenset()
    past_entries: bool = False
    unchanged: Callable[[], bool] = lambda: True
    over_steps: bool = False

    def is_derivable(self, name: str, stored: Mapping[str, Any]) -> bool:
        """Whether the point of this full name can be computed from the stored ones."""
        if self.model is None or self.over_steps or not name.startswith(("blocks.", "ln_final.")):
            return False
        is_underivable = make_underivable_check(self.edited_points, self.model, self.past_entries)
        return is_derivable(name, self.model, stored, is_underivable)

    def derive(self, name: str, available: ChainMap[str, Any]) -> Tensor | None:
        """Compute a point from available values; HookError if the weights were edited since the run."""
        assert self.model is not None
        if not self.unchanged():
            raise HookError(
                f"{name!r} is not stored but computed from the weights, and they were edited after this run: name it "
                f"alone in names= when you run, or call acts.store_all() before the edit"
            )
        context = RunContext(self.model, self.positions, self.key_positions)
        is_underivable = make_underivable_check(self.edited_points, self.model, self.past_entries)
        return derive_point(name, context, available, is_underivable)

    def list_rows(self) -> list[list[int]]:
        """Return the token ids of every row, without padding."""
        assert self.tokens is not None
        return [row[at >= 0].tolist() for row, at in zip(self.tokens, self.positions, strict=True)]

    def to(self, device: torch.device) -> "RunInfo":
        """Return this run info with its tensors on `device`."""
        return replace(
            self,
            tokens=None if self.tokens is None else self.tokens.to(device),
            positions=self.positions.to(device),
            key_positions=self.key_positions.to(device),
        )
