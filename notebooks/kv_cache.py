# %% [markdown]
# # Workbench · The KV cache
#
# The keys and values that a prompt leaves for the next token: which heads read which entry, how far the prediction
# moves without it, and which entries can be evicted.

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
lens(tokens[:, :-1], kv=kv)  # all but the last token, whose query reads them
last = tokens[:, -1:]
full = lens(last, kv=kv.fork())[0, -1].float().log_softmax(-1)
print("predicted:", lens.generate(last, 1, kv=kv).text)
kv

# %% [markdown]
# ## Norms
#
# The norm of every entry's key and value, over its key-value heads.

# %%
plot.cache_norms(kv, lens.to_labels(prompt)[:-1])

# %%
plot.cache_norms(kv, lens.to_labels(prompt)[:-1], of="values")

# %% [markdown]
# ## Which entries are read
#
# The norm of what the heads write for each entry (attention times value) when the next token is predicted.

# %%
reads = analysis.cache_reads(lens, prompt)
plot.cache_reads(reads)

# %%
past = reads.weighted.values[..., :-1].sum((1, 2))
chosen = int(past.argmax()) if layer is None else layer
plot.cache_reads(reads, "direct", layer=chosen)

# %% [markdown]
# ## Leave one out
#
# KL divergence of the next token, in nats, when the decoding step cannot read one entry.

# %%
left_out = analysis.leave_one_out(lens, prompt)
plot.leave_one_out(left_out)

# %%
plot.leave_one_out(analysis.leave_one_out(lens, prompt, by="position"))

# %% [markdown]
# ## Eviction
#
# Entries from the most to the least dispensable, and the KL divergence when the first n of them are removed at once.

# %%
curve = analysis.eviction_curve(lens, prompt, by="entry")
plot.eviction(curve)

# %% [markdown]
# ## Operations on the whole cache
#
# KL divergence of the next token after each, in nats. Moving all entries together with the query should cost nothing:
# scores depend on distances alone.

# %%
operations = {
    "8 bits": cache.quantise(8),
    "4 bits": cache.quantise(4),
    "2 bits": cache.quantise(2),
    "the last 3 entries and two sinks": cache.evict(cache.keep_window(3, sinks=2)),
    "all positions 100 later, the query too": cache.reposition(lens, 100),
    f"values of layer {chosen} zero": cache.ablate(layer=chosen),
}
costs = {}
for name, operation in operations.items():
    logprobs = lens(last, kv=operation(kv))[0, -1].float().log_softmax(-1)
    costs[name] = float((full.exp() * (full - logprobs)).sum())
plot.bars(list(costs.values()), {"part": list(costs)}, what="KL, nats", title="KL after each operation")

# %% [markdown]
# ## Interactive
#
# Entries by layer and position at every step of a generation: which heads read them, and what is generated without one.

# %%
from glmlens.widgets import CacheInspector

CacheInspector(lens, prompt)
