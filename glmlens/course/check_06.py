"""Checks of tutorial 6, the residual stream."""

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
    layer, output = torch.randn(2, 50, generator=draw) * 2 + torch.tensor([[3.0], [0.0]])
    q, p = layer.log_softmax(-1), output.log_softmax(-1)
    found = to_number(kl(layer, output))
    demand(abs(found - float((q.exp() * (q - p)).sum())) > 1e-4, "this is KL(layer ‖ output): the other way round")
    demand(abs(to_number(kl(output, output))) < 1e-5, "an answer is at distance 0 from itself")
    demand(
        abs(to_number(kl(layer + 7, output)) - found) < 1e-3, "a constant added to all logits changes no probability"
    )
    right = float((p.exp() * (p - q)).sum())
    demand(abs(found - right) < 1e-4, f"for the logits that were tried it should be {right:.3f} nats, not {found:.3f}")
    return "zero for the output itself, and never less"


@exercise("a function of part, s, right and wrong")
def exercise_6_2(adds: Callable[[Tensor, Tensor, int, int], Tensor]) -> str:
    model, g = load_lens(), load_lens().model.ln_final.weight
    right, wrong = model.to_single_token(" Mary"), model.to_single_token(" John")
    _, acts = model.run_with_cache(PROMPT, ["embed", "attn_out", "mlp_out", "ln_final.scale"])
    s = acts["ln_final.scale"][0, -1, 0]
    layers = range(model.cfg.n_layers)
    parts = [acts["embed"], *(acts[name, layer] for layer in layers for name in ("attn_out", "mlp_out"))]
    found = torch.stack([torch.as_tensor(adds(part[0, -1], s, right, wrong)) for part in parts])
    direction = model.W_U[:, right] - model.W_U[:, wrong]
    direct = torch.stack([part[0, -1] for part in parts])
    logits = model(PROMPT)[0, -1]
    whole = logits[right] - logits[wrong]
    said = f"the parts sum to {float(found.sum()):.2f}, and the model says {float(whole):.2f}"
    if found.shape == s.expand(len(parts)).shape and torch.allclose(found, direct @ direction * s, rtol=1e-3):
        raise WrongAnswer(f"{said}: what else does the last norm do?")
    check_equal(found.sum(), whole, said)
    check_equal(found, direct @ (direction * g) * s, "the sum is right, but the parts are not")
    return f"all parts together add {float(found.sum()):.3f}, which is what the model says"


@exercise("a number")
def exercise_6_3(how_many: Any) -> str:
    found = logit_attribution(load_lens(), PROMPT, " Mary", " John", by="neuron")
    adds, wanted = found.values[3], 0.9 * float(found.total)
    right = int((np.sort(adds)[::-1].cumsum() < wanted).sum()) + 1
    answer = to_number(how_many)
    demand(answer == int(answer), "a whole number, please")
    demand(answer >= right, f"the {int(answer)} that add most add less than {wanted:.2f} logits together")
    demand(answer <= right, "fewer are enough: which should come first, and do all of them add?")
    return f"{right} of {len(adds)} neurons add {wanted:.2f} logits"
