# %% [markdown]
# # Workbench · Two models
#
# Two checkpoints side by side, such as a base model and its fine-tuned version: their predictions, the logit lens, head
# scores, and where their generations diverge.

# %% tags=["parameters"]
model = None  # a folder or a hub id, "zai-org/glm-4-9b-hf"; None is the small GLM inside the package
other = None  # the second checkpoint; None: the first with the heads below ablated
dtype = None  # None: the checkpoint's own
device = "cpu"
ablated = [
    [1, 7],
    [2, 0],
    [2, 1],
    [2, 2],
    [2, 5],
]  # [layer, head]; in the small GLM, the previous-token heads
prompt = " lasted library store two office mean May horse lasted library store two office"
length = 8

# %%
import pandas as pd
import torch

import glmlens
from glmlens import analysis, plot

lens, second = (
    glmlens.load(path, dtype=dtype or (None if path else "float32"), device=device) for path in (model, other or model)
)
if other is None:
    for layer, head in ablated:  # in memory only: no file is changed
        columns = slice(head * second.cfg.d_head, (head + 1) * second.cfg.d_head)
        with torch.no_grad():
            second.model.blocks[layer].attn.out.weight[:, columns] = 0
tokens, labels = lens.to_tokens(prompt), lens.to_labels(prompt)
assert torch.equal(tokens.cpu(), second.to_tokens(prompt).cpu()), "the models read this prompt as different tokens"
pd.DataFrame({"first": vars(lens.cfg), "second": vars(second.cfg)}).astype(str)

# %% [markdown]
# ## Predictions
#
# KL(first ‖ second) at every position, in nats.

# %%
logs = [one(tokens)[0].float().cpu().log_softmax(-1) for one in (lens, second)]
kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
plot.tokens(kl, labels, what="KL, nats", title="Where they differ")

# %%
named = {"series": ["KL"], "position": [f"{i} {label}" for i, label in enumerate(labels)]}
plot.lines(kl[None], named, axes=("series", "position"), what="nats", title="KL(first ‖ second) by position")

# %%
best = [[lens.to_labels(x[i].argmax()[None, None])[0] for i in range(len(labels))] for x in logs]
chances = [x.exp().amax(-1).tolist() for x in logs]
columns = {"token": labels, "KL": kl.tolist()}
columns |= {"first predicts": best[0], "with": chances[0], "second predicts": best[1], "with ": chances[1]}
pd.DataFrame(columns).round(3)

# %% [markdown]
# ## The logit lens

# %%
answer = int(logs[0][-1].argmax())
plot.logit_lens(analysis.logit_lens(lens, prompt, target=answer), title="The first")

# %%
plot.logit_lens(analysis.logit_lens(second, prompt, target=answer), title="The second")

# %% [markdown]
# ## Head scores

# %%
scores = [analysis.head_scores(one) for one in (lens, second)]
for name, heads in zip(("first", "second"), scores, strict=True):
    print(f"{name}: induction", ", ".join(f"{i}.{h} {x:.2f}" for i, h, x in heads.best("induction", 6)))

# %%
alike = scores[0].induction.shape == scores[1].induction.shape
if alike:
    change = scores[1].induction.values - scores[0].induction.values
    figure = plot.heatmap(
        change, axes=("layer", "head"), what="second minus first", signed=True, title="Change of the induction score"
    )
figure if alike else plot.head_scores(scores[1], "induction")

# %% [markdown]
# ## Where their generations diverge

# %%
runs = [one.generate(prompt, length) for one in (lens, second)]
new_tokens = [run.new_tokens[0].tolist() for run in runs]
divergence = next((i for i, (a, b) in enumerate(zip(*new_tokens, strict=False)) if a != b), None)
print(f"the first:  {runs[0].text!r}\nthe second: {runs[1].text!r}\nthey diverge at step {divergence}")

# %%
if divergence is not None:
    shared = torch.cat([tokens.cpu(), torch.tensor([new_tokens[0][:divergence]], dtype=torch.long)], 1)
    last = [one(shared.to(one.device), logits_to_keep=1)[0, -1].float().cpu().softmax(-1) for one in (lens, second)]
    words = {lens.to_labels(torch.tensor([[one[divergence]]]))[0]: one[divergence] for one in new_tokens}
    print({word: [f"{float(x[token]):.1%}" for x in last] for word, token in words.items()}, "by the first, the second")
