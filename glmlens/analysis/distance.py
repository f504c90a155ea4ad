"""How far heads look: attention as a function of distance alone, and the pairs of channels that find a token."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from glmlens.analysis.heads import Said, random_words
from glmlens.analysis.passes import recorded
from glmlens.analysis.rotary import (
    as_complex,
    frequencies_of,
    head_points,
    part_labels,
    parts_of,
    scale_of,
    waved,
    wavelengths,
)
from glmlens.analysis.rows import Rows, finest, groups_of, layers_of, numbers
from glmlens.hooks import Hooks
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.prompt import Prompt
from glmlens.results import Labelled, Sheets


@dataclass(frozen=True, eq=False)
class DistanceProfile(Sheets):
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
class PairUse(Sheets):
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
    rows = Rows.of(lens, prompt)
    prefix = len(lens.tokenizer.prefix) if lens.tokenizer else 0
    real = rows.positions >= min(prefix, int(rows.lengths.min()) - 1)
    acts = recorded(rows, ["attn.q", "attn.k"], hooks)
    q = torch.stack([finest(acts[f"blocks.{i}.attn.q"])[real].mean(0) for i in range(lens.cfg.n_layers)])
    k = torch.stack([finest(acts[f"blocks.{i}.attn.k"])[real].mean(0) for i in range(lens.cfg.n_layers)])
    k = repeat(k, "layer kv d -> layer (kv group) d", group=lens.cfg.n_groups)
    rotated, w, scale = lens.cfg.d_rotary, frequencies_of(lens), lens.cfg.d_head**-0.5
    waves = as_complex(q[..., :rotated]) * as_complex(k[..., :rotated]).conj() * scale_of(lens)
    content = (q[..., rotated:] * k[..., rotated:]).sum(-1) * scale
    asked = int(rows.lengths.max()) if distances is None else read_integer(distances, "distances", least=1)
    many = torch.arange(asked, device=lens.device)
    score = waved(waves, many, w) + content.unsqueeze(-1)
    about = rows.about(
        metric="score of the mean query and key", direction="distance: query position less key position",
        positions=f"means over {int(real.sum())} tokens, without the prefix", kv=groups_of(lens),
    )  # fmt: skip
    pairs = {"pair": part_labels(lens)[: len(w)], "layer": layers_of(lens)}

    def sheet(x: Tensor, axes: str, metric: str) -> Labelled:
        labels = {axis: pairs[axis] for axis in axes.split() if axis in pairs}
        return Labelled(numbers(x), tuple(axes.split()), labels, {**about, "metric": metric})

    return DistanceProfile(
        about,
        score=sheet(score, "layer head distance", "score"),
        attention=sheet(score.softmax(-1), "layer head distance", "attention"),
        amplitude=sheet(waves.abs(), "layer head pair", "score"),
        phase=sheet(waves.angle(), "layer head pair", "radians"),
        content=sheet(content, "layer head", "score"),
        wavelength=sheet(wavelengths(lens), "pair", "tokens"),
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
    ids, prefix = random_words(lens, rows, length, seed, words), lens.tokenizer.prefix if lens.tokenizer else ()
    tokens = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(rows, -1), ids.repeat(1, 2)], 1)
    batch = Rows.of(lens, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    word = torch.cat([torch.arange(-len(prefix), 0), torch.arange(length).repeat(2)]).to(lens.device)
    said = Said([], word)
    sought = {"previous": said.previous(), "duplicate": said.same(), "induction": said.after_same()}
    here = torch.arange(len(word), device=lens.device)
    seen = (here[:, None] >= here) & (word >= 0)
    acts = recorded(batch, head_points(lens))
    found: dict[str, list[Tensor]] = {name: [] for name in sought}
    for layer in range(lens.cfg.n_layers):
        parts = layer_parts(lens, acts, layer)
        for name, target in sought.items():
            found[name].append(lifted(parts, target & (word >= 0), seen))
    about = {
        "metric": "part of the score at the token sought, less its mean over the words seen", "direction": "score",
        "positions": f"{rows} rows of {length} random words said twice, seed {seed}", "kv": groups_of(lens),
        "model": lens.model_hash,
    }  # fmt: skip
    labels = {"layer": layers_of(lens), "part": part_labels(lens)}
    axes = ("layer", "head", "part")
    sheets = {
        name: Labelled(numbers(torch.stack(x)), axes, labels, {**about, "direction": name}) for name, x in found.items()
    }
    return PairUse(about, **sheets)


def layer_parts(lens: Lens, acts: dict[str, Tensor], layer: int) -> Float[Tensor, "batch head query key part"]:
    rest = [acts[name] for name in (f"blocks.{layer}.attn.q_pass",) if name in acts]
    q = rearrange(
        torch.cat([acts[f"blocks.{layer}.attn.q_rot"], *rest], -1), "batch query head d -> batch head query d"
    )
    k = repeat(acts[f"blocks.{layer}.kv.k"], "batch key kv d -> batch (kv group) key d", group=lens.cfg.n_groups)
    return parts_of(finest(q), finest(k), lens.cfg.d_rotary)


def lifted(
    parts: Float[Tensor, "batch head query key part"],
    target: Bool[Tensor, "query key"],
    seen: Bool[Tensor, "query key"],
) -> Float[Tensor, "head part"]:
    """Over the queries that have a target, the mean of the parts there less that over what is seen."""
    asked = target.any(1)
    parts, target, seen = parts[:, :, asked], target[asked].to(parts.dtype), seen[asked].to(parts.dtype)
    weight = target / target.sum(1, keepdim=True) - seen / seen.sum(1, keepdim=True)
    return einsum(parts, weight, "batch head query key part, query key -> batch head query part").mean((0, 2))
