"""A prompt run in pieces through a KV cache: what is in memory at a time is a piece's, however long the prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from glmlens.analysis.batch import PromptBatch
from glmlens.hook_points import HookError, Point
from glmlens.hooks import Edit, Hooks, Only, get_edit_name, list_edits
from glmlens.kv_cache import KVCache
from glmlens.recording.activations import Activations

CHUNK_SIZE = 512  # positions at a time


@dataclass
class DeferredEdit:
    """An edit that holds at some positions, in a run whose pieces need not all have them."""

    edit: Only
    applied: bool = False

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        if self.edit.select_positions(point) is None:
            return x
        self.applied = True
        return self.edit(x, point)


@dataclass(frozen=True, eq=False)
class PromptChunk:
    """One piece of a run: the columns of the batch that it ran, their logits (or None), and what was recorded."""

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
    """Run the rows in pieces of `size` positions, behind what `kv` remembers, and leave them in it.

    Hooks work as in one pass: `only` at positions of any piece, HookError at the end where they never came. At `kv.k`
    and `kv.v` a piece reads the entries up to its own end.
    """
    edits: list[tuple[str, Edit]] = [
        (name, DeferredEdit(fn) if isinstance(fn, Only) else fn) for name, fn in list_edits(hooks)
    ]
    kv = rows.lens.new_kv(rows.batch, rows.tokens.shape[1]) if kv is None else kv
    keep = None if logits else torch.zeros(0, dtype=torch.long, device=rows.tokens.device)
    for start in range(0, rows.tokens.shape[1], size):
        here = slice(start, min(start + size, rows.tokens.shape[1]))
        # A piece may begin with the padding id in the middle of a prompt: only a mask says that it is a token.
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
    """What is at the named points, which have an axis `pos` or are `kv.k` and `kv.v`, over all positions."""
    found: dict[str, list[Tensor]] = {}
    for piece in run_in_chunks(rows, names, hooks, size=size):
        for name in piece.acts:
            found.setdefault(name, []).append(piece.acts[name])
    whole = ("kv.k", "kv.v")  # the last piece has read all entries
    return {name: xs[-1] if name.endswith(whole) else torch.cat(xs, 1) for name, xs in found.items()}


@dataclass(frozen=True, eq=False)
class DecodingState:
    """A generation about to say something: what it remembers, and the last token, which the next step runs."""

    kv: KVCache
    token: Int[Tensor, "batch"]

    @staticmethod
    def from_batch(
        rows: PromptBatch, hooks: Hooks | None = None, *, size: int = CHUNK_SIZE, room: int = 1
    ) -> "DecodingState":
        """The memory of prompts, run in pieces; ValueError for a prompt of one token."""
        before = PromptBatch(rows.lens, rows.tokens[:, :-1], None if rows.mask is None else rows.mask[:, :-1])
        if not before.tokens.shape[1]:
            raise ValueError("a prompt of one token has nothing to remember: give at least two")
        kv = rows.lens.new_kv(rows.batch, rows.tokens.shape[1] + room)
        for _ in run_in_chunks(before, hooks=hooks, kv=kv, size=size):
            pass
        return DecodingState(kv, rows.tokens[:, -1])
