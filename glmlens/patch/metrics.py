"""Metrics: one number per row of logits, computed from the positions and tokens that it needs alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.prompt_batch import upcast
from glmlens.lens import Lens
from glmlens.patch.replacement_values import name_of
from glmlens.patch.sites import PatchError
from glmlens.patch.sweep_checkpoint_keys import key_of, key_or_refuse
from glmlens.tasks.task import LOGIT_DIFFERENCE, Examples
from glmlens.text.prompt_kinds import is_whole_number

MetricFunction = Callable[[Tensor, Tensor], Tensor]
KINDS = (
    "a metric is (right, wrong), each the text of one token or its id; a task's Examples; a function of the last "
    "logits, fn(logits [row, vocab]) -> [row]; or Metric.of_answers(lens, [(right, wrong), ...]) with a pair per prompt"
)


@dataclass(frozen=True, eq=False)
class Metric:
    """A number per row of `of(logits [row, read, vocab], example [row])`, higher where the task is done.

    `of` receives the logits of `row` changed runs at the positions read, and for every row the number of its prompt; it
    returns a tensor [row]. With `everywhere`, the logits of all positions are read, not of the last alone (read is 1).
    With `columns` only the logits of those tokens are computed: [row, read, column]. `key` identifies the metric in a
    sweep's checkpoint, where the code, closure and globals of `of` cannot. `n_answers` is for how many prompts it has
    answers; None for any number.
    """

    name: str | Any
    of: MetricFunction | Any
    everywhere: bool = False
    columns: Int[Tensor, "column"] | None = None
    key: str | None = None
    n_answers: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not callable(self.of):
            raise PatchError(
                f"Metric({self.name!r:.40}, {self.of!r:.40}): expected a name and a function "
                "of(logits [row, read, vocab], example [row]) -> [row]"
            )

    @staticmethod
    def of_answers(lens: Lens, answers: Sequence[tuple[Any, Any]] | Any) -> "Metric":
        """Return the logit difference of a (right, wrong) pair per prompt.

        Each side is the text of one token, its id, or a list of several. Raise PatchError for what is no pair.
        """
        pairs = []
        for pair in answers:
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise PatchError(f"{pair!r:.60} is no pair (right, wrong); give one for every prompt")
            right, wrong = (
                tuple(answer_id(lens, one) for one in (side if isinstance(side, list | tuple) else [side]))
                for side in pair
            )
            if not right or not wrong:
                raise PatchError(f"{pair!r:.60}: one side is empty")
            pairs.append((right, wrong))
        if not pairs:
            raise PatchError("no answers: give a pair (right, wrong) for every prompt")
        return logit_difference(pairs, lens)

    def select(self, logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, "row read column"]:
        """Return the logits that the metric reads, at its positions and of its tokens."""
        return self.select_columns(self.select_positions(logits))

    def select_positions(self, logits: Float[Tensor, "row pos column"]) -> Float[Tensor, "row read column"]:
        """Return the logits of the last position alone, unless the metric reads everywhere."""
        return logits if self.everywhere else logits[:, -1:]

    def select_columns(self, logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, "row pos column"]:
        """Return the logits of the metric's tokens alone, where it names some."""
        return logits if self.columns is None else logits[..., self.columns]

    def measure(self, logits: Float[Tensor, "row pos vocab"], example: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """Return the metric of every row from all its logits; `example` is the number of each row's prompt."""
        return self(self.select(logits), example)

    def __call__(self, logits: Tensor, example: Tensor) -> Float[Tensor, "row"]:
        """Return the metric of every row from the logits selected; raise PatchError for another shape than [row]."""
        values: Any = self.of(logits, example)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise PatchError(
                f"the metric {self.name} made {got} of logits of {len(logits)} rows; expected a tensor with one "
                "number per row, [row]"
            )
        return values

    def digest(self) -> str:
        """Return a key that differs from those of other metrics; raise PatchError where there is none."""
        if self.key is not None:
            return key_of(("given", self.name, self.key, self.everywhere, self.columns))
        return key_or_refuse(
            (self.name, self.of, self.everywhere, self.columns),
            f"the metric {self.name}",
            f"give it one that changes with what it measures, Metric({self.name!r}, of, key='...'), where of takes "
            "(logits [row, read, vocab], example [row])",
        )


def as_metric(metric: Any, lens: Lens, n_examples: int) -> Metric:
    """Return a metric from a pair of tokens, a task's examples, or a function of the last logits [row, vocab] to [row].

    A pair is (right, wrong), ids or texts of one token, or labels of a class head: the logit difference. Raise
    PatchError for anything else.
    """
    if metric is None:
        raise PatchError(f"no metric: {KINDS}")
    if isinstance(metric, Metric):
        if metric.n_answers not in (None, n_examples):
            raise PatchError(f"{n_examples} prompts, but the metric has answers for {metric.n_answers}")
        return metric
    owner = getattr(metric, "__self__", None)
    if isinstance(owner, Examples) and getattr(metric, "__name__", "") == "measure":
        metric = owner  # the bound method examples.measure: the metric of these examples
    if isinstance(metric, Examples):
        return metric_of_examples(metric, n_examples, lens)
    if callable(metric) and not isinstance(metric, type):
        fn: Callable[..., Any] = metric
        return Metric(name_of(metric), lambda logits, _: fn(logits[:, -1]))
    pair = metric.tolist() if isinstance(metric, Tensor | np.ndarray) else metric
    if isinstance(pair, list | tuple) and len(pair) == 2:
        right, wrong = (answer_id(lens, one) for one in pair)
        if right == wrong:
            raise PatchError(f"{metric!r:.60}: right and wrong are the same token, so their difference is always 0")
        return logit_difference([((right,), (wrong,))] * n_examples, lens)
    raise PatchError(f"{metric!r:.80}: {KINDS}")


def answer_id(lens: Lens, answer: Any) -> int:
    """Return the index of an answer's logit; raise PatchError for what is no single token and no id of this model."""
    if not isinstance(answer, str) and not is_whole_number(answer):
        raise PatchError(f"{answer!r:.60} is no answer: {KINDS}")
    try:
        return lens.to_answer(answer if isinstance(answer, str) else int(answer))
    except ValueError as e:
        raise PatchError(str(e)) from None


def logit_difference(answers: Sequence[tuple[Sequence[int], Sequence[int]]], lens: Lens) -> Metric:
    """Return the metric: per example the best right logit less the best wrong one, from (right, wrong) token ids."""
    columns = sorted({token for pair in answers for side in pair for token in side})
    # For right and wrong answers a mask [example, column] to add: 0 at the example's tokens, -inf at the others.
    sides = [
        torch.stack([column_mask(columns, side).to(lens.device) for side in which])
        for which in zip(*answers, strict=True)
    ]

    def measure_difference(logits: Tensor, example: Tensor) -> Tensor:
        last = upcast(logits[:, -1])
        right, wrong = ((last + side[example]).amax(-1) for side in sides)
        return right - wrong

    key = repr([tuple(map(tuple, pair)) for pair in answers])
    column_ids = torch.tensor(columns, device=lens.device)
    return Metric("logit difference", measure_difference, columns=column_ids, key=key, n_answers=len(answers))


def column_mask(columns: list[int], side: Sequence[int]) -> Tensor:
    """Return a mask to add: 0 at the columns of a side and -inf elsewhere."""
    return torch.tensor([0.0 if token in side else -torch.inf for token in columns])


def metric_of_examples(examples: Examples, n_examples: int, lens: Lens) -> Metric:
    """Return the task's own metric for every example; raise PatchError for another number of prompts."""
    if len(examples) != n_examples:
        raise PatchError(f"{n_examples} prompts, but the metric is of {len(examples)} examples")
    if examples.task.metric == LOGIT_DIFFERENCE:
        return logit_difference([(e.correct, e.wrong) for e in examples], lens)

    def measure_examples(logits: Tensor, example: Tensor) -> Tensor:
        rows = Examples(examples.task, tuple(examples[i] for i in example.tolist()))
        return rows.measure(logits)

    key = repr([(tuple(e.correct), tuple(e.wrong)) for e in examples])
    return Metric(examples.task.metric, measure_examples, key=key, n_answers=len(examples))
