"""Steering vectors: directions fitted to pairs of prompts that differ in one thing, added while a model runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glmlens.deprecated import rename_method
from glmlens.file_io import TensorFile, expand_path, field_of, list_of, parse_json, write_tensors
from glmlens.hook_points import POINTS
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.patch.interventions import Intervention
from glmlens.patch.replacement_values import Add, TokenIds, number, to_float_tuple, to_token_ids
from glmlens.patch.sites import PatchError, PlaceSelection, Site, SiteResolver
from glmlens.text.prompts import Prompt

STEERING_FORMAT = "glmlens.Steering"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction per layer at a point of the residual stream: `vectors` [layer, model].

    They can be added, subtracted and scaled. `model` is the model's hash and `about` how they were fitted.
    """

    point: str
    layers: tuple[int, ...]
    vectors: Float[Tensor, "layer model"] = field(repr=False)
    model: str
    about: str = ""

    normalized = rename_method("normalized", "normalize")

    def interventions(self, scale: int | float = 1.0, pos: PlaceSelection = None) -> list[Intervention]:
        """Return interventions that add `scale` times each vector at absolute positions, by default at all."""
        return [
            Intervention(
                Site(self.point, layer=layer, pos=pos), Add(to_float_tuple(vector, "a steering vector"), scale)
            )
            for layer, vector in zip(self.layers, self.vectors, strict=True)
        ]

    def __getitem__(self, layer: Integer) -> Float[Tensor, "model"]:
        layer = read_integer(layer, "layer", error=PatchError)
        if layer not in self.layers:
            raise PatchError(f"no vector for layer {layer}; there are layers {', '.join(map(str, self.layers))}")
        return self.vectors[self.layers.index(layer)]

    def __add__(self, other: "SteeringVector | Any") -> "SteeringVector":
        if not isinstance(other, SteeringVector):
            raise PatchError(f"a steering vector and {other!r:.60} cannot be added: give another SteeringVector")
        if (self.point, self.layers, self.model) != (other.point, other.layers, other.model):
            raise PatchError(f"{self} and {other} are not of one model, point and layers")
        return replace(self, vectors=self.vectors + other.vectors, about=f"{self.about} + {other.about}")

    def __mul__(self, factor: int | float | Any) -> "SteeringVector":
        factor = number(factor, "the factor of a steering vector")
        return replace(self, vectors=self.vectors * factor, about=f"{factor} ({self.about})")

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self + -other

    def normalize(self) -> "SteeringVector":
        """Return the same directions, each of length 1."""
        return replace(self, vectors=torch.nn.functional.normalize(self.vectors, dim=-1))

    def save(self, path: str | Path) -> None:
        """Write the vectors to one safetensors file; on an error, no file is left half written."""
        about = {"point": self.point, "layers": list(self.layers), "model": self.model, "about": self.about}
        write_tensors(
            path, {"vectors": self.vectors}, {"format": STEERING_FORMAT, "about": json.dumps(about)}, PatchError
        )

    @staticmethod
    def load(path: str | Path, lens: Lens, *, other_model: bool = False) -> "SteeringVector":
        """Read the vectors that `save` wrote; raise PatchError for those of another model, unless `other_model`.

        Raise FileNotFoundError, and PatchError for a file that holds no such vectors.
        """
        where = str(path)
        file = TensorFile(expand_path(path, PatchError), PatchError)
        file.expect_format(STEERING_FORMAT, "holds no steering vectors")
        data = parse_json(file.metadata.get("about", ""), where, error=PatchError)
        point, model, about = (field_of(data, name, str, where, PatchError) for name in ("point", "model", "about"))
        layers = tuple(list_of(data, "layers", int, where, PatchError))
        if model != lens.model_hash and not other_model:
            raise PatchError(
                f"{path} is for model {model}, this is {lens.model_hash}. If that is meant, other_model=True"
            )
        vectors = file.read_all("steering", ("vectors",))["vectors"]
        if vectors.ndim != 2 or len(vectors) != len(layers) or not vectors.is_floating_point():
            raise PatchError(f"{path}: vectors are {vectors.dtype} {tuple(vectors.shape)} for {len(layers)} layers")
        if POINTS.get(point.removesuffix(".error"), ("",))[0] != "batch pos model" or len(set(layers)) != len(layers):
            raise PatchError(f"{path}: vectors cannot be added at {point!r:.80} of layers {layers!s:.80}")
        return SteeringVector(point, layers, vectors.to(lens.device), model, about)


def fit_steering(
    lens: Lens,
    positive: Prompt,
    negative: Prompt,
    *,
    layers: PlaceSelection = None,
    point: str = "resid_post",
    method: str = "mean",
    ridge: int | float | Any = 0.01,
) -> SteeringVector:
    """Fit directions from negative to positive prompts, from the activations of their last positions at a point.

    "mean": the difference of means (Turner et al. 2023, arXiv 2308.10248; Rimsky et al. 2023, arXiv 2312.06681,
    section 2). "pca": the first right singular vector of the differences of pairs (Zou et al. 2023, arXiv 2310.01405,
    section 3.1). "logistic": the weights of a logistic regression on both sides, of the standardised numbers and with
    `ridge`/2 times their squared length. The last two are scaled to the mean difference along them, so that scale 1
    is the same step for all methods. Raise PatchError for unequal counts and for a point outside the residual stream.
    """
    if method not in STEERING_METHODS:
        raise PatchError(f"method is {method!r}; choose from {', '.join(map(repr, STEERING_METHODS))}")
    ridge = number(ridge, "ridge")
    if ridge < 0:
        raise PatchError(f"ridge is {ridge}; expected at least 0")
    sides = [to_token_ids(lens, prompts) for prompts in (positive, negative)]
    if len(sides[0]) != len(sides[1]):
        raise PatchError(f"{len(sides[0])} positive and {len(sides[1])} negative prompts: they are compared in pairs")
    site = Site(point, layer=layers)
    names = SiteResolver(lens).resolve_names(site)
    if site.axes != ("batch", "pos", "model"):
        raise PatchError(f"{point} has axes {' '.join(site.axes[1:])}; steer at one with pos model")
    plus, minus = (record_last_positions(lens, rows, names) for rows in sides)
    # plus and minus are [layer, prompt, model]: one direction per layer
    vectors = torch.stack([STEERING_METHODS[method](a, b, ridge) for a, b in zip(plus, minus, strict=True)])
    return SteeringVector(
        point=site.point,
        layers=tuple(int(name.split(".")[1]) for name in names),
        vectors=vectors.to(lens.dtype),
        model=lens.model_hash,
        about=f"{method} of {len(sides[0])} pairs",
    )


def record_last_positions(
    lens: Lens, rows: Sequence[TokenIds], names: Sequence[str]
) -> Float[Tensor, "layer prompt model"]:
    """Return the activations of the last position of every prompt at these points, in float64."""
    by_prompt = []
    for row in rows:
        tokens = torch.tensor([row], device=lens.device)
        _, acts = lens.run_with_cache(tokens, list(names), logits=False, attention_mask=torch.ones_like(tokens))
        by_prompt.append(torch.stack([acts[name][0, -1] for name in names]))
    return torch.stack(by_prompt, 1).double()


def mean_direction(plus: Tensor, minus: Tensor, ridge: int | float) -> Float[Tensor, "model"]:
    """Return the difference of means."""
    return (plus - minus).mean(0)


def pca_direction(plus: Tensor, minus: Tensor, ridge: int | float) -> Float[Tensor, "model"]:
    """Return the first right singular vector of the differences of pairs, scaled to the mean difference along it."""
    first = torch.linalg.svd(plus - minus, full_matrices=False).Vh[0]
    return rescale_direction(mean_direction(plus, minus, ridge), first)


def logistic_direction(plus: Tensor, minus: Tensor, ridge: int | float) -> Float[Tensor, "model"]:
    """Return the weights of a logistic regression, scaled to the mean difference along them."""
    both = torch.cat([plus, minus])
    # Standardise, so that the ridge weighs every channel alike; a constant channel stays at 0.
    spread = both.std(0).clamp(min=1e-12)
    x = (both - both.mean(0)) / spread
    weights = torch.zeros(x.shape[1] + 1, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def evaluate_loss() -> Tensor:
        optimizer.zero_grad()
        loss = logistic_loss(weights, x, len(plus), ridge)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(evaluate_loss)  # pyright: ignore[reportArgumentType]
    return rescale_direction(mean_direction(plus, minus, ridge), weights.detach()[:-1] / spread)  # without the bias


def logistic_loss(weights: Tensor, x: Tensor, n_positive: int, ridge: int | float) -> Float[Tensor, ""]:
    """Return the mean cross-entropy in nats, the first rows positive and the others negative, plus the ridge term."""
    sign = torch.ones(len(x), dtype=x.dtype, device=x.device)
    sign[n_positive:] = -1
    log_odds = x @ weights[:-1] + weights[-1]
    return torch.nn.functional.softplus(-sign * log_odds).mean() + ridge / 2 * weights[:-1].square().sum()


def rescale_direction(difference: Tensor, direction: Tensor) -> Float[Tensor, "model"]:
    """Return the projection of the difference on the direction: as long as the difference along it, of its sign."""
    unit = torch.nn.functional.normalize(direction, dim=0)
    return difference.dot(unit) * unit


STEERING_METHODS = {"mean": mean_direction, "pca": pca_direction, "logistic": logistic_direction}
