"""Checks of tutorial 4, rotary positions."""

from collections.abc import Callable

import torch
from torch import Tensor

from glmlens.activations import Activations
from glmlens.angles import frequencies
from glmlens.course.verdict import Wrong, demand, equal, exercise, hooked, lens
from glmlens.hooks import Hooks

ROWS = 3


def said_twice(n: int) -> Tensor:
    """Rows of n random words, each list said twice."""
    tokenizer = lens().tokenizer
    assert tokenizer is not None
    ids, draw = torch.tensor(tokenizer.word_ids()), torch.Generator().manual_seed(7)
    words = torch.stack([ids[torch.randperm(len(ids), generator=draw)[:n]] for _ in range(ROWS)])
    return torch.cat([torch.tensor(tokenizer.prefix).expand(ROWS, -1), words, words], 1)


@exercise("a function of x and positions")
def exercise_4_1(rotate: Callable[[Tensor, Tensor], Tensor]) -> str:
    _, acts = lens().run_with_cache(said_twice(12)[:1], ["attn.k", "kv.k_new"], logits=False)
    before, right = acts["attn.k", 1][0, :, 3], acts["kv.k_new", 1][0, :, 3]
    found, cfg = rotate(before.clone(), torch.arange(len(before))), lens().cfg
    equal(found[:1], right[:1], "at position 0 nothing turns: cos 0 = 1, sin 0 = 0")
    equal(found[:, cfg.d_rotary :], right[:, cfg.d_rotary :], "the last 16 channels stay as they are")
    equal(found[:, :2], right[:, :2], "channels 0 and 1 are one pair, and turn by one radian per token")
    equal(found, right, f"the first pair is right; pair 1 turns by {frequency(1):.4g} per token")
    back = rotate(before.flip(0), torch.arange(len(before)).flip(0))
    equal(back, right.flip(0), "given from the last to the first, they turn otherwise: use positions")
    return "the keys that the model remembers"


def frequency(pair: int) -> float:
    return float(frequencies(lens().cfg, torch.float32, torch.device("cpu"))[pair])


@exercise("hooks, as surgery.shift gives them")
def exercise_4_2(hooks: Hooks) -> str:
    tokens = said_twice(20)
    clean, found = (patterns(tokens, some) for some in (None, hooked(hooks)))
    back = [float(found[:, 7].diagonal(-d, 1, 2)[:, 24 - d :].mean()) for d in range(6)]
    most = max(range(6), key=lambda d: back[d])
    said = f"head 1.7 puts {back[3]:.0%} three tokens back, and most ({back[most]:.0%}) {most} back"
    demand(back[3] > 0.95, f"{said}: it wants a distance of 1. Where must it believe to stand?")
    others = [h for h in range(8) if h != 7 and not torch.allclose(found[:, h], clean[:, h], atol=1e-3)]
    demand(not others, f"head 1.7 does, but heads {others} of its layer look elsewhere too: who reads the same keys?")
    return f"{back[3]:.0%} of its attention goes three tokens back"


def patterns(tokens: Tensor, hooks: Hooks | None) -> Tensor:
    """The patterns of layer 1: [batch, head, query, key]."""
    acts: Activations = lens().run_with_cache(tokens, "blocks.1.attn.pattern", hooks, logits=False)[1]
    return acts["attn.pattern", 1]


@exercise("hooks, as surgery.freeze and surgery.stretch give them")
def exercise_4_3(hooks: Hooks) -> str:
    short, long = again(20, hooked(hooks)), again(60, hooks)
    said = f"of lists of 20 {short:.0%} are said again, of lists of 60 {long:.0%}"
    if short < 0.75:
        raise Wrong(f"{said}: the short lists suffer. Which layers need their neighbours where they are?")
    demand(long > 0.6, f"{said}: something else is in the way. Which pairs have high waves in layer 3?")
    return said


def again(n: int, hooks: Hooks) -> float:
    """The share of the words of lists of n that are predicted when they are said for the second time."""
    tokens = said_twice(n)
    said = lens().run_with_hooks(tokens, hooks)[:, -n:-1].argmax(-1)
    return float((said == tokens[:, -n + 1 :]).float().mean())
