# %% [markdown]
# # Workbench · Attention heads
#
# Head scores, attention in your prompt, the effect of ablating each head, and the logits that a head writes to.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
prompt = "When Mary and John went to the store, John gave a drink to"
head = None  # [layer, head]; None: the best induction head

# %%
import pandas as pd
import torch

import glmlens
from glmlens import analysis, plot

lens = glmlens.load(model, dtype=dtype or (None if model else "float32"), device=device)
labels = lens.to_labels(prompt)
lens

# %% [markdown]
# ## Head scores
#
# Measured on repeated random words. `chance` is the score of uniform causal attention.

# %%
scores = analysis.head_scores(lens)
layer, number = head or scores.best("induction", 1)[0][:2]
print(f"below: head {layer}.{number}")
scores

# %%
plot.head_scores(scores, "previous", n_kv_heads=lens.cfg.n_kv_heads)

# %%
plot.head_scores(scores, "induction", n_kv_heads=lens.cfg.n_kv_heads)

# %% [markdown]
# ## Attention in this prompt

# %%
points = [f"blocks.{layer}.{name}" for name in ("attn.pattern", "kv.v")]
_, acts = lens.run_with_cache(prompt, points, logits=False)
patterns = acts["attn.pattern", layer][0].float().cpu()  # head query key
norms = acts["kv.v", layer][0, :, number // lens.cfg.n_groups].float().norm(dim=-1).cpu()
plot.attention_heads(patterns, labels, n_kv_heads=lens.cfg.n_kv_heads, title=f"Attention of layer {layer}")

# %%
plot.attention_pattern(patterns[number], labels, title=f"Head {layer}.{number}")

# %%
plot.attention_pattern(
    patterns[number], labels, value_norms=norms, title=f"Head {layer}.{number}, weighted by value norm"
)

# %% [markdown]
# ## Ablation of each head
#
# The head's output is set to zero at all positions. The number is the KL divergence of the next token, in nats, for the
# layers of the chosen head and of the best heads above.

# %%
full = lens(prompt, logits_to_keep=1)[0, -1].float().log_softmax(-1)


def ablation_kl(i, h):
    """KL(full ‖ ablated) of the next token, for one head."""

    def zero(z, point):
        z[:, :, h] = 0
        return z

    ablated = lens.run_with_hooks(prompt, {f"blocks.{i}.attn.z": zero})[0, -1].float().log_softmax(-1)
    return float((full.exp() * (full - ablated)).sum())


layers = sorted({layer, *(i for name in ("previous", "induction") for i, *_ in scores.best(name, 1))})
kl = torch.tensor([[ablation_kl(i, h) for h in range(lens.cfg.n_heads)] for i in layers])
named = {"layer": [str(i) for i in layers], "head": [str(h) for h in range(lens.cfg.n_heads)]}
plot.heatmap(kl, named, axes=("layer", "head"), what="KL, nats", title="KL when a head is ablated")

# %% [markdown]
# ## The head's OV circuit
#
# The tokens whose logits it would raise most if all of its attention went to one token, through the final norm's
# weight. Many heads write for later layers and not for the unembedding. The table tells nothing about those. In the
# small GLM they are nearly all.

# %%
_, read = lens.run_with_cache(prompt, f"blocks.{layer}.ln1.normalized", logits=False)
x = read["ln1.normalized", layer][0].float()
kv = number // lens.cfg.n_groups
value = x @ lens.W_V[layer, kv].float()
if lens.cfg.qkv_bias:
    value = value + lens.b_V[layer, kv].float()
logits = (value @ lens.W_O[layer, number].float() * lens.model.ln_final.weight.float()) @ lens.W_U.float()
rows = [[lens.to_labels(torch.tensor([[int(t)]]))[0] for t in row.topk(5).indices] for row in logits]
pd.DataFrame(rows, index=[f"{i} {label}" for i, label in enumerate(labels)], columns=[f"{n}." for n in range(1, 6)])

# %% [markdown]
# ## Interactive
#
# Point at a token to see the keys it attends to and the queries that attend to it; click a head to enlarge it.

# %%
from glmlens.widgets import AttentionExplorer

AttentionExplorer(lens, prompt)
