"""Direct logit attribution: the contribution of each part of the model to a logit, through the real final norm.

The last residual stream is the sum of the contributions to it, and the final norm is a factor per position and a weight
per channel. So a logit is a sum too (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits):

    logit[token] = sum over parts of  part · (W_U[:, token] * ln_final.weight) * ln_final.scale

Only direct effects count: what a later layer computes from a part is a contribution of that layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.components import SPLITS, SUBLAYERS, RunColumns, Split, points_of_split, project_onto
from glmlens.analysis.prompt_batch import (
    Position,
    PromptBatch,
    Token,
    describe_kv_groups,
    layer_labels,
    to_numpy,
    upcast_to_float64,
)
from glmlens.dtypes import upcast
from glmlens.hooks import Hooks
from glmlens.lens import Lens
from glmlens.results import Labelled
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Labelled):
    """The contribution of each part to a logit, or to a difference of two logits.

    `values` are the contributions of the split that was asked for and `rest` [part] all others. `total` is the model's
    own logit and `unexplained` what the sum lacks of it: rounding, or a change that a hook made between parts. Several
    prompts have an axis `prompt` in front of all of these.
    """

    rest: Labelled = field(kw_only=True)
    total: np.ndarray = field(kw_only=True)
    unexplained: np.ndarray = field(kw_only=True)

    @property
    def parts(self) -> Labelled:
        """Return `values` and `rest` along one axis, `part`: the contributions that sum to the total."""
        lead = self.values.shape[: "prompt" in self.axes]  # (n prompts,), or () without that axis
        places = [[f"{axis} {label}" for label in self.labels[axis]] for axis in self.axes[len(lead) :]]
        names = [*map(", ".join, product(*places)), *self.rest.labels["part"]]  # "layer 0, head 1", ...
        values = np.concatenate([self.values.reshape(*lead, -1), self.rest.values], -1)
        return Labelled(values, self.rest.axes, {**self.rest.labels, "part": names}, self.about)

    def keep(self, axis: str, places: Sequence[int]) -> Labelled:  # type: ignore[override]
        """Return some places along an axis as a plain `Labelled`: a subset of parts does not sum to the total."""
        return Labelled(self.values, self.axes, self.labels, self.about).keep(axis, places)

    def mean(self) -> "LogitAttribution":
        """Return the mean over prompts. Raise ValueError where their places differ, as source positions may."""
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
    """Return the contribution of every part to the logit of `answer` (minus that of `wrong`) at an absolute position.

    `by` and the axes of the values: "layer" [layer], "component" [layer, sublayer], "head" [layer, head], "mlp"
    [layer], "neuron" [layer, mlp], "source" [layer, head, key], where key is the position that a head attends to.
    An answer is the text of one token, an id, one for every prompt, or a direction [model] or [batch, model] in the
    normalised residual stream. Examples of a task bring their own answers: the correct answer with the highest logit
    minus the wrong one with the highest, averaged over the examples; `position` may then be the name of a position.

    Units: logits. What the sum of the parts lacks is `unexplained`: in float32 at most 1e-5 of the largest part. In a
    difference, both logits are rounded by themselves, also where the unembeddings of the tokens are almost equal.
    Raises ValueError for an unknown `by`, TypeError without an answer.
    """
    if by not in SPLITS:
        raise ValueError(f"by is {by!r}; choose from {', '.join(map(repr, SPLITS))}")
    split = SPLITS[by]
    examples = prompt if isinstance(prompt, Examples) else None
    rows = PromptBatch.from_prompt(lens, prompt.tokens if isinstance(prompt, Examples) else prompt)
    columns = rows.columns_at(resolve_task_position(position, prompt))
    logits, acts = rows.run_at(columns, points_of_split(lens, split), hooks)
    target = resolve_target(rows, upcast(logits), examples, answer, wrong)
    # The direction in the residual stream before the final norm, which is linear given its scale.
    pull = (
        upcast_to_float64(target.direction)
        * upcast_to_float64(lens.model.ln_final.weight)
        * upcast_to_float64(acts["ln_final.scale"])
    )

    run = RunColumns(lens, acts, rows, columns)
    values = torch.stack([split.compute_parts(run, layer, pull) for layer in range(lens.cfg.n_layers)], 1)
    # All that the split leaves out, so that everything sums to the logit.
    rest = {"embed": project_onto(acts["embed"], pull)}
    for label, name in zip(split.rest_labels(lens), split.rest_points(lens), strict=True):
        rest[label] = project_onto(acts[name], pull)
    if target.bias is not None:
        rest["bias"] = target.bias
    if "key" in split.axes:  # columns of the batch become absolute positions
        values = rearrange(values, "batch layer head key -> batch key layer head")
        values = rearrange(rows.align_to_positions(values), "batch key layer head -> batch layer head key")
    attribution = build_attribution(
        rows,
        columns,
        split,
        direction=target.name,
        values=values,
        rest=rest,
        total=target.measure_total(acts["ln_final.normalized"]),
    )
    return attribution if examples is None else attribution.mean()


def resolve_task_position(position: Position, prompt_or_examples: Prompt | Examples) -> Position:
    """Return an absolute position, or of the examples of a task one for each by its name.

    Raises TypeError for a name without examples.
    """
    if not isinstance(position, str) or (position == "end" and not isinstance(prompt_or_examples, Examples)):
        return position
    if not isinstance(prompt_or_examples, Examples):
        raise TypeError(f"position {position!r}: only examples of a task have positions with names; give a number")
    return prompt_or_examples.at(position)


def build_attribution(
    rows: PromptBatch,
    columns: Tensor,
    split: Split,
    *,
    direction: str,
    values: Tensor,
    rest: dict[str, Tensor],
    total: Tensor,
) -> LogitAttribution:
    """Return contributions as a labelled result, with what their sum lacks of `total`."""
    about = rows.describe(
        metric="logit", direction=direction, parts="direct effects: the final norm's scale is the run's own",
        positions=rows.describe_columns(columns), kv=describe_kv_groups(rows.lens),
    )  # fmt: skip
    known = {"layer": layer_labels(rows.lens), "sublayer": list(SUBLAYERS), "key": rows.position_labels()}
    labels = {axis: known[axis] for axis in split.axes if axis in known}
    labelled = rows.to_labelled(values, " ".join(split.axes), labels, about)
    others = rows.to_labelled(torch.stack([*rest.values()], 1), "part", {"part": [*rest]}, about)
    # Summed in float64, so that what is unexplained holds no rounding of this sum. Padding is nan.
    explained = np.nansum(to_numpy(values).reshape(rows.batch, -1), 1, dtype=np.float64)
    explained_by_rest = sum(to_numpy(part).astype(np.float64) for part in rest.values())
    unexplained = to_numpy(total) - explained - explained_by_rest
    return LogitAttribution(
        labelled.values,
        labelled.axes,
        labelled.labels,
        about,
        rest=others,
        total=rows.drop_single_axis(to_numpy(total)),
        unexplained=rows.drop_single_axis(unexplained),
    )


@dataclass(frozen=True)
class AttributionTarget:
    """The quantity to attribute: a direction [batch, model] in the normalised residual stream, and its name."""

    direction: Float[Tensor, "batch model"]
    name: str
    answer_logits: Float[Tensor, "batch"] | None  # the model's own logits, where the direction is that of tokens
    bias: Float[Tensor, "batch"] | None = None  # of a class head: a constant that no part of the stream contributes

    def measure_total(self, normalized: Float[Tensor, "batch model"]) -> Float[Tensor, "batch"]:
        """Return the model's own number: the logits of the answers, or the stream along the direction."""
        if self.answer_logits is not None:
            return self.answer_logits
        return (upcast(normalized) * self.direction).sum(-1)


def resolve_target(
    rows: PromptBatch,
    logits: Float[Tensor, "batch vocab"],
    examples: Examples | None,
    answer: Token | Sequence[Token] | Tensor | None,
    wrong: Token | Sequence[Token] | Tensor | None,
) -> AttributionTarget:
    """Return the direction of a token, of a difference of tokens, of a task's answers, or the one that was given.

    Raises TypeError without an answer, or for a direction with `wrong`; ValueError for a direction of another width.
    """
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
    answer_logits = logits.gather(1, right[:, None])
    direction = unembedding_vectors(rows.lens, right)
    name = rows.answer_labels(right)
    bias = upcast_to_float64(rows.lens.b_U[right]) if rows.lens.cfg.head_bias else None
    if wrong is not None:
        other = rows.to_answer_ids(wrong)
        answer_logits = answer_logits - logits.gather(1, other[:, None])
        direction = direction - unembedding_vectors(rows.lens, other)
        name = f"{name} - {rows.answer_labels(other)}"
        bias = None if bias is None else bias - rows.lens.b_U[other]
    return AttributionTarget(direction, name, answer_logits.squeeze(1), bias)


def best_answer(ids: Sequence[int], logits: Float[Tensor, "vocab"]) -> int:
    """Return the id with the highest logit."""
    return ids[int(logits[list(ids)].argmax())]


def unembedding_vectors(lens: Lens, ids: Tensor) -> Float[Tensor, "batch model"]:
    """Return the rows of the unembedding for these ids, in at least float32."""
    return upcast(lens.W_U.T[ids])
