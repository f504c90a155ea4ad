"""The lens of a timeline that was pickled, which has no model."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from glmlens.hook_points import HookError
from glmlens.integers import Integer, Integers, read_integer
from glmlens.lens import Lens


class PickledLens(Lens):
    """The lens of an unpickled timeline: sizes, the texts of the timeline's tokens and the model's hash, no model.

    Access to the model raises HookError.
    """

    def __init__(self, state: Mapping[str, Any]):
        self.state = state
        # The lens is its own tokenizer: callers need only `label`, or to know whether there is a tokenizer.
        self.tokenizer = cast(Any, self if state["labels"] else None)

    @property
    def model(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise HookError("this timeline was pickled without its model: line = line.with_lens(lens) gives it back")

    @property
    def cfg(self) -> Any:
        return SimpleNamespace(**self.state["sizes"])

    @property
    def dtype(self) -> torch.dtype:
        return self.state["dtype"]

    @property
    def device(self) -> torch.device:
        return self.state["device"]

    @property
    def model_hash(self) -> str:
        return self.state["model_hash"]

    def label(self, token: int) -> str:
        return self.state["labels"].get(token, f"⟨{token}⟩")

    def to_string(self, tokens: Tensor | Sequence[int], continues: bool = False) -> str:
        return self.state["text"]

    def to_answer(self, answer: str | Integer) -> int:
        # A text needs the tokenizer, which was not pickled: access to the model raises the HookError that explains it.
        return self.model.to_answer(answer) if isinstance(answer, str) else read_integer(answer, "answer")

    def resolve_stops(
        self, stop_ids: Integers = None, stop_strings: str | Sequence[str] | None = None
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return (), (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())

    def __repr__(self) -> str:
        return f"PickledLens(of model {self.model_hash}, not loaded)"
