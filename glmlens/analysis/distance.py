"""How far heads look: attention as a function of distance alone, and the pairs of channels that find a token."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from glmlens.analysis.batch import PromptBatch, describe_kv_groups, layer_labels, to_numpy, upcast_to_float64
from glmlens.analysis.chunks import record_in_chunks
from glmlens.analysis.heads import RepeatedWordPatterns, draw_words
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
    """What every head would attend to if all queries and keys were its mean ones, by distance [layer, head, distance].

    `score` is that of the mean query and key at a distance, `attention` its softmax over all distances up to the
    largest. `amplitude` and `phase` [layer, head, pair] are those of the waves that make it, `wavelength` [pair] is
    in tokens, and `content` [layer, head] what the other channels add everywhere.
    """

    score: Labelled
    attention: Labelled
    amplitude: Labelled
    phase: Labelled
    content: Labelled
    wavelength: Labelled


@dataclass(frozen=True, eq=False)
class PairUse(LabelledGroup):
    """By how much each part lifts the score of what a kind of head looks for [layer, head, part].

    The part at the token sought, less its mean over all words that the query sees. The parts add up to what the whole
    score has there above its mean. A lift says where the score of a head is high, not what the head looks for: other
    tokens may lift as much, and then attention goes there (`head_scores` tells).
    """

    previous: Labelled
    duplicate: Labelled
    induction: Labelled


def distance_profile(
    lens: Lens, prompt: Prompt, *, distances: Integer | None = None, hooks: Hooks | None = None
) -> DistanceProfile:
    """Attention as a function of distance alone, under every head's mean query and key on these prompts.

    The means are of `attn.q` and `attn.k`, before they turn, over all tokens but the model's prefix. `distances` is
    how many are asked for, from 0 on: by default as many as the longest prompt has tokens. Scores are in units of
    scores, before the softmax.
    """
    rows = PromptBatch.from_prompt(lens, prompt)
    prefix = len(lens.tokenizer.prefix) if lens.tokenizer else 0
    real = rows.positions >= min(prefix, int(rows.lengths.min()) - 1)
    acts = record_in_chunks(rows, ["attn.q", "attn.k"], hooks)
    q = torch.stack([upcast_to_float64(acts[f"blocks.{i}.attn.q"])[real].mean(0) for i in range(lens.cfg.n_layers)])
    k = torch.stack([upcast_to_float64(acts[f"blocks.{i}.attn.k"])[real].mean(0) for i in range(lens.cfg.n_layers)])
    k = repeat(k, "layer kv d -> layer (kv group) d", group=lens.cfg.n_groups)
    rotated, w, scale = lens.cfg.d_rotary, pair_frequencies_of(lens), lens.cfg.d_head**-0.5
    waves = to_complex_pairs(q[..., :rotated]) * to_complex_pairs(k[..., :rotated]).conj() * rotary_score_scale(lens)
    content = (q[..., rotated:] * k[..., rotated:]).sum(-1) * scale
    asked = int(rows.lengths.max()) if distances is None else read_integer(distances, "distances", least=1)
    many = torch.arange(asked, device=lens.device)
    score = sum_waves(waves, many, w) + content.unsqueeze(-1)
    about = rows.describe(
        metric="score of the mean query and key", direction="distance: query position less key position",
        positions=f"means over {int(real.sum())} tokens, without the prefix", kv=describe_kv_groups(lens),
    )  # fmt: skip
    pairs = {"pair": label_score_parts(lens)[: len(w)], "layer": layer_labels(lens)}

    def to_sheet(x: Tensor, axes: str, metric: str) -> Labelled:
        labels = {axis: pairs[axis] for axis in axes.split() if axis in pairs}
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
    """Which pairs of channels make heads look at the previous token, the same word, or what followed it.

    On the rows of `head_scores`: random words, said twice. In units of scores. Raises ValueError as that does.

    What is sought is always as far away: 1, `length` and `length` - 1 tokens. A pair that turns a whole number of times
    between lifts it whatever the word is: with 20 words a head that looks 1 token back by pair 0 is lifted 19 back too,
    three turns further. What is left with another `length` is the word's.
    """
    rows, length = read_integer(rows, "rows", least=1), read_integer(length, "length", least=1)
    ids, prefix = draw_words(lens, rows, length, seed, words), lens.tokenizer.prefix if lens.tokenizer else ()
    tokens = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(rows, -1), ids.repeat(1, 2)], 1)
    batch = PromptBatch.from_prompt(lens, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    word = torch.cat([torch.arange(-len(prefix), 0), torch.arange(length).repeat(2)]).to(lens.device)
    said = RepeatedWordPatterns([], word)
    sought = {
        "previous": said.previous_mask(),
        "duplicate": said.same_word_mask(),
        "induction": said.after_same_word_mask(),
    }
    here = torch.arange(len(word), device=lens.device)
    seen = (here[:, None] >= here) & (word >= 0)
    acts = record_in_chunks(batch, head_vector_points(lens))
    found: dict[str, list[Tensor]] = {name: [] for name in sought}
    for layer in range(lens.cfg.n_layers):
        parts = layer_score_parts(lens, acts, layer)
        for name, target in sought.items():
            found[name].append(mean_lift(parts, target & (word >= 0), seen))
    about = {
        "metric": "part of the score at the token sought, less its mean over the words seen", "direction": "score",
        "positions": f"{rows} rows of {length} random words said twice, seed {seed}", "kv": describe_kv_groups(lens),
        "model": lens.model_hash,
    }  # fmt: skip
    labels = {"layer": layer_labels(lens), "part": label_score_parts(lens)}
    axes = ("layer", "head", "part")
    sheets = {
        name: Labelled(to_numpy(torch.stack(x)), axes, labels, {**about, "direction": name})
        for name, x in found.items()
    }
    return PairUse(about, **sheets)


def layer_score_parts(lens: Lens, acts: dict[str, Tensor], layer: int) -> Float[Tensor, "batch head query key part"]:
    rest = [acts[name] for name in (f"blocks.{layer}.attn.q_pass",) if name in acts]
    q = rearrange(
        torch.cat([acts[f"blocks.{layer}.attn.q_rot"], *rest], -1), "batch query head d -> batch head query d"
    )
    k = repeat(acts[f"blocks.{layer}.kv.k"], "batch key kv d -> batch (kv group) key d", group=lens.cfg.n_groups)
    return split_scores(upcast_to_float64(q), upcast_to_float64(k), lens.cfg.d_rotary)


def mean_lift(
    parts: Float[Tensor, "batch head query key part"],
    target: Bool[Tensor, "query key"],
    visible: Bool[Tensor, "query key"],
) -> Float[Tensor, "head part"]:
    """Over the queries that have a target, the mean of the parts there less that over what is seen."""
    asked = target.any(1)
    parts, target, visible = parts[:, :, asked], target[asked].to(parts.dtype), visible[asked].to(parts.dtype)
    weight = target / target.sum(1, keepdim=True) - visible / visible.sum(1, keepdim=True)
    return einsum(parts, weight, "batch head query key part, query key -> batch head query part").mean((0, 2))
