# %% [markdown]
# # 3 · Attention heads
#
# Say a few random words, say them again, and a language model knows how to go on. It has never seen these words in this
# order. Something in it looks up what came after the same word before. In this tutorial we find the heads that do it.
# Then we prove that it is they, and read in their weights how they do it.
#
# - **You need**: [tutorial 2](02_hooks.ipynb), or to know what a hook is.
# - **You get**: scores that tell heads apart, ablations that hold up, and the QK and OV circuits of a head.
# - **Time**: about 50 minutes.

# %%
import torch

import glmlens
from glmlens import analysis, plot
from glmlens.course import check_03 as check
from glmlens.course import source

lens = glmlens.load(dtype="float32")

# %% [markdown]
# ## 1. Words said twice
#
# We draw 20 random words, eight times, and say each list twice. All begin with the two tokens of the prefix.

# %%
n, prefix = 20, len(lens.tokenizer.prefix)
ids = torch.tensor(lens.tokenizer.list_word_ids())
draw = torch.Generator().manual_seed(0)
words = torch.stack([ids[torch.randperm(len(ids), generator=draw)[:n]] for _ in range(8)])
tokens = torch.cat([torch.tensor(lens.tokenizer.prefix).expand(8, -1), words, words], 1)
labels = lens.to_labels(tokens[0])
print(" ".join(labels[:12]), "...")
assert tokens.shape == (8, 2 + 20 + 20)

# %%
logits, acts = lens.run_with_cache(tokens, ["attn.pattern", "attn.scores", "attn.z", "ln1.normalized"])


def accuracy(logits):
    """Return the share of words that are predicted at their second occurrence."""
    at = slice(prefix + n, -1)  # the first word of the second list can not be known
    return float((logits[:, at].argmax(-1) == tokens[:, prefix + n + 1 :]).float().mean())


first = float((logits[:, prefix : prefix + n - 1].argmax(-1) == words[:, 1:]).float().mean())
print(f"the first time {first:.0%} are predicted, the second time {accuracy(logits):.0%}")
assert first < 0.02
assert accuracy(logits) > 0.97

# %% [markdown]
# Here is where the heads of the last layer look in the first of these texts. Queries go down, keys to the right. Look
# at the lower half, the second time: there most heads have a bright stripe. It stands 19 tokens below the diagonal.

# %%
plot.attention_heads(acts["attn.pattern", 3][0], labels, n_kv_heads=lens.cfg.n_kv_heads, title="Attention of layer 3")

# %% [markdown]
# ## 2. A score for every head
#
# A picture shows one text. A score is a mean over many places, and it can be held against chance. Let $a_{ij}$ be the
# share of attention that goes from $i$ to $j$. Three questions:
#
# - **previous**: how much goes to the token before?
# - **duplicate**: when a word is said again, how much goes to where it stood before?
# - **induction**: how much goes to what came *after* it before?
#
# Some heads put much of their attention on the prefix, where nothing is said. So the share is taken of the rest:
#
# $$\text{previous} = \frac{\sum_i a_{i,i-1}}{\sum_i \sum_{j \notin \text{prefix}} a_{ij}} \qquad
# \text{induction} = \frac{\sum_i a_{i,i-n+1}}{\sum_i \sum_{j \notin \text{prefix}} a_{ij}}$$
#
# The second is over the words said for the second time, of lists of $n$ words.

# %%
a = acts["attn.pattern", 1][:, 7]  # head 1.7: batch query key
queries = torch.arange(prefix + 1, tokens.shape[1])  # the words that have a word before them
previous = a[:, queries, queries - 1].sum() / a[:, queries, prefix:].sum()
print(f"head 1.7: {previous:.3f}")
assert previous > 0.98

_, first_layer = lens.run_with_cache(tokens, "blocks.0.attn.pattern", logits=False)
resting = first_layer["attn.pattern", 0][:, :, prefix:, :prefix].sum(-1).mean((0, 2))  # head
print("heads of layer 0, on the prefix:", [f"{share:.0%}" for share in resting])
assert resting.min() > 0.15

# %% [markdown]
# `head_scores` does this for every head. Beside each score stands what a head has by chance: one that attends alike to
# all that it sees. Without this number a score says nothing. (Three rows of the table come later or not at all: copying
# is in section 6, `prefix_matching` is induction on texts said four times, `on_prefix` is what rests on the prefix.)

# %%
scores = analysis.head_scores(lens)
assert abs(scores.previous.at(layer=1, head=7) - float(previous)) < 0.02
assert scores.chance["previous"] < 0.1
assert scores.chance["induction"] < 0.05
scores

# %%
plot.head_scores(scores, "previous", n_kv_heads=lens.cfg.n_kv_heads)

# %%
plot.head_scores(scores, "induction", n_kv_heads=lens.cfg.n_kv_heads)

# %% [markdown]
# The two pictures fit together. Heads that look at the token before are in layers 1 and 2. Heads that look at what came
# next are in layer 3, above them. It is the same in large models (Olsson et al. 2022). Of the third kind there is none:
# no head gives much to where the word itself stood before.

# %%
before = [(i, h) for i in range(4) for h in range(8) if scores.previous.at(layer=i, head=h) > 0.9]
inducing = [(i, h) for i in range(4) for h in range(8) if scores.induction.at(layer=i, head=h) > 0.8]
print("previous-token heads:", before)
print("induction heads:     ", inducing)
assert {layer for layer, _ in before} == {1, 2}
assert {layer for layer, _ in inducing} == {3}
assert len(inducing) == 7
assert scores.duplicate.values.max() < 0.2

# %% [markdown]
# ### Exercise 3.1 · The induction score
#
# Write the induction score of all heads of a layer. Given are the pattern `a` `[batch, head, query, key]` of texts like
# ours, the length `n` of the list, and the length `prefix` of the prefix. Wanted is `[head]`.

# %%
induction_score = ...  # def induction_score(a, n, prefix): ...
check.exercise_3_1(induction_score)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def induction_score(a, n, prefix):
#     i = torch.arange(prefix + n, prefix + 2 * n)
#     return a[:, :, i, i - n + 1].sum((0, 2)) / a[:, :, i, prefix:].sum((0, 2, 3))
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: the word itself</summary>
#
# ```python
# def induction_score(a, n, prefix):
#     i = torch.arange(prefix + n, prefix + 2 * n)
#     return a[:, :, i, i - n].sum((0, 2)) / a[:, :, i, prefix:].sum((0, 2, 3))
# ```
#
# $i - n$ is where the same word stood. That is the duplicate score. What came after it is one further.
#
# </details>
#
# <details>
# <summary>A wrong turn: the prefix is counted</summary>
#
# ```python
# def induction_score(a, n, prefix):
#     i = torch.arange(prefix + n, prefix + 2 * n)
#     return a[:, :, i, i - n + 1].mean((0, 2))
# ```
#
# Then a head that rests on the prefix most of the time has a low score, even if all the rest goes to the right place.
#
# </details>

# %% [markdown]
# ## 3. Proof
#
# A head that looks at the right place need not be the one that matters. To know, take it away. In place of what it
# mixes we put its mean over all places and texts: the head still writes, but it no longer says anything about *this*
# place.

# %%
means = [acts["attn.z", layer].mean((0, 1)) for layer in range(4)]  # [head, d] each


def without(heads):
    """Return hooks that replace the output of these heads by its mean."""

    def hook(z, point):
        for layer, head in heads:
            if layer == point.layer:
                z[:, :, head] = means[layer][head]
        return z

    return {"attn.z": hook}


for head in inducing:
    left = accuracy(lens.run_with_hooks(tokens, without([head])))
    print(f"without {head}: {left:.0%}")
    assert left > 0.95

# %% [markdown]
# Nothing happens! Is none of them needed? There are seven, and they do the same. When one is gone the others are
# enough (McGrath et al. 2023 found the same in large models). An ablation of one head can prove that it is needed. It
# never proves that it is *not*.
#
# So take all of them. And take as many others, which are of neither kind, to see that it is not the number that counts.

# %%
others = [(2, 3), (2, 4), (2, 6), (2, 7), (1, 2), (1, 3), (1, 6)]
assert len(others) == len(inducing)
assert not set(others) & set(before + inducing)

lost, spared = (accuracy(lens.run_with_hooks(tokens, without(heads))) for heads in (inducing, others))
print(f"without the induction heads {lost:.1%}, without as many others {spared:.1%}")
assert lost < 0.05
assert spared > 0.95

# %% [markdown]
# That is the proof: without these heads hardly a word is repeated, and without as many others nearly all are.
#
# ## 4. What induction heads rest on
#
# An induction head at the second `basket` must find the place *after* the first `basket`. But the word at that place is
# another one. How can its key say "before me stood basket"? Only if an earlier head has written it there: one that
# looks at the token before. Elhage et al. (2021) call this K-composition. What one head writes is read by another in
# its keys.
#
# If that is so, then without the previous-token heads the induction heads must look elsewhere.
#
# ### Exercise 3.2 · Blind them from below
#
# Find heads in layers 0 to 2, five at most, without which head 3.4 loses its way: its induction score falls below 0.3.
# Give a list of `(layer, head)`. You may use `without` and your `induction_score`.

# %%
heads = ...  # [(layer, head), ...]
check.exercise_3_2(heads)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# heads = before
# ```
#
# These are the five heads with a previous-token score above 0.9: (1, 7), (2, 0), (2, 1), (2, 2) and (2, 5).
#
# </details>
#
# <details>
# <summary>A wrong turn: the best one</summary>
#
# ```python
# heads = [(1, 7)]
# ```
#
# It has the highest score of all, and it is not alone either.
#
# </details>
#
# <details>
# <summary>A wrong turn: one layer</summary>
#
# ```python
# heads = [(2, 0), (2, 1), (2, 2), (2, 5)]
# ```
#
# Head 1.7 is still there, and that is enough for 3.4.
#
# </details>

# %% [markdown]
# Composition can also be read in the weights, without any text. How much of what a head writes falls where a later head
# reads its keys? Two random circuits have $1/\sqrt{d_\text{model}}$ (Elhage et al. 2021, "Three Kinds of Composition").
# $W_{OV} = W_V W_O$ is all that a head does from reading to writing, and $W_{QK} = W_Q W_K^\top$ all that makes a
# score. Both have a section below.
#
# $$\text{composition} = \frac{\lVert W_{OV}\, W_{QK}^\top \rVert}{\lVert W_{OV} \rVert\, \lVert W_{QK} \rVert}$$

# %%
composition = analysis.composition(lens, "K")  # the reader "3.kv2" is the key that heads 3.4 and 3.5 share
best = composition.top(8)
for (writer, reader), value in best:
    print(f"{writer} is read by {reader}: {value:.3f}")

by_chance = lens.cfg.d_model**-0.5
assert all(reader.startswith("3.") for (_, reader), _ in best)  # layer 3 reads most
assert {writer for (writer, _), _ in best} <= {f"{i}.{h}" for i, h in before}  # and only from these heads
assert all(value > 1.5 * by_chance for _, value in best)

# %% [markdown]
# ## 5. QK: where a head looks
#
# A score is a product of two normed vectors with a matrix between them. The matrix is the head's own, and it turns with
# the distance $\delta = i - j$. Biases add a few terms more.
#
# $$s_{ij} = n_i \, W_{QK}(\delta) \, n_j^\top + \ldots \qquad
# W_{QK}(\delta) = \frac{W_Q\, R(\delta)\, W_K^\top}{\sqrt{d}}$$
#
# `QK` is this matrix, kept as its two factors, and `QK_bias` the rest. Together they are the score, to rounding.

# %%
x = acts["ln1.normalized", 1][0]  # what the heads of layer 1 read: pos model
i, j = 10, 7
qk = analysis.QK(lens, 1, 7, distance=i - j)
on_query, on_key, constant = analysis.QK_bias(lens, 1, 7, distance=i - j)
by_weights = x[i] @ qk @ x[j] + x[i] @ on_query + on_key @ x[j] + constant
assert torch.allclose(by_weights, acts["attn.scores", 1][0, 7, i, j], atol=1e-2)

# %% [markdown]
# Now a head that looks at the token before, whatever the tokens are. If it does not care what it reads, the mean of all
# vectors should do as well as any. Let us score this one mean vector against itself at every distance, and put beside
# it what the head does on the real texts.

# %%
mean = acts["ln1.normalized", 1][:, prefix:].mean((0, 1))


def at_distance(delta):
    """Return the score of the mean vector with itself at a distance."""
    on_query, on_key, constant = analysis.QK_bias(lens, 1, 7, distance=delta)
    return float(mean @ analysis.QK(lens, 1, 7, distance=delta) @ mean + mean @ on_query + on_key @ mean + constant)


measured = acts["attn.scores", 1][:, 7, prefix:, prefix:]
profile = torch.tensor(
    [
        [at_distance(delta) for delta in range(12)],
        [float(measured.diagonal(-delta, 1, 2).mean()) for delta in range(12)],
    ]
)
names = {"series": ["the mean vector, by weights", "real texts, measured"], "distance": [str(d) for d in range(12)]}
plot.lines(profile, names, axes=("series", "distance"), what="score", title="Head 1.7: its scores by distance")

# %%
assert profile.argmax(1).tolist() == [1, 1]  # the token before
assert (profile[0] - profile[1]).abs().max() < 15  # the two lines agree
assert profile[0, 1] - profile[0, [0, 2]].max() > 50  # after the softmax nothing is left for the neighbours

# %% [markdown]
# One vector explains the head: it is position alone. The softmax turns a lead of 50 into all of the attention. What
# makes the wave is in [tutorial 4](04_rotary.ipynb).
#
# ## 6. OV: what a head writes
#
# Where a head looks is half of it. The other half is what it takes from there. If all of its attention goes to $j$, it
# adds
#
# $$\text{written} = (n_j\, W_V + b_V)\, W_O$$
#
# to the stream. Where attention is shared, it adds the mixture. `OV` is the matrix $W_V W_O$ of a head.

# %%
source(analysis.OV)

# %% [markdown]
# ### Exercise 3.3 · What is written
#
# Write a function of a normed vector `x` `[model]`, a layer and a head, that gives what the head adds if all its
# attention goes there: `[model]`. Use `lens.W_V[layer, kv]`, `lens.b_V[layer, kv]` and `lens.W_O[layer, head]`. Values
# are shared, as keys are: there are 8 heads, and `kv` is 0 to 3. `lens.cfg.n_groups` heads share one.

# %%
written = ...  # def written(x, layer, head): ...
check.exercise_3_3(written)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def written(x, layer, head):
#     kv = head // lens.cfg.n_groups
#     return (x @ lens.W_V[layer, kv] + lens.b_V[layer, kv]) @ lens.W_O[layer, head]
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: the bias is forgotten</summary>
#
# ```python
# def written(x, layer, head):
#     return x @ lens.W_V[layer, head // 2] @ lens.W_O[layer, head]
# ```
#
# The values of a GLM have a bias.
#
# </details>
#
# <details>
# <summary>A wrong turn: the wrong values</summary>
#
# ```python
# def written(x, layer, head):
#     kv = head % lens.cfg.n_kv_heads
#     return (x @ lens.W_V[layer, kv] + lens.b_V[layer, kv]) @ lens.W_O[layer, head]
# ```
#
# Heads that share values stand side by side: 0 and 1 read the first, 2 and 3 the second, and so on.
#
# </details>

# %% [markdown]
# An induction head should say the word that it looks at. Does it? We take what head 3.5 writes, less its mean, and read
# it with the unembedding: at which rank is the word that comes next? There are 1,110 tokens.


# %%
def rank(layer, head):
    """Return the median rank of the next word in what a head writes there."""
    z = acts["attn.z", layer][:, prefix + n : -1, head]
    out = (z - z.mean((0, 1))) @ lens.W_O[layer, head]
    scores_of_words = (out * lens.model.ln_final.weight) @ lens.W_U
    right = scores_of_words.gather(-1, tokens[:, prefix + n + 1 :, None])
    return int((scores_of_words > right).sum(-1).median())


for head in range(8):
    print(f"head 3.{head}: rank {rank(3, head)}")

assert rank(3, 5) < 10
assert rank(3, 4) < 10
assert rank(3, 6) > 100  # no induction head

# %% [markdown]
# So heads 3.4 and 3.5 copy. There is a shorter test that needs no text, the copying score of the weights (Elhage et al.
# 2021, "Summarizing OV/QK matrices"). Look what it says of them:

# %%
for head in (4, 5):
    print(f"head 3.{head}: copying {scores.copying.at(layer=3, head=head):+.2f}")
    assert scores.copying.at(layer=3, head=head) < 0

# %% [markdown]
# It says that they do not copy. It is not wrong: it asks another question. It reads the *embedding* of a word through
# the head. But in layer 3 a head does not read embeddings. It reads what three layers have made of them. A score from
# weights holds for the layers that read the embedding, and is a hint for all others.
#
# And most of the answer does not come from the heads at all. Of the logit of the right word, the last MLP adds most:
# the heads bring the word, and the MLP says it. [Tutorial 6](06_residual_stream.ipynb) is about this sum.

# %%
at = -5  # one word of the second time, the fifth from the end: asked of the text before it
parts = analysis.logit_attribution(lens, tokens[:, :at], tokens[:, at]).mean()
heads_add, mlp_adds = parts.at(layer=3, sublayer="attn"), parts.at(layer=3, sublayer="mlp")
print(f"of {float(parts.total):.1f} logits, the heads of layer 3 add {heads_add:.1f} and its MLP {mlp_adds:.1f}")
assert mlp_adds > 5 * heads_add > 0

# %% [markdown]
# ## What to keep
#
# - A score is worth something beside its chance.
# - Where a head looks is not what it does. Take it away, and take others away for comparison.
# - Heads stand in for each other. Take away the group.
# - QK says where, OV says what. Weights alone speak of the embedding.
#
# Next: [4 · Rotary positions](04_rotary.ipynb).
#
# ## Sources
#
# - Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*, transformer-circuits.pub: QK and OV
#   circuits, "Three Kinds of Composition", "Summarizing OV/QK matrices", induction heads.
# - Olsson et al. 2022, *In-context Learning and Induction Heads*, arXiv 2209.11895: random words said again, and heads
#   of large models.
# - McGrath et al. 2023, *The Hydra Effect*, arXiv 2307.15771: parts that stand in for others.
# - Wang et al. 2022, *Interpretability in the Wild*, arXiv 2211.00593: the mean in place of a head.
