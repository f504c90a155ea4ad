"""Activations recomputed, bit for bit, from stored ones instead of being stored.

Each derivation runs the model's own line of code on the same values, in the same shape and memory layout. A point that
was edited, or that has an edited point between it and its inputs, cannot be derived: it is stored.
"""

from collections.abc import Callable, Collection, Iterable, MutableMapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Int
from torch import Tensor

from glmlens.hook_points import local_name
from glmlens.hooks import Hook
from glmlens.model import GLM, Block, additive_mask, apply_rotary, eager, softmax


@dataclass(frozen=True)
class RunContext:
    """The model and the positions of the run that the values are from."""

    model: GLM
    positions: Int[Tensor, "batch pos"]
    key_positions: Int[Tensor, "batch key"]

    @property
    def mask(self) -> Tensor:
        """The additive attention mask of the run."""
        return additive_mask(self.positions, self.key_positions, self.model.ln_final.weight.dtype)


@dataclass(frozen=True)
class Derivation:
    """How a point is computed from the points that it needs; `between` are points in the middle of that computation."""

    needs: tuple[str, ...]
    compute: Callable[..., Tensor]  # (context, block, *values of `needs`)
    between: tuple[str, ...] = ()


class CapturedValue(Exception):
    """Carries a value out of the middle of a computation. Control flow, not an error."""


def capture_point(name: str, run: Callable[[Hook], object]) -> Tensor:
    """Return the value with which `run` calls its hook under this name; the computation stops there."""

    def hook(point: str, x: Tensor) -> Tensor:
        if point == name:
            raise CapturedValue(x)
        return x

    try:
        run(hook)
    except CapturedValue as e:
        return e.args[0]
    raise AssertionError(f"{name} did not fire")


def derive_unchanged(context: RunContext, block: Block, x: Tensor) -> Tensor:
    """Return x, for points with the same value under two names."""
    return x


def derive_residual_sum(context: RunContext, block: Block, resid: Tensor, out: Tensor) -> Tensor:
    """Return the residual stream after a sublayer's output is added."""
    return resid + out


def concatenate_channels(context: RunContext, block: Block, first: Tensor, *rest: Tensor) -> Tensor:
    """Return rotated and unrotated channels as one vector."""
    return torch.cat([first, *rest], -1) if rest else first


def derive_rotated_channels(context: RunContext, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the first `d_rotary` channels of q or k, rotated."""
    return apply_rotary(x[..., : context.model.cfg.d_rotary], cos, sin)


def derive_unrotated_channels(context: RunContext, block: Block, x: Tensor) -> Tensor:
    """Return the channels of q or k that are not rotated."""
    return x[..., context.model.cfg.d_rotary :]


def derive_scores(context: RunContext, block: Block, k: Tensor, q_rot: Tensor, *q_pass: Tensor) -> Tensor:
    """Return the masked attention scores, by the code of eager attention."""
    q = concatenate_channels(context, block, q_rot, *q_pass)
    return capture_point("attn.scores", lambda hook: eager(q, k, k, context.mask, hook))


def derive_head_results(context: RunContext, block: Block, z: Tensor) -> Tensor:
    """Return each head's output in the residual stream: z [batch, pos, head, d] times W_O."""
    W_O = rearrange(block.attn.out.weight, "model (head d) -> head d model", d=z.shape[-1])
    return einsum(z, W_O, "batch pos head d, head d model -> batch pos head model")


def derive_mlp_act(context: RunContext, block: Block, gate: Tensor) -> Tensor:
    """Return silu of the gate in the memory layout of the run, in which `up` lies beside it.

    Vectorised kernels round differently at the ends of rows, so that the last bits depend on where rows begin.
    """
    both = gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])
    return F.silu(rearrange(both, "batch pos (two mlp) -> two batch pos mlp", two=2)[0].copy_(gate))


def derive_ln1_post_scale(context: RunContext, block: Block, z: Tensor) -> Tensor:
    """Return the scale of the norm on the attention output."""
    out = block.attn.out(rearrange(z, "batch pos head d -> batch pos (head d)"))
    return capture_point("scale", lambda hook: block.ln1_post(out, hook))


DERIVATIONS: dict[str, Derivation] = {
    "resid_mid": Derivation(("resid_pre", "attn_out"), derive_residual_sum),
    "resid_post": Derivation(("resid_mid", "mlp_out"), derive_residual_sum),
    "ln1.scale": Derivation(
        ("resid_pre",), lambda o, block, x: capture_point("scale", lambda hook: block.ln1(x, hook))
    ),
    "ln1.normalized": Derivation(("resid_pre",), lambda o, block, x: block.ln1(x), between=("ln1.scale",)),
    "attn.q_rot": Derivation(("attn.q", "rotary.cos", "rotary.sin"), derive_rotated_channels),
    "attn.k_rot": Derivation(("attn.k", "rotary.cos", "rotary.sin"), derive_rotated_channels),
    "attn.q_pass": Derivation(("attn.q",), derive_unrotated_channels),
    "attn.k_pass": Derivation(("attn.k",), derive_unrotated_channels),
    "kv.k_new": Derivation(("attn.k_rot", "attn.k_pass"), concatenate_channels),
    "kv.v_new": Derivation(("attn.v",), derive_unchanged),
    "kv.k": Derivation(("kv.k_new",), derive_unchanged),
    "kv.v": Derivation(("kv.v_new",), derive_unchanged),
    "attn.scores": Derivation(("kv.k", "attn.q_rot", "attn.q_pass"), derive_scores),
    "attn.pattern": Derivation(("attn.scores",), lambda o, block, x: softmax(x, x.dtype)),
    "attn.result": Derivation(("attn.z",), derive_head_results),
    "ln1_post.scale": Derivation(("attn.z",), derive_ln1_post_scale, between=("attn.result",)),
    "ln2.scale": Derivation(
        ("resid_mid",), lambda o, block, x: capture_point("scale", lambda hook: block.ln2(x, hook))
    ),
    "ln2.normalized": Derivation(("resid_mid",), lambda o, block, x: block.ln2(x), between=("ln2.scale",)),
    "mlp.act": Derivation(("mlp.gate",), derive_mlp_act),
    "mlp.post": Derivation(("mlp.up", "mlp.act"), lambda o, block, up, act: up * act),
    "ln2_post.scale": Derivation(
        ("mlp.post",), lambda o, block, x: capture_point("scale", lambda hook: block.ln2_post(block.mlp.down(x), hook))
    ),
    "ln_final.scale": Derivation(
        ("resid_post",), lambda o, block, x: capture_point("scale", lambda hook: o.model.ln_final(x, hook))
    ),
    "ln_final.normalized": Derivation(
        ("resid_post",), lambda o, block, x: o.model.ln_final(x), between=("ln_final.scale",)
    ),
}


def find_derivation(name: str, model: GLM) -> Derivation | None:
    """Return the derivation of the point of this full name, with full names for its needs; None without one."""
    local, layers = local_name(name), len(model.blocks)
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else layers - 1  # ln_final follows the last layer
    if local == "resid_pre":
        return Derivation(("embed",) if layer == 0 else (f"blocks.{layer - 1}.resid_post",), derive_unchanged)
    if local in ("rotary.cos", "rotary.sin") and layer:  # the angles are the same in every layer
        return Derivation((f"blocks.0.{local}",), derive_unchanged)
    how = DERIVATIONS.get(local)
    if how is None or (local.endswith("_post.scale") and not model.cfg.sandwich):
        return None
    # Where all channels are rotated, the model has no points for unrotated ones.
    all_rotated = model.cfg.d_rotary == model.cfg.d_head
    needs = tuple(f"blocks.{layer}.{need}" for need in how.needs if not (all_rotated and need.endswith("_pass")))
    between = how.between if local.startswith("ln_final") else tuple(f"blocks.{layer}.{point}" for point in how.between)
    return Derivation(needs, how.compute, between)


def make_underivable_check(edited: Collection[str], model: GLM, past_entries: bool) -> Callable[[str], bool]:
    """Return a predicate: whether a point cannot be derived, given the edited points and earlier cache entries."""
    rotary_edited = any(local_name(name).startswith("rotary.") for name in edited)

    def is_underivable(name: str) -> bool:
        how, local = find_derivation(name, model), local_name(name)
        if how is None or name in edited or any(point in edited for point in how.between):
            return True
        # The angles of other layers no longer equal those of layer 0 once one layer's are edited. With earlier entries
        # in the cache, kv.k and kv.v hold more than the new keys and values.
        return (rotary_edited and local.startswith("rotary.")) or (past_entries and local in ("kv.k", "kv.v"))

    return is_underivable


def select_points_to_store(names: Iterable[str], model: GLM, is_underivable: Callable[[str], bool]) -> list[str]:
    """Return the names, of these in the order in which they fire, that must be stored to derive the others."""
    available, stored = set[str](), []
    for name in names:
        how = None if is_underivable(name) else find_derivation(name, model)
        if how is None or not available.issuperset(how.needs):
            stored.append(name)
        available.add(name)
    return stored


def is_derivable(name: str, model: GLM, stored: Collection[str], is_underivable: Callable[[str], bool]) -> bool:
    """Whether a point is stored, or can be derived from stored points in any number of steps."""
    if name in stored:
        return True
    how = None if is_underivable(name) else find_derivation(name, model)
    return how is not None and all(is_derivable(need, model, stored, is_underivable) for need in how.needs)


def derive_point(
    name: str, context: RunContext, available: MutableMapping[str, Tensor], is_underivable: Callable[[str], bool]
) -> Tensor:
    """Return the value of a point, derived from `available` values.

    Residual streams derived on the way are added to `available`, because each layer's follows from the layer before.
    """
    if name in available:
        return available[name]
    how = find_derivation(name, context.model)
    assert how is not None, name
    assert not is_underivable(name), name
    needs = [derive_point(need, context, available, is_underivable) for need in how.needs]
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else len(context.model.blocks) - 1
    value = how.compute(context, context.model.blocks[layer], *needs)
    if local_name(name).startswith("resid_"):
        available[name] = value
    return value
