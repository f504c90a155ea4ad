"""The hook points with their axes and maths, and the resolution of names, globs and the names of other tools."""

import fnmatch
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import NoReturn, overload

import torch
from torch import Tensor

from glmlens.errors import GlmlensError


class HookError(GlmlensError, ValueError):
    """A hook or a hook point's name that cannot be used as given; the message says what to type instead."""


# Every point, in the order in which they fire: its axes and its line of maths. All but ROOT_POINTS are per layer: their
# full name begins with `blocks.{i}.`.
POINTS: dict[str, tuple[str, str]] = {
    "embed": ("batch pos model", "W_E[token]"),
    "resid_pre": ("batch pos model", "the residual stream that enters the layer"),
    "ln1.scale": ("batch pos one", "1 / sqrt(mean(resid_pre²) + eps), the factor on resid_pre"),
    "ln1.normalized": ("batch pos model", "weight · resid_pre · ln1.scale: the input of attention"),
    "attn.q": ("batch pos head d", "W_Q ln1.normalized + b_Q, before rotation"),
    "attn.k": ("batch pos kv d", "W_K ln1.normalized + b_K, before rotation"),
    "attn.v": ("batch pos kv d", "W_V ln1.normalized + b_V"),
    "rotary.cos": (
        "batch pos pair",
        "cos(position · theta^(-2 pair / rotated)), the angles by which this layer rotates",
    ),
    "rotary.sin": ("batch pos pair", "sin(position · theta^(-2 pair / rotated))"),
    "attn.q_rot": ("batch pos head rotated", "the first channels of q, each adjacent pair rotated by its angle"),
    "attn.k_rot": ("batch pos kv rotated", "the first channels of k, each adjacent pair rotated by its angle"),
    "attn.q_pass": ("batch pos head rest", "the channels of q that are not rotated"),
    "attn.k_pass": ("batch pos kv rest", "the channels of k that are not rotated"),
    "kv.k_new": ("batch pos kv d", "[k_rot, k_pass]: the keys of this call, as they are cached"),
    "kv.v_new": ("batch pos kv d", "v: the values of this call, as they are cached"),
    "kv.k": ("batch key kv d", "every key that attention reads: cached ones and kv.k_new"),
    "kv.v": ("batch key kv d", "every value that attention reads: cached ones and kv.v_new"),
    "attn.scores": ("batch head query key", "q · k / sqrt(d), and the smallest float where the mask is"),
    "attn.pattern": ("batch head query key", "softmax over key of attn.scores"),
    "attn.z": ("batch pos head d", "sum over key of attn.pattern · kv.v"),
    "attn.result": ("batch pos head model", "W_O attn.z head by head (only when named in full)"),
    "ln1_post.scale": ("batch pos one", "the scale of the norm on attention's output (glm4)"),
    "attn_out": ("batch pos model", "what attention adds to the residual stream"),
    "resid_mid": ("batch pos model", "resid_pre + attn_out"),
    "ln2.scale": ("batch pos one", "1 / sqrt(mean(resid_mid²) + eps), the factor on resid_mid"),
    "ln2.normalized": ("batch pos model", "weight · resid_mid · ln2.scale: the input of the MLP"),
    "mlp.gate": ("batch pos mlp", "W_gate ln2.normalized"),
    "mlp.up": ("batch pos mlp", "W_up ln2.normalized"),
    "mlp.act": ("batch pos mlp", "silu(mlp.gate)"),
    "mlp.post": ("batch pos mlp", "mlp.up · mlp.act"),
    "ln2_post.scale": ("batch pos one", "the scale of the norm on the MLP's output (glm4)"),
    "mlp_out": ("batch pos model", "what the MLP adds to the residual stream"),
    "resid_post": ("batch pos model", "resid_mid + mlp_out"),
    "ln_final.scale": ("batch pos one", "1 / sqrt(mean(last resid_post²) + eps), the factor on it"),
    "ln_final.normalized": (
        "batch pos model",
        "weight · last resid_post · ln_final.scale: the input of the unembedding",
    ),
    "logits": ("batch pos vocab", "W_U ln_final.normalized (and b_U): vocab are the tokens, or a class head's labels"),
}


# A dictionary (SAE or transcoder) inserted at a point adds these beside it, "mlp_out.features" and "mlp_out.error".
DICTIONARY_POINTS = {"features": "batch pos feature", "error": "batch pos model"}


ROOT_POINTS = ("embed", "ln_final.scale", "ln_final.normalized", "logits")


# Computed only when a hook requests it by name: its head axis makes it n_heads times the residual stream.
ON_REQUEST = ("attn.result",)


# The fused kernel of attention="sdpa" computes these without returning them.
EAGER_ONLY = ("attn.scores", "attn.pattern")


# TransformerLens's names for the same tensors (its 4.x canonical names and its older aliases).
TRANSFORMERLENS_NAMES = {
    "hook_embed": "embed", "embed.hook_out": "embed", "hook_unembed": "logits", "unembed.hook_out": "logits",
    "ln_final.hook_scale": "ln_final.scale", "ln_final.hook_normalized": "ln_final.normalized",
    "ln_final.hook_out": "ln_final.normalized", "unembed.hook_in": "ln_final.normalized",
    "hook_in": "resid_pre", "hook_out": "resid_post", "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post", "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out",
    "ln1.hook_in": "resid_pre", "ln2.hook_in": "resid_mid",
    "ln1.hook_scale": "ln1.scale", "ln2.hook_scale": "ln2.scale",
    "ln1.hook_normalized": "ln1.normalized", "ln2.hook_normalized": "ln2.normalized",
    "ln1.hook_out": "ln1.normalized", "ln2.hook_out": "ln2.normalized",
    "attn.hook_in": "ln1.normalized", "mlp.hook_in": "ln2.normalized", "hook_mlp_in": "resid_mid",
    "attn.hook_q": "attn.q", "attn.hook_k": "attn.k", "attn.hook_v": "attn.v",
    "attn.q.hook_out": "attn.q", "attn.k.hook_out": "attn.k", "attn.v.hook_out": "attn.v",
    "attn.hook_cos": "rotary.cos", "attn.hook_sin": "rotary.sin",
    "rotary_emb.hook_cos": "blocks.*.rotary.cos", "rotary_emb.hook_sin": "blocks.*.rotary.sin",
    "attn.hook_rot_q": "attn.q_rot", "attn.hook_rot_k": "attn.k_rot", "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern", "attn.hook_z": "attn.z", "attn.o.hook_in": "attn.z",
    "attn.hook_result": "attn.result", "attn.hook_out": "attn_out", "attn.o.hook_out": "attn_out",
    "mlp.hook_pre": "mlp.gate", "mlp.gate.hook_out": "mlp.gate", "mlp.hook_pre_linear": "mlp.up",
    "mlp.in.hook_out": "mlp.up", "mlp.hook_post": "mlp.post", "mlp.out.hook_in": "mlp.post",
    "mlp.hook_out": "mlp_out", "mlp.out.hook_out": "mlp_out",
}  # fmt: skip


class LayerNumber(int):
    """A layer's number that can also be called, as TransformerLens's `hook.layer()` is."""

    def __call__(self) -> int:
        return int(self)


@dataclass(frozen=True, eq=False)
class Point:
    """One hook point: its name, axes, shape and dtype, and inside a hook the step and the absolute positions.

    `step` is the step of a generation, 0 for the prompt. `positions` is [batch, pos] for the tokens of this call and
    `key_positions` [batch, key] for all keys that it can attend to. Absolute positions are counted from 0, the prompt's
    prefix included; padding is -1.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype = field(repr=False)
    step: int = 0
    positions: Tensor | None = field(default=None, repr=False)
    key_positions: Tensor | None = field(default=None, repr=False)

    @property
    def layer(self) -> int | None:
        """The layer as a LayerNumber, or None for a point outside the layers."""
        layer = layer_of(self.name)
        return None if layer is None else LayerNumber(layer)

    @property
    def local(self) -> str:
        """The name within the layer: "attn.q" for "blocks.3.attn.q"."""
        return local_name(self.name)

    @property
    def bytes(self) -> int:
        """The size of this tensor in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@overload
def layer_of(name: str, default: int) -> int: ...
@overload
def layer_of(name: str, default: None = None) -> int | None: ...
def layer_of(name: str, default: int | None = None) -> int | None:
    """Return the layer in a full name, 3 for "blocks.3.attn.q"; `default` for a point outside the layers."""
    return int(name.split(".", 2)[1]) if name.startswith("blocks.") else default


def local_name(name: str) -> str:
    """Return the name within its layer, "attn.q" for "blocks.3.attn.q"; a name outside the layers as it is."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


@functools.cache  # every point of every run with hooks needs its axes
def axes_of(name: str) -> tuple[str, ...]:
    """Return the names of the axes of a point, of a dictionary's features and error too."""
    local = name.split(".", 2)[2] if name.startswith("blocks.") else name
    if local in POINTS:
        return tuple(POINTS[local][0].split())
    # A dictionary's points are named after the point that it writes: "mlp_out.features".
    point, _, part = local.rpartition(".")
    if point in POINTS and part in DICTIONARY_POINTS:
        return tuple(DICTIONARY_POINTS[part].split())
    raise KeyError(local)


def resolve_names(patterns: str | Sequence[str], catalogue: Iterable[str]) -> list[str]:
    """Return the points of `catalogue` that names, globs or layer-local names match, in the order in which they fire.

    `"all"` matches every point except those computed only on request. A layer-local name such as "resid_post" matches
    that point in every layer. Raises HookError for a pattern that matches nothing, with the nearest names.
    """
    names = list(catalogue)
    known = set(names)
    matched = set[str]()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # A full name is taken literally: a point on request may be named so.
        matches = [pattern] if pattern in known else match_pattern(pattern, names)
        if not matches:
            raise_unknown_point(pattern, names)
        matched.update(matches)
    return [name for name in names if name in matched]


def match_pattern(pattern: str, names: list[str]) -> list[str]:
    """Return the names that a glob or a layer-local name matches; HookError for a pattern that is not a string."""
    if not isinstance(pattern, str):
        raise HookError(f"a hook point's name is a string, not {type(pattern).__name__}: {pattern!r}")
    glob = pattern
    if pattern == "all":
        glob = "*"
    elif pattern in POINTS and pattern not in ROOT_POINTS:
        glob = f"blocks.*.{pattern}"
    matches = re.compile(fnmatch.translate(glob)).match
    # A glob takes points on request only if it ends in the name of one: "blocks.*.attn.result" does, "blocks.0.*" not.
    with_costly = pattern.endswith(ON_REQUEST)
    return [name for name in names if matches(name) and (with_costly or local_name(name) not in ON_REQUEST)]


def raise_unknown_point(pattern: str, names: list[str]) -> NoReturn:
    """Raise HookError for a pattern that matches no name, with this package's name for it or the nearest ones."""
    layer = re.match(r"blocks\.([^.]+)\.", pattern)
    local = pattern[layer.end() :] if layer else pattern
    ours = TRANSFORMERLENS_NAMES.get(local)
    if ours is not None:
        if ours not in ROOT_POINTS and not ours.startswith("blocks."):
            ours = f"blocks.{layer[1] if layer else '*'}.{ours}"
        raise HookError(f"no point is called {pattern!r}: here it is called {ours!r}")
    if local in EAGER_ONLY and not any(local_name(name) == local for name in names):
        raise HookError(
            f"no point matches {pattern!r}: attention='sdpa' computes scores and pattern inside one kernel; "
            f"load with attention='eager' to have them"
        )
    if local in POINTS and not any(local_name(name) == local for name in names):
        raise HookError(f"this model, or the part of it that is run, has no {local!r} ({POINTS[local][1]})")
    if not names:
        raise HookError(f"{pattern!r}: this run passes no points")
    if layer and layer[1].isdigit():
        layers = 1 + max(layer_of(name, -1) for name in names)
        if int(layer[1]) >= layers:
            raise HookError(f"no point matches {pattern!r}: the layers are 0 to {layers - 1}")
    near = get_close_matches(pattern, names, 3, 0.5) or get_close_matches(local, list(POINTS), 3, 0.4)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise HookError(f"no point matches {pattern!r}.{hint} lens.points() lists them all")
