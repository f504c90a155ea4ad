"""Rotary frequencies of every pair of channels: those of Su et al., or scaled beyond the trained context.

A scaling rule maps inverse frequencies (tokens per radian), theta^(2 pair / rotated), to frequencies (radians per
token) and a factor on cos and sin. The numbers equal those of transformers bit for bit. The factor is 1 except for
YaRN; since queries and keys both have it, scores of rotated channels are multiplied by its square.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from glmlens.config import GLMConfig

RopeFrequencies = tuple[Float[Tensor, "pair"], float]


def rope_frequencies(cfg: GLMConfig, dtype: torch.dtype, device: torch.device) -> RopeFrequencies:
    """Return the frequency of every pair in radians per token, [pair], and the factor on cos and sin."""
    period = cfg.rope_theta ** (torch.arange(0, cfg.d_rotary, 2, dtype=dtype, device=device) / cfg.d_rotary)
    return ROPE_RULES[cfg.rope_scaling.kind](cfg, period)


def default_frequencies(cfg: GLMConfig, period: Float[Tensor, "pair"]) -> RopeFrequencies:
    """Return theta^(-2 pair / rotated): Su et al. 2021, arXiv 2104.09864, section 3.2.2."""
    return 1.0 / period, 1.0


def linear_frequencies(cfg: GLMConfig, period: Float[Tensor, "pair"]) -> RopeFrequencies:
    """Divide the frequency of every pair by `factor`: Chen et al. 2023, arXiv 2306.15595, section 2.3."""
    return 1.0 / period / cfg.rope_scaling.factor, 1.0


def llama3_frequencies(cfg: GLMConfig, period: Float[Tensor, "pair"]) -> RopeFrequencies:
    """Keep frequencies above `fast` rotations in the trained context, and divide those below `slow` by `factor`.

    Frequencies between are interpolated by their number of rotations: Peng et al. 2023, arXiv 2309.00071, section 3.2,
    which Llama 3.1 uses with factor 8, slow 1 and fast 4 (its `apply_scaling`).
    """
    s = cfg.rope_scaling
    frequency = 1.0 / period
    rotations = s.context / (2 * math.pi / frequency)
    # 1 where the frequency is kept, 0 where it is divided.
    kept = ((rotations - s.slow) / (s.fast - s.slow)).clamp(0, 1)
    return (1 - kept) * frequency / s.factor + kept * frequency, 1.0


def yarn_frequencies(cfg: GLMConfig, period: Float[Tensor, "pair"]) -> RopeFrequencies:
    """Keep and divide frequencies as `llama3` does, interpolate by the number of the pair, and scale cos and sin.

    Peng et al. 2023, arXiv 2309.00071, section 3.2 for the pairs, 3.4 for the factor sqrt(1/t) = 0.1 ln(factor) + 1.
    The interpolation is that of the paper's code and of published models: it runs over pairs, between whole numbers.
    """
    s = cfg.rope_scaling
    # The pair that makes so many rotations in the trained context: the formula of its frequency, solved for the pair.
    first, last = (
        cfg.d_rotary * math.log(s.context / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
        for rotations in (s.fast, s.slow)
    )
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, cfg.d_rotary - 1)
    last = last + 0.001 if first == last else last  # as in the paper's code: no division by zero
    pair = torch.arange(len(period), dtype=period.dtype, device=period.device)
    # 1 where the frequency is kept, 0 where it is divided.
    kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
    mixed = 1.0 / (s.factor * period) * (1 - kept) + 1.0 / period * kept
    return mixed, 0.1 * math.log(s.factor) + 1.0 if s.attention is None else s.attention


ROPE_RULES: dict[str, Callable[[GLMConfig, Float[Tensor, "pair"]], RopeFrequencies]] = {
    "default": default_frequencies, "linear": linear_frequencies, "llama3": llama3_frequencies, "yarn": yarn_frequencies
}  # fmt: skip
