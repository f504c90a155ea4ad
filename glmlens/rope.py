"""How fast each pair of channels turns: as Su et al. have it, or by a rule that reaches past the trained context.

A rule is a function from a config and theta^(2 pair / rotated), the tokens that a pair takes for a radian, to radians
per token and a factor on cos and sin. Their bits are those of transformers, which keeps the factor at 1 but for YaRN:
it is in queries and keys both, so scores of rotated channels have its square.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from glmlens.config import GLMConfig

RopeFrequencies = tuple[Float[Tensor, "pair"], float]


def rope_frequencies(cfg: GLMConfig, dtype: torch.dtype, device: torch.device) -> RopeFrequencies:
    """The frequencies of a model's pairs, in radians per token, and what its cos and sin are multiplied by."""
    period = cfg.rope_theta ** (torch.arange(0, cfg.d_rotary, 2, dtype=dtype, device=device) / cfg.d_rotary)
    return ROPE_RULES[cfg.rope_scaling.kind](cfg, period)


def default_frequencies(cfg: GLMConfig, period: Float[Tensor, "pair"]) -> RopeFrequencies:
    """theta^(-2 pair / rotated): Su et al. 2021, arXiv 2104.09864, section 3.2.2."""
    return 1.0 / period, 1.0


def linear_frequencies(cfg: GLMConfig, period: Float[Tensor, "pair"]) -> RopeFrequencies:
    """Every pair is slower by the factor: Chen et al. 2023, arXiv 2306.15595, section 2.3."""
    return 1.0 / period / cfg.rope_scaling.factor, 1.0


def llama3_frequencies(cfg: GLMConfig, period: Float[Tensor, "pair"]) -> RopeFrequencies:
    """A pair that turns more than `fast` times in the trained context stays, one of less than `slow` is slower.

    What lies between is mixed in proportion to its turns: Peng et al. 2023, arXiv 2309.00071, section 3.2, which
    Llama 3.1 takes with a factor of 8, slow 1 and fast 4 (its `apply_scaling`).
    """
    s, frequency = cfg.rope_scaling, 1.0 / period
    turns = s.context / (2 * math.pi / frequency)
    stays = ((turns - s.slow) / (s.fast - s.slow)).clamp(0, 1)
    return (1 - stays) * frequency / s.factor + stays * frequency, 1.0


def yarn_frequencies(cfg: GLMConfig, period: Float[Tensor, "pair"]) -> RopeFrequencies:
    """The same pairs stay, what lies between is mixed in proportion to its number, and cos and sin grow.

    Peng et al. 2023, arXiv 2309.00071, section 3.2 for the pairs, 3.4 for sqrt(1/t) = 0.1 ln(factor) + 1. Published
    models mix as the code of that paper does, along the number of the pair and from a whole one to a whole one.
    """
    s = cfg.rope_scaling
    first, last = (
        cfg.d_rotary * math.log(s.context / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
        for turns in (s.fast, s.slow)
    )
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, cfg.d_rotary - 1)
    last = last + 0.001 if first == last else last
    pair = torch.arange(len(period), dtype=period.dtype, device=period.device)
    stays = 1 - ((pair - first) / (last - first)).clamp(0, 1)
    mixed = 1.0 / (s.factor * period) * (1 - stays) + 1.0 / period * stays
    return mixed, 0.1 * math.log(s.factor) + 1.0 if s.attention is None else s.attention


ROPE_RULES: dict[str, Callable[[GLMConfig, Float[Tensor, "pair"]], RopeFrequencies]] = {
    "default": default_frequencies, "linear": linear_frequencies, "llama3": llama3_frequencies, "yarn": yarn_frequencies
}  # fmt: skip
