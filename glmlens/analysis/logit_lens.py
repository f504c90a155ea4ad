"""The logit lens: what each layer's residual stream says when the model's own last steps read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.batch import PromptBatch, Token, layer_labels, upcast
from glmlens.hooks import Hooks
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.recording.activations import Activations
from glmlens.results import Labelled, LabelledGroup
from glmlens.text.prompts import Prompt

UNEMBED_CHUNK = 64  # positions unembedded at a time: over 150k tokens, this is what a reading weighs


@dataclass(frozen=True, eq=False)
class LogitLens(LabelledGroup):
    """The most probable next tokens as every layer has them, and how far that is from what the model says.

    `token` (ids), `word` (their labels) and `probability` are [layer, pos, rank]. `kl` [layer, pos] is
    KL(model's last word ‖ this layer's) in nats. `target_rank` (0 is the most probable) and `target_probability`
    [layer, pos] are there for a target. Several prompts have an axis `prompt` in front; places past a prompt's end are
    nan, -1 or "". The last layer's row is the model's own output.
    """

    token: Labelled
    word: Labelled
    probability: Labelled
    kl: Labelled
    target_rank: Labelled | None = None
    target_probability: Labelled | None = None


def logit_lens(
    lens: Lens,
    prompt: Prompt,
    *,
    top: Integer | None = None,
    target: Token | Sequence[Token] | None = None,
    mid: bool = False,
    hooks: Hooks | None = None,
) -> LogitLens:
    """Read the residual stream after every layer (with `mid`, also before its MLP) as if it were the last.

    Each is unembedded through the real final norm: W_U · ln_final(resid) (nostalgebraist 2020, interpreting GPT: the
    logit lens). `top` is 5 by default, or all labels of a class head that has fewer. `target` is the text of one token
    or its id (of a class head a label), or one for every prompt. KL as in Belrose et al. 2023 (arXiv 2303.08112),
    section 2.
    """
    if not lens.cfg.d_logits:
        raise ValueError("a logit lens reads with the unembedding, and this checkpoint has none")
    top = min(5, lens.cfg.d_logits) if top is None else read_integer(top, "top")
    if not 1 <= top <= lens.cfg.d_logits:
        raise ValueError(f"top is {top}; expected 1 to {lens.cfg.d_logits}, as many as there are logits")
    rows = PromptBatch.from_prompt(lens, prompt)
    wanted = None if target is None else rows.to_answer_ids(target)
    logits, acts = rows.run(["embed", "resid_post", *(["resid_mid"] if mid else [])], hooks)
    streams = residual_streams(lens, acts, mid)
    readings = [unembed_stream(lens, stream, logits, top, wanted) for stream in [*streams.values()][:-1]]
    readings.append(unembed_stream(lens, None, logits, top, wanted))
    sheets = {name: torch.stack([reading[name] for reading in readings], 1) for name in readings[0]}
    return build_logit_lens(rows, sheets, list(streams), "" if wanted is None else rows.answer_labels(wanted))


def residual_streams(lens: Lens, acts: Activations, mid: bool) -> dict[str, Tensor]:
    """The residual streams in order, by label."""
    found = {"embed": acts["embed"]}
    for i, layer in enumerate(layer_labels(lens)):
        if mid:
            found[f"{layer} mid"] = acts["resid_mid", i]
        found[layer] = acts["resid_post", i]
    return found


def unembed_stream(
    lens: Lens,
    stream: Float[Tensor, "batch pos model"] | None,
    final: Float[Tensor, "batch pos vocab"],
    top: int,
    target: Int[Tensor, "batch"] | None,
) -> dict[str, Tensor]:
    """What one residual stream (None: the last, whose logits are the final ones) says at every position."""
    chunks = []
    for start in range(0, final.shape[1], UNEMBED_CHUNK):
        here = slice(start, start + UNEMBED_CHUNK)
        last = upcast(final[:, here]).log_softmax(-1)
        own = final[:, here] if stream is None else lens.model.unembed(lens.model.ln_final(stream[:, here]))
        chunks.append(summarize_predictions(last, upcast(own).log_softmax(-1), top, target))
    return {name: torch.cat([chunk[name] for chunk in chunks], 1) for name in chunks[0]}


def summarize_predictions(
    final_log_probs: Tensor, log_probs: Tensor, top: int, target: Tensor | None
) -> dict[str, Tensor]:
    best = log_probs.topk(top)
    found = {
        "token": best.indices,
        "probability": best.values.exp(),
        "kl": (final_log_probs.exp() * (final_log_probs - log_probs)).sum(-1),
    }
    if target is None:
        return found
    aimed = log_probs.gather(-1, target[:, None, None].expand(*log_probs.shape[:2], 1))
    return {**found, "target_rank": (log_probs > aimed).sum(-1), "target_probability": aimed.squeeze(-1).exp()}


def build_logit_lens(rows: PromptBatch, sheets: dict[str, Tensor], streams: list[str], target: str) -> LogitLens:
    labels = {"layer": streams, "pos": rows.position_labels()}
    metrics = {
        "token": "id of the next token", "probability": "probability of the next token",
        "kl": "KL(model's output ‖ this layer's), nats",
        "target_rank": f"rank of {target}, 0 is the most probable", "target_probability": f"probability of {target}",
    }  # fmt: skip
    made = {}
    for name, values in sheets.items():
        whole = not values.is_floating_point()
        values = torch.stack([rows.align_to_positions(v, -1 if whole else np.nan) for v in values.unbind(1)], 1)
        axes = "layer pos rank" if values.ndim == 4 else "layer pos"
        about = rows.describe(
            metric=metrics[name], direction=target or "the most probable tokens", positions="absolute"
        )
        made[name] = rows.to_labelled(values, axes, labels, about)
    names = {-1: ""} | {int(i): rows.lens.answer_label(int(i)) for i in np.unique(made["token"].values) if i >= 0}
    words = np.array([names[int(i)] for i in made["token"].values.ravel()]).reshape(made["token"].shape)
    word = Labelled(words, made["token"].axes, made["token"].labels, made["token"].about)
    about = rows.describe(metric="logit lens", direction=target or "the most probable tokens", positions="absolute")
    return LogitLens(about, word=word, **made)
