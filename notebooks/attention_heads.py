# %% [markdown]
# # Bench · Attention heads
#
# Which heads do what, where they look in your prompt, what is lost without them, and what they would write.

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
# ## What heads do
#
# Measured on random words said again. `chance` is a head that attends alike to all that it sees.

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
# ## Where they look in this prompt

# %%
points = [f"blocks.{layer}.{name}" for name in ("attn.pattern", "kv.v")]
_, acts = lens.run_with_cache(prompt, points, logits=False)
patterns = acts["attn.pattern", layer][0].float().cpu()  # head query key
norms = acts["kv.v", layer][0, :, number // lens.cfg.n_groups].float().norm(dim=-1).cpu()
plot.attention_heads(patterns, labels, n_kv_heads=lens.cfg.n_kv_heads, title=f"Attention of layer {layer}")

# %%
plot.attention_pattern(patterns[number], labels, title=f"Head {layer}.{number}")

# %%
plot.attention_pattern(patterns[number], labels, value_norms=norms, title=f"Head {layer}.{number}, by length of value")

# %% [markdown]
# ## What is lost without each head
#
# A head's mixture becomes zero everywhere. The number is how far the next token's probabilities move, in nats: the
# layers of the chosen head and of the best heads above.

# %%
full = lens(prompt, logits_to_keep=1)[0, -1].float().log_softmax(-1)


def without(i, h):
    """KL(with ‖ without) of the next token, for one head."""

    def zero(z, point):
        z[:, :, h] = 0
        return z

    found = lens.run_with_hooks(prompt, {f"blocks.{i}.attn.z": zero})[0, -1].float().log_softmax(-1)
    return float((full.exp() * (full - found)).sum())


layers = sorted({layer, *(i for name in ("previous", "induction") for i, *_ in scores.best(name, 1))})
lost = torch.tensor([[without(i, h) for h in range(lens.cfg.n_heads)] for i in layers])
named = {"layer": [str(i) for i in layers], "head": [str(h) for h in range(lens.cfg.n_heads)]}
plot.heatmap(lost, named, axes=("layer", "head"), what="KL, nats", title="What the next token loses without a head")

# %% [markdown]
# ## What the head would write
#
# If all of its attention went to one token: the tokens whose logits it would raise most, through the final norm's
# weight. Many heads write for later layers to read and not for the unembedding. Of those this table says nothing. In
# the small GLM they are nearly all.

# %%
_, read = lens.run_with_cache(prompt, f"blocks.{layer}.ln1.normalized", logits=False)
x = read["ln1.normalized", layer][0].float()
kv = number // lens.cfg.n_groups
value = x @ lens.W_V[layer, kv].float()
if lens.cfg.qkv_bias:
    value = value + lens.b_V[layer, kv].float()
said = (value @ lens.W_O[layer, number].float() * lens.model.ln_final.weight.float()) @ lens.W_U.float()
rows = [[lens.to_labels(torch.tensor([[int(t)]]))[0] for t in row.topk(5).indices] for row in said]
pd.DataFrame(rows, index=[f"{i} {label}" for i, label in enumerate(labels)], columns=[f"{n}." for n in range(1, 6)])

# %% [markdown]
# ## By hand
#
# Point at a token to see what it reads and what reads it; click a head to see it whole.

# %%
from glmlens.widgets import AttentionExplorer

AttentionExplorer(lens, prompt)
