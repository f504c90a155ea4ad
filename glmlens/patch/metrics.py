"""How well a run did: a number per row, from no more logits than it takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.lens import Lens
from glmlens.patch.sites import PatchError
from glmlens.tasks.task import LOGIT_DIFFERENCE, Examples

Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Metric:
    """A number per row of `of(logits [row, read, vocab], example [row])`, higher where the task is done.

    `everywhere`: logits of all positions are read, not of the last alone. With `columns` only the logits of those
    tokens exist: [row, read, column].
    """

    name: str
    of: Measure
    everywhere: bool = False
    columns: Int[Tensor, "column"] | None = None

    def __call__(self, logits: Tensor, example: Tensor) -> Float[Tensor, "row"]:
        found = self.of(logits, example)
        if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise PatchError(f"the metric {self.name} made {got} of logits of {len(logits)} rows; expected one per row")
        return found


def as_metric(metric: Any, lens: Lens, n_examples: int) -> Metric:
    """A metric from a pair of tokens, a task's examples, or a function of the last logits [row, vocab].

    A pair is (right, wrong), ids or texts of one token, or labels of a class head: the logit difference.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, Examples):
        return of_examples(metric, n_examples, lens)
    if isinstance(metric, Sequence) and len(metric) == 2:
        right, wrong = (lens.to_answer(t) for t in metric)
        return logit_difference([((right,), (wrong,))] * n_examples, lens)
    if callable(metric):
        fn: Callable[..., Any] = metric
        return Metric(getattr(metric, "__name__", "metric"), lambda logits, _: fn(logits[:, -1]))
    raise PatchError(f"a metric is (right, wrong), a task's Examples or a function of logits [row, vocab]: {metric!r}")


def logit_difference(answers: Sequence[tuple[Sequence[int], Sequence[int]]], lens: Lens) -> Metric:
    """Per example the best right logit less the best wrong one, from (right, wrong) token ids."""
    columns = sorted({token for pair in answers for side in pair for token in side})
    sides = [
        torch.stack([one_of(columns, side).to(lens.device) for side in which]) for which in zip(*answers, strict=True)
    ]

    def of(logits: Tensor, example: Tensor) -> Tensor:
        last = logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))
        right, wrong = ((last + side[example]).amax(-1) for side in sides)
        return right - wrong

    return Metric("logit difference", of, columns=torch.tensor(columns, device=lens.device))


def one_of(columns: list[int], side: Sequence[int]) -> Tensor:
    """0 at the columns of a side and -inf elsewhere."""
    return torch.tensor([0.0 if token in side else -torch.inf for token in columns])


def of_examples(examples: Examples, n_examples: int, lens: Lens) -> Metric:
    """The task's own metric for every example."""
    if len(examples) != n_examples:
        raise PatchError(f"{n_examples} prompts, but the metric is of {len(examples)} examples")
    if examples.task.metric == LOGIT_DIFFERENCE:
        return logit_difference([(e.correct, e.wrong) for e in examples], lens)

    def of(logits: Tensor, example: Tensor) -> Tensor:
        rows = Examples(examples.task, tuple(examples[i] for i in example.tolist()))
        return rows.measure(logits)

    return Metric(examples.task.metric, of)
