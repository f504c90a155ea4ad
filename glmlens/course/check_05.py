"""Checks of the exercises of tutorial 5, the KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from glmlens import cache
from glmlens.config import GLMConfig
from glmlens.course.feedback import WrongAnswer, demand, describe_answer, exercise, load_lens, to_number
from glmlens.kv_cache import KVCache

STORY = "When Mary and John went to the store, {} gave a drink to"


def fill_cache(prompt: str) -> tuple[KVCache, Tensor]:
    """Return the KV cache of all tokens but the last, and the last token."""
    tokens = load_lens().to_tokens(prompt)
    kv = load_lens().new_kv()
    load_lens()(tokens[:, :-1], kv=kv)
    return kv, tokens[:, -1:]


def read_probability(kv: KVCache, last: Tensor, word: str) -> tuple[float, str]:
    """Run `last` after a KV cache; return the probability of `word` and the most probable word."""
    p = load_lens()(last, kv=kv)[0, -1].softmax(-1)
    return float(p[load_lens().to_single_token(word)]), str(load_lens().to_str_tokens(p.argmax()[None, None])[0])


def to_integers(answer: Sequence[int], what: str) -> list[int]:
    """Return the answer as sorted integers without repeats. Raises WrongAnswer if it is none."""
    try:
        return sorted({int(i) for i in answer})
    except (TypeError, ValueError):
        raise WrongAnswer(f"expected {what}, got {describe_answer(answer)}") from None


@exercise("a function of cfg, tokens and number")
def exercise_5_1(kv_bytes: Callable[[GLMConfig, int, int], int]) -> str:
    kv, _ = fill_cache(STORY.format("John"))
    value = to_number(kv_bytes(load_lens().cfg, kv.length, 4))
    size = f"{value:,.0f} bytes for {kv.length} entries here"
    demand(value != kv.bytes / 2, f"{size} is half of it: what is cached beside the keys?")
    demand(value == kv.bytes, f"{size}; the cache has {kv.bytes:,} bytes")
    # The same function on the config of another model must not use numbers of the small one.
    large = replace(load_lens().cfg, n_layers=40, n_heads=32, n_kv_heads=2, d_head=128)
    value = to_number(kv_bytes(large, 131_072, 2))
    demand(value == 5 * 2**30, f"{value / 2**30:.3g} GiB for GLM-4-9B: which numbers did not come from its cfg?")
    return "GLM-4-9B caches 131,072 tokens in 5 GiB"


@exercise("two layers, (0, 1)")
def exercise_5_2(layers: Sequence[int]) -> str:
    chosen = to_integers(layers, "two layers")
    demand(len(chosen) == 2 and set(chosen) <= set(range(4)), f"give two of the layers 0 to 3; these are {chosen}")
    # The country is at position 5 of both prompts.
    kv, last = fill_cache("The capital of France is")
    japan, _ = fill_cache("The capital of Japan is")
    p, best = read_probability(cache.swap(japan, layer=chosen, position=5)(kv), last, " Tokyo")
    result = f"Tokyo has {p:.0%}, and the most probable word is {best!r}"
    demand(p > 0.9, f"{result}: in which layers does the last token read the country?")
    return result


@exercise("a list of at most six positions")
def exercise_5_3(positions: Sequence[int]) -> str:
    chosen = to_integers(positions, "positions")
    demand(len(chosen) <= 6 and 14 in chosen, f"give at most six positions, 14 among them; these are {chosen}")
    demand(set(chosen) <= set(range(15)), f"positions are 0 to 14; these are {chosen}")
    evicted = [position for position in range(15) if position not in chosen]
    for giver, name in (("John", "Mary"), ("Mary", "John")):
        kv, last = fill_cache(STORY.format(giver))
        p, best = read_probability(cache.evict(position=evicted)(kv), last, f" {name}")
        result = f"where {giver} gives, {name} has {p:.0%}, and the most probable word is {best!r}"
        demand(p > 0.9, f"{result}: which entries lower its probability most when they are evicted alone?")
    return "six entries are enough for both stories"
