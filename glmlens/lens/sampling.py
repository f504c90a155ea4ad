"""The regular generation path: prefill, step, choose, stop. Every step is an ordinary forward with an ordinary hook."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.hooks import Hook
from glmlens.integers import read_integer
from glmlens.kv_cache import KVCache
from glmlens.model import GLM, absolute_positions

TokenChooser = Callable[[Float[Tensor, "batch vocab"], Int[Tensor, "batch pos"]], Int[Tensor, "batch"]]
"""From the last logits and all tokens so far to the next token of every row."""
StepHookFactory = Callable[[int, Int[Tensor, "batch pos"], Int[Tensor, "batch key"]], Hook]
"""The hook of one step, made from its number, its absolute positions and those of all it can attend to."""


@dataclass(frozen=True, eq=False)
class GenerationStep:
    """One step of a generation: what the model said and what was chosen.

    `tokens` is [batch], the padding id in rows that had stopped before; `logits` [batch, vocab]; `live` [batch] is
    where this step's token is a real one.
    """

    index: int
    tokens: Int[Tensor, "batch"]
    logits: Float[Tensor, "batch vocab"]
    live: Bool[Tensor, "batch"]
    text: str | list[str] = ""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily, unless there is a temperature.

    The steps are those of transformers in its order: repetition penalty (Keskar et al. 2019, arXiv 1909.05858,
    section 4.1), temperature, top-k, top-p (Holtzman et al. 2020, arXiv 1904.09751), min-p (Nguyen et al. 2024, arXiv
    2407.01082). Raises ValueError for a value outside its range, and for one that would have no effect.
    """

    temperature: float | None = None
    top_k: Any = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: Any = None

    def __post_init__(self) -> None:
        for name, number in (("top_k", self.top_k), ("seed", self.seed)):
            if number is not None and not isinstance(number, torch.Generator):
                object.__setattr__(self, name, read_integer(number, name))
        for name, good, expected in (
            ("temperature", lambda x: x > 0, "above 0"),
            ("top_k", lambda x: x >= 1, "a whole number of at least 1"),
            ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("repetition_penalty", lambda x: x > 0, "above 0"),
        ):
            value = getattr(self, name)
            if value is not None and not good(value):
                raise ValueError(f"{name} is {value!r}; expected {expected}")
        idle = [name for name in ("top_k", "top_p", "min_p", "seed") if getattr(self, name) is not None]
        if self.temperature is None and idle:
            raise ValueError(f"{' and '.join(idle)} would do nothing without sampling: pass temperature=1.0")

    def make_chooser(
        self, device: torch.device, cached_tokens: Int[Tensor, "batch pos"], padding: Tensor | None = None
    ) -> TokenChooser:
        """The function that chooses, given what comes before the prompt and which of all that is padding."""
        draw = self.make_generator(device)

        def choose(logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch"]:
            logits = self.adjust_logits(logits, torch.cat([cached_tokens, tokens], 1), padding)
            if self.temperature is None:
                return logits.argmax(-1)
            return torch.multinomial(logits.softmax(-1), 1, generator=draw).squeeze(1)

        return choose

    def make_generator(self, device: torch.device) -> torch.Generator:
        """What tokens are drawn from: one of its own with this seed, or the generator given, which moves on."""
        if isinstance(self.seed, torch.Generator):
            return self.seed
        draw = torch.Generator(device)
        if self.seed is None:
            draw.seed()
        else:
            draw.manual_seed(self.seed)
        return draw

    def adjust_logits(
        self, logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch pos"], padding: Tensor | None
    ) -> Float[Tensor, "batch vocab"]:
        if self.repetition_penalty is not None:
            logits = penalise_repetition(logits, tokens, padding, self.repetition_penalty)
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            rising, order = logits.sort(descending=False)
            tail = rising.softmax(-1).cumsum(-1) <= 1 - self.top_p
            tail[:, -1:] = False
            logits = logits.masked_fill(tail.scatter(1, order, tail), -torch.inf)
        if self.min_p is not None:
            probs = logits.softmax(-1)
            logits = logits.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), -torch.inf)
        return logits


def penalise_repetition(
    logits: Float[Tensor, "batch vocab"],
    tokens: Int[Tensor, "batch pos"],
    padding: Bool[Tensor, "batch before"] | None,
    penalty: float,
) -> Float[Tensor, "batch vocab"]:
    """Logits with those of every token said so far divided by the penalty, or multiplied where they are negative."""
    if padding is not None:  # counts for nothing: it is read as the last token, which is said anyway
        new = tokens.new_zeros(len(tokens), tokens.shape[1] - padding.shape[1], dtype=torch.bool)
        tokens = torch.where(torch.cat([padding, new], 1), tokens[:, -1:], tokens)
    said = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(said < 0, said * penalty, said / penalty))


def generate_steps(
    model: GLM,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Tensor | None,
    kv: KVCache,
    make_step_hook: StepHookFactory,
    *,
    max_new_tokens: int,
    choose: TokenChooser,
    stop_ids: Collection[int] = (),
    should_stop: Callable[[Int[Tensor, "batch pos"]], Bool[Tensor, "batch"]] | None = None,
    pad_id: int = 0,
) -> Iterator[GenerationStep]:
    """Run the prompt, then one token at a time, into `kv`, until every row has said a stop id or enough.

    Step 0 runs the prompt and chooses the first token; step i runs the token that step i - 1 chose. A row that has
    stopped is fed padding, at position -1.
    """
    live = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=tokens.device)
    new = tokens
    for index in range(max_new_tokens):
        positions = absolute_positions(new.shape, new.device, kv, attention_mask=attention_mask)
        hook = make_step_hook(index, positions, kv.concatenate_positions(positions))
        with torch.no_grad():
            logits = model(new, kv, hook, attention_mask=attention_mask, logits_to_keep=1)[:, -1]
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = torch.where(live, choose(exact, tokens), pad_id)
        yield GenerationStep(index, chosen, logits, live)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        live = live & ~torch.isin(chosen, stop)
        if should_stop is not None:
            live = live & ~should_stop(tokens)
        new, attention_mask = chosen[:, None], None if bool(live.all()) else live[:, None]
        if not bool(live.any()):
            return
