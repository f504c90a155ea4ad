"""Checks of the exercises of tutorial 1, from tokens to logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from glmlens.course.feedback import check_equal, demand, exercise, load_lens, to_tensor

PROMPT = "Mary went to the"


@exercise("a function of x, g and eps")
def exercise_1_1(rms_norm: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=draw) + 1  # a mean other than 0 tells RMSNorm from LayerNorm
    g = torch.randn(8, generator=draw)
    right = g * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    value = rms_norm(x, g, 1e-5)
    centred = x - x.mean(-1, keepdim=True)
    layer_norm = g * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    demand(not torch.allclose(value, layer_norm, rtol=0.2), "this is LayerNorm: RMSNorm does not subtract the mean")
    check_equal(value, right, "divide each vector by the root of its mean square, then multiply by g")
    # With eps much larger than the mean square, the root is about 1 and only g is left.
    small = rms_norm(x * 1e-4, g, 1.0)
    check_equal(small, g * x * 1e-4, "add eps to the mean square, under the root", within=1e-2)
    return "the output has the same length for an input of any length, and the same direction (up to g)"


@exercise("a function of q, k and v")
def exercise_1_2(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    _, acts = load_lens().run_with_cache(PROMPT, ["attn.q_rot", "attn.q_pass", "kv.k", "kv.v", "attn.z"])
    for layer, head in ((1, 7), (3, 4), (0, 0)):
        q = torch.cat([acts["attn.q_rot", layer], acts["attn.q_pass", layer]], -1)[0, :, head]
        k, v = (acts[name, layer][0, :, head // load_lens().cfg.n_groups] for name in ("kv.k", "kv.v"))
        z = attend(q, k, v)
        right = acts["attn.z", layer][0, :, head]
        check_equal(
            z[:1],
            right[:1],
            "the first position attends only to itself, so its output must be its own value: is the mask causal?",
        )
        check_equal(
            z, right, f"not what head {layer}.{head} computes: are scores divided by √d, and is softmax over keys?"
        )
    return "the same outputs as those of heads 1.7, 3.4 and 0.0"


@exercise("a function of the residual stream")
def exercise_1_3(next_token: Callable[[Tensor], Tensor]) -> str:
    logits, acts = load_lens().run_with_cache(PROMPT, "blocks.3.resid_post")
    assert logits is not None
    value = next_token(acts["resid_post", 3][0])
    right = logits[0, -1].softmax(-1)
    check_equal(to_tensor(value, right).sum(), torch.tensor(1.0), "probabilities sum to 1")
    check_equal(
        value,
        right,
        "not the model's probabilities: what is between the residual stream and the unembedding?",
        within=1e-3,
    )
    best = int(value.argmax())
    word = load_lens().to_str_tokens(torch.tensor([[best]]))[0]
    return f"after {PROMPT!r} the most probable token is {word!r}, with {float(value[best]):.1%}"
