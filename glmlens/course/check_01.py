"""Checks of tutorial 1, from tokens to logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from glmlens.course.feedback import check_equal, demand, exercise, load_lens, to_tensor

PROMPT = "Mary went to the"


@exercise("a function of x, g and eps")
def exercise_1_1(rms_norm: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    draw = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 3, 8, generator=draw) + 1, torch.randn(8, generator=draw)
    right = g * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    found = rms_norm(x, g, 1e-5)
    centred = x - x.mean(-1, keepdim=True)
    layer_norm = g * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    demand(not torch.allclose(found, layer_norm, rtol=0.2), "this is LayerNorm: RMSNorm takes no mean away")
    check_equal(found, right, "each vector over the root of its mean square, times g")
    check_equal(
        rms_norm(x * 1e-4, g, 1.0), g * x * 1e-4, "eps belongs under the root, beside the mean square", within=1e-2
    )
    return "a vector of any length comes out at the same length, and its direction stays (but for g)"


@exercise("a function of q, k and v")
def exercise_1_2(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    _, acts = load_lens().run_with_cache(PROMPT, ["attn.q_rot", "attn.q_pass", "kv.k", "kv.v", "attn.z"])
    for layer, head in ((1, 7), (3, 4), (0, 0)):
        q = torch.cat([acts["attn.q_rot", layer], acts["attn.q_pass", layer]], -1)[0, :, head]
        k, v = (acts[name, layer][0, :, head // load_lens().cfg.n_groups] for name in ("kv.k", "kv.v"))
        z, right = attend(q, k, v), acts["attn.z", layer][0, :, head]
        check_equal(z[:1], right[:1], "the first position can look at itself only: it must give its own value")
        check_equal(
            z, right, f"head {layer}.{head} mixes otherwise: is every score over √d, and softmax over the keys?"
        )
    return "the same mixture as in heads 1.7, 3.4 and 0.0"


@exercise("a function of the residual stream")
def exercise_1_3(next_token: Callable[[Tensor], Tensor]) -> str:
    logits, acts = load_lens().run_with_cache(PROMPT, "blocks.3.resid_post")
    assert logits is not None
    found, right = next_token(acts["resid_post", 3][0]), logits[0, -1].softmax(-1)
    check_equal(to_tensor(found, right).sum(), torch.tensor(1.0), "probabilities sum to 1")
    check_equal(
        found, right, "not what the model says: what stands between the stream and the unembedding?", within=1e-3
    )
    best = int(found.argmax())
    return f"after {PROMPT!r} comes {load_lens().to_str_tokens(torch.tensor([[best]]))[0]!r}, {float(found[best]):.1%}"
