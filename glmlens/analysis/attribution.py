"""Direct logit attribution: what each part of the model adds to a logit, with the real final norm.

The last residual stream is the sum of what was added to it, and the final norm is a factor per position and a weight
per channel. So a logit is a sum too (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits):

    logit[token] = sum over parts of  part · (W_U[:, token] * ln_final.weight) * ln_final.scale

It counts direct effects only: what a later layer makes of a part is counted as that layer's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.batch import (
    Position,
    PromptBatch,
    Token,
    describe_kv_groups,
    layer_labels,
    to_numpy,
    upcast,
    upcast_to_float64,
)
from glmlens.analysis.splits import SPLITS, SUBLAYERS, RunColumns, Split, points_of_split, project_onto
from glmlens.hooks import Hooks
from glmlens.lens import Lens
from glmlens.results import Labelled
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Labelled):
    """What each part adds to a logit, or to a difference of two.

    `values` are the parts that were asked for and `rest` [part] all others. Together they are `total`, the model's own
    number, less `unexplained`: rounding, or what a hook has put in between. Several prompts have an axis `prompt` in
    front of all of these.
    """

    rest: Labelled = field(kw_only=True)
    total: np.ndarray = field(kw_only=True)
    unexplained: np.ndarray = field(kw_only=True)

    @property
    def parts(self) -> Labelled:
        """`values` and `rest` along one axis, `part`: what sums to the total."""
        lead = self.values.shape[: "prompt" in self.axes]
        places = [[f"{axis} {label}" for label in self.labels[axis]] for axis in self.axes[len(lead) :]]
        names = [*map(", ".join, product(*places)), *self.rest.labels["part"]]
        values = np.concatenate([self.values.reshape(*lead, -1), self.rest.values], -1)
        return Labelled(values, self.rest.axes, {**self.rest.labels, "part": names}, self.about)

    def keep(self, axis: str, places: Sequence[int]) -> Labelled:  # type: ignore[override]
        """Some places along an axis as plain labelled numbers: without the others, nothing sums to the total."""
        return Labelled(self.values, self.axes, self.labels, self.about).keep(axis, places)

    def mean(self) -> "LogitAttribution":
        """The mean over prompts; ValueError where they have not all the same places, as source positions may be."""
        if "prompt" not in self.axes:
            return self
        if np.isnan(self.values).any():
            raise ValueError("prompts of several lengths have no mean by position: take examples.of_length()")
        about = {**self.about, "prompt": f"mean of {len(self.labels['prompt'])}: {self.about['prompt']}"}
        labels = {axis: self.labels[axis] for axis in self.axes[1:]}
        rest = Labelled(self.rest.values.mean(0), ("part",), {"part": self.rest.labels["part"]}, about)
        return LogitAttribution(
            self.values.mean(0),
            self.axes[1:],
            labels,
            about,
            rest=rest,
            total=np.asarray(self.total.mean(0)),
            unexplained=np.asarray(self.unexplained.mean(0)),
        )


def logit_attribution(
    lens: Lens,
    prompt: Prompt | Examples,
    answer: Token | Sequence[Token] | Tensor | None = None,
    wrong: Token | Sequence[Token] | Tensor | None = None,
    *,
    by: str = "component",
    position: Position = -1,
    hooks: Hooks | None = None,
) -> LogitAttribution:
    """What every part adds to the logit of `answer` (less that of `wrong`) after an absolute position.

    `by` and the axes of the values: "layer" [layer], "component" [layer, sublayer], "head" [layer, head], "mlp"
    [layer], "neuron" [layer, mlp], "source" [layer, head, key], where key is the position that a head took it from.
    An answer is the text of one token, an id, one for every prompt, or a direction [model] or [batch, model] that the
    normalised stream is read along. Examples of a task have their own: the best right answer less the best wrong one,
    averaged over the examples; and `position` may be the name of one of theirs.

    In units of logits. What the parts miss is `unexplained`: in float32 at most 1e-5 of the largest part, but the two
    logits of a difference are rounded as they are, also where their tokens' unembeddings almost coincide. Raises
    ValueError for an unknown `by`.
    """
    if by not in SPLITS:
        raise ValueError(f"by is {by!r}; choose from {', '.join(map(repr, SPLITS))}")
    split, rows = SPLITS[by], PromptBatch.from_prompt(lens, prompt.tokens if isinstance(prompt, Examples) else prompt)
    columns = rows.columns_at(resolve_task_position(position, prompt))
    logits, acts = rows.run_at(columns, points_of_split(lens, split), hooks)
    goal = resolve_target(rows, upcast(logits), prompt if isinstance(prompt, Examples) else None, answer, wrong)
    pull = (
        upcast_to_float64(goal.direction)
        * upcast_to_float64(lens.model.ln_final.weight)
        * upcast_to_float64(acts["ln_final.scale"])
    )

    at = RunColumns(lens, acts, rows, columns)
    values = torch.stack([split.compute_parts(at, layer, pull) for layer in range(lens.cfg.n_layers)], 1)
    rest = {"embed": project_onto(acts["embed"], pull)}
    rest |= zip(
        split.rest_labels(lens), (project_onto(acts[name], pull) for name in split.rest_points(lens)), strict=True
    )
    if goal.bias is not None:
        rest["bias"] = goal.bias
    if "key" in split.axes:
        values = rearrange(values, "batch layer head key -> batch key layer head")
        values = rearrange(rows.align_to_positions(values), "batch key layer head -> batch layer head key")
    total = goal.measure_total(acts["ln_final.normalized"])
    return build_attribution(rows, columns, split, goal.name, values, rest, total, isinstance(prompt, Examples))


def resolve_task_position(position: Position, prompt_or_examples: Prompt | Examples) -> Position:
    """An absolute position; examples of a task know theirs by name."""
    if not isinstance(position, str) or (position == "end" and not isinstance(prompt_or_examples, Examples)):
        return position
    if not isinstance(prompt_or_examples, Examples):
        raise TypeError(f"position {position!r}: only examples of a task have positions with names; give a number")
    return prompt_or_examples.at(position)


def build_attribution(
    rows: PromptBatch,
    columns: Tensor,
    split: Split,
    name: str,
    values: Tensor,
    rest: dict[str, Tensor],
    total: Tensor,
    average: bool,
) -> LogitAttribution:
    about = rows.describe(
        metric="logit", direction=name, parts="direct effects: the final norm's scale is the run's own",
        positions=rows.describe_columns(columns), kv=describe_kv_groups(rows.lens),
    )  # fmt: skip
    named = {"layer": layer_labels(rows.lens), "sublayer": list(SUBLAYERS), "key": rows.position_labels()}
    labelled = rows.to_labelled(values, " ".join(split.axes), {a: named[a] for a in split.axes if a in named}, about)
    others = rows.to_labelled(torch.stack([*rest.values()], 1), "part", {"part": [*rest]}, about)
    explained = to_numpy(values).reshape(rows.batch, -1)
    missing = (
        to_numpy(total)
        - np.nansum(explained, 1, dtype=np.float64)
        - sum(to_numpy(part).astype(np.float64) for part in rest.values())
    )
    found = LogitAttribution(
        labelled.values,
        labelled.axes,
        labelled.labels,
        about,
        rest=others,
        total=rows.drop_single_axis(to_numpy(total)),
        unexplained=rows.drop_single_axis(missing),
    )
    return found.mean() if average else found


@dataclass(frozen=True)
class AttributionTarget:
    """What is attributed: a direction [batch, model] that the normalised stream is read along, and its name."""

    direction: Float[Tensor, "batch model"]
    name: str
    answer_logits: Float[Tensor, "batch"] | None  # the model's own number, where the direction is one of tokens
    bias: Float[Tensor, "batch"] | None = None  # of a class head, which no part of the stream explains

    def measure_total(self, normalized: Float[Tensor, "batch model"]) -> Float[Tensor, "batch"]:
        return (upcast(normalized) * self.direction).sum(-1) if self.answer_logits is None else self.answer_logits


def resolve_target(
    rows: PromptBatch,
    logits: Float[Tensor, "batch vocab"],
    examples: Examples | None,
    answer: Token | Sequence[Token] | Tensor | None,
    wrong: Token | Sequence[Token] | Tensor | None,
) -> AttributionTarget:
    """The direction of a token, of a difference of tokens, of a task's answers, or the one that was given."""
    if examples is not None and answer is None and wrong is None:
        answer = [best_answer(example.correct, row) for example, row in zip(examples, logits, strict=True)]
        wrong = [best_answer(example.wrong, row) for example, row in zip(examples, logits, strict=True)]
    if answer is None:
        raise TypeError("no answer: give the text of one token, an id, a direction [model], or examples of a task")
    if isinstance(answer, Tensor) and answer.is_floating_point():
        if wrong is not None:
            raise TypeError("a direction is already what is attributed: give it alone, without wrong=")
        if answer.shape[-1:] != (rows.lens.cfg.d_model,):
            raise ValueError(
                f"a direction is [{rows.lens.cfg.d_model}], the width of the stream; got {[*answer.shape]}"
            )
        given = upcast(answer.to(rows.tokens.device)).expand(rows.batch, rows.lens.cfg.d_model)
        return AttributionTarget(given, "the direction given, of the normalised stream", None)
    right = rows.to_answer_ids(answer)
    of, direction, name = (
        logits.gather(1, right[:, None]),
        unembedding_vectors(rows.lens, right),
        rows.answer_labels(right),
    )
    bias = upcast_to_float64(rows.lens.b_U[right]) if rows.lens.cfg.head_bias else None
    if wrong is not None:
        other = rows.to_answer_ids(wrong)
        of, direction = of - logits.gather(1, other[:, None]), direction - unembedding_vectors(rows.lens, other)
        name = f"{name} - {rows.answer_labels(other)}"
        bias = None if bias is None else bias - rows.lens.b_U[other]
    return AttributionTarget(direction, name, of.squeeze(1), bias)


def best_answer(ids: Sequence[int], logits: Float[Tensor, "vocab"]) -> int:
    return ids[int(logits[list(ids)].argmax())]


def unembedding_vectors(lens: Lens, ids: Tensor) -> Float[Tensor, "batch model"]:
    return upcast(lens.W_U.T[ids])
