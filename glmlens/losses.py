"""Losses of a model's logits: for next tokens, for labels of tokens and for labels of whole sequences.

The losses equal those of transformers' heads. They are computed in at least float32, except for those of whole
sequences, which transformers computes in the dtype of the logits.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from glmlens.dtypes import upcast


def token_log_probs(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch next"]:
    """Return the log-probability in nats of every token but the first, from the logits at the position before it."""
    return upcast(logits[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], labels: Int[Tensor, "batch pos"], num_items: int | Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the next-token cross-entropy in nats: its mean over labels that are not -100.

    With `num_items` it is the sum divided by that number instead.
    """
    # The logits at position i predict the label at i + 1; those at the last position have none.
    return token_loss(logits, F.pad(labels, (0, 1), value=-100)[:, 1:], num_items)


def token_loss(
    logits: Float[Tensor, "batch pos vocab"], labels: Int[Tensor, "batch pos"], num_items: int | Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the cross-entropy in nats of every token's own label: its mean over labels that are not -100.

    With `num_items` it is the sum divided by that number instead.
    """
    flat_logits = rearrange(upcast(logits), "batch pos vocab -> (batch pos) vocab")
    flat_labels = rearrange(labels, "batch pos -> (batch pos)")
    if num_items is None:
        return F.cross_entropy(flat_logits, flat_labels, ignore_index=-100)
    return F.cross_entropy(flat_logits, flat_labels, ignore_index=-100, reduction="sum") / num_items


def pool_last_token(
    logits: Float[Tensor, "batch pos label"], tokens: Int[Tensor, "batch pos"] | None, pad_id: int | None
) -> Float[Tensor, "batch label"]:
    """Return the logits at the right-most token that is not `pad_id`, by which a sequence is classified.

    As in transformers, padding is found by its id and not by a mask; a row of padding alone is read at its first
    position. Without ids or `pad_id`, it is the last position. Raises ValueError for several rows without a `pad_id`.
    """
    if pad_id is None and len(logits) > 1:
        raise ValueError("several sequences, and the config names no pad_token_id: give them one at a time")
    if pad_id is None or tokens is None:
        return logits[:, -1]
    # The index of every real token and 0 at padding: the largest is the last real token.
    last = (torch.arange(tokens.shape[1], device=tokens.device) * (tokens != pad_id)).argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), last.to(logits.device)]


def sequence_loss(
    logits: Float[Tensor, "batch label"], labels: Shaped[Tensor, "batch *label"], problem_type: str | None = None
) -> Float[Tensor, ""]:
    """Return the loss of whole sequences' labels, in the dtype of the logits.

    "regression": mean squared error. "single_label_classification": cross-entropy in nats of class indices.
    "multi_label_classification": binary cross-entropy of a probability for every label. Without `problem_type`, one
    class means regression, integer labels single-label and float labels multi-label classification.
    """
    n = logits.shape[1]
    kind = problem_type
    if kind is None and n == 1:
        kind = "regression"
    elif kind is None:
        indices = labels.dtype in (torch.long, torch.int)
        kind = "single_label_classification" if indices else "multi_label_classification"
    # As in transformers, one class drops its axis, so that labels [batch] do not broadcast.
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if n == 1 else F.mse_loss(logits, labels)
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    return F.binary_cross_entropy_with_logits(logits, labels)
