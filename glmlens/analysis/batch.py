"""Prompts as the rows of one batch: run once, read at absolute positions, labelled for people."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from glmlens.hook_points import Point
from glmlens.hooks import Hooks, list_edits
from glmlens.integers import Integer, Integers, as_python, read_integer, read_integers, split_values
from glmlens.lens import Lens
from glmlens.model import absolute_positions
from glmlens.recording.activations import Activations
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt

Position = Integer | str | Iterable[Integer]
"""An absolute position with the prefix counted, negative from a prompt's end, or "end"; or one for every prompt."""
Token = str | Integer
"""The text of one token, or its id; for a class head a label, or its number."""


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Token ids [batch, pos], left-padded, and their mask [batch, pos]: None where nothing is padding."""

    lens: Lens
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None

    @staticmethod
    def from_prompt(lens: Lens, prompt: Prompt) -> "PromptBatch":
        tokens, mask = lens.to_batch(prompt)
        if mask is not None and tokens.shape[0] == 1:  # of a single prompt nothing need be padding
            tokens = tokens[:, mask[0].bool()]
            mask = torch.ones_like(tokens)
        return PromptBatch(lens, tokens, None if mask is None else mask.long())

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Absolute positions, -1 at padding."""
        return absolute_positions(self.tokens.shape, self.tokens.device, attention_mask=self.mask)

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """How many real tokens each row has."""
        return (self.positions >= 0).sum(1)

    def columns_at(self, position: Position) -> Int[Tensor, "batch"]:
        """The column of an absolute position in every row; IndexError where a prompt is too short for it."""
        numbers = (-1,) if isinstance(position, str) and position == "end" else read_position(position)
        if len(numbers) not in (1, self.batch):
            raise ValueError(f"{len(numbers)} positions for {self.batch} prompts: give one for all, or one for each")
        asked = torch.tensor(numbers, device=self.tokens.device).expand(self.batch)
        lengths = self.lengths
        outside = (asked >= lengths) | (asked < -lengths)
        if bool(outside.any()):
            row = int(outside.int().argmax())
            raise IndexError(f"position {int(asked[row])} asked for; prompt {row} has {int(lengths[row])} tokens")
        return torch.where(asked < 0, asked, asked - lengths) + self.tokens.shape[1]

    def columns_of_single(self, positions: Integers) -> Int[Tensor, "some"]:
        """The columns of some absolute positions of a single prompt, negative from its end; None means all."""
        if positions is None:
            return torch.arange(self.tokens.shape[1], device=self.tokens.device)[self.positions[0] >= 0]
        length = int(self.lengths[0])
        asked = read_integers(positions, "position", size=length, negative=True, outside=IndexError)
        found = torch.tensor(asked, device=self.tokens.device)
        return torch.where(found < 0, found, found - length) + self.tokens.shape[1]

    def run(self, names: str | Sequence[str], hooks: Hooks | None = None) -> tuple[Tensor, Activations]:
        """The logits of these rows, and what was at the named points after all hooks."""
        logits, acts = self.lens.run_with_cache(self.tokens, names, hooks, attention_mask=self.mask)
        return cast(Tensor, logits), acts

    def record(
        self, names: str | Sequence[str], hooks: Hooks | None = None, position_ids: Tensor | None = None
    ) -> Activations:
        """What is at the named points, in a run that ends after the last of them."""
        _, acts = self.lens.run_with_cache(
            self.tokens, names, hooks, logits=False, attention_mask=self.mask, position_ids=position_ids
        )
        return acts

    def run_at(
        self, columns: Int[Tensor, "batch"], names: Sequence[str], hooks: Hooks | None = None
    ) -> tuple[Shaped[Tensor, "batch vocab"], Activations]:
        """The logits at one column of every row, and the named points there: without their pos or query axis.

        A point with a `key` axis and no `query` is kept whole. What is not asked about is not kept.
        """
        wanted, picked = torch.unique(columns), ColumnRecorder(columns)
        edits = [*list_edits(hooks), *((name, picked) for name in names)]
        logits = self.lens.run_with_hooks(self.tokens, edits, attention_mask=self.mask, logits_to_keep=wanted)
        rows = torch.arange(self.batch, device=logits.device)
        return logits[rows, torch.searchsorted(wanted, columns)], Activations(picked.values)

    def align_to_positions(
        self, x: Shaped[Tensor, "batch pos *rest"], nothing: float | int = np.nan
    ) -> Shaped[Tensor, "batch pos *rest"]:
        """x with absolute position p at index p in every row, and `nothing` past a row's end."""
        if self.mask is None:
            return x
        out = torch.full_like(x, nothing)
        for row, length in enumerate(self.lengths.tolist()):
            out[row, :length] = x[row, x.shape[1] - length :]
        return out

    def to_answer_ids(self, answers: Token | Iterable[Token]) -> Int[Tensor, "batch"]:
        """One logit for every row, from an answer for all of them or one for each; ValueError for another number."""
        value = as_python(answers)
        listed = split_values(value, named=True) or [value]
        listed = listed if isinstance(value, Iterable) and not isinstance(value, str) else listed * self.batch
        if len(listed) != self.batch:
            raise ValueError(f"{len(listed)} answers for {self.batch} prompts: give one for all, or one for each")
        return torch.tensor([self.lens.to_answer(answer) for answer in listed]).to(self.tokens.device)

    def answer_labels(self, ids: Tensor) -> str:
        """The answers of these logits, one for every row, as people can read them."""
        return ", ".join(dict.fromkeys(self.lens.answer_label(i) for i in ids.tolist()))

    def position_labels(self) -> list[str]:
        """A label for every absolute position: its number, and its token where there is one prompt."""
        if self.batch > 1:
            return [str(i) for i in range(self.tokens.shape[1])]
        return [f"{i} {token_label(self.lens, token)}" for i, token in enumerate(self.tokens[0].tolist())]

    def describe_columns(self, columns: Tensor) -> str:
        """The absolute positions at these columns, for people."""
        found = self.positions[torch.arange(self.batch, device=columns.device), columns].tolist()
        return ", ".join(str(i) for i in dict.fromkeys(found))

    def describe(self, **fields: str) -> dict[str, str]:
        """What a result says of itself: `said`, the prompt, and the model."""
        if self.batch > 1:
            prompt = f"{self.batch} prompts"
        else:
            prompt = " ".join(token_label(self.lens, token) for token in self.tokens[0].tolist())
        return {**fields, "prompt": prompt, "model": self.lens.model_hash}

    def to_labelled(
        self,
        x: Shaped[Tensor, "batch *rest"],
        axes: str,
        labels: Mapping[str, Sequence[str]],
        about: Mapping[str, str],
    ) -> Labelled:
        """x as numbers with these axes after `prompt`, an axis that a single prompt does not have."""
        names = tuple(axes.split())
        return Labelled(
            self.drop_single_axis(to_numpy(x)), names if self.batch == 1 else ("prompt", *names), labels, about
        )

    def drop_single_axis(self, values: np.ndarray) -> np.ndarray:
        """`values` [prompt, ...], of a single prompt without that axis."""
        return np.squeeze(values, 0) if self.batch == 1 else values


class ColumnRecorder:
    """An edit that changes nothing, and keeps what it sees at one column of every row."""

    def __init__(self, columns: Int[Tensor, "batch"]):
        self.columns, self.values = columns, dict[str, Tensor]()

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device)
        if "query" in point.axes:
            self.values[point.name] = x[rows, :, self.columns]
        else:
            self.values[point.name] = x[rows, self.columns] if "pos" in point.axes else x
        return x


def read_position(position: Position) -> tuple[int, ...]:
    """An absolute position for all prompts, or one for each; ValueError for what is no whole number."""
    return read_integers(position, "position", negative=True)


def read_layer(lens: Lens, layer: Any) -> int:
    """The number of a layer of this model; IndexError for one that is not there."""
    return read_integer(layer, "layer", size=lens.cfg.n_layers, outside=IndexError)


def read_head(lens: Lens, head: Any) -> int:
    """The number of a query head of this model; IndexError for one that is not there."""
    head = read_integer(head, "head")
    if not 0 <= head < lens.cfg.n_heads:
        raise IndexError(f"head {head} asked for; there are 0 to {lens.cfg.n_heads - 1}")
    return head


def read_layer_and_head(lens: Lens, layer: Any, head: Any) -> tuple[int, int]:
    """The numbers of a layer and of one of its query heads; IndexError for what is not there."""
    layer, head = read_integer(layer, "layer"), read_integer(head, "head")
    layers, heads = lens.cfg.n_layers, lens.cfg.n_heads
    if not (0 <= layer < layers and 0 <= head < heads):
        raise IndexError(f"layer {layer}, head {head}; there are {layers} layers of {heads} heads")
    return layer, head


def token_label(lens: Lens, token: int) -> str:
    return lens.tokenizer.label(token) if lens.tokenizer else f"⟨{token}⟩"


def upcast(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def upcast_to_float64(x: Tensor) -> Tensor:
    """x in float64, where its device has that."""
    return upcast(x) if x.device.type == "mps" else x.double()


def to_numpy(x: Tensor) -> np.ndarray:
    """x as a numpy array, in at least float32."""
    return upcast(x.detach()).cpu().numpy()


def layer_labels(lens: Lens) -> list[str]:
    return [str(i) for i in range(lens.cfg.n_layers)]


def describe_kv_groups(lens: Lens) -> str:
    """Which query heads read which key-value head, for people."""
    group = lens.cfg.n_groups
    return "; ".join(f"kv {kv}: heads {kv * group}-{(kv + 1) * group - 1}" for kv in range(lens.cfg.n_kv_heads))
