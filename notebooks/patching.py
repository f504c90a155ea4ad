# %% [markdown]
# # Bench · Activation patching
#
# Where two prompts part: put what one run has into another, place by place, and see what becomes of the answer.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
task = "ioi"  # one of glmlens.tasks.TASKS ...
counterfactual = "flip"
n = 20  # of which those of the commonest length are taken
clean, corrupt, answers = None, None, None  # ... or two prompts of one length, and [right, wrong] next tokens

# %%
import glmlens
from glmlens import patch, plot, tasks

lens = glmlens.load(model, dtype=dtype or (None if model else "float32"), device=device)
if clean is None:
    pairs = tasks.TASKS[task].examples(lens, n).of_length()
    other, metric, where = counterfactual, None, tuple(pairs[0].positions)
else:
    pairs, other, metric, where = [clean], [corrupt], tuple(answers), None
    assert len(lens.to_labels(clean)) == len(lens.to_labels(corrupt)), "give two prompts of as many tokens"
lens

# %%
if clean is None:
    print(tasks.TASKS[task].counterfactuals)
    print(f"accuracy {pairs.accuracy(lens(pairs)):.0%} of {len(pairs)}; the first: {pairs.texts[0]!r}")
    print(f"places with names: {', '.join(where)}")
else:
    lens.test_prompt(clean, answers)
    lens.test_prompt(corrupt, answers)

# %% [markdown]
# ## Where and when
#
# The residual stream that enters each layer. 0: as in the corrupt run; 1: as in the clean one. What it takes, before it
# is run:

# %%
site = patch.Site("resid_pre", pos=where)
patch.check_sweep(lens, pairs, other, site, over=("layer", "pos"), metric=metric)

# %%
stream = patch.sweep(lens, pairs, other, site, over=("layer", "pos"), metric=metric, progress=False)
plot.patch_grid(stream)

# %% [markdown]
# ## Which heads, and which MLPs
#
# What each head mixes, at all positions.

# %%
heads = patch.sweep(lens, pairs, other, "attn.z", over=("layer", "head"), metric=metric, progress=False)
plot.patch_grid(heads)

# %%
mlps = patch.sweep(
    lens, pairs, other, patch.Site("mlp_out", pos=where), over=("layer", "pos"), metric=metric, progress=False
)
plot.patch_grid(mlps)

# %% [markdown]
# ## The other way round
#
# Denoising asks what is enough to bring the answer back. Noising asks what it cannot do without. They differ where
# parts stand in for one another.

# %%
noised = patch.sweep(
    lens, pairs, other, "attn.z", over=("layer", "head"), metric=metric, direction="noise", progress=False
)
plot.compare({"denoise": heads, "noise": noised})

# %%
for said, found in (("most is brought back by", heads), ("most is lost with", noised)):
    print(f"{said:23}", ", ".join(f"{layer}.{head} {effect:+.2f}" for (layer, head), effect in found.top(5)))

# %% [markdown]
# ## By hand
#
# Other prompts, sites and metrics. Click a cell to see what it does to the logits and to attention.

# %%
from glmlens.widgets import PatchExplorer

PatchExplorer(lens, pairs, other) if clean is None else PatchExplorer(lens, clean, corrupt, tuple(answers))
