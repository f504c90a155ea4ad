"""How the next decoding step uses each KV-cache entry: attention, weighted value norm, direct logit contribution."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, pattern_points
from glmlens.analysis.chunked_runs import DecodingState, run_in_chunks
from glmlens.analysis.layer_norms import scale_by_post_norm
from glmlens.analysis.prompt_batch import (
    PromptBatch,
    Token,
    describe_kv_groups,
    layer_labels,
    to_numpy,
    token_label,
    upcast_to_float64,
)
from glmlens.deprecated import rename_method
from glmlens.dtypes import upcast
from glmlens.hooks import Hooks
from glmlens.kv_cache import unmask_positions
from glmlens.lens import Lens
from glmlens.results import Labelled, LabelledGroup
from glmlens.text.prompts import Prompt


@dataclass(frozen=True, eq=False)
class CacheReads(LabelledGroup):
    """How the next decoding step uses every entry [layer, head, key]; the last key is the step's own entry.

    `attention` is the pattern. `weighted` is the norm of the head's output for this entry, |attention · v W_O|
    (Kobayashi et al. 2020, arXiv 2004.10102, section 2.3). `direct` is the contribution of that output to the logit of
    the answer, with the final norm's scale of this run.
    """

    attention: Labelled
    weighted: Labelled
    direct: Labelled

    def sum_by_kv_head(self, sheet: str, n_kv_heads: int) -> Labelled:
        """Return a sheet summed over the query heads that share an entry: [layer, kv, key]."""
        per_head = self.sheets()[sheet]
        summed = per_head.values.reshape(per_head.shape[0], n_kv_heads, -1, per_head.shape[2]).sum(2)
        labels = {axis: per_head.labels[axis] for axis in ("layer", "key")}
        about = {**per_head.about, "heads": "summed over the group"}
        return Labelled(summed, ("layer", "kv", "key"), labels, about)

    by_entry = rename_method("by_entry", "sum_by_kv_head")


def to_decoding_state(lens: Lens, of: Prompt | DecodingState, hooks: Hooks | None = None) -> DecodingState:
    """Return a decoding state, or that of a prompt run with `hooks`. Raise ValueError for several prompts."""
    state = of if isinstance(of, DecodingState) else DecodingState.from_batch(PromptBatch.from_prompt(lens, of), hooks)
    if state.kv.batch != 1:
        raise ValueError(f"one prompt at a time here, not {state.kv.batch}")
    return state


def cache_reads(
    lens: Lens,
    of: Prompt | DecodingState,
    answer: Token | None = None,
    wrong: Token | None = None,
    *,
    hooks: Hooks | None = None,
    step_hooks: Hooks | None = None,
) -> CacheReads:
    """Return how the next decoding step uses every KV-cache entry of a prompt, or of a generation's decoding state.

    `answer` (minus `wrong`) is the text of one token or its id: by default the most probable token. `hooks` are on the
    run of the prompt, `step_hooks` on this step. Units: shares of attention, norms in the residual stream, logits.
    Raises ValueError for several prompts, or a prompt of one token.
    """
    state = to_decoding_state(lens, of, hooks)
    kv = state.kv.fork(1)  # the step writes its own entry into a copy
    key_positions = kv.concatenate_positions(kv.next_positions()[:, None])
    post_norm = ["ln1_post.scale"] if lens.cfg.sandwich else []
    names = [*pattern_points(lens), "kv.v", *post_norm, "ln_final.scale"]
    rows = PromptBatch(lens, state.token[:, None], None)
    (step,) = run_in_chunks(rows, names, step_hooks, kv=kv, logits=True)  # one token is one chunk
    acts = step.acts
    logits = upcast(cast(Tensor, step.logits)[:, -1])
    direction, answer_name = answer_direction(lens, logits[0], answer, wrong)
    # The direction in the residual stream before the final norm, which is linear given its scale.
    pull = (
        upcast_to_float64(direction)
        * upcast_to_float64(lens.model.ln_final.weight)
        * upcast_to_float64(acts["ln_final.scale"][0, 0])
    )
    per_layer = [read_layer_entries(lens, acts, layer, key_positions, pull) for layer in range(lens.cfg.n_layers)]
    about = describe_step(lens, state, "how the next decoding step uses each entry", answer_name)
    own_entry = f"{int(key_positions[0, -1])} itself"
    labels = {"layer": layer_labels(lens), "key": [*label_keys(lens, state), own_entry]}
    metrics = {
        "attention": "share of attention",
        "weighted": "weighted value norm",
        "direct": f"logit of {answer_name}",
    }
    sheets = {
        name: Labelled(to_numpy(torch.stack(x)), ("layer", "head", "key"), labels, {**about, "metric": metrics[name]})
        for name, x in zip(metrics, zip(*per_layer, strict=True), strict=True)
    }
    return CacheReads(about, **sheets)


def answer_direction(
    lens: Lens, logits: Float[Tensor, "vocab"], answer: Token | None, wrong: Token | None
) -> tuple[Tensor, str]:
    """Return the unembedding of a token, or the difference of two, and its name."""
    right = int(logits.argmax()) if answer is None else lens.to_answer(answer)
    if wrong is None:
        return upcast(lens.W_U.T[right]), lens.answer_label(right)
    other = lens.to_answer(wrong)
    direction = upcast(lens.W_U.T[right]) - upcast(lens.W_U.T[other])
    return direction, f"{lens.answer_label(right)} - {lens.answer_label(other)}"


def read_layer_entries(
    lens: Lens, acts: Mapping[str, Tensor], layer: int, key_positions: Tensor, pull: Float[Tensor, "model"]
) -> tuple[Tensor, ...]:
    """Return attention, weighted value norm and direct logit contribution of one layer, each [head, key]."""
    weight = upcast(layer_pattern(acts, layer, key_positions[:, -1:], key_positions)[0, :, -1])
    v = repeat(upcast(acts[f"blocks.{layer}.kv.v"][0]), "key kv d -> (kv group) key d", group=lens.cfg.n_groups)
    W_O = upcast(lens.W_O[layer])
    # |v W_O|² = v (W_O W_Oᵀ) v: the small matrix [d, d] avoids a vector of the model's width per head and key.
    gram = einsum(W_O, W_O, "head d model, head e model -> head d e")
    value_norm = einsum(v, gram, v, "head key d, head d e, head key e -> head key").clamp(min=0).sqrt()
    pull = scale_by_post_norm(acts, lens.model, layer, "ln1_post", pull)
    pull_on_z = einsum(W_O, pull.to(W_O.dtype), "head d model, model -> head d")
    value_logit = einsum(v, pull_on_z, "head key d, head d -> head key")
    return weight, weight * value_norm, weight * value_logit


def describe_step(lens: Lens, state: DecodingState, metric: str, direction: str) -> dict[str, str]:
    """Return the `about` of a result on the next decoding step: metric, direction, positions, tokens, model."""
    position = int(state.kv.next_positions()[0])
    tokens = [*state.kv.tokens[0, : state.kv.length].tolist(), int(state.token[0])]
    return {
        "metric": metric, "direction": direction,
        "positions": f"the step at position {position} reads {state.kv.length}",
        "prompt": " ".join(label_or_question_mark(lens, token) for token in tokens),
        "kv": describe_kv_groups(lens), "model": lens.model_hash,
    }  # fmt: skip


def label_keys(lens: Lens, state: DecodingState) -> list[str]:
    """Return a label for every entry: its position and token, with "(dropped)" after an evicted newest entry."""
    positions = state.kv.positions[0, : state.kv.length]
    original = unmask_positions(positions).tolist()
    tokens = [label_or_question_mark(lens, token) for token in state.kv.tokens[0, : state.kv.length].tolist()]
    suffixes = ["" if position >= 0 else " (dropped)" for position in positions.tolist()]
    return [f"{place} {token}{suffix}" for place, token, suffix in zip(original, tokens, suffixes, strict=True)]


def label_or_question_mark(lens: Lens, token: int) -> str:
    """Return the label of a token, or "?" where the cache does not know it (-1)."""
    return token_label(lens, token) if token >= 0 else "?"


def sum_attention(lens: Lens, prompt: Prompt, *, hooks: Hooks | None = None) -> Float[Tensor, "layer head key"]:
    """Return the attention on every entry of a prompt, summed over queries: the score of `cache.keep_heavy_hitters`.

    The last token's own entry is among them. The prompt is run in chunks, so that a long one needs little memory.
    Raises ValueError for several prompts.
    """
    rows = PromptBatch.from_prompt(lens, prompt).require_single()
    positions = rows.positions
    total = torch.zeros(lens.cfg.n_layers, lens.cfg.n_heads, rows.tokens.shape[1], device=lens.device)
    for chunk in run_in_chunks(rows, pattern_points(lens), hooks):
        visible = slice(0, chunk.columns.stop)  # the queries of a chunk see no key after it
        for layer in range(lens.cfg.n_layers):
            pattern = layer_pattern(chunk.acts, layer, positions[:, chunk.columns], positions[:, visible])
            total[layer, :, visible] += pattern[0].to(total.dtype).sum(1)
    return total
