# %% [markdown]
# # 1 · From tokens to logits
#
# A language model reads tokens and says how likely each token of its vocabulary is to come next. This tutorial follows
# one prompt through a GLM, from the text to that answer. Nothing is skipped.
#
# The code that you read here is the code that runs. Each passage is quoted from `glmlens/model.py` by import. After
# each passage we compute the same thing again with a few lines of PyTorch, and assert that the numbers agree.
#
# - **You need**: PyTorch, and the idea of attention.
# - **You get**: every tensor of a GLM by its name, its shape and its formula.
# - **Time**: about 45 minutes. Nothing is downloaded.
#
# There are three exercises. Replace the `...` and run the cell: a check says what it thinks. A solution and a wrong
# turn are folded away below it.

# %%
import torch
from torch.nn import functional as F

import glmlens
from glmlens import analysis, plot
from glmlens.course import check_01 as check
from glmlens.course import source
from glmlens.model import GLM, MLP, Attention, Block, RMSNorm, apply_rotary, eager, softmax

lens = glmlens.load(dtype="float32")
lens

# %% [markdown]
# This is the small GLM inside the package. It has the architecture of GLM-4-9B and is 4,700 times smaller. It was
# trained on a made-up world of simple English, and knows nothing else. Outside of it, it is wrong with confidence.

# %%
size = sum(p.numel() for p in lens.model.parameters())
assert 4_600 < 9_399_951_360 / size < 4_800

# %% [markdown]
# Here is what it says after our prompt. The first line asks: after the last token, `to`, how likely is `Mary`? A rank
# of 0 means that nothing is more probable.

# %%
prompt = "When Mary and John went to the store, John gave a drink to"
lens.test_prompt(prompt, " Mary", top=3)

# %% [markdown]
# ## 1. Text becomes numbers
#
# A tokenizer cuts text into pieces that it knows and gives each its number. A space belongs to the word after it: `·`
# stands for it, above and below. Every GLM prompt begins with the same two tokens, `[gMASK]` and `<sop>`.

# %%
tokens = lens.to_tokens(prompt)
labels = lens.to_labels(prompt)
assert tokens.shape == (1, 16)
assert labels[:2] == ["[gMASK]", "<sop>"]
assert labels[3] == "·Mary"
print(list(zip(labels, tokens[0].tolist(), strict=True)))

# %% [markdown]
# The axes have names, and the names are always the same. `tokens` is `[batch, pos]`: prompts, and positions in them.
#
# Now we run the model once and keep what is at every named point. `acts` is the recording. We hold all that follows
# against it. (Of the points marked "derived" nothing is stored: they are computed from others when you ask, to the same
# bits. `acts["attn.q", 1]` is a point of layer 1, `acts["attn.q"]` that of all layers.)

# %%
logits, acts = lens.run_with_cache(prompt)
acts

# %% [markdown]
# ## 2. Numbers become vectors
#
# The embedding is a table with one row per token. To embed is to take a row:
#
# $$x^{(0)}_i = W_E[t_i] \in \mathbb{R}^{d_\text{model}}$$
#
# Here is the line of the model. `hook("embed", ...)` gives the tensor its name and does nothing else; the next tutorial
# is about it.

# %%
source(GLM.embed_inputs, 'hook("embed", self.embed')

# %%
x = lens.W_E[tokens]
assert torch.equal(x, acts["embed"])
assert x.shape == (1, 16, 192)

# %% [markdown]
# Two tokens that are the same get the same vector, wherever they stand. `·John` is at positions 5 and 11. So far the
# model knows nothing of order.

# %%
assert labels[5] == labels[11] == "·John"
assert torch.equal(x[0, 5], x[0, 11])

# %% [markdown]
# ## 3. One layer
#
# These vectors, one for each position, are the **residual stream**. A layer does not replace them. It adds to them,
# twice: first what attention found at other positions, then what the MLP made of it.
#
# $$x' = x + \text{Attention}(\text{norm}(x)) \qquad x'' = x' + \text{MLP}(\text{norm}(x'))$$

# %%
source(Block.forward, "resid_pre = hook", "return hook")

# %% [markdown]
# Read the lines of `attn_out`, `resid_mid`, `mlp_out` and the last one first: attention, sum, MLP, sum. `ln1` is the
# norm, and soon has a passage of its own. `scope_hook(hook, "ln1")` only puts `ln1.` before the names inside. `angles`,
# `mask` and `kv` belong to attention. `ln1_post` and `ln2_post` do nothing here: newer GLMs have one more norm at these
# places.
#
# The layers are passed one after the other. After the last one comes a norm and the unembedding.

# %%
source(GLM.forward, "for i in layers", "resid = self.unembed")

# %% [markdown]
# What a layer adds is recorded too. So we can assert that it only adds.

# %%
added = acts["attn_out", 0] + acts["mlp_out", 0]
assert torch.allclose(x + added, acts["resid_post", 0], atol=1e-3)
assert torch.equal(acts["resid_pre", 1], acts["resid_post", 0])

# %% [markdown]
# ### The norm
#
# What attention and the MLP read is not the stream itself but the stream at a fixed length. RMSNorm divides a vector by
# the root of its mean square, and multiplies every channel by a learned weight $g$:
#
# $$\text{norm}(x) = g \odot \frac{x}{\sqrt{\frac{1}{d}\sum_j x_j^2 + \epsilon}}$$
#
# There is no mean to subtract and no bias to add (Zhang and Sennrich 2019). `exact` is `x` in float32, since a sum of
# squares needs more digits than bfloat16 has. `scale` is one over the root.

# %%
source(RMSNorm.forward)

# %% [markdown]
# Why is it needed? Look at how long the vectors of the stream become. In this model they grow from about 9 to many
# thousands. Each layer adds to vectors that are longer than those before. With the norm, all layers read the same
# length.

# %%
stream = analysis.accumulated_residual(lens, prompt)
plot.residual_norms(stream, title="The residual stream grows")

# %%
lengths = acts["resid_post"].norm(dim=-1)
assert 7 < acts["embed"].norm(dim=-1).min() < acts["embed"].norm(dim=-1).max() < 10
assert lengths[3].min() > 2_000
read = acts["ln1.normalized", 3] / lens.model.blocks[3].ln1.weight
assert torch.allclose(read.norm(dim=-1), torch.tensor(192.0).sqrt(), rtol=1e-3)  # the same length at every position

# %% [markdown]
# ### Exercise 1.1 · RMSNorm
#
# Write the norm as a function of `x` `[..., model]`, the weight `g` `[model]` and `eps`.

# %%
rms_norm = ...  # def rms_norm(x, g, eps): ...
check.exercise_1_1(rms_norm)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def rms_norm(x, g, eps):
#     return g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn</summary>
#
# ```python
# def rms_norm(x, g, eps):
#     return g * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
# ```
#
# This is LayerNorm without its bias. It takes the mean away first; RMSNorm leaves it in.
#
# </details>

# %% [markdown]
# ## 4. Attention: positions look at each other
#
# Attention is the only part that moves anything from one position to another. Each **head** does it in its own way. Let
# us follow layer 1.
#
# Every position makes a query ("what do I look for"), a key ("what am I") and a value ("what do I give"). Each is a
# linear map of the normed vector $n_i$, plus a bias:
#
# $$q_i = n_i W_Q + b_Q \qquad k_j = n_j W_K + b_K \qquad v_j = n_j W_V + b_V$$
#
# Vectors are rows here, as in the code: `n @ W`.

# %%
source(Attention.forward, "q = hook", "v = hook")

# %% [markdown]
# Look at the axes. There are 8 heads of queries, but only 4 of keys and values. Two query heads share one key-value
# head. That is grouped-query attention (Ainslie et al. 2023): a model that generates caches all its keys and values,
# and here it caches half as much. GLM-4-9B has 32 query heads on 2 key-value heads.

# %%
layer = 1
assert acts["attn.q", layer].shape == (1, 16, 8, 32)  # batch pos head d
assert acts["attn.k", layer].shape == (1, 16, 4, 32)  # batch pos kv d

n = acts["ln1.normalized", layer]
q = torch.einsum("bpm,hmd->bphd", n, lens.W_Q[layer]) + lens.b_Q[layer]
assert torch.allclose(q, acts["attn.q", layer], atol=1e-4)

# %% [markdown]
# ### Where order comes in
#
# Up to here nothing knows which token came first. Now queries and keys are turned. The first 16 of the 32 channels are
# 8 pairs, and each pair turns like the hand of a clock, by an angle that grows with the position. The other channels
# stay as they are. [Tutorial 4](04_rotary.ipynb) is about these angles (Su et al. 2021).

# %%
source(apply_rotary)

# %%
assert lens.cfg.d_rotary == 16
assert torch.equal(acts["kv.k_new", layer][..., 16:], acts["attn.k", layer][..., 16:])  # left alone
assert not torch.equal(acts["kv.k_new", layer][0, 5, :, :16], acts["attn.k", layer][0, 5, :, :16])  # turned

# %% [markdown]
# ### Scores, pattern, mixture
#
# A score says how well a query fits a key. The softmax makes the scores of one query into shares that sum to one: the
# **pattern**. What the head takes is the mixture of the values in these shares.
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{d}} \;\;(j \le i) \qquad a_{ij} = \frac{e^{s_{ij}}}{\sum_{l \le i} e^{s_{il}}}
# \qquad z_i = \sum_{j \le i} a_{ij}\, v_j$$
#
# A query does not see what comes after it: there the mask makes the score the smallest number that there is.

# %%
source(eager)

# %%
pattern = acts["attn.pattern", layer]  # batch head query key
assert torch.allclose(pattern.sum(-1), torch.ones(1, 8, 16))
assert pattern.triu(1).abs().max() == 0  # nothing is taken from later positions
assert torch.equal(pattern, softmax(acts["attn.scores", layer], torch.float32))

# %% [markdown]
# Here is the pattern of head 7 of layer 1, "head 1.7". Read a row: that is a query, and it shows where it looks. The
# bright line below the diagonal says that every token looks at the one before it. (The two of the prefix look at
# themselves.)

# %%
plot.attention_pattern(pattern[0, 7], labels, title="Head 1.7 looks at the token before")

# %%
before = pattern[0, 7].diagonal(-1)[1:]  # from the first word on
assert before.min() > 0.99
print(f"on average {before.mean():.1%} of the attention goes to the token before")

# %% [markdown]
# At last, each head's mixture is mapped back to the width of the stream by its own part of $W_O$, and what the heads
# write is summed:
#
# $$\text{attn\_out}_i = \sum_h z^h_i\, W_O^h$$

# %%
written = torch.einsum("bphd,hdm->bphm", acts["attn.z", layer], lens.W_O[layer])  # what each head writes
assert torch.allclose(written.sum(2), acts["attn_out", layer], atol=1e-3)

# %% [markdown]
# ### Exercise 1.2 · One head
#
# Write the attention of one head: from queries, keys and values `[pos, d]` (already turned) to `z` `[pos, d]`. The
# check tries it on the heads of this model.

# %%
attend = ...  # def attend(q, k, v): ...
check.exercise_1_2(attend)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def attend(q, k, v):
#     scores = q @ k.T / q.shape[-1] ** 0.5
#     later = torch.ones_like(scores, dtype=torch.bool).triu(1)
#     return scores.masked_fill(later, -torch.inf).softmax(-1) @ v
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: later positions are seen</summary>
#
# ```python
# def attend(q, k, v):
#     return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v
# ```
#
# Without the mask a token looks at what comes after it. In training it would see the answer.
#
# </details>
#
# <details>
# <summary>A wrong turn: scores are not scaled</summary>
#
# ```python
# def attend(q, k, v):
#     scores = q @ k.T
#     later = torch.ones_like(scores, dtype=torch.bool).triu(1)
#     return scores.masked_fill(later, -torch.inf).softmax(-1) @ v
# ```
#
# Scores that are too large make patterns that are too sharp.
#
# </details>

# %% [markdown]
# ## 5. The MLP: each position by itself
#
# The MLP looks at one position at a time. It widens the vector to 512 channels twice, as a gate and as a value,
# multiplies the two, and maps the product back. This is SwiGLU (Shazeer 2020):
#
# $$\text{MLP}(n) = \big(n W_\text{up} \odot \text{silu}(n W_\text{gate})\big)\, W_\text{down} \qquad
# \text{silu}(g) = \frac{g}{1 + e^{-g}}$$

# %%
source(MLP.forward)

# %%
n = acts["ln2.normalized", layer]
gate, up = n @ lens.W_gate[layer], n @ lens.W_up[layer]
made = (up * F.silu(gate)) @ lens.W_down[layer]
assert torch.allclose(made, acts["mlp_out", layer], rtol=1e-3, atol=1e-2)

# %% [markdown]
# Most parameters of a transformer are here.

# %%
mlps = sum(p.numel() for block in lens.model.blocks for p in block.mlp.parameters())
assert 0.55 < mlps / size < 0.65
print(f"{mlps / size:.0%} of {size:,} parameters are in the MLPs")

# %% [markdown]
# ## 6. Vectors become logits
#
# After the last layer the stream is normed once more. Its product with every column of the unembedding is a number for
# every token of the vocabulary: the **logits**. Their softmax are the probabilities of the next token.
#
# $$\ell_i = \text{norm}(x^{(L)}_i)\, W_U \qquad p(t \mid t_1 \ldots t_i) = \text{softmax}(\ell_i)_t$$

# %%
last = acts["resid_post", 3]
assert torch.equal(lens.model.ln_final(last), acts["ln_final.normalized"])
assert torch.allclose(acts["ln_final.normalized"] @ lens.W_U, logits, atol=1e-4)
assert logits.shape == (1, 16, lens.cfg.d_vocab)

# %% [markdown]
# There is an answer at every position, not only at the last. At position $i$ the model says what it expects at $i + 1$.

# %%
probabilities = logits[0].softmax(-1)
for i in range(8, 16):
    p, token = probabilities[i].max(-1)
    print(f"{labels[i]:>8} → {lens.tokenizer.label(int(token)):8} {p:.0%}")
assert lens.tokenizer.label(int(logits[0, -1].argmax())) == "·Mary"
assert probabilities[-1].max() > 0.99

# %% [markdown]
# In this model $W_U$ is the transpose of $W_E$: one table is used at both ends. In GLM-4-9B there are two.

# %%
assert lens.cfg.tied
assert torch.equal(lens.W_U, lens.W_E.T)

# %% [markdown]
# ### Exercise 1.3 · Reading the end of the stream
#
# Write a function that takes the residual stream after the last layer, `[pos, model]`, and gives the probabilities
# `[vocab]` of the token that comes after the last position. You may use `lens.model.ln_final` and `lens.W_U`.

# %%
next_token = ...  # def next_token(resid): ...
check.exercise_1_3(next_token)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def next_token(resid):
#     return (lens.model.ln_final(resid[-1]) @ lens.W_U).softmax(-1)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn</summary>
#
# ```python
# def next_token(resid):
#     return (resid[-1] @ lens.W_U).softmax(-1)
# ```
#
# The norm is missing. The largest logit may well be the same, but the stream is much too long, so the
# model seems to be certain of everything.
#
# </details>

# %% [markdown]
# ## 7. All at once
#
# The whole model is a table, four layers and a table. Here it is once more, with the modules that we have read. The
# result is that of the library, bit by bit.

# %%
from glmlens.hooks import off
from glmlens.model import additive_mask, rotary_angles

positions = torch.arange(16)[None]
angles = rotary_angles(positions, lens.cfg, torch.float32)
mask = additive_mask(positions, positions, torch.float32)

resid = lens.model.embed(tokens)
for block in lens.model.blocks:
    resid = block(resid, angles, mask, kv=None, hook=off)
by_hand = lens.model.unembed(lens.model.ln_final(resid))

assert torch.equal(by_hand, logits)

# %% [markdown]
# To generate is to do this again and again: take the most probable token, put it behind the prompt, and run once more.

# %%
text = tokens
for _ in range(8):
    following = lens(text)[:, -1].argmax(-1, keepdim=True)
    if int(following) in lens.stop_ids:
        break
    text = torch.cat([text, following], 1)

text_after = "".join(lens.to_str_tokens(text)[16:])
assert text_after == lens.generate(prompt, max_new_tokens=8).text
print(prompt + text_after)

# %% [markdown]
# ## What to keep
#
# - The residual stream is a sum. Layers only add to it.
# - Attention moves things between positions. MLPs work at one position.
# - Every tensor on the way has a name, and you have now seen nearly all of them: `lens.points()` lists them.
#
# Next: [2 · Hooks](02_hooks.ipynb), where you change them.
#
# ## Sources
#
# - Vaswani et al. 2017, *Attention Is All You Need*, arXiv 1706.03762: scores, pattern, mixture.
# - Zhang and Sennrich 2019, *Root Mean Square Layer Normalization*, arXiv 1910.07467.
# - Shazeer 2020, *GLU Variants Improve Transformer*, arXiv 2002.05202: SwiGLU.
# - Su et al. 2021, *RoFormer*, arXiv 2104.09864: turning queries and keys.
# - Ainslie et al. 2023, *GQA*, arXiv 2305.13245: grouped queries.
# - Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*, transformer-circuits.pub: the residual
#   stream as a sum.
# - GLM Team 2024, *ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All Tools*, arXiv 2406.12793.
