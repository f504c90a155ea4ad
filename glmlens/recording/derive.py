"""What follows from what: points that need not be stored, because they are computed again from others, exactly.

Each derivation is the model's own line of code on the same values, of the same shape and layout: bit for bit what was
there. An edit at a derived point, or between it and what it needs, bars the derivation, and the point is stored.
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
    """The model and the positions of the run that values are from."""

    model: GLM
    positions: Int[Tensor, "batch pos"]
    key_positions: Int[Tensor, "batch key"]

    @property
    def mask(self) -> Tensor:
        return additive_mask(self.positions, self.key_positions, self.model.ln_final.weight.dtype)


@dataclass(frozen=True)
class Derivation:
    """How a point follows from the points that it needs; `past` are those that lie between."""

    needs: tuple[str, ...]
    compute: Callable[..., Tensor]  # of the run's origin, the layer, and what it needs
    between: tuple[str, ...] = ()


class CapturedValue(Exception):
    """Carries a value out of the middle of a computation."""


def capture_point(name: str, run: Callable[[Hook], object]) -> Tensor:
    """The value that `run` shows its hook under this name; what would follow it is not computed."""

    def hook(heard: str, x: Tensor) -> Tensor:
        if heard == name:
            raise CapturedValue(x)
        return x

    try:
        run(hook)
    except CapturedValue as e:
        return e.args[0]
    raise AssertionError(f"{name} was never shown")


def derive_unchanged(origin: RunContext, block: Block, x: Tensor) -> Tensor:
    return x


def derive_residual_sum(origin: RunContext, block: Block, resid: Tensor, out: Tensor) -> Tensor:
    return resid + out


def concatenate_channels(origin: RunContext, block: Block, first: Tensor, *rest: Tensor) -> Tensor:
    return torch.cat([first, *rest], -1) if rest else first


def derive_rotated_channels(origin: RunContext, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary(x[..., : origin.model.cfg.d_rotary], cos, sin)


def derive_unrotated_channels(origin: RunContext, block: Block, x: Tensor) -> Tensor:
    return x[..., origin.model.cfg.d_rotary :]


def derive_scores(origin: RunContext, block: Block, k: Tensor, q_rot: Tensor, *q_pass: Tensor) -> Tensor:
    q = concatenate_channels(origin, block, q_rot, *q_pass)
    return capture_point("attn.scores", lambda hook: eager(q, k, k, origin.mask, hook))


def derive_head_results(origin: RunContext, block: Block, z: Tensor) -> Tensor:
    W_O = rearrange(block.attn.out.weight, "model (head d) -> head d model", d=z.shape[-1])
    return einsum(z, W_O, "batch pos head d, head d model -> batch pos head model")


def derive_mlp_act(origin: RunContext, block: Block, gate: Tensor) -> Tensor:
    """silu of the gate laid out as in the run, beside `up`: the last bits depend on where rows begin."""
    both = gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])
    return F.silu(rearrange(both, "batch pos (two mlp) -> two batch pos mlp", two=2)[0].copy_(gate))


def derive_ln1_post_scale(origin: RunContext, block: Block, z: Tensor) -> Tensor:
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
    """How the point of this full name follows in this model, its needs by their full names; None if it does not."""
    local, layers = local_name(name), len(model.blocks)
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else layers - 1
    if local == "resid_pre":
        return Derivation(("embed",) if layer == 0 else (f"blocks.{layer - 1}.resid_post",), derive_unchanged)
    if local in ("rotary.cos", "rotary.sin") and layer:
        return Derivation((f"blocks.0.{local}",), derive_unchanged)
    how = DERIVATIONS.get(local)
    if how is None or (local.endswith("_post.scale") and not model.cfg.sandwich):
        return None
    whole = model.cfg.d_rotary == model.cfg.d_head
    needs = tuple(f"blocks.{layer}.{need}" for need in how.needs if not (whole and need.endswith("_pass")))
    past = how.between if local.startswith("ln_final") else tuple(f"blocks.{layer}.{point}" for point in how.between)
    return Derivation(needs, how.compute, past)


def make_underivable_check(edited: Collection[str], model: GLM, past_entries: bool) -> Callable[[str], bool]:
    """Which points cannot be derived in a run with these edits, or with a cache that held entries before."""
    turns = any(local_name(name).startswith("rotary.") for name in edited)

    def unsound(name: str) -> bool:
        how, local = find_derivation(name, model), local_name(name)
        if how is None or name in edited or any(point in edited for point in how.between):
            return True
        return (turns and local.startswith("rotary.")) or (past_entries and local in ("kv.k", "kv.v"))

    return unsound


def select_points_to_store(names: Iterable[str], model: GLM, is_underivable: Callable[[str], bool]) -> list[str]:
    """Those of the names, given in the order in which they fire, from which the others follow."""
    available, stored = set[str](), []
    for name in names:
        how = None if is_underivable(name) else find_derivation(name, model)
        if how is None or not available.issuperset(how.needs):
            stored.append(name)
        available.add(name)
    return stored


def is_derivable(name: str, model: GLM, stored: Collection[str], is_underivable: Callable[[str], bool]) -> bool:
    """Whether a point is stored, or follows from what is stored through as many derivations as it takes."""
    if name in stored:
        return True
    how = None if is_underivable(name) else find_derivation(name, model)
    return how is not None and all(is_derivable(need, model, stored, is_underivable) for need in how.needs)


def derive_point(
    name: str, origin: RunContext, available: MutableMapping[str, Tensor], is_underivable: Callable[[str], bool]
) -> Tensor:
    """The value at a point that follows from what is there.

    The residual stream is remembered in `there` on the way, for every layer's follows from the one before.
    """
    if name in available:
        return available[name]
    how = find_derivation(name, origin.model)
    assert how is not None, name
    assert not is_underivable(name), name
    needs = [derive_point(need, origin, available, is_underivable) for need in how.needs]
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else len(origin.model.blocks) - 1
    found = how.compute(origin, origin.model.blocks[layer], *needs)
    if local_name(name).startswith("resid_"):
        available[name] = found
    return found
