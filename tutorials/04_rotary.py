# %% [markdown]
# # 4 · Rotary positions
#
# Head 1.7 looks at the token before, whatever the tokens are. How does it know which one that is? A score is a product
# of a query and a key, and a product knows no order. GLM turns half of the channels of both. In this tutorial we take
# the turning apart, find the clock in head 1.7, and set it wrong. At the end we make the model do what it could not.
#
# - **You need**: [tutorial 3](03_attention_heads.ipynb), and that complex numbers turn when they are multiplied.
# - **You get**: a score as a sum of waves, edits of angles, and what the other half of the channels is for.
# - **Time**: about 50 minutes.

# %%
import numpy as np
import torch

import glmlens
from glmlens import analysis, plot
from glmlens.course import check_04 as check
from glmlens.course import source
from glmlens.model import apply_rotary, rotary_angles
from glmlens.patch import rotary
from glmlens.rotary_frequencies import default_frequencies

lens = glmlens.load(dtype="float32")
prompt = "When Mary and John went to the store, John gave a drink to"

# %% [markdown]
# ## 1. Hands of a clock
#
# Every head has 32 channels. The first 16 are 8 **pairs** of neighbours. Before a query meets a key, each pair is
# turned: a token at position $p$ turns pair $i$ by the angle $p\,\omega_i$. The other 16 channels stay as they are.
# They are the head's **content** channels. So a GLM does half a rotation. (GLM-4-9B: 64 of 128 channels.)
#
# $$\omega_i = \theta^{-2i/16} \qquad \theta = 10000$$

# %%
source(rotary_angles)

# %% [markdown]
# `default_frequencies` computes $\omega_i$. The factor is 1 here. Only models whose contexts were stretched have
# another rule.

# %%
source(default_frequencies)

# %%
source(apply_rotary)

# %% [markdown]
# A pair $(a, b)$ is a complex number $a + b\,\mathrm{i}$, and to turn it is to multiply it:
#
# $$\tilde k_p = k_p\, e^{\mathrm{i}\, p\, \omega}$$
#
# The keys before they turn are at `attn.k`, those that go to the KV cache at `kv.k_new`.

# %%
_, acts = lens.run_with_cache(prompt, ["attn.q", "attn.k", "kv.k_new", "attn.scores", "attn.pattern"])
rotated = lens.cfg.d_rotary
before, after = acts["attn.k", 1][0, :, 3], acts["kv.k_new", 1][0, :, 3]  # key-value head 3: pos d
assert (rotated, lens.cfg.d_head) == (16, 32)

frequency = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
angle = torch.arange(16)[:, None] * frequency  # pos pair
as_complex = torch.view_as_complex(before[:, :16].unflatten(-1, (8, 2)).contiguous())
turned = torch.view_as_real(as_complex * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
assert torch.allclose(turned, after[:, :16], atol=1e-4)
assert torch.equal(before[:, 16:], after[:, 16:])  # content does not turn

# %% [markdown]
# The first pair is fast. It turns by one radian per token, and is round after $2\pi \approx 6.28$ tokens. The last one
# needs 19,869. These are their **wavelengths**.

# %%
wavelength = 2 * torch.pi / frequency
for i, length in enumerate(wavelength.tolist()):
    print(f"pair {i}: {length:8,.1f} tokens")
assert torch.allclose(wavelength[[0, 2, 3, 7]], torch.tensor([6.283, 62.83, 198.7, 19869.2]), rtol=1e-3)

# %% [markdown]
# ### Exercise 4.1 · Turn
#
# Write a function that turns `x` `[pos, 32]`, whose rows stand at `positions` `[pos]`. Turn the first 16 channels and
# leave the others.

# %%
rotate = ...  # def rotate(x, positions): ...
check.exercise_4_1(rotate)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def rotate(x, positions):
#     angle = positions[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
#     a, b = x[:, :16:2], x[:, 1:16:2]
#     turned = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
#     return torch.cat([turned.flatten(-2), x[:, 16:]], -1)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: halves in place of neighbours</summary>
#
# ```python
# def rotate(x, positions):
#     angle = positions[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
#     a, b = x[:, :8], x[:, 8:16]
#     return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[:, 16:]], -1)
# ```
#
# Many models pair channel 0 with channel 8. GLM pairs it with channel 1. The same weights are another model then.
#
# </details>
#
# <details>
# <summary>A wrong turn: the width of the head</summary>
#
# ```python
# def rotate(x, positions):
#     angle = positions[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 32)
#     a, b = x[:, :16:2], x[:, 1:16:2]
#     turned = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
#     return torch.cat([turned.flatten(-2), x[:, 16:]], -1)
# ```
#
# The exponent is over the channels that turn, 16, and not over the width of the head.
#
# </details>

# %% [markdown]
# ## 2. A score is a sum of waves
#
# Now a query at position $p$ meets a key at position $r$. Both have turned. In their product only the difference of the
# angles is left (Su et al. 2021). Here $q_i$ and $k_i$ are the pairs before they turn, as complex numbers:
#
# $$s_{pr}\sqrt{d} \;=\; \sum_{i} |q_i|\,|k_i| \cos\big(\varphi_i + \omega_i\,(p - r)\big) \;+\; q_\text{content} \cdot
# k_\text{content} \qquad \varphi_i = \arg q_i - \arg k_i$$
#
# Eight waves over the distance, and one part that no distance changes. `score_parts` gives all of them. It is not an
# approximation: the parts sum to the score.

# %%
parts = analysis.score_parts(lens, prompt, layer=1, head=7)
score = acts["attn.scores", 1][0, 7].numpy()
seen = np.tril(np.ones((16, 16), dtype=bool))
assert parts.part.shape == (16, 16, 9)  # query key part
gap = np.abs(parts.part.values.sum(-1) - score)[seen].max()
assert gap < 1e-5 * np.abs(score[seen]).max()

wave = parts.amplitude.values * np.cos(parts.phase.values + parts.angle.values)
assert np.allclose(wave[seen], parts.part.values[..., :8][seen], atol=1e-3)

# %% [markdown]
# Here are the parts of the scores of the last token, `·to`, for each key. The fastest pair makes a wave that you can
# see. It is by far the largest part.

# %%
plot.score_by_pair(parts, query=-1, title="Head 1.7: what each pair adds to the scores of the last token")

# %% [markdown]
# Only distances are left. So if all tokens stood a thousand positions later, nothing would change. `rotary.shift` puts
# them there. It gives hooks, as everything in `glmlens.patch.rotary` does.

# %%
later = lens.run_with_hooks(prompt, rotary.shift(lens, 1000))
assert torch.allclose(later, lens(prompt), atol=0.01)

queries_later = lens.run_with_hooks(prompt, rotary.shift(lens, 1, of="q"))  # the keys stay where they are
assert (queries_later - lens(prompt)).abs().max() > 5

# %% [markdown]
# ## 3. The clock in head 1.7
#
# What would the head do if all tokens were alike? We take its mean query and its mean key, before they turn, over
# random words said twice. Then nothing is left but distance: one wave for each pair, with a fixed height and a fixed
# phase.

# %%
prefix = len(lens.tokenizer.prefix)
ids = torch.tensor(lens.tokenizer.list_word_ids())


def repeat_words(n, rows=4):
    """Return rows of n random words, each list twice: [row, pos]."""
    draw = torch.Generator().manual_seed(0)
    words = torch.stack([ids[torch.randperm(len(ids), generator=draw)[:n]] for _ in range(rows)])
    return torch.cat([torch.tensor(lens.tokenizer.prefix).expand(rows, -1), words, words], 1)


tokens = repeat_words(20)
profile = analysis.distance_profile(lens, tokens, distances=24)
height, phase = profile.amplitude.values[1, 7], profile.phase.values[1, 7]
distance = np.arange(24)
waves = height[:, None] * np.cos(phase[:, None] + frequency.numpy()[:, None] * distance)  # pair distance
score_by_distance = waves.sum(0) + profile.content.values[1, 7]
assert np.allclose(score_by_distance, profile.score.values[1, 7], rtol=1e-3, atol=0.1)

names = {"series": ["pair 0", "pairs 1 to 7 and content", "all: the score"], "distance": [str(d) for d in distance]}
series = np.stack([waves[0], score_by_distance - waves[0], score_by_distance])
plot.lines(series, names, axes=("series", "distance"), what="score", title="Head 1.7: its waves over distance")

# %% [markdown]
# Look at the first line. The fast pair is highest at distance 1. But it is nearly as high at 7, at 14 and at 20: after
# one, two and three turns. A clock with one hand says "ten past", and not at which hour. The slower pairs are the hour
# hand. They fall, so 1 wins.

# %%
assert all(waves[0, d] > 0.75 * waves[0, 1] for d in (7, 14, 20))
assert waves[0, 20] > 0.98 * waves[0, 1]
assert score_by_distance.argmax() == 1
assert score_by_distance[1] - score_by_distance[[7, 14, 20]].max() > 50

# %% [markdown]
# If this is so, we can say what happens without the slower pairs. The head will confuse the token before with those one
# turn further. `rotary.silence` makes channels zero.


# %%
def attention_by_distance(hooks, layer=1, head=7, far=24):
    """Return the mean attention of a head to each distance: [distance]."""
    _, acts = lens.run_with_cache(tokens, "attn.pattern", hooks)
    i = torch.arange(far, tokens.shape[1])
    return torch.stack([acts["attn.pattern", layer][:, head, i, i - d].mean() for d in range(far)])


one_hand = attention_by_distance(rotary.silence(lens, layer=1, head=7, pair=[1, 2, 3]))
for d in one_hand.argsort(descending=True)[:4].tolist():
    print(f"{d:2} tokens back: {one_hand[d]:.0%}")

assert attention_by_distance([])[1] > 0.99
assert set(one_hand.argsort(descending=True)[:4].tolist()) == {1, 7, 14, 20}
assert one_hand[1] < 0.6
assert one_hand[20] > 0.15

# %% [markdown]
# It does: 1, 7, 14 and 20. The clock has lost its hour hand.
#
# ### Position and content
#
# `score_parts` also has the patterns that the head would have if only some of its channels were compared. Rotated
# channels alone do the same as the head. So does position alone, which is the mean query and the mean key. Content
# alone looks anywhere.

# %%
plot.rotary_patterns(parts, title="Head 1.7: what it is by position and by content")

# %%
step = np.arange(3, 16)
assert parts.pattern.values[step, step - 1].min() > 0.99
assert parts.rotary_alone.values[step, step - 1].min() > 0.99
assert parts.position_alone.values[step, step - 1].min() > 0.99
assert parts.content_alone.values[step, step - 1].mean() < 0.3

# %% [markdown]
# ### Exercise 4.2 · Set the clock wrong
#
# Make head 1.7 look *three* tokens back, and change no other head of its layer. Give hooks: `rotary.shift(lens, by,
# layer=..., head=..., of=...)` moves tokens `by` positions to the right, for queries (`of="q"`), keys (`of="k"`) or
# both.

# %%
hooks = ...  # rotary.shift(...)
check.exercise_4_2(hooks)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# hooks = rotary.shift(lens, -2, layer=1, head=7, of="q")
# ```
#
# The head wants a distance of 1. A query that believes to stand two tokens earlier finds it three tokens back.
#
# </details>
#
# <details>
# <summary>A wrong turn: the other direction</summary>
#
# ```python
# hooks = rotary.shift(lens, 2, layer=1, head=7, of="q")
# ```
#
# Now the right distance is that of a token which is not there yet.
#
# </details>
#
# <details>
# <summary>A wrong turn: both sides</summary>
#
# ```python
# hooks = rotary.shift(lens, -2, layer=1, head=7)
# ```
#
# Queries and keys move together, so no distance changes.
#
# </details>
#
# <details>
# <summary>A wrong turn: the keys</summary>
#
# ```python
# hooks = rotary.shift(lens, 2, layer=1, kv=3, of="k")
# ```
#
# It works for head 1.7. But head 1.6 reads the same keys, and looks elsewhere too.
#
# </details>

# %% [markdown]
# ## 4. What the other half is for
#
# An induction head must find a word wherever it stood. A wave would be in its way. Which parts lift the score of the
# place that it looks for? `pair_use` says it for every head: the part at that place, less its mean over all words that
# the query sees.
#
# The figure has a trap. Head 1.7 stands on top, and it is no induction head. The place sought is 19 tokens back here,
# and three turns of pair 0 are 18.8 tokens: the clock again. A high score is not yet attention. Look at the heads of
# layer 3.

# %%
use = analysis.pair_use(lens)
plot.pair_use(use, "induction", top=10)

# %%
assert use.induction.values[1, 7, 0] > 100  # three turns of pair 0
assert attention_by_distance([])[19] < 0.01  # and yet nothing of its attention
induction = use.induction.values[3]  # head part
good = [0, 1, 2, 3, 4, 5, 7]
share = induction[good].sum(0) / induction[good].sum()
print(f"content adds {share[8]:.0%}, pairs 4 to 7 add {share[4:8].sum():.0%}, pairs 0 to 3 {share[:4].sum():.0%}")
assert 0.5 < share[8] < 0.75
assert 0.2 < share[4:8].sum() < 0.4
assert share[:4].sum() < 0.2

previous = use.previous.values[1, 7]
assert previous[:4].sum() > 0.99 * previous.sum()  # and head 1.7 uses fast pairs only

# %% [markdown]
# Content does most of it. But pairs 4 to 7 do a good part too, and they turn! Do induction heads use position after
# all? Pair 4 needs 628 tokens to go round. Over 42 tokens it hardly moves. So here is a claim that we can test: the
# slow pairs are content too. To **freeze** a pair is to turn it as at position 0 wherever it stands. To **silence** it
# is to take it away. If slow pairs are content, freezing costs nothing and silencing does.
#
# `breakage` measures what an edit costs: how far the probabilities of the next token move, in the mean over all
# positions. The distance is the KL divergence, in nats. It is 0 if nothing has changed, and 1 is much.

# %%


def nothing(x, point):
    """Replace the tensor by zeros."""
    return torch.zeros_like(x)


no_content = [("blocks.3.attn.q_pass", nothing)]
slow, fast = range(4, 8), range(4)
edits = {
    "slow pairs frozen, all layers": rotary.freeze(lens, pair=slow),
    "fast pairs frozen, all layers": rotary.freeze(lens, pair=fast),
    "slow pairs silent, layer 3": rotary.silence(lens, pair=slow, layer=3),
    "no content, layer 3": no_content,
    "both, layer 3": no_content + rotary.silence(lens, pair=slow, layer=3),
    "no content, layers 1 and 2": [(f"blocks.{i}.attn.q_pass", nothing) for i in (1, 2)],
}
broken = rotary.breakage(lens, tokens, edits)
plot.breakage(broken, title="Effect of each edit: KL, nats")

# %%
kl = dict(zip(edits, broken.kl.values, strict=True))
assert kl["slow pairs frozen, all layers"] < 0.01  # they do not need to turn
assert kl["fast pairs frozen, all layers"] > 1
assert kl["slow pairs silent, layer 3"] > 0.05  # but they must be there
assert kl["both, layer 3"] > 2 * kl["no content, layer 3"] > 1
assert kl["no content, layers 1 and 2"] < 0.01

# %% [markdown]
# So there is a division of labour. Fast pairs say how far. Slow pairs and content say what. In layers 1 and 2 content
# is not needed at all (for this task), and in layer 3 nearly everything hangs on it. In Gemma 7B, whose channels all
# turn, heads use fast pairs for position and slow pairs for content in the same way (Barbero et al. 2024). GLM leaves
# half of the channels free for content from the start.
#
# ## 5. Further than it has learned
#
# Lists of 20 words are said again without a fault. And longer lists?


# %%
def share_repeated(n, hooks, rows=2):
    """Return the share of words that are predicted in the second half of a repeated list of n."""
    tokens = repeat_words(n, rows)
    logits = lens.run_with_hooks(tokens, hooks)
    return float((logits[:, prefix + n : -1].argmax(-1) == tokens[:, prefix + n + 1 :]).float().mean())


for n in (20, 40, 60, 80):
    print(f"lists of {n}: {share_repeated(n, []):.0%}")
assert share_repeated(20, []) > 0.95
assert share_repeated(60, []) < 0.15

# %% [markdown]
# Of lists of 60 nearly nothing is left. In its training no list was longer than 23 words. Is it the *words* that are
# too many, or the *distance*? Look at the waves of layer 3. Which pairs have a high wave there, and where is it 60
# tokens back?

# %%
high = profile.amplitude.values[3].mean(0)
for i in range(8):
    print(f"pair {i}: height {high[i]:4.1f}, {60 * frequency[i] / (2 * torch.pi):5.2f} turns in 60 tokens")
assert set(high.argsort()[-2:].tolist()) == {2, 3}

# %% [markdown]
# ### Exercise 4.3 · Teach it nothing, and let it do more
#
# Find hooks with which at least 60 % of the words in lists of 60 are said again, and still 75 % in lists of 20. You may
# use `rotary.freeze`, `rotary.silence` and `rotary.stretch(lens, "linear", factor)`, which divides all frequencies.
# All take `layer=` and `pair=`.

# %%
hooks = ...  # rotary.…
check.exercise_4_3(hooks)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# hooks = rotary.stretch(lens, "linear", 3, layer=3)
# ```
#
# In layer 3 a distance of 60 looks like one of 20. `rotary.freeze(lens, layer=3, pair=[2, 3])` does it as well: what
# is frozen knows no distance.
#
# </details>
#
# <details>
# <summary>A wrong turn: in all layers</summary>
#
# ```python
# hooks = rotary.stretch(lens, "linear", 3)
# ```
#
# The heads of layers 1 and 2 must find the token before. Stretched by three, a token three back looks like the one
# before.
#
# </details>
#
# <details>
# <summary>A wrong turn: the slow pairs</summary>
#
# ```python
# hooks = rotary.freeze(lens, layer=3, pair=[4, 5, 6, 7])
# ```
#
# They are content. They hardly turn, so they were not in the way.
#
# </details>

# %% [markdown]
# So it was the distance. The words can be found, but two waves push the head away from places that are 60 tokens back.
# In training no such place was ever the right one.

# %%
lengths = [20, 40, 60, 80, 120, 200]
ways = {
    "as it is": [],
    "layer 3: pairs 2 and 3 frozen": rotary.freeze(lens, layer=3, pair=[2, 3]),
    "layer 3: stretched by three": rotary.stretch(lens, "linear", 3, layer=3),
}
shares = np.array([[share_repeated(n, hooks) for n in lengths] for hooks in ways.values()])
labelled = {"way": list(ways), "length of the list": [str(n) for n in lengths]}
plot.lines(
    shares, labelled, axes=("way", "length of the list"), what="said again", title="Lists longer than in training"
)

# %%
at = {n: i for i, n in enumerate(lengths)}
assert shares[0, at[60]] < 0.15
assert shares[1, at[60]] > 0.6
assert shares[2, at[60]] > 0.8

# %% [markdown]
# One thing in this figure is strange. As it is, the model says nothing again of lists of 120 words. Of 200 it does! It
# is pair 3. It has a wavelength of 199 tokens, and so at 200 it is back where it was at 1. Freeze this one pair, and
# most of the gift is gone.

# %%
assert shares[0, at[120]] < 0.1
assert shares[0, at[200]] > 0.15
frozen = share_repeated(200, rotary.freeze(lens, layer=3, pair=3))
print(f"lists of 200: {shares[0, at[200]]:.0%}, with pair 3 of layer 3 frozen {frozen:.0%}")
assert frozen < 0.5 * shares[0, at[200]]

# %% [markdown]
# This is why contexts are not made longer by just asking for more. Models whose contexts are extended get other
# frequencies. Dividing all of them (Chen et al. 2023) also blurs the fast pairs, and the model is trained on for a
# while to get used to it. YaRN (Peng et al. 2023) leaves the fast pairs alone. You have seen the reason in both parts:
# a fast pair stretched is a wrong neighbour, a slow pair not stretched is a distance never seen.
#
# ## What to keep
#
# - A score is a sum of waves over distance, and a part without distance. Exactly.
# - Fast pairs say how far. One alone is a clock without an hour hand.
# - What hardly turns is content, whatever it is called.
# - Distances that never occurred in training do not work by themselves.
#
# Next: [5 · The KV cache](05_kv_cache.ipynb), where turned keys are stored.
#
# ## Sources
#
# - Su et al. 2021, *RoFormer*, arXiv 2104.09864: the rotation, and scores of relative position.
# - Barbero et al. 2024, *Round and Round We Go! What makes Rotary Positional Encodings useful?*, arXiv 2410.06205: fast
#   pairs for position, slow pairs for content.
# - Chen et al. 2023, *Extending Context Window of Large Language Models via Positional Interpolation*, arXiv
#   2306.15595.
# - Peng et al. 2023, *YaRN*, arXiv 2309.00071: fast pairs are left alone.
