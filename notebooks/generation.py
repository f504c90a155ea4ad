# %% [markdown]
# # Workbench · Generation
#
# A generation step by step, and branches of it with one change each.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
prompt = "When Mary and John went to the store, John gave a drink to"
length = 12
head = None  # [layer, head] to watch and then ablate; None: the best previous-token head
step = 2  # the step from which the head is ablated
other = None  # a token to force in place of the first; None: the second most probable
positive = ["The coin was sweet", "The map was sweet", "The hat was sweet"]  # steer towards their last tokens
negative = ["The coin was awful", "The map was awful", "The hat was awful"]  # and away from these
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
# The probability of each token, the entropy, and the most probable alternatives.

# %%
plot.generation(line)

# %%
plot.heatmap(line.logit_lens(), what="probability", signed=False, title="Logit lens of each step")

# %% [markdown]
# ## Attention of a head
#
# At every step, over all entries of the KV cache.

# %%
plot.heatmap(
    line.attention(layer, number),
    what="attention",
    down=True,
    signed=False,
    title=f"Head {layer}.{number} at every step",
)

# %% [markdown]
# ## Another token
#
# The first step is forced to another token; the rest follows from it.

# %%
choice = other or int(line.logits[0].topk(2).indices[1])
branch = line.rerun(0, token=choice)
print(f"original: {line.text!r}\nbranch:   {branch.text!r}")
timeline.find_divergence(line, branch)

# %% [markdown]
# ## With the head ablated
#
# From the chosen step on. The steps before are not computed again.


# %%
def ablate(z, point):
    z[:, :, number] = 0
    return z


branch = line.rerun(min(step, len(line.tokens) - 1), hooks={f"blocks.{layer}.attn.z": ablate})
print(f"original: {line.text!r}\nablated:  {branch.text!r}")
timeline.find_divergence(line, branch)

# %% [markdown]
# ## Steered
#
# The difference of the mean residual streams at the last tokens of the positive and the negative prompts, times a
# strength, is added at every position of every step. If the strength is too large, the text becomes nonsense.

# %%
middle = lens.cfg.n_layers // 2 - 1
direction = patch.fit_steering(lens, positive, negative, layers=[middle])
lines = [
    timeline.record_timeline(lens, steered, 6, interventions=direction.interventions(s) if s else ()) for s in strengths
]
columns = {"strength": strengths, "text": [line.text for line in lines]}
columns[f"probability of {watched_word!r}"] = [line.probability(watched_word).values[0] for line in lines]
pd.DataFrame(columns).round(3)

# %%
named = {"series": [watched_word], "strength": list(map(str, strengths))}
chances = [[line.probability(word).values[0] for line in lines] for word in named["series"]]
plot.lines(
    chances, named, axes=("series", "strength"), what="probability", title="Probability of the next word by strength"
)

# %% [markdown]
# ## Interactive
#
# Go to a step, force another token there, and compare the branches.

# %%
from glmlens.widgets import GenerationExplorer

GenerationExplorer(lens, prompt, length)
