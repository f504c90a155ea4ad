"""Lens: a GLM with its tokenizer, to run, record, edit and generate with."""

from glmlens.lens.forward import PointNames
from glmlens.lens.generation import GenerationResult
from glmlens.lens.lens import BUNDLED_MODEL, Lens, load
from glmlens.lens.sampling import GenerationConfig

__all__ = ["BUNDLED_MODEL", "GenerationConfig", "GenerationResult", "Lens", "PointNames", "load"]
