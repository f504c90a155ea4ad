"""Checks of tutorial 7, activation patching."""

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
    site, asked = patch.Site("resid_pre"), {"metric": (" Mary", " John"), "progress": False}
    right = patch.sweep(load_lens(), CLEAN, CORRUPT, site, over=("layer", "pos"), **asked)
    for layer, position in ((0, 3), (1, 11), (2, 12), (2, 15), (3, 15)):
        found, expected = to_number(effect(layer, position)), right.at(layer=layer, pos=position)
        demand(abs(found) < 2, f"layer {layer}, position {position}: {found:.2f} is no part of the way: divide by it")
        where = f"before layer {layer}, at position {position} ({load_lens().to_labels(CLEAN)[position]})"
        demand(abs(found - expected) < 2e-3, f"{found:.3f} {where}, where it is {expected:.3f}: what did you change?")
    return "the same effects as the sweep finds"


@cache
def draw_flipped_examples() -> Examples:
    return ioi.examples(load_lens(), 40, "check").of_length()[:8]


@exercise("a list of two (layer, head)")
def exercise_7_2(pair: Sequence[Sequence[int]]) -> str:
    chosen = sorted({to_head(one) for one in pair})
    demand(len(chosen) == 2, f"give two heads; these are {len(chosen)}")
    examples = draw_flipped_examples()
    corrupt = examples.counterfactual("flip")
    sites = [patch.Site("attn.z", layer=layer, head=number) for layer, number in chosen]
    together = [patch.Intervention(site, patch.Swap()) for site in sites]
    asked = {"sources": examples.tokens, "allow": "no change", "progress": False}
    base, found = patch.evaluate(load_lens(), corrupt, [[], together], examples, **asked).mean(1).tolist()
    whole = float(examples.measure(load_lens()(examples)).mean())
    back = (found - base) / (whole - base)
    demand(back > 0.8, f"they bring back {back:.0%}: do they stand on two ways, or on one?")
    return f"on other sentences they bring back {back:.0%}"


@exercise("a function of logits and right")
def exercise_7_3(log_odds: Callable[[Tensor, Tensor], Tensor]) -> str:
    examples = draw_flipped_examples()
    right = torch.tensor([example.correct[0] for example in examples])
    clean, other = (load_lens()(tokens)[:, -1] for tokens in (examples.tokens, examples.counterfactual("names")))
    for logits, what in (
        (clean, "the sentences"),
        (other, "sentences about other people"),
        (4 * clean, "sure answers"),
    ):
        rest = logits.double().scatter(-1, right[:, None], -torch.inf).logsumexp(-1)
        expected, found = logits.double().gather(-1, right[:, None])[:, 0] - rest, log_odds(logits, right)
        best = logits.topk(2).values
        margin = best[:, 0] - torch.where(logits.argmax(-1) == right, best[:, 1], best[:, 0])
        against_one = (
            found.shape == margin.shape and what == "the sentences" and torch.allclose(found, margin, atol=1e-3)
        )
        demand(not against_one, "this is the distance to one other token: set it against all of them together")
        sure = "an answer whose probability rounds to 1 has finite odds: do without 1 - p"
        demand(bool(torch.as_tensor(found).isfinite().all()), sure)
        check_equal(
            found, expected.float(), f"of {what}: the right logit, less the log of the sum of all other exp", 1e-3
        )
    return "finite also where the probability rounds to 1"
