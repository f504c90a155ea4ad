"""The logit lens: the prediction from each layer's residual stream through the model's final norm and unembedding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.prompt_batch import PromptBatch, Token, layer_labels
from glmlens.dtypes import upcast
from glmlens.hooks import Hooks
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.recording.activations import Activations
from glmlens.results import Labelled, LabelledGroup
from glmlens.text.prompts import Prompt

UNEMBED_CHUNK = 64  # positions unembedded at a time: logits over 150k tokens are the largest tensor here


@dataclass(frozen=True, eq=False)
class LogitLens(LabelledGroup):
    """The most probable next tokens after every layer, and their distance from the model's output.

    `token` (ids), `word` (their labels) and `probability` are [layer, pos, rank]. `kl` [layer, pos] is
    KL(model's output ‖ this layer's) in nats. With a target there are `target_rank` (0 is the most probable) and
    `target_probability` [layer, pos]. Several prompts have an axis `prompt` in front; places past a prompt's end are
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
    """Predict the next token from the residual stream after every layer (with `mid`, also before its MLP).

    Each stream is unembedded through the real final norm: W_U · ln_final(resid) (nostalgebraist 2020, interpreting GPT:
    the logit lens). `top` is the number of tokens, by default 5, or all labels of a class head that has fewer. `target`
    is the text of one token or its id (of a class head a label), or one for every prompt. KL as in Belrose et al. 2023
    (arXiv 2303.08112), section 2. Raises ValueError for a model without an unembedding, or another `top`.
    """
    if not lens.cfg.d_logits:
        raise ValueError("a logit lens needs an unembedding, and this checkpoint has none")
    top = min(5, lens.cfg.d_logits) if top is None else read_integer(top, "top")
    if not 1 <= top <= lens.cfg.d_logits:
        raise ValueError(f"top is {top}; expected 1 to {lens.cfg.d_logits}, as many as there are logits")
    rows = PromptBatch.from_prompt(lens, prompt)
    target_ids = None if target is None else rows.to_answer_ids(target)
    logits, acts = rows.run(["embed", "resid_post", *(["resid_mid"] if mid else [])], hooks)
    streams = residual_streams(lens, acts, mid)
    predictions = [unembed_stream(lens, stream, logits, top, target_ids) for stream in [*streams.values()][:-1]]
    predictions.append(unembed_stream(lens, None, logits, top, target_ids))  # the last one's logits are known
    sheets = {name: torch.stack([prediction[name] for prediction in predictions], 1) for name in predictions[0]}
    target_label = "" if target_ids is None else rows.answer_labels(target_ids)
    return build_logit_lens(rows, sheets, list(streams), target_label)


def residual_streams(lens: Lens, acts: Activations, mid: bool) -> dict[str, Tensor]:
    """Return the residual streams in order, by label: "embed", "0" (with `mid`, "0 mid" before it), ..."""
    streams = {"embed": acts["embed"]}
    for i, layer in enumerate(layer_labels(lens)):
        if mid:
            streams[f"{layer} mid"] = acts["resid_mid", i]
        streams[layer] = acts["resid_post", i]
    return streams


def unembed_stream(
    lens: Lens,
    stream: Float[Tensor, "batch pos model"] | None,
    final: Float[Tensor, "batch pos vocab"],
    top: int,
    target: Int[Tensor, "batch"] | None,
) -> dict[str, Tensor]:
    """Return the predictions from one residual stream at every position; None is the last, with logits `final`."""
    chunks = []
    for start in range(0, final.shape[1], UNEMBED_CHUNK):
        here = slice(start, start + UNEMBED_CHUNK)
        final_log_probs = upcast(final[:, here]).log_softmax(-1)
        logits = final[:, here] if stream is None else lens.model.unembed(lens.model.ln_final(stream[:, here]))
        chunks.append(summarize_predictions(final_log_probs, upcast(logits).log_softmax(-1), top, target))
    return {name: torch.cat([chunk[name] for chunk in chunks], 1) for name in chunks[0]}


def summarize_predictions(
    final_log_probs: Tensor, log_probs: Tensor, top: int, target: Tensor | None
) -> dict[str, Tensor]:
    """Return the most probable tokens, their probabilities, the KL and, for a target, its rank and probability."""
    best = log_probs.topk(top)
    summary = {
        "token": best.indices,
        "probability": best.values.exp(),
        "kl": (final_log_probs.exp() * (final_log_probs - log_probs)).sum(-1),
    }
    if target is None:
        return summary
    of_target = log_probs.gather(-1, target[:, None, None].expand(*log_probs.shape[:2], 1))
    summary["target_rank"] = (log_probs > of_target).sum(-1)
    summary["target_probability"] = of_target.squeeze(-1).exp()
    return summary


def build_logit_lens(rows: PromptBatch, sheets: dict[str, Tensor], streams: list[str], target: str) -> LogitLens:
    """Return tensors [batch, layer, pos, ...] as a labelled result."""
    labels = {"layer": streams, "pos": rows.position_labels()}
    metrics = {
        "token": "id of the next token", "probability": "probability of the next token",
        "kl": "KL(model's output ‖ this layer's), nats",
        "target_rank": f"rank of {target}, 0 is the most probable", "target_probability": f"probability of {target}",
    }  # fmt: skip
    direction = target or "the most probable tokens"
    labelled = {}
    for name, values in sheets.items():
        past_the_end = np.nan if values.is_floating_point() else -1
        aligned = torch.stack([rows.align_to_positions(v, past_the_end) for v in values.unbind(1)], 1)
        axes = "layer pos rank" if aligned.ndim == 4 else "layer pos"
        about = rows.describe(metric=metrics[name], direction=direction, positions="absolute")
        labelled[name] = rows.to_labelled(aligned, axes, labels, about)
    token = labelled["token"]
    # Label each id once: there are far fewer of them than places.
    names = {-1: ""} | {int(i): rows.lens.answer_label(int(i)) for i in np.unique(token.values) if i >= 0}
    words = np.array([names[int(i)] for i in token.values.ravel()]).reshape(token.shape)
    word = Labelled(words, token.axes, token.labels, token.about)
    about = rows.describe(metric="logit lens", direction=direction, positions="absolute")
    return LogitLens(about, word=word, **labelled)
