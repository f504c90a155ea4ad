"""Checks of the exercises of tutorial 7, activation patching."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from glmlens import patch
from glmlens.course.feedback import check_equal, demand, exercise, load_lens, to_head, to_number
from glmlens.tasks import ioi
from glmlens.tasks.task import Examples

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"


@exercise("a function of a layer and a position")
def exercise_7_1(effect: Callable[[int, int], float]) -> str:
    right = patch.sweep(
        load_lens(),
        CLEAN,
        CORRUPT,
        patch.Site("resid_pre"),
        over=("layer", "pos"),
        metric=(" Mary", " John"),
        progress=False,
    )
    for layer, position in ((0, 3), (1, 11), (2, 12), (2, 15), (3, 15)):
        value = to_number(effect(layer, position))
        expected = right.at(layer=layer, pos=position)
        where = f"before layer {layer}, at position {position} ({load_lens().to_labels(CLEAN)[position]})"
        demand(abs(value) < 2, f"{value:.2f} {where} is not normalised: divide by the difference of the two runs")
        demand(abs(value - expected) < 2e-3, f"{value:.3f} {where}; it should be {expected:.3f}: what did you patch?")
    return "the same effects as those of the sweep"


@cache
def draw_flipped_examples() -> Examples:
    """Return eight sentences of one length that the tutorial does not use."""
    return ioi.examples(load_lens(), 40, "check").of_length()[:8]


@exercise("a list of two (layer, head)")
def exercise_7_2(pair: Sequence[Sequence[int]]) -> str:
    chosen = sorted({to_head(one) for one in pair})
    demand(len(chosen) == 2, f"give two heads; these are {len(chosen)}")
    examples = draw_flipped_examples()
    corrupt = examples.counterfactual("flip")
    sites = [patch.Site("attn.z", layer=layer, head=number) for layer, number in chosen]
    # Both heads of the pair are patched in the same run.
    together = [patch.Intervention(site, patch.Swap()) for site in sites]
    asked = {"sources": examples.tokens, "allow": "no change", "progress": False}
    base, value = patch.evaluate(load_lens(), corrupt, [[], together], examples, **asked).mean(1).tolist()
    clean = float(examples.measure(load_lens()(examples)).mean())
    restored = (value - base) / (clean - base)
    demand(restored > 0.8, f"they restore {restored:.0%}: are they on one path to the output, or on two?")
    return f"on other sentences they restore {restored:.0%} of the logit difference"


@exercise("a function of logits and right")
def exercise_7_3(log_odds: Callable[[Tensor, Tensor], Tensor]) -> str:
    examples = draw_flipped_examples()
    right = torch.tensor([example.correct[0] for example in examples])
    clean, other = (load_lens()(tokens)[:, -1] for tokens in (examples.tokens, examples.counterfactual("names")))
    for logits, case in (
        (clean, "the sentences"),
        (other, "sentences about other people"),
        (4 * clean, "probabilities near 1"),
    ):
        rest = logits.double().scatter(-1, right[:, None], -torch.inf).logsumexp(-1)
        expected = logits.double().gather(-1, right[:, None])[:, 0] - rest
        value = log_odds(logits, right)
        # The difference to the largest other logit, a frequent mistake.
        best = logits.topk(2).values
        margin = best[:, 0] - torch.where(logits.argmax(-1) == right, best[:, 1], best[:, 0])
        against_one = (
            value.shape == margin.shape and case == "the sentences" and torch.allclose(value, margin, atol=1e-3)
        )
        demand(not against_one, "this is the difference to one other token: compare with all others together")
        infinite = "log odds are infinite where the probability rounds to 1: do not compute 1 - p"
        demand(bool(torch.as_tensor(value).isfinite().all()), infinite)
        formula = f"wrong for {case}: it is the right logit minus the logsumexp of all other logits"
        check_equal(value, expected.float(), formula, within=1e-3)
    return "finite also where the probability rounds to 1"
