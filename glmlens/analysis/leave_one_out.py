"""Leave-one-out effects of KV-cache entries on the next token, and the effect of evicting several.

The prompt is run once. The next decoding step is one token, so a step without some entries is one row of a batch: it
starts at the first layer in which an entry is left out, from the residual stream of the full step. All rows share the
cached keys and values, and each has its own mask. So thousands of steps take a few ordinary passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.analysis.batch import Token, layer_labels, to_numpy
from glmlens.analysis.cache_reads import describe_step, label_keys, to_decoding_state
from glmlens.analysis.chunks import DecodingState
from glmlens.cache.selection import format_position_range
from glmlens.dtypes import upcast
from glmlens.hooks import Hooks
from glmlens.integers import Integers, read_integers
from glmlens.kv_cache import LayerKV
from glmlens.lens import Lens
from glmlens.model import rotary_angles
from glmlens.results import Labelled, LabelledGroup
from glmlens.text.prompts import Prompt

PASS_BYTES = 1 << 28  # memory for the scores and logits of the rows of one pass


@dataclass(frozen=True, eq=False)
class LeaveOneOut(LabelledGroup):
    """The effect on the next token of leaving out one entry: [layer, kv, key], or [key] by position.

    `kl` is KL(with all ‖ without it) in nats. `logit` is the answer's logit with all entries minus that without this
    one.
    """

    kl: Labelled
    logit: Labelled


@dataclass(frozen=True, eq=False)
class EvictionCurve(LabelledGroup):
    """Entries from the least to the most important, and the effect of evicting the first n of them.

    `alone` [entry] is the KL in nats of leaving out one entry, in ascending order. `together` [dropped] is the KL of
    evicting the first n at once.
    """

    alone: Labelled
    together: Labelled


@dataclass(frozen=True)
class ReadOnlyLayerKV(LayerKV):
    """One layer's cached entries, shared by all rows of a pass; nothing is written to the cache."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cached keys and values followed by those of the rows."""
        past_k = self.cache.keys[self.layer, :, : self.cache.length]
        past_v = self.cache.values[self.layer, :, : self.cache.length]
        return torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)


HiddenEntries = Callable[[int, Int[Tensor, "row"]], Bool[Tensor, "row kv key"]]
"""A function of a layer and row numbers that returns the entries each row does not see there."""


@dataclass(frozen=True, eq=False)
class DecodingStep:
    """The next decoding step with all entries: the residual stream before each layer, and the logits."""

    lens: Lens
    state: DecodingState
    resid: list[Float[Tensor, "one one model"]]
    logits: Float[Tensor, "vocab"]

    @staticmethod
    def record(lens: Lens, state: DecodingState) -> "DecodingStep":
        logits, acts = lens.run_with_cache(state.token[:, None], "resid_pre", kv=state.kv.fork(1))
        resid = [acts[f"blocks.{i}.resid_pre"] for i in range(lens.cfg.n_layers)]
        return DecodingStep(lens, state, resid, upcast(cast(Tensor, logits)[0, -1]))

    def run_without_entries(
        self, rows: Int[Tensor, "row"], hidden: HiddenEntries, start: int = 0
    ) -> Float[Tensor, "row vocab"]:
        """The logits of steps that lack entries, from layer `start` on; earlier ones they have all."""
        model, kv, many = self.lens.model, self.state.kv, len(rows)
        resid = self.resid[start].expand(1, many, -1)
        at = kv.next_positions()[:, None].expand(1, many)
        angles = rotary_angles(at, model.cfg, resid.dtype)
        for i in range(start, model.cfg.n_layers):
            mask = self.build_mask(hidden(i, rows), resid.dtype)
            resid = model.blocks[i](resid, angles, mask, ReadOnlyLayerKV(kv, i), lambda name, x: x)
        return upcast(model.unembed(model.ln_final(resid))[0])

    def build_mask(self, hidden: Bool[Tensor, "row kv key"], dtype: torch.dtype) -> Float[Tensor, "one head row seen"]:
        """0 at the entries that a row has and at itself, the smallest float at those it lacks and at other rows."""
        real = self.state.kv.positions[0, : self.state.kv.length] >= 0
        seen = repeat(real & ~hidden, "row kv key -> (kv group) row key", group=self.lens.cfg.n_groups)
        own = torch.eye(len(hidden), dtype=torch.bool, device=hidden.device).expand(len(seen), -1, -1)
        nothing = torch.zeros((), dtype=dtype, device=hidden.device)
        return torch.where(torch.cat([seen, own], 2), nothing, torch.finfo(dtype).min).unsqueeze(0)

    def measure_losses(
        self, rows: Int[Tensor, "row"], hidden: HiddenEntries, token: int, start: int = 0
    ) -> Float[Tensor, "two row"]:
        """KL(whole ‖ without) in nats and the logit of a token that is lost, of any number of rows."""
        cfg, past = self.lens.cfg, self.state.kv.length
        row_bytes = 4 * max(4 * cfg.n_heads * (past + 256), 3 * cfg.d_vocab)
        base, found = self.logits.log_softmax(-1), []
        for some in rows.split(max(1, min(256, PASS_BYTES // row_bytes))):
            logits = self.run_without_entries(some, hidden, start)
            kl = (base.exp() * (base - logits.log_softmax(-1))).sum(-1)
            found.append(torch.stack([kl, self.logits[token] - logits[:, token]]))
        return torch.cat(found, 1)


@dataclass(frozen=True, eq=False)
class NumberedEntries:
    """Entries by number: rows lack the one with theirs, or all whose number is below theirs."""

    entry_numbers: Int[Tensor, "layer kv key"]
    hide_all_below: bool = False

    def __call__(self, layer: int, rows: Int[Tensor, "row"]) -> Bool[Tensor, "row kv key"]:
        mine = rearrange(rows, "row -> row 1 1")
        return self.entry_numbers[layer] < mine if self.hide_all_below else self.entry_numbers[layer] == mine


def leave_one_out(
    lens: Lens,
    of: Prompt | DecodingState,
    answer: Token | None = None,
    *,
    by: str = "entry",
    positions: Integers = None,
    hooks: Hooks | None = None,
) -> LeaveOneOut:
    """What the next token loses with each entry: by "entry" (layer, kv, position), or by "position" in all layers.

    The past is as it was with all entries; the step that says the next token lacks one. `positions` are absolute:
    by default all in the cache; others are nan. `answer` is the token whose logit is followed, by default the most
    probable. `hooks` are on the run of the prompt, not on this step.
    """
    if by not in ("entry", "position"):
        raise ValueError(f"by is {by!r}; choose from 'entry', 'position'")
    memory = to_decoding_state(lens, of, hooks)
    step, cfg, length = DecodingStep.record(lens, memory), lens.cfg, memory.kv.length
    token = int(step.logits.argmax()) if answer is None else lens.to_answer(answer)
    asked = find_entry_columns(memory, positions)
    shape = (cfg.n_layers, cfg.n_kv_heads, length)
    if by == "position":
        number = torch.arange(length, device=lens.device).expand(shape)
        found = torch.full((2, length), torch.nan, dtype=step.logits.dtype, device=lens.device)
        found[:, asked] = step.measure_losses(asked, NumberedEntries(number), token)
    else:
        number = torch.arange(cfg.n_layers * cfg.n_kv_heads * length, device=lens.device).view(shape)
        found = torch.full((2, *shape), torch.nan, dtype=step.logits.dtype, device=lens.device)
        for layer in range(cfg.n_layers):
            lost = step.measure_losses(number[layer][:, asked].flatten(), NumberedEntries(number), token, layer)
            found[:, layer, :, asked] = lost.view(2, cfg.n_kv_heads, -1)
    about = describe_step(lens, memory, "what is lost with one entry", lens.answer_label(token))
    axes = ("layer", "kv", "key") if by == "entry" else ("key",)
    labels = {"key": label_keys(lens, memory), **({"layer": layer_labels(lens)} if by == "entry" else {})}
    units = {
        "kl": "KL(with all ‖ without it), nats",
        "logit": f"logit of {lens.answer_label(token)} with all, less without it",
    }
    made = {
        name: Labelled(to_numpy(x), axes, labels, {**about, "metric": units[name]})
        for name, x in zip(units, found, strict=True)
    }
    return LeaveOneOut(about, **made)


def find_entry_columns(state: DecodingState, positions: Integers) -> Int[Tensor, "column"]:
    """The columns of entries at these positions; IndexError for one that is not there, ValueError for none at all."""
    at = state.kv.positions[0, : state.kv.length]
    if positions is None:
        return (at >= 0).nonzero().squeeze(1)
    asked = read_integers(positions, "positions", mask_size=int(state.kv.next_positions()[0]), negative=True)
    wanted = torch.tensor(asked, dtype=torch.long, device=at.device)
    missing = wanted[(wanted < 0) | ~torch.isin(wanted, at)].tolist()
    if missing:
        raise IndexError(f"no entry at positions {missing}; there are {format_position_range(at[None])}")
    return torch.isin(at, wanted).nonzero().squeeze(1)


def eviction_curve(
    lens: Lens,
    of: Prompt | DecodingState,
    *,
    by: str = "position",
    counts: Integers = None,
    hooks: Hooks | None = None,
) -> EvictionCurve:
    """Rank entries by the KL that leaving out each alone costs, and measure the KL that dropping the n first costs.

    By "position", or by "entry" (layer, kv, position). `counts` are the n: by default up to 33 of them, from 0 to all.
    Both in nats, of the next token.
    """
    memory = to_decoding_state(lens, of, hooks)
    step, cfg, length = DecodingStep.record(lens, memory), lens.cfg, memory.kv.length
    kl = torch.from_numpy(leave_one_out(lens, memory, by=by).kl.values).to(lens.device)
    flat = torch.where(kl.isnan(), torch.inf, kl).flatten()
    order = flat.argsort(stable=True)[: int((~kl.isnan()).sum())]
    number = torch.full_like(flat, len(flat), dtype=torch.long)
    number[order] = torch.arange(len(order), device=lens.device)
    number = number.view(kl.shape).expand(cfg.n_layers, cfg.n_kv_heads, length)
    some = spread_counts(len(order)) if counts is None else list(read_integers(counts, "counts", negative=True))
    if min(some) < 0 or max(some) > len(order):
        raise ValueError(f"counts are {some}; there are {len(order)} entries to drop")
    rows = torch.tensor(some, device=lens.device)
    together = step.measure_losses(rows, NumberedEntries(number, hide_all_below=True), int(step.logits.argmax()))[0]
    about = describe_step(lens, memory, "what dropping entries costs", "KL(with all ‖ without), nats")
    keys = label_keys(lens, memory)
    places = [order // length // cfg.n_kv_heads, order // length % cfg.n_kv_heads, order % length]
    listed = zip(*(place.tolist() for place in places), strict=True)
    names = [keys[k] if by == "position" else f"layer {i}, kv {g}, {keys[k]}" for i, g, k in listed]
    alone = Labelled(
        to_numpy(flat[order]), ("entry",), {"entry": names}, {**about, "metric": "KL of one left out, nats"}
    )
    costs = Labelled(to_numpy(together), ("dropped",), {"dropped": [str(n) for n in some]}, about)
    return EvictionCurve(about, alone=alone, together=costs)


def spread_counts(n: int) -> list[int]:
    """At most 33 numbers from 0 to n, as evenly as whole numbers can be."""
    return sorted({round(n * i / 32) for i in range(33)})
