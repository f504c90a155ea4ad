"""Rotary angles of every position and pair, and rules that replace them: frozen, zeroed, shifted or stretched."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.config import GLMConfig, Scaling
from glmlens.model import Angles, apply_rotary
from glmlens.rotary_frequencies import ROPE_RULES, RopeFrequencies, rope_frequencies

RotaryRule = Callable[[Int[Tensor, "batch pos"], Float[Tensor, "pair"]], Angles]
"""A rule maps absolute positions and the model's frequencies (radians per token) to cos and sin [batch, pos, pair]."""
STRETCH_KINDS = ("theta", "linear", "ntk", "yarn")


def compute_pair_frequencies(cfg: GLMConfig, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "pair"]:
    """Return the frequency of every pair in radians per token, [pair]; see `rope` for the formulas."""
    return rope_frequencies(cfg, dtype, device)[0]


def get_rope_attention_factor(cfg: GLMConfig) -> float:
    """Return the factor on cos and sin in this model: 1 except for YaRN."""
    return rope_frequencies(cfg, torch.float32, torch.device("cpu"))[1]


def compute_angles(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
    """Return cos and sin of position · frequency, without YaRN's factor; padding, at -1, counts as position 0."""
    angle = positions.clamp(min=0).to(frequency.dtype).unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def freeze_positions(position: int = 0) -> RotaryRule:
    """Return a rule that rotates every token as if at this position, so that scores do not depend on distance."""
    return lambda positions, frequency: compute_angles(torch.full_like(positions, position), frequency)


def zero_rotary(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
    """Return cos and sin of zero, so that the rotated channels are zero."""
    cos, _ = compute_angles(positions, frequency)
    return torch.zeros_like(cos), torch.zeros_like(cos)


def shift_positions(by: int | Mapping[int, int]) -> RotaryRule:
    """Return a rule that rotates tokens as if `by` positions later: all, or by a mapping from position to shift."""

    def rule(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
        to = positions.clamp(min=0) + (by if isinstance(by, int) else 0)
        for position, delta in {} if isinstance(by, int) else by.items():
            to = torch.where(positions == position, position + delta, to)
        angle = to.to(frequency.dtype).unsqueeze(-1) * frequency  # a position below 0 rotates backwards
        return angle.cos(), angle.sin()

    return rule


def stretch_context(cfg: GLMConfig, kind: str, factor: float | int, context: int | None = None) -> RotaryRule:
    """Return a rule that extends the context by `factor`; see `stretch_frequencies` for `kind` and `context`."""
    check_stretch(kind, factor)

    def rule(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
        stretched, scale = stretch_frequencies(cfg, kind, factor, frequency, context)
        cos, sin = compute_angles(positions, stretched)
        return cos * scale, sin * scale

    return rule


def stretch_frequencies(
    cfg: GLMConfig, kind: str, factor: float | int, frequency: Float[Tensor, "pair"], context: int | None = None
) -> RopeFrequencies:
    """Return frequencies and a factor on cos and sin that make a context of `context` tokens `factor` times longer.

    `context` is the model's by default. "theta": theta is multiplied by `factor`. "ntk": theta is multiplied by
    factor^(rotated / (rotated - 2)), which keeps the highest frequency and divides the lowest by `factor` (bloc97 2023;
    arXiv 2309.00071, section 3.1). "linear" and "yarn" are the rules of `rope`. Raises ValueError for another kind.
    """
    check_stretch(kind, factor)
    # A frequency is theta^exponent: multiplying theta by x multiplies it by x^exponent.
    exponent = -torch.arange(0, cfg.d_rotary, 2, dtype=frequency.dtype, device=frequency.device) / cfg.d_rotary
    if kind == "theta":
        return frequency * factor**exponent, 1.0
    if kind == "ntk":
        if cfg.d_rotary < 4:
            raise ValueError(
                "'ntk' needs at least two pairs, as it keeps the first and divides the last: take 'linear'"
            )
        return frequency * factor ** (exponent * cfg.d_rotary / (cfg.d_rotary - 2)), 1.0
    scaling = Scaling(kind, float(factor), context or cfg.n_ctx)
    return ROPE_RULES[kind](replace(cfg, rope_scaling=scaling), 1.0 / frequency)


def check_stretch(kind: str, factor: float | int) -> None:
    """Raise ValueError for an unknown kind, and for a factor that it cannot have."""
    if kind not in STRETCH_KINDS:
        raise ValueError(f"a context is stretched by one of {', '.join(map(repr, STRETCH_KINDS))}, not {kind!r}")
    if not factor > 0 or (kind == "yarn" and factor < 1):
        raise ValueError(f"factor is {factor}; expected above 0, and for 'yarn' at least 1")


def rerotate_channels(
    x: Float[Tensor, "batch pos head rotated"], before: Angles, after: Angles
) -> Float[Tensor, "batch pos head rotated"]:
    """Return channels that were rotated by `before` as if rotated by `after`; pairs of equal angles keep every bit.

    A rotation is the multiplication by a complex number, so this is x / before · after.
    """
    old_cos, old_sin = before
    cos, sin = after
    # cos and sin of the difference of the angles.
    cos_change = old_cos * cos + old_sin * sin
    sin_change = old_cos * sin - old_sin * cos
    new = apply_rotary(x.to(cos.dtype), cos_change, sin_change).to(x.dtype)
    # One flag per pair becomes one per channel [batch, pos, 1, rotated].
    unchanged = ((old_cos == cos) & (old_sin == sin)).repeat_interleave(2, -1).unsqueeze(2)
    return torch.where(unchanged, x, new)
