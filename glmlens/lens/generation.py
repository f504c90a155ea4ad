"""A generation while it runs (`ActiveGeneration`), and its result (`GenerationResult`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from glmlens.kv_cache import KVCache
from glmlens.lens.sampling import GenerationStep
from glmlens.recording.activations import Activations
from glmlens.recording.recorder import GenerationRecorder
from glmlens.recording.run_info import RunInfo
from glmlens.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """The result of a generation: tokens, text, recorded activations, the KV cache, and why it stopped.

    `tokens` is [batch, prompt + new]; `text` is that of the new tokens. `acts` and `kv` cover every token that was run:
    all but the last. `stopped` is "max_new_tokens", "stop", "interrupted" or "failed".
    """

    tokens: Int[Tensor, "batch pos"]
    text: str | list[str] | None
    acts: Activations = field(repr=False)
    kv: KVCache = field(repr=False)
    prompt_length: int
    stopped: str

    @property
    def new_tokens(self) -> Int[Tensor, "batch new"]:
        """The generated tokens, without the prompt."""
        return self.tokens[:, self.prompt_length :]

    def __reduce__(self) -> Any:
        """Pickle values only: the cache's entries and no model; see `Activations.__reduce__`."""
        return restore_run, ({**vars(self), "kv": self.kv.fork()},)


def restore_run(state: dict[str, Any]) -> GenerationResult:
    """Return the generation that was pickled. Files name this function: it keeps its name and module."""
    return GenerationResult(**state)


torch.serialization.add_safe_globals([restore_run, KVCache])


@dataclass(frozen=True)
class StopCondition:
    """When a row of a generation stops: at one of the stop ids, or once its text contains one of the stop strings.

    `preceding_tokens` are those of the one row before the prompt, in which a stop string may begin.
    """

    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    tokenizer: Tokenizer | None
    prompt_length: int
    preceding_tokens: tuple[int, ...] = ()

    def find_stopped_rows(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch"]:
        """Return where the new tokens of a row contain a stop id or a stop string."""
        stop = torch.tensor(self.stop_ids, dtype=torch.long, device=tokens.device)
        stopped = torch.isin(tokens[:, self.prompt_length :], stop).any(1)
        return stopped | self.find_stop_strings(tokens) if self.stop_strings else stopped

    def find_stop_strings(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch"]:
        """Return where the text of a row's new tokens contains a stop string."""
        assert self.tokenizer is not None
        texts = [
            self.tokenizer.decode_continuation([*self.preceding_tokens, *row])
            for row in tokens[:, self.prompt_length :].tolist()
        ]
        return torch.tensor([any(s in text for s in self.stop_strings) for text in texts], device=tokens.device)

    def trim_unfinished_stop(self, text: str) -> str:
        """Return the text without an end that may be the beginning of a stop string."""
        lengths = [n for s in self.stop_strings for n in range(1, len(s)) if text.endswith(s[:n])]
        return text[: len(text) - max(lengths, default=0)]


@dataclass(kw_only=True)
class ActiveGeneration:
    """A generation that is running: iterate over it for its steps, and call `make_result` for the result so far.

    `steps` yields them (see `sampling.generate_steps`). `tokens` [batch, pos] begin as the prompt's and grow with every
    step. `cached_length` counts the entries that the cache held before the prompt, `max_length` the most tokens there
    can be, prompt included. `chosen` [batch] is the last token of every row that is not padding.
    """

    steps: Iterator[GenerationStep]
    recorder: GenerationRecorder
    kv: KVCache
    cached_length: int
    tokens: Int[Tensor, "batch pos"]
    max_length: int
    stop: StopCondition
    run_info: RunInfo
    chosen: Int[Tensor, "batch"] | None = None

    @property
    def prompt_length(self) -> int:
        """The number of tokens of the prompt, padding included."""
        return self.stop.prompt_length

    def __iter__(self) -> Iterator[GenerationStep]:
        """Yield every step once it has run; at the end raise HookError for an edit that never applied."""
        for step in self.steps:
            self.recorder.commit_pass()
            self.tokens = torch.cat([self.tokens, step.tokens[:, None]], 1)
            self.chosen = step.tokens if self.chosen is None else torch.where(step.live, step.tokens, self.chosen)
            yield step
        self.recorder.plan.check_applied(self.recorder.current_hook)

    def decode_texts(self, final: bool = True) -> list[str]:
        """Return the text of every row so far, without the stop token or string that ended it.

        Unless `final`, also without an end that the next token may change: half a character, the beginning of a stop
        string.
        """
        tokenizer = self.stop.tokenizer
        if tokenizer is None:
            return []
        new = self.tokens[:, self.prompt_length :].tolist()
        ends = [next((i for i, token in enumerate(row) if token in self.stop.stop_ids), len(row)) for row in new]
        rows = [row[:end] for row, end in zip(new, ends, strict=True)]
        is_done = bool(self.stop.find_stopped_rows(self.tokens).all())
        final = final or self.tokens.shape[1] == self.max_length or is_done
        if not final:
            rows = [tokenizer.drop_unfinished_bytes(row) for row in rows]
        texts = [tokenizer.decode_continuation(row, special=False) for row in rows]
        texts = [cut_at_stop_string(self.stop.stop_strings, text) for text in texts]
        if final:
            return texts
        return [self.stop.trim_unfinished_stop(text.rstrip("\ufffd")) for text in texts]

    def run_to_end(self) -> GenerationResult:
        """Run all steps and return the result; after an interrupt, the result so far.

        An error raised by a step carries the result so far as its attribute `run`.
        """
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
        """Return the result so far, with the cache cut back to the tokens that were run in full."""
        texts = self.decode_texts()
        if stop_reason is None:
            is_done = bool(self.stop.find_stopped_rows(self.tokens).all())
            stop_reason = "stop" if is_done else "max_new_tokens"
        # An interrupted step may have written entries to the cache without choosing a token: they are dropped.
        covered = self.cached_length + self.tokens.shape[1] - 1
        self.kv.truncate(min(self.kv.length, covered))
        if self.chosen is not None and self.kv.length == covered:
            # The next turn of a chat runs the last chosen token first; after a stop id there is none (-1).
            stop = torch.tensor(self.stop.stop_ids, dtype=torch.long, device=self.chosen.device)
            self.kv.chosen = self.chosen.masked_fill(torch.isin(self.chosen, stop), -1)
        return GenerationResult(
            tokens=self.tokens,
            text=texts[0] if len(texts) == 1 else texts or None,
            acts=self.recorder.collect_activations(self.make_run_info()),
            kv=self.kv,
            prompt_length=self.prompt_length,
            stopped=stop_reason,
        )

    def make_run_info(self) -> RunInfo:
        """Return the run info of the recording: tokens and positions of every pass that ran to its end."""
        n_passes = len(self.recorder.passes)
        n_run = n_passes - 1 + self.prompt_length if n_passes else 0  # the first pass runs the prompt, others one token
        return replace(
            self.run_info,
            tokens=self.tokens[:, :n_run],
            positions=self.kv.positions[:, self.cached_length : self.cached_length + n_run],
            key_positions=self.kv.positions[:, : self.cached_length + n_run],
            over_steps=True,
        )


def cut_at_stop_string(stop_strings: Sequence[str], text: str) -> str:
    """Return the text before the first of these strings in it."""
    return text[: min((text.find(s) for s in stop_strings if s in text), default=None)]
