# %% [markdown]
# # 10 · Your own checkpoint
#
# All that you have done on the small model works on a GLM-4-9B, with the same names. But it is 4,700 times as large.
# One careless line can ask for more memory than the machine has, and one wrong number in a file can give you a model
# that speaks well and is not the one that was trained. This tutorial is about both. Nothing is downloaded: we write the
# checkpoints that we open.
#
# - **You need**: [tutorial 1](01_from_tokens_to_logits.ipynb) for the names of the parts.
# - **You get**: what opens, what it costs before you pay for it, and the checks to make first.
# - **Time**: about 45 minutes.

# %%
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

import glmlens
from glmlens import analysis, plot, tasks
from glmlens.course import check_10 as check
from glmlens.loading.checkpoint import CheckpointError
from glmlens.text.chat import TemplateError, render_chat

home = Path(tempfile.mkdtemp())
demo = glmlens.load(dtype="float32")

# %% [markdown]
# This is the line that opens the real one. It takes the name of a folder, or of a repository on the hub.
#
# ```python
# lens = glmlens.load("zai-org/glm-4-9b-chat-hf", dtype="bfloat16", device="cuda", rope_theta=5e6)
# ```
#
# - `dtype`: by default the checkpoint's own. Then on a CPU no weight is copied: they are views of the file.
# - `device`: "cpu", "cuda", "mps", or "meta", which reads the config alone.
# - `attention`: "eager" by default, where every score can be seen, or "sdpa", which is faster and shows none.
# - `rope_theta`: in place of the config's. Section 6 says when a model needs it.
#
# Before we pay for it, let us see what a checkpoint is.
#
# ## 1. A checkpoint is a table of names
#
# It is a folder with a `config.json` and files of tensors with names. Here is one of random numbers, small, but as
# GLM-4-9B is published: 16 query heads to one of keys and values, and half of each head turns.

# %%
vocab, d_model, layers, heads, kv_heads, d_head, d_mlp = 320, 64, 2, 16, 1, 16, 96
draw = torch.Generator().manual_seed(0)


def draw_tensor(*shape):
    return torch.randn(*shape, generator=draw) * 0.2


tensors = {"model.embed_tokens.weight": draw_tensor(vocab, d_model), "lm_head.weight": draw_tensor(vocab, d_model)}
tensors["model.norm.weight"] = torch.ones(d_model)
for i in range(layers):
    layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
    tensors[f"{layer}.input_layernorm.weight"] = torch.ones(d_model)
    tensors[f"{layer}.post_attention_layernorm.weight"] = torch.ones(d_model)
    for name, rows in (("q", heads * d_head), ("k", kv_heads * d_head), ("v", kv_heads * d_head)):
        tensors[f"{attention}.{name}_proj.weight"] = draw_tensor(rows, d_model)
        tensors[f"{attention}.{name}_proj.bias"] = draw_tensor(rows)
    tensors[f"{attention}.o_proj.weight"] = draw_tensor(d_model, heads * d_head)
    tensors[f"{layer}.mlp.gate_up_proj.weight"] = draw_tensor(2 * d_mlp, d_model)
    tensors[f"{layer}.mlp.down_proj.weight"] = draw_tensor(d_model, d_mlp)

config = {
    "model_type": "glm", "architectures": ["GlmForCausalLM"], "dtype": "float32", "vocab_size": vocab,
    "hidden_size": d_model, "intermediate_size": d_mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
    "num_key_value_heads": kv_heads, "head_dim": d_head, "attention_bias": True, "rms_norm_eps": 1.5625e-07,
    "max_position_embeddings": 8192, "rope_theta": 5e6, "tie_word_embeddings": False, "eos_token_id": [1],
    "pad_token_id": 0,
}  # fmt: skip


def write_folder(name, config, tensors):
    """Write a folder with a config and tensors; return its path."""
    folder = home / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


small = glmlens.load(write_folder("glm", config, tensors))
assert small.cfg.n_groups == 16  # query heads that share one key-value head
assert small.cfg.d_rotary == 8  # half of 16, though the config does not say so: it is what its absence means
small

# %% [markdown]
# There is no tokenizer in this folder, so it takes token ids. All else is there.

# %%
ids = torch.randint(2, vocab, (1, 12), generator=draw)
logits, acts = small.run_with_cache(ids, "attn.pattern")
assert acts["attn.pattern"].shape == (2, 1, 16, 12, 12)  # layer batch head query key

# %% [markdown]
# The same model was first published in another form, `chatglm`. Its fields and tensors have other names, and q, k and v
# are rows of one matrix. We write that form too, of the same numbers. What opens is one and the same model.

# %%
theirs = {
    "model_type": "chatglm", "torch_dtype": "float32", "padded_vocab_size": vocab, "hidden_size": d_model,
    "ffn_hidden_size": d_mlp, "num_layers": layers, "num_attention_heads": heads, "multi_query_attention": True,
    "multi_query_group_num": kv_heads, "kv_channels": d_head, "add_qkv_bias": True, "layernorm_epsilon": 1.5625e-07,
    "seq_length": 8192, "rope_ratio": 500, "eos_token_id": [1], "pad_token_id": 0,
}  # fmt: skip
fused = {
    "transformer.embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
    "transformer.output_layer.weight": tensors["lm_head.weight"],
    "transformer.encoder.final_layernorm.weight": tensors["model.norm.weight"],
}
for i in range(layers):
    ours, other = f"model.layers.{i}", f"transformer.encoder.layers.{i}"
    for part in ("weight", "bias"):
        rows = [tensors[f"{ours}.self_attn.{name}_proj.{part}"] for name in "qkv"]
        fused[f"{other}.self_attention.query_key_value.{part}"] = torch.cat(rows)
    fused[f"{other}.self_attention.dense.weight"] = tensors[f"{ours}.self_attn.o_proj.weight"]
    fused[f"{other}.mlp.dense_h_to_4h.weight"] = tensors[f"{ours}.mlp.gate_up_proj.weight"]
    fused[f"{other}.mlp.dense_4h_to_h.weight"] = tensors[f"{ours}.mlp.down_proj.weight"]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        fused[f"{other}.{norm}.weight"] = tensors[f"{ours}.{norm}.weight"]

original = glmlens.load(write_folder("chatglm", theirs, fused))
assert torch.allclose(original(ids), logits, atol=1e-4)
assert original.cfg.rope_theta == small.cfg.rope_theta == 5e6  # 10,000 times the ratio

# %% [markdown]
# Five forms open:
#
# | `model_type` | for example |
# |---|---|
# | `glm` | GLM-4-9B-hf, GLM-4-9B-chat-hf, GLM-Edge |
# | `glm4` | GLM-4-0414, GLM-Z1: with two more norms in each layer |
# | `chatglm` | ChatGLM2, ChatGLM3 and GLM-4-9B as first published |
# | `llama`, `qwen2` | models whose sums are those of a GLM with other names |
#
# [This page](formats.md) says more. What was opened can be written again, in the form that transformers opens.

# %%
copy = glmlens.load(demo.save(home / "copy"))
assert torch.equal(copy("Mary went to the"), demo("Mary went to the"))
print(sorted(path.name for path in (home / "copy").iterdir()))

# %% [markdown]
# ## 2. What it weighs
#
# Now the large one. We write the config of GLM-4-9B, and no weights. On the device "meta" this is enough: tensors have
# shapes there, and no numbers.

# %%
big_config = {
    "model_type": "glm", "architectures": ["GlmForCausalLM"], "dtype": "bfloat16", "vocab_size": 151552,
    "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "rms_norm_eps": 1.5625e-07,
    "max_position_embeddings": 131072, "rope_theta": 5e6, "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
}  # fmt: skip
(home / "big").mkdir()
(home / "big" / "config.json").write_text(json.dumps(big_config))
big = glmlens.load(home / "big", device="meta")
big

# %% [markdown]
# With $V$ tokens in the vocabulary, $L$ layers, $H$ query heads, $K$ key-value heads of $d$ channels, and widths
# $d_\text{model}$ and $d_\text{mlp}$, these are its parameters. The two tables come first, then the norms, then
# attention with its biases, then the MLPs:
#
# $$2 V d_\text{model} + (2L + 1)\, d_\text{model} + L\, \big( (2H + 2K)\, d\, d_\text{model} + (H + 2K)\, d \big)
# + 3 L\, d_\text{mlp}\, d_\text{model}$$

# %%
c = big.cfg
tables, norms = 2 * c.d_vocab * c.d_model, (2 * c.n_layers + 1) * c.d_model
per_layer = (2 * c.n_heads + 2 * c.n_kv_heads) * c.d_head * c.d_model + (c.n_heads + 2 * c.n_kv_heads) * c.d_head
mlps = 3 * c.n_layers * c.d_mlp * c.d_model
parameters = tables + norms + c.n_layers * per_layer + mlps
weights = sum(p.nbytes for p in big.model.parameters())
print(f"{parameters:,} parameters, {weights / 1e9:.1f} GB in bfloat16, of which the MLPs {2 * mlps / weights:.0%}")
assert parameters == sum(p.numel() for p in big.model.parameters()) == 9_399_951_360
assert weights == 2 * parameters
assert 4_500 < parameters / sum(p.numel() for p in demo.model.parameters()) < 4_900

# %% [markdown]
# ### Exercise 10.1 · How long a text fits
#
# Beside the weights a model that generates needs room for its cache: a key and a value for every layer and every
# key-value head ([tutorial 5](05_kv_cache.ipynb)). Write a function of a config, the bytes of the weights, the bytes of
# the `memory` and those of one number (2 in bfloat16), that gives how many tokens can be cached. A config has
# `n_layers`, `n_heads`, `n_kv_heads` and `d_head`. It is 0 where not even the weights fit.

# %%
longest = ...  # def longest(cfg, weights, memory, size): ...
check.exercise_10_1(longest)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def longest(cfg, weights, memory, size):
#     per_token = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * size
#     return max(0, memory - weights) // per_token
# ```
#
# On a card of 24 GB these are 126,955 tokens of GLM-4-9B, if nothing else is to be held.
#
# </details>
#
# <details>
# <summary>A wrong turn: all heads</summary>
#
# ```python
# def longest(cfg, weights, memory, size):
#     per_token = 2 * cfg.n_layers * cfg.n_heads * cfg.d_head * size
#     return max(0, memory - weights) // per_token
# ```
#
# Queries are not cached, and 16 query heads share one head of keys and values.
#
# </details>
#
# <details>
# <summary>A wrong turn: less than nothing</summary>
#
# ```python
# def longest(cfg, weights, memory, size):
#     per_token = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * size
#     return (memory - weights) // per_token
# ```
#
# Where the weights do not fit it gives a negative number of tokens.
#
# </details>

# %% [markdown]
# ## 3. What a recording weighs
#
# `check` says it, without running anything.

# %%
thousand = torch.zeros(1, 1024, dtype=torch.long)
big.check(thousand, names=["resid_post", "attn.z"])

# %% [markdown]
# Let us ask for several things and several lengths. The upward axis is logarithmic: each grid line is ten times the
# one below. (Two lines are nearly one: the stream of 40 layers and the logits of 151,552 tokens weigh about the same.)

# %%
lengths = (128, 512, 2048, 8192, 32768)


def recording_gigabytes(names, n):
    return big.check(torch.zeros(1, n, dtype=torch.long), names).bytes / 1e9


def cache_gigabytes(n):
    kv = big.new_kv(1, n)
    return (kv.keys.nbytes + kv.values.nbytes) / 1e9


costs = {
    "the weights": [weights / 1e9 for n in lengths],
    "the KV cache": [cache_gigabytes(n) for n in lengths],
    "resid_post, one layer": [recording_gigabytes("blocks.20.resid_post", n) for n in lengths],
    "resid_post": [recording_gigabytes("resid_post", n) for n in lengths],
    "logits": [recording_gigabytes("logits", n) for n in lengths],
    "attn.pattern": [recording_gigabytes("attn.pattern", n) for n in lengths],
}
figure = plot.lines(
    torch.tensor(list(costs.values())),
    {"what": list(costs), "tokens": [f"{n:,}" for n in lengths]},
    axes=("what", "tokens"),
    what="GB",
    title="GLM-4-9B in bfloat16: what a recording weighs",
)
figure.update_yaxes(type="log")

# %% [markdown]
# Two surprises. The cache weighs nearly nothing: 41 kB per token, because 32 heads share 2. With 32 heads of keys and
# values it would be 16 times as much. And the weights are soon not the problem: patterns grow with the *square* of the
# length. At 8,192 tokens they are 172 GB, nine times the model.

# %%
per_token = cache_gigabytes(1024) * 1e9 / 1024
assert per_token == 2 * 40 * 2 * 128 * 2 == 40_960
assert 170 < costs["attn.pattern"][3] < 173
assert costs["attn.pattern"][3] > 9 * weights / 1e9
assert costs["resid_post"][3] < 3

# %% [markdown]
# ### Exercise 10.2 · As much as the model
#
# At how many tokens do the patterns of all layers weigh as much as the weights? Give a number, to one per cent. A
# pattern is `[batch, head, query, key]`.

# %%
tokens = ...
check.exercise_10_2(tokens)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# tokens = (weights / (2 * c.n_layers * c.n_heads)) ** 0.5
# ```
#
# 2 bytes, 40 layers, 32 heads: $2560\, n^2$ bytes. That is 2,710 tokens, about five pages of text.
#
# </details>
#
# <details>
# <summary>A wrong turn: one layer</summary>
#
# ```python
# tokens = (weights / (2 * c.n_heads)) ** 0.5
# ```
#
# All layers were asked for.
#
# </details>
#
# <details>
# <summary>A wrong turn: heads of keys</summary>
#
# ```python
# tokens = (weights / (2 * c.n_layers * c.n_kv_heads)) ** 0.5
# ```
#
# Keys are shared, patterns are not: each query head has its own.
#
# </details>

# %% [markdown]
# ## 4. Record what you need
#
# Three habits make almost everything affordable.
#
# **Name points.** By default everything is recorded, less what follows from the rest. On 1,024 tokens that is 3.9 GB,
# and one layer of the stream is 8 MB. Many points need not be stored at all: they are computed from others when you
# ask.

# %%
everything = big.check(thousand, "all")
one = big.check(thousand, "blocks.20.resid_post")
print(f"{everything.points.bytes / 1e9:.1f} GB of points, {everything.bytes / 1e9:.1f} GB stored")
print(f"{one.bytes / 1e6:.1f} MB for one layer of the stream")
assert one.bytes == 1024 * 4096 * 2
assert everything.bytes < everything.points.bytes / 3

# %% [markdown]
# **Do not run what you do not read.** A run without logits ends after the last point that you name. With logits,
# `logits_to_keep=1` unembeds the last position alone: of 1,024 tokens the logits are 310 MB, of one 0.3 MB.

# %%
entered = []
watches = [block.register_forward_pre_hook(lambda *_: entered.append(1)) for block in demo.model.blocks]
demo.run_with_cache("Mary went to the", "blocks.1.resid_post", logits=False)
for watch in watches:
    watch.remove()
assert len(entered) == 2  # of four layers

# %% [markdown]
# **Write to disk.** For a probe or a dictionary you need activations of thousands of texts. `harvest` writes a row per
# token, in shards, and holds one batch and one shard in memory. When it is killed, the same call goes on where it was.

# %%
texts = tasks.ioi.examples(demo, 40).texts
harvest = demo.harvest(texts, "blocks.2.resid_post", home / "harvest", batch=8)
rows = sum(len(batch) for batch in harvest.batches(("resid_post", 2), 256))
assert rows == len(harvest) == sum(demo.to_tokens(text).shape[1] for text in texts)
print(f"{harvest}; a million tokens of one point of the large model: {1e6 * 4096 * 2 / 1e9:.1f} GB")

# %% [markdown]
# ### Exercise 10.3 · What each head writes
#
# You want what every head of GLM-4-9B writes into the stream, `acts["attn.result"]` `[layer, batch, pos, head, model]`,
# for 1,024 tokens. You have half a gigabyte. Give the `names` to record.

# %%
print(f"attn.result: {big.check(thousand, 'attn.result').bytes / 1e9:.1f} GB")

# %%
names = ...
check.exercise_10_3(names)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# names = "attn.z"
# ```
#
# What a head writes is what it mixed, times its own part of $W_O$: `attn.result` follows from `attn.z`, which has 128
# channels a head and not 4,096. Ask for one layer at a time: `acts["attn.result", 20]`.
#
# </details>
#
# <details>
# <summary>A wrong turn: by its name</summary>
#
# ```python
# names = "attn.result"
# ```
#
# This stores it: 10.7 GB.
#
# </details>
#
# <details>
# <summary>A wrong turn: the sum</summary>
#
# ```python
# names = "attn_out"
# ```
#
# The sum over heads. It can not be taken apart again.
#
# </details>

# %% [markdown]
# ## 5. What changes at that size
#
# **One entry, sixteen readers.** Edit `kv.k` of one head, and 16 query heads see it. For one of them alone, edit its
# scores or its `attn.z`. In `attn.q` there are 32 heads, in `attn.k` two:

# %%
shapes = {point.name: point.shape for point in big.points(thousand)}
assert shapes["blocks.0.attn.q"] == (1, 1024, 32, 128)
assert shapes["blocks.0.attn.k"] == (1, 1024, 2, 128)
assert shapes["blocks.0.attn.q_rot"] == (1, 1024, 32, 64)  # half of a head turns
assert not c.tied  # embedding and unembedding are two tables: a logit lens needs the second

# %% [markdown]
# **Other words.** A vocabulary of 151,552 has other words in one piece than the 1,110 of the small model. Code that
# takes an answer's id should ask for it with `to_single_token`, which says so when a word is not one token. Tasks do.

# %%
try:
    demo.to_single_token(" large")
    raise AssertionError("one token")
except ValueError as e:
    print(e)

# %% [markdown]
# **Rounding.** Large models run in bfloat16, which keeps 8 bits of a number: steps of 0.4 to 0.8 per cent. Every sum is
# rounded. Here is the small model in both.

# %%
examples = tasks.ioi.examples(demo, 60).of_length()  # of one length: no padding
half = glmlens.load(dtype="bfloat16")
fused_half = glmlens.load(dtype="bfloat16", attention="sdpa")
exact, rounded, other = (lens(examples).float() for lens in (demo, half, fused_half))


def share_different(a, b):
    """Return the share of positions at which two runs predict different tokens, from the first word on."""
    return float((a[:, 2:].argmax(-1) != b[:, 2:].argmax(-1)).float().mean())


by_dtype, by_kernel = share_different(exact, rounded), share_different(rounded, other)
print(f"float32 and bfloat16 differ in {by_dtype:.1%}, eager and sdpa in {by_kernel:.1%}")
assert 0.01 < by_dtype < 0.15
assert 0.01 < by_kernel < 0.15
assert examples.accuracy(exact) == examples.accuracy(rounded) == 1  # what is clear stays clear

# %% [markdown]
# `sdpa` computes the same attention in another order, and in bfloat16 the most probable token changes at some per cent
# of all places, where several are about equal. An experiment may well look for effects of this size. So here nothing
# chooses between the two behind your back: what you asked for in `load` is used, whether or not you record. Compare
# runs of one dtype and one kind of attention only.
#
# ## 6. One wrong number
#
# Rotary angles are made of one number, theta ([tutorial 4](04_rotary.ipynb)): pair $i$ of $d_r$ channels turns by
# $\text{position} \cdot \theta^{-2i/d_r}$. The original GLM-4-9B-chat says `rope_ratio: 500`, which means
# $\theta = 5 \cdot 10^6$. The script that converted such checkpoints to the `glm` form read the ratio in a way that
# always gave 1, and wrote 10,000. No tensor is wrong then, so nothing fails. glmlens does what a config says, and warns
# where it looks like this:

# %%
(home / "suspect").mkdir()
(home / "suspect" / "config.json").write_text(json.dumps({**big_config, "rope_theta": 10000.0}))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    suspect = glmlens.load(home / "suspect", device="meta")
print(caught[0].message)
assert suspect.cfg.rope_theta == 10000.0  # obeyed
assert "rope_theta=5e6" in str(caught[0].message)
assert glmlens.load(home / "suspect", device="meta", rope_theta=5e6).cfg.rope_theta == 5e6

# %% [markdown]
# Would you notice? We do it to our own model, which was trained with 10,000: once with a theta that is 500 times too
# large, once with one that is 20 times too small.

# %%
thetas = (500.0, 10_000.0, 5e6)
asked = {name: tasks.TASKS[name].examples(demo, 30) for name in ("facts", "sentiment", "agreement", "induction", "ioi")}
lenses = [glmlens.load(home / "copy", rope_theta=theta) for theta in thetas]
right = torch.tensor([[one.accuracy(lens(one)) for one in asked.values()] for lens in lenses])
plot.heatmap(
    right,
    {"theta": [f"{theta:,.0f}" for theta in thetas], "task": list(asked)},
    axes=("theta", "task"),
    what="accuracy",
    limits=(0, 1),
    title="Trained with 10,000",
)

# %%
for lens in lenses:
    goes_on = lens.generate(examples.texts[0], 9).text
    print(f"{lens.cfg.rope_theta:>11,.0f} {goes_on!r}")
facts, who = right[:, 0], right[:, -1]
assert facts.min() > 0.95
assert right[:, 1].min() > 0.95
assert who[1] == 1
assert max(who[0], who[2]) < 0.8

# %% [markdown]
# Both broken models know all facts, feel what they should and write sentences. What is lost is who gives to whom, which
# depends on where words stand. A chat with such a model is pleasant, and a circuit found in it is a circuit of another
# model.
#
# Does the loss tell? Not on the prompts, which end before their answers: with the theta that is too small it is even
# lower. Most of it is about names that no one can know. On whole sentences it is higher. But of your checkpoint you see
# one number, and 1.6 does not look wrong by itself.

# %%
sentences = [
    text + example.item.correct[0] + "." for text, example in zip(texts, tasks.ioi.examples(demo, 40), strict=True)
]
of_prompts, of_sentences = ([float(lens.loss(some)) for lens in lenses] for some in (texts, sentences))
print([round(x, 2) for x in of_prompts], [round(x, 2) for x in of_sentences])
assert of_prompts[0] < of_prompts[1]
assert of_sentences[1] + 0.1 < min(of_sentences[0], of_sentences[2])

# %% [markdown]
# And a check of the machinery can not see it, for the machinery is sound:

# %%
analysis.selfcheck(lenses[0])  # it raises when something does not hold

# %% [markdown]
# `analysis.selfcheck(lens)` is still the first thing to run on a new checkpoint: sums are sums, no attention goes to
# later tokens, one token at a time equals one pass. It proves that glmlens and the file fit. That the file is the model
# which was trained, only a task can prove whose answers you know.
#
# ### Exercise 10.4 · Which theta?
#
# Write a function that is given the folder of a checkpoint whose theta is lost and a list of candidates, and returns
# the right one. The model in the folder is like ours, and all of `tasks` can be asked.

# %%
find_theta = ...  # def find_theta(folder, candidates): ...
check.exercise_10_4(find_theta)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def find_theta(folder, candidates):
#     def works(theta):
#         lens = glmlens.load(folder, rope_theta=theta)
#         who = tasks.ioi.examples(lens, 20)
#         return who.accuracy(lens(who))
#
#     return max(candidates, key=works)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: the loss on prompts</summary>
#
# ```python
# def find_theta(folder, candidates):
#     def loss(theta):
#         return float(glmlens.load(folder, rope_theta=theta).loss(texts))
#
#     return min(candidates, key=loss)
# ```
#
# These texts end before the answer. On whole sentences, as in `sentences`, the least loss does find it.
#
# </details>
#
# <details>
# <summary>A wrong turn: what it says of itself</summary>
#
# ```python
# def find_theta(folder, candidates):
#     return glmlens.load(folder).cfg.rope_theta
# ```
#
# This is the number that is wrong.
#
# </details>

# %% [markdown]
# ## 7. Talking to it, safely
#
# A chat model was trained on text of a certain form. The checkpoint holds a template that makes this form of messages.
# Give messages as a prompt, and it is used. The prefix `[gMASK]<sop>` is there once, never twice.

# %%
messages = [{"role": "user", "content": "What is the capital of France?"}]
message = "".join(demo.to_str_tokens(messages))
print(message, demo.generate(messages, 4).text)
assert message.count("[gMASK]<sop>") == 1
assert message.endswith("<|assistant|>")
assert demo.generate(messages, 4).text.strip().startswith("Paris")

# %% [markdown]
# A template is a program by a stranger. So is a file of pickle, and the Python code that some checkpoints carry. Here
# weights are read from safetensors alone, which hold numbers and nothing else, and Python code is never run. Templates
# run in a sandbox. All but a few that are known run in a process of their own, which is ended after a second.


# %%
def error_of(kind, call):
    """Return the message of a call that must raise."""
    try:
        call()
    except kind as e:
        print(f"{kind.__name__}: {str(e).removeprefix(str(home))}\n")
        return str(e)
    raise AssertionError("no error was raised")


message = error_of(TemplateError, lambda: render_chat("{{ messages.__class__.__mro__ }}", messages))
assert "SecurityError" in message

(home / "pickled").mkdir()
(home / "pickled" / "config.json").write_text(json.dumps(config))
torch.save({}, home / "pickled" / "pytorch_model.bin")
message = error_of(CheckpointError, lambda: glmlens.load(home / "pickled"))
assert "never pickle" in message

# %% [markdown]
# What would open as something else is refused as well: quantised weights, a tensor of another shape, or one that is
# missing. The message names the file, the tensor, what was expected and what was found.

# %%
(home / "quantised").mkdir()
(home / "quantised" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
message = error_of(CheckpointError, lambda: glmlens.load(home / "quantised"))
assert "quantised" in message

lacking = {name: x for name, x in tensors.items() if name != "model.layers.1.mlp.down_proj.weight"}
message = error_of(CheckpointError, lambda: glmlens.load(write_folder("lacking", config, lacking)))
assert "model.layers.1.mlp.down_proj.weight" in message

shutil.rmtree(home)  # all that we wrote

# %% [markdown]
# ## What to keep
#
# Before the line that opens the real one:
#
# 1. `glmlens.load(folder, device="meta").check(prompt, names)`: what will it weigh?
# 2. `names=...`, never everything. Patterns grow with the square.
# 3. After opening: `analysis.selfcheck(lens)`, and a task whose answers you know.
# 4. One dtype and one kind of attention for all runs that you compare.
#
# ```python
# lens = glmlens.load("zai-org/glm-4-9b-chat-hf", dtype="bfloat16", device="cuda", rope_theta=5e6)
# examples = glmlens.tasks.ioi.examples(lens, 100)  # under its own tokenizer
# print(examples.accuracy(lens(examples, logits_to_keep=1)))
# ```
#
# This is the end of the course. Everything in it works on that lens.
#
# ## Sources
#
# - GLM Team 2024, *ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All Tools*, arXiv 2406.12793: the
#   models.
# - Ainslie et al. 2023, *GQA*, arXiv 2305.13245: heads that share keys and values.
# - Su et al. 2021, *RoFormer*, arXiv 2104.09864: the angles.
# - Dao et al. 2022, *FlashAttention*, arXiv 2205.14135: attention that never writes its pattern.
# - Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*, transformer-circuits.pub: what a head
#   writes, head by head.
