"""Checks of tutorial 5, the KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from glmlens import cache
from glmlens.config import GLMConfig
from glmlens.course.feedback import WrongAnswer, demand, describe_answer, exercise, load_lens, to_number
from glmlens.kv_cache import KVCache

STORY = "When Mary and John went to the store, {} gave a drink to"


def fill_cache(prompt: str) -> tuple[KVCache, Tensor]:
    """What is remembered of all tokens but the last, and the last."""
    tokens, kv = load_lens().to_tokens(prompt), load_lens().new_kv()
    load_lens()(tokens[:, :-1], kv=kv)
    return kv, tokens[:, -1:]


def read_probability(kv: KVCache, last: Tensor, word: str) -> tuple[float, str]:
    """Of a word after a memory and one more token, and the word that is most probable there."""
    p = load_lens()(last, kv=kv)[0, -1].softmax(-1)
    return float(p[load_lens().to_single_token(word)]), str(load_lens().to_str_tokens(p.argmax()[None, None])[0])


def to_integers(answer: Sequence[int], what: str) -> list[int]:
    try:
        return sorted({int(i) for i in answer})
    except (TypeError, ValueError):
        raise WrongAnswer(f"expected {what}, got {describe_answer(answer)}") from None


@exercise("a function of cfg, tokens and number")
def exercise_5_1(kv_bytes: Callable[[GLMConfig, int, int], int]) -> str:
    kv, _ = fill_cache(STORY.format("John"))
    found = to_number(kv_bytes(load_lens().cfg, kv.length, 4))
    demand(found != kv.bytes / 2, f"{found:,.0f} bytes of {kv.length} entries here is half: what else is remembered?")
    demand(found == kv.bytes, f"{found:,.0f} bytes of {kv.length} entries here; the cache weighs {kv.bytes:,}")
    large = replace(load_lens().cfg, n_layers=40, n_heads=32, n_kv_heads=2, d_head=128)
    found = to_number(kv_bytes(large, 131_072, 2))
    demand(found == 5 * 2**30, f"of GLM-4-9B {found / 2**30:.3g} GiB: which of its numbers are still ours?")
    return "GLM-4-9B remembers 131,072 tokens in 5 GiB"


@exercise("two layers, (0, 1)")
def exercise_5_2(layers: Sequence[int]) -> str:
    chosen = to_integers(layers, "two layers")
    demand(len(chosen) == 2 and set(chosen) <= set(range(4)), f"two of the layers 0 to 3; these are {chosen}")
    kv, last = fill_cache("The capital of France is")
    japan, _ = fill_cache("The capital of Japan is")
    p, said = read_probability(cache.swap(japan, layer=chosen, position=5)(kv), last, " Tokyo")
    found = f"Tokyo has {p:.0%}, and it says {said!r}"
    demand(p > 0.9, f"{found}: when does the last token first hear of the country, and when last?")
    return found


@exercise("a list of at most six positions")
def exercise_5_3(positions: Sequence[int]) -> str:
    chosen = to_integers(positions, "positions")
    demand(len(chosen) <= 6 and 14 in chosen, f"at most six positions, and 14 among them; these are {chosen}")
    demand(set(chosen) <= set(range(15)), f"positions are 0 to 14; these are {chosen}")
    gone = [at for at in range(15) if at not in chosen]
    for giver, name in (("John", "Mary"), ("Mary", "John")):
        kv, last = fill_cache(STORY.format(giver))
        p, said = read_probability(cache.evict(position=gone)(kv), last, f" {name}")
        told = f"where {giver} gives, {name} has {p:.0%}, and it says {said!r}"
        demand(p > 0.9, f"{told}: without which entries is most lost in this story?")
    return "both stories are told right"
