"""Lens: a GLM, its tokenizer, and what a notebook does with them."""

from glmlens.lens.forward import PointNames
from glmlens.lens.generation import GenerationResult
from glmlens.lens.lens import BUNDLED_MODEL, Lens, load

__all__ = ["BUNDLED_MODEL", "GenerationResult", "Lens", "PointNames", "load"]
