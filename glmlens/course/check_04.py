"""Checks of the exercises of tutorial 4, rotary positions."""

from collections.abc import Callable

import torch
from torch import Tensor

from glmlens.course.feedback import WrongAnswer, check_equal, check_hooks, demand, exercise, load_lens
from glmlens.hooks import Hooks
from glmlens.recording.activations import Activations
from glmlens.rotary_rules import compute_pair_frequencies

N_PROMPTS = 3


def repeat_words(n: int) -> Tensor:
    """Return prompts of n random words, each list repeated once: [batch, pos]."""
    tokenizer = load_lens().tokenizer
    assert tokenizer is not None
    ids = torch.tensor(tokenizer.list_word_ids())
    draw = torch.Generator().manual_seed(7)  # not the words of the tutorial
    words = torch.stack([ids[torch.randperm(len(ids), generator=draw)[:n]] for _ in range(N_PROMPTS)])
    return torch.cat([torch.tensor(tokenizer.prefix).expand(N_PROMPTS, -1), words, words], 1)


@exercise("a function of x and positions")
def exercise_4_1(rotate: Callable[[Tensor, Tensor], Tensor]) -> str:
    _, acts = load_lens().run_with_cache(repeat_words(12)[:1], ["attn.k", "kv.k_new"], logits=False)
    before = acts["attn.k", 1][0, :, 3]  # keys of one KV head before the rotation: [pos, d]
    right = acts["kv.k_new", 1][0, :, 3]  # and after it
    value = rotate(before.clone(), torch.arange(len(before)))
    cfg = load_lens().cfg
    check_equal(value[:1], right[:1], "at position 0 the rotation changes nothing: cos 0 = 1, sin 0 = 0")
    check_equal(value[:, cfg.d_rotary :], right[:, cfg.d_rotary :], "the last 16 channels are not rotated")
    check_equal(value[:, :2], right[:, :2], "channels 0 and 1 are one pair, rotated by one radian per token")
    rate = read_pair_frequency(1)
    check_equal(value, right, f"the first pair is right; pair 1 is rotated by {rate:.4g} radians per token")
    back = rotate(before.flip(0), torch.arange(len(before)).flip(0))
    check_equal(back, right.flip(0), "wrong for positions in reverse order: the angle depends on `positions`")
    return "the keys that the model caches"


def read_pair_frequency(pair: int) -> float:
    """Return the rotation of a channel pair in radians per token."""
    return float(compute_pair_frequencies(load_lens().cfg, torch.float32, torch.device("cpu"))[pair])


@exercise("hooks, as surgery.shift gives them")
def exercise_4_2(hooks: Hooks) -> str:
    tokens = repeat_words(20)
    clean, edited = (record_patterns(tokens, some) for some in (None, check_hooks(hooks)))
    # Mean attention d tokens back, over queries of the repeated words.
    back = [float(edited[:, 7].diagonal(-d, 1, 2)[:, 24 - d :].mean()) for d in range(6)]
    most = max(range(6), key=lambda d: back[d])
    result = f"head 1.7 attends {back[3]:.0%} to three tokens back, and most ({back[most]:.0%}) to {most} back"
    demand(back[3] > 0.95, f"{result}: it prefers a distance of 1. At which position must its query be rotated?")
    others = [h for h in range(8) if h != 7 and not torch.allclose(edited[:, h], clean[:, h], atol=1e-3)]
    demand(not others, f"head 1.7 is right, but the attention of heads {others} changed too: which share its keys?")
    return f"{back[3]:.0%} of its attention goes to three tokens back"


def record_patterns(tokens: Tensor, hooks: Hooks | None) -> Tensor:
    """Return the attention patterns of layer 1: [batch, head, query, key]."""
    acts: Activations = load_lens().run_with_cache(tokens, "blocks.1.attn.pattern", hooks, logits=False)[1]
    return acts["attn.pattern", 1]


@exercise("hooks, as surgery.freeze and surgery.stretch give them")
def exercise_4_3(hooks: Hooks) -> str:
    short = measure_repetition(20, check_hooks(hooks))
    long = measure_repetition(60, hooks)
    result = f"repeated words predicted: {short:.0%} in lists of 20, {long:.0%} in lists of 60"
    if short < 0.75:
        raise WrongAnswer(f"{result}: short lists got worse. Which layers need true distances to their neighbours?")
    demand(long > 0.6, f"{result}: long lists are still too low. Which pairs have large amplitudes in layer 3?")
    return result


def measure_repetition(n: int, hooks: Hooks) -> float:
    """Return the share of repeated words that are predicted, in lists of n words."""
    tokens = repeat_words(n)
    predicted = load_lens().run_with_hooks(tokens, hooks)[:, -n:-1].argmax(-1)
    return float((predicted == tokens[:, -n + 1 :]).float().mean())
