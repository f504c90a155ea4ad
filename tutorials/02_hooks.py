# %% [markdown]
# # 2 · Hooks
#
# A hook is a function that the model calls with a tensor while it runs. The function may look at the tensor. It may
# also give back another one, and then the model goes on with that. This is the whole method of the course: look, change
# something, and see what becomes of the answer.
#
# - **You need**: [tutorial 1](01_from_tokens_to_logits.ipynb), or a notion of what the residual stream and heads are.
# - **You get**: hooks that do what you mean, and the error messages of those that do not.
# - **Time**: about 40 minutes.

# %%
import torch

import glmlens
from glmlens import HookError, only, plot
from glmlens.course import check_02 as check
from glmlens.course import source
from glmlens.model import Block

lens = glmlens.load(dtype="float32")
prompt = "When Mary and John went to the store, John gave a drink to"
labels = lens.to_labels(prompt)

# %% [markdown]
# ## 1. Look
#
# In the model, a hook is one word in front of the tensor that it names. Here is a layer:

# %%
source(Block.forward, "resid_pre = hook", "return hook")

# %% [markdown]
# Outside, a hook is a function of two arguments: the tensor `x`, and the `point` where it is. A point knows its name,
# its layer and the names of its axes. It also knows the absolute position of everything in `x`. The function must
# return what the model should go on with. To only look, return `x`.


# %%
def show(x, point):
    print(point.name, dict(zip(point.axes, x.shape, strict=True)), f"layer {point.layer}")
    return x


logits = lens.run_with_hooks(prompt, {"blocks.*.attn.z": show})

# %% [markdown]
# `blocks.*.attn.z` is a glob: it means this point in every layer. `attn.z` alone means the same. `lens.points()` lists
# all points.
#
# Looking changes nothing. The logits are the same to the last bit.

# %%
clean = lens(prompt)
assert torch.equal(logits, clean)

# %% [markdown]
# To look at many tensors there is a shorter way. `run_with_cache` keeps what was at the points that you name.

# %%
_, acts = lens.run_with_cache(prompt, ["attn.z", "resid_post"])
assert acts["attn.z", 1].shape == (1, 16, 8, 32)  # layer 1: batch pos head d
assert acts["resid_post"].shape == (4, 1, 16, 192)  # all layers: layer batch pos model
assert [name for name in acts if name.endswith("attn.z")] == [f"blocks.{i}.attn.z" for i in range(4)]
acts

# %% [markdown]
# ## 2. Change
#
# Cut the model at a point. What comes before makes $x$, what comes after makes the logits of it: $\ell = g(x)$. A hook
# $h$ puts something else in the cut:
#
# $$\ell = g(x) \qquad \ell' = g(h(x))$$
#
# To say how much has changed we need one number for an answer. The classic one is a logit difference: how much more the
# model believes in `Mary` than in `John` (Wang et al. 2022).
#
# $$m(\ell) = \ell_\text{Mary} - \ell_\text{John} \qquad \text{effect of } h = m(\ell') - m(\ell)$$

# %%
mary, john = lens.to_single_token(" Mary"), lens.to_single_token(" John")


def difference(logits):
    return float(logits[0, -1, mary] - logits[0, -1, john])


print(f"{difference(clean):.2f}")
assert difference(clean) > 10

# %% [markdown]
# Let us silence head 1.3: head 3 of layer 1. Its output is `z[:, :, 3]`. A hook gets a copy of its own, so it may write
# into it.


# %%
def without_head_3(z, point):  # z: batch pos head d
    z[:, :, 3] = 0
    return z


ablated = lens.run_with_hooks(prompt, {"blocks.1.attn.z": without_head_3})
print(f"{difference(clean):.2f} → {difference(ablated):.2f}")
assert difference(ablated) - difference(clean) < -3

# %% [markdown]
# Head 1.3 matters here. And the next run knows nothing of it. A hook is an argument of a call: it is not registered
# anywhere, so there is nothing to remove.

# %%
assert torch.equal(lens(prompt), clean)

# %% [markdown]
# `only` restricts a hook to some positions. At which does head 1.3 do its work? Positions count from 0, and the two
# tokens of the prefix count too: the last token of this prompt is at 15.

# %%
for position in (5, 11, 15):
    hook = only(without_head_3, positions=position)
    change = difference(lens.run_with_hooks(prompt, {"blocks.1.attn.z": hook})) - difference(clean)
    print(f"only at {position:2} {labels[position]:6} {change:+.2f}")

assert change < -3

# %% [markdown]
# It works at the last position, where the answer is given.
#
# ### Exercise 2.1 · Any head
#
# Write a function `silence(head)` that returns a hook. The hook sets what this head mixes, at `attn.z`, to zero.

# %%
silence = ...  # def silence(head): ...
check.exercise_2_1(silence)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def silence(head):
#     def hook(z, point):
#         z[:, :, head] = 0
#         return z
#
#     return hook
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: the wrong axis</summary>
#
# ```python
# def silence(head):
#     def hook(z, point):
#         z[:, head] = 0
#         return z
#
#     return hook
# ```
#
# The axes are `batch pos head d`. This silences a position, in all heads. No error is raised, since the shape is right.
# When in doubt, print `point.axes`.
#
# </details>

# %% [markdown]
# With such a function, all 32 heads are one loop. Red heads are missed: without them the difference falls. Blue heads
# work against the answer.


# %%
def zero(head):
    def hook(z, point):
        return z.index_fill(2, torch.tensor(head), 0)

    return hook


effects = torch.tensor(
    [
        [difference(lens.run_with_hooks(prompt, {f"blocks.{i}.attn.z": zero(head)})) for head in range(8)]
        for i in range(4)
    ]
) - difference(clean)

plot.head_scores(
    -effects, what="loss", title="What is lost without each head", subtitle="logit difference, Mary less John"
)

# %%
layer, head = divmod(int(effects.argmin()), 8)
assert (layer, head) == (1, 3)  # the head that is missed most
assert effects.max() > 3  # and without some the answer comes out stronger

# %% [markdown]
# ### Exercise 2.2 · Another sentence
#
# If it were Mary who gave the drink, the answer would be John. Write a hook for the point `embed` that makes the model
# read `Mary` in place of the second `John`. `lens.W_E[mary]` is the embedding of `·Mary`. Do not change the prompt.

# %%
print(list(enumerate(labels)))

# %%
read_mary = ...  # def read_mary(x, point): ...
check.exercise_2_2(read_mary)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def read_mary(x, point):
#     x[:, 11] = lens.W_E[mary]
#     return x
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: the prefix is forgotten</summary>
#
# ```python
# def read_mary(x, point):
#     x[:, 9] = lens.W_E[mary]
#     return x
# ```
#
# Counted in the tokens of the text, the second `John` is number 9. But the prefix `[gMASK]<sop>` comes first.
#
# </details>

# %% [markdown]
# ## 3. While it generates
#
# The same hooks work in `generate`. There the model runs once for the prompt, and then once for each new token.
# `point.step` says which run it is. Step 0 is the prompt, and its last position chooses the first new token.


# %%
def where(x, point):
    print(f"step {point.step}: positions {point.positions.tolist()[0]}")
    return x


run = lens.generate(prompt, max_new_tokens=4, hooks={"blocks.0.resid_pre": where})
assert run.text == " Mary. She took"
print(run.text)

# %% [markdown]
# After step 0 a run covers one token. What came before is in the KV cache ([tutorial 5](05_kv_cache.ipynb)). That is
# why a hook must not count on seeing the whole prompt, and why positions are absolute.
#
# ### Exercise 2.3 · Not that word
#
# After `Mary.` the model says `She`. Give hooks for `generate` with which it can not: at the step that chooses this
# word, its logit is minus infinity. At all other steps nothing changes. `only(hook, steps=...)` restricts a hook to
# steps.

# %%
she = lens.to_single_token(" She")
not_she = ...  # {"logits": only(..., steps=...)}
check.exercise_2_3(not_she)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def ban(logits, point):
#     logits[:, :, she] = -torch.inf
#     return logits
#
#
# not_she = {"logits": only(ban, steps=2)}
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: steps counted from one</summary>
#
# ```python
# def ban(logits, point):
#     logits[:, :, she] = -torch.inf
#     return logits
#
#
# not_she = {"logits": only(ban, steps=3)}
# ```
#
# `She` is the third new token. Steps count from 0.
#
# </details>
#
# <details>
# <summary>A wrong turn: a logit of zero</summary>
#
# ```python
# def ban(logits, point):
#     logits[:, :, she] = 0
#     return logits
#
#
# not_she = {"logits": only(ban, steps=2)}
# ```
#
# A logit of zero is not a probability of zero: other logits may be below it.
#
# </details>

# %% [markdown]
# ## 4. What is refused
#
# A hook that silently never runs is the worst of errors: you measure an effect of zero and believe it. So here, what
# can not happen is an error. Let us make them all. `error_of` makes a call that must fail, and gives its message.


# %%
def error_of(call):
    try:
        call()
    except HookError as e:
        print(e, end="\n\n")
        return str(e)
    raise AssertionError("no error was raised")


def same(x, point):
    return x


# %% [markdown]
# A name that is misspelt, a layer that is not there, a name of another library:

# %%
message = error_of(lambda: lens.run_with_cache(prompt, "blocks.3.attn.patern"))
assert "Did you mean 'blocks.3.attn.pattern'" in message

message = error_of(lambda: lens.run_with_hooks(prompt, {"blocks.4.attn.z": same}))
assert "the layers are 0 to 3" in message

message = error_of(lambda: lens.run_with_hooks(prompt, {"blocks.3.attn.hook_pattern": same}))
assert "here it is called 'blocks.3.attn.pattern'" in message

# %% [markdown]
# A hook that forgets to return, one that returns another shape, one that returns another precision. PyTorch would
# broadcast the second and convert the third, and the result would be wrong in a way that is hard to see.

# %%
message = error_of(lambda: lens.run_with_hooks(prompt, {"blocks.1.attn.z": lambda z, point: print("looked")}))
assert "returned None; end it with 'return x'" in message

message = error_of(lambda: lens.run_with_hooks(prompt, {"blocks.1.attn.z": lambda z, point: z[:, :1]}))
assert "returned shape (1, 1, 8, 32); expected (1, 16, 8, 32)" in message

message = error_of(lambda: lens.run_with_hooks(prompt, {"blocks.1.attn.z": lambda z, point: z.double()}))
assert "returned dtype torch.float64" in message

# %% [markdown]
# A position or a step that never comes. The last of these is only known at the end: the generation stopped at the full
# stop. What had been computed until then is in the error's `.run`.

# %%
message = error_of(lambda: lens.run_with_hooks(prompt, {"blocks.1.attn.z": only(same, positions=40)}))
assert "asked for position 40, which never came" in message

message = error_of(lambda: lens.generate(prompt, 4, hooks={"blocks.1.attn.z": only(same, steps=9)}))
assert "the last step of this run is 3" in message

late = {"blocks.1.attn.z": only(same, steps=15)}
message = error_of(lambda: lens.generate(prompt, 20, hooks=late, stop_strings="."))
assert "step 15" in message

# %% [markdown]
# A point that this way of running has not got. `attention="sdpa"` computes attention in one fused kernel, and there is
# no pattern inside to look at.

# %%
fused = glmlens.load(dtype="float32", attention="sdpa")
message = error_of(lambda: fused.run_with_cache(prompt, "attn.pattern"))
assert "load with attention='eager'" in message

# %% [markdown]
# Does a hook fire where you think it does? `check` tells you, and what a recording will weigh, without running
# anything.

# %%
lens.check(prompt, names="resid_post", hooks={"blocks.*.attn.z": same})

# %% [markdown]
# ## 5. Edits in place
#
# In PyTorch, two names are often one tensor. The stream that leaves layer 0 **is** the stream that enters layer 1. If a
# hook wrote into it, a recording of layer 0 would change after the fact.
#
# Below, a raw hook does just that. Raw hooks go to the model itself and get the tensor that the model uses. Layer 0 is
# kept first. Layer 1 is then set to zero, in place. Look what is left of what was kept.

# %%
stored = {}


def raw(name, x):
    if name == "blocks.0.resid_post":
        stored["layer 0"] = x
    if name == "blocks.1.resid_pre":
        x.zero_()
    return x


lens.model(lens.to_tokens(prompt), hook=raw)
assert stored["layer 0"].abs().max() == 0  # the recording is destroyed

# %% [markdown]
# The hooks of a lens get a copy, so this can not happen to them. Write in place as much as you like.

# %%
_, acts = lens.run_with_cache(prompt, "blocks.0.resid_post", {"blocks.1.resid_pre": lambda x, point: x.zero_()})
assert acts["resid_post", 0].abs().max() > 100  # the recording is intact

# %% [markdown]
# ## 6. What nothing can refuse
#
# Some mistakes are good Python and good tensors. Here are the two that cost most time.
#
# **Functions made in a loop.** A function looks its variables up when it runs, not when it is made. These hooks are
# meant for heads 0 to 7 in turn, but when they run the loop is over, and `head` is 7 for all of them. (The linter ruff
# knows this mistake as B023. Here it is made on purpose, so the line says `noqa`.)

# %%
hooks = []
for head in range(8):
    hooks.append(lambda z, point: z.index_fill(2, torch.tensor(head), 0))  # noqa: B023, PERF401

lost = [difference(lens.run_with_hooks(prompt, {"blocks.1.attn.z": hook})) for hook in hooks]
assert len(set(lost)) == 1  # eight times head 1.7

# %% [markdown]
# The cure is a function that makes the hook, like `silence` in exercise 2.1: each call has a `head` of its own.

# %%
lost = [difference(lens.run_with_hooks(prompt, {"blocks.1.attn.z": zero(head)})) for head in range(8)]
assert len(set(lost)) == 8

# %% [markdown]
# **Zero is not nothing.** A head that always writes the same vector is a constant, and later layers count on it. To set
# it to zero breaks more than to take away what the head *says*. A fairer stand-in is what the head writes on average
# (Wang et al. 2022). The two give different numbers. A result that holds for only one of them is not yet one.


# %%
def mean(head):
    def hook(z, point):
        z[:, :, head] = z[:, :, head].mean(1, keepdim=True)  # over the positions of this prompt
        return z

    return hook


for layer, head in ((1, 3), (0, 3), (3, 4)):
    by_zero, by_mean = (
        difference(lens.run_with_hooks(prompt, {f"blocks.{layer}.attn.z": make(head)})) - difference(clean)
        for make in (zero, mean)
    )
    print(f"head {layer}.{head}: {by_zero:+.2f} by zero, {by_mean:+.2f} by the mean")
    assert 0.5 < abs(by_zero - by_mean) < 2
    assert by_zero * by_mean > 0  # the same sign

# %% [markdown]
# Head 1.3 is missed either way, and head 3.4 hinders either way, on this prompt. The sizes differ by about a logit.
#
# ## What to keep
#
# - A hook is `fn(x, point)`, given to a call. It returns what the model goes on with.
# - Look with `run_with_cache`, change with `run_with_hooks`, and both work in `generate`.
# - What can not happen is an error. What you did not mean is up to you: print `point.axes`, count the prefix, make
#   hooks with a function.
#
# Next: [3 · Attention heads](03_attention_heads.ipynb).
#
# ## Sources
#
# - Nanda and Bloom 2022, *TransformerLens*, github.com/TransformerLensOrg/TransformerLens: named hook points, and most
#   of the names.
# - Wang et al. 2022, *Interpretability in the Wild*, arXiv 2211.00593: the prompt, the logit difference, and
#   knocking out by the mean.
# - Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*, transformer-circuits.pub: heads as parts
#   that can be taken out one by one.
