# %% [markdown]
# # Workbench · Rotary positions
#
# An attention score is a sum of waves over distance, one for each rotated pair of channels, plus a part that does not
# depend on position. Split the scores of a head, and measure the effect of other rotary angles.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
prompt = "When Mary and John went to the store, John gave a drink to"
head = None  # [layer, head]; None: the best previous-token head
query = -1  # the position whose scores are split

# %%
import pandas as pd

import glmlens
from glmlens import analysis, plot
from glmlens.patch import rotary

lens = glmlens.load(model, dtype=dtype or (None if model else "float32"), device=device)
layer, number = head or analysis.head_scores(lens).best("previous", 1)[0][:2]
print(f"{lens.cfg.d_rotary} of {lens.cfg.d_head} channels are rotated; below: head {layer}.{number}")
lens

# %% [markdown]
# ## The parts of a score
#
# They sum to the score exactly.

# %%
waves = analysis.score_parts(lens, prompt, layer, number)
seen = ~pd.isna(waves.score.values)
assert abs(waves.part.values.sum(-1) - waves.score.values)[seen].max() < 1e-6 * abs(waves.score.values[seen]).max()
plot.score_by_pair(waves, query)

# %%
plot.rotary_angles(waves, query)

# %% [markdown]
# ## The attention pattern by its parts
#
# The full pattern; from rotated channels alone; from the other channels alone; and from distance alone, with the mean
# query and key.

# %%
plot.rotary_patterns(waves)

# %% [markdown]
# ## By distance
#
# The attention of every head of this layer with its mean query and mean key, so that only distance matters.

# %%
profile = analysis.distance_profile(lens, prompt)
plot.attention_by_distance(profile, layer)

# %% [markdown]
# ## Which pairs matter for which head
#
# How much each pair raises the score of the previous token, and of the token after an earlier occurrence of the same
# word.

# %%
use = analysis.pair_use(lens)
plot.pair_use(use, "previous")

# %%
plot.pair_use(use, "induction")

# %% [markdown]
# ## Rotary edits
#
# Other angles, and their effect on this prompt.

# %%
fast = list(range(lens.cfg.d_rotary // 4))  # the first half of the pairs
slow = list(range(lens.cfg.d_rotary // 4, lens.cfg.d_rotary // 2))
edits = {
    "all pairs frozen": rotary.freeze(lens),
    "fast pairs frozen": rotary.freeze(lens, pair=fast),
    "slow pairs frozen": rotary.freeze(lens, pair=slow),
    f"layer {layer} frozen": rotary.freeze(lens, layer=layer),
    f"head {layer}.{number} frozen": rotary.freeze(lens, layer=layer, head=number),
    "all tokens 100 later": rotary.shift(lens, 100),
    "half the distance": rotary.stretch(lens, "linear", 2),
}
broken = rotary.breakage(lens, prompt, edits)
plot.breakage(broken, "kl")

# %%
broken.to_dataframe()

# %% [markdown]
# ## Interactive
#
# Switch pairs of channels on and off, and see where a head would attend.

# %%
from glmlens.widgets import RotaryExplorer

RotaryExplorer(lens, prompt)
