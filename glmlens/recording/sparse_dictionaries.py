"""Sparse autoencoders and transcoders inserted into a model: logits are unchanged until a feature is edited."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from glmlens.file_io import FileError, TensorFile, expand_path, write_tensors
from glmlens.hook_points import HookError, Point
from glmlens.hooks import Hook, hook_requests


@runtime_checkable
class Coder(Protocol):
    """A sparse autoencoder or transcoder: encodes [batch, pos, model] to [batch, pos, feature] and decodes that."""

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, features: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Dictionary:
    """features = relu((x - b_in) W_enc + b_enc), 0 unless above `threshold`; x is about features W_dec + b_dec.

    A sparse autoencoder has b_in = b_dec; a transcoder has b_in = 0.
    Sparse autoencoders: Bricken et al. 2023 (Towards Monosemanticity), section "Sparse autoencoder"; thresholds:
    Rajamanoharan et al. 2024, arXiv 2407.14435; transcoders: Dunefsky et al. 2024, arXiv 2406.11944.
    """

    W_enc: Float[Tensor, "model feature"]
    b_enc: Float[Tensor, "feature"]
    W_dec: Float[Tensor, "feature model"]
    b_dec: Float[Tensor, "model"]
    b_in: Float[Tensor, "model"]
    threshold: Float[Tensor, "feature"]

    def encode(self, x: Float[Tensor, "batch pos model"]) -> Float[Tensor, "batch pos feature"]:
        """Return the features of x, in the dtype of W_enc."""
        features = ((x.to(self.W_enc.dtype) - self.b_in) @ self.W_enc + self.b_enc).relu()
        return torch.where(features > self.threshold, features, 0)

    def decode(self, features: Float[Tensor, "batch pos feature"]) -> Float[Tensor, "batch pos model"]:
        """Return the reconstruction of x from its features."""
        return features @ self.W_dec + self.b_dec

    def save(self, path: str | Path) -> None:
        """Write the dictionary to one safetensors file, atomically."""
        write_tensors(path, vars(self))

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> "Dictionary":
        """Return the dictionary in a safetensors file: W_enc, b_enc, W_dec, b_dec, and optionally threshold and b_in.

        Without b_in it is a sparse autoencoder: b_in is b_dec. Raises FileNotFoundError, and FileError for a file
        without these tensors, or with shapes that do not fit together.
        """
        file = TensorFile(expand_path(path))
        tensors = file.read_all("a dictionary", ("W_enc", "b_enc", "W_dec", "b_dec"), ("threshold", "b_in"))
        if tensors["W_enc"].ndim != 2:
            raise FileError(f"{path}: W_enc is {tuple(tensors['W_enc'].shape)}; expected model feature")
        model, feature = tensors["W_enc"].shape
        expected = {"W_enc": (model, feature), "W_dec": (feature, model), "b_enc": (feature,), "threshold": (feature,)}
        for name, x in tensors.items():
            shape = expected.get(name, (model,))
            one_for_all = name == "threshold" and x.numel() == 1
            if not x.is_floating_point() or (tuple(x.shape) != shape and not one_for_all):
                raise FileError(f"{path}: {name}: expected floats {shape}, found {x.dtype} {tuple(x.shape)}")
        tensors = {name: x.to(device) for name, x in tensors.items()}
        tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
        tensors.setdefault("b_in", tensors["b_dec"])
        return Dictionary(**tensors)


@dataclass(frozen=True, eq=False)
class InsertedDictionary:
    """A coder in a model: the point that it encodes, and the point to which its output is written."""

    coder: Coder
    reads: str
    writes: str
    n_features: int

    @property
    def features(self) -> str:
        """The name of the point of its features."""
        return f"{self.writes}.features"

    @property
    def error(self) -> str:
        """The name of the point of its reconstruction error."""
        return f"{self.writes}.error"

    def surround_point(self, point: Point) -> list[Point]:
        """Return a point of the model, with the points of this dictionary that fire before or after it."""
        shape = (*point.shape[:2], self.n_features)
        features = [replace(point, name=self.features, axes=("batch", "pos", "feature"), shape=shape)]
        error = [replace(point, name=self.error)]
        if self.reads == self.writes == point.name:
            return [*features, *error, point]
        after = features if point.name == self.reads else []
        return [*(error if point.name == self.writes else []), point, *after]


class DictionaryHook:
    """A hook around `hook` that adds the points of dictionaries.

    Features are encoded at the point that a dictionary reads, and `hook` is called with them. At the point that it
    writes, the change of the reconstruction by an edit of the features is added. The reconstruction error stays in
    place, so that without an edit the activations are those of the model, bit for bit.
    """

    def __init__(self, hook: Hook, dictionaries: Sequence[InsertedDictionary]):
        self.hook = hook
        self.dictionaries = dictionaries
        # By the point that a dictionary writes: its features before and after edits.
        self.features_by_point: dict[str, tuple[Tensor, Tensor]] = {}

    def wants(self, name: str) -> bool:
        """Whether the inner hook requests this point."""
        return hook_requests(self.hook, name)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        for dictionary in self.dictionaries:
            if dictionary.writes == name:
                if dictionary.reads == name:
                    self.encode_features(dictionary, x)
                x = self.add_feature_edits(dictionary, x)
        x = self.hook(name, x)
        # A transcoder reads the point after edits of it, as the model does.
        for dictionary in self.dictionaries:
            if dictionary.reads == name != dictionary.writes:
                self.encode_features(dictionary, x)
        return x

    def encode_features(self, dictionary: InsertedDictionary, x: Tensor) -> None:
        """Encode x and call the inner hook with the features."""
        features = dictionary.coder.encode(x).to(x.dtype)
        self.features_by_point[dictionary.writes] = features, self.hook(dictionary.features, features)

    def add_feature_edits(self, dictionary: InsertedDictionary, x: Tensor) -> Tensor:
        """Return x plus the changes by edits of the features and of the error; x itself without edits."""
        before, after = self.features_by_point.pop(dictionary.writes)
        reconstruction = dictionary.coder.decode(before).to(x.dtype)
        error = x - reconstruction
        new_error = self.hook(dictionary.error, error)
        if after is before and new_error is error:
            return x
        return x + (dictionary.coder.decode(after).to(x.dtype) - reconstruction) + (new_error - error)


def place_dictionary(
    coder: Coder, reads: str | None, writes: str, points: Sequence[Point], device: torch.device
) -> InsertedDictionary:
    """Return a coder placed at two points; HookError unless both are [batch, pos, model] and in order."""
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
