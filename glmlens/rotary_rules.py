"""Rotary angles: how far each pair of channels turns per position, and the rules by which they turn otherwise."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.config import GLMConfig, Scaling
from glmlens.model import Angles, apply_rotary
from glmlens.rope import ROPE_RULES, RopeFrequencies, rope_frequencies

RotaryRule = Callable[[Int[Tensor, "batch pos"], Float[Tensor, "pair"]], Angles]
"""From absolute positions and the model's frequencies to cos and sin [batch, pos, pair]."""
STRETCH_KINDS = ("theta", "linear", "ntk", "yarn")


def compute_pair_frequencies(cfg: GLMConfig, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "pair"]:
    """Radians per token of every pair; see `rope` for the formulas."""
    return rope_frequencies(cfg, dtype, device)[0]


def get_rope_attention_factor(cfg: GLMConfig) -> float:
    """What cos and sin are multiplied by in this model: 1 but for YaRN."""
    return rope_frequencies(cfg, torch.float32, torch.device("cpu"))[1]


def compute_angles(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
    """As published, but for YaRN's factor: a pair turns by position · frequency; padding, at -1, as position 0."""
    angle = positions.clamp(min=0).to(frequency.dtype).unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def freeze_positions(position: int = 0) -> RotaryRule:
    """Every token turns as one at this position: what is compared no longer knows how far apart it is."""
    return lambda positions, frequency: compute_angles(torch.full_like(positions, position), frequency)


def zero_rotary(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
    """The channels become zero."""
    cos, _ = compute_angles(positions, frequency)
    return torch.zeros_like(cos), torch.zeros_like(cos)


def shift_positions(by: int | Mapping[int, int]) -> RotaryRule:
    """Tokens turn as if they stood so many positions later: all of them, or those at the positions given."""

    def rule(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
        to = positions.clamp(min=0) + (by if isinstance(by, int) else 0)
        for position, delta in {} if isinstance(by, int) else by.items():
            to = torch.where(positions == position, position + delta, to)
        angle = to.to(frequency.dtype).unsqueeze(-1) * frequency  # a position below 0 turns backwards
        return angle.cos(), angle.sin()

    return rule


def stretch_context(cfg: GLMConfig, kind: str, factor: float | int, context: int | None = None) -> RotaryRule:
    """Tokens turn by a rule that extends contexts; see `stretched_turning`."""
    check_stretch(kind, factor)

    def rule(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
        slower, larger = stretch_frequencies(cfg, kind, factor, frequency, context)
        cos, sin = compute_angles(positions, slower)
        return cos * larger, sin * larger

    return rule


def stretch_frequencies(
    cfg: GLMConfig, kind: str, factor: float | int, frequency: Float[Tensor, "pair"], context: int | None = None
) -> RopeFrequencies:
    """Frequencies, and a factor on cos and sin, by which a context of `context` tokens becomes `factor` times longer.

    `context` is the model's unless given. "theta": the base is `factor` times the model's. "ntk": the base grows by
    factor^(rotated / (rotated - 2)), so that the fastest pair stays and the slowest is divided (bloc97 2023; arXiv
    2309.00071, section 3.1). "linear" and "yarn" are those of `rope`, as if config.json said so.
    """
    check_stretch(kind, factor)
    exponent = -torch.arange(0, cfg.d_rotary, 2, dtype=frequency.dtype, device=frequency.device) / cfg.d_rotary
    if kind == "theta":
        return frequency * factor**exponent, 1.0
    if kind == "ntk":
        if cfg.d_rotary < 4:
            raise ValueError("'ntk' needs at least two pairs, of which one stays and one is divided: take 'linear'")
        return frequency * factor ** (exponent * cfg.d_rotary / (cfg.d_rotary - 2)), 1.0
    scaling = Scaling(kind, float(factor), context or cfg.n_ctx)
    return ROPE_RULES[kind](replace(cfg, rope_scaling=scaling), 1.0 / frequency)


def check_stretch(kind: str, factor: float | int) -> None:
    if kind not in STRETCH_KINDS:
        raise ValueError(f"a context is stretched by one of {', '.join(map(repr, STRETCH_KINDS))}, not {kind!r}")
    if not factor > 0 or (kind == "yarn" and factor < 1):
        raise ValueError(f"factor is {factor}; expected above 0, and for 'yarn' at least 1")


def rerotate_channels(
    x: Float[Tensor, "batch pos head rotated"], before: Angles, after: Angles
) -> Float[Tensor, "batch pos head rotated"]:
    """Channels that had turned by `before` as they would be had they turned by `after`; alike pairs stay bit for bit.

    Turning is multiplying by a complex number: x / before · after.
    """
    (c, s), (cos, sin) = before, after
    new = apply_rotary(x.to(cos.dtype), c * cos + s * sin, c * sin - s * cos).to(x.dtype)
    alike = ((c == cos) & (s == sin)).repeat_interleave(2, -1).unsqueeze(2)
    return torch.where(alike, x, new)
