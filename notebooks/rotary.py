# %% [markdown]
# # Bench · Rotary positions
#
# A score is a sum of waves over distance, one for each pair of channels that turns, and a part that knows no position.
# Take a head's apart, and see what breaks when some of them turn otherwise.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-chat-hf"; None is the small GLM inside the package
dtype = None  # None: the checkpoint's own
device = "cpu"
prompt = "When Mary and John went to the store, John gave a drink to"
head = None  # [layer, head]; None: the best previous-token head
query = -1  # the position whose scores are taken apart

# %%
import pandas as pd

import glmlens
from glmlens import analysis, plot
from glmlens.patch import rotary

lens = glmlens.load(model, dtype=dtype or (None if model else "float32"), device=device)
layer, number = head or analysis.head_scores(lens).best("previous", 1)[0][:2]
print(f"{lens.cfg.d_rotary} of {lens.cfg.d_head} channels turn; below: head {layer}.{number}")
lens

# %% [markdown]
# ## One score, taken apart
#
# Part by part; they add up to the score.

# %%
waves = analysis.score_parts(lens, prompt, layer, number)
seen = ~pd.isna(waves.score.values)
assert abs(waves.part.values.sum(-1) - waves.score.values)[seen].max() < 1e-6 * abs(waves.score.values[seen]).max()
plot.score_by_pair(waves, query)

# %%
plot.rotary_angles(waves, query)

# %% [markdown]
# ## The pattern by each of its reasons
#
# As it is; by the channels that turn alone; by those that do not; and by distance alone, with the mean query and key.

# %%
plot.rotary_patterns(waves)

# %% [markdown]
# ## By distance
#
# What every head of this layer would attend to if tokens did not matter.

# %%
profile = analysis.distance_profile(lens, prompt)
plot.attention_by_distance(profile, layer)

# %% [markdown]
# ## Which pairs do which work
#
# By how much each pair lifts the score of the previous token, and of what followed the same word before.

# %%
use = analysis.pair_use(lens)
plot.pair_use(use, "previous")

# %%
plot.pair_use(use, "induction")

# %% [markdown]
# ## Surgery
#
# A change of what turns, and what it breaks on this prompt.

# %%
fast = list(range(lens.cfg.d_rotary // 4))  # the first half of the pairs
slow = list(range(lens.cfg.d_rotary // 4, lens.cfg.d_rotary // 2))
surgeries = {
    "nothing turns": rotary.freeze(lens),
    "fast pairs frozen": rotary.freeze(lens, pair=fast),
    "slow pairs frozen": rotary.freeze(lens, pair=slow),
    f"layer {layer} frozen": rotary.freeze(lens, layer=layer),
    f"head {layer}.{number} frozen": rotary.freeze(lens, layer=layer, head=number),
    "all tokens 100 later": rotary.shift(lens, 100),
    "half the distance": rotary.stretch(lens, "linear", 2),
}
broken = rotary.breakage(lens, prompt, surgeries)
plot.breakage(broken, "kl")

# %%
broken.to_dataframe()

# %% [markdown]
# ## By hand
#
# Switch pairs of channels on and off, and see what a head would attend to.

# %%
from glmlens.widgets import RotaryExplorer

RotaryExplorer(lens, prompt)
