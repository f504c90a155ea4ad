# %% [markdown]
# # 6 · The residual stream
#
# Everything that a transformer knows about a token while it runs is one vector, and layers only add to it. That makes
# two questions easy to ask. What would the model say if it stopped here? And who added how much to what it says in the
# end? The answers are numbers that can be checked. We check them.
#
# - **You need**: [tutorial 1](01_from_tokens_to_logits.ipynb); hooks from [tutorial 2](02_hooks.ipynb) for the last
#   part.
# - **You get**: the logit lens, direct logit attribution to the last digit, and the ways in which both mislead.
# - **Time**: about 45 minutes.

# %%
import numpy as np
import torch

import glmlens
from glmlens import analysis, plot
from glmlens.course import check_06 as check
from glmlens.results import Labelled

lens = glmlens.load(dtype="float32")
prompt = "When Mary and John went to the store, John gave a drink to"
mary, john = lens.to_single_token(" Mary"), lens.to_single_token(" John")


def difference(logits):
    return float(logits[0, -1, mary] - logits[0, -1, john])


logits, acts = lens.run_with_cache(prompt)
print(f"Mary less John: {difference(logits):.2f} logits")
assert difference(logits) > 10

# %% [markdown]
# ## 1. A sum
#
# The stream after the last of $L$ layers is the embedding, and what every attention and every MLP has added (Elhage et
# al. 2021):
#
# $$x^{(L)} = x^{(0)} + \sum_{l=0}^{L-1} \big(\text{attn\_out}^{(l)} + \text{mlp\_out}^{(l)}\big)$$
#
# And attention is the sum of its heads. So here are all parts, for every position: one embedding, 32 heads, 4 MLPs.

# %%
parts = analysis.decompose_residual(lens, prompt, by="head")
assert parts.axes == ("part", "pos", "model")
assert parts.shape == (1 + 32 + 4, 16, 192)

last = acts["resid_post", 3][0].numpy()
error = np.abs(parts.values.sum(0) - last).max() / np.abs(parts.values).max()
print(f"the sum of all parts misses the stream by {error:.1e} of the largest part")
assert error < 1e-5

# %% [markdown]
# ## 2. What would it say here?
#
# At the end the stream is normed and unembedded. Nothing keeps us from doing this earlier. That is the logit lens
# (nostalgebraist 2020):
#
# $$\text{lens}^{(l)} = \text{norm}(x^{(l)})\, W_U$$
#
# with the model's own last norm.

# %%
read = analysis.logit_lens(lens, prompt, target=" Mary")
plot.logit_lens(read)

# %% [markdown]
# In each cell stands the most probable next token after that layer. Look at the last column. `·Mary` is there only at
# the top. Before that the lens says other names, and before that nothing of use.

# %%
layers = read.word.labels["layer"]
for layer in layers:
    word, rank = read.word.at(layer=layer, pos=-1, rank=0), read.target_rank.at(layer=layer, pos=-1)
    print(f"{layer:>5}: {word:8} (Mary has rank {rank})")

ranks = [read.target_rank.at(layer=layer, pos=-1) for layer in layers]
assert ranks[-1] == 0
assert min(ranks[:-1]) > 5
assert ranks == sorted(ranks, reverse=True)  # it rises with every layer
assert [read.word.at(layer=i, pos=-1, rank=0) for i in ("0", "1", "2")] == ["·the", "·Ella", "·Rose"]

# %% [markdown]
# The embedding row says the token itself. That is what a tied model does: its unembedding is its embedding, so a vector
# that says "I am `·to`" is read as "next comes `·to`".

# %%
assert read.word.at(layer="embed", pos=-1, rank=0) == "·to"

# %% [markdown]
# How far is a layer from what the model says in the end? The distance of two distributions is measured in nats. $p$ is
# the model's output, $q$ the layer's (Belrose et al. 2023):
#
# $$\text{KL}(p \,\Vert\, q) = \sum_t p_t\, (\log p_t - \log q_t)$$

# %%
plot.logit_lens(read, "kl", title="How far each layer is from the model's answer")

# %% [markdown]
# ### Exercise 6.1 · The distance
#
# Write the distance of a layer from the output. Given are the logits of the two, `layer` and `output`, each `[vocab]`.

# %%
kl = ...  # def kl(layer, output): ...
check.exercise_6_1(kl)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def kl(layer, output):
#     p, q = output.log_softmax(-1), layer.log_softmax(-1)
#     return (p.exp() * (p - q)).sum()
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: the other way round</summary>
#
# ```python
# def kl(layer, output):
#     p, q = layer.log_softmax(-1), output.log_softmax(-1)
#     return (p.exp() * (p - q)).sum()
# ```
#
# KL is not symmetric. This way the layer's own favourites are weighed, and not the model's.
#
# </details>
#
# <details>
# <summary>A wrong turn: logits are not log-probabilities</summary>
#
# ```python
# def kl(layer, output):
#     return (output.softmax(-1) * (output - layer)).sum()
# ```
#
# The two differ by a constant, which is not the same for both.
#
# </details>

# %% [markdown]
# ## 3. What the lens does not see
#
# After layer 1 the lens has `Mary` at rank 15. Is the answer not known yet? Let us ask otherwise. We take the stream at
# the last position from another sentence, in which *Mary* gives the drink, and put it in place after one layer. If the
# answer turns round, what decides it was in there.

# %%
other = "When Mary and John went to the store, Mary gave a drink to"
_, there = lens.run_with_cache(other, "resid_post", logits=False)


def put(x, point):
    x[:, -1] = there["resid_post", point.layer][:, -1]
    return x


differences = [difference(lens.run_with_hooks(prompt, {f"blocks.{i}.resid_post": put})) for i in range(4)]
print("Mary less John, with the last position of the other sentence:", [f"{d:.1f}" for d in differences])
assert abs(differences[0] - difference(logits)) < 0.01  # after layer 0 the last position knows nothing yet of who gives
assert differences[1] < 0  # after layer 1 it knows enough to turn the answer
assert ranks[layers.index("1")] > 10  # and the lens says nothing of it

# %% [markdown]
# So after layer 1 the vector already holds who gives. It is not written as a word that the unembedding would read. The
# lens is a question put in the language of the last layer. A yes means something. A no does not.
#
# ## 4. Who added it?
#
# A logit is a product of the normed stream with a column of $W_U$. The stream is a sum. If the norm were linear, the
# logit would be a sum too. RMSNorm multiplies by weights $g$, which is linear, and by one number per position, the
# scale $s$. Take the $s$ of this run as given, and the logit is a sum over parts:
#
# $$\ell_t = \sum_{\text{part}} \; \text{part} \cdot \big(W_U[:, t] \odot g\big)\; s \qquad
# s = \frac{1}{\sqrt{\frac{1}{d}\sum_j x_j^2 + \epsilon}}$$
#
# That is direct logit attribution. For a difference of two logits, take the difference of the two columns.

# %%
added = analysis.logit_attribution(lens, prompt, " Mary", " John")
plot.logit_attribution(added)

# %% [markdown]
# The bars sum to the model's own number. What they miss is in `unexplained`, and it is rounding.

# %%
total = float(added.parts.values.sum())
print(f"{total:.6f} by parts, {difference(logits):.6f} by the model, unexplained {float(added.unexplained):.1e}")
assert abs(total - difference(logits)) < 1e-4
assert abs(float(added.unexplained)) < 1e-5 * np.abs(added.values).max()

share = added.at(layer=3, sublayer="mlp") / total
print(f"the last MLP adds {share:.0%}")
assert share > 0.9

# %% [markdown]
# ### Exercise 6.2 · What a part adds
#
# Write what a part adds to the difference of two logits. Given are the part `[model]`, the scale `s` of the last norm
# at this position, and the ids of the right and the wrong token. You may use `lens.W_U` `[model, vocab]` and the weight
# of the last norm, `lens.model.ln_final.weight`.

# %%
adds = ...  # def adds(part, s, right, wrong): ...
check.exercise_6_2(adds)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def adds(part, s, right, wrong):
#     direction = lens.W_U[:, right] - lens.W_U[:, wrong]
#     return part @ (direction * lens.model.ln_final.weight) * s
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: without the weight of the norm</summary>
#
# ```python
# def adds(part, s, right, wrong):
#     return part @ (lens.W_U[:, right] - lens.W_U[:, wrong]) * s
# ```
#
# The parts still sum to a number, and it looks like any other. Here it is 48.9 in place of 12.6.
#
# </details>
#
# <details>
# <summary>A wrong turn: one token only</summary>
#
# ```python
# def adds(part, s, right, wrong):
#     return part @ (lens.W_U[:, right] * lens.model.ln_final.weight) * s
# ```
#
# That is the logit of the right token. Much of it is added to all tokens alike.
#
# </details>

# %% [markdown]
# ### Is it true?
#
# Attribution makes a claim: without this part the number would be smaller by just so much, if the scale stayed. That
# can be tried. We take what the last MLP has added out of the stream, and hold the scale.

# %%
part, scale = acts["mlp_out", 3], acts["ln_final.scale"]
take_out = {"blocks.3.resid_post": lambda x, point: x - part}
hold = {"ln_final.scale": lambda s, point: scale}

held = difference(lens.run_with_hooks(prompt, {**take_out, **hold}))
free = difference(lens.run_with_hooks(prompt, take_out))
claimed = difference(logits) - added.at(layer=3, sublayer="mlp")
print(f"claimed {claimed:.4f}, with the scale held {held:.4f}, with a scale of its own {free:.4f}")
assert abs(held - claimed) < 1e-3
assert abs(free - claimed) > 0.5

# %% [markdown]
# With the scale held, the claim holds to the last digit. Without, what is left is larger: the stream is shorter, and
# the norm makes up for it. When parts are large this is no small thing.
#
# ## 5. Finer
#
# The same sum can be taken apart further: by head, by neuron, or by where a head took it from. Every one of them sums
# to the same number.

# %%
for by in ("layer", "component", "head", "neuron", "source"):
    finer = analysis.logit_attribution(lens, prompt, " Mary", " John", by=by)
    print(
        f"{by:10} {finer.values.size:5} parts and {finer.rest.values.size} others, sum {finer.parts.values.sum():.4f}"
    )
    assert abs(finer.parts.values.sum() - difference(logits)) < 1e-4

# %% [markdown]
# Who in the last MLP? The largest bars are single neurons.

# %%
neurons = analysis.logit_attribution(lens, prompt, " Mary", " John", by="neuron")
plot.logit_attribution(neurons, top=12)

# %%
((layer, neuron), most), *_ = neurons.top(1)
print(f"neuron {layer}.{neuron} adds {most:.2f}")
assert layer == "3"
assert 2 < most < 5

# %% [markdown]
# ### Exercise 6.3 · How many neurons?
#
# How many neurons of the last layer, at the fewest, add 90 % of the difference together? `neurons.values[3]` is what
# each of them adds, and `neurons.total` the difference.

# %%
how_many = ...
check.exercise_6_3(how_many)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# largest_first = np.sort(neurons.values[3])[::-1]
# how_many = int((largest_first.cumsum() < 0.9 * neurons.total).sum()) + 1
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: by magnitude</summary>
#
# ```python
# largest_first = sorted(neurons.values[3], key=abs, reverse=True)
# how_many = int((np.cumsum(largest_first) < 0.9 * neurons.total).sum()) + 1
# ```
#
# Some of the largest are negative. They take away, so more are needed with them than without.
#
# </details>

# %% [markdown]
# Mind what this number says and what it does not. A dozen neurons add 90 %. But others take away, and the rest of the
# sum is hundreds of small ones on both sides.

# %%
positive, negative = (float(neurons.values[3][sign * neurons.values[3] > 0].sum()) for sign in (1, -1))
print(f"{positive:+.1f} and {negative:+.1f}")
assert positive > 15
assert negative < -4

# %% [markdown]
# ## 6. Direct is not all
#
# Attribution counts what a part writes for the unembedding to read. What it writes for later *layers* to read is
# counted as theirs. In this model all heads together add next to nothing directly. Are they idle?
#
# We put beside it what is lost when each head writes its mean over the prompt.

# %%
heads = analysis.logit_attribution(lens, prompt, " Mary", " John", by="head")
directly = torch.tensor(heads.values)
assert abs(float(directly.sum())) < 1


def write_mean(head):
    def hook(z, point):
        z[:, :, head] = z[:, :, head].mean(1, keepdim=True)
        return z

    return hook


lost = torch.tensor(
    [
        [
            difference(logits) - difference(lens.run_with_hooks(prompt, {f"blocks.{i}.attn.z": write_mean(head)}))
            for head in range(8)
        ]
        for i in range(4)
    ]
)
both = {"adds directly": directly, "is lost without it": lost}
plot.compare(
    {name: Labelled(values.numpy(), ("layer", "head")) for name, values in both.items()},
    what="logits",
    title="Direct and in all",
)

# %%
layer, head = divmod(int(lost.argmax()), 8)
print(f"without head {layer}.{head}: {lost[layer, head]:.2f} are lost; directly it adds {directly[layer, head]:.2f}")
assert (layer, head) == (1, 3)
assert lost[1, 3] > 5
assert abs(directly[1, 3]) < 0.3

# %% [markdown]
# Head 1.3 reads who gives, and adds nothing to the logit of any name. The last MLP reads what it has written, and says
# the answer. Attribution alone would have given all the credit to the one who speaks. To find those who tell it what to
# say, patch: [tutorial 7](07_activation_patching.ipynb).
#
# ## 7. Exactness, for any model
#
# All these identities hold for any GLM. `selfcheck` tries them on the model that you have, and raises when one fails.
# Run it on a checkpoint before you believe what you read in it. Beside each number stands the largest that it may be.

# %%
analysis.selfcheck(lens, prompt)

# %% [markdown]
# ## What to keep
#
# - The stream is a sum, and so is every logit, once the scale of the last norm is taken from the run.
# - The weight of the norm belongs in it. Check the sum, always.
# - The logit lens asks in the language of the last layer. A no means nothing.
# - Direct effects are not all effects.
#
# Next: [7 · Activation patching](07_activation_patching.ipynb).
#
# ## Sources
#
# - nostalgebraist 2020, *interpreting GPT: the logit lens*, LessWrong.
# - Belrose et al. 2023, *Eliciting Latent Predictions from Transformers with the Tuned Lens*, arXiv 2303.08112:
#   where the logit lens fails, and KL to the output.
# - Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*, transformer-circuits.pub: the residual
#   stream as a sum, and direct paths to the logits.
# - Wang et al. 2022, *Interpretability in the Wild*, arXiv 2211.00593: the logit difference, and direct
#   effects on it.
# - Zhang and Sennrich 2019, *Root Mean Square Layer Normalization*, arXiv 1910.07467: the norm.
