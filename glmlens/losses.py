"""What a model's logits cost, against what was said: next tokens, labels of tokens, labels of whole sequences.

The numbers are those of transformers' heads. In at least float32, but for sequences, whose loss transformers takes in
the dtype of the logits.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def token_log_probs(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch next"]:
    """The log-probability, in nats, that each token but the first was given by the logits before it."""
    exact = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return exact.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], labels: Int[Tensor, "batch pos"], num_items: int | Tensor | None = None
) -> Float[Tensor, ""]:
    """Next-token cross-entropy in nats: the mean over labels that are not -100, or their sum over `num_items`."""
    return token_loss(logits, F.pad(labels, (0, 1), value=-100)[:, 1:], num_items)


def token_loss(
    logits: Float[Tensor, "batch pos vocab"], labels: Int[Tensor, "batch pos"], num_items: int | Tensor | None = None
) -> Float[Tensor, ""]:
    """Cross-entropy in nats of every token's own label: the mean of those not -100, or their sum over `num_items`."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = rearrange(exact, "batch pos vocab -> (batch pos) vocab"), rearrange(labels, "batch pos -> (batch pos)")
    if num_items is None:
        return F.cross_entropy(*flat, ignore_index=-100)
    return F.cross_entropy(*flat, ignore_index=-100, reduction="sum") / num_items


def pool_last_token(
    logits: Float[Tensor, "batch pos label"], tokens: Int[Tensor, "batch pos"] | None, pad_id: int | None
) -> Float[Tensor, "batch label"]:
    """The logits at the right-most token that is not `pad_id`: what a sequence is classified by.

    Only ids count, not a mask: a last token that is the padding's own id is passed over, and a row of padding alone is
    read at its first position. Without ids, or without a `pad_id`, it is the last position; ValueError for several rows
    without a `pad_id`.
    """
    if pad_id is None and len(logits) > 1:
        raise ValueError("several sequences, and the config names no pad_token_id: give them one at a time")
    if pad_id is None or tokens is None:
        return logits[:, -1]
    last = (torch.arange(tokens.shape[1], device=tokens.device) * (tokens != pad_id)).argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), last.to(logits.device)]


def sequence_loss(
    logits: Float[Tensor, "batch label"], labels: Shaped[Tensor, "batch *label"], problem_type: str | None = None
) -> Float[Tensor, ""]:
    """The loss of whole sequences' labels, in the dtype of the logits.

    "regression": mean squared error. "single_label_classification": cross-entropy in nats of class indices.
    "multi_label_classification": binary cross-entropy of a probability for every label. Unless it is said, one label
    means regression, whole numbers single, and floats multiple.
    """
    n = logits.shape[1]
    whole = labels.dtype in (torch.long, torch.int)
    guess = "regression" if n == 1 else "single_label_classification" if whole else "multi_label_classification"
    kind = problem_type or guess
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if n == 1 else F.mse_loss(logits, labels)
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    return F.binary_cross_entropy_with_logits(logits, labels)
