# %% [markdown]
# # 5 · The KV cache
#
# A model that generates reads its text token by token. It does not read it again for each new one: it keeps keys and
# values of all earlier tokens, the **KV cache**. We look at a cache, find out which heads read which entry, and edit
# it, until the capital of France is Tokyo. Then we evict entries on purpose, and the model becomes better.
#
# - **You need**: [tutorial 4](04_rotary.ipynb), or to know that keys are turned.
# - **You get**: how a KV cache is written and read, what it weighs, and how its entries are edited, moved and evicted.
# - **Time**: about 50 minutes.

# %%
import numpy as np
import torch

import glmlens
from glmlens import analysis, cache, plot
from glmlens.course import check_05 as check
from glmlens.course import source
from glmlens.kv_cache import LayerKV

lens = glmlens.load(dtype="float32")
prompt = "The capital of France is"
lens.test_prompt(prompt, " Paris", top=3)

# %% [markdown]
# ## 1. Write and read
#
# Attention needs of all earlier tokens their keys and their values, and nothing else:
#
# $$z_i = \sum_{j \le i} a_{ij}\, v_j \qquad a_{ij} \propto e^{q_i \cdot k_j / \sqrt{d}}$$
#
# And $k_j$ and $v_j$ never change. Token $j$ does not see what comes after it. So a layer stores them once. This is
# all the code:

# %%
source(LayerKV.update)

# %% [markdown]
# Let us run the prompt in two calls. The first writes its entries to `kv`. The second gets the last token alone.

# %%
tokens = lens.to_tokens(prompt)
kv = lens.new_kv()
lens(tokens[:, :-1], kv=kv)
print(kv)
cache.list_entries(lens, kv)  # position, token, and the call that wrote it

# %%
step = lens(tokens[:, -1:], kv=kv.fork())
assert torch.allclose(step[0, -1], lens(prompt)[0, -1], atol=1e-3)
assert kv.length == 6

# %% [markdown]
# Two points tell the two sides apart. `kv.k_new` is what a call **writes** to the cache, `kv.k` all that it **reads**
# from it. Keys are stored *after* they have turned. So each entry belongs to its position.

# %%
_, acts = lens.run_with_cache(tokens[:, -1:], kv=kv.fork())
assert acts["kv.k_new", 1].shape == (1, 1, 4, 32)  # one token: batch pos kv d
assert acts["kv.k", 1].shape == (1, 7, 4, 32)  # all seven: batch key kv d
assert acts["attn.pattern", 1].shape == (1, 8, 1, 7)  # one query, seven keys

_, full = lens.run_with_cache(prompt)
assert torch.allclose(kv.keys[1, :, :6], full["kv.k_new", 1][:, :6], atol=1e-4)
assert torch.allclose(kv.values[1, :, :6], full["attn.v", 1][:, :6], atol=1e-4)
assert not torch.allclose(kv.keys[1, :, :6], full["attn.k", 1][:, :6], atol=1e-4)  # before they turn

# %% [markdown]
# ## 2. What it weighs
#
# An entry is a key and a value for every layer and every key-value head. Per token that is
#
# $$2 \cdot n_\text{layers} \cdot n_\text{kv heads} \cdot d_\text{head} \cdot \text{bytes per number}$$
#
# Our model has 8 query heads, but only 4 key-value heads. Heads 0 and 1 read the first, 2 and 3 the second. So each
# entry is shared by a **group** of heads (Ainslie et al. 2023).

# %%
assert lens.cfg.n_heads == 2 * lens.cfg.n_kv_heads
assert kv.bytes == 2 * 4 * 4 * 32 * 4 * kv.length
print(f"{kv.bytes // kv.length:,} bytes per token")

# %% [markdown]
# ### Exercise 5.1 · A long text
#
# Write a function that gives the bytes of a cache from a config (`cfg.n_layers`, `cfg.n_kv_heads`, `cfg.d_head`,
# `cfg.n_heads`, ...), the number of tokens, and the bytes of one number. The check asks it about GLM-4-9B too.

# %%
kv_bytes = ...  # def kv_bytes(cfg, tokens, number): ...
check.exercise_5_1(kv_bytes)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def kv_bytes(cfg, tokens, number):
#     return 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * tokens * number
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: all heads</summary>
#
# ```python
# def kv_bytes(cfg, tokens, number):
#     return 2 * cfg.n_layers * cfg.n_heads * cfg.d_head * tokens * number
# ```
#
# So much it would be if every query head had its own keys and values. In GLM-4-9B 16 heads share each.
#
# </details>
#
# <details>
# <summary>A wrong turn: keys alone</summary>
#
# ```python
# def kv_bytes(cfg, tokens, number):
#     return cfg.n_layers * cfg.n_kv_heads * cfg.d_head * tokens * number
# ```
#
# Values are cached too.
#
# </details>

# %% [markdown]
# GLM-4-9B has 40 layers and 2 key-value heads of 128 channels, and reads up to 131,072 tokens. In bfloat16 its cache
# of so long a text weighs 5 GiB. With 32 key-value heads it would be 80 GiB, more than four times the model.

# %%
per_token = 2 * 40 * 2 * 128 * 2
assert per_token == 40 * 2**10
assert per_token * 131_072 == 5 * 2**30
assert per_token * 131_072 * 16 == 80 * 2**30

# %% [markdown]
# ## 3. Who reads what
#
# The step that says "Paris" reads seven entries, its own among them. How? `cache_reads` gives for each head the
# attention, and the length of what it writes for each entry (`weighted`). Here is the attention, summed over the heads
# of each layer.

# %%
reads = analysis.cache_reads(lens, prompt, " Paris")
plot.cache_reads(reads, "attention")

# %%
by_layer = reads.attention.values.sum(1)  # layer key
france = reads.attention.labels["key"].index("5 ·France")
assert by_layer[2, france] > 6.5  # of 8 heads
assert by_layer[:, france].argmax() == 2

# %% [markdown]
# The country is read in every layer, and most of all in layer 2, by seven of eight heads. So is it layer 2 that brings
# the country to the answer? Reading is not using. `leave_one_out` takes entries away, one at a time, from this step
# alone, and says how far the answer moves (KL, in nats). One entry is one position in one layer and one key-value head.

# %%
one = analysis.leave_one_out(lens, prompt, " Paris")
plot.leave_one_out(one, "kl", title="What the next token loses without one entry: KL, nats")

# %%
whole_position = analysis.leave_one_out(lens, prompt, " Paris", by="position")
print(f"the worst single entry costs {np.nanmax(one.kl.values):.2f} nats")
print(f"all of France costs {whole_position.kl.values[france]:.2f} nats")
assert np.nanmax(one.kl.values) < 0.4
assert np.nanmax(one.kl.values[2]) < 0.01  # layer 2 is read most, and nothing is lost
assert whole_position.kl.values[france] > 2
assert np.delete(whole_position.kl.values, france)[:5].max() < 0.1

# %% [markdown]
# No single entry is needed, and of those in layer 2 none matters at all. But without the country in *all* layers the
# answer is gone. It was read several times, and each reading can stand in for the others. You know this from the
# induction heads of tutorial 3.
#
# ## 4. Editing entries
#
# An operation of `glmlens.cache` is a function from a cache to a new one. The old one stays as it was. First we ablate
# the entry of France.


# %%
def answer(kv, text=" is"):
    """Return the most probable token after a cache and one more token, and its probability."""
    p = lens(lens.to_tokens(text, prefix=False), kv=kv.fork())[0, -1].softmax(-1)
    return lens.to_str_tokens(p.argmax()[None, None])[0], float(p.max())


blank = cache.ablate(position=5)  # the entry stays, but its values are zero
print("as it is:", answer(kv))
print("blank:   ", answer(blank(kv)))
assert answer(kv)[0] == " Paris"
assert answer(blank(kv))[0] != " Paris"
assert answer(blank(kv))[1] > 0.9

# %% [markdown]
# It says another capital, and is nearly as certain as before! It does not know that it does not know. Remember this
# when you ablate: what is missing does not leave a hole. Something else is read in its place.
#
# ### A graft
#
# Now we do not take an entry away. We bring another. A second run reads about Japan. We replace France's keys and
# values with Japan's.

# %%
japan = lens.new_kv()
lens(lens.to_tokens("The capital of Japan is")[:, :-1], kv=japan)

grafted = cache.graft(lens, japan, of=" Japan", at=" France")(kv)
print("the capital of France is", answer(grafted))
assert answer(grafted)[0] == " Tokyo"
assert answer(kv)[0] == " Paris"  # the first cache is as it was

# %% [markdown]
# "The", "capital" and "of" are still those of the text about France. (They came before the country, so they are the
# same.) All that the answer needs of the country is in one position.
#
# An entry has two halves. Let us bring them one by one.

# %%
theirs = slice(0, japan.length)
keys_only = cache.edit(keys=lambda x, at, layer: japan.keys[layer, :, theirs], position=5)
values_only = cache.edit(values=lambda x, at, layer: japan.values[layer, :, theirs], position=5)
print("keys of Japan:  ", answer(keys_only(kv)))
print("values of Japan:", answer(values_only(kv)))
assert answer(keys_only(kv))[0] == " Paris"
assert answer(values_only(kv))[0] == " Tokyo"

# %% [markdown]
# That is QK and OV once more. Keys say where to look, and both countries are countries at the same place. Values say
# what is there.
#
# Every operation is also a hook. Then the cache stays as it is, and what a run *reads* from it is changed, at all steps
# or at some.

# %%
swap = cache.swap(japan, position=5)
after_prompt = lens.run_with_hooks(tokens[:, -1:], swap.hooks(lens, own=False), kv=kv.fork())
assert torch.allclose(after_prompt[0, -1], lens(tokens[:, -1:], kv=swap(kv))[0, -1], atol=1e-3)

# %% [markdown]
# ### Exercise 5.2 · Half a graft
#
# The whole graft is four layers of one position. Two are enough: which? Find two layers whose entries of Japan make the
# model say " Tokyo" with more than 90 %. You may use `cache.swap(japan, layer=..., position=5)`.

# %%
layers = ...  # (…, …)
check.exercise_5_2(layers)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# layers = (0, 3)
# ```
#
# Layer 0 is where the last token first hears of the country. Layer 3 is the last word. Either alone is not enough.
#
# </details>
#
# <details>
# <summary>A wrong turn: where it is read most</summary>
#
# ```python
# layers = (2, 3)
# ```
#
# In layer 2 it is read most. But by then the last token has heard of France in layers 0 and 1.
#
# </details>
#
# <details>
# <summary>A wrong turn: the first two</summary>
#
# ```python
# layers = (0, 1)
# ```
#
# It says Tokyo, with 59 %. The last layer still reads of France and disagrees.
#
# </details>

# %% [markdown]
# ## 5. Two futures
#
# A cache can be forked. Both copies go on from the same past, and the past is run once. Here a story splits in two.

# %%
story = lens.new_kv()
lens("When Mary and John went to the store,", kv=story)
futures = {
    text: lens.generate(text, 1, kv=story.fork()).text for text in (" John gave a drink to", " Mary gave a drink to")
}
print(futures)
assert futures == {" John gave a drink to": " Mary", " Mary gave a drink to": " John"}

# %% [markdown]
# ## 6. Smaller numbers
#
# How exact must an entry be? `quantise(bits)` rounds every number to one of $2^\text{bits}$ levels: keys by channel,
# values by token (Liu et al. 2024, KIVI). We go down to one bit.

# %%
sure = {bits: answer(cache.quantise(bits)(kv)) for bits in (8, 4, 3, 2, 1)}
for bits, (word, p) in sure.items():
    print(f"{bits} bits: {word} {p:.0%}")
assert all(sure[bits][0] == " Paris" and sure[bits][1] > 0.95 for bits in (8, 4, 3, 2))
assert sure[1][0] != " Paris"

# %% [markdown]
# Two bits will do here, an eighth of the usual sixteen (and the two ends of each range, which must be stored too). But
# this is a short text, and small groups are easy to round. Measure it on yours.
#
# ## 7. Eviction
#
# A cache that grows with every token is full one day. What can go? First a single answer. `eviction_curve` leaves out
# each entry alone, and then drops the cheapest first, more and more of them. How far does the answer move?

# %%
john_gives = "When Mary and John went to the store, John gave a drink to"  # to Mary
best = analysis.eviction_curve(lens, john_gives)
plot.eviction(best)

# %%
print(f"without 13 of 15 entries: {best.together.at(dropped='13'):.3f} nats")
assert best.together.at(dropped="13") < 0.05
assert best.together.at(dropped="14") > 1

# %% [markdown]
# Of 15 entries 13 can go! Is that not wonderful? Look which two are left.

# %%
print(best.alone.labels["entry"][-2:])
assert best.alone.labels["entry"][-2:] == ["4 ·and", "3 ·Mary"]

# %% [markdown]
# The one who gives is not among them. So how can the model know who receives? Let us keep the same entries of the
# other story, in which Mary gives and the answer is John. (The newest entry, 14, stays in both: the next token stands
# behind it.) `cache.evict` takes a policy: a function of a cache that says which entries stay, `[batch, key]`.


# %%
def run_to_cache(text):
    """Return the cache of all tokens but the last, and the last token."""
    tokens, kv = lens.to_tokens(text), lens.new_kv()
    lens(tokens[:, :-1], kv=kv)
    return kv, tokens[:, -1:]


stories = {
    name: run_to_cache(f"When Mary and John went to the store, {giver} gave a drink to")
    for giver, name in (("John", " Mary"), ("Mary", " John"))
}


def right(keep):
    """Return the probability of the right name in both stories, Mary and John, with these positions kept."""
    kept = cache.evict(lambda kv: torch.isin(kv.positions[:, : kv.length], torch.tensor(keep)))
    p = {name: lens(last, kv=kept(kv))[0, -1].softmax(-1) for name, (kv, last) in stories.items()}
    return [float(p[name][lens.to_single_token(name)]) for name in p]


print("all:", right(list(range(15))), " two and the newest:", right([3, 4, 14]))
assert min(right(list(range(15)))) > 0.95
assert right([3, 4, 14])[0] > 0.9  # Mary receives
assert right([3, 4, 14])[1] < 0.01  # and she receives when she gives, too

# %% [markdown]
# It says Mary in both. With one name in the cache there is nothing else to say. The first answer was right, and for the
# wrong reason. A measure on one example cannot see that. A counterfactual can.
#
# ### Exercise 5.3 · Keep six
#
# Choose at most six of the 15 positions to keep, 14 among them, so that both stories are answered with more than 90 %.
# You may use `analysis.leave_one_out(lens, text, by="position")`, and `right`.

# %%
kept = ...  # [14, ...]
check.exercise_5_3(kept)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# kept = [3, 4, 5, 11, 13, 14]
# ```
#
# What `leave_one_out` calls dear in one story or the other: both names and what stands between them, and the one who
# gives (11). Where John gives, nobody misses position 11. Where Mary gives, it costs most of all.
#
# </details>
#
# <details>
# <summary>A wrong turn: one story</summary>
#
# ```python
# kept = [3, 4, 5, 14]
# ```
#
# Both names, and not who gives. It says Mary in both.
#
# </details>
#
# <details>
# <summary>A wrong turn: the newest</summary>
#
# ```python
# kept = [9, 10, 11, 12, 13, 14]
# ```
#
# A window. It knows who gives, and not who else is there.
#
# </details>
#
# <details>
# <summary>A wrong turn: what is looked at most</summary>
#
# ```python
# seen = analysis.sum_attention(lens, john_gives)[:, :, :14].sum((0, 1))
# kept = [14, *seen.topk(5).indices.tolist()]
# ```
#
# Much of the attention goes to the prefix and the first word. Many heads rest there.
#
# </details>

# %% [markdown]
# Position 11 is where the giver is named. Where John gives it can be left out. Where Mary gives nothing costs more. So
# the model says the first name unless it is told otherwise. One story shows you half of a rule.

# %%
cost = {
    giver: analysis.leave_one_out(lens, john_gives.replace("John gave", f"{giver} gave"), by="position").kl.values
    for giver in ("John", "Mary")
}
assert cost["John"][11] < 0.01
assert cost["Mary"].argmax() == 11
assert cost["Mary"][11] > 2

# %% [markdown]
# In practice nobody knows the question beforehand. Then one keeps what is newest (`cache.keep_window`), or what was
# attended to most in sum, as H2O does (`cache.keep_heavy_hitters`; Zhang et al. 2023). How many entries must each keep,
# until both stories are told right?

# %%
sizes = range(4, 16)
mary_kv, _ = stories[" Mary"]
seen = analysis.sum_attention(lens, john_gives)[:, :, :-1].sum((0, 1))[None]  # batch key
policies = {
    "the newest": cache.keep_window,
    "heavy hitters, and the newest": lambda n: cache.keep_heavy_hitters(seen, n - 1, recent=1),
}
probabilities = np.array(
    [[min(right(policy(n)(mary_kv)[0].nonzero()[:, 0].tolist())) for n in sizes] for policy in policies.values()]
)
names = {"policy": list(policies), "entries kept": [str(n) for n in sizes]}
what = "right, in the worse story"
plot.lines(probabilities, names, axes=("policy", "entries kept"), what=what, title="How much must be kept?")

# %%
newest, hitters = (dict(zip(sizes, row, strict=True)) for row in probabilities)
assert max(newest[n] for n in range(4, 12)) < 0.2
assert newest[12] > 0.95
assert max(hitters[n] for n in range(4, 11)) < 0.2
assert hitters[11] > 0.8

# %% [markdown]
# The newest must be twelve: until Mary is among them. Of the heavy hitters eleven are needed. You did it with six, but
# you knew the question. What is looked at most is not what is needed most: much of it is the beginning, where heads
# rest.
#
# ## 8. A stream without end
#
# Now a text that does not stop: lists of 12 words, each said twice, one after another. We count how many words are
# right the second time. No list needs more than the last 13 tokens. So a window of 16 entries should be enough.

# %%
n, lists, rows = 12, 8, 4
ids, draw = torch.tensor(lens.tokenizer.list_word_ids()), torch.Generator().manual_seed(0)
words = torch.stack([ids[torch.randperm(len(ids), generator=draw)[:n]] for _ in range(rows * lists)])
stream = words.view(rows, lists, 1, n).expand(rows, lists, 2, n).reshape(rows, -1)
stream = torch.cat([torch.tensor(lens.tokenizer.prefix).expand(rows, -1), stream], 1)


def read_stream(evict, chunk=6):
    """Read the stream and evict after every chunk; return the accuracy on each list and the largest cache length."""
    kv, right, largest = lens.new_kv(rows), [], 0
    for i in range(0, stream.shape[1], chunk):
        right.append(lens(stream[:, i : i + chunk], kv=kv).argmax(-1))
        largest, kv = max(largest, kv.length), evict(kv)
    right = (torch.cat(right, 1)[:, 1:-1] == stream[:, 2:]).float()  # the first word of the lists is at 2
    return right.view(rows, lists, 2, n)[:, :, 1, 1:].mean((0, 2)), largest


window = cache.evict(cache.keep_window(16))
sinks = cache.evict(cache.keep_window(14, sinks=2))
close_gaps = cache.close_gaps(lens)
ways = {
    "everything is kept": lambda kv: kv,
    "the last 16": window,
    "the first 2 and the last 14": sinks,
    "the same, gaps closed": lambda kv: close_gaps(sinks(kv)),
}
results = {way: read_stream(evict) for way, evict in ways.items()}
for way, (share, largest) in results.items():
    print(f"{way:28} {largest:3} entries  " + "  ".join(f"{x:4.0%}" for x in share))

# %%
table = np.stack([share.numpy() for share, _ in results.values()])
names = {"policy": list(results), "list": [str(i + 1) for i in range(lists)]}
plot.lines(table, names, axes=("policy", "list"), what="said again", title="A stream of lists, and four ways to evict")

# %%
everything, latest, with_sinks, closed = table
assert everything[:4].min() > 0.85
assert everything[-2:].max() < 0.3
assert latest[1:].max() < 0.6
assert with_sinks[:4].min() > 0.85
assert with_sinks[-1] < 0.7
assert closed.min() > 0.85
assert results["the same, gaps closed"][1] == 22  # 16, and the six that are being read

# %% [markdown]
# Four lines, four lessons.
#
# - **Everything is kept**: after about 100 tokens it fails. Distances become larger than any in training (tutorial 4).
# - **The last 16**: it fails as soon as the prefix has left. In layer 0 more than a quarter of all attention rests on
#   these two tokens. Without them it must go elsewhere, and the heads write what they never wrote in training. Xiao et
#   al. (2023) call such tokens **sinks**.
# - **The first 2 and the last 14**: that is mended. But the prefix is ever further away, and fails at last.
# - **Gaps closed**: entries are moved together, so that positions count inside the cache. Now nothing is ever far. It
#   goes on for as long as you like, with 22 entries where the whole would be 194.
#
# So a model whose cache is evicted well can read longer texts than one that keeps everything.

# %%
_, acts = lens.run_with_cache(stream[:, :26], "blocks.0.attn.pattern")
resting = acts["attn.pattern", 0][:, :, 4:, :2].sum(-1).mean()
print(f"layer 0: {resting:.0%} of the attention is on the prefix")
assert resting > 0.25

# %% [markdown]
# To move an entry is to turn its key once more, by the difference. The angle is a product, so a key that has turned by
# $p\,\omega$ turns on by $\Delta\,\omega$, and is the key of position $p + \Delta$:
#
# $$k\,e^{\mathrm{i} p \omega} \cdot e^{\mathrm{i} \Delta \omega} = k\,e^{\mathrm{i} (p + \Delta) \omega}$$

# %%
mary_kv, last = stories[" Mary"]
moved = cache.reposition(lens, 7)(mary_kv)
assert moved.positions[0, : moved.length].tolist() == list(range(7, 22))
assert torch.allclose(lens(last, kv=moved)[0, -1], lens(last, kv=mary_kv.fork())[0, -1], atol=0.01)

# %% [markdown]
# ## What to keep
#
# - An entry is a turned key and a value, for each layer and each group of heads. It never changes by itself.
# - Values say what, keys say where.
# - Read most is not needed most. Take it away and see.
# - What is missing leaves no hole: the model is nearly as certain as before.
# - An answer can be right for the wrong reason. Ask the other story too.
# - Sinks are for rest, not for content. Keep them.
#
# Next: [6 · The residual stream](06_residual_stream.ipynb).
#
# ## Sources
#
# - Ainslie et al. 2023, *GQA*, arXiv 2305.13245: groups of heads that share keys and values.
# - Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks*, arXiv 2309.17453:
#   sinks, and positions inside the cache.
# - Zhang et al. 2023, *H2O: Heavy-Hitter Oracle*, arXiv 2306.14048: keep what was attended to most.
# - Liu et al. 2024, *KIVI*, arXiv 2402.02750: keys by channel, values by token.
# - Kobayashi et al. 2020, *Attention is Not Only a Weight*, arXiv 2004.10102: attention times the length of
#   what is written.
