# %% [markdown]
# # 8 · Circuits
#
# A patch says *that* a head matters. A circuit says *how*: who writes what, and who reads it. In GPT-2 the circuit of
# "Mary and John" ends in heads that name the one who receives. One would expect the same of this small GLM. It is not
# so. This tutorial finds out what is there instead, and how far such a finding can be trusted.
#
# - **You need**: [tutorial 7](07_activation_patching.ipynb).
# - **You get**: attribution patching and where it is blind, path patching, edges, circuits, and numbers for how
#   faithful they are, with the cases in which these numbers lie.
# - **Time**: about 55 minutes.

# %%
import numpy as np

import glmlens
from glmlens import analysis, circuits, patch, plot
from glmlens.course import check_08 as check
from glmlens.patch import Site
from glmlens.results import Labelled
from glmlens.tasks import induction, ioi

lens = glmlens.load(dtype="float32")
examples = ioi.examples(lens, 60).of_length()[:6]
print(examples[0].item.text, "→", examples[0].item.correct[0])
quiet = {"progress": False}

# %% [markdown]
# ## 1. All patches at once
#
# A sweep runs the model once for every cell. A gradient gets all cells from one backward pass. If $a$ is a value in the
# clean run, $a'$ the one in the corrupt run and $m$ the metric, then to first order the patch changes the metric by
#
# $$\Delta m \approx (a' - a) \cdot \frac{\partial m}{\partial a}$$
#
# This is **attribution patching** (Nanda 2022). Here it is for all heads, and beside it what the patches really do. In
# this tutorial we noise: the corrupt value goes into the clean run. And we leave the change in logits, undivided. So
# what the task needs is negative.

# %%
estimated = patch.attribution_patch(lens, examples, "flip", "attn.z", over=("layer", "head"))
asked = {"direction": "noise", "normalise": False, **quiet}


def measure_heads(point):
    """Return the change of the metric by patching each head."""
    result = patch.sweep(lens, examples, "flip", point, over=("layer", "head"), **asked)
    return Labelled(result.values - result.clean.mean(), result.axes, result.labels, result.about)


patched = measure_heads("attn.z")
plot.compare({"estimated": estimated, "exact": patched}, what="change")

# %%
agreement = np.corrcoef(estimated.values.ravel(), patched.values.ravel())[0, 1]
print(f"correlation {agreement:.3f}")
print(f"head 1.3: estimated {estimated.at(layer=1, head=3):+.2f}, exact {patched.at(layer=1, head=3):+.2f}")
assert agreement > 0.95
assert patched.at(layer=1, head=3) < estimated.at(layer=1, head=3) < -4

# %% [markdown]
# The order is right. The numbers are too small: the model bends, and a tangent does not. As a first look at a large
# model it is worth a lot. But see what it does one step earlier.
#
# ## 2. Where the tangent is flat
#
# We patch queries instead, `attn.q`.

# %%
queries = measure_heads("attn.q")
tangent = patch.attribution_patch(lens, examples, "flip", "attn.q", over=("layer", "head"))
corrected = patch.attribution_patch(lens, examples, "flip", "attn.q", over=("layer", "head"), method="atp*")
plot.compare({"estimated": tangent, "corrected": corrected, "exact": queries}, what="change")

# %%
good, better = (np.corrcoef(result.values.ravel(), queries.values.ravel())[0, 1] for result in (tangent, corrected))
print(f"head 0.6: estimated {tangent.at(layer=0, head=6):+.2f}, exact {queries.at(layer=0, head=6):+.2f}")
print(f"correlation: estimated {good:.2f}, corrected {better:.2f}")
assert queries.at(layer=0, head=6) < -2
assert abs(tangent.at(layer=0, head=6)) < 0.4
assert good < 0.6
assert better > 0.9

# %% [markdown]
# Head 0.6 is worth more than two logits, and the estimate says almost nothing. The reason is the softmax. Its slope is
#
# $$\frac{\partial a_j}{\partial s_j} = a_j (1 - a_j)$$
#
# A head that puts all of its attention on one place has $a_j = 1$, and the slope is 0. It is **saturated**. A small
# step in the query changes nothing. The whole step turns the head away.

# %%
_, acts = lens.run_with_cache(examples, "attn.pattern")
certain = acts["attn.pattern", 0][range(len(examples)), 6, examples.at("S2")].amax(-1)
print(f"at S2 head 0.6 puts {float(certain.mean()):.0%} on one place")
assert certain.mean() > 0.9

# %% [markdown]
# AtP* repairs this: it computes the pattern that the other query would make, softmax and all, and takes the gradient
# behind it (Kramár et al. 2024). That is the picture in the middle. What it cannot repair is the bend of
# everything above.
#
# ### Exercise 8.1 · The corrected estimate
#
# For one query position, write the corrected estimate. Given are the scores `s` `[key]`, the change of the scores
# `change` `[key]` that the other query makes, and the gradient `slope` `[key]` of the metric at the *pattern*.

# %%
fix = ...  # def fix(s, change, slope): ...
check.exercise_8_1(fix)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def fix(s, change, slope):
#     return (((s + change).softmax(-1) - s.softmax(-1)) * slope).sum(-1)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: the tangent again</summary>
#
# ```python
# def fix(s, change, slope):
#     a = s.softmax(-1)
#     return (a * (slope - (a * slope).sum(-1)) * change).sum(-1)
# ```
#
# This is the derivative of the softmax, times the change. It is 0 where the head is certain.
#
# </details>
#
# <details>
# <summary>A wrong turn: exponentials of the change</summary>
#
# ```python
# def fix(s, change, slope):
#     a = s.softmax(-1)
#     other = a * change.exp()
#     return ((other / other.sum(-1) - a) * slope).sum(-1)
# ```
#
# On paper it is the same. But scores of this model lie apart by hundreds. A share of $e^{-200}$ is 0 already, and
# $e^{100}$ is no number in float32.
#
# </details>

# %% [markdown]
# ## 3. Who names the one who receives?
#
# The residual stream is a sum, so a logit is a sum too: every part adds its own piece. In GPT-2 a few late heads add
# most of this logit difference, the "name movers" (Wang et al. 2022). Here:

# %%
by_head = analysis.logit_attribution(lens, examples, by="head")
by_mlp = analysis.logit_attribution(lens, examples, by="mlp")
print(f"all 32 heads together {by_head.values.sum():+.2f}")
print("MLPs", [f"{value:+.2f}" for value in by_mlp.values])
assert abs(by_head.values.sum()) < 0.3
assert by_mlp.at(layer=3) > 5

# %% [markdown]
# No head names anybody. The last MLP adds nearly everything. Then what do the heads do?
#
# **Path patching** asks about one way at a time. A sender gets its corrupt value. All other heads are held as they
# were. So the change can reach the logits only directly, or through MLPs if these may be computed again.

# %%
direct = circuits.path_patch(lens, examples, "flip", Site("logits"), mlps="frozen", **quiet)
through = circuits.path_patch(lens, examples, "flip", Site("logits"), mlps="recomputed", **quiet)
print(f"head 1.3 straight to the logits {direct.at(layer=1, head=3):+.2f}, also through MLPs", end=" ")
print(f"{through.at(layer=1, head=3):+.2f}")
assert abs(direct.values).max() < 0.3
assert through.at(layer=1, head=3) < -6

# %% [markdown]
# So the heads write *who gives*, and MLPs turn it into *who receives*. Head 1.3 does not move a name to the output.
#
# In [tutorial 7](07_activation_patching.ipynb) heads 1.7 and 2.3 were one chain. Path patching proves the link. The
# receiver is now the value that 2.3 reads, which it shares with 2.2: `kv` 1 of layer 2.

# %%
link = circuits.path_patch(lens, examples, "flip", Site("attn.v", layer=2, kv=1), **quiet)
(sender, value), (_, following) = link.top(2)
all_of_it = patched.at(layer=1, head=7)
print(f"head {'.'.join(sender)}: {value:+.2f} of {all_of_it:+.2f}; the next one {following:+.2f}")
assert sender == ("1", "7")
assert value / all_of_it > 0.85
assert abs(following) < 0.6

# %% [markdown]
# ### Exercise 8.2 · Who feeds head 1.3?
#
# Head 1.3 looks from the end of the sentence at `S2`. What it finds there was written by layer 0. Is it its query, its
# key or its value that carries the difference? Give the receiver, a `Site` of layer 1, through which the heads of layer
# 0 together have most of their effect. (Query head 3 reads key-value head 1.)

# %%
receiver = ...  # Site(...)
check.exercise_8_2(receiver)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# receiver = Site("attn.v", layer=1, kv=1)
# ```
#
# Where 1.3 looks does not depend on who gives. What it finds there does.
#
# </details>
#
# <details>
# <summary>A wrong turn: the query</summary>
#
# ```python
# receiver = Site("attn.q", layer=1, head=3)
# ```
#
# The query is made at the end of the sentence. There the two prompts do not differ yet.
#
# </details>
#
# <details>
# <summary>A wrong turn: the key</summary>
#
# ```python
# receiver = Site("attn.k", layer=1, kv=1)
# ```
#
# The key says where to look. The head looks at `S2` whoever gives.
#
# </details>

# %% [markdown]
# ## 4. Every edge
#
# Now all of it. A **writer** is the embedding, a head or an MLP. A **reader** is a query, a key, a value, an MLP or the
# logits. What writer $u$ adds is in what reader $v$ reads, and this is an **edge**. `0.q6` is the query of head 0.6,
# and `1.v1` the value of key-value head 1 of layer 1, which heads 1.2 and 1.3 share. Attribution gives each edge a
# score (EAP, Syed et al. 2023):
#
# $$\text{score}(u \to v) = (u' - u) \cdot \frac{\partial m}{\partial\, \text{input}_v}$$

# %%
eap = circuits.attribute_edges(lens, examples, "flip")
print(eap.graph.n_edges, "edges; the largest:")
for (writer, reader), score in eap.top(5):
    print(f"  {writer} → {reader}: {score:+.2f}")
assert eap.graph.n_edges == 1055
assert eap.top(1)[0][0] == ("3.mlp", "logits")

# %% [markdown]
# A score is a tangent again, so it is blind where attention is certain. EAP-IG takes the gradient at several points
# between the two prompts and averages (Hanna et al. 2024). The truth is cheap here: leave out one edge, run
# the model, and look. A `CircuitEvaluator` does that with masks.

# %%
ig = circuits.attribute_edges(lens, examples, "flip", method="eap-ig")
run = circuits.CircuitEvaluator(lens, examples, "flip")


def without_edge(edge):
    """Return the change of the metric when the corrupt value goes along this one edge."""
    without = circuits.full_circuit(run.graph).remove_edge(edge)
    return float(run.measure_circuit(without).mean()) - run.full_metric


for edge in [("3.mlp", "logits"), ("1.head3", "3.mlp"), ("embed", "0.q6")]:
    print(f"{edge[0]} → {edge[1]}: EAP {eap[edge]:+.2f}, EAP-IG {ig[edge]:+.2f}, exact {without_edge(edge):+.2f}")

assert without_edge(("embed", "0.q6")) < -2
assert abs(eap["embed", "0.q6"]) < 0.5  # blind
assert ig["embed", "0.q6"] < 1.5 * without_edge(("embed", "0.q6"))  # seen, but overrated
assert abs(ig["1.head3", "3.mlp"] - without_edge(("1.head3", "3.mlp"))) < 0.5

# %% [markdown]
# The edge into the query of head 0.6 is the saturated one of section 2. EAP is blind to it. EAP-IG sees it and rates it
# too high. How much is missed in all? The scores of the embedding's edges should sum to the whole difference between
# the runs. `completeness` is the part that they miss.

# %%
print(f"missed: EAP {eap.completeness:.0%}, EAP-IG {ig.completeness:.0%}")
assert eap.completeness > 0.6
assert ig.completeness < 0.5
plot.circuit(ig, top=24, title="The strongest edges by EAP-IG")

# %% [markdown]
# Read it from below. The embedding goes into queries and values of layer 0. What its heads find goes through the first
# MLP into the values of heads 1.3 and 1.7: the giver. 1.7 hands it on to 2.3. All of it ends in the last MLP, and
# nothing but the last MLP ends in the logits.

# %%
strongest = [edge for edge, _ in ig.top(24)]
assert {writer for writer, reader in strongest if reader == "logits"} == {"3.mlp"}
assert ("1.head7", "2.v1") in strongest
assert {("0.mlp", "1.v1"), ("0.mlp", "1.v3")} <= set(strongest)

# %% [markdown]
# ## 5. A circuit, and how faithful it is
#
# A circuit is a set of edges. Run it: along its edges go the values of the clean run, along all others those of the
# corrupt one. **Faithfulness** says how much of the task is left:
#
# $$f(C) = \frac{m(C) - m(\varnothing)}{m(M) - m(\varnothing)}$$
#
# $M$ is the whole model, $\varnothing$ no edge at all. There are two simple ways to choose. `top_edges` takes the
# largest scores. `greedy_circuit` grows the circuit from the logits backwards, so that every edge leads somewhere.

# %%
small = circuits.greedy_circuit(ig, 106)  # a tenth of all edges
print(small)
print(f"faithful to {run.faithfulness(small):.0%}; all other edges to {run.faithfulness(small.complement()):.0%}")
assert run.faithfulness(small) > 0.85
assert abs(run.faithfulness(small.complement())) < 0.05

# %% [markdown]
# A tenth of the edges carries the task, and the other nine tenths carry nothing of it. It holds for sentences that the
# scores have never seen:

# %%
unseen = ioi.examples(lens, 60, "unseen").of_length()[:6]
elsewhere = circuits.CircuitEvaluator(lens, unseen, "flip").faithfulness(small)
print(f"on other sentences {elsewhere:.0%}")
assert elsewhere > 0.75

# %% [markdown]
# One size of circuit is one choice. MIB (Mueller et al. 2025) takes many, and gives two areas over the share
# of edges $k$: **CPR**, higher is better, and **CMD**, lower is better.
#
# $$\text{CPR} = \int f(C_k)\, dk \qquad \text{CMD} = \int \lvert 1 - f(C_k) \rvert \, dk$$

# %%
curves = {"EAP": run.curve(eap), "EAP-IG": run.curve(ig)}
for name, curve in curves.items():
    print(f"{name:7} CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}")
assert curves["EAP-IG"].cmd < curves["EAP"].cmd
assert curves["EAP-IG"].cpr > curves["EAP"].cpr
plot.compare(curves, what="faithfulness", title="Faithfulness by share of edges")

# %% [markdown]
# ### Exercise 8.3 · A small circuit
#
# Find a circuit of at most 80 of the 1,055 edges that keeps more than 80 % of the logit difference, measured by `run`.
# You may use `eap`, `ig`, `circuits.top_edges` and `circuits.greedy_circuit`, or choose by hand.

# %%
circuit = ...  # a Circuit
check.exercise_8_3(circuit)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# circuit = circuits.greedy_circuit(ig, 80)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: by tangents alone</summary>
#
# ```python
# circuit = circuits.greedy_circuit(eap, 80)
# ```
#
# The saturated edges of layer 0 are missing.
#
# </details>
#
# <details>
# <summary>A wrong turn: more edges</summary>
#
# ```python
# circuit = circuits.greedy_circuit(ig, 211)
# ```
#
# It is faithful. So is the whole model.
#
# </details>

# %% [markdown]
# ## 6. Faithful to what?
#
# Outside the circuit stood the values of the corrupt run. That was a choice. Others put the mean over all corrupt runs
# there, or zeros. The same circuit, three ways:

# %%
by = {way: circuits.CircuitEvaluator(lens, examples, "flip", ablation=way) for way in ("corrupt", "mean", "zero")}
for way, one in by.items():
    print(f"{way:8} {one.faithfulness(small):+.2f}")
assert by["corrupt"].faithfulness(small) > 0.85
assert by["mean"].faithfulness(small) > 1.04
assert abs(by["zero"].faithfulness(small)) < 0.3

# %% [markdown]
# Nearly all of the task, more than all of it, nothing of it. Nothing has changed but what stands *outside*.
#
# - **Corrupt**: both prompts have the same words but one. What they share comes along for free: that there are two
#   names, where the sentence ends, which word is a verb. The circuit carries the difference and rests on the rest.
# - **Zero**: the rest is gone too. No part has ever read such a stream.
# - **Mean**: above 1. What the mean says along the edges outside serves the answer better than what the model itself
#   writes there.
#
# A circuit that beats its model does not do what the model does. A number above 1 is no better than 1. CPR rewards it,
# CMD does not. Look at both for the mean:

# %%
other = by["mean"].curve(ig)
print(f"mean: CPR {other.cpr:.2f}, CMD {other.cmd:.2f}; corrupt: CPR {curves['EAP-IG'].cpr:.2f}, CMD", end=" ")
print(f"{curves['EAP-IG'].cmd:.2f}")
assert other.cpr > curves["EAP-IG"].cpr
assert other.cmd > 1.5 * curves["EAP-IG"].cmd

# %% [markdown]
# By CPR the mean looks better, by CMD it is worse. And the corrupt prompt is itself a choice. "flip" exchanges who
# gives. "abc" names three people once each, so the circuit must also carry who they are. It was not made for that:

# %%
three = circuits.CircuitEvaluator(lens, examples, "abc")
print(f"flip {run.faithfulness(small):.2f}, abc {three.faithfulness(small):.2f}")
assert three.faithfulness(small) < run.faithfulness(small) - 0.2

# %% [markdown]
# A faithfulness says something only with its choices (Miller et al. 2024). `describe_choices()` lists them.

# %%
three.describe_choices()

# %% [markdown]
# ## 7. Parts that stand in for others
#
# Here is the last trap. We leave the sentences, and go back to random words said again ([tutorial
# 3](03_attention_heads.ipynb)). Seven heads of layer 3 copy. We noise them one by one, and all together.

# %%
repeats = induction.examples(lens, 6)
sources = repeats.counterfactual("copied")
print(repeats.task.counterfactuals["copied"])
copying = [(3, head) for head in (0, 1, 2, 3, 4, 5, 7)]
single = [[patch.Intervention(Site("attn.z", layer=i, head=h), patch.Swap())] for i, h in copying]
variants = [[], *single, [one for (one,) in single]]
full, *alone, together = patch.evaluate(lens, repeats, variants, repeats, sources=sources, **quiet).mean(1).tolist()
lost = [value - full for value in alone]
print(f"one by one {', '.join(f'{x:+.1f}' for x in lost)}; their sum {sum(lost):+.1f}, together {together - full:+.1f}")
assert min(lost) > -2.5
assert together - full < 2 * sum(lost)
assert full > 10 > 1 > together

# %% [markdown]
# Each of them seems to be worth little. Together they are worth more than twice the sum, and the answer is gone: what
# one no longer brings, the others still do. Whoever takes heads one by one, and throws out what costs little,
# throws out the answer.
#
# In larger models it goes further: when a head is taken away, later heads step in for it (the backup name movers of
# Wang et al. 2022; the Hydra effect, McGrath et al. 2023). Does this model repair its sentences too? The two ways of
# tutorial 7 can tell. If the one stood in for the other, both together would be worth more than their sum.

# %%
ways = [[patch.Intervention(Site("attn.z", layer=i, head=3), patch.Swap())] for i in (1, 2)]
variants = [[], *ways, ways[0] + ways[1]]
corrupt = examples.counterfactual("flip")
full, first, second, both = (
    patch.evaluate(lens, examples, variants, examples, sources=corrupt, **quiet).mean(1).tolist()
)
print(f"1.3 {first - full:+.2f}, 2.3 {second - full:+.2f}, both {both - full:+.2f}")
assert abs((first - full) + (second - full) - (both - full)) < 0.8

# %% [markdown]
# They simply add. Nobody steps in. Here the parts can be taken one at a time; in the words said again they cannot. You
# only know after you have tried them together.
#
# ## What to keep
#
# - Attribution is a first look. It is blind where a softmax is certain, and AtP* opens that eye.
# - A circuit of another model is a guess, not a result. Here no head names the one who receives: heads bring who gives,
#   and the last MLP says the other one.
# - Faithfulness needs its choices beside it: the corrupt prompt, the ablation, the metric. Above 1 is not better.
# - What is small alone may be everything together.
#
# Next: [9 · Generation](09_generation.ipynb).
#
# ## Sources
#
# - Nanda 2022, *Attribution Patching: Activation Patching At Industrial Scale*, neelnanda.io.
# - Kramár et al. 2024, *AtP\**, arXiv 2403.00745: saturated attention.
# - Wang et al. 2022, *Interpretability in the Wild*, arXiv 2211.00593: the circuit of GPT-2; faithfulness,
#   completeness, minimality; path patching.
# - Goldowsky-Dill et al. 2023, *Localizing Model Behavior with Path Patching*, arXiv 2304.05969.
# - Syed, Rager and Conmy 2023, *Attribution Patching Outperforms Automated Circuit Discovery*, arXiv 2310.10348: EAP.
# - Hanna, Pezzelle and Belinkov 2024, *Have Faith in Faithfulness*, arXiv 2403.17806: EAP-IG, greedy circuits.
# - Mueller et al. 2025, *MIB*, arXiv 2504.13151: CPR and CMD.
# - Miller et al. 2024, *Transformer Circuit Faithfulness Metrics Are Not Robust*, arXiv 2407.08734: what
#   faithfulness depends on.
# - McGrath et al. 2023, *The Hydra Effect*, arXiv 2307.15771: parts that step in.
