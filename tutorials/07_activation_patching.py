# %% [markdown]
# # 7 · Activation patching
#
# "When Mary and John went to the store, **John** gave a drink to" ends with "Mary". Write **Mary** in the place of the
# second John, and it ends with "John". One word decides. Where does the model keep that word on its way to the answer?
# We run the one sentence, put in values of the other, place after place, and look when the answer turns.
#
# - **You need**: [tutorial 2](02_hooks.ipynb), or to know what a hook is.
# - **You get**: sweeps with error bars, a feeling for prompts and metrics, and what each of them hides.
# - **Time**: about 50 minutes.

# %%
import numpy as np
import torch

import glmlens
from glmlens import patch, plot
from glmlens.course import check_07 as check
from glmlens.patch import Site
from glmlens.tasks import ioi

lens = glmlens.load(dtype="float32")

# %% [markdown]
# ## 1. One patch by hand
#
# Two prompts of one length. They differ in one token.

# %%
clean = "When Mary and John went to the store, John gave a drink to"
corrupt = "When Mary and John went to the store, Mary gave a drink to"

labels, other = lens.to_labels(clean), lens.to_labels(corrupt)
assert [i for i, (a, b) in enumerate(zip(labels, other, strict=True)) if a != b] == [11]

# %% [markdown]
# What we measure is the logit of the right answer less that of the wrong one, the **logit difference**:
#
# $$m = \ell_{\text{Mary}} - \ell_{\text{John}}$$
#
# It is large and positive for the clean prompt, and about as negative for the corrupt one.

# %%
mary, john = lens.to_single_token(" Mary"), lens.to_single_token(" John")


def difference(logits):
    """Return the logit of Mary minus that of John after the last token."""
    return float(logits[0, -1, mary] - logits[0, -1, john])


at_clean, at_corrupt = difference(lens(clean)), difference(lens(corrupt))
print(f"clean {at_clean:+.2f}, corrupt {at_corrupt:+.2f}")
assert at_clean > 4
assert at_corrupt < -4

# %% [markdown]
# Now a patch: run the corrupt prompt, and at one place put the value of the clean run. We choose the residual stream
# before layer 1, at the word that differs.

# %%
_, acts = lens.run_with_cache(clean, "resid_pre")


def put_clean(x, point):
    x[:, 11] = acts[point.name][:, 11]
    return x


patched = difference(lens.run_with_hooks(corrupt, {"blocks.1.resid_pre": put_clean}))
print(f"patched {patched:+.2f}")
assert abs(patched - at_clean) < 0.5

# %% [markdown]
# The answer is Mary again. To compare many places we say how far the patch has gone from the one run to the other:
#
# $$\text{effect} = \frac{m_\text{patched} - m_\text{corrupt}}{m_\text{clean} - m_\text{corrupt}}$$
#
# An effect of 0 is nothing, and 1 is all of it. This direction, clean values into the corrupt run, is called
# **denoising**.
#
# ### Exercise 7.1 · The effect of a patch
#
# Write a function of a layer and a position that gives the effect of the clean residual stream there (`resid_pre`),
# put into the corrupt run.

# %%
effect = ...  # def effect(layer, position): ...
check.exercise_7_1(effect)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def effect(layer, position):
#     def put(x, point):
#         x[:, position] = acts[point.name][:, position]
#         return x
#
#     m = difference(lens.run_with_hooks(corrupt, {f"blocks.{layer}.resid_pre": put}))
#     return (m - at_corrupt) / (at_clean - at_corrupt)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: the difference itself</summary>
#
# ```python
# def effect(layer, position):
#     def put(x, point):
#         x[:, position] = acts[point.name][:, position]
#         return x
#
#     return difference(lens.run_with_hooks(corrupt, {f"blocks.{layer}.resid_pre": put}))
# ```
#
# A patch that does nothing would not have 0 here. Say it in parts of the way.
#
# </details>
#
# <details>
# <summary>A wrong turn: all positions at once</summary>
#
# ```python
# def effect(layer, position):
#     hooks = {f"blocks.{layer}.resid_pre": lambda x, point: acts[point.name].clone()}
#     m = difference(lens.run_with_hooks(corrupt, hooks))
#     return (m - at_corrupt) / (at_clean - at_corrupt)
# ```
#
# Then all that follows is the clean run, and every effect is 1.
#
# </details>

# %% [markdown]
# ## 2. A sweep
#
# One pair of sentences may be an exception. A task draws as many as we like, with the positions by name: `IO` is the
# one who receives, `S1` and `S2` the two mentions of the giver. The counterfactual "flip" is what we did by hand: the
# other name at `S2`. We take twelve pairs of one length.

# %%
examples = ioi.examples(lens, 60).of_length()[:12]
print(examples[0].item.text)
print(examples[0].positions)
assert examples.accuracy(lens(examples)) == 1

# %% [markdown]
# `sweep` makes the patch at every place of a grid, for all pairs. It runs only what a patch can change. A cell is the
# ratio of means over the pairs.

# %%
site = Site("resid_pre", pos=("IO", "S1", "S2", "verb", "thing", "end"))
grid = patch.sweep(lens, examples, "flip", site, over=("layer", "pos"), progress=False)
plot.patch_grid(grid, title="Who gives, in the residual stream before each layer")

# %% [markdown]
# Read it from below. Before layers 0 and 1 everything is at `S2`. Before layer 3 everything is at the end of the
# sentence. In between it is on the way, and a third of it stands at the verb, where nobody expected it.

# %%
assert grid.at(layer=1, pos="S2") > 0.98
assert grid.at(layer=2, pos="S2") < 0.15
assert 0.2 < grid.at(layer=2, pos="verb") < 0.45
assert 0.5 < grid.at(layer=2, pos="end") < 0.75
assert grid.at(layer=3, pos="end") > 0.99

# %% [markdown]
# ### How sure?
#
# Twelve pairs are a sample. `low` and `high` bound 95 % of the means of pairs drawn again and again (the bootstrap).
# You see them when you point at a cell. Say the interval with the number.

# %%
for pos in ("verb", "end"):
    low, high = grid.low.at(layer=2, pos=pos), grid.high.at(layer=2, pos=pos)
    print(f"before layer 2, {pos:4}: {grid.at(layer=2, pos=pos):.2f}, between {low:.2f} and {high:.2f}")
assert grid.high.at(layer=2, pos="verb") < grid.low.at(layer=2, pos="end")  # the two are apart

# %% [markdown]
# ### What a patch cannot see
#
# The effect at `IO` and `S1` is 0. Does the model not need the names? Of course it does. But these names are the same
# in both prompts. The patch put in what was there already. `unchanged` says where that happened.

# %%
assert grid.unchanged.at(layer=0, pos="IO").values.all()
assert grid.unchanged.at(layer=3, pos="S1").values.all()
assert not grid.unchanged.at(layer=0, pos="S2").values.any()

# %% [markdown]
# **A patch shows only what the two prompts differ in.** The prompts are the question that you ask.
#
# ## 3. Who carries it?
#
# Something has moved the word from `S2` to the end. Only heads can do that. So we patch what each head mixes,
# `attn.z`, in both directions. **Noising** is the other one: corrupt values into the clean run. Here 0 is the clean
# run and 1 the corrupt one.

# %%
heads = patch.sweep(lens, examples, "flip", "attn.z", over=("layer", "head"), direction="both", progress=False)
plot.patch_grid(heads.at(direction="denoise"), title="Heads, denoised")

# %% [markdown]
# Three heads above layer 0 stand out, and the two directions agree about them. (The heads of layer 0 do their part at
# `S2` itself, before the word has moved: patched there alone they have the same effect.)

# %%
carriers = [(1, 3), (2, 3), (1, 7)]
for layer, head in carriers:
    there, back = (heads.at(direction=way, layer=layer, head=head) for way in ("denoise", "noise"))
    print(f"head {layer}.{head}: denoising {there:.2f}, noising {back:.2f}")
    assert there > 0.15
    assert abs(there - back) < 0.1

assert sum(heads.at(direction="denoise", layer=i, head=h) for i, h in carriers) > 1.05

rest = [heads.at(direction="denoise", layer=i, head=h) for i in (1, 2, 3) for h in range(8) if (i, h) not in carriers]
assert max(np.abs(rest)) < 0.12

first = patch.sweep(lens, examples, "flip", Site("attn.z", layer=0, pos="S2"), over=("head",), progress=False)
assert np.abs(first.values - heads.at(direction="denoise", layer=0).values).max() < 0.02

# %% [markdown]
# The directions need not agree. Denoising asks what is **enough** to bring the answer back. Noising asks what is
# **needed** to keep it. Of two parts of which either would do, each alone is enough and none is needed. Of two that
# must come together, each is needed and none alone is enough (Heimersheim and Nanda 2024).
#
# But the three effects sum to more than 1. So they cannot all be separate. Two patches at once will tell. `evaluate`
# takes lists of interventions that hold together.

# %%
sources, swap = examples.counterfactual("flip"), patch.Swap()


def denoise_heads(*chosen):
    """Return the effect of several heads denoised together."""
    together = [patch.Intervention(Site("attn.z", layer=layer, head=head), swap) for layer, head in chosen]
    result = patch.evaluate(lens, sources, [together], examples, sources=examples.tokens, progress=False).mean()
    return float((result - heads.corrupt.mean()) / (heads.clean.mean() - heads.corrupt.mean()))


alone, both = denoise_heads((2, 3)), denoise_heads((1, 7), (2, 3))
print(f"2.3 alone {alone:.2f}, 1.7 and 2.3 together {both:.2f}")
assert abs(both - alone) < 0.05
assert denoise_heads((1, 7)) > 0.15

# %% [markdown]
# 1.7 adds nothing to 2.3. It is the same path, patched twice: 1.7 takes the giver from `S2` to the verb, and 2.3 takes
# it from the verb to the end. That is the third that we saw at the verb. Their patterns say the same:

# %%
_, looks = lens.run_with_cache(examples.tokens, "attn.pattern")
rows = torch.arange(len(examples))


def mean_attention(layer, head, start, to):
    """Return the mean attention of a head from one named position to another."""
    return float(looks["attn.pattern", layer][rows, head, examples.at(start), examples.at(to)].mean())


assert mean_attention(1, 7, "verb", "S2") > 0.99
assert mean_attention(2, 3, "end", "verb") > 0.99
assert mean_attention(1, 3, "end", "S2") > 0.99

# %% [markdown]
# ### Exercise 7.2 · Two heads
#
# Find two heads that bring back more than 80 % of the logit difference when they are denoised together. You may use
# `denoise_heads`.

# %%
pair = ...  # [(layer, head), (layer, head)]
check.exercise_7_2(pair)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# pair = [(1, 3), (2, 3)]
# ```
#
# The straight way and the way over the verb. (1, 3) and (1, 7) does as well: what 1.7 writes is read by 2.3.
#
# </details>
#
# <details>
# <summary>A wrong turn: the same path twice</summary>
#
# ```python
# pair = [(1, 7), (2, 3)]
# ```
#
# Both are links of one chain.
#
# </details>
#
# <details>
# <summary>A wrong turn: large numbers are added</summary>
#
# ```python
# pair = [(1, 3), (0, 6)]
# ```
#
# Head 0.6 is large too. But it works at `S2`, on what 1.3 takes from there.
#
# </details>

# %% [markdown]
# ## 4. Four metrics, one patch
#
# Up to here we measured logit differences. There are other numbers for "how well does it know the answer":
#
# - the **probability** $p$ of the right answer,
# - its **rank**: how many tokens are more probable,
# - the **KL divergence** from the clean run, over all tokens $t$:
#
# $$\text{KL}(\text{clean} \,\|\, \text{patched}) = \sum_t p_\text{clean}(t) \, \log \frac{p_\text{clean}(t)}
# {p_\text{patched}(t)}$$
#
# (You wrote it in [tutorial 6](06_residual_stream.ipynb).)
#
# A metric of our own is a name and a function of logits `[row, read, vocab]` and of which example each row is of. It
# must be higher where the task is done, so rank and KL get a minus. All four become effects in the same way.

# %%
right = torch.tensor([example.correct[0] for example in examples])[:, None]
as_they_are = lens(examples)[:, -1].log_softmax(-1)


def probability(logits, example):
    return logits[:, -1].softmax(-1).gather(-1, right[example])[:, 0]


def rank(logits, example):
    return -(logits[:, -1] > logits[:, -1].gather(-1, right[example])).sum(-1).double()


def divergence(logits, example):
    now = logits[:, -1].log_softmax(-1)
    return -(as_they_are[example].exp() * (as_they_are[example] - now)).sum(-1)


metrics = {
    "logit difference": None,  # the task's own
    "probability": patch.Metric("probability", probability),
    "rank": patch.Metric("- rank", rank),
    "KL": patch.Metric("- KL", divergence),
}

# %% [markdown]
# We patch head 2.3 in both directions and measure it four times.

# %%
effects = {}
for name, metric in metrics.items():
    one = Site("attn.z", layer=2, head=3)
    result = patch.sweep(lens, examples, "flip", one, over=("head",), metric=metric, direction="both", progress=False)
    effects[name] = result.at(head="3").values
    print(f"{name:17} denoising {effects[name][0]:.2f}, noising {effects[name][1]:.2f}")

assert abs(effects["logit difference"][0] - effects["logit difference"][1]) < 0.05
assert 0.2 < effects["logit difference"][0] < 0.4
assert effects["probability"][0] < 0.2
assert effects["rank"][0] > 0.7
assert effects["rank"][1] < 0.15
assert effects["KL"][0] > effects["KL"][1] + 0.3

# %% [markdown]
# One head, one patch: by probability it brings back less than a fifth, by rank most of it. And by rank and KL noising
# finds far less than denoising. Why?
#
# What heads write is added up, and logits are nearly linear in it. The others bend:
#
# - **Probability** is flat at both ends. From far down, a third of the way is still near 0.
# - **Rank** is a count. It jumps over a crowd of unlikely tokens at the first touch, and then has nothing left to see.
# - **KL** counts logarithms of what was probable. From the clean side it is flat at first, like a parabola.
#
# The logit difference sees the same step from both sides. So it is the first choice for sweeps (Zhang and Nanda 2024).
# But it hides something too.
#
# ## 5. What the logit difference hides
#
# Another question: "names" replaces *both* people by others. Neither of the two answers is in the corrupt sentence. We
# put the clean `S2` into it, and nothing else.

# %%
print(examples.task.counterfactuals["names"])
s2 = Site("resid_pre", layer=0, pos="S2")
by_difference, by_probability = (
    patch.sweep(lens, examples, "names", s2, over=("pos",), metric=metrics[name], progress=False)
    for name in ("logit difference", "probability")
)
print(f"logit difference {by_difference.values[0]:.2f}, probability {by_probability.values[0]:.3f}")
assert by_difference.values[0] > 0.45
assert by_probability.values[0] < 0.01

# %% [markdown]
# More than half of the logit difference has come back, and the right answer is as improbable as before! The clean `S2`
# says who gives. So the model says anybody but that one: the *wrong* answer becomes less probable, and that is enough
# for the difference. Of the right one it knows nothing. That name is not in the sentence.
#
# A difference of two numbers does not tell which one moved. Look at them apart.

# %%
wrong = torch.tensor([example.wrong[0] for example in examples])[:, None]


def log_probability(tokens):
    """Return a metric, the log probability of one token per example."""

    def of(logits, example):
        return logits[:, -1].log_softmax(-1).gather(-1, tokens[example])[:, 0]

    return patch.Metric("log probability", of)


moved = {}
for name, tokens in {"right": right, "wrong": wrong}.items():
    asked = {"metric": log_probability(tokens), "normalise": False, "progress": False}
    result = patch.sweep(lens, examples, "names", s2, over=("pos",), **asked)
    moved[name] = float(result.values[0] - result.corrupt.mean())
    print(f"the log probability of the {name} answer moves by {moved[name]:+.2f}")

assert moved["wrong"] < -2
assert abs(moved["right"]) < 0.7

# %% [markdown]
# ### Exercise 7.3 · A metric that is not fooled
#
# Let us set the right answer not against one wrong one but against all other tokens. That is its **log odds**:
#
# $$\log \frac{p_r}{1 - p_r} = \ell_r - \log \sum_{t \ne r} e^{\ell_t}$$
#
# Like a logit difference it is not flat at the ends. Write it as a function of `logits` `[row, vocab]` and the ids of
# the right answers `right` `[row]`, that gives `[row]`. It should hold for answers that are nearly certain, too.

# %%
log_odds = ...  # def log_odds(logits, right): ...
check.exercise_7_3(log_odds)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def log_odds(logits, right):
#     rows = torch.arange(len(right))
#     others = logits.clone()
#     others[rows, right] = -torch.inf
#     return logits[rows, right] - others.logsumexp(-1)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: by way of the probability</summary>
#
# ```python
# def log_odds(logits, right):
#     p = logits.softmax(-1)[torch.arange(len(right)), right]
#     return (p / (1 - p)).log()
# ```
#
# On paper it is the same. But in float32 a certain answer has $p = 1$, and $1 - p$ is 0.
#
# </details>
#
# <details>
# <summary>A wrong turn: against the best of the others</summary>
#
# ```python
# def log_odds(logits, right):
#     rows = torch.arange(len(right))
#     others = logits.clone()
#     others[rows, right] = -torch.inf
#     return logits[rows, right] - others.amax(-1)
# ```
#
# This is a logit difference again. Fifteen other names of one per cent each are more than one of ten.
#
# </details>

# %% [markdown]
# Here is the patch of before, measured so. Of the log odds next to nothing comes back.

# %%


def odds(logits, example):
    p = logits[:, -1].double().log_softmax(-1).gather(-1, right[example])[:, 0]
    return p - torch.log1p(-p.exp())


by_odds = patch.sweep(lens, examples, "names", s2, over=("pos",), metric=patch.Metric("log odds", odds), progress=False)
print(f"log odds {by_odds.values[0]:.3f}, logit difference {by_difference.values[0]:.2f}")
assert by_odds.values[0] < 0.05

# %% [markdown]
# ## 6. A sign that depends on the metric
#
# The heads of layer 3 did nothing under "flip". Under "names" they do. Here they are, noised, by two metrics.

# %%
last = Site("attn.z", layer=3)
two = {
    name: patch.sweep(
        lens, examples, "names", last, over=("head",), metric=metrics[name], direction="noise", progress=False
    )
    for name in ("logit difference", "probability")
}
plot.compare(two, title="Heads of layer 3, noised with other names")

# %%
for name, result in two.items():
    low, high = result.low.at(head=4), result.high.at(head=4)
    print(f"head 3.4 by {name}: {result.at(head=4):+.2f}, between {low:+.2f} and {high:+.2f}")
assert two["logit difference"].at(head=4) < -0.1
assert two["logit difference"].low.at(head=4) < -0.5 < 0.2 < two["logit difference"].high.at(head=4)
assert two["probability"].low.at(head=4) > 0.1

# %% [markdown]
# Without the right values of head 3.4 the logit difference *rises*, as if the head worked against the task. But look at
# the interval: it goes from far below zero to far above. By the probability of the right answer the head is needed, and
# its interval does not reach zero. Both are measured on the same runs. A wide interval is a hint that not all examples
# are alike.
#
# The sentences come in two orders, "Mary and John" (ABBA) and "John and Mary" (BABA). Head 3.4 looks at the second
# name, whoever that is.

# %%
abba = [example.item.slots["order"] == "ABBA" for example in examples]
second = torch.where(torch.tensor(abba), examples.at("S1"), examples.at("IO"))
to_second = looks["attn.pattern", 3][rows, 4, examples.at("end"), second]
assert to_second.min() > 0.95

raw = two["logit difference"].raw.at(head=4).values - two["logit difference"].clean
print(f"ABBA {raw[abba].mean():+.2f}, BABA {raw[~np.array(abba)].mean():+.2f} logits")
assert raw[abba].mean() > 2
assert raw[~np.array(abba)].mean() < -2

# %% [markdown]
# In BABA the second name is the right answer, and without it the difference falls. In ABBA it is the wrong one, and
# the difference rises. The mean over both kinds depends on how many there are of each. With as many of one as of the
# other it could be 0, for a head that decides every single sentence.
#
# **A mean hides what the examples do differently.** `raw` has the number of every pair.
#
# ## What to keep
#
# - Three choices come before every patch: the pair of prompts, the direction and the metric. Report all three.
# - An effect of 0 may mean that both prompts have the same value there.
# - Effects are not shares. Two links of one chain both have the whole effect of the chain.
# - The logit difference is linear and sees both directions alike. It does not see what happens to all other tokens.
#   Look at the log odds or the probability too, and at the examples one by one.
#
# Next: [8 · Circuits](08_circuits.ipynb).
#
# ## Sources
#
# - Vig et al. 2020, *Investigating Gender Bias in Language Models Using Causal Mediation Analysis*, arXiv 2004.12265:
#   effects of parts by putting in values of another run.
# - Meng et al. 2022, *Locating and Editing Factual Associations in GPT*, arXiv 2202.05262: tracing by layer
#   and position.
# - Wang et al. 2022, *Interpretability in the Wild*, arXiv 2211.00593: the sentences, the logit difference.
# - Zhang and Nanda 2024, *Towards Best Practices of Activation Patching in Language Models*, arXiv 2309.16042:
#   corruptions and metrics, and how they disagree.
# - Heimersheim and Nanda 2024, *How to Use and Interpret Activation Patching*, arXiv 2404.15255: what denoising and
#   noising each prove, and pitfalls of metrics.
# - Mueller et al. 2025, *MIB*, arXiv 2504.13151: the counterfactual "flip".
