# %% [markdown]
# # Bench · Attribution
#
# What each part adds to an answer, exactly; and what changing each part would do, estimated from one gradient.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
clean = "When Mary and John went to the store, John gave a drink to"
corrupt = "When Mary and John went to the store, Mary gave a drink to"  # as many tokens
answers = [" Mary", " John"]  # right and wrong, of one token each
edges = None  # whether to score all edges between parts; None: in models of up to 12 layers

# %%
from dataclasses import replace

import torch

import glmlens
from glmlens import analysis, circuits, patch, plot

lens = glmlens.load(model, dtype=dtype or (None if model else "float32"), device=device)
right, wrong = answers
assert len(lens.to_labels(clean)) == len(lens.to_labels(corrupt)), "give two prompts of as many tokens"
lens.test_prompt(clean, answers)

# %% [markdown]
# ## When the answer is there
#
# The residual stream after every layer, read as if it were the last.

# %%
plot.logit_lens(analysis.logit_lens(lens, clean, target=right))

# %% [markdown]
# ## What each part adds
#
# To the logit of the right answer less that of the wrong one. The parts, the rest and what rounding leaves are the
# model's own difference.

# %%
parts = analysis.logit_attribution(lens, clean, right, wrong, by="component")
assert abs(parts.values.sum() + parts.rest.values.sum() + parts.unexplained - parts.total).max() < 1e-4 * abs(
    parts.total
)
plot.logit_attribution(parts)

# %%
by_head = analysis.logit_attribution(lens, clean, right, wrong, by="head")
plot.head_scores(by_head, what="logits", n_kv_heads=lens.cfg.n_kv_heads, title="What each head adds")

# %%
by_source = analysis.logit_attribution(lens, clean, right, wrong, by="source")
plot.logit_attribution(by_source, top=15)

# %%
by_neuron = analysis.logit_attribution(lens, clean, right, wrong, by="neuron")
plot.logit_attribution(by_neuron, top=15)

# %% [markdown]
# ## What changing each part would do
#
# Attribution patching (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745): the change that the corrupt run's value
# makes, times the gradient. It takes one pass back instead of a run per place, and it is an estimate. Beside it, the
# same as it is.

# %%
estimate = patch.attribution_patch(lens, clean, corrupt, "resid_pre", over=("layer", "pos"), metric=(right, wrong))
measured = patch.sweep(
    lens,
    clean,
    corrupt,
    "resid_pre",
    over=("layer", "pos"),
    metric=(right, wrong),
    direction="noise",
    normalise=False,
    progress=False,
)
change = replace(estimate, values=measured.values - measured.clean)
plot.compare({"estimated": estimate, "measured": change}, what="logits")

# %%
each = torch.tensor(estimate.values).flatten(), torch.tensor(change.values).flatten()
print(
    f"correlation of the two over {len(each[0])} places: {float(torch.corrcoef(torch.stack(each).float())[0, 1]):.2f}"
)

# %%
heads = patch.attribution_patch(lens, clean, corrupt, "attn.z", over=("layer", "head"), metric=(right, wrong))
plot.head_scores(heads, what="logits", n_kv_heads=lens.cfg.n_kv_heads, title="Estimated effect of each head")

# %% [markdown]
# ## Edges
#
# The same for every edge from what writes to what reads (EAP-IG: Hanna et al. 2024, arXiv 2403.17806). How far
# they are from accounting for the whole difference is their `completeness`: 0 is all of it.

# %%
found = None
if edges or (edges is None and lens.cfg.n_layers <= 12):
    found = circuits.attribute_edges(lens, clean, corrupt, metric=(right, wrong), method="eap-ig")
    print(f"{found.graph.n_edges} edges, completeness {found.completeness:.2f}")
plot.circuit(found.top(25)) if found else "edges were not asked for"
