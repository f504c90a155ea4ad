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

from glmlens.hooks import Hook, local_name
from glmlens.model import GLM, Block, additive_mask, eager, softmax, turn


@dataclass(frozen=True)
class Origin:
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
    line: Callable[..., Tensor]  # of the run's origin, the layer, and what it needs
    past: tuple[str, ...] = ()


class Caught(Exception):
    """Carries a value out of the middle of a computation."""


def caught(name: str, run: Callable[[Hook], object]) -> Tensor:
    """The value that `run` shows its hook under this name; what would follow it is not computed."""

    def hook(heard: str, x: Tensor) -> Tensor:
        if heard == name:
            raise Caught(x)
        return x

    try:
        run(hook)
    except Caught as e:
        return e.args[0]
    raise AssertionError(f"{name} was never shown")


def same(origin: Origin, block: Block, x: Tensor) -> Tensor:
    return x


def added(origin: Origin, block: Block, resid: Tensor, out: Tensor) -> Tensor:
    return resid + out


def joined(origin: Origin, block: Block, first: Tensor, *rest: Tensor) -> Tensor:
    return torch.cat([first, *rest], -1) if rest else first


def turned(origin: Origin, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turn(x[..., : origin.model.cfg.d_rotary], cos, sin)


def passed(origin: Origin, block: Block, x: Tensor) -> Tensor:
    return x[..., origin.model.cfg.d_rotary :]


def scores(origin: Origin, block: Block, k: Tensor, q_rot: Tensor, *q_pass: Tensor) -> Tensor:
    q = joined(origin, block, q_rot, *q_pass)
    return caught("attn.scores", lambda hook: eager(q, k, k, origin.mask, hook))


def result(origin: Origin, block: Block, z: Tensor) -> Tensor:
    W_O = rearrange(block.attn.out.weight, "model (head d) -> head d model", d=z.shape[-1])
    return einsum(z, W_O, "batch pos head d, head d model -> batch pos head model")


def act(origin: Origin, block: Block, gate: Tensor) -> Tensor:
    """silu of the gate laid out as in the run, beside `up`: the last bits depend on where rows begin."""
    both = gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])
    return F.silu(rearrange(both, "batch pos (two mlp) -> two batch pos mlp", two=2)[0].copy_(gate))


def ln1_post_scale(origin: Origin, block: Block, z: Tensor) -> Tensor:
    out = block.attn.out(rearrange(z, "batch pos head d -> batch pos (head d)"))
    return caught("scale", lambda hook: block.ln1_post(out, hook))


DERIVED: dict[str, Derivation] = {
    "resid_mid": Derivation(("resid_pre", "attn_out"), added),
    "resid_post": Derivation(("resid_mid", "mlp_out"), added),
    "ln1.scale": Derivation(("resid_pre",), lambda o, block, x: caught("scale", lambda hook: block.ln1(x, hook))),
    "ln1.normalized": Derivation(("resid_pre",), lambda o, block, x: block.ln1(x), past=("ln1.scale",)),
    "attn.q_rot": Derivation(("attn.q", "rotary.cos", "rotary.sin"), turned),
    "attn.k_rot": Derivation(("attn.k", "rotary.cos", "rotary.sin"), turned),
    "attn.q_pass": Derivation(("attn.q",), passed),
    "attn.k_pass": Derivation(("attn.k",), passed),
    "kv.k_new": Derivation(("attn.k_rot", "attn.k_pass"), joined),
    "kv.v_new": Derivation(("attn.v",), same),
    "kv.k": Derivation(("kv.k_new",), same),
    "kv.v": Derivation(("kv.v_new",), same),
    "attn.scores": Derivation(("kv.k", "attn.q_rot", "attn.q_pass"), scores),
    "attn.pattern": Derivation(("attn.scores",), lambda o, block, x: softmax(x, x.dtype)),
    "attn.result": Derivation(("attn.z",), result),
    "ln1_post.scale": Derivation(("attn.z",), ln1_post_scale, past=("attn.result",)),
    "ln2.scale": Derivation(("resid_mid",), lambda o, block, x: caught("scale", lambda hook: block.ln2(x, hook))),
    "ln2.normalized": Derivation(("resid_mid",), lambda o, block, x: block.ln2(x), past=("ln2.scale",)),
    "mlp.act": Derivation(("mlp.gate",), act),
    "mlp.post": Derivation(("mlp.up", "mlp.act"), lambda o, block, up, act: up * act),
    "ln2_post.scale": Derivation(
        ("mlp.post",), lambda o, block, x: caught("scale", lambda hook: block.ln2_post(block.mlp.down(x), hook))
    ),
    "ln_final.scale": Derivation(
        ("resid_post",), lambda o, block, x: caught("scale", lambda hook: o.model.ln_final(x, hook))
    ),
    "ln_final.normalized": Derivation(
        ("resid_post",), lambda o, block, x: o.model.ln_final(x), past=("ln_final.scale",)
    ),
}


def derivation(name: str, model: GLM) -> Derivation | None:
    """How the point of this full name follows in this model, its needs by their full names; None if it does not."""
    local, layers = local_name(name), len(model.blocks)
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else layers - 1
    if local == "resid_pre":
        return Derivation(("embed",) if layer == 0 else (f"blocks.{layer - 1}.resid_post",), same)
    if local in ("rotary.cos", "rotary.sin") and layer:
        return Derivation((f"blocks.0.{local}",), same)
    how = DERIVED.get(local)
    if how is None or (local.endswith("_post.scale") and not model.cfg.sandwich):
        return None
    whole = model.cfg.d_rotary == model.cfg.d_head
    needs = tuple(f"blocks.{layer}.{need}" for need in how.needs if not (whole and need.endswith("_pass")))
    past = how.past if local.startswith("ln_final") else tuple(f"blocks.{layer}.{point}" for point in how.past)
    return Derivation(needs, how.line, past)


def barred(edited: Collection[str], model: GLM, past_entries: bool) -> Callable[[str], bool]:
    """Which points cannot be derived in a run with these edits, or with a cache that held entries before."""
    turns = any(local_name(name).startswith("rotary.") for name in edited)

    def unsound(name: str) -> bool:
        how, local = derivation(name, model), local_name(name)
        if how is None or name in edited or any(point in edited for point in how.past):
            return True
        return (turns and local.startswith("rotary.")) or (past_entries and local in ("kv.k", "kv.v"))

    return unsound


def basis(names: Iterable[str], model: GLM, unsound: Callable[[str], bool]) -> list[str]:
    """Those of the names, given in the order in which they fire, from which the others follow."""
    available, stored = set[str](), []
    for name in names:
        how = None if unsound(name) else derivation(name, model)
        if how is None or not available.issuperset(how.needs):
            stored.append(name)
        available.add(name)
    return stored


def follows(name: str, model: GLM, stored: Collection[str], unsound: Callable[[str], bool]) -> bool:
    """Whether a point is stored, or follows from what is stored through as many derivations as it takes."""
    if name in stored:
        return True
    how = None if unsound(name) else derivation(name, model)
    return how is not None and all(follows(need, model, stored, unsound) for need in how.needs)


def derive(name: str, origin: Origin, there: MutableMapping[str, Tensor], unsound: Callable[[str], bool]) -> Tensor:
    """The value at a point that follows from what is there.

    The residual stream is remembered in `there` on the way, for every layer's follows from the one before.
    """
    if name in there:
        return there[name]
    how = derivation(name, origin.model)
    assert how is not None, name
    assert not unsound(name), name
    needs = [derive(need, origin, there, unsound) for need in how.needs]
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else len(origin.model.blocks) - 1
    found = how.line(origin, origin.model.blocks[layer], *needs)
    if local_name(name).startswith("resid_"):
        there[name] = found
    return found
