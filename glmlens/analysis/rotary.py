"""Scores taken apart: what each pair of rotated channels adds to where a head looks, and what the others add.

Before it turns, a pair of channels of a query is a complex number q, and of a key k. A token at position p turns them
by p · w, where w is the pair's frequency. So a score is a sum of waves over distance and a constant (Su et al. 2021,
arXiv 2104.09864, sections 3.2 and 3.4.2):

    score · sqrt(d) = sum over pairs of  |q| |k| cos(arg q - arg k + w · distance)  +  q_pass · k_pass

Where YaRN lengthens queries and keys as they turn, |q| and |k| are what they are then.
"""

import math
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from glmlens.analysis.batch import PromptBatch, read_layer_and_head, to_numpy, upcast_to_float64
from glmlens.analysis.chunks import record_in_chunks
from glmlens.hooks import Hooks
from glmlens.integers import Integer, Integers
from glmlens.lens import Lens
from glmlens.results import Labelled, LabelledGroup
from glmlens.rotary_rules import compute_pair_frequencies, get_rope_attention_factor
from glmlens.text.prompts import Prompt


@dataclass(frozen=True, eq=False)
class ScoreParts(LabelledGroup):
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


def wavelengths(lens: Lens) -> Float[Tensor, "pair"]:
    """How many tokens apart two are when a pair has turned once between them: 2 pi / frequency."""
    return 2 * math.pi / pair_frequencies_of(lens)


def pair_frequencies_of(lens: Lens) -> Float[Tensor, "pair"]:
    dtype = torch.float32 if lens.device.type == "mps" else torch.float64
    return compute_pair_frequencies(lens.cfg, dtype, lens.device)


def rotary_score_scale(lens: Lens) -> float:
    """What a product of rotated channels is multiplied by on its way to a score."""
    return get_rope_attention_factor(lens.cfg) ** 2 * lens.cfg.d_head**-0.5


def label_score_parts(lens: Lens) -> list[str]:
    pairs = [f"pair {i} ({format_wavelength(length)} tokens)" for i, length in enumerate(wavelengths(lens).tolist())]
    return [*pairs, "content"] if lens.cfg.d_rotary < lens.cfg.d_head else pairs


def format_wavelength(length: float) -> str:
    """A wavelength for people, with three digits that count: 6.28, 1,990."""
    return f"{length:.3g}" if length < 1000 else f"{float(f'{length:.3g}'):,.0f}"


@dataclass(frozen=True)
class HeadVectors:
    """One head's queries and the keys that it compares them with, in float64; `before` and after they turn."""

    q: Float[Tensor, "query d"]
    k: Float[Tensor, "key d"]
    q_before: Complex[Tensor, "query pair"]
    k_before: Complex[Tensor, "key pair"]
    rotated: int

    @staticmethod
    def from_recording(lens: Lens, acts: dict[str, Tensor], layer: int, head: int) -> "HeadVectors":
        kv, rotated = head // lens.cfg.n_groups, lens.cfg.d_rotary
        at = f"blocks.{layer}."
        q = [
            upcast_to_float64(acts[at + name][0, :, head])
            for name in ("attn.q_rot", "attn.q_pass")
            if at + name in acts
        ]
        q_before, k_before = acts[at + "attn.q"][0, :, head, :rotated], acts[at + "attn.k"][0, :, kv, :rotated]
        return HeadVectors(
            torch.cat(q, -1),
            upcast_to_float64(acts[at + "kv.k"][0, :, kv]),
            to_complex_pairs(upcast_to_float64(q_before)),
            to_complex_pairs(upcast_to_float64(k_before)),
            rotated,
        )

    def split_scores_by_pair(
        self, query: Tensor, keys: Tensor | slice = slice(None)
    ) -> Float[Tensor, "query key part"]:
        """What each pair, and then all channels that do not turn, add to the scores."""
        return split_scores(self.q[query], self.k[keys], self.rotated)


def to_complex_pairs(x: Float[Tensor, "*rest rotated"]) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def split_scores(
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
    layer: Integer,
    head: Integer,
    *,
    query: Integers = None,
    key: Integers = None,
    hooks: Hooks | None = None,
) -> ScoreParts:
    """Take the scores of one head apart, at some absolute positions of queries and keys (default: all).

    Exact: the parts sum to `attn.scores`, in units of scores. The patterns are over all keys, of which those asked for
    are shown. A long prompt is run in pieces; give `query=` to keep what is made of it small. Raises ValueError for
    several prompts, IndexError for a position that is not there.
    """
    rows = to_single_prompt(lens, prompt)
    layer, head = read_layer_and_head(lens, layer, head)
    acts = record_in_chunks(rows, head_vector_points(lens, layer), hooks)
    mine = HeadVectors.from_recording(lens, acts, layer, head)
    at, keys = rows.columns_of_single(query), rows.columns_of_single(key)
    position = rows.positions[0]
    seen = (position[None, :] >= 0) & (position[None, :] <= position[at, None])
    parts = mine.split_scores_by_pair(at)
    content = parts[..., -1] if lens.cfg.d_rotary < lens.cfg.d_head else torch.zeros_like(parts[..., 0])
    rotary = parts.sum(-1) - content
    alone = position_only_scores(lens, mine, position[at], position)
    w, apart = pair_frequencies_of(lens), position[at, None] - position[keys]
    size = mine.q_before[at, None].abs() * mine.k_before[keys].abs() * rotary_score_scale(lens)
    phase = mine.q_before[at, None].angle() - mine.k_before[keys].angle()
    sheets = {
        "part": (parts[:, keys], "part of the score"), "score": (parts[:, keys].sum(-1), "score"),
        "angle": (apart.unsqueeze(-1) * w, "radians"), "amplitude": (size, "score"),
        "phase": (torch.remainder(phase + math.pi, 2 * math.pi) - math.pi, "radians"),
        "pattern": (masked_softmax(parts.sum(-1), seen)[:, keys], "attention"),
        "rotary_alone": (masked_softmax(rotary, seen)[:, keys], "attention"),
        "content_alone": (masked_softmax(content, seen)[:, keys], "attention"),
        "position_alone": (masked_softmax(alone, seen)[:, keys], "attention"),
    }  # fmt: skip
    names = rows.position_labels()
    labels = {"query": [names[i] for i in at.tolist()], "key": [names[i] for i in keys.tolist()]}
    about = rows.describe(
        metric="scores of one head", direction=f"layer {layer}, head {head} (kv {head // lens.cfg.n_groups})",
        positions="absolute",
    )  # fmt: skip
    made, some = {}, tuple(axis for axis, asked in (("query", query), ("key", key)) if asked is not None)
    for name, (x, unit) in sheets.items():
        last = {3: "part" if name == "part" else "pair"}.get(x.ndim)
        axes = ("query", "key", *([last] if last else []))
        named = {**labels, **({last: label_score_parts(lens)[: x.shape[-1]]} if last else {})}
        hidden = ~seen[:, keys]
        x = x.masked_fill(hidden if x.ndim == 2 else hidden.unsqueeze(-1), torch.nan)
        made[name] = Labelled(to_numpy(x), axes, named, {**about, "metric": f"{name}, {unit}"}, chosen=some)
    return ScoreParts(about, **made)


def to_single_prompt(lens: Lens, prompt: Prompt) -> PromptBatch:
    rows = PromptBatch.from_prompt(lens, prompt)
    if rows.batch != 1:
        raise ValueError(f"one prompt at a time here, not {rows.batch}")
    return rows


def head_vector_points(lens: Lens, layer: int | None = None) -> list[str]:
    rest = ["attn.q_pass"] if lens.cfg.d_rotary < lens.cfg.d_head else []
    local = ["attn.q", "attn.k", "attn.q_rot", *rest, "kv.k"]
    return local if layer is None else [f"blocks.{layer}.{name}" for name in local]


def masked_softmax(
    scores: Float[Tensor, "query key"], visible: Bool[Tensor, "query key"]
) -> Float[Tensor, "query key"]:
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def position_only_scores(
    lens: Lens, head: HeadVectors, query_positions: Tensor, key_positions: Tensor
) -> Float[Tensor, "query key"]:
    """The score of the rotated channels of the mean query and key at every distance."""
    waves = head.q_before.mean(0) * head.k_before.mean(0).conj() * rotary_score_scale(lens)
    by_distance = sum_waves(
        waves, torch.arange(int(key_positions.max()) + 1, device=key_positions.device), pair_frequencies_of(lens)
    )
    return by_distance[(query_positions[:, None] - key_positions).clamp(min=0)]


def sum_waves(waves: Tensor, distance: Tensor, frequency: Float[Tensor, "pair"]) -> Float[Tensor, "*rest distance"]:
    """Re sum over pairs of wave · e^(i · distance · frequency)."""
    angle = distance.to(frequency.dtype)[:, None] * frequency
    real = einsum(waves.real, angle.cos(), "... pair, distance pair -> ... distance")
    return real - einsum(waves.imag, angle.sin(), "... pair, distance pair -> ... distance")
