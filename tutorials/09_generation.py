# %% [markdown]
# # 9 · Generation under intervention
#
# So far we mostly asked for one token. Now the model writes on, and what it has written becomes what it reads. So a
# change can come back: through the words that it made the model say, and through the KV cache. In this
# tutorial we steer a feeling, take it away again while the model speaks, and find out where it had been kept.
#
# - **You need**: [tutorial 2](02_hooks.ipynb) for hooks and [tutorial 5](05_kv_cache.ipynb) for the cache.
# - **You get**: runs taken step by step, branches, steering that is held against chance, and sampling you can repeat.
# - **Time**: about 50 minutes.

# %%
import torch

import glmlens
from glmlens import cache, only, patch, plot, timeline
from glmlens.course import check_09 as check
from glmlens.tasks import words

lens = glmlens.load(dtype="float32")
line_end = lens.to_tokens("\n", prefix=False)[0].tolist()  # we stop at the end of a line

# %% [markdown]
# ## 1. A run, step by step
#
# At every step the model gives a probability $p_t$ to each token $t$ of its vocabulary. Greedy generation takes the
# largest. How open the step was is its entropy:
#
# $$H = -\sum_t p_t \ln p_t$$
#
# It is 0 where only one token is possible, and $\ln n$ where $n$ tokens are equally likely. `lens.stream` is `generate`
# one step at a time.

# %%
prompt = "After Nora and Paul went to the park, Nora saw a"
steps = list(lens.stream(prompt, 9, stop_ids=line_end))
plot.generation(steps, lens.tokenizer.label)

# %% [markdown]
# Move the slider. The first step is wide open: Nora may see any of 15 things, and the model has no favourite. (The 16th
# thing of its world is the apple, and nobody sees *a apple*.) After that nearly everything is settled.
#
# `record_timeline` makes the same run and keeps more of it: what each step said, and what it began with.

# %%
line = timeline.record_timeline(lens, prompt, 9, stop_ids=line_end)
entropy = line.entropy()
print(line.text)
assert line.tokens == [int(step.tokens) for step in steps]
assert line.text.strip() == "ball. Paul took the ball home."
assert abs(entropy.at(step=0) - torch.tensor(15.0).log()) < 0.05  # ln 15
assert line.probability().at(step=0) < 0.1  # greedy, and yet it says what it holds to be unlikely
assert entropy.values[1:5].max() < 0.1

things = [lens.to_single_token(f" {thing}") for thing in words.THING_NOUNS]
chances = line.logits[0].softmax(-1)[things]
assert int((chances > 0.04).sum()) == 15
assert words.THING_NOUNS[int(chances.argmin())] == "apple"
assert chances.min() < 0.01

# %% [markdown]
# Which layer knew what it was going to say? Read the stream after each layer as if it were the last (nostalgebraist
# 2020, [tutorial 6](06_residual_stream.ipynb)).

# %%
by_layer = line.logit_lens()
plot.heatmap(by_layer, what="probability", title="What each layer gives to the word that is said")

# %% [markdown]
# The line end is settled early. Names and things are said by the last layer alone. In step 5 the word `ball` comes
# again. Where does it come from? Here is where head 3.4 looks at each step. It is one of the induction heads of
# [tutorial 3](03_attention_heads.ipynb).

# %%
attention = line.attention(3, 4)
plot.heatmap(attention, what="attention", signed=False, title="Where head 3.4 looks at each step")

# %%
ball = len(lens.to_labels(prompt))  # the first generated token stands right behind the prompt
assert ball == 14
names_and_things = by_layer.values[:, [2, 5]]  # Paul, ball
assert names_and_things[:3].max() < 0.1 < 0.9 < names_and_things[3].min()
assert by_layer.values[:, -1].min() > 0.9  # the line end
assert attention.at(step=5, key=ball) > 0.99  # it looks at the first "ball"

# %% [markdown]
# ## 2. What is recorded is what happened
#
# `names=` records at all steps, and joins them along the positions. Every token that was *run* is there. The last one
# was only said: nothing has read it.

# %%
run = lens.generate(prompt, 9, names=["resid_post", "attn.pattern"], stop_ids=line_end)
assert run.tokens.shape[1] == 14 + 9
assert run.acts["resid_post"].shape == (4, 1, 22, 192)  # layer batch pos model

# %% [markdown]
# Without a change, a run in steps is the same as one pass over the finished text, to rounding. With a change it is
# *not*, and this is a common error: to generate with a hook, and then to run the text again without it in order to look
# inside. The second run shows a model that was never changed. Below we add a direction while the model speaks.

# %%
_, replay = lens.run_with_cache(run.tokens[:, :-1], "resid_post")
assert torch.allclose(run.acts["resid_post"], replay["resid_post"], rtol=1e-3, atol=0.5)

push = {"blocks.1.resid_post": lambda x, point: x + 100}
pushed = lens.generate(prompt, 9, names="resid_post", hooks=push, stop_ids=line_end)
_, replayed = lens.run_with_cache(pushed.tokens[:, :-1], "resid_post")
gap = (pushed.acts["resid_post"] - replayed["resid_post"]).abs().amax((1, 2, 3))
print([round(x) for x in gap.tolist()])
assert gap[0] < 0.1  # below the edit: the same
assert gap[1] > 90  # from there on: another run

# %% [markdown]
# ## 3. Branches
#
# A timeline can be run again from any step, with another word, another hook or another cache. What came before that
# step is kept and not computed again.

# %%
branch = line.rerun(0, token=" cake")
print(branch.text)
assert branch.text.strip() == "cake. Paul took the cake home."

who = line.rerun(2, token=" Emma")  # somebody who was not there
print(who.text)
assert who.text.strip() == "ball. Emma took the ball home."

# %% [markdown]
# `find_divergence` finds the first step at which two runs choose different words, and what each gave to both words
# there. Here is a run in which no word is forced. Only a head is silenced: 1.3, which [tutorial 2](02_hooks.ipynb)
# found to matter for who receives.

# %%
giving = "When Mary and John went to the store, John gave a drink to"
given = timeline.record_timeline(lens, giving, 12, stop_ids=line_end)


def without_head_3(z, point):
    z[:, :, 3] = 0
    return z


silenced = given.rerun(0, hooks={"blocks.1.attn.z": without_head_3})
divergence = timeline.find_divergence(given, silenced)
print(repr(given.text), repr(silenced.text), divergence.step, divergence.words)
print(divergence.probability.values.round(3), divergence.kl.values.round(3))
assert given.text.strip() == "Mary. She took the drink home."
assert silenced.text.strip() == "Mary."

# %% [markdown]
# Without the head, Mary still receives. But the text ends after her name, and half a sentence is gone. A large effect?
# Look at the numbers. In step 2 the model was torn between `She` and the end of the line, 50 to 50. A change of one
# per cent tipped it. Greedy text can jump where probabilities barely move. Read it as an illustration, and measure
# probabilities.

# %%
assert divergence.step == 2
assert abs(divergence.probability.values - 0.5).max() < 0.02
assert divergence.kl.at(step=2) < 0.01  # nats

# %% [markdown]
# ### Exercise 9.1 · A tired man
#
# In the world of this model there are sentences that end with `John was tired.` Find a step of `given` and a word such
# that the run, going on from there by itself, says so. Give `(step, word)`; the word begins with a space. The entropy
# shows where there is a choice, and `given.logits[step].topk(5)` what the choice is.

# %%
print(given.text, given.entropy().values.round(2))

# %%
fork = ...  # (step, " word")
check.exercise_9_1(fork)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# fork = (1, " and")
# ```
#
# After `Mary` the model gives 68 % to the full stop and 18 % to `and`. From there: `Mary and went home. John was
# tired.`
#
# </details>
#
# <details>
# <summary>A wrong turn: the step before</summary>
#
# ```python
# fork = (0, " and")
# ```
#
# The word takes the place of what the step said. In step 0 that was `Mary`, and it is gone then.
#
# </details>
#
# <details>
# <summary>A wrong turn: the name itself</summary>
#
# ```python
# fork = (2, " John")
# ```
#
# He is named, and he is not tired.
#
# </details>

# %% [markdown]
# ## 4. Steering
#
# Something good makes people happy in this world, and something bad makes them sad. What has no valence, such as
# *tall*, makes them either. We look for a direction that changes this: the difference of means of the stream at good
# and at bad adjectives (Turner et al. 2023; Rimsky et al. 2023; for sentiment Tigges et al. 2023).
#
# $$v = \frac{1}{n}\sum_{i=1}^{n} x^{+}_i - \frac{1}{n}\sum_{i=1}^{n} x^{-}_i \qquad x' = x + k\, v$$

# %%
good = [f"The {thing} was {adjective}" for thing in words.THING_NOUNS[:6] for adjective in words.GOOD_ADJECTIVES]
bad = [f"The {thing} was {adjective}" for thing in words.THING_NOUNS[:6] for adjective in words.BAD_ADJECTIVES]
print(good[0], "/", bad[0], "/", len(good), "pairs")
valence = patch.fit_steering(lens, good, bad, layers=1)
v = valence[1]
assert v.shape == (192,)

# %% [markdown]
# ### Exercise 9.2 · The difference of means
#
# Write it by hand. `x_good` and `x_bad` are recordings of `resid_post` in layer 1, `[prompt, pos, model]`, of prompts
# that end with the adjective. Give the direction `[model]`.

# %%
direction = ...  # def direction(x_good, x_bad): ...
check.exercise_9_2(direction)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def direction(x_good, x_bad):
#     return x_good[:, -1].mean(0) - x_bad[:, -1].mean(0)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: all positions</summary>
#
# ```python
# def direction(x_good, x_bad):
#     return x_good.mean((0, 1)) - x_bad.mean((0, 1))
# ```
#
# The other positions are the same in both, so they only make the difference smaller: six times, with six tokens.
#
# </details>
#
# <details>
# <summary>A wrong turn: the other way round</summary>
#
# ```python
# def direction(x_good, x_bad):
#     return x_bad[:, -1].mean(0) - x_good[:, -1].mean(0)
# ```
#
# It points from good to bad.
#
# </details>

# %% [markdown]
# Now 36 sentences without valence, about things that the direction was not made of. All have 11 tokens, and the
# adjective at position 5. We add $k\,v$ there and measure how much more the model believes in *happy* than in *sad*.

# %%
names = ["Mary", "John", "Paul", "Emma"]
neutral = [
    f"The {thing} was {what}. It made {names[i % 4]} feel"
    for thing in words.THING_NOUNS[10:]
    for i, what in enumerate(words.ADJECTIVES)
]
tokens = lens.to_tokens(neutral)
adjective = 5
happy, sad = lens.to_single_token(" happy"), lens.to_single_token(" sad")
assert tokens.shape == (36, 11)


def measure_feeling(vector, position=adjective, layer=1):
    """Return the mean of logit(happy) - logit(sad) with this vector added to the stream."""
    hooks = {f"blocks.{layer}.resid_post": only(lambda x, point: x + vector, positions=position)}
    last = lens.run_with_hooks(tokens, hooks, logits_to_keep=1)[:, -1]
    return float((last[:, happy] - last[:, sad]).mean())


strengths = (-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4)
dose = [measure_feeling(k * v) for k in strengths]
plot.lines(
    torch.tensor([dose]),
    {"series": ["difference of means"], "times": [f"{k:+g}" for k in strengths]},
    axes=("series", "times"),
    what="logit(happy) - logit(sad)",
    title="A feeling, added to one word in layer 1",
)

# %%
by = dict(zip(strengths, dose, strict=True))
assert abs(by[0]) < 0.3  # undecided
assert by[-1] < -3 < 2 < by[1]
assert by[4] < by[1]  # more is not more

# %% [markdown]
# Between -1 and +1 the dose works. At +4 it works no longer. Most likely the stream is then where no training text has
# ever brought it. A steering vector is a direction *and* a length: try several.
#
# Is it this direction, or would any of this length do? Twelve random ones as long as $v$:

# %%
draw = torch.Generator().manual_seed(0)
random = torch.nn.functional.normalize(torch.randn(12, len(v), generator=draw), dim=-1) * v.norm()
by_chance = [measure_feeling(r) - by[0] for r in random]
print(f"v: {by[1] - by[0]:+.2f}; random: {min(by_chance):+.2f} to {max(by_chance):+.2f}")
assert max(map(abs, by_chance)) < 0.5 * (by[1] - by[0])

# %% [markdown]
# ## 5. Where it works
#
# Must it be that position? We add $-v$ to every position in turn.

# %%
labels = lens.to_labels(neutral[0])
effect = torch.tensor([measure_feeling(-v, position) - by[0] for position in range(2, 11)])
places = {"part": [f"{i} {labels[i]}" for i in range(2, 11)]}
plot.bars(effect, places, what="change of logit(happy) - logit(sad)", title="-v at one position")

# %%
assert effect[adjective - 2] < -3
others = torch.cat([effect[: adjective - 2], effect[adjective - 1 :]])
assert others.abs().max() < 0.5

# %% [markdown]
# Only at the adjective. The last token does not carry the feeling in layer 1: it fetches it later, from there. And when
# does it? In the last layer it is too late to write anything at the adjective, because nobody will read it any more:

# %%
assert measure_feeling(-v, layer=3) == by[0]  # not one bit
assert measure_feeling(-v, layer=2) < -2

# %% [markdown]
# ## 6. When it works
#
# Let the model tell the story itself. `interventions` of a `SteeringVector` are plain data that a timeline takes, and
# the timeline keeps a list of the edits as they were applied.

# %%
story = "The hat was tall."
clean = timeline.record_timeline(lens, story, 9, stop_ids=line_end)
steered = timeline.record_timeline(
    lens, story, 9, interventions=valence.interventions(-1, pos=adjective), stop_ids=line_end
)
print(clean.text, steered.text, steered.events[0])
assert clean.text.strip() == "It made Nora feel happy."
assert steered.text.strip() == "It made Nora feel sad."

# %% [markdown]
# Look at the events. There was one edit, in step 0: the adjective is in the prompt, and the prompt runs only once. In
# step 4, when the model says *sad*, nobody is steering. Yet it does.

# %%
assert [event.step for event in steered.events] == [0]
feel = 4  # the step that says how she feels
p_sad = [float(run.probability(" sad").at(step=feel)) for run in (clean, steered)]
print(f"probability of sad in step {feel}: {p_sad[0]:.2f} without, {p_sad[1]:.2f} with")
assert p_sad[0] < 0.5
assert p_sad[1] > 0.9

# %% [markdown]
# So the feeling has been kept. The only thing that goes from step to step, beside the words, is the KV cache. To prove
# that it is there we go to step 4, take the entries of the adjective from the clean run, and put them in the steered
# run's cache. `at={step: operation}` does something to the cache right before a step.

# %%
clean_cache = clean.restore_state(feel).kv
forgiven = steered.rerun(feel, at={feel: cache.swap(clean_cache, position=adjective)})
print(forgiven.text)
assert forgiven.text.strip() == "It made Nora feel happy."

# %% [markdown]
# And the other way round: nothing is ever steered, but the cached entries of one word are replaced.

# %%
poisoned = clean.rerun(feel, at={feel: cache.swap(steered.restore_state(feel).kv, position=adjective)})
print(poisoned.text)
assert poisoned.text.strip() == "It made Nora feel sad."
assert torch.allclose(poisoned.logits[feel], steered.logits[feel], atol=0.2)

# %% [markdown]
# In which layer is it? We exchange the entries of one layer at a time. In layers 0 and 1 there is nothing to find: the
# edit came after them. What is read are the entries of layer 3, and they alone.

# %%
for layer in range(4):
    only_there = steered.rerun(feel, at={feel: cache.swap(clean_cache, position=adjective, layer=layer)})
    p = float(only_there.probability(" sad").at(step=feel))
    print(f"layer {layer} clean: probability of sad {p:.2f}")
    if layer < 3:
        assert abs(p - p_sad[1]) < 0.02
assert abs(p - p_sad[0]) < 0.1

# %% [markdown]
# This is what to keep of steering: it acts on *positions*, and what is written there stays in the cache when the
# steering ends. To switch a hook off is not to undo it.
#
# The same operation shows how a word and its entries come apart. The text says `ball`. We exchange its entries before
# step 5, or evict them.

# %%
swapped = line.rerun(5, at={5: cache.swap(branch.restore_state(5).kv, position=ball)})
without_ball = line.rerun(5, at={5: cache.evict(position=ball)})
print(swapped.text, without_ball.text)
assert swapped.text.strip() == "ball. Paul took the cake home."
assert without_ball.text.strip() == "ball. Paul took the basket home."

# %% [markdown]
# ### Exercise 9.3 · Happy in spite of it
#
# A schedule says at which steps, or at which positions, a hook holds. Give hooks for `lens.generate("The hat was", 9)`,
# such that the hat is said to be something bad (*terrible*, *awful*, ...) and makes somebody feel **happy**. Edit
# `blocks.1.resid_post` alone, with multiples of `v`. Hooks are a list of pairs, each with `only(..., steps=...)` or
# `only(..., positions=...)`. `timeline.schedule_edits` makes such lists of a `SteeringVector` too.

# %%
hooks = ...  # [("blocks.1.resid_post", only(..., steps=...)), ...]
check.exercise_9_3(hooks)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# hooks = [
#     ("blocks.1.resid_post", only(lambda x, point: x - v, steps=0)),
#     ("blocks.1.resid_post", only(lambda x, point: x + 1.5 * v, positions=adjective)),
# ]
# ```
#
# In step 0 the word is chosen: down. It stands at position 5 then, and when it is run, in step 1, it is cached as
# something good: up. With steering vectors: `timeline.schedule_edits(lens, valence.interventions(-1), steps=0)` and
# `timeline.schedule_edits(lens, valence.interventions(1.5), steps=1)`.
#
# </details>
#
# <details>
# <summary>A wrong turn: up all the time</summary>
#
# ```python
# hooks = [("blocks.1.resid_post", lambda x, point: x + v)]
# ```
#
# Then the hat is wonderful. The hook changes which word is chosen.
#
# </details>
#
# <details>
# <summary>A wrong turn: up where the feeling is said</summary>
#
# ```python
# hooks = [
#     ("blocks.1.resid_post", only(lambda x, point: x - v, steps=0)),
#     ("blocks.1.resid_post", only(lambda x, point: x + 1.5 * v, steps=5)),
# ]
# ```
#
# In the step that says how she feels, the stream of layer 1 does not hold the feeling yet. It is fetched from the
# cached entries of the word, and those are bad.
#
# </details>

# %% [markdown]
# ## 7. Sampling, and luck
#
# Greedy text has a weakness: where it has been before, it goes on as before. Here it ends up in Tokyo.

# %%
looped = lens.generate(prompt, 36, stop_ids=()).text
print(looped)
assert looped.count("The king of Japan lives in Tokyo.") >= 3

begun = lens(prompt + line.text + "The")[0, -1].softmax(-1)
assert begun.argmax() == lens.to_single_token(" king")
assert 0.04 < begun.max() < 0.08

# %% [markdown]
# Holtzman et al. (2020) saw the same in large models. `king` has only 6 % there. What is most probable at every step is
# not what is typical. To sample is to draw each token with its probability,
# which a temperature $T$ makes sharper or flatter:
#
# $$p_t(T) = \frac{e^{\ell_t / T}}{\sum_u e^{\ell_u / T}}$$
#
# Every run has a generator of its own. The same seed gives the same text.

# %%
sampled = [lens.generate(prompt, 9, temperature=1.0, seed=seed, stop_ids=line_end).text for seed in (0, 1, 2, 2)]
print(sampled)
assert sampled[2] == sampled[3]
assert len(set(sampled)) == 3

# %% [markdown]
# Are these draws right? Two hundred of the first word, against the probabilities:

# %%
many = lens.generate(lens.to_tokens(prompt).expand(200, -1), 1, temperature=1.0, seed=0, stop_ids=())
share = torch.bincount(many.new_tokens[:, 0], minlength=lens.cfg.d_vocab) / 200
p = lens(prompt)[0, -1].softmax(-1)
error = (p * (1 - p) / 200).sqrt()  # the standard error of a share
assert ((share - p).abs() <= 4 * error + 1e-3).all()

# %% [markdown]
# Now the point of it for experiments. Change one word of a sampled text, and what comes after it will be another text.
# Was it the word, or was it other luck? A rerun draws as the first run drew. So what is different is the word's doing.

# %%
first = timeline.record_timeline(lens, prompt, 18, temperature=1.0, seed=2, stop_ids=())
other = first.rerun(0, token=" cake")
print(first.text, other.text, sep="\n---")
assert first.rerun(0).tokens == first.rerun(4).tokens == first.tokens  # nothing changed: the same tokens

changed = [a != b for a, b in zip(first.tokens, other.tokens, strict=True)]
print("steps that say something else:", [i for i, c in enumerate(changed) if c])
assert [i for i, c in enumerate(changed) if c] == [0, 5]  # the word, and where it is named again

# %% [markdown]
# With the same luck, the word changes one other word: the one that names it again. With another seed the whole line
# might be another.
#
# ### Exercise 9.4 · Temperature
#
# Write the probabilities `[vocab]` from which a token is drawn, given its `logits` `[vocab]` and a temperature.

# %%
drawn_from = ...  # def drawn_from(logits, temperature): ...
check.exercise_9_4(drawn_from)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def drawn_from(logits, temperature):
#     return (logits / temperature).softmax(-1)
# ```
#
# </details>
#
# <details>
# <summary>A wrong turn: probabilities are divided</summary>
#
# ```python
# def drawn_from(logits, temperature):
#     p = logits.softmax(-1) / temperature
#     return p / p.sum()
# ```
#
# This divides all alike, and the sum takes it out again. The temperature does nothing.
#
# </details>
#
# <details>
# <summary>A wrong turn: times the temperature</summary>
#
# ```python
# def drawn_from(logits, temperature):
#     return (logits * temperature).softmax(-1)
# ```
#
# Then a high temperature makes the text colder.
#
# </details>

# %% [markdown]
# ## What to keep
#
# - Record while it happens. A text that was made under a hook, run again without it, is another run.
# - A direction is held against random ones of its length, and tried at several lengths.
# - Steering acts at positions. What it wrote there stays in the cache when it ends.
# - Branch with the same luck, or you compare luck.
#
# Next: [10 · Your own checkpoint](10_your_own_checkpoint.ipynb).
#
# ## Sources
#
# - Turner et al. 2023, *Steering Language Models With Activation Engineering*, arXiv 2308.10248: adding differences of
#   activations while a model writes.
# - Rimsky et al. 2023, *Steering Llama 2 via Contrastive Activation Addition*, arXiv 2312.06681: the mean
#   over many pairs.
# - Tigges et al. 2023, *Linear Representations of Sentiment in Large Language Models*, arXiv 2310.15154: sentiment as a
#   direction.
# - nostalgebraist 2020, *interpreting GPT: the logit lens*, lesswrong.com: reading the stream before the last layer.
# - Holtzman et al. 2020, *The Curious Case of Neural Text Degeneration*, arXiv 1904.09751: greedy text that repeats.
