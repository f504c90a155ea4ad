"""The regular generation path: prefill, step, choose, stop. Every step is an ordinary forward with an ordinary hook."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.hooks import Hook
from glmlens.kv_cache import KVCache
from glmlens.model import GLM, absolute_positions

Choose = Callable[[Float[Tensor, "batch vocab"], Int[Tensor, "batch pos"]], Int[Tensor, "batch"]]
"""From the last logits and all tokens so far to the next token of every row."""
HookAt = Callable[[int, Int[Tensor, "batch pos"], Int[Tensor, "batch key"]], Hook]
"""The hook of one step, made from its number, its absolute positions and those of all it can attend to."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a generation: what the model said and what was chosen.

    `tokens` is [batch], the padding id in rows that had stopped before; `logits` [batch, vocab]; `live` [batch] is
    where this step's token is a real one.
    """

    index: int
    tokens: Int[Tensor, "batch"]
    logits: Float[Tensor, "batch vocab"]
    live: Bool[Tensor, "batch"]
    text: str | list[str] = ""


def greedy(logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch"]:
    """The most probable token of every row."""
    return logits.argmax(-1)


def steps(
    model: GLM,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Tensor | None,
    kv: KVCache,
    hook_at: HookAt,
    *,
    max_new_tokens: int,
    choose: Choose = greedy,
    stop_ids: Collection[int] = (),
    pad_id: int = 0,
) -> Iterator[Step]:
    """Run the prompt, then one token at a time, into `kv`, until every row has said a stop id.

    Step 0 runs the prompt and chooses the first token; step i runs the token that step i - 1 chose. A row that has
    stopped is fed padding, at position -1.
    """
    live = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=tokens.device)
    new = tokens
    for index in range(max_new_tokens):
        positions = absolute_positions(new.shape, new.device, kv, attention_mask=attention_mask)
        hook = hook_at(index, positions, torch.cat([kv.positions[:, : kv.length], positions], 1))
        with torch.no_grad():
            logits = model(new, kv, hook, attention_mask=attention_mask, logits_to_keep=1)[:, -1]
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = torch.where(live, choose(exact, tokens), pad_id)
        yield Step(index, chosen, logits, live)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        live = live & ~torch.isin(chosen, stop)
        new, attention_mask = chosen[:, None], None if bool(live.all()) else live[:, None]
        if not bool(live.any()):
            return
