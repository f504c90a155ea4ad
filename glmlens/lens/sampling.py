"""Decoding: the options of a generation, and the loop over prefill and steps. Every step is an ordinary forward."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.foreign_keywords import refuse_keywords
from glmlens.hooks import Hook
from glmlens.integers import Integer, Integers, read_integer, read_integers
from glmlens.kv_cache import KVCache
from glmlens.model import GLM, absolute_positions

TokenChooser = Callable[[Float[Tensor, "batch vocab"], Int[Tensor, "batch pos"]], Int[Tensor, "batch"]]
"""Takes the logits of the last position and all tokens so far, and returns the next token of every row."""
StepHookFactory = Callable[[int, Int[Tensor, "batch pos"], Int[Tensor, "batch key"]], Hook]
"""Makes the hook of one step from its number, its absolute positions and those of all keys."""


@dataclass(frozen=True, eq=False)
class GenerationStep:
    """One step of a generation: the logits and the tokens that were chosen from them.

    `tokens` is [batch], the padding id in rows that had stopped before. `logits` is [batch, vocab]. `live` [batch] is
    True in rows that had not stopped. `text` is set by `Lens.stream` alone.
    """

    index: int
    tokens: Int[Tensor, "batch"]
    logits: Float[Tensor, "batch vocab"]
    live: Bool[Tensor, "batch"]
    text: str | list[str] = ""


@dataclass(frozen=True)
class GenerationConfig:
    """The options of one generation. Decoding is greedy unless a temperature is given.

    Logits are processed as transformers does, in its order: repetition penalty (Keskar et al. 2019, arXiv 1909.05858,
    section 4.1), temperature, top-k, top-p (Holtzman et al. 2020, arXiv 1904.09751), min-p (Nguyen et al. 2024, arXiv
    2407.01082). `seed` is a number or a torch.Generator, whose state then advances. `stop_ids=None` stands for the
    checkpoint's own. Raises ValueError for a value outside its range, and for one that would have no effect.
    """

    max_new_tokens: Integer = 20
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: Integer | torch.Generator | None = None
    stop_ids: Integers = None
    stop_strings: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        # The dataclass is frozen, so numbers in other types and single strings are normalised through `object`.
        object.__setattr__(self, "max_new_tokens", read_integer(self.max_new_tokens, "max_new_tokens", least=1))
        for name, number in (("top_k", self.top_k), ("seed", self.seed)):
            if number is not None and not isinstance(number, torch.Generator):
                object.__setattr__(self, name, read_integer(number, name))
        object.__setattr__(self, "stop_ids", read_stop_ids(self.stop_ids))
        object.__setattr__(self, "stop_strings", read_stop_strings(self.stop_strings))
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

    @staticmethod
    def from_options(
        function: str, config: "GenerationConfig | None", options: Mapping[str, Any], others: Sequence[str] = ()
    ) -> "GenerationConfig":
        """Return `config` (by default the defaults) with `options` in place of its values.

        Raises TypeError for an option that does not exist. The message lists those that do, with `others`, the further
        keywords of `function`.
        """
        known = [field.name for field in fields(GenerationConfig)]
        refuse_keywords(function, [name for name in options if name not in known], [*known, *others])
        if config is not None and not isinstance(config, GenerationConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a GenerationConfig")
        return GenerationConfig(**options) if config is None else replace(config, **options)

    def make_chooser(
        self, device: torch.device, cached_tokens: Int[Tensor, "batch pos"], padding: Tensor | None = None
    ) -> TokenChooser:
        """Return the function that chooses the next token of every row.

        `cached_tokens` come before the prompt. `padding` [batch, cached + prompt] is True at padding.
        """
        generator = self.make_generator(device)

        def choose(logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch"]:
            logits = self.process_logits(logits, torch.cat([cached_tokens, tokens], 1), padding)
            if self.temperature is None:
                return logits.argmax(-1)
            return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)

        return choose

    def make_generator(self, device: torch.device) -> torch.Generator:
        """Return the generator to sample from: a new one with this seed, or the one that was given as the seed."""
        if isinstance(self.seed, torch.Generator):
            return self.seed
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()  # from the operating system's entropy
        else:
            generator.manual_seed(int(self.seed))
        return generator

    def process_logits(
        self, logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch pos"], padding: Tensor | None
    ) -> Float[Tensor, "batch vocab"]:
        """Return the logits after penalty, temperature, top-k, top-p and min-p; excluded tokens are at -inf."""
        if self.repetition_penalty is not None:
            logits = penalise_repetition(logits, tokens, padding, self.repetition_penalty)
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.top_k is not None:
            # Ties with the k-th largest logit stay, as in transformers.
            smallest = logits.topk(min(int(self.top_k), logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            # From the least probable token up: those whose cumulative probability is at most 1 - top_p are excluded.
            ascending, order = logits.sort(descending=False)
            excluded = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            excluded[:, -1:] = False  # the most probable token always stays
            logits = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
        if self.min_p is not None:
            # The threshold is relative to the most probable token.
            probs = logits.softmax(-1)
            logits = logits.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), -torch.inf)
        return logits


def read_stop_ids(stop_ids: Integers) -> tuple[int, ...] | None:
    """Return stop ids as a tuple of int; None for None, which stands for the checkpoint's own."""
    if stop_ids is None:
        return None
    if isinstance(stop_ids, Sized) and not len(stop_ids):
        return ()
    return tuple(read_integers(stop_ids, "stop_ids"))


def read_stop_strings(stop_strings: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple; ValueError for an empty string."""
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
    if not all(strings):
        raise ValueError("an empty stop string would stop everything at once")
    return strings


Function = TypeVar("Function", bound=Callable[..., Any])


def show_generation_options(function: Function) -> Function:
    """Give `function` a signature that lists every field of GenerationConfig in the place of `**options`.

    `inspect.signature` and the completion in Jupyter then show each option with its default.
    """
    signature = inspect.signature(function)
    defaults = {field.name: field.default for field in fields(GenerationConfig)}
    parameters = [
        # A parameter of the function's own, max_new_tokens, is shown with the default of the config too.
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in signature.parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    parameters += [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(GenerationConfig)
        if field.name not in signature.parameters
    ]
    setattr(function, "__signature__", signature.replace(parameters=parameters))  # noqa: B010 - not in the type
    return function


def penalise_repetition(
    logits: Float[Tensor, "batch vocab"],
    tokens: Int[Tensor, "batch pos"],
    padding: Bool[Tensor, "batch before"] | None,
    penalty: float,
) -> Float[Tensor, "batch vocab"]:
    """Return logits in which those of every token so far are divided by the penalty, or multiplied if negative."""
    if padding is not None:
        # Padding is replaced by the row's last token, which is penalised anyway: scatter needs an id everywhere.
        new = tokens.new_zeros(len(tokens), tokens.shape[1] - padding.shape[1], dtype=torch.bool)
        tokens = torch.where(torch.cat([padding, new], 1), tokens[:, -1:], tokens)
    repeated = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(repeated < 0, repeated * penalty, repeated / penalty))


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
    """Yield the steps of a generation: the prompt, then one token at a time, each run into `kv`.

    Step 0 runs the prompt and chooses the first token. Step i runs the token that step i - 1 chose. The loop ends after
    `max_new_tokens` steps, or once every row has stopped: at a stop id, or where `should_stop(tokens)` is True. A row
    that has stopped is run on padding, at position -1.
    """
    live = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=tokens.device)
    new = tokens
    for index in range(max_new_tokens):
        positions = absolute_positions(new.shape, new.device, kv, attention_mask=attention_mask)
        hook = make_step_hook(index, positions, kv.concatenate_positions(positions))
        with torch.no_grad():
            logits = model(new, kv, hook, attention_mask=attention_mask, logits_to_keep=1)[:, -1]
            # Sampling in half precision would round small probabilities to 0.
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = torch.where(live, choose(exact, tokens), pad_id)
        yield GenerationStep(index, chosen, logits, live)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        live = live & ~torch.isin(chosen, stop)
        if should_stop is not None:
            live = live & ~should_stop(tokens)
        new = chosen[:, None]
        # Only the prompt's step has the prompt's mask. From then on the mask marks the rows that have stopped.
        attention_mask = None if bool(live.all()) else live[:, None]
        if not bool(live.any()):
            return
