"""Run prompts as one batch, read it at absolute positions, and label the results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from glmlens.cache.selection import token_label as token_label
from glmlens.dtypes import upcast as upcast
from glmlens.hook_points import Point
from glmlens.hooks import Hooks, list_edits
from glmlens.integers import Integer, Integers, as_python, read_integer, read_integers, split_values
from glmlens.lens import Lens
from glmlens.model import absolute_positions
from glmlens.recording.activations import Activations
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt

Position = Integer | str | Iterable[Integer]
"""An absolute position that counts the prefix, negative from a prompt's end, or "end"; or one for every prompt."""
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
        """Return the tokens of one or several prompts as a batch."""
        tokens, mask = lens.to_batch(prompt)
        if mask is not None and tokens.shape[0] == 1:  # a single prompt needs no padding
            tokens = tokens[:, mask[0].bool()]
            mask = torch.ones_like(tokens)
        return PromptBatch(lens, tokens, None if mask is None else mask.long())

    @property
    def batch(self) -> int:
        """Return the number of prompts."""
        return self.tokens.shape[0]

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Return absolute positions, -1 at padding."""
        return absolute_positions(self.tokens.shape, self.tokens.device, attention_mask=self.mask)

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Return the number of tokens of each row, without padding."""
        return (self.positions >= 0).sum(1)

    def require_single(self) -> "PromptBatch":
        """Return this batch. Raise ValueError if it holds several prompts."""
        if self.batch != 1:
            raise ValueError(f"one prompt at a time here, not {self.batch}")
        return self

    def columns_at(self, position: Position) -> Int[Tensor, "batch"]:
        """Return the column of an absolute position in every row.

        Raises IndexError where a prompt has no such position, ValueError for another number of positions than prompts.
        """
        numbers = (-1,) if isinstance(position, str) and position == "end" else read_position(position)
        if len(numbers) not in (1, self.batch):
            raise ValueError(f"{len(numbers)} positions for {self.batch} prompts: give one for all, or one for each")
        wanted = torch.tensor(numbers, device=self.tokens.device).expand(self.batch)
        lengths = self.lengths
        outside = (wanted >= lengths) | (wanted < -lengths)
        if bool(outside.any()):
            row = int(outside.int().argmax())
            raise IndexError(f"position {int(wanted[row])} asked for; prompt {row} has {int(lengths[row])} tokens")
        # Prompts are padded on the left, so columns count from the end of the batch.
        return torch.where(wanted < 0, wanted, wanted - lengths) + self.tokens.shape[1]

    def columns_of_single(self, positions: Integers) -> Int[Tensor, "some"]:
        """Return the columns of some absolute positions of a single prompt, negative from its end; None means all.

        Raises IndexError for a position that the prompt does not have.
        """
        if positions is None:
            return torch.arange(self.tokens.shape[1], device=self.tokens.device)[self.positions[0] >= 0]
        length = int(self.lengths[0])
        numbers = read_integers(positions, "position", size=length, negative=True, outside=IndexError)
        wanted = torch.tensor(numbers, device=self.tokens.device)
        return torch.where(wanted < 0, wanted, wanted - length) + self.tokens.shape[1]

    def run(self, names: str | Sequence[str], hooks: Hooks | None = None) -> tuple[Tensor, Activations]:
        """Run the prompts. Return their logits, and the activations at the named points after all hooks."""
        logits, acts = self.lens.run_with_cache(self.tokens, names, hooks, attention_mask=self.mask)
        return cast(Tensor, logits), acts

    def record(
        self, names: str | Sequence[str], hooks: Hooks | None = None, position_ids: Tensor | None = None
    ) -> Activations:
        """Return the activations at the named points, from a run that stops after the last of them."""
        _, acts = self.lens.run_with_cache(
            self.tokens, names, hooks, logits=False, attention_mask=self.mask, position_ids=position_ids
        )
        return acts

    def run_at(
        self, columns: Int[Tensor, "batch"], names: Sequence[str], hooks: Hooks | None = None
    ) -> tuple[Shaped[Tensor, "batch vocab"], Activations]:
        """Run the prompts. Return logits and activations at one column of every row, without their pos or query axis.

        A point with a `key` axis and no `query` is recorded at all keys. Other columns are not held in memory.
        """
        kept_columns = torch.unique(columns)
        recorder = ColumnRecorder(columns)
        edits = [*list_edits(hooks), *((name, recorder) for name in names)]  # record after all other hooks
        logits = self.lens.run_with_hooks(self.tokens, edits, attention_mask=self.mask, logits_to_keep=kept_columns)
        rows = torch.arange(self.batch, device=logits.device)
        return logits[rows, torch.searchsorted(kept_columns, columns)], Activations(recorder.values)

    def align_to_positions(
        self, x: Shaped[Tensor, "batch pos *rest"], nothing: float | int = np.nan
    ) -> Shaped[Tensor, "batch pos *rest"]:
        """Return x with absolute position p at index p in every row, and `nothing` past a row's end."""
        if self.mask is None:
            return x
        aligned = torch.full_like(x, nothing)
        for row, length in enumerate(self.lengths.tolist()):
            aligned[row, :length] = x[row, x.shape[1] - length :]  # from left-padded to right-padded
        return aligned

    def to_answer_ids(self, answers: Token | Iterable[Token]) -> Int[Tensor, "batch"]:
        """Return the id of an answer for every row, from one for all of them or one for each.

        Raises ValueError for another number of answers than prompts.
        """
        value = as_python(answers)
        listed = split_values(value, named=True) or [value]
        is_single = isinstance(value, str) or not isinstance(value, Iterable)
        if is_single:
            listed = listed * self.batch
        if len(listed) != self.batch:
            raise ValueError(f"{len(listed)} answers for {self.batch} prompts: give one for all, or one for each")
        return torch.tensor([self.lens.to_answer(answer) for answer in listed]).to(self.tokens.device)

    def answer_labels(self, ids: Tensor) -> str:
        """Return the labels of answer ids as one text, each label once."""
        return ", ".join(dict.fromkeys(self.lens.answer_label(i) for i in ids.tolist()))

    def position_labels(self) -> list[str]:
        """Return a label for every absolute position: its number and, of a single prompt, its token."""
        if self.batch > 1:
            return [str(i) for i in range(self.tokens.shape[1])]
        return [f"{i} {token_label(self.lens, token)}" for i, token in enumerate(self.tokens[0].tolist())]

    def describe_columns(self, columns: Tensor) -> str:
        """Return the absolute positions at these columns as one text, each position once."""
        positions = self.positions[torch.arange(self.batch, device=columns.device), columns].tolist()
        return ", ".join(str(i) for i in dict.fromkeys(positions))

    def describe(self, **fields: str) -> dict[str, str]:
        """Return the `about` of a result: these fields, the prompt, and the hash of the model."""
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
        """Return x as a labelled result with these axes, after an axis `prompt` when there are several."""
        names = tuple(axes.split())
        with_prompt = names if self.batch == 1 else ("prompt", *names)
        return Labelled(self.drop_single_axis(to_numpy(x)), with_prompt, labels, about)

    def drop_single_axis(self, values: np.ndarray) -> np.ndarray:
        """Return `values` [prompt, ...], without the first axis if there is one prompt."""
        return np.squeeze(values, 0) if self.batch == 1 else values


class ColumnRecorder:
    """An edit that changes nothing and records each point at one column of every row."""

    def __init__(self, columns: Int[Tensor, "batch"]):
        self.columns = columns
        self.values: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device)
        if "query" in point.axes:
            self.values[point.name] = x[rows, :, self.columns]
        else:
            self.values[point.name] = x[rows, self.columns] if "pos" in point.axes else x
        return x


def read_position(position: Position) -> tuple[int, ...]:
    """Return an absolute position for all prompts, or one for each. Raise ValueError for anything but whole numbers."""
    return read_integers(position, "position", negative=True)


def read_layer(lens: Lens, layer: Any) -> int:
    """Return the number of a layer. Raise IndexError for one that the model does not have."""
    return read_integer(layer, "layer", size=lens.cfg.n_layers, outside=IndexError)


def read_head(lens: Lens, head: Any) -> int:
    """Return the number of a query head. Raise IndexError for one that the model does not have."""
    head = read_integer(head, "head")
    if not 0 <= head < lens.cfg.n_heads:
        raise IndexError(f"head {head} asked for; there are 0 to {lens.cfg.n_heads - 1}")
    return head


def read_layer_and_head(lens: Lens, layer: Any, head: Any) -> tuple[int, int]:
    """Return the numbers of a layer and a query head. Raise IndexError for one that the model does not have."""
    layer, head = read_integer(layer, "layer"), read_integer(head, "head")
    n_layers, n_heads = lens.cfg.n_layers, lens.cfg.n_heads
    if not (0 <= layer < n_layers and 0 <= head < n_heads):
        raise IndexError(f"layer {layer}, head {head}; there are {n_layers} layers of {n_heads} heads")
    return layer, head


def upcast_to_float64(x: Tensor) -> Tensor:
    """Return x in float64, or in at least float32 on a device without float64 (mps)."""
    return upcast(x) if x.device.type == "mps" else x.double()


def to_numpy(x: Tensor) -> np.ndarray:
    """Return x as a numpy array, in at least float32."""
    return upcast(x.detach()).cpu().numpy()


def layer_labels(lens: Lens) -> list[str]:
    """Return the labels of the layers: "0", "1", ..."""
    return [str(i) for i in range(lens.cfg.n_layers)]


def describe_kv_groups(lens: Lens) -> str:
    """Return which query heads share which key-value head, as text."""
    group = lens.cfg.n_groups
    return "; ".join(f"kv {kv}: heads {kv * group}-{(kv + 1) * group - 1}" for kv in range(lens.cfg.n_kv_heads))
