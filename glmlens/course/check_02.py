"""Checks of the exercises of tutorial 2, hooks."""

from typing import Any

import torch

from glmlens.course.feedback import check_equal, check_hooks, demand, exercise, load_lens
from glmlens.hooks import Edit, Hooks

PROMPT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"


@exercise("a function of a head that returns a hook")
def exercise_2_1(silence: Any) -> str:
    hooks = [
        (head, silence(head)) for head in (0, 3, 7)
    ]  # all hooks are made before one runs: none may share a variable
    for head, hook in hooks:
        demand(callable(hook), f"silence({head}) must return a function, the hook; it returned {hook!r:.60}")
        _, before = load_lens().run_with_cache(PROMPT, "blocks.2.attn.z")
        _, after = load_lens().run_with_cache(PROMPT, "blocks.2.attn.z", {"blocks.2.attn.z": hook})
        right = before["attn.z", 2].index_fill(2, torch.tensor(head), 0)
        demand(bool((after["attn.z", 2][:, :, head] == 0).all()), f"silence({head}) does not set head {head} to zero")
        check_equal(
            after["attn.z", 2], right, f"silence({head}) changes other heads as well: which axis is the head axis?"
        )
    return "each hook sets its own head to zero, and no other"


@exercise("a hook, fn(x, point)")
def exercise_2_2(read_mary: Edit) -> str:
    names = ("embed",)
    _, edited = load_lens().run_with_cache(PROMPT, names, {"embed": read_mary})
    _, clean = load_lens().run_with_cache(PROMPT, names)
    changed = (edited["embed"] != clean["embed"]).any(-1)[0].nonzero().flatten().tolist()
    labels = load_lens().to_labels(PROMPT)
    listed = ", ".join(f"{i} ({labels[i]})" for i in changed) or "none"
    demand(len(changed) == 1, f"positions that changed: {listed}; exactly one should change")
    demand(labels[changed[0]] == "·John", f"the changed position is {listed}: do you count the prefix tokens?")
    demand(changed[0] > 6, "this is the first John; the giver is the second John")
    check_equal(
        load_lens().run_with_hooks(PROMPT, {"embed": read_mary}),
        load_lens()(OTHER),
        "the new value should be the embedding of ·Mary",
    )
    return f"the same logits as for {OTHER!r}"


@exercise("hooks, {point: hook}")
def exercise_2_3(hooks: Hooks) -> str:
    she = load_lens().to_single_token(" She")
    plain, run = (load_lens().generate(PROMPT, 8, names="logits", hooks=given) for given in (None, check_hooks(hooks)))
    logits = run.acts["logits"][0]  # [step, vocab]
    before = plain.acts["logits"][0]
    chosen = plain.new_tokens[0].tolist().index(she)
    early = [step for step in range(chosen) if not torch.equal(logits[step], before[step])]
    demand(not early, f"the logits of step {early[:1]} changed: which step chooses 'She'? Steps count from 0")
    same = torch.equal(logits[chosen], before[chosen])
    demand(not same, "no logit changed at the step that chooses 'She'. Steps count from 0, and step 0 chooses 'Mary'")
    value = float(logits[chosen, she])
    demand(value == -torch.inf, f"the logit of 'She' at that step is {value:.2f}: its probability is not zero")
    others = torch.arange(logits.shape[1]) != she
    check_equal(logits[chosen][others], before[chosen][others], "the logits of other tokens should not change")
    demand(bool(logits[chosen + 1 :].isfinite().all()), "the token is banned at later steps as well")
    return f"the model now generates {run.text!r}"
