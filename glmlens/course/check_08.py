"""Checks of the exercises of tutorial 8, circuits."""

import math
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
    for size in (1.0, 20.0, 300.0):  # from soft attention to attention to one key only
        s, change, slope = (torch.randn(6, generator=draw) for _ in range(3))
        s, change = size * s, 2 * size * change
        right = float((((s + change).softmax(-1) - s.softmax(-1)) * slope).sum())
        value = to_number(fix(s, change, slope))
        demand(not math.isnan(value), f"NaN for scores of about {size:.0f}: which exponential overflows?")
        otherwise = f"{value:.3f} for scores of about {size:.0f}; it should be {right:.3f}"
        demand(abs(value - right) < 1e-3, f"{otherwise}: what is the attention pattern with the other query?")
    return "right also where all attention goes to one key"


@cache
def draw_sentences() -> Examples:
    """Return four sentences of one length that the tutorial does not use."""
    return ioi.examples(load_lens(), 40, "check").of_length()[:4]


@cache
def measure_path_effect(receiver: patch.Site) -> float:
    """Return the summed effect of the heads of layer 0 on the logit difference through one receiver."""
    effects = circuits.path_patch(load_lens(), draw_sentences(), "flip", receiver, progress=False)
    return float(effects.at(layer=0).values.sum())


@exercise("a Site of layer 1")
def exercise_8_2(receiver: patch.Site) -> str:
    demand(isinstance(receiver, patch.Site), f"expected a Site, got {describe_answer(receiver)}")
    # Query head 3 reads the keys and values of KV head 1.
    is_input = receiver.point in ("attn.q", "attn.k", "attn.v") and receiver.layer == (1,)
    demand(
        is_input, f"{receiver} is no input of layer 1's heads: use Site('attn.q', layer=1, head=3), or k or v by kv="
    )
    of_3 = receiver.head == (3,) if receiver.point == "attn.q" else receiver.kv == (1,)
    demand(of_3, f"{receiver} is not of head 1.3 only: use head=3 for queries, kv=1 for keys and values")
    effect = measure_path_effect(receiver)
    demand(effect < -2, f"the effect through {receiver} is {effect:+.2f} logits: where do the two prompts differ?")
    return f"the effect of layer 0's heads through it is {effect:+.2f} logits"


@cache
def make_circuit_evaluator() -> circuits.CircuitEvaluator:
    """Return the evaluator of circuits on the sentences of the tutorial."""
    return circuits.CircuitEvaluator(load_lens(), ioi.examples(load_lens(), 60).of_length()[:6], "flip")


@exercise("a Circuit")
def exercise_8_3(circuit: circuits.Circuit) -> str:
    demand(isinstance(circuit, circuits.Circuit), f"expected a Circuit, got {describe_answer(circuit)}")
    demand(circuit.n_edges <= MAX_EDGES, f"the circuit has {circuit.n_edges} edges; at most {MAX_EDGES} are allowed")
    faithfulness = make_circuit_evaluator().faithfulness(circuit)
    demand(
        faithfulness > MIN_FAITHFULNESS,
        f"the faithfulness of its {circuit.n_edges} edges is {faithfulness:.0%}: what do the edge scores miss?",
    )
    return f"the faithfulness of {circuit.n_edges} edges is {faithfulness:.0%}"
