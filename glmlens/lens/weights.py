"""Weights by the field's names (`W_Q[layer, head]`), as views of the loaded parameters, and the hash of a model."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from glmlens.config import Scaling
from glmlens.integers import read_integer
from glmlens.model import GLM


class StackedWeight:
    """One weight of every layer, indexed as `W[layer, ...]`: a view of the loaded parameter."""

    def __init__(self, layers: list[Tensor]):
        self.layers = layers

    def __getitem__(self, index: Any) -> Tensor:
        layer, *rest = index if isinstance(index, tuple) else (index,)
        if not hasattr(layer, "__index__"):
            raise TypeError("the layers lie apart in memory: index one by its number, or copy them all with .stack()")
        layer = read_integer(layer, "layer")
        n = len(self.layers)
        if not -n <= layer < n:
            raise IndexError(f"layer {layer} asked for; there are {n}, 0 to {n - 1}")
        return self.layers[layer][tuple(rest)]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.layers)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all layers stacked."""
        return (len(self.layers), *self.layers[0].shape)

    def stack(self) -> Tensor:
        """Return all layers as one tensor, a copy."""
        return torch.stack(self.layers)

    def __repr__(self) -> str:
        return f"StackedWeight{self.shape}: index [layer, ...]"


class WeightsMixin:
    """The weights of `self.model`, in the shapes of the formulas."""

    model: GLM

    @property
    def W_E(self) -> Float[Tensor, "vocab model"]:
        """The embedding.

        In a tied model (`cfg.tied`) W_U is a view of it, and edits change both, unless opened by load(..., untie=True).
        """
        return self.model.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "model vocab"]:
        """The unembedding; in a class head a column per label. AttributeError in a checkpoint without a head.

        In a tied model (`cfg.tied`) it is a view of W_E, and edits change both, unless opened by load(..., untie=True).
        """
        if not self.model.cfg.d_logits:
            raise AttributeError("this checkpoint has no unembedding: it was saved as the model without a head")
        return self.model.unembed.get_parameter("weight").T

    @property
    def b_U(self) -> Float[Tensor, "vocab"]:
        """The bias of a class head [label]; AttributeError where there is none, as in every language model here."""
        if not self.model.cfg.head_bias:
            raise AttributeError("this checkpoint has no bias on its logits")
        return self.model.unembed.get_parameter("bias")

    @property
    def W_Q(self) -> StackedWeight:
        """[layer, head, model, d]."""
        return self._stack_weight("attn.query.weight", "(head d) model -> head model d", d=self.model.cfg.d_head)

    @property
    def W_K(self) -> StackedWeight:
        """[layer, kv, model, d]."""
        return self._stack_weight("attn.key.weight", "(kv d) model -> kv model d", d=self.model.cfg.d_head)

    @property
    def W_V(self) -> StackedWeight:
        """[layer, kv, model, d]."""
        return self._stack_weight("attn.value.weight", "(kv d) model -> kv model d", d=self.model.cfg.d_head)

    @property
    def W_O(self) -> StackedWeight:
        """[layer, head, d, model]."""
        return self._stack_weight("attn.out.weight", "model (head d) -> head d model", d=self.model.cfg.d_head)

    @property
    def b_Q(self) -> StackedWeight:
        """[layer, head, d]; AttributeError in a model without biases."""
        return self._stack_weight("attn.query.bias", "(head d) -> head d", d=self.model.cfg.d_head)

    @property
    def b_K(self) -> StackedWeight:
        """[layer, kv, d]; AttributeError in a model without biases."""
        return self._stack_weight("attn.key.bias", "(kv d) -> kv d", d=self.model.cfg.d_head)

    @property
    def b_V(self) -> StackedWeight:
        """[layer, kv, d]; AttributeError in a model without biases."""
        return self._stack_weight("attn.value.bias", "(kv d) -> kv d", d=self.model.cfg.d_head)

    @property
    def W_gate(self) -> StackedWeight:
        """[layer, model, mlp]."""
        return StackedWeight(
            [w[0] for w in self._stack_weight("mlp.gate_up.weight", "(two mlp) model -> two model mlp", two=2)]
        )

    @property
    def W_up(self) -> StackedWeight:
        """[layer, model, mlp]."""
        return StackedWeight(
            [w[1] for w in self._stack_weight("mlp.gate_up.weight", "(two mlp) model -> two model mlp", two=2)]
        )

    @property
    def W_down(self) -> StackedWeight:
        """[layer, mlp, model]."""
        return self._stack_weight("mlp.down.weight", "model mlp -> mlp model")

    def _stack_weight(self, name: str, pattern: str, **sizes: int) -> StackedWeight:
        """Return the parameter `name` of every layer, rearranged by an einops pattern."""
        if name.endswith(".bias") and not self.model.cfg.qkv_bias:
            raise AttributeError("this checkpoint has no biases on q, k and v")
        return StackedWeight([rearrange(block.get_parameter(name), pattern, **sizes) for block in self.model.blocks])


Stamp = tuple[tuple[int, int | None], ...]
"""The address and version of every parameter. It changes with an edit in place, also through a view like `W_Q[3]`."""
SAMPLE_SIZE = 4_096  # numbers of a parameter


def stamp_of(model: nn.Module) -> Stamp:
    """Return the stamp of a model without reading a weight. Edits through `.data` or numpy do not change it."""
    return tuple((p.data_ptr(), version_of(p)) for p in model.parameters())


def version_of(p: Tensor) -> int | None:
    """Return the number of edits in place of a tensor; None for one made in inference mode, which has no counter."""
    return None if p.is_inference() else p._version


@dataclass(eq=False)
class Digest:
    """The SHA-256 of a parameter's numbers, with what shows that they have not changed since: storage, place, sample.

    `place` is offset, shape, strides, dtype, device and version; `sample` hashes some of the numbers.
    """

    storage: StorageWeakRef  # while it is referenced, no other storage gets its identity
    place: tuple[Any, ...]
    sample: bytes
    numbers: bytes = b""

    def __eq__(self, other: object) -> bool:
        """Whether both are of the same numbers, judged without reading them all. Never without a version counter."""
        return isinstance(other, Digest) and self.key() == other.key() and self.place[-1] is not None

    def key(self) -> tuple[Any, ...]:
        """Return what is compared: storage, place and sample."""
        return self.storage.cdata, self.place, self.sample


def quick_digest(p: Tensor) -> Digest:
    """Return the digest of a parameter without the hash of all its numbers."""
    place = (p.storage_offset(), p.shape, p.stride(), p.dtype, p.device, version_of(p))
    # An odd stride meets every head and all columns.
    sample = p.detach().flatten()[:: max(1, p.numel() // SAMPLE_SIZE) | 1]
    return Digest(StorageWeakRef(p.untyped_storage()), place, sha256(sample))


class ModelHash:
    """Computes 12 hex digits that identify a model: from its config and every number of its parameters.

    Every parameter is read once, and again after an edit. An edit in place shows in the version counter, `p.data = ...`
    in the storage, and most edits through `.data` or numpy, which no counter counts, in a sample of 4,096 numbers.
    A copy of a lens starts with an empty `ModelHash`.
    """

    def __init__(self) -> None:
        self.digests: dict[str, Digest] = {}
        self.known: dict[Stamp, str] = {}

    def of(self, model: GLM) -> str:
        """Return the hash of this model as it is now; ValueError on the meta device."""
        parameters = dict(model.named_parameters())
        if any(p.is_meta for p in parameters.values()):
            raise ValueError("on the meta device there are no numbers to identify a model by: load on the CPU")
        digests = {name: quick_digest(p) for name, p in parameters.items()}
        changed = [name for name, new in digests.items() if new != self.digests.get(name)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # SHA-256 of large buffers releases the interpreter lock
            for name, numbers in zip(changed, pool.map(lambda name: sha256(parameters[name]), changed), strict=True):
                digests[name].numbers = numbers
        self.digests = {name: new if new.numbers else self.digests[name] for name, new in digests.items()}
        # Rotary scaling is hashed only where there is one: the hash of a model without it does not depend on it.
        stretched = "" if model.cfg.rope_scaling == Scaling() else repr(model.cfg.rope_scaling)
        digest = hashlib.sha256(f"{model.cfg!r}{stretched}".encode())
        for name, p in parameters.items():
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + self.digests[name].numbers)
        self.known[stamp_of(model)] = digest.hexdigest()[:12]
        return self.known[stamp_of(model)]

    def at(self, stamp: Stamp, model: GLM) -> str:
        """Return the hash of the model at this stamp; "unknown" if it was edited since and not hashed before."""
        return self.of(model) if stamp == stamp_of(model) else self.known.get(stamp, "unknown")

    def __deepcopy__(self, memo: Any) -> "ModelHash":
        return ModelHash()

    def __reduce__(self) -> Any:
        return ModelHash, ()


def sha256(x: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(x.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data).digest()
