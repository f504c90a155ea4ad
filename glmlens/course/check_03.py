"""Checks of tutorial 3, attention heads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glmlens.analysis.circuits import kv_head_of
from glmlens.course.feedback import WrongAnswer, check_equal, demand, exercise, load_lens, to_head
from glmlens.hook_points import Point
from glmlens.hooks import Hooks
from glmlens.recording.activations import Activations

N_WORDS, N_ROWS = 15, 6


def run_repeated_words(hooks: Hooks | None = None) -> tuple[int, Activations]:
    """The length of the prefix, and the patterns, mixtures and inputs of rows of N random words said twice."""
    tokenizer = load_lens().tokenizer
    assert tokenizer is not None
    ids, draw = torch.tensor(tokenizer.list_word_ids()), torch.Generator().manual_seed(7)
    words = torch.stack([ids[torch.randperm(len(ids), generator=draw)[:N_WORDS]] for _ in range(N_ROWS)])
    tokens = torch.cat([torch.tensor(tokenizer.prefix).expand(N_ROWS, -1), words, words], 1)
    names = ["attn.pattern", "attn.z", "ln1.normalized"]
    return len(tokenizer.prefix), load_lens().run_with_cache(tokens, names, hooks, logits=False)[1]


def measure_attention_share(a: Tensor, prefix: int, back: int) -> Tensor:
    """Of the attention of words said for the second time, [batch, head, query, key], what goes so far back: [head]."""
    i = torch.arange(prefix + N_WORDS, prefix + 2 * N_WORDS)
    return a[:, :, i, i - back].sum((0, 2)) / a[:, :, i, prefix:].sum((0, 2, 3))


@exercise("a function of a, n and prefix")
def exercise_3_1(induction_score: Callable[[Tensor, int, int], Tensor]) -> str:
    prefix, acts = run_repeated_words()
    uneven = acts["attn.pattern", 3].clone()
    uneven[:, :, :, 0] += 0.5 * uneven[:, :, :, 1:].sum(-1)  # more of it on the prefix: the score must not mind
    uneven /= uneven.sum(-1, keepdim=True)
    for a in (acts["attn.pattern", 3], acts["attn.pattern", 0], uneven):
        found, right = induction_score(a, N_WORDS, prefix), measure_attention_share(a, prefix, N_WORDS - 1)
        check_equal(found, right, explain_scores(found, a, prefix), within=1e-3)
    return "the share of every head, also of those that rest on the prefix"


def explain_scores(scores: Tensor, a: Tensor, prefix: int) -> str:
    """What may be wrong with these scores."""
    for back, said in ((N_WORDS, "this is where the word itself stood"), (N_WORDS - 2, "this is two after the word")):
        if scores.shape == a.shape[1:2] and torch.allclose(scores, measure_attention_share(a, prefix, back), atol=1e-3):
            return f"{said}: what came after it is one further"
    return "of which attention is it a share, and over which queries?"


@exercise("a list of (layer, head)")
def exercise_3_2(heads: Sequence[Sequence[int]]) -> str:
    chosen = [to_head(one) for one in heads]
    demand(0 < len(set(chosen)) <= 5, f"give one to five heads; these are {len(set(chosen))}")
    demand(all(layer < 3 for layer, _ in chosen), "only heads of layers 0 to 2: blind it from below")
    prefix, clean = run_repeated_words()
    means = {layer: clean["attn.z", layer].mean((0, 1)) for layer, _ in chosen}

    def without(z: Tensor, point: Point) -> Tensor:
        for layer, number in chosen:
            if layer == point.layer:
                z[:, :, number] = means[layer][number]
        return z

    _, acts = run_repeated_words({"attn.z": without})
    before, after = (
        float(measure_attention_share(x["attn.pattern", 3], prefix, N_WORDS - 1)[4]) for x in (clean, acts)
    )
    fell = f"the induction score of head 3.4 goes from {before:.2f} to {after:.2f}"
    demand(after < 0.3, f"{fell}: not enough. Which heads write what stood before, and in how many layers are they?")
    return fell


@exercise("a function of x, layer and head")
def exercise_3_3(written: Callable[[Tensor, int, int], Tensor]) -> str:
    model, (_, acts) = load_lens(), run_repeated_words()
    for layer, number in ((1, 7), (3, 5), (0, 2)):
        x, kv = acts["ln1.normalized", layer][0, 9], kv_head_of(model, number)
        without = x @ model.W_V[layer, kv] @ model.W_O[layer, number]
        right, found = without + model.b_V[layer, kv] @ model.W_O[layer, number], written(x, layer, number)
        if found.shape == without.shape and torch.allclose(found, without, rtol=1e-3, atol=1e-3):
            raise WrongAnswer("this is x @ OV; the values have a bias, and it goes through W_O too")
        check_equal(
            found, right, f"head {layer}.{number} writes something else: whose values does it read?", within=1e-3
        )
    return "what the head adds to the stream, if it looks nowhere else"
