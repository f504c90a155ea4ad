"""Checks of the exercises of tutorial 3, attention heads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glmlens.analysis.qk_ov_circuits import kv_head_of
from glmlens.course.feedback import WrongAnswer, check_equal, demand, exercise, load_lens, to_head
from glmlens.hook_points import Point
from glmlens.hooks import Hooks
from glmlens.recording.activations import Activations

N_WORDS, N_ROWS = 15, 6


def run_repeated_words(hooks: Hooks | None = None) -> tuple[int, Activations]:
    """Run prompts of random words repeated once; return the length of the prefix and the recorded activations."""
    tokenizer = load_lens().tokenizer
    assert tokenizer is not None
    ids = torch.tensor(tokenizer.list_word_ids())
    draw = torch.Generator().manual_seed(7)  # not the words of the tutorial
    words = torch.stack([ids[torch.randperm(len(ids), generator=draw)[:N_WORDS]] for _ in range(N_ROWS)])
    tokens = torch.cat([torch.tensor(tokenizer.prefix).expand(N_ROWS, -1), words, words], 1)
    names = ["attn.pattern", "attn.z", "ln1.normalized"]
    return len(tokenizer.prefix), load_lens().run_with_cache(tokens, names, hooks, logits=False)[1]


def measure_attention_share(a: Tensor, prefix: int, back: int) -> Tensor:
    """Return the share [head] of attention of the repeated words that goes `back` positions back.

    `a` is [batch, head, query, key]. Attention to the prefix is left out of the total.
    """
    i = torch.arange(prefix + N_WORDS, prefix + 2 * N_WORDS)
    return a[:, :, i, i - back].sum((0, 2)) / a[:, :, i, prefix:].sum((0, 2, 3))


@exercise("a function of a, n and prefix")
def exercise_3_1(induction_score: Callable[[Tensor, int, int], Tensor]) -> str:
    prefix, acts = run_repeated_words()
    # The same pattern with more attention on the prefix: the score must stay the same.
    uneven = acts["attn.pattern", 3].clone()
    uneven[:, :, :, 0] += 0.5 * uneven[:, :, :, 1:].sum(-1)
    uneven /= uneven.sum(-1, keepdim=True)
    for a in (acts["attn.pattern", 3], acts["attn.pattern", 0], uneven):
        value = induction_score(a, N_WORDS, prefix)
        right = measure_attention_share(a, prefix, N_WORDS - 1)
        check_equal(value, right, explain_scores(value, a, prefix), within=1e-3)
    return "the score of every head, also of heads that attend mostly to the prefix"


def explain_scores(scores: Tensor, a: Tensor, prefix: int) -> str:
    """Return a hint about wrong induction scores."""
    off_by_one = (
        (N_WORDS, "this is attention to the earlier occurrence of the token: the one after it is one position further"),
        (N_WORDS - 2, "this is attention to the second token after the earlier occurrence: one position too far"),
    )
    for back, hint in off_by_one:
        if scores.shape == a.shape[1:2] and torch.allclose(scores, measure_attention_share(a, prefix, back), atol=1e-3):
            return hint
    return "which attention is the total of the share, and over which queries is it summed?"


@exercise("a list of (layer, head)")
def exercise_3_2(heads: Sequence[Sequence[int]]) -> str:
    chosen = [to_head(one) for one in heads]
    demand(0 < len(set(chosen)) <= 5, f"give one to five heads; these are {len(set(chosen))}")
    demand(all(layer < 3 for layer, _ in chosen), "choose heads of layers 0 to 2: they write what head 3.4 reads")
    prefix, clean = run_repeated_words()
    means = {layer: clean["attn.z", layer].mean((0, 1)) for layer, _ in chosen}

    def ablate(z: Tensor, point: Point) -> Tensor:
        """Replace the output of the chosen heads of a layer by its mean over prompts and positions."""
        for layer, number in chosen:
            if layer == point.layer:
                z[:, :, number] = means[layer][number]
        return z

    _, acts = run_repeated_words({"attn.z": ablate})
    before, after = (
        float(measure_attention_share(x["attn.pattern", 3], prefix, N_WORDS - 1)[4]) for x in (clean, acts)
    )
    effect = f"the induction score of head 3.4 goes from {before:.2f} to {after:.2f}"
    demand(after < 0.3, f"{effect}: not enough. Which heads attend to the previous token, and in which layers?")
    return effect


@exercise("a function of x, layer and head")
def exercise_3_3(written: Callable[[Tensor, int, int], Tensor]) -> str:
    model = load_lens()
    _, acts = run_repeated_words()
    for layer, number in ((1, 7), (3, 5), (0, 2)):
        x = acts["ln1.normalized", layer][0, 9]
        kv = kv_head_of(model, number)
        without = x @ model.W_V[layer, kv] @ model.W_O[layer, number]
        right = without + model.b_V[layer, kv] @ model.W_O[layer, number]
        value = written(x, layer, number)
        if value.shape == without.shape and torch.allclose(value, without, rtol=1e-3, atol=1e-3):
            raise WrongAnswer("this is x @ OV; the values have a bias, which also goes through W_O")
        check_equal(
            value, right, f"not what head {layer}.{number} writes: which KV head gives it its values?", within=1e-3
        )
    return "what the head adds to the residual stream when it attends to this position only"
