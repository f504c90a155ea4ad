"""Rotary angles: how far each pair of channels turns per position, and the rules by which they turn otherwise."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.config import GLMConfig
from glmlens.model import Angles, turn

Rule = Callable[[Int[Tensor, "batch pos"], Float[Tensor, "pair"]], Angles]
"""From absolute positions and the model's frequencies to cos and sin [batch, pos, pair]."""
STRETCHES = ("theta", "linear", "ntk", "yarn")


def frequencies(cfg: GLMConfig, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "pair"]:
    """theta^(-2 pair / rotated): radians per token (Su et al. 2021, arXiv 2104.09864, section 3.2.2)."""
    return 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.d_rotary, 2, dtype=dtype, device=device) / cfg.d_rotary)


def turned_by(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
    """The published rule: every pair turns by position · frequency; padding, at -1, as position 0."""
    angle = positions.clamp(min=0).to(frequency.dtype).unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def frozen(at: int = 0) -> Rule:
    """Every token turns as one at this position: what is compared no longer knows how far apart it is."""
    return lambda positions, frequency: turned_by(torch.full_like(positions, at), frequency)


def silent(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
    """The channels become zero."""
    cos, _ = turned_by(positions, frequency)
    return torch.zeros_like(cos), torch.zeros_like(cos)


def moved(by: int | Mapping[int, int]) -> Rule:
    """Tokens turn as if they stood so many positions later: all of them, or those at the positions given."""

    def rule(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
        to = positions.clamp(min=0) + (by if isinstance(by, int) else 0)
        for position, delta in {} if isinstance(by, int) else by.items():
            to = torch.where(positions == position, position + delta, to)
        angle = to.to(frequency.dtype).unsqueeze(-1) * frequency  # a position below 0 turns backwards
        return angle.cos(), angle.sin()

    return rule


def stretched(cfg: GLMConfig, kind: str, factor: float | int, context: int | None = None) -> Rule:
    """Tokens turn by the frequencies of a rule that extends contexts; see `stretched_frequencies`.

    With "yarn" cos and sin are also larger by sqrt(1/t) = 0.1 ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071,
    section 3.4), which makes the scores of the rotated channels sharper by its square.
    """
    longer = 0.1 * math.log(factor) + 1 if kind == "yarn" else 1.0
    check_stretch(kind, factor)

    def rule(positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, "pair"]) -> Angles:
        cos, sin = turned_by(positions, stretched_frequencies(cfg, kind, factor, frequency, context))
        return cos * longer, sin * longer

    return rule


def stretched_frequencies(
    cfg: GLMConfig, kind: str, factor: float | int, frequency: Float[Tensor, "pair"], context: int | None = None
) -> Float[Tensor, "pair"]:
    """The frequencies with which a context of `context` tokens (default: the model's) becomes `factor` times longer.

    "theta": the base is `factor` times the model's. "linear": every frequency is divided (Chen et al. 2023, arXiv
    2306.15595). "ntk": the base grows by factor^(rotated / (rotated - 2)), so that the fastest pair stays and the
    slowest is divided (bloc97 2023; arXiv 2309.00071, section 3.1). "yarn": a pair that turns more than 32 times in
    the context stays, one that turns less than once is divided, and what lies between is mixed in proportion to its
    number of turns (arXiv 2309.00071, section 3.2, with alpha 1 and beta 32).
    """
    check_stretch(kind, factor)
    exponent = -torch.arange(0, cfg.d_rotary, 2, dtype=frequency.dtype, device=frequency.device) / cfg.d_rotary
    if kind == "theta":
        return frequency * factor**exponent
    if kind == "linear":
        return frequency / factor
    if kind == "ntk":
        if cfg.d_rotary < 4:
            raise ValueError("'ntk' needs at least two pairs, of which one stays and one is divided: take 'linear'")
        return frequency * factor ** (exponent * cfg.d_rotary / (cfg.d_rotary - 2))
    turns = (context or cfg.n_ctx) * frequency / (2 * math.pi)
    stays = ((turns - 1) / (32 - 1)).clamp(0, 1)
    return stays * frequency + (1 - stays) * frequency / factor


def check_stretch(kind: str, factor: float | int) -> None:
    if kind not in STRETCHES:
        raise ValueError(f"a context is stretched by one of {', '.join(map(repr, STRETCHES))}, not {kind!r}")
    if not factor > 0 or (kind == "yarn" and factor < 1):
        raise ValueError(f"factor is {factor}; expected above 0, and for 'yarn' at least 1")


def turned_on(
    x: Float[Tensor, "batch pos head rotated"], before: Angles, after: Angles
) -> Float[Tensor, "batch pos head rotated"]:
    """Channels that had turned by `before` as they would be had they turned by `after`; alike pairs stay bit for bit.

    Turning is multiplying by a complex number: x / before · after.
    """
    (c, s), (cos, sin) = before, after
    new = turn(x.to(cos.dtype), c * cos + s * sin, c * sin - s * cos).to(x.dtype)
    alike = ((c == cos) & (s == sin)).repeat_interleave(2, -1).unsqueeze(2)
    return torch.where(alike, x, new)
