# %% [markdown]
# # Workbench · Activation patching
#
# Put activations of one run into another, place by place, and measure how far the answer changes.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
task = "ioi"  # one of glmlens.tasks.TASKS ...
counterfactual = "flip"
n = 20  # examples; those of the most common length are used
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
    assert len(lens.to_labels(clean)) == len(lens.to_labels(corrupt)), "give two prompts with the same number of tokens"
lens

# %%
if clean is None:
    print(tasks.TASKS[task].counterfactuals)
    print(f"accuracy {pairs.accuracy(lens(pairs)):.0%} of {len(pairs)}; the first: {pairs.texts[0]!r}")
    print(f"named positions: {', '.join(where)}")
else:
    lens.test_prompt(clean, answers)
    lens.test_prompt(corrupt, answers)

# %% [markdown]
# ## Where and when
#
# The residual stream that enters each layer. 0: as in the corrupt run; 1: as in the clean one. First the cost of the
# sweep, before it is run:

# %%
site = patch.Site("resid_pre", pos=where)
patch.check_sweep(lens, pairs, other, site, over=("layer", "pos"), metric=metric)

# %%
stream = patch.sweep(lens, pairs, other, site, over=("layer", "pos"), metric=metric, progress=False)
plot.patch_grid(stream)

# %% [markdown]
# ## Which heads, and which MLPs
#
# The output of each head before W_O (`attn.z`), at all positions.

# %%
heads = patch.sweep(lens, pairs, other, "attn.z", over=("layer", "head"), metric=metric, progress=False)
plot.patch_grid(heads)

# %%
mlps = patch.sweep(
    lens, pairs, other, patch.Site("mlp_out", pos=where), over=("layer", "pos"), metric=metric, progress=False
)
plot.patch_grid(mlps)

# %% [markdown]
# ## Noising
#
# Denoising finds the parts that are sufficient to restore the answer. Noising finds the parts that are necessary for
# it. The two differ where parts are redundant.

# %%
noised = patch.sweep(
    lens, pairs, other, "attn.z", over=("layer", "head"), metric=metric, direction="noise", progress=False
)
plot.compare({"denoise": heads, "noise": noised})

# %%
for title, effects in (("largest when denoised", heads), ("largest when noised", noised)):
    print(f"{title:22}", ", ".join(f"{layer}.{head} {effect:+.2f}" for (layer, head), effect in effects.top(5)))

# %% [markdown]
# ## Interactive
#
# Other prompts, sites and metrics. Click a cell to see its effect on the logits and on attention.

# %%
from glmlens.widgets import PatchExplorer

PatchExplorer(lens, pairs, other) if clean is None else PatchExplorer(lens, clean, corrupt, tuple(answers))
