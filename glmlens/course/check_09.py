"""Checks of the exercises of tutorial 9, generation under intervention."""

import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from glmlens.course.feedback import check_equal, check_hooks, demand, exercise, load_lens, to_tensor
from glmlens.hooks import Hooks, list_edits
from glmlens.tasks import words
from glmlens.timeline.timeline import Timeline, record_timeline

GOOD_WORDS, BAD_WORDS = words.GOOD_ADJECTIVES, words.BAD_ADJECTIVES
GIVING_PROMPT = "When Mary and John went to the store, John gave a drink to"


@cache
def record_giving() -> Timeline:
    """Return the timeline of the tutorial's sentence about giving, up to the end of the line."""
    return record_timeline(load_lens(), GIVING_PROMPT, 12, stop_ids=find_line_end())


def find_line_end() -> list[int]:
    """Return the stop ids: the token of a line break."""
    return load_lens().to_tokens("\n", prefix=False)[0].tolist()


@exercise("(step, word)")
def exercise_9_1(fork: tuple[int, str]) -> str:
    step, word = fork
    text = record_giving().rerun(step, token=word, max_new_tokens=14).text.strip()
    result = f"the model continues with {text!r}"
    demand(word.startswith(" "), f"{word!r}: a token within a sentence begins with a space")
    demand("Mary" in text or step > 0, f"{result}: Mary is missing. Your word replaces the token of that step")
    demand("John was tired" in text, f"{result}: it should say 'John was tired'. Which step has a high entropy?")
    return result


@exercise("a function of two recordings")
def exercise_9_2(direction: Callable[[Tensor, Tensor], Tensor]) -> str:
    # The same four things with every good adjective, and with every bad one.
    prompts = [
        [f"The {thing} was {word}" for thing in words.THING_NOUNS[:4] for word in side]
        for side in (GOOD_WORDS, BAD_WORDS)
    ]
    good, bad = (load_lens().run_with_cache(side, "blocks.1.resid_post")[1]["resid_post", 1] for side in prompts)
    right = good[:, -1].mean(0) - bad[:, -1].mean(0)
    value = direction(good, bad)
    demand(
        not (value.shape == right.shape and torch.allclose(value, -right, atol=0.1)),
        "it points from good to bad: swap the two",
    )
    check_equal(
        value,
        right,
        "not the difference of means: average the last position over the prompts of each side",
        within=1e-3,
    )
    return f"a vector with norm {float(value.norm()):.0f}"


@exercise("a list of (point, hook)")
def exercise_9_3(hooks: Hooks) -> str:
    wrong = [name for name, _ in list_edits(check_hooks(hooks)) if name not in ("blocks.1.resid_post", "resid_post")]
    demand(not wrong, f"there is a hook at {wrong[:1]}: edit blocks.1.resid_post only")
    text = str(load_lens().generate("The hat was", 9, hooks=hooks, stop_ids=find_line_end()).text).rstrip(".\n")
    result = f"the model generates: The hat was{text}"
    adjective = re.match(r" (\w+)", text)
    demand(adjective is not None and adjective[1] in BAD_WORDS, f"{result}. The adjective should stay a bad one")
    demand("feel happy" in text, f"{result}. It should end with 'feel happy': which position does it read this from?")
    return result


@exercise("a function of logits and a temperature")
def exercise_9_4(drawn_from: Callable[[Tensor, float], Tensor]) -> str:
    logits = load_lens()(GIVING_PROMPT)[0, -3]
    spread = [to_tensor(drawn_from(logits, t), logits) for t in (0.5, 1.0, 2.0)]
    check_equal(spread[1].sum(), torch.tensor(1.0), "probabilities sum to 1")
    # A higher temperature gives a flatter distribution, which has a higher entropy.
    entropy = [float(torch.special.entr(p).sum()) for p in spread]
    demand(entropy[0] != entropy[2], "the temperature has no effect: divide before the softmax")
    demand(entropy[0] < entropy[2], "a higher temperature should raise the entropy; here it lowers it")
    for t, p in zip((0.5, 1.0, 2.0), spread, strict=True):
        check_equal(p, (logits / t).softmax(-1), f"these are not the probabilities at temperature {t}", within=1e-3)
    return f"the entropy is {entropy[0]:.2f} at 0.5, {entropy[1]:.2f} at 1 and {entropy[2]:.2f} at 2"
