"""Checks of tutorial 8, circuits."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from glmlens import patch
from glmlens.course.verdict import demand, described, exercise, lens, number
from glmlens.tasks import ioi
from glmlens.tasks.task import Examples

MOST, LEAST = 80, 0.8


@exercise("a function of s, change and slope")
def exercise_8_1(fix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    draw = torch.Generator().manual_seed(0)
    for certain in (1.0, 20.0, 300.0):
        s, change, slope = (torch.randn(6, generator=draw) for _ in range(3))
        s, change = certain * s, 2 * certain * change
        right = float((((s + change).softmax(-1) - s.softmax(-1)) * slope).sum())
        found = number(fix(s, change, slope))
        demand(found == found, f"with scores of about {certain:.0f} it is no number: where do exponentials grow?")
        otherwise = f"with scores of about {certain:.0f} it is {found:.3f}, and should be {right:.3f}"
        demand(abs(found - right) < 1e-3, f"{otherwise}: which pattern would the other query make?")
    return "right also where the attention is certain"


@cache
def sentences() -> Examples:
    return ioi.examples(lens(), 40, "check").of_length()[:4]


@cache
def sent_to(receiver: patch.Site) -> float:
    """The summed effect of the heads of layer 0 through a receiver."""
    found = patch.path_patch(lens(), sentences(), "flip", receiver, progress=False)
    return float(found.at(layer=0).values.sum())


@exercise("a Site of layer 1")
def exercise_8_2(receiver: patch.Site) -> str:
    demand(isinstance(receiver, patch.Site), f"expected a Site, got {described(receiver)}")
    there = receiver.point in ("attn.q", "attn.k", "attn.v") and receiver.layer == (1,)
    demand(there, f"{receiver} is not what layer 1 reads: Site('attn.q', layer=1, head=3), or keys or values by kv=")
    of_3 = receiver.head == (3,) if receiver.point == "attn.q" else receiver.kv == (1,)
    demand(of_3, f"{receiver} is not head 1.3's alone: queries by head=3, keys and values by kv=1")
    found = sent_to(receiver)
    demand(found < -2, f"{found:+.2f} logits go through {receiver}: where do the two prompts differ?")
    return f"{found:+.2f} logits of layer 0's heads go through it"


@cache
def measured() -> patch.Exact:
    """Circuits on the sentences of the tutorial."""
    return patch.Exact(lens(), ioi.examples(lens(), 60).of_length()[:6], "flip")


@exercise("a Circuit")
def exercise_8_3(circuit: patch.Circuit) -> str:
    demand(isinstance(circuit, patch.Circuit), f"expected a Circuit, got {described(circuit)}")
    demand(circuit.n_edges <= MOST, f"it has {circuit.n_edges} edges, and may have {MOST}")
    found = measured().faithfulness(circuit)
    demand(found > LEAST, f"its {circuit.n_edges} edges keep {found:.0%}: what do the scores that chose them not see?")
    return f"{circuit.n_edges} edges keep {found:.0%}"
