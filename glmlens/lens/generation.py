"""A generation, under way and done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from glmlens.kv_cache import KVCache
from glmlens.lens.sampling import GenerationStep
from glmlens.recording.activations import Activations, RunInfo
from glmlens.recording.recorder import GenerationRecorder
from glmlens.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """A generation: `tokens` [batch, prompt + new], the new `text`, what was recorded, the cache, and why it stopped.

    `acts` and `kv` cover every token that was run: all but the last. `stopped` is "max_new_tokens", "stop",
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

    def __reduce__(self) -> Any:
        """Pickle the values alone, of the cache its entries: no model; see `Activations.__reduce__`."""
        return restore_run, ({**vars(self), "kv": self.kv.fork()},)


def restore_run(state: dict[str, Any]) -> GenerationResult:
    """The generation that was pickled."""
    return GenerationResult(**state)


torch.serialization.add_safe_globals([restore_run, KVCache])


@dataclass
class ActiveGeneration:
    """A generation under way: iterate over it for its steps, and at any time ask for the `run` so far."""

    steps: Iterator[GenerationStep]
    recorder: GenerationRecorder
    kv: KVCache
    cached_length: int  # entries in the cache before it
    tokens: Int[Tensor, "batch pos"]
    prompt_length: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    tokenizer: Tokenizer | None
    max_length: int = 0  # how many tokens there can be at most
    preceding_tokens: tuple[int, ...] = ()  # by its one row before it began, where a stop string may have begun
    run_info: RunInfo | None = None
    chosen: Int[Tensor, "batch"] | None = None  # the last real token of every row

    def __iter__(self) -> Iterator[GenerationStep]:
        """Every step, once it is whole; at the end, HookError for an edit that never came to hold."""
        for step in self.steps:
            self.recorder.commit_pass()
            self.tokens = torch.cat([self.tokens, step.tokens[:, None]], 1)
            self.chosen = step.tokens if self.chosen is None else torch.where(step.live, step.tokens, self.chosen)
            yield step
        self.recorder.plan.check_applied(self.recorder.current_hook)

    def decode_texts(self, final: bool = True) -> list[str]:
        """What every row has said so far, without the stop token or string that ended it.

        Unless `whole`, also without an end that the next token may change: half a character, the beginning of a stop
        string.
        """
        if self.tokenizer is None:
            return []
        new = self.tokens[:, self.prompt_length :].tolist()
        ends = [next((i for i, token in enumerate(row) if token in self.stop_ids), len(row)) for row in new]
        done = final or self.tokens.shape[1] == self.max_length or bool(self.find_stopped_rows().all())
        rows = [row[:end] for row, end in zip(new, ends, strict=True)]
        rows = rows if done else [self.tokenizer.settled(row) for row in rows]
        texts = [self.tokenizer.decode_continuation(row, special=False) for row in rows]
        texts = [cut_at_stop_string(self.stop_strings, text) for text in texts]
        if done:
            return texts
        return [self.trim_unfinished_stop(text.rstrip("\ufffd")) for text in texts]

    def trim_unfinished_stop(self, text: str) -> str:
        """The text without an end with which a stop string may begin."""
        begun = [n for s in self.stop_strings for n in range(1, len(s)) if text.endswith(s[:n])]
        return text[: len(text) - max(begun, default=0)]

    def find_stopped_rows(self) -> Bool[Tensor, "batch"]:
        """Where a row has said a stop id or a stop string."""
        stop = torch.tensor(self.stop_ids, dtype=torch.long, device=self.tokens.device)
        said = torch.isin(self.tokens[:, self.prompt_length :], stop).any(1)
        return said | self.has_stop_string(self.tokens) if self.stop_strings else said

    def has_stop_string(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch"]:
        """Where a row has said one of the stop strings."""
        assert self.tokenizer is not None
        texts = [
            self.tokenizer.decode_continuation([*self.preceding_tokens, *row])
            for row in tokens[:, self.prompt_length :].tolist()
        ]
        return torch.tensor([any(s in text for s in self.stop_strings) for text in texts], device=tokens.device)

    def run_to_end(self) -> GenerationResult:
        """All of it, or what there is when it is interrupted; an error has what there is as its `.run`."""
        try:
            for _ in self:
                pass
        except KeyboardInterrupt:
            return self.make_result("interrupted")
        except Exception as e:
            setattr(e, "run", self.make_result("failed"))  # noqa: B010 - nothing already computed is lost
            raise
        return self.make_result()

    def make_result(self, stop_reason: str | None = None) -> GenerationResult:
        """What there is."""
        texts = self.decode_texts()
        stop_reason = stop_reason or ("stop" if bool(self.find_stopped_rows().all()) else "max_new_tokens")
        covered = self.cached_length + self.tokens.shape[1] - 1  # an interrupted step may have run and chosen nothing
        self.kv.truncate(min(self.kv.length, covered))
        if self.chosen is not None and self.kv.length == covered:
            stop = torch.tensor(self.stop_ids, dtype=torch.long, device=self.chosen.device)
            self.kv.chosen = self.chosen.masked_fill(torch.isin(self.chosen, stop), -1)
        text = texts[0] if len(texts) == 1 else texts or None
        acts = self.recorder.collect_activations(self.make_run_info())
        return GenerationResult(self.tokens, text, acts, self.kv, self.prompt_length, stop_reason)

    def make_run_info(self) -> RunInfo:
        """The tokens and positions of every pass that is whole."""
        assert self.run_info is not None
        ran = len(self.recorder.passes) - 1 + self.prompt_length if self.recorder.passes else 0
        at = self.kv.positions[:, self.cached_length : self.cached_length + ran]
        keys = self.kv.positions[:, : self.cached_length + ran]
        return replace(self.run_info, tokens=self.tokens[:, :ran], positions=at, key_positions=keys, over_steps=True)


def cut_at_stop_string(stop_strings: Sequence[str], text: str) -> str:
    """The text before the first of these strings that is in it."""
    return text[: min((text.find(s) for s in stop_strings if s in text), default=None)]
