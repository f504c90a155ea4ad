"""What is said of an answer: nothing yet, right, or what is wrong with it and where to look."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from html import escape
from typing import Any

import torch
from torch import Tensor

from glmlens.errors import GlmlensError
from glmlens.lens import Lens, load


class WrongAnswer(GlmlensError):
    """An answer that is not right; the message is for the learner and does not give the answer away."""


@dataclass(frozen=True)
class Feedback:
    """What is said of an answer; `right` is None as long as there is none."""

    exercise: str
    right: bool | None
    message: str

    def __repr__(self) -> str:
        return f"{FEEDBACK_MARKS[self.right][0]} (exercise {self.exercise}): {self.message}"

    def _repr_html_(self) -> str:
        style = f"border-left:4px solid {FEEDBACK_MARKS[self.right][1]};padding:.2em .8em;margin:.3em 0"
        return f'<div style="{style}">{escape(repr(self))}</div>'


FEEDBACK_MARKS = {None: ("… no answer yet", "#888888"), True: ("✓ right", "#2e8b57"), False: ("✗ not yet", "#d6604d")}


def exercise(expected: str) -> Callable[[Callable[..., str]], Callable[..., Feedback]]:
    """A check of answers, made of a function that returns what to say of right ones, and raises Wrong for others.

    The function is called `exercise_3_1`; `asked` says what to put in place of `...`. What else is raised while a
    learner's function is tried is said too: a check never ends the run of a notebook.
    """

    def decorate_judge(judge: Callable[..., str]) -> Callable[..., Feedback]:
        number = judge.__name__.removeprefix("exercise_").replace("_", ".")

        @wraps(judge)
        def check(*answers: Any) -> Feedback:
            if any(answer is ... for answer in answers):
                return Feedback(number, None, f"in place of ... put {expected}")
            try:
                return Feedback(number, True, judge(*answers))
            except WrongAnswer as e:
                return Feedback(number, False, str(e))
            except Exception as e:
                return Feedback(number, False, f"it raised {type(e).__name__}: {e}")

        return check

    return decorate_judge


@cache
def load_lens() -> Lens:
    """The small GLM that the course looks into, in float32."""
    return load(dtype="float32")


# ---- what answers are held against ----


def demand(holds: bool, otherwise: str) -> None:
    """Raise Wrong with `otherwise` unless it holds."""
    if not holds:
        raise WrongAnswer(otherwise)


def to_number(answer: Any) -> float:
    """The answer as a number; Wrong for what is none."""
    try:
        return float(answer)
    except (TypeError, ValueError, RuntimeError):
        raise WrongAnswer(f"expected one number, got {describe_answer(answer)}") from None


def to_tensor(answer: Any, like: Tensor) -> Tensor:
    """The answer as a tensor of the shape of another; Wrong for another shape."""
    demand(isinstance(answer, Tensor), f"expected a tensor, got {describe_answer(answer)}")
    demand(answer.shape == like.shape, f"expected the shape {tuple(like.shape)}, got {tuple(answer.shape)}")
    return answer


def check_equal(answer: Any, right: Tensor, otherwise: str, within: float = 1e-4) -> None:
    """Raise Wrong unless the answer is this tensor, to within this much of its largest number."""
    gap = float((to_tensor(answer, right).to(torch.float64) - right.to(torch.float64)).abs().max())
    bound = within * float(right.abs().max())
    demand(gap <= bound, f"{otherwise} (the largest difference is {gap:.3g})")


def check_hooks(answer: Any) -> Any:
    """The answer, if it is hooks; Wrong for what is none."""
    given = isinstance(answer, (Mapping, Sequence)) and not isinstance(answer, str)
    demand(given, f"expected hooks, {{point: hook}} or a list of (point, hook), got {describe_callable(answer)}")
    return answer


def to_head(answer: Any) -> tuple[int, int]:
    """The answer as (layer, head); Wrong for what is no head of this model."""
    try:
        layer, number = map(int, answer)
    except (TypeError, ValueError):
        raise WrongAnswer(f"expected (layer, head), got {describe_answer(answer)}") from None
    layers, heads = load_lens().cfg.n_layers, load_lens().cfg.n_heads
    there = 0 <= layer < layers and 0 <= number < heads
    demand(there, f"there is no head {layer}.{number}: layers are 0 to {layers - 1}, heads 0 to {heads - 1}")
    return layer, number


def describe_answer(answer: Any) -> str:
    """What an answer is, in a word."""
    if isinstance(answer, Tensor):
        return f"a tensor of shape {tuple(answer.shape)}"
    return f"{describe_callable(answer)} itself: call it" if callable(answer) else repr(answer)[:80]


def describe_callable(answer: Any) -> str:
    """A function by its name, anything else as it is shown."""
    return f"the function {getattr(answer, '__name__', answer)!r}" if callable(answer) else repr(answer)[:80]
