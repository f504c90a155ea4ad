"""Scores taken apart: what each pair of rotated channels adds to where a head looks, and what the others add.

Before it turns, a pair of channels of a query is a complex number q, and of a key k. A token at position p turns them
by p · w, where w is the pair's frequency. So a score is a sum of waves over distance and a constant (Su et al. 2021,
arXiv 2104.09864, sections 3.2 and 3.4.2):

    score · sqrt(d) = sum over pairs of  |q| |k| cos(arg q - arg k + w · distance)  +  q_pass · k_pass
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from glmlens.analysis.heads import Said, random_words
from glmlens.analysis.passes import recorded
from glmlens.analysis.rows import Rows, finest, groups_of, layers_of, numbers
from glmlens.angles import frequencies
from glmlens.hooks import Hooks
from glmlens.lens import Lens
from glmlens.prompt import Prompt
from glmlens.results import Labelled, Sheets


@dataclass(frozen=True, eq=False)
class ScoreParts(Sheets):
    """The scores of one head as sums, [query, key, part]: a part per rotated pair, and "content", all other channels.

    `score` [query, key] is their sum. `angle` (pair frequency · distance), `amplitude` and `phase` [query, key, pair]
    are those of the pair's wave: its part is amplitude · cos(phase + angle). Of the patterns [query, key], `pattern`
    is the head's; `rotary_alone` and `content_alone` are what it would be if only the rotated or only the other
    channels were compared; `position_alone` is that of the rotated channels of the mean query and key, in which
    nothing is left but distance. Keys that a query cannot see are nan.
    """

    part: Labelled
    score: Labelled
    angle: Labelled
    amplitude: Labelled
    phase: Labelled
    pattern: Labelled
    rotary_alone: Labelled
    content_alone: Labelled
    position_alone: Labelled


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
    score has there above its mean.
    """

    previous: Labelled
    duplicate: Labelled
    induction: Labelled


def wavelengths(lens: Lens) -> Float[Tensor, "pair"]:
    """How many tokens apart two are when a pair has turned once between them: 2 pi / frequency."""
    return 2 * math.pi / frequencies_of(lens)


def frequencies_of(lens: Lens) -> Float[Tensor, "pair"]:
    dtype = torch.float32 if lens.device.type == "mps" else torch.float64
    return frequencies(lens.cfg, dtype, lens.device)


def part_labels(lens: Lens) -> list[str]:
    pairs = [f"pair {i} ({length:.3g} tokens)" for i, length in enumerate(wavelengths(lens).tolist())]
    return [*pairs, "content"] if lens.cfg.d_rotary < lens.cfg.d_head else pairs


@dataclass(frozen=True)
class Head:
    """One head's queries and the keys that it compares them with, in float64; `before` and after they turn."""

    q: Float[Tensor, "query d"]
    k: Float[Tensor, "key d"]
    q_before: Complex[Tensor, "query pair"]
    k_before: Complex[Tensor, "key pair"]
    rotated: int

    @staticmethod
    def of(lens: Lens, acts: dict[str, Tensor], layer: int, head: int) -> "Head":
        kv, rotated = head // lens.cfg.n_groups, lens.cfg.d_rotary
        at = f"blocks.{layer}."
        q = [finest(acts[at + name][0, :, head]) for name in ("attn.q_rot", "attn.q_pass") if at + name in acts]
        q_before, k_before = acts[at + "attn.q"][0, :, head, :rotated], acts[at + "attn.k"][0, :, kv, :rotated]
        return Head(
            torch.cat(q, -1),
            finest(acts[at + "kv.k"][0, :, kv]),
            as_complex(finest(q_before)),
            as_complex(finest(k_before)),
            rotated,
        )

    def parts(self, query: Tensor, keys: Tensor | slice = slice(None)) -> Float[Tensor, "query key part"]:
        """What each pair, and then all channels that do not turn, add to the scores."""
        return parts_of(self.q[query], self.k[keys], self.rotated)


def as_complex(x: Float[Tensor, "*rest rotated"]) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def parts_of(
    q: Float[Tensor, "*batch query d"], k: Float[Tensor, "*batch key d"], rotated: int
) -> Float[Tensor, "*batch query key part"]:
    """The score of every query and key, by pair and then by what does not turn."""
    (q_rot, q_pass), (k_rot, k_pass) = (x.tensor_split([rotated], -1) for x in (q, k))
    q_rot, k_rot = (x.unflatten(-1, (-1, 2)) for x in (q_rot, k_rot))
    pairs = einsum(q_rot, k_rot, "... query pair two, ... key pair two -> ... query key pair two").sum(-1)
    content = einsum(q_pass, k_pass, "... query d, ... key d -> ... query key").unsqueeze(-1)
    found = torch.cat([pairs, content], -1) if q_pass.shape[-1] else pairs
    return found * q.shape[-1] ** -0.5


def score_parts(
    lens: Lens,
    prompt: Prompt,
    layer: int,
    head: int,
    *,
    query: Sequence[int] | int | None = None,
    key: Sequence[int] | int | None = None,
    hooks: Hooks | None = None,
) -> ScoreParts:
    """Take the scores of one head apart, at some absolute positions of queries and keys (default: all).

    Exact: the parts sum to `attn.scores`, in units of scores. The patterns are over all keys, of which those asked for
    are shown. A long prompt is run in pieces; give `query=` to keep what is made of it small. Raises ValueError for
    several prompts, IndexError for a position that is not there.
    """
    rows = one(lens, prompt)
    if not (0 <= layer < lens.cfg.n_layers and 0 <= head < lens.cfg.n_heads):
        raise IndexError(
            f"layer {layer}, head {head}; there are {lens.cfg.n_layers} layers of {lens.cfg.n_heads} heads"
        )
    acts = recorded(rows, head_points(lens, layer), hooks)
    mine = Head.of(lens, acts, layer, head)
    at, keys = rows.columns_of(query), rows.columns_of(key)
    position = rows.positions[0]
    seen = (position[None, :] >= 0) & (position[None, :] <= position[at, None])
    parts = mine.parts(at)
    content = parts[..., -1] if lens.cfg.d_rotary < lens.cfg.d_head else torch.zeros_like(parts[..., 0])
    rotary = parts.sum(-1) - content
    alone = position_alone(lens, mine, position[at], position)
    w, apart = frequencies_of(lens), position[at, None] - position[keys]
    size = mine.q_before[at, None].abs() * mine.k_before[keys].abs() * lens.cfg.d_head**-0.5
    phase = mine.q_before[at, None].angle() - mine.k_before[keys].angle()
    sheets = {
        "part": (parts[:, keys], "part of the score"), "score": (parts[:, keys].sum(-1), "score"),
        "angle": (apart.unsqueeze(-1) * w, "radians"), "amplitude": (size, "score"),
        "phase": (torch.remainder(phase + math.pi, 2 * math.pi) - math.pi, "radians"),
        "pattern": (softened(parts.sum(-1), seen)[:, keys], "attention"),
        "rotary_alone": (softened(rotary, seen)[:, keys], "attention"),
        "content_alone": (softened(content, seen)[:, keys], "attention"),
        "position_alone": (softened(alone, seen)[:, keys], "attention"),
    }  # fmt: skip
    names = rows.pos_labels()
    labels = {"query": [names[i] for i in at.tolist()], "key": [names[i] for i in keys.tolist()]}
    about = rows.about(
        metric="scores of one head", direction=f"layer {layer}, head {head} (kv {head // lens.cfg.n_groups})",
        positions="absolute",
    )  # fmt: skip
    made = {}
    for name, (x, unit) in sheets.items():
        last = {3: "part" if name == "part" else "pair"}.get(x.ndim)
        axes = ("query", "key", *([last] if last else []))
        named = {**labels, **({last: part_labels(lens)[: x.shape[-1]]} if last else {})}
        hidden = ~seen[:, keys]
        x = x.masked_fill(hidden if x.ndim == 2 else hidden.unsqueeze(-1), torch.nan)
        made[name] = Labelled(numbers(x), axes, named, {**about, "metric": f"{name}, {unit}"})
    return ScoreParts(about, **made)


def one(lens: Lens, prompt: Prompt) -> Rows:
    rows = Rows.of(lens, prompt)
    if rows.batch != 1:
        raise ValueError(f"one prompt at a time here, not {rows.batch}")
    return rows


def head_points(lens: Lens, layer: int | None = None) -> list[str]:
    rest = ["attn.q_pass"] if lens.cfg.d_rotary < lens.cfg.d_head else []
    local = ["attn.q", "attn.k", "attn.q_rot", *rest, "kv.k"]
    return local if layer is None else [f"blocks.{layer}.{name}" for name in local]


def softened(scores: Float[Tensor, "query key"], seen: Bool[Tensor, "query key"]) -> Float[Tensor, "query key"]:
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def position_alone(lens: Lens, head: Head, at: Tensor, keys: Tensor) -> Float[Tensor, "query key"]:
    """The score of the rotated channels of the mean query and key at every distance."""
    waves = head.q_before.mean(0) * head.k_before.mean(0).conj() * lens.cfg.d_head**-0.5
    by_distance = waved(waves, torch.arange(int(keys.max()) + 1, device=keys.device), frequencies_of(lens))
    return by_distance[(at[:, None] - keys).clamp(min=0)]


def waved(waves: Tensor, distance: Tensor, frequency: Float[Tensor, "pair"]) -> Float[Tensor, "*rest distance"]:
    """Re sum over pairs of wave · e^(i · distance · frequency)."""
    angle = distance.to(frequency.dtype)[:, None] * frequency
    real = einsum(waves.real, angle.cos(), "... pair, distance pair -> ... distance")
    return real - einsum(waves.imag, angle.sin(), "... pair, distance pair -> ... distance")


def distance_profile(
    lens: Lens, prompt: Prompt, *, distances: int | None = None, hooks: Hooks | None = None
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
    waves = as_complex(q[..., :rotated]) * as_complex(k[..., :rotated]).conj() * scale
    content = (q[..., rotated:] * k[..., rotated:]).sum(-1) * scale
    many = torch.arange(int(rows.lengths.max()) if distances is None else distances, device=lens.device)
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
    lens: Lens, *, rows: int = 4, length: int = 20, seed: int = 0, words: Sequence[int] | Sequence[str] | None = None
) -> PairUse:
    """Which pairs of channels make heads look at the previous token, the same word, or what followed it.

    On the rows of `head_scores`: random words, said twice. In units of scores. Raises ValueError as that does.
    """
    ids, prefix = random_words(lens, rows, length, seed, words), lens.tokenizer.prefix if lens.tokenizer else ()
    tokens = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(rows, -1), ids.repeat(1, 2)], 1)
    batch = Rows.of(lens, tokens)
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
