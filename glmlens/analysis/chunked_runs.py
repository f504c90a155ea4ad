"""Run a prompt in chunks through a KV cache, so that activations of one chunk at a time are in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from glmlens.analysis.prompt_batch import PromptBatch
from glmlens.hook_points import HookError, Point
from glmlens.hooks import Edit, Hooks, Only, get_edit_name, list_edits
from glmlens.kv_cache import KVCache
from glmlens.recording.activations import Activations

CHUNK_SIZE = 512  # positions at a time


@dataclass
class DeferredEdit:
    """An edit at some positions, in a run whose chunks need not all have them; `applied` once one had."""

    edit: Only
    applied: bool = False

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        if self.edit.select_positions(point) is None:
            return x
        self.applied = True
        return self.edit(x, point)


@dataclass(frozen=True, eq=False)
class PromptChunk:
    """One chunk of a run: the columns of the batch that were run, their logits (or None), and the activations."""

    columns: slice
    logits: Tensor | None
    acts: Activations


def run_in_chunks(
    rows: PromptBatch,
    names: str | Sequence[str] = (),
    hooks: Hooks | None = None,
    *,
    kv: KVCache | None = None,
    logits: bool = False,
    size: int = CHUNK_SIZE,
) -> Iterator[PromptChunk]:
    """Run the prompts in chunks of `size` positions after the entries of `kv`, and write their entries into it.

    Hooks work as in one pass: `only` may name positions of any chunk, and HookError is raised at the end for positions
    that never came. At `kv.k` and `kv.v` a chunk records the entries up to its own end.
    """
    edits: list[tuple[str, Edit]] = [
        (name, DeferredEdit(fn) if isinstance(fn, Only) else fn) for name, fn in list_edits(hooks)
    ]
    kv = rows.lens.new_kv(rows.batch, rows.tokens.shape[1]) if kv is None else kv
    # Without logits, unembed no position at all.
    keep = None if logits else torch.zeros(0, dtype=torch.long, device=rows.tokens.device)
    for start in range(0, rows.tokens.shape[1], size):
        here = slice(start, min(start + size, rows.tokens.shape[1]))
        # A chunk may begin with the padding id in the middle of a prompt: only with a mask is it a token there.
        mask = torch.ones_like(rows.tokens[:, here]) if rows.mask is None else rows.mask[:, here]
        out, acts = rows.lens.run_with_cache(
            rows.tokens[:, here], names, edits, kv=kv, attention_mask=mask, logits_to_keep=keep, logits=logits
        )
        yield PromptChunk(here, out, acts)
    for name, edit in edits:
        if isinstance(edit, DeferredEdit) and not edit.applied:
            raise HookError(f"{name!r}: {get_edit_name(edit.edit)} asked for steps or positions that never came")


def record_in_chunks(
    rows: PromptBatch, names: Sequence[str], hooks: Hooks | None = None, *, size: int = CHUNK_SIZE
) -> dict[str, Tensor]:
    """Return the activations at the named points over all positions; each has an axis `pos`, or is `kv.k` or `kv.v`."""
    by_chunk: dict[str, list[Tensor]] = {}
    for chunk in run_in_chunks(rows, names, hooks, size=size):
        for name in chunk.acts:
            by_chunk.setdefault(name, []).append(chunk.acts[name])
    all_entries = ("kv.k", "kv.v")  # the last chunk has read them all
    return {name: xs[-1] if name.endswith(all_entries) else torch.cat(xs, 1) for name, xs in by_chunk.items()}


@dataclass(frozen=True, eq=False)
class DecodingState:
    """A generation before its next step: the KV cache, and the last token, which that step runs."""

    kv: KVCache
    token: Int[Tensor, "batch"]

    @staticmethod
    def from_batch(
        rows: PromptBatch, hooks: Hooks | None = None, *, size: int = CHUNK_SIZE, room: int = 1
    ) -> "DecodingState":
        """Run prompts in chunks, all but their last token, and return the state before it.

        `room` is the number of further entries that the cache can take. Raises ValueError for a prompt of one token.
        """
        before = PromptBatch(rows.lens, rows.tokens[:, :-1], None if rows.mask is None else rows.mask[:, :-1])
        if not before.tokens.shape[1]:
            raise ValueError("a prompt of one token leaves the cache empty: give at least two")
        kv = rows.lens.new_kv(rows.batch, rows.tokens.shape[1] + room)
        for _ in run_in_chunks(before, hooks=hooks, kv=kv, size=size):
            pass  # the run fills the cache
        return DecodingState(kv, rows.tokens[:, -1])
