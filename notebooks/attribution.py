# %% [markdown]
# # Workbench · Attribution
#
# The exact contribution of each part to an answer, and the effect of patching each part, estimated from one gradient.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
clean = "When Mary and John went to the store, John gave a drink to"
corrupt = "When Mary and John went to the store, Mary gave a drink to"  # the same number of tokens
answers = [" Mary", " John"]  # right and wrong, of one token each
edges = None  # whether to score all edges between parts; None: in models of up to 12 layers

# %%
from dataclasses import replace

import torch

import glmlens
from glmlens import analysis, circuits, patch, plot

lens = glmlens.load(model, dtype=dtype or (None if model else "float32"), device=device)
right, wrong = answers
assert len(lens.to_labels(clean)) == len(lens.to_labels(corrupt)), "give two prompts with the same number of tokens"
lens.test_prompt(clean, answers)

# %% [markdown]
# ## The logit lens
#
# The residual stream after every layer, decoded as if it were the last.

# %%
plot.logit_lens(analysis.logit_lens(lens, clean, target=right))

# %% [markdown]
# ## Direct logit attribution
#
# Contributions to the logit of the right answer minus that of the wrong one. The parts, the rest and the rounding error
# sum to the model's own difference.

# %%
parts = analysis.logit_attribution(lens, clean, right, wrong, by="component")
assert abs(parts.values.sum() + parts.rest.values.sum() + parts.unexplained - parts.total).max() < 1e-4 * abs(
    parts.total
)
plot.logit_attribution(parts)

# %%
by_head = analysis.logit_attribution(lens, clean, right, wrong, by="head")
plot.head_scores(by_head, what="logits", n_kv_heads=lens.cfg.n_kv_heads, title="Direct logit attribution by head")

# %%
by_source = analysis.logit_attribution(lens, clean, right, wrong, by="source")
plot.logit_attribution(by_source, top=15)

# %%
by_neuron = analysis.logit_attribution(lens, clean, right, wrong, by="neuron")
plot.logit_attribution(by_neuron, top=15)

# %% [markdown]
# ## Attribution patching
#
# The difference between the corrupt and the clean activation, times the gradient (Nanda 2023; Kramár et al. 2024,
# arXiv 2403.00745). It takes one backward pass instead of one run per place, and it is an estimate. Beside it, the
# effect measured by a sweep.

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
# Attribution of every edge from a writer to a reader (EAP-IG: Hanna et al. 2024, arXiv 2403.17806). `completeness` is
# the share of the whole difference that the scores miss: 0 is best.

# %%
scores = None
if edges or (edges is None and lens.cfg.n_layers <= 12):
    scores = circuits.attribute_edges(lens, clean, corrupt, metric=(right, wrong), method="eap-ig")
    print(f"{scores.graph.n_edges} edges, completeness {scores.completeness:.2f}")
plot.circuit(scores.top(25)) if scores else "edges were not requested"
