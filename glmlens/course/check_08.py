"""Checks of tutorial 8, circuits."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from glmlens import circuits, patch
from glmlens.course.feedback import demand, describe_answer, exercise, load_lens, to_number
from glmlens.tasks import ioi
from glmlens.tasks.task import Examples

MAX_EDGES, MIN_FAITHFULNESS = 80, 0.8


@exercise("a function of s, change and slope")
def exercise_8_1(fix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    draw = torch.Generator().manual_seed(0)
    for certain in (1.0, 20.0, 300.0):
        s, change, slope = (torch.randn(6, generator=draw) for _ in range(3))
        s, change = certain * s, 2 * certain * change
        right = float((((s + change).softmax(-1) - s.softmax(-1)) * slope).sum())
        found = to_number(fix(s, change, slope))
        demand(found == found, f"with scores of about {certain:.0f} it is no number: where do exponentials grow?")
        otherwise = f"with scores of about {certain:.0f} it is {found:.3f}, and should be {right:.3f}"
        demand(abs(found - right) < 1e-3, f"{otherwise}: which pattern would the other query make?")
    return "right also where the attention is certain"


@cache
def draw_sentences() -> Examples:
    return ioi.examples(load_lens(), 40, "check").of_length()[:4]


@cache
def measure_path_effect(receiver: patch.Site) -> float:
    """The summed effect of the heads of layer 0 through a receiver."""
    found = circuits.path_patch(load_lens(), draw_sentences(), "flip", receiver, progress=False)
    return float(found.at(layer=0).values.sum())


@exercise("a Site of layer 1")
def exercise_8_2(receiver: patch.Site) -> str:
    demand(isinstance(receiver, patch.Site), f"expected a Site, got {describe_answer(receiver)}")
    there = receiver.point in ("attn.q", "attn.k", "attn.v") and receiver.layer == (1,)
    demand(there, f"{receiver} is not what layer 1 reads: Site('attn.q', layer=1, head=3), or keys or values by kv=")
    of_3 = receiver.head == (3,) if receiver.point == "attn.q" else receiver.kv == (1,)
    demand(of_3, f"{receiver} is not head 1.3's alone: queries by head=3, keys and values by kv=1")
    found = measure_path_effect(receiver)
    demand(found < -2, f"{found:+.2f} logits go through {receiver}: where do the two prompts differ?")
    return f"{found:+.2f} logits of layer 0's heads go through it"


@cache
def make_circuit_evaluator() -> circuits.CircuitEvaluator:
    """Circuits on the sentences of the tutorial."""
    return circuits.CircuitEvaluator(load_lens(), ioi.examples(load_lens(), 60).of_length()[:6], "flip")


@exercise("a Circuit")
def exercise_8_3(circuit: circuits.Circuit) -> str:
    demand(isinstance(circuit, circuits.Circuit), f"expected a Circuit, got {describe_answer(circuit)}")
    demand(circuit.n_edges <= MAX_EDGES, f"it has {circuit.n_edges} edges, and may have {MAX_EDGES}")
    found = make_circuit_evaluator().faithfulness(circuit)
    demand(
        found > MIN_FAITHFULNESS,
        f"its {circuit.n_edges} edges keep {found:.0%}: what do the scores that chose them not see?",
    )
    return f"{circuit.n_edges} edges keep {found:.0%}"
