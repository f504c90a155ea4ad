"""Decompose attention scores into the parts of rotary pairs and of unrotated channels.

Before rotation, a pair of channels is a complex number: q of a query, k of a key. At position p it is rotated by the
angle p · w, where w is the pair's frequency. So a score is a sum of waves over distance and a constant (Su et al. 2021,
arXiv 2104.09864, sections 3.2 and 3.4.2):

    score · sqrt(d) = sum over pairs of  |q| |k| cos(arg q - arg k + w · distance)  +  q_pass · k_pass

YaRN scales queries and keys at rotation; |q| and |k| are then the scaled norms.
"""

import math
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from glmlens.analysis.chunked_runs import record_in_chunks
from glmlens.analysis.prompt_batch import PromptBatch, read_layer_and_head, to_numpy, upcast_to_float64
from glmlens.hooks import Hooks
from glmlens.integers import Integer, Integers
from glmlens.lens import Lens
from glmlens.results import Labelled, LabelledGroup
from glmlens.rotary_rules import compute_pair_frequencies, get_rope_attention_factor
from glmlens.text.prompts import Prompt


@dataclass(frozen=True, eq=False)
class ScoreParts(LabelledGroup):
    """The scores of one head by part [query, key, part]: one per rotary pair, and "content", the unrotated channels.

    `score` [query, key] is their sum. `angle` (pair frequency · distance), `amplitude` and `phase` [query, key, pair]
    are those of the pair's wave: its part is amplitude · cos(phase + angle). Of the patterns [query, key], `pattern`
    is the head's. `rotary_alone` and `content_alone` are the patterns from the rotated or the unrotated channels only.
    `position_alone` is the pattern from the rotated channels of the mean query and key, which depends on distance only.
    Keys that a query cannot see are nan.
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
    """Return the wavelength of every pair in tokens, 2 pi / frequency: the distance of one full rotation."""
    return 2 * math.pi / pair_frequencies_of(lens)


def pair_frequencies_of(lens: Lens) -> Float[Tensor, "pair"]:
    """Return the frequency of every rotary pair in radians per token, in float64 where the device has it."""
    dtype = torch.float32 if lens.device.type == "mps" else torch.float64
    return compute_pair_frequencies(lens.cfg, dtype, lens.device)


def rotary_score_scale(lens: Lens) -> float:
    """Return the factor from a product of rotated channels to a score: 1 / √d, and YaRN's factor for query and key."""
    return get_rope_attention_factor(lens.cfg) ** 2 * lens.cfg.d_head**-0.5


def label_score_parts(lens: Lens) -> list[str]:
    """Return the labels of the parts of a score: pairs with their wavelengths, then "content" if there is any."""
    pairs = [f"pair {i} ({format_wavelength(length)} tokens)" for i, length in enumerate(wavelengths(lens).tolist())]
    return [*pairs, "content"] if lens.cfg.d_rotary < lens.cfg.d_head else pairs


def format_wavelength(length: float) -> str:
    """Return a wavelength as text with three significant digits: 6.28, 1,990."""
    return f"{length:.3g}" if length < 1000 else f"{float(f'{length:.3g}'):,.0f}"


@dataclass(frozen=True)
class HeadVectors:
    """One head's queries and its keys in float64, after rotation and (`q_before`, `k_before`) before it."""

    q: Float[Tensor, "query d"]
    k: Float[Tensor, "key d"]
    q_before: Complex[Tensor, "query pair"]
    k_before: Complex[Tensor, "key pair"]
    rotated: int

    @staticmethod
    def from_recording(lens: Lens, acts: dict[str, Tensor], layer: int, head: int) -> "HeadVectors":
        """Return the vectors of a head from a recording of `head_vector_points` on one prompt."""
        kv = head // lens.cfg.n_groups
        rotated = lens.cfg.d_rotary
        block = f"blocks.{layer}."
        query_points = [block + name for name in ("attn.q_rot", "attn.q_pass") if block + name in acts]
        q_before = acts[block + "attn.q"][0, :, head, :rotated]
        k_before = acts[block + "attn.k"][0, :, kv, :rotated]
        return HeadVectors(
            q=torch.cat([upcast_to_float64(acts[name][0, :, head]) for name in query_points], -1),
            k=upcast_to_float64(acts[block + "kv.k"][0, :, kv]),
            q_before=to_complex_pairs(upcast_to_float64(q_before)),
            k_before=to_complex_pairs(upcast_to_float64(k_before)),
            rotated=rotated,
        )

    def split_scores_by_pair(
        self, query: Tensor, keys: Tensor | slice = slice(None)
    ) -> Float[Tensor, "query key part"]:
        """Return the parts of the scores: one per pair, then all unrotated channels."""
        return split_scores(self.q[query], self.k[keys], self.rotated)


def to_complex_pairs(x: Float[Tensor, "*rest rotated"]) -> Tensor:
    """Return neighbouring channels as complex numbers [..., pair]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def split_scores(
    q: Float[Tensor, "*batch query d"], k: Float[Tensor, "*batch key d"], rotated: int
) -> Float[Tensor, "*batch query key part"]:
    """Return the scores of all queries and keys by part: one per pair, then the unrotated channels if there are any."""
    (q_rot, q_pass), (k_rot, k_pass) = (x.tensor_split([rotated], -1) for x in (q, k))
    q_rot, k_rot = (x.unflatten(-1, (-1, 2)) for x in (q_rot, k_rot))  # [..., pair, two]
    pairs = einsum(q_rot, k_rot, "... query pair two, ... key pair two -> ... query key pair two").sum(-1)
    content = einsum(q_pass, k_pass, "... query d, ... key d -> ... query key").unsqueeze(-1)
    parts = torch.cat([pairs, content], -1) if q_pass.shape[-1] else pairs
    return parts * q.shape[-1] ** -0.5


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
    """Decompose the scores of one head into parts, at some absolute positions of queries and keys (default: all).

    Exact: the parts sum to `attn.scores`, in units of scores. A softmax is over all keys a query sees; the result has
    those asked for. A long prompt is run in chunks; give `query=` to keep the result small. Raises ValueError for
    several prompts, IndexError for a position, layer or head that is not there.
    """
    rows = PromptBatch.from_prompt(lens, prompt).require_single()
    layer, head = read_layer_and_head(lens, layer, head)
    acts = record_in_chunks(rows, head_vector_points(lens, layer), hooks)
    vectors = HeadVectors.from_recording(lens, acts, layer, head)
    queries, keys = rows.columns_of_single(query), rows.columns_of_single(key)
    positions = rows.positions[0]
    visible = (positions[None, :] >= 0) & (positions[None, :] <= positions[queries, None])
    parts = vectors.split_scores_by_pair(queries)
    content = parts[..., -1] if lens.cfg.d_rotary < lens.cfg.d_head else torch.zeros_like(parts[..., 0])
    rotary = parts.sum(-1) - content
    position_only = position_only_scores(lens, vectors, positions[queries], positions)
    distances = positions[queries, None] - positions[keys]
    amplitude = vectors.q_before[queries, None].abs() * vectors.k_before[keys].abs() * rotary_score_scale(lens)
    phase = vectors.q_before[queries, None].angle() - vectors.k_before[keys].angle()
    values_and_units = {
        "part": (parts[:, keys], "part of the score"),
        "score": (parts[:, keys].sum(-1), "score"),
        "angle": (distances.unsqueeze(-1) * pair_frequencies_of(lens), "radians"),
        "amplitude": (amplitude, "score"),
        "phase": (torch.remainder(phase + math.pi, 2 * math.pi) - math.pi, "radians"),  # to -pi .. pi
        "pattern": (masked_softmax(parts.sum(-1), visible)[:, keys], "attention"),
        "rotary_alone": (masked_softmax(rotary, visible)[:, keys], "attention"),
        "content_alone": (masked_softmax(content, visible)[:, keys], "attention"),
        "position_alone": (masked_softmax(position_only, visible)[:, keys], "attention"),
    }
    names = rows.position_labels()
    labels = {"query": [names[i] for i in queries.tolist()], "key": [names[i] for i in keys.tolist()]}
    about = rows.describe(
        metric="scores of one head", direction=f"layer {layer}, head {head} (kv {head // lens.cfg.n_groups})",
        positions="absolute",
    )  # fmt: skip
    chosen = tuple(axis for axis, numbers in (("query", query), ("key", key)) if numbers is not None)
    hidden = ~visible[:, keys]
    sheets = {}
    for name, (x, unit) in values_and_units.items():
        axes, sheet_labels = ("query", "key"), labels
        if x.ndim == 3:
            last = "part" if name == "part" else "pair"
            axes = ("query", "key", last)
            sheet_labels = {**labels, last: label_score_parts(lens)[: x.shape[-1]]}
        x = x.masked_fill(hidden if x.ndim == 2 else hidden.unsqueeze(-1), torch.nan)
        sheet_about = {**about, "metric": f"{name}, {unit}"}
        sheets[name] = Labelled(to_numpy(x), axes, sheet_labels, sheet_about, chosen=chosen)
    return ScoreParts(about, **sheets)


def head_vector_points(lens: Lens, layer: int | None = None) -> list[str]:
    """Return the points from which `HeadVectors` are made, of one layer or (local names) of all."""
    unrotated = ["attn.q_pass"] if lens.cfg.d_rotary < lens.cfg.d_head else []
    local = ["attn.q", "attn.k", "attn.q_rot", *unrotated, "kv.k"]
    return local if layer is None else [f"blocks.{layer}.{name}" for name in local]


def masked_softmax(
    scores: Float[Tensor, "query key"], visible: Bool[Tensor, "query key"]
) -> Float[Tensor, "query key"]:
    """Return the softmax over visible keys; hidden ones get 0."""
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def position_only_scores(
    lens: Lens, head: HeadVectors, query_positions: Tensor, key_positions: Tensor
) -> Float[Tensor, "query key"]:
    """Return the scores that the mean query and mean key would have in the rotated channels, at these positions."""
    waves = head.q_before.mean(0) * head.k_before.mean(0).conj() * rotary_score_scale(lens)
    distances = torch.arange(int(key_positions.max()) + 1, device=key_positions.device)
    by_distance = sum_waves(waves, distances, pair_frequencies_of(lens))
    # Negative distances, to later keys, are masked by the caller: any index will do.
    return by_distance[(query_positions[:, None] - key_positions).clamp(min=0)]


def sum_waves(waves: Tensor, distance: Tensor, frequency: Float[Tensor, "pair"]) -> Float[Tensor, "*rest distance"]:
    """Return the real part of the sum over pairs of wave · e^(i · distance · frequency), at every distance."""
    angle = distance.to(frequency.dtype)[:, None] * frequency
    real = einsum(waves.real, angle.cos(), "... pair, distance pair -> ... distance")
    return real - einsum(waves.imag, angle.sin(), "... pair, distance pair -> ... distance")
