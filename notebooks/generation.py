# %% [markdown]
# # Bench · Generation
#
# What a model said step by step and why, and what it would have said with one change.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
prompt = "When Mary and John went to the store, John gave a drink to"
length = 12
head = None  # [layer, head] to watch and then take away; None: the best previous-token head
step = 2  # from where on it is gone
other = None  # a token to say in the place of the first; None: the second most probable
positive = ["The coin was sweet", "The map was sweet", "The hat was sweet"]  # what to steer to, by their ends
negative = ["The coin was awful", "The map was awful", "The hat was awful"]  # and away from
steered, watched_word = "The coin was tall. It made Alice feel", " happy"
strengths = [-2, -1, -0.5, 0, 0.5, 1]

# %%
import pandas as pd

import glmlens
from glmlens import analysis, patch, plot, timeline

lens = glmlens.load(model, dtype=dtype or (None if model else "float32"), device=device)
layer, number = head or analysis.head_scores(lens).best("previous", 1)[0][:2]
line = timeline.record_timeline(lens, prompt, length)
print(f"{line.text!r}; below: head {layer}.{number}")
lens

# %% [markdown]
# ## Step by step
#
# How probable each token was, how open the choice, and what else stood there.

# %%
plot.generation(line)

# %%
plot.heatmap(line.logit_lens(), what="probability", signed=False, title="When each layer knew it")

# %% [markdown]
# ## What a head looked at
#
# At every step, over all that was remembered then.

# %%
plot.heatmap(
    line.attention(layer, number),
    what="attention",
    down=True,
    signed=False,
    title=f"Head {layer}.{number} at every step",
)

# %% [markdown]
# ## Another word
#
# The first step says something else; the rest follows from it.

# %%
choice = other or int(line.logits[0].topk(2).indices[1])
branch = line.rerun(0, token=choice)
print(f"as it was: {line.text!r}\nthe other: {branch.text!r}")
timeline.find_divergence(line, branch)

# %% [markdown]
# ## Without the head
#
# From the chosen step on. What came before is not computed again.


# %%
def without(z, point):
    z[:, :, number] = 0
    return z


branch = line.rerun(min(step, len(line.tokens) - 1), hooks={f"blocks.{layer}.attn.z": without})
print(f"as it was:   {line.text!r}\nwithout it:  {branch.text!r}")
timeline.find_divergence(line, branch)

# %% [markdown]
# ## Steered
#
# The difference of means of what the positive and the negative prompts have at their ends, times a strength, added at
# every position of every step. Too much of it, and the model talks nonsense.

# %%
middle = lens.cfg.n_layers // 2 - 1
direction = patch.fit_steering(lens, positive, negative, layers=[middle])
lines = [
    timeline.record_timeline(lens, steered, 6, interventions=direction.interventions(s) if s else ()) for s in strengths
]
columns = {"strength": strengths, "says": [line.text for line in lines]}
columns[f"probability of {watched_word!r}"] = [line.probability(watched_word).values[0] for line in lines]
pd.DataFrame(columns).round(3)

# %%
named = {"series": [watched_word], "strength": list(map(str, strengths))}
chances = [[line.probability(word).values[0] for line in lines] for word in named["series"]]
plot.lines(chances, named, axes=("series", "strength"), what="probability", title="The next word, steered")

# %% [markdown]
# ## By hand
#
# Go to a step, say something else there, and follow both.

# %%
from glmlens.widgets import GenerationExplorer

GenerationExplorer(lens, prompt, length)
