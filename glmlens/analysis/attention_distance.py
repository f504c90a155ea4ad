"""Attention as a function of distance, and the rotary pairs by which heads find a token."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from glmlens.analysis.chunked_runs import record_in_chunks
from glmlens.analysis.heads import RepeatedWordPatterns, draw_words
from glmlens.analysis.prompt_batch import PromptBatch, describe_kv_groups, layer_labels, to_numpy, upcast_to_float64
from glmlens.analysis.rotary import (
    head_vector_points,
    label_score_parts,
    pair_frequencies_of,
    rotary_score_scale,
    split_scores,
    sum_waves,
    to_complex_pairs,
    wavelengths,
)
from glmlens.hooks import Hooks
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.results import Labelled, LabelledGroup
from glmlens.text.prompts import Prompt


@dataclass(frozen=True, eq=False)
class DistanceProfile(LabelledGroup):
    """Every head's score of its mean query and mean key by distance [layer, head, distance].

    `attention` is the softmax of `score` over all distances up to the largest. The score is a sum of waves with
    `amplitude` and `phase` [layer, head, pair], one per rotary pair, and of `content` [layer, head], the unrotated
    channels, which is the same at all distances. `wavelength` [pair] is in tokens.
    """

    score: Labelled
    attention: Labelled
    amplitude: Labelled
    phase: Labelled
    content: Labelled
    wavelength: Labelled


@dataclass(frozen=True, eq=False)
class PairUse(LabelledGroup):
    """The lift of each part of the score at the token that a kind of head attends to [layer, head, part].

    A lift is the part at the target token minus its mean over all words that the query sees. The lifts of all parts sum
    to the score at the target minus the mean score. A lift does not show that the head attends to the target: other
    tokens may have the same lift, and then attention goes to them too (see `head_scores`).
    """

    previous: Labelled
    duplicate: Labelled
    induction: Labelled


def distance_profile(
    lens: Lens, prompt: Prompt, *, distances: Integer | None = None, hooks: Hooks | None = None
) -> DistanceProfile:
    """Return attention as a function of distance alone, for every head's mean query and key on these prompts.

    The means are of `attn.q` and `attn.k`, before rotation, over all tokens but the model's prefix. `distances` is the
    number of distances, from 0 on: by default that of tokens in the longest prompt. Scores are before the softmax.
    """
    rows = PromptBatch.from_prompt(lens, prompt)
    prefix = len(lens.tokenizer.prefix) if lens.tokenizer else 0
    # Without the prefix, of which a prompt may be nothing else: keep its last token then. -1 is padding.
    real = rows.positions >= min(prefix, int(rows.lengths.min()) - 1)
    acts = record_in_chunks(rows, ["attn.q", "attn.k"], hooks)
    q = torch.stack([upcast_to_float64(acts[f"blocks.{i}.attn.q"])[real].mean(0) for i in range(lens.cfg.n_layers)])
    k = torch.stack([upcast_to_float64(acts[f"blocks.{i}.attn.k"])[real].mean(0) for i in range(lens.cfg.n_layers)])
    k = repeat(k, "layer kv d -> layer (kv group) d", group=lens.cfg.n_groups)
    rotated = lens.cfg.d_rotary
    frequencies = pair_frequencies_of(lens)
    # With q and k as complex numbers per pair, the score at a distance is Re sum q k* e^(i · distance · frequency).
    waves = to_complex_pairs(q[..., :rotated]) * to_complex_pairs(k[..., :rotated]).conj() * rotary_score_scale(lens)
    content = (q[..., rotated:] * k[..., rotated:]).sum(-1) * lens.cfg.d_head**-0.5
    n_distances = int(rows.lengths.max()) if distances is None else read_integer(distances, "distances", least=1)
    score = sum_waves(waves, torch.arange(n_distances, device=lens.device), frequencies) + content.unsqueeze(-1)
    about = rows.describe(
        metric="score of the mean query and key", direction="distance: query position less key position",
        positions=f"means over {int(real.sum())} tokens, without the prefix", kv=describe_kv_groups(lens),
    )  # fmt: skip
    known_labels = {"pair": label_score_parts(lens)[: len(frequencies)], "layer": layer_labels(lens)}

    def to_sheet(x: Tensor, axes: str, metric: str) -> Labelled:
        labels = {axis: known_labels[axis] for axis in axes.split() if axis in known_labels}
        return Labelled(to_numpy(x), tuple(axes.split()), labels, {**about, "metric": metric})

    return DistanceProfile(
        about,
        score=to_sheet(score, "layer head distance", "score"),
        attention=to_sheet(score.softmax(-1), "layer head distance", "attention"),
        amplitude=to_sheet(waves.abs(), "layer head pair", "score"),
        phase=to_sheet(waves.angle(), "layer head pair", "radians"),
        content=to_sheet(content, "layer head", "score"),
        wavelength=to_sheet(wavelengths(lens), "pair", "tokens"),
    )


def pair_use(
    lens: Lens,
    *,
    rows: Integer = 4,
    length: Integer = 20,
    seed: Integer = 0,
    words: Iterable[Integer] | Iterable[str] | None = None,
) -> PairUse:
    """Return by which rotary pairs heads attend to the previous token, the same word, or the word after it.

    On the rows of `head_scores`: random words, repeated once. Units: scores. Raises ValueError as `head_scores` does.

    The target is always at the same distance: 1, `length` and `length` - 1 tokens. A pair whose wavelength divides the
    difference of two distances cannot tell them apart: with 20 words a head that attends 1 token back by pair 0 (6.28
    tokens) has a lift at 19 tokens back too, three wavelengths further. A lift that remains with another `length` comes
    from the word.
    """
    rows, length = read_integer(rows, "rows", least=1), read_integer(length, "length", least=1)
    ids = draw_words(lens, rows, length, seed, words)
    prefix = lens.tokenizer.prefix if lens.tokenizer else ()
    tokens = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(rows, -1), ids.repeat(1, 2)], 1)
    batch = PromptBatch.from_prompt(lens, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    # Which word is at each position: negative numbers, all different, in the prefix.
    word = torch.cat([torch.arange(-len(prefix), 0), torch.arange(length).repeat(2)]).to(lens.device)
    repeated = RepeatedWordPatterns([], word)
    targets = {
        "previous": repeated.previous_mask(),
        "duplicate": repeated.same_word_mask(),
        "induction": repeated.after_same_word_mask(),
    }
    columns = torch.arange(len(word), device=lens.device)
    visible = (columns[:, None] >= columns) & (word >= 0)
    acts = record_in_chunks(batch, head_vector_points(lens))
    lifts: dict[str, list[Tensor]] = {name: [] for name in targets}
    for layer in range(lens.cfg.n_layers):
        parts = layer_score_parts(lens, acts, layer)  # of one layer at a time: the largest tensor here
        for name, target in targets.items():
            lifts[name].append(mean_lift(parts, target & (word >= 0), visible))
    about = {
        "metric": "part of the score at the target token, less its mean over visible words",
        "direction": "score",
        "positions": f"{rows} rows of {length} random words, repeated once, seed {seed}",
        "kv": describe_kv_groups(lens),
        "model": lens.model_hash,
    }
    labels = {"layer": layer_labels(lens), "part": label_score_parts(lens)}
    axes = ("layer", "head", "part")
    sheets = {
        name: Labelled(to_numpy(torch.stack(x)), axes, labels, {**about, "direction": name})
        for name, x in lifts.items()
    }
    return PairUse(about, **sheets)


def layer_score_parts(lens: Lens, acts: dict[str, Tensor], layer: int) -> Float[Tensor, "batch head query key part"]:
    """Return a layer's scores by part: one per rotary pair, then the unrotated channels if there are any."""
    unrotated = [acts[name] for name in (f"blocks.{layer}.attn.q_pass",) if name in acts]
    q = torch.cat([acts[f"blocks.{layer}.attn.q_rot"], *unrotated], -1)
    q = rearrange(q, "batch query head d -> batch head query d")
    k = repeat(acts[f"blocks.{layer}.kv.k"], "batch key kv d -> batch (kv group) key d", group=lens.cfg.n_groups)
    return split_scores(upcast_to_float64(q), upcast_to_float64(k), lens.cfg.d_rotary)


def mean_lift(
    parts: Float[Tensor, "batch head query key part"],
    target: Bool[Tensor, "query key"],
    visible: Bool[Tensor, "query key"],
) -> Float[Tensor, "head part"]:
    """Return the parts at the targets minus the mean over visible keys, averaged over queries with a target."""
    with_target = target.any(1)
    parts = parts[:, :, with_target]
    target, visible = target[with_target].to(parts.dtype), visible[with_target].to(parts.dtype)
    # One weight per key: positive at targets, negative over all visible keys; it sums to 0.
    weight = target / target.sum(1, keepdim=True) - visible / visible.sum(1, keepdim=True)
    return einsum(parts, weight, "batch head query key part, query key -> batch head query part").mean((0, 2))
