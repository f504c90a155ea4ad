"""Float dtypes for computations that must not round to half precision."""

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a float dtype below it, and any wider one (float64, complex) unchanged."""
    return torch.promote_types(dtype, torch.float32)


def upcast(x: Tensor) -> Tensor:
    """Return `x` in at least float32; a tensor of integers or booleans is returned unchanged."""
    return x.to(at_least_float32(x.dtype)) if x.is_floating_point() else x
