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

from glmlens.analysis.cache_reads import describe_step, label_keys, to_decoding_state
from glmlens.analysis.chunked_runs import DecodingState
from glmlens.analysis.prompt_batch import Token, layer_labels, to_numpy
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
        """Run the next step of a decoding state, on a copy of its cache."""
        logits, acts = lens.run_with_cache(state.token[:, None], "resid_pre", kv=state.kv.fork(1))
        resid = [acts[f"blocks.{i}.resid_pre"] for i in range(lens.cfg.n_layers)]
        return DecodingStep(lens, state, resid, upcast(cast(Tensor, logits)[0, -1]))

    def run_without_entries(
        self, rows: Int[Tensor, "row"], hidden: HiddenEntries, start: int = 0
    ) -> Float[Tensor, "row vocab"]:
        """Return the logits of steps without the `hidden` entries, each a row, run from layer `start` on.

        No row may hide an entry before that layer.
        """
        model, kv = self.lens.model, self.state.kv
        # The rows are positions of one sequence to the model: all rotate as the step does, and see the same cache.
        resid = self.resid[start].expand(1, len(rows), -1)
        positions = kv.next_positions()[:, None].expand(1, len(rows))
        angles = rotary_angles(positions, model.cfg, resid.dtype)
        for i in range(start, model.cfg.n_layers):
            mask = self.build_mask(hidden(i, rows), resid.dtype)
            resid = model.blocks[i](resid, angles, mask, ReadOnlyLayerKV(kv, i), lambda name, x: x)
        return upcast(model.unembed(model.ln_final(resid))[0])

    def build_mask(self, hidden: Bool[Tensor, "row kv key"], dtype: torch.dtype) -> Float[Tensor, "one head row seen"]:
        """Return an additive mask: 0 at the entries a row sees and at its own, the lowest float everywhere else."""
        # Columns: the cached entries, then one own entry per row, which no other row sees.
        is_entry = self.state.kv.positions[0, : self.state.kv.length] >= 0
        visible = repeat(is_entry & ~hidden, "row kv key -> (kv group) row key", group=self.lens.cfg.n_groups)
        own = torch.eye(len(hidden), dtype=torch.bool, device=hidden.device).expand(len(visible), -1, -1)
        zero = torch.zeros((), dtype=dtype, device=hidden.device)
        return torch.where(torch.cat([visible, own], 2), zero, torch.finfo(dtype).min).unsqueeze(0)

    def measure_losses(
        self, rows: Int[Tensor, "row"], hidden: HiddenEntries, token: int, start: int = 0
    ) -> Float[Tensor, "two row"]:
        """Return KL(with all ‖ without) in nats and the decrease of a token's logit, of any number of rows."""
        cfg = self.lens.cfg
        # In float32: about four copies of the scores (past entries and up to 256 rows), or three of the logits.
        row_bytes = 4 * max(4 * cfg.n_heads * (self.state.kv.length + 256), 3 * cfg.d_vocab)
        rows_per_pass = max(1, min(256, PASS_BYTES // row_bytes))
        full = self.logits.log_softmax(-1)
        losses = []
        for rows_of_pass in rows.split(rows_per_pass):
            logits = self.run_without_entries(rows_of_pass, hidden, start)
            kl = (full.exp() * (full - logits.log_softmax(-1))).sum(-1)
            losses.append(torch.stack([kl, self.logits[token] - logits[:, token]]))
        return torch.cat(losses, 1)


@dataclass(frozen=True, eq=False)
class NumberedEntries:
    """Hide entries by number: a row n lacks the entries with number n, or all entries with a number below n."""

    entry_numbers: Int[Tensor, "layer kv key"]
    hide_all_below: bool = False

    def __call__(self, layer: int, rows: Int[Tensor, "row"]) -> Bool[Tensor, "row kv key"]:
        row_numbers = rearrange(rows, "row -> row 1 1")
        if self.hide_all_below:
            return self.entry_numbers[layer] < row_numbers
        return self.entry_numbers[layer] == row_numbers


def leave_one_out(
    lens: Lens,
    of: Prompt | DecodingState,
    answer: Token | None = None,
    *,
    by: str = "entry",
    positions: Integers = None,
    hooks: Hooks | None = None,
) -> LeaveOneOut:
    """Measure the effect on the next token of leaving out each entry, or each position.

    `by` is "entry" (layer, kv, position), or "position" (in all layers and heads). Only the next decoding step lacks
    it: the cached keys and values were computed with all entries. `positions` are absolute, by default all present;
    others are nan. `answer` is the token whose logit is measured, by default the most probable. `hooks` are on the run
    of the prompt, not on this step. Raises ValueError for another `by` or several prompts, IndexError for a position
    without an entry.
    """
    if by not in ("entry", "position"):
        raise ValueError(f"by is {by!r}; choose from 'entry', 'position'")
    state = to_decoding_state(lens, of, hooks)
    step = DecodingStep.record(lens, state)
    cfg, length = lens.cfg, state.kv.length
    token = int(step.logits.argmax()) if answer is None else lens.to_answer(answer)
    columns = find_entry_columns(state, positions)
    shape = (cfg.n_layers, cfg.n_kv_heads, length)
    labels = {"key": label_keys(lens, state)}
    if by == "position":
        axes = ("key",)
        number = torch.arange(length, device=lens.device).expand(shape)  # one number in all layers and heads
        losses = torch.full((2, length), torch.nan, dtype=step.logits.dtype, device=lens.device)
        losses[:, columns] = step.measure_losses(columns, NumberedEntries(number), token)
    else:
        axes = ("layer", "kv", "key")
        labels["layer"] = layer_labels(lens)
        number = torch.arange(cfg.n_layers * cfg.n_kv_heads * length, device=lens.device).view(shape)
        losses = torch.full((2, *shape), torch.nan, dtype=step.logits.dtype, device=lens.device)
        for layer in range(cfg.n_layers):  # rows that lack an entry of this layer start in it
            rows = number[layer][:, columns].flatten()
            of_layer = step.measure_losses(rows, NumberedEntries(number), token, layer)
            losses[:, layer, :, columns] = of_layer.view(2, cfg.n_kv_heads, -1)
    about = describe_step(lens, state, "leave-one-out effect of each entry", lens.answer_label(token))
    metrics = {
        "kl": "KL(with all ‖ without it), nats",
        "logit": f"logit of {lens.answer_label(token)} with all, less without it",
    }
    sheets = {
        name: Labelled(to_numpy(x), axes, labels, {**about, "metric": metrics[name]})
        for name, x in zip(metrics, losses, strict=True)
    }
    return LeaveOneOut(about, **sheets)


def find_entry_columns(state: DecodingState, positions: Integers) -> Int[Tensor, "column"]:
    """Return the columns of the entries at these positions; None means all.

    Raises IndexError for a position without an entry, ValueError for no position at all.
    """
    present = state.kv.positions[0, : state.kv.length]
    if positions is None:
        return (present >= 0).nonzero().squeeze(1)
    numbers = read_integers(positions, "positions", mask_size=int(state.kv.next_positions()[0]), negative=True)
    wanted = torch.tensor(numbers, dtype=torch.long, device=present.device)
    # Numbers below 0 are padding and evicted entries in a cache, never positions from its end.
    missing = wanted[(wanted < 0) | ~torch.isin(wanted, present)].tolist()
    if missing:
        raise IndexError(f"no entry at positions {missing}; there are {format_position_range(present[None])}")
    return torch.isin(present, wanted).nonzero().squeeze(1)


def eviction_curve(
    lens: Lens,
    of: Prompt | DecodingState,
    *,
    by: str = "position",
    counts: Integers = None,
    hooks: Hooks | None = None,
) -> EvictionCurve:
    """Rank entries by the KL of leaving out each alone, and measure the KL of evicting the first n together.

    By "position", or by "entry" (layer, kv, position). `counts` are the n: by default up to 33 of them, from 0 to all.
    Both KL in nats, of the next token. Raises ValueError for a count outside 0 to the number of entries.
    """
    state = to_decoding_state(lens, of, hooks)
    step = DecodingStep.record(lens, state)
    cfg, length = lens.cfg, state.kv.length
    kl = torch.from_numpy(leave_one_out(lens, state, by=by).kl.values).to(lens.device)
    flat = torch.where(kl.isnan(), torch.inf, kl).flatten()
    order = flat.argsort(stable=True)[: int((~kl.isnan()).sum())]  # nan, not an entry, is not ranked
    # Number the entries by rank: the row of a count n then lacks all with a number below n.
    number = torch.full_like(flat, len(flat), dtype=torch.long)
    number[order] = torch.arange(len(order), device=lens.device)
    number = number.view(kl.shape).expand(cfg.n_layers, cfg.n_kv_heads, length)
    numbers = spread_counts(len(order)) if counts is None else list(read_integers(counts, "counts", negative=True))
    if min(numbers) < 0 or max(numbers) > len(order):
        raise ValueError(f"counts are {numbers}; there are {len(order)} entries to evict")
    rows = torch.tensor(numbers, device=lens.device)
    together = step.measure_losses(rows, NumberedEntries(number, hide_all_below=True), int(step.logits.argmax()))[0]
    about = describe_step(lens, state, "effect of evicting entries", "KL(with all ‖ without), nats")
    keys = label_keys(lens, state)
    # From a flat index to layer, key-value head and column; by position there is the column only.
    indices = [order // length // cfg.n_kv_heads, order // length % cfg.n_kv_heads, order % length]
    ranked = zip(*(index.tolist() for index in indices), strict=True)
    names = [keys[k] if by == "position" else f"layer {i}, kv {g}, {keys[k]}" for i, g, k in ranked]
    alone_about = {**about, "metric": "KL of one left out, nats"}
    return EvictionCurve(
        about,
        alone=Labelled(to_numpy(flat[order]), ("entry",), {"entry": names}, alone_about),
        together=Labelled(to_numpy(together), ("dropped",), {"dropped": [str(n) for n in numbers]}, about),
    )


def spread_counts(n: int) -> list[int]:
    """Return at most 33 whole numbers from 0 to n, evenly spaced."""
    return sorted({round(n * i / 32) for i in range(33)})
