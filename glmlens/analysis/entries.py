"""Who reads what: how the next token depends on every entry of the KV cache, and which entries it can do without.

The past is run once. The next step is one token, so a step that lacks some entries is one row: it enters the first
layer that lacks any with the residual stream of the whole step, and all rows look at the same keys, each with a mask
of its own. So thousands of steps are a few ordinary passes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.analysis.passes import Memory, pieces
from glmlens.analysis.pattern import pattern, pattern_points
from glmlens.analysis.rows import Rows, Token, exact, finest, groups_of, label, layers_of, numbers
from glmlens.hooks import Hooks
from glmlens.kv_cache import LayerKV
from glmlens.lens import Lens
from glmlens.model import RMSNorm, rotary_angles
from glmlens.prompt import Prompt
from glmlens.results import Labelled, Sheets

ROW_BYTES = 1 << 28  # what the scores and logits of the rows of a pass may weigh


@dataclass(frozen=True, eq=False)
class Reads(Sheets):
    """How the step that says the next token reads every entry [layer, head, key]; the last key is its own.

    `attention` is the pattern. `weighted` is the length of what the head writes for it, |attention · v W_O|
    (Kobayashi et al. 2020, arXiv 2004.10102, section 2.3). `direct` is what that adds to the logit of the token said,
    through the final norm as it was.
    """

    attention: Labelled
    weighted: Labelled
    direct: Labelled

    def by_entry(self, sheet: str, n_kv_heads: int) -> Labelled:
        """A sheet summed over the query heads that share an entry: [layer, kv, key]."""
        of = self.sheets()[sheet]
        summed = of.values.reshape(of.shape[0], n_kv_heads, -1, of.shape[2]).sum(2)
        labels = {axis: of.labels[axis] for axis in ("layer", "key")}
        return Labelled(summed, ("layer", "kv", "key"), labels, {**of.about, "heads": "summed over the group"})


@dataclass(frozen=True, eq=False)
class LeftOut(Sheets):
    """What the next token loses when the step that says it lacks one entry: [layer, kv, key], or [key] by position.

    `kl` is KL(with all ‖ without it) in nats, `logit` the logit of the token with all entries less that without.
    """

    kl: Labelled
    logit: Labelled


@dataclass(frozen=True, eq=False)
class Droppable(Sheets):
    """Entries from the most to the least dispensable [entry], and what dropping the first n costs [dropped].

    `alone` [entry] is the KL in nats of leaving out that one, `together` [dropped] that of the n best at once.
    """

    alone: Labelled
    together: Labelled


def memory_of(lens: Lens, of: Prompt | Memory, hooks: Hooks | None = None) -> Memory:
    found = of if isinstance(of, Memory) else Memory.of(Rows.of(lens, of), hooks)
    if found.kv.batch != 1:
        raise ValueError(f"one prompt at a time here, not {found.kv.batch}")
    return found


def who_reads(
    lens: Lens,
    of: Prompt | Memory,
    answer: Token | None = None,
    wrong: Token | None = None,
    *,
    hooks: Hooks | None = None,
    step_hooks: Hooks | None = None,
) -> Reads:
    """How the step that says the next token reads every entry of a prompt, or of a generation's memory.

    `answer` (less `wrong`) is the text of one token or its id: by default the most probable. `hooks` are on the run of
    the prompt, `step_hooks` on this step. Units: shares of attention, lengths in the residual stream, logits.
    """
    memory = memory_of(lens, of, hooks)
    kv = memory.kv.fork(1)
    key_at = kv.with_positions(kv.next_positions()[:, None])
    post = ["ln1_post.scale"] if lens.cfg.sandwich else []
    names = [*pattern_points(lens), "kv.v", *post, "ln_final.scale"]
    rows = Rows(lens, memory.token[:, None], None)
    (piece,) = pieces(rows, names, step_hooks, kv=kv, logits=True)
    logits, acts = exact(cast(Tensor, piece.logits)[:, -1]), piece.acts
    direction, said = aimed(lens, logits[0], answer, wrong)
    pull = finest(direction) * finest(lens.model.ln_final.weight) * finest(acts["ln_final.scale"][0, 0])
    found = [read(lens, acts, layer, key_at, pull) for layer in range(lens.cfg.n_layers)]
    about = about_step(lens, memory, "how the next token's step reads", said)
    labels = {"layer": layers_of(lens), "key": [*key_labels(lens, memory), f"{int(key_at[0, -1])} itself"]}
    units = {"attention": "share of attention", "weighted": "length of what is written", "direct": f"logit of {said}"}
    sheets = {
        name: Labelled(numbers(torch.stack(x)), ("layer", "head", "key"), labels, {**about, "metric": units[name]})
        for name, x in zip(units, zip(*found, strict=True), strict=True)
    }
    return Reads(about, **sheets)


def aimed(lens: Lens, logits: Float[Tensor, "vocab"], answer: Token | None, wrong: Token | None) -> tuple[Tensor, str]:
    """The direction of a token's logit, or of a difference of two, and its name."""
    right = int(logits.argmax()) if answer is None else lens.to_answer(answer)
    if wrong is None:
        return exact(lens.W_U.T[right]), lens.answer_label(right)
    other = lens.to_answer(wrong)
    return exact(lens.W_U.T[right]) - exact(
        lens.W_U.T[other]
    ), f"{lens.answer_label(right)} - {lens.answer_label(other)}"


def read(
    lens: Lens, acts: Mapping[str, Tensor], layer: int, key_at: Tensor, pull: Float[Tensor, "model"]
) -> tuple[Tensor, ...]:
    """Attention, what it writes and what that adds to the logit, of one layer [head, key]."""
    weight = exact(pattern(acts, layer, key_at[:, -1:], key_at)[0, :, -1])
    v = repeat(exact(acts[f"blocks.{layer}.kv.v"][0]), "key kv d -> (kv group) key d", group=lens.cfg.n_groups)
    W_O = exact(lens.W_O[layer])
    gram = einsum(W_O, W_O, "head d model, head e model -> head d e")
    length = einsum(v, gram, v, "head key d, head d e, head key e -> head key").clamp(min=0).sqrt()
    norm = lens.model.blocks[layer].ln1_post
    if isinstance(norm, RMSNorm):  # linear, given its scale
        pull = pull * finest(norm.weight) * finest(acts[f"blocks.{layer}.ln1_post.scale"][0, 0])
    on_z = einsum(W_O, pull.to(W_O.dtype), "head d model, model -> head d")
    return weight, weight * length, weight * einsum(v, on_z, "head key d, head d -> head key")


def about_step(lens: Lens, memory: Memory, metric: str, direction: str) -> dict[str, str]:
    at = int(memory.kv.next_positions()[0])
    return {
        "metric": metric, "direction": direction, "positions": f"the step at position {at} reads {memory.kv.length}",
        "prompt": f"... {label(lens, int(memory.token[0]))}", "kv": groups_of(lens), "model": lens.model_hash,
    }  # fmt: skip


def key_labels(lens: Lens, memory: Memory) -> list[str]:
    at, tokens = (t[0, : memory.kv.length].tolist() for t in (memory.kv.positions, memory.kv.tokens))
    return [f"{p} {label(lens, token) if token >= 0 else '?'}" for p, token in zip(at, tokens, strict=True)]


# ---- without some entries ----


@dataclass(frozen=True)
class Behind(LayerKV):
    """One layer's entries, which all rows of a pass see before their own; nothing is written."""

    def remember(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past = (
            self.cache.keys[self.index, :, : self.cache.length],
            self.cache.values[self.index, :, : self.cache.length],
        )
        return torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)


Hidden = Callable[[int, Int[Tensor, "row"]], Bool[Tensor, "row kv key"]]
"""From a layer and the numbers of rows to the entries that each of them lacks there."""


@dataclass(frozen=True, eq=False)
class Step:
    """The step that says the next token, as it was: the stream that enters each layer, and its log-probabilities."""

    lens: Lens
    memory: Memory
    resid: list[Float[Tensor, "one one model"]]
    logits: Float[Tensor, "vocab"]

    @staticmethod
    def of(lens: Lens, memory: Memory) -> "Step":
        logits, acts = lens.run_with_cache(memory.token[:, None], "resid_pre", kv=memory.kv.fork(1))
        resid = [acts[f"blocks.{i}.resid_pre"] for i in range(lens.cfg.n_layers)]
        return Step(lens, memory, resid, exact(cast(Tensor, logits)[0, -1]))

    def without(self, rows: Int[Tensor, "row"], hidden: Hidden, start: int = 0) -> Float[Tensor, "row vocab"]:
        """The logits of steps that lack entries, from layer `start` on; earlier ones they have all."""
        model, kv, many = self.lens.model, self.memory.kv, len(rows)
        resid = self.resid[start].expand(1, many, -1)
        at = kv.next_positions()[:, None].expand(1, many)
        angles = rotary_angles(at, model.cfg.d_rotary, model.cfg.rope_theta, resid.dtype)
        for i in range(start, model.cfg.n_layers):
            mask = self.mask(hidden(i, rows), resid.dtype)
            resid = model.blocks[i](resid, angles, mask, Behind(kv, i), lambda name, x: x)
        return exact(model.unembed(model.ln_final(resid))[0])

    def mask(self, hidden: Bool[Tensor, "row kv key"], dtype: torch.dtype) -> Float[Tensor, "one head row seen"]:
        """0 at the entries that a row has and at itself, the smallest float at those it lacks and at other rows."""
        real = self.memory.kv.positions[0, : self.memory.kv.length] >= 0
        seen = repeat(real & ~hidden, "row kv key -> (kv group) row key", group=self.lens.cfg.n_groups)
        own = torch.eye(len(hidden), dtype=torch.bool, device=hidden.device).expand(len(seen), -1, -1)
        nothing = torch.zeros((), dtype=dtype, device=hidden.device)
        return torch.where(torch.cat([seen, own], 2), nothing, torch.finfo(dtype).min).unsqueeze(0)

    def measured(
        self, rows: Int[Tensor, "row"], hidden: Hidden, token: int, start: int = 0
    ) -> Float[Tensor, "two row"]:
        """KL(whole ‖ without) in nats and the logit of a token that is lost, of any number of rows."""
        cfg, past = self.lens.cfg, self.memory.kv.length
        row_bytes = 4 * max(4 * cfg.n_heads * (past + 256), 3 * cfg.d_vocab)
        base, found = self.logits.log_softmax(-1), []
        for some in rows.split(max(1, min(256, ROW_BYTES // row_bytes))):
            logits = self.without(some, hidden, start)
            kl = (base.exp() * (base - logits.log_softmax(-1))).sum(-1)
            found.append(torch.stack([kl, self.logits[token] - logits[:, token]]))
        return torch.cat(found, 1)


@dataclass(frozen=True, eq=False)
class Numbered:
    """Entries by number: rows lack the one with theirs, or all whose number is below theirs."""

    number: Int[Tensor, "layer kv key"]
    below: bool = False

    def __call__(self, layer: int, rows: Int[Tensor, "row"]) -> Bool[Tensor, "row kv key"]:
        mine = rearrange(rows, "row -> row 1 1")
        return self.number[layer] < mine if self.below else self.number[layer] == mine


def leave_one_out(
    lens: Lens,
    of: Prompt | Memory,
    answer: Token | None = None,
    *,
    by: str = "entry",
    positions: Sequence[int] | None = None,
    hooks: Hooks | None = None,
) -> LeftOut:
    """What the next token loses with each entry: by "entry" (layer, kv, position), or by "position" in all layers.

    The past is as it was with all entries; the step that says the next token lacks one. `positions` are absolute:
    by default all in the cache; others are nan. `answer` is the token whose logit is followed, by default the most
    probable. `hooks` are on the run of the prompt, not on this step.
    """
    if by not in ("entry", "position"):
        raise ValueError(f"by is {by!r}; choose from 'entry', 'position'")
    memory = memory_of(lens, of, hooks)
    step, cfg, length = Step.of(lens, memory), lens.cfg, memory.kv.length
    token = int(step.logits.argmax()) if answer is None else lens.to_answer(answer)
    asked = asked_of(memory, positions)
    shape = (cfg.n_layers, cfg.n_kv_heads, length)
    if by == "position":
        number = torch.arange(length, device=lens.device).expand(shape)
        found = torch.full((2, length), torch.nan, dtype=step.logits.dtype, device=lens.device)
        found[:, asked] = step.measured(asked, Numbered(number), token)
    else:
        number = torch.arange(cfg.n_layers * cfg.n_kv_heads * length, device=lens.device).view(shape)
        found = torch.full((2, *shape), torch.nan, dtype=step.logits.dtype, device=lens.device)
        for layer in range(cfg.n_layers):
            lost = step.measured(number[layer][:, asked].flatten(), Numbered(number), token, layer)
            found[:, layer, :, asked] = lost.view(2, cfg.n_kv_heads, -1)
    about = about_step(lens, memory, "what is lost with one entry", lens.answer_label(token))
    axes = ("layer", "kv", "key") if by == "entry" else ("key",)
    labels = {"key": key_labels(lens, memory), **({"layer": layers_of(lens)} if by == "entry" else {})}
    units = {
        "kl": "KL(with all ‖ without it), nats",
        "logit": f"logit of {lens.answer_label(token)} with all, less without it",
    }
    made = {
        name: Labelled(numbers(x), axes, labels, {**about, "metric": units[name]})
        for name, x in zip(units, found, strict=True)
    }
    return LeftOut(about, **made)


def asked_of(memory: Memory, positions: Sequence[int] | None) -> Int[Tensor, "column"]:
    """The columns of entries at these positions; IndexError for one that is not there."""
    at = memory.kv.positions[0, : memory.kv.length]
    if positions is None:
        return (at >= 0).nonzero().squeeze(1)
    wanted = torch.tensor(list(positions), dtype=torch.long, device=at.device)
    missing = wanted[~torch.isin(wanted, at)].tolist()
    if missing:
        raise IndexError(f"no entry at positions {missing}; there are {int(at.min())} to {int(at.max())}")
    return torch.isin(at, wanted).nonzero().squeeze(1)


def droppable(
    lens: Lens,
    of: Prompt | Memory,
    *,
    by: str = "position",
    counts: Sequence[int] | None = None,
    hooks: Hooks | None = None,
) -> Droppable:
    """Rank entries by the KL that leaving out each alone costs, and measure the KL that dropping the n first costs.

    By "position", or by "entry" (layer, kv, position). `counts` are the n: by default up to 33 of them, from 0 to all.
    Both in nats, of the next token.
    """
    memory = memory_of(lens, of, hooks)
    step, cfg, length = Step.of(lens, memory), lens.cfg, memory.kv.length
    kl = torch.from_numpy(leave_one_out(lens, memory, by=by).kl.values).to(lens.device)
    flat = torch.where(kl.isnan(), torch.inf, kl).flatten()
    order = flat.argsort(stable=True)[: int((~kl.isnan()).sum())]
    number = torch.full_like(flat, len(flat), dtype=torch.long)
    number[order] = torch.arange(len(order), device=lens.device)
    number = number.view(kl.shape).expand(cfg.n_layers, cfg.n_kv_heads, length)
    some = spread(len(order)) if counts is None else list(counts)
    if not some or min(some) < 0 or max(some) > len(order):
        raise ValueError(f"counts are {some}; there are {len(order)} entries to drop")
    rows = torch.tensor(some, device=lens.device)
    together = step.measured(rows, Numbered(number, below=True), int(step.logits.argmax()))[0]
    about = about_step(lens, memory, "what dropping entries costs", "KL(with all ‖ without), nats")
    keys = key_labels(lens, memory)
    places = [order // length // cfg.n_kv_heads, order // length % cfg.n_kv_heads, order % length]
    listed = zip(*(place.tolist() for place in places), strict=True)
    names = [keys[k] if by == "position" else f"layer {i}, kv {g}, {keys[k]}" for i, g, k in listed]
    alone = Labelled(
        numbers(flat[order]), ("entry",), {"entry": names}, {**about, "metric": "KL of one left out, nats"}
    )
    costs = Labelled(numbers(together), ("dropped",), {"dropped": [str(n) for n in some]}, about)
    return Droppable(about, alone=alone, together=costs)


def spread(n: int) -> list[int]:
    """At most 33 numbers from 0 to n, as evenly as whole numbers can be."""
    return sorted({round(n * i / 32) for i in range(33)})


def attended(lens: Lens, prompt: Prompt, *, hooks: Hooks | None = None) -> Float[Tensor, "layer head key"]:
    """How much attention every entry of a prompt got in sum over its queries: what heavy hitters are chosen by.

    A piece at a time, a layer at a time. Of one prompt; its last token's own entry is among them.
    """
    rows = Rows.of(lens, prompt)
    if rows.batch != 1:
        raise ValueError(f"one prompt at a time here, not {rows.batch}")
    at, length = rows.positions, rows.tokens.shape[1]
    found = torch.zeros(lens.cfg.n_layers, lens.cfg.n_heads, length, device=lens.device)
    for piece in pieces(rows, pattern_points(lens), hooks):
        for layer in range(lens.cfg.n_layers):
            seen = slice(0, piece.columns.stop)
            x = pattern(piece.acts, layer, at[:, piece.columns], at[:, seen])
            found[layer, :, seen] += x[0].to(found.dtype).sum(1)
    return found
