# %% [markdown]
# # Bench · The KV cache
#
# What a prompt leaves behind for the next token: who reads which entry, what is lost without it, and what may go.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
prompt = "The capital of France is"
layer = None  # the layer whose heads are shown one by one; None: the one that reads most from the past

# %%
import glmlens
from glmlens import analysis, cache, plot

lens = glmlens.load(model, dtype=dtype or (None if model else "float32"), device=device)
tokens = lens.to_tokens(prompt)
kv = lens.new_kv()
lens(tokens[:, :-1], kv=kv)  # all but the last token, which asks
last = tokens[:, -1:]
full = lens(last, kv=kv.fork())[0, -1].float().log_softmax(-1)
print("it says", lens.generate(last, 1, kv=kv).text)
kv

# %% [markdown]
# ## What is held
#
# The length of every entry's key and value, over its key-value heads.

# %%
plot.cache_norms(kv, lens.to_labels(prompt)[:-1])

# %%
plot.cache_norms(kv, lens.to_labels(prompt)[:-1], of="values")

# %% [markdown]
# ## Who reads it
#
# The length of what the heads write for each entry, when the next token is said.

# %%
reads = analysis.cache_reads(lens, prompt)
plot.cache_reads(reads)

# %%
past = reads.weighted.values[..., :-1].sum((1, 2))
chosen = int(past.argmax()) if layer is None else layer
plot.cache_reads(reads, "direct", layer=chosen)

# %% [markdown]
# ## What is lost without an entry
#
# The step that says the next token lacks one entry at a time. In nats.

# %%
lost = analysis.leave_one_out(lens, prompt)
plot.leave_one_out(lost)

# %%
plot.leave_one_out(analysis.leave_one_out(lens, prompt, by="position"))

# %% [markdown]
# ## What may go
#
# Entries from the most to the least dispensable, and what it costs to drop the first n of them at once.

# %%
spare = analysis.eviction_curve(lens, prompt, by="entry")
plot.eviction(spare)

# %% [markdown]
# ## Operations on the whole
#
# What the next token loses with each, in nats. Moving all of it together with the question should cost nothing: scores
# know distances alone.

# %%
operations = {
    "8 bits": cache.quantise(8),
    "4 bits": cache.quantise(4),
    "2 bits": cache.quantise(2),
    "the last 3 and two sinks": cache.evict(cache.keep_window(3, sinks=2)),
    "all 100 later, the question too": cache.reposition(lens, 100),
    f"values of layer {chosen} zero": cache.ablate(layer=chosen),
}
costs = {}
for name, operation in operations.items():
    said = lens(last, kv=operation(kv))[0, -1].float().log_softmax(-1)
    costs[name] = float((full.exp() * (full - said)).sum())
plot.bars(list(costs.values()), {"part": list(costs)}, what="KL, nats", title="What each operation costs")

# %% [markdown]
# ## By hand
#
# Entries by layer and position at every step of a generation: who reads them, and what is said without one.

# %%
from glmlens.widgets import CacheInspector

CacheInspector(lens, prompt)
