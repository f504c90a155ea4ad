"""A generation, under way and done."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from glmlens.generate import Step
from glmlens.kv_cache import KVCache
from glmlens.record import Activations, Recorder
from glmlens.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Run:
    """A generation: `tokens` [batch, prompt + new], the new `text`, what was recorded, the cache, and why it stopped.

    `acts` and `kv` cover every token that was run: all but the last. `stopped` is "max_new_tokens", "stop_ids",
    "interrupted" or "failed".
    """

    tokens: Int[Tensor, "batch pos"]
    text: str | list[str] | None
    acts: Activations = field(repr=False)
    kv: KVCache = field(repr=False)
    prompt_length: int
    stopped: str

    @property
    def new_tokens(self) -> Int[Tensor, "batch new"]:
        return self.tokens[:, self.prompt_length :]


@dataclass
class Going:
    """A generation under way: iterate over it for its steps, and at any time ask for the `run` so far."""

    steps: Iterator[Step]
    recorder: Recorder
    kv: KVCache
    tokens: Int[Tensor, "batch pos"]
    prompt_length: int
    stop_ids: tuple[int, ...]
    tokenizer: Tokenizer | None

    def __iter__(self) -> Iterator[Step]:
        """Every step, once it is whole; at the end, HookError for an edit that never came to hold."""
        for step in self.steps:
            self.recorder.commit()
            self.tokens = torch.cat([self.tokens, step.tokens[:, None]], 1)
            yield step
        self.recorder.plan.finish(self.recorder.current)

    def texts(self) -> list[str]:
        """What every row has said so far, without its stop token."""
        if self.tokenizer is None:
            return []
        new = self.tokens[:, self.prompt_length :].tolist()
        ends = [next((i for i, token in enumerate(row) if token in self.stop_ids), len(row)) for row in new]
        return [self.tokenizer.decode(row[:end], special=False) for row, end in zip(new, ends, strict=True)]

    def run(self, names: list[str], stopped: str | None = None) -> Run:
        """What there is, with its recording in the order of `names`."""
        texts, acts = self.texts(), self.recorder.activations(names)
        stop = torch.tensor(self.stop_ids, device=self.tokens.device)
        said_stop = torch.isin(self.tokens[:, self.prompt_length :], stop).any(1)
        stopped = stopped or ("stop_ids" if bool(said_stop.all()) else "max_new_tokens")
        text = texts[0] if len(texts) == 1 else texts or None
        return Run(self.tokens, text, acts, self.kv, self.prompt_length, stopped)
