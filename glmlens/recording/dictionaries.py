"""Dictionaries of features spliced into a run: the model as it is, until a feature is edited."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from glmlens.hook_points import HookError, Point
from glmlens.hooks import Hook, hook_requests
from glmlens.storage import FileError, TensorFile, expand_path, write_tensors


@runtime_checkable
class Coder(Protocol):
    """A sparse autoencoder or transcoder: anything that encodes [batch pos model] to features and decodes them."""

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, features: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Dictionary:
    """features = relu((x - b_dec) W_enc + b_enc), kept where above `threshold`; x is about features W_dec + b_dec.

    Sparse autoencoders: Bricken et al. 2023 (Towards Monosemanticity), section "Sparse autoencoder"; thresholds:
    Rajamanoharan et al. 2024, arXiv 2407.14435; transcoders, which subtract nothing on the way in (`b_in` is zero):
    Dunefsky et al. 2024, arXiv 2406.11944.
    """

    W_enc: Float[Tensor, "model feature"]
    b_enc: Float[Tensor, "feature"]
    W_dec: Float[Tensor, "feature model"]
    b_dec: Float[Tensor, "model"]
    b_in: Float[Tensor, "model"]
    threshold: Float[Tensor, "feature"]

    def encode(self, x: Float[Tensor, "batch pos model"]) -> Float[Tensor, "batch pos feature"]:
        found = ((x.to(self.W_enc.dtype) - self.b_in) @ self.W_enc + self.b_enc).relu()
        return torch.where(found > self.threshold, found, 0)

    def decode(self, features: Float[Tensor, "batch pos feature"]) -> Float[Tensor, "batch pos model"]:
        return features @ self.W_dec + self.b_dec

    def save(self, path: str | Path) -> None:
        """Write the dictionary to one safetensors file, whole or not at all."""
        write_tensors(path, vars(self))

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> "Dictionary":
        """The dictionary in a safetensors file: W_enc, b_enc, W_dec, b_dec, and if it has them threshold and b_in.

        Without b_in it is an autoencoder, which subtracts b_dec on the way in. Raises FileNotFoundError, and FileError
        for a file without these, or in shapes that do not fit together.
        """
        file = TensorFile(expand_path(path))
        found = file.read_all("a dictionary", ("W_enc", "b_enc", "W_dec", "b_dec"), ("threshold", "b_in"))
        if found["W_enc"].ndim != 2:
            raise FileError(f"{path}: W_enc is {tuple(found['W_enc'].shape)}; expected model feature")
        model, feature = found["W_enc"].shape
        expected = {"W_enc": (model, feature), "W_dec": (feature, model), "b_enc": (feature,), "threshold": (feature,)}
        for name, x in found.items():
            shape = expected.get(name, (model,))
            one_for_all = name == "threshold" and x.numel() == 1
            if not x.is_floating_point() or (tuple(x.shape) != shape and not one_for_all):
                raise FileError(f"{path}: {name}: expected floats {shape}, found {x.dtype} {tuple(x.shape)}")
        found = {name: x.to(device) for name, x in found.items()}
        found.setdefault("threshold", torch.zeros_like(found["b_enc"]))
        found.setdefault("b_in", found["b_dec"])
        return Dictionary(**found)


@dataclass(frozen=True, eq=False)
class InsertedDictionary:
    """A coder between two points, or at one: what it reads, and the point at which what it writes is added."""

    coder: Coder
    reads: str
    writes: str
    n_features: int

    @property
    def features(self) -> str:
        return f"{self.writes}.features"

    @property
    def error(self) -> str:
        return f"{self.writes}.error"

    def surround_point(self, point: Point) -> list[Point]:
        """A point of the model, with those of this splice that are shown before it or after."""
        shape = (*point.shape[:2], self.n_features)
        features = [replace(point, name=self.features, axes=("batch", "pos", "feature"), shape=shape)]
        error = [replace(point, name=self.error)]
        if self.reads == self.writes == point.name:
            return [*features, *error, point]
        after = features if point.name == self.reads else []
        return [*(error if point.name == self.writes else []), point, *after]


class DictionaryHook:
    """A hook with dictionaries in its way.

    A feature is encoded from what the model reads, shown under a name of its own, and what an edit of it changes in the
    reconstruction is added at the point that it writes. The error of the reconstruction stays where it is: without an
    edit the model computes its own numbers, bit for bit.
    """

    def __init__(self, hook: Hook, dictionaries: Sequence[InsertedDictionary]):
        self.hook, self.dictionaries = hook, dictionaries
        self.features_by_point: dict[
            str, tuple[Tensor, Tensor]
        ] = {}  # by point written, the features before and after edits

    def wants(self, name: str) -> bool:
        return hook_requests(self.hook, name)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        for splice in (splice for splice in self.dictionaries if splice.writes == name):
            if splice.reads == name:
                self.encode_features(splice, x)
            x = self.add_feature_edits(splice, x)
        x = self.hook(name, x)
        for splice in (splice for splice in self.dictionaries if splice.reads == name != splice.writes):
            self.encode_features(splice, x)
        return x

    def encode_features(self, dictionary: InsertedDictionary, x: Tensor) -> None:
        features = dictionary.coder.encode(x).to(x.dtype)
        self.features_by_point[dictionary.writes] = features, self.hook(dictionary.features, features)

    def add_feature_edits(self, dictionary: InsertedDictionary, x: Tensor) -> Tensor:
        before, after = self.features_by_point.pop(dictionary.writes)
        said = dictionary.coder.decode(before).to(x.dtype)
        error = x - said
        new = self.hook(dictionary.error, error)
        if after is before and new is error:
            return x
        return x + (dictionary.coder.decode(after).to(x.dtype) - said) + (new - error)


def place_dictionary(
    coder: Coder, reads: str | None, writes: str, points: Sequence[Point], device: torch.device
) -> InsertedDictionary:
    """The splice of a coder at these points; HookError when they are no residual-wide points of one model, in order."""
    if not isinstance(coder, Coder):
        raise HookError(f"a coder has encode and decode; {type(coder).__name__} has not")
    reads = writes if reads is None else reads
    names = [point.name for point in points]
    for name in (reads, writes):
        if name not in names:
            raise HookError(f"no point is called {name!r}: name it in full, such as 'blocks.2.resid_post'")
        if points[names.index(name)].axes != ("batch", "pos", "model"):
            raise HookError(f"{name!r} is {' '.join(points[names.index(name)].axes)}; a coder reads batch pos model")
    if names.index(reads) > names.index(writes):
        raise HookError(f"{reads!r} comes after {writes!r}: a coder reads before it writes")
    at = points[names.index(reads)]
    nothing = torch.zeros(1, 1, at.shape[-1], dtype=at.dtype, device=device)
    return InsertedDictionary(coder, reads, writes, coder.encode(nothing).shape[-1])
