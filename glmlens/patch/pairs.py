"""Pairs of prompts of the same length: the one that is changed, the one that values come from, and the metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from glmlens.lens import Lens
from glmlens.patch.interventions import PositionNames, read_position_names
from glmlens.patch.metrics import Metric, as_metric
from glmlens.patch.replacement_values import TokenIds, to_token_ids
from glmlens.patch.sites import PatchError
from glmlens.tasks.task import Examples


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptPairs:
    """Prompts as token ids, for each a source of the same length, a metric, and positions by name.

    `prompts` are changed; `sources` are the runs whose values are put in, or None where no change needs them.
    `position_names` are the named positions of every prompt, "end" among them; a pair shares them, since a pair has
    one length.
    """

    lens: Lens
    prompts: tuple[TokenIds, ...]
    sources: tuple[TokenIds, ...] | None
    metric: Metric
    position_names: tuple[dict[str, int], ...]

    @staticmethod
    def build(
        lens: Lens,
        prompts: Any,
        sources: Any,
        metric: Any,
        *,
        position_names: Sequence[PositionNames] | PositionNames | Any = (),
        nouns: tuple[str, str] = ("clean", "corrupt prompts"),
    ) -> "PromptPairs":
        """Tokenise prompts and sources and read the metric and the named positions.

        With a task's Examples as `prompts`, the metric is theirs, positions have their names and `sources` may name a
        counterfactual. `position_names` are one mapping for every prompt, or one for all. `nouns` are the words for
        both sides in messages. Raise PatchError for unequal counts and for a pair of unequal lengths.
        """
        if isinstance(prompts, Examples):
            position_names = position_names or [{**example.positions} for example in prompts]
            metric = prompts if metric is None else metric
            sources = prompts.counterfactual(sources) if isinstance(sources, str) else sources
            prompts = prompts.tokens
        rows = to_token_ids(lens, prompts)
        other_rows = None if sources is None else to_token_ids(lens, sources)
        if other_rows is not None and len(rows) != len(other_rows):
            raise PatchError(
                f"{len(rows)} {nouns[0]} and {len(other_rows)} {nouns[1]}: give one for every prompt, they are paired"
            )
        for row, other_row in zip(rows, other_rows or rows, strict=True):
            if len(row) != len(other_row):
                raise PatchError(describe_length_mismatch(lens, row, other_row))
        return PromptPairs(
            lens=lens,
            prompts=rows,
            sources=other_rows,
            metric=as_metric(metric, lens, len(rows)),
            position_names=read_names_of_prompts(position_names, rows),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def orient(self, direction: str) -> "PromptPairs":
        """Return clean and corrupt pairs as what is changed and its source: "denoise" changes the corrupt run."""
        if direction == "noise":
            return self
        assert self.sources is not None
        return replace(self, prompts=self.sources, sources=self.prompts)

    def pair_with_themselves(self) -> "PromptPairs":
        """Return these pairs with every prompt as its own source, where there are no sources."""
        return self if self.sources is not None else replace(self, sources=self.prompts)

    def reorder_sources(self, order: Sequence[int]) -> "PromptPairs":
        """Return pairs of the same prompts with the sources in another order."""
        assert self.sources is not None
        return replace(self, sources=tuple(self.sources[i] for i in order))

    def group_by_length(self) -> dict[int, list[int]]:
        """Return the indices of the prompts of each length, the shortest first."""
        groups: dict[int, list[int]] = {length: [] for length in sorted(set(map(len, self.prompts)))}
        for i, prompt in enumerate(self.prompts):
            groups[len(prompt)].append(i)
        return groups

    def require_one_length(self) -> "TokenPairs":
        """Return clean and corrupt prompts as two tensors; raise PatchError without sources or for several lengths."""
        if self.sources is None:
            raise PatchError("no corrupt prompts: give one for every clean one")
        lengths = list(self.group_by_length())
        if len(lengths) > 1:
            raise PatchError(f"prompts of {lengths} tokens: take one length, as examples.of_length() does")
        clean = torch.tensor(self.prompts, device=self.lens.device)
        corrupt = torch.tensor(self.sources, device=self.lens.device)
        return TokenPairs(clean=clean, corrupt=corrupt, metric=self.metric)


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenPairs:
    """Clean and corrupt prompts of one length as tensors of token ids, and the metric."""

    clean: Int[Tensor, "example pos"]
    corrupt: Int[Tensor, "example pos"]
    metric: Metric

    def __len__(self) -> int:
        return len(self.clean)


def read_names_of_prompts(position_names: Any, rows: Sequence[TokenIds]) -> tuple[dict[str, int], ...]:
    """Return the named positions of every prompt, from one mapping for all or one for each; PatchError otherwise."""
    listed = [position_names] * len(rows) if isinstance(position_names, Mapping) else list(position_names)
    if listed and len(listed) != len(rows):
        raise PatchError(f"{len(rows)} prompts and {len(listed)} names of positions: give one mapping for every prompt")
    pairs = zip(listed or [{}] * len(rows), rows, strict=True)
    return tuple(read_position_names(names, len(row)) for names, row in pairs)


def describe_length_mismatch(lens: Lens, first_ids: TokenIds, second_ids: TokenIds) -> str:
    """Return a message for two prompts of different length, with both tokenisations one below the other."""
    rows = [lens.to_labels(torch.tensor([row], device=lens.device)) for row in (first_ids, second_ids)]
    longest = max(map(len, rows))
    padded = [row + [""] * (longest - len(row)) for row in rows]
    # columns as wide as the wider of the two tokens, so that tokens of one position stand below each other
    widths = [max(map(len, pair)) for pair in zip(*padded, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in padded]
    differ = next((i for i, (a, b) in enumerate(zip(*padded, strict=True)) if a != b), 0)
    return (
        f"the two prompts have {len(first_ids)} and {len(second_ids)} tokens, and differ from token {differ} on; a "
        f"value is put at its own position, so they must be as long:\n  {lines[0]}\n  {lines[1]}"
    )
