"""Weights by the field's names, `W_Q[layer, head]` and the others: views of the loaded parameters, never copies."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.config import Scaling
from glmlens.integers import read_integer
from glmlens.model import GLM


class Stacked:
    """One weight of every layer as `W[layer, ...]`, each a view of the loaded parameter."""

    def __init__(self, layers: list[Tensor]):
        self.layers = layers

    def __getitem__(self, index: Any) -> Tensor:
        layer, *rest = index if isinstance(index, tuple) else (index,)
        if not hasattr(layer, "__index__"):
            raise TypeError("the layers lie apart in memory: index one by its number, or copy them all with .stack()")
        layer, n = read_integer(layer, "layer"), len(self.layers)
        if not -n <= layer < n:
            raise IndexError(f"layer {layer} asked for; there are {n}, 0 to {n - 1}")
        return self.layers[layer][tuple(rest)]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.layers)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    def stack(self) -> Tensor:
        """All layers as one tensor: a copy."""
        return torch.stack(self.layers)

    def __repr__(self) -> str:
        return f"Stacked{self.shape}: index [layer, ...]"


class Weights:
    """The weights of `self.model`, in the shapes in which the maths is written."""

    model: GLM

    @property
    def W_E(self) -> Float[Tensor, "vocab model"]:
        return self.model.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "model vocab"]:
        """Of a class head, a column for each label; AttributeError in a checkpoint without a head."""
        if not self.model.cfg.d_logits:
            raise AttributeError("this checkpoint has no unembedding: it was saved as the model without a head")
        return self.model.unembed.get_parameter("weight").T

    @property
    def b_U(self) -> Float[Tensor, "vocab"]:
        """The bias of a class head; AttributeError where there is none, as in every language model here."""
        if not self.model.cfg.head_bias:
            raise AttributeError("this checkpoint has no bias on its logits")
        return self.model.unembed.get_parameter("bias")

    @property
    def W_Q(self) -> Stacked:
        """[layer, head, model, d]."""
        return self._stacked("attn.query.weight", "(head d) model -> head model d", d=self.model.cfg.d_head)

    @property
    def W_K(self) -> Stacked:
        """[layer, kv, model, d]."""
        return self._stacked("attn.key.weight", "(kv d) model -> kv model d", d=self.model.cfg.d_head)

    @property
    def W_V(self) -> Stacked:
        """[layer, kv, model, d]."""
        return self._stacked("attn.value.weight", "(kv d) model -> kv model d", d=self.model.cfg.d_head)

    @property
    def W_O(self) -> Stacked:
        """[layer, head, d, model]."""
        return self._stacked("attn.out.weight", "model (head d) -> head d model", d=self.model.cfg.d_head)

    @property
    def b_Q(self) -> Stacked:
        """[layer, head, d]; AttributeError in a model without biases."""
        return self._stacked("attn.query.bias", "(head d) -> head d", d=self.model.cfg.d_head)

    @property
    def b_K(self) -> Stacked:
        """[layer, kv, d]; AttributeError in a model without biases."""
        return self._stacked("attn.key.bias", "(kv d) -> kv d", d=self.model.cfg.d_head)

    @property
    def b_V(self) -> Stacked:
        """[layer, kv, d]; AttributeError in a model without biases."""
        return self._stacked("attn.value.bias", "(kv d) -> kv d", d=self.model.cfg.d_head)

    @property
    def W_gate(self) -> Stacked:
        """[layer, model, mlp]."""
        return Stacked([w[0] for w in self._stacked("mlp.gate_up.weight", "(two mlp) model -> two model mlp", two=2)])

    @property
    def W_up(self) -> Stacked:
        """[layer, model, mlp]."""
        return Stacked([w[1] for w in self._stacked("mlp.gate_up.weight", "(two mlp) model -> two model mlp", two=2)])

    @property
    def W_down(self) -> Stacked:
        """[layer, mlp, model]."""
        return self._stacked("mlp.down.weight", "model mlp -> mlp model")

    def _stacked(self, name: str, pattern: str, **sizes: int) -> Stacked:
        if name.endswith(".bias") and not self.model.cfg.qkv_bias:
            raise AttributeError("this checkpoint has no biases on q, k and v")
        return Stacked([rearrange(block.get_parameter(name), pattern, **sizes) for block in self.model.blocks])


def fingerprint(model: GLM) -> str:
    """12 hex digits that tell this model from others: of its config and at most 65,536 numbers of every parameter."""
    stretched = "" if model.cfg.rope_scaling == Scaling() else repr(model.cfg.rope_scaling)
    found = hashlib.sha256(f"{model.cfg!r}{stretched}".encode())
    for name, p in model.named_parameters():
        some = p.detach().flatten()[:: max(1, p.numel() // 65_536)].contiguous().cpu()
        found.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]
