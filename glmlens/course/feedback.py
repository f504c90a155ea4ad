"""Feedback on answers to exercises: no answer yet, right, or what is wrong and where to look.

The message of a wrong answer gives a hint, never the solution.
"""

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
    """An answer is not right. The message is for the learner: what is wrong, and a hint."""


@dataclass(frozen=True)
class Feedback:
    """Feedback on an answer; `right` is None as long as there is no answer."""

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
    """Return a decorator that makes a check of an exercise from a function that judges answers.

    The function has the name of the exercise, such as `exercise_3_1`. It returns the message for a right answer and
    raises WrongAnswer for a wrong one. `expected` describes what to put in place of the `...` of the notebook. Every
    other exception, such as one from the learner's own function, becomes feedback as well: a check never stops a
    notebook.
    """

    def decorate_judge(judge: Callable[..., str]) -> Callable[..., Feedback]:
        number = judge.__name__.removeprefix("exercise_").replace("_", ".")

        @wraps(judge)
        def check(*answers: Any) -> Feedback:
            if any(answer is ... for answer in answers):  # a notebook has `...` where the answer goes
                return Feedback(number, None, f"in place of ... put {expected}")
            try:
                return Feedback(number, True, judge(*answers))
            except WrongAnswer as e:
                return Feedback(number, False, str(e))
            except Exception as e:  # also from the learner's function
                return Feedback(number, False, f"it raised {type(e).__name__}: {e}")

        return check

    return decorate_judge


@cache
def load_lens() -> Lens:
    """Return the small GLM of the course, in float32."""
    return load(dtype="float32")


# ---- comparing answers ----


def demand(holds: bool, otherwise: str) -> None:
    """Raise WrongAnswer with the message `otherwise` unless `holds`."""
    if not holds:
        raise WrongAnswer(otherwise)


def to_number(answer: Any) -> float:
    """Return the answer as a number. Raises WrongAnswer if it is none."""
    try:
        return float(answer)
    except (TypeError, ValueError, RuntimeError):
        raise WrongAnswer(f"expected one number, got {describe_answer(answer)}") from None


def to_tensor(answer: Any, like: Tensor) -> Tensor:
    """Return the answer, a tensor of the shape of `like`. Raises WrongAnswer if it is none."""
    demand(isinstance(answer, Tensor), f"expected a tensor, got {describe_answer(answer)}")
    demand(answer.shape == like.shape, f"expected the shape {tuple(like.shape)}, got {tuple(answer.shape)}")
    return answer


def check_equal(answer: Any, right: Tensor, otherwise: str, within: float = 1e-4) -> None:
    """Raise WrongAnswer unless the answer equals `right`, to within `within` times its largest number."""
    # In float64: the comparison itself adds no rounding error.
    gap = float((to_tensor(answer, right).to(torch.float64) - right.to(torch.float64)).abs().max())
    bound = within * float(right.abs().max())
    demand(gap <= bound, f"{otherwise} (the largest difference is {gap:.3g})")


def check_hooks(answer: Any) -> Any:
    """Return the answer if it is a mapping or list of hooks. Raises WrongAnswer if not."""
    is_collection = isinstance(answer, (Mapping, Sequence)) and not isinstance(answer, str)
    demand(
        is_collection, f"expected hooks, {{point: hook}} or a list of (point, hook), got {describe_callable(answer)}"
    )
    return answer


def to_head(answer: Any) -> tuple[int, int]:
    """Return the answer as (layer, head). Raises WrongAnswer if the model has no such head."""
    try:
        layer, number = map(int, answer)
    except (TypeError, ValueError):
        raise WrongAnswer(f"expected (layer, head), got {describe_answer(answer)}") from None
    layers, heads = load_lens().cfg.n_layers, load_lens().cfg.n_heads
    exists = 0 <= layer < layers and 0 <= number < heads
    demand(exists, f"there is no head {layer}.{number}: layers are 0 to {layers - 1}, heads 0 to {heads - 1}")
    return layer, number


def describe_answer(answer: Any) -> str:
    """Return a short description of an answer for an error message."""
    if isinstance(answer, Tensor):
        return f"a tensor of shape {tuple(answer.shape)}"
    return f"{describe_callable(answer)} itself: call it" if callable(answer) else repr(answer)[:80]


def describe_callable(answer: Any) -> str:
    """Return the name of a function, the repr of anything else."""
    return f"the function {getattr(answer, '__name__', answer)!r}" if callable(answer) else repr(answer)[:80]
