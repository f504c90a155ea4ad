"""Checks of the exercises of tutorial 6, the residual stream."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmlens.analysis import logit_attribution
from glmlens.course.feedback import WrongAnswer, check_equal, demand, exercise, load_lens, to_number

PROMPT = "When Mary and John went to the store, John gave a drink to"


@exercise("a function of the logits of a layer and of the output")
def exercise_6_1(kl: Callable[[Tensor, Tensor], Tensor]) -> str:
    draw = torch.Generator().manual_seed(0)
    # Logits with different sums of exponentials, so that a forgotten softmax shows.
    layer, output = torch.randn(2, 50, generator=draw) * 2 + torch.tensor([[3.0], [0.0]])
    q, p = layer.log_softmax(-1), output.log_softmax(-1)
    value = to_number(kl(layer, output))
    demand(abs(value - float((q.exp() * (q - p)).sum())) > 1e-4, "this is KL(layer ‖ output): swap the two")
    demand(abs(to_number(kl(output, output))) < 1e-5, "the KL of a distribution from itself must be 0")
    shifted = to_number(kl(layer + 7, output))
    demand(abs(shifted - value) < 1e-3, "a constant added to all logits changes no probability, so it must not matter")
    right = float((p.exp() * (p - q)).sum())
    demand(abs(value - right) < 1e-4, f"{value:.3f} for the logits of the check; it should be {right:.3f} nats")
    return "0 for the output itself, and positive for everything else"


@exercise("a function of part, s, right and wrong")
def exercise_6_2(adds: Callable[[Tensor, Tensor, int, int], Tensor]) -> str:
    model = load_lens()
    g = model.model.ln_final.weight
    right, wrong = model.to_single_token(" Mary"), model.to_single_token(" John")
    _, acts = model.run_with_cache(PROMPT, ["embed", "attn_out", "mlp_out", "ln_final.scale"])
    s = acts["ln_final.scale"][0, -1, 0]  # one over the root mean square of the last residual stream
    layers = range(model.cfg.n_layers)
    parts = [acts["embed"], *(acts[name, layer] for layer in layers for name in ("attn_out", "mlp_out"))]
    value = torch.stack([torch.as_tensor(adds(part[0, -1], s, right, wrong)) for part in parts])
    direction = model.W_U[:, right] - model.W_U[:, wrong]
    direct = torch.stack([part[0, -1] for part in parts])
    logits = model(PROMPT)[0, -1]
    total = logits[right] - logits[wrong]
    sums = f"the components sum to {float(value.sum()):.2f}; the model's logit difference is {float(total):.2f}"
    if value.shape == s.expand(len(parts)).shape and torch.allclose(value, direct @ direction * s, rtol=1e-3):
        raise WrongAnswer(f"{sums}: what does the final norm do beside scaling?")
    check_equal(value.sum(), total, sums)
    check_equal(value, direct @ (direction * g) * s, "the sum is right, but the contributions are not")
    return f"all components together add {float(value.sum()):.3f}, the model's logit difference"


@exercise("a number")
def exercise_6_3(how_many: Any) -> str:
    attribution = logit_attribution(load_lens(), PROMPT, " Mary", " John", by="neuron")
    adds = attribution.values[3]  # of the neurons of the last layer
    wanted = 0.9 * float(attribution.total)
    # The largest contributions first: how many does the sum need to reach 90% of the total?
    right = int((np.sort(adds)[::-1].cumsum() < wanted).sum()) + 1
    answer = to_number(how_many)
    demand(answer == int(answer), "give a whole number")
    demand(answer >= right, f"the top {int(answer)} neurons together add less than {wanted:.2f} logits")
    demand(answer <= right, "fewer are enough: in which order do you add them, and do all of them add?")
    return f"{right} of {len(adds)} neurons add {wanted:.2f} logits"
