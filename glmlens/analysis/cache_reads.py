"""Who reads what: how the step that says the next token reads every entry of the KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, pattern_points
from glmlens.analysis.batch import (
    PromptBatch,
    Token,
    describe_kv_groups,
    layer_labels,
    to_numpy,
    token_label,
    upcast,
    upcast_to_float64,
)
from glmlens.analysis.chunks import DecodingState, run_in_chunks
from glmlens.hooks import Hooks
from glmlens.kv_cache import unmask_positions
from glmlens.lens import Lens
from glmlens.model import RMSNorm
from glmlens.results import Labelled, LabelledGroup
from glmlens.text.prompts import Prompt


@dataclass(frozen=True, eq=False)
class CacheReads(LabelledGroup):
    """How the step that says the next token reads every entry [layer, head, key]; the last key is its own.

    `attention` is the pattern. `weighted` is the length of what the head writes for it, |attention · v W_O|
    (Kobayashi et al. 2020, arXiv 2004.10102, section 2.3). `direct` is what that adds to the logit of the token said,
    through the final norm as it was.
    """

    attention: Labelled
    weighted: Labelled
    direct: Labelled

    def sum_by_kv_head(self, sheet: str, n_kv_heads: int) -> Labelled:
        """A sheet summed over the query heads that share an entry: [layer, kv, key]."""
        of = self.sheets()[sheet]
        summed = of.values.reshape(of.shape[0], n_kv_heads, -1, of.shape[2]).sum(2)
        labels = {axis: of.labels[axis] for axis in ("layer", "key")}
        return Labelled(summed, ("layer", "kv", "key"), labels, {**of.about, "heads": "summed over the group"})


def to_decoding_state(lens: Lens, of: Prompt | DecodingState, hooks: Hooks | None = None) -> DecodingState:
    found = of if isinstance(of, DecodingState) else DecodingState.from_batch(PromptBatch.from_prompt(lens, of), hooks)
    if found.kv.batch != 1:
        raise ValueError(f"one prompt at a time here, not {found.kv.batch}")
    return found


def cache_reads(
    lens: Lens,
    of: Prompt | DecodingState,
    answer: Token | None = None,
    wrong: Token | None = None,
    *,
    hooks: Hooks | None = None,
    step_hooks: Hooks | None = None,
) -> CacheReads:
    """How the step that says the next token reads every entry of a prompt, or of a generation's memory.

    `answer` (less `wrong`) is the text of one token or its id: by default the most probable. `hooks` are on the run of
    the prompt, `step_hooks` on this step. Units: shares of attention, lengths in the residual stream, logits.
    """
    memory = to_decoding_state(lens, of, hooks)
    kv = memory.kv.fork(1)
    key_at = kv.concatenate_positions(kv.next_positions()[:, None])
    post = ["ln1_post.scale"] if lens.cfg.sandwich else []
    names = [*pattern_points(lens), "kv.v", *post, "ln_final.scale"]
    rows = PromptBatch(lens, memory.token[:, None], None)
    (piece,) = run_in_chunks(rows, names, step_hooks, kv=kv, logits=True)
    logits, acts = upcast(cast(Tensor, piece.logits)[:, -1]), piece.acts
    direction, said = answer_direction(lens, logits[0], answer, wrong)
    pull = (
        upcast_to_float64(direction)
        * upcast_to_float64(lens.model.ln_final.weight)
        * upcast_to_float64(acts["ln_final.scale"][0, 0])
    )
    found = [read_layer_entries(lens, acts, layer, key_at, pull) for layer in range(lens.cfg.n_layers)]
    about = describe_step(lens, memory, "how the next token's step reads", said)
    labels = {"layer": layer_labels(lens), "key": [*label_keys(lens, memory), f"{int(key_at[0, -1])} itself"]}
    units = {"attention": "share of attention", "weighted": "length of what is written", "direct": f"logit of {said}"}
    sheets = {
        name: Labelled(to_numpy(torch.stack(x)), ("layer", "head", "key"), labels, {**about, "metric": units[name]})
        for name, x in zip(units, zip(*found, strict=True), strict=True)
    }
    return CacheReads(about, **sheets)


def answer_direction(
    lens: Lens, logits: Float[Tensor, "vocab"], answer: Token | None, wrong: Token | None
) -> tuple[Tensor, str]:
    """The direction of a token's logit, or of a difference of two, and its name."""
    right = int(logits.argmax()) if answer is None else lens.to_answer(answer)
    if wrong is None:
        return upcast(lens.W_U.T[right]), lens.answer_label(right)
    other = lens.to_answer(wrong)
    return upcast(lens.W_U.T[right]) - upcast(
        lens.W_U.T[other]
    ), f"{lens.answer_label(right)} - {lens.answer_label(other)}"


def read_layer_entries(
    lens: Lens, acts: Mapping[str, Tensor], layer: int, key_at: Tensor, pull: Float[Tensor, "model"]
) -> tuple[Tensor, ...]:
    """Attention, what it writes and what that adds to the logit, of one layer [head, key]."""
    weight = upcast(layer_pattern(acts, layer, key_at[:, -1:], key_at)[0, :, -1])
    v = repeat(upcast(acts[f"blocks.{layer}.kv.v"][0]), "key kv d -> (kv group) key d", group=lens.cfg.n_groups)
    W_O = upcast(lens.W_O[layer])
    gram = einsum(W_O, W_O, "head d model, head e model -> head d e")
    length = einsum(v, gram, v, "head key d, head d e, head key e -> head key").clamp(min=0).sqrt()
    norm = lens.model.blocks[layer].ln1_post
    if isinstance(norm, RMSNorm):  # linear, given its scale
        pull = pull * upcast_to_float64(norm.weight) * upcast_to_float64(acts[f"blocks.{layer}.ln1_post.scale"][0, 0])
    on_z = einsum(W_O, pull.to(W_O.dtype), "head d model, model -> head d")
    return weight, weight * length, weight * einsum(v, on_z, "head key d, head d -> head key")


def describe_step(lens: Lens, state: DecodingState, metric: str, direction: str) -> dict[str, str]:
    at, said = int(state.kv.next_positions()[0]), state.kv.tokens[0, : state.kv.length].tolist()
    words = [token_label(lens, token) if token >= 0 else "?" for token in [*said, int(state.token[0])]]
    return {
        "metric": metric, "direction": direction, "positions": f"the step at position {at} reads {state.kv.length}",
        "prompt": " ".join(words), "kv": describe_kv_groups(lens), "model": lens.model_hash,
    }  # fmt: skip


def label_keys(lens: Lens, state: DecodingState) -> list[str]:
    at, tokens = state.kv.positions[0, : state.kv.length], state.kv.tokens[0, : state.kv.length].tolist()
    words = [token_label(lens, token) if token >= 0 else "?" for token in tokens]
    gone = ["" if p >= 0 else " (dropped)" for p in at.tolist()]
    return [f"{p} {word}{end}" for p, word, end in zip(unmask_positions(at).tolist(), words, gone, strict=True)]


def sum_attention(lens: Lens, prompt: Prompt, *, hooks: Hooks | None = None) -> Float[Tensor, "layer head key"]:
    """How much attention every entry of a prompt got in sum over its queries: what heavy hitters are chosen by.

    A piece at a time, a layer at a time. Of one prompt; its last token's own entry is among them.
    """
    rows = PromptBatch.from_prompt(lens, prompt)
    if rows.batch != 1:
        raise ValueError(f"one prompt at a time here, not {rows.batch}")
    at, length = rows.positions, rows.tokens.shape[1]
    found = torch.zeros(lens.cfg.n_layers, lens.cfg.n_heads, length, device=lens.device)
    for piece in run_in_chunks(rows, pattern_points(lens), hooks):
        for layer in range(lens.cfg.n_layers):
            seen = slice(0, piece.columns.stop)
            x = layer_pattern(piece.acts, layer, at[:, piece.columns], at[:, seen])
            found[layer, :, seen] += x[0].to(found.dtype).sum(1)
    return found
