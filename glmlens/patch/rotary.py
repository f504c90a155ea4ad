"""Rotary surgery: other angles for one layer, head, pair, for queries or keys alone, as ordinary hooks.

Every function returns a list of (point, edit) for `run_with_hooks` and `generate`. The places are `layer=`, `pair=`
and one of `head=` (query heads) and `kv=` (a key-value head with all the heads that read it); None means all. `of` is
"both", "q" or "k". What is turned otherwise by `of="k"`, or for whole groups, is remembered so. One query head of
several on a key-value head cannot have keys of its own: for `head=` with `of="both"` its scores are made anew instead,
which needs attention="eager".

Lists of other pairs or other tokens add up, [*freeze(lens, pair=0), *shift(lens, {4: 3}, pair=1)]; for one head of a
group with `of="both"` of other pairs alone: give its tokens in one call. Of two that turn the same pair of the same
token the second holds, unless they are of queries or keys alone: those turn on from where they are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from glmlens.analysis.batch import PromptBatch, to_numpy
from glmlens.analysis.chunks import run_in_chunks
from glmlens.config import GLMConfig
from glmlens.hook_points import Point
from glmlens.hooks import Edit, Hooks, only
from glmlens.integers import Integer, Integers, read_integer
from glmlens.lens import Lens
from glmlens.model import Angles
from glmlens.patch.sites import PatchError, to_place_tuple
from glmlens.patch.values import number
from glmlens.results import Labelled, LabelledGroup
from glmlens.rotary_rules import (
    RotaryRule,
    compute_angles,
    compute_pair_frequencies,
    freeze_positions,
    get_rope_attention_factor,
    rerotate_channels,
    shift_positions,
    stretch_context,
    zero_rotary,
)
from glmlens.text.prompts import Prompt

IndexSelection = Integers
RotaryEdits = list[tuple[str, Edit]]


def freeze(
    lens: Lens,
    *,
    at: Integer = 0,
    layer: IndexSelection = None,
    head: IndexSelection = None,
    kv: IndexSelection = None,
    pair: IndexSelection = None,
    of: str = "both",
) -> RotaryEdits:
    """Pairs turn as at position `at`, wherever a token stands: of both sides, they compare content without distance."""
    at = read_integer(at, "at", least=0, error=PatchError)
    return rotary_edit(lens, freeze_positions(at), layer=layer, head=head, kv=kv, pair=pair, of=of)


def silence(
    lens: Lens,
    *,
    layer: IndexSelection = None,
    head: IndexSelection = None,
    kv: IndexSelection = None,
    pair: IndexSelection = None,
    of: str = "both",
) -> RotaryEdits:
    """The channels of pairs become zero and add nothing to any score."""
    return rotary_edit(lens, zero_rotary, layer=layer, head=head, kv=kv, pair=pair, of=of)


def shift(
    lens: Lens,
    by: Integer | Mapping[Integer, Integer],
    *,
    layer: IndexSelection = None,
    head: IndexSelection = None,
    kv: IndexSelection = None,
    pair: IndexSelection = None,
    of: str = "both",
) -> RotaryEdits:
    """Tokens turn as if they stood `by` positions later: all, or {absolute position: by how many}.

    They stay where they are: who may see whom does not change. HookError (when it is run) for positions that never
    come.
    """
    far = shifts(by)
    edits = rotary_edit(lens, shift_positions(far), layer=layer, head=head, kv=kv, pair=pair, of=of)
    if isinstance(far, int):
        return edits
    of_keys = any(name.endswith("attn.scores") for name, _ in edits)  # made anew wherever such a key is recalled
    return [(name, only(fn, positions=list(far)) if name.endswith("kv.k") or not of_keys else fn) for name, fn in edits]


def shifts(by: Any) -> int | dict[int, int]:
    """How far tokens are moved, all alike or by position; PatchError for what are no whole numbers."""
    if not isinstance(by, Mapping):
        return read_integer(by, "by", error=PatchError)
    if not by:
        raise PatchError("by came out empty: give how far to move at least one position, {4: 3}")
    at = [read_integer(position, "a position to shift", least=0, error=PatchError) for position in by]
    return dict(zip(at, (read_integer(far, f"by[{p}]", error=PatchError) for p, far in by.items()), strict=True))


def stretch(
    lens: Lens,
    kind: str,
    factor: float | int | Any,
    *,
    context: Integer | None = None,
    layer: IndexSelection = None,
    head: IndexSelection = None,
    kv: IndexSelection = None,
    pair: IndexSelection = None,
    of: str = "both",
) -> RotaryEdits:
    """Pairs turn by a rule that extends contexts: "theta", "linear", "ntk" or "yarn"; see `stretched_turning`."""
    context = None if context is None else read_integer(context, "context", least=1, error=PatchError)
    factor = number(factor, "stretch: factor")
    rule = stretch_context(lens.cfg, kind, factor, context)
    return rotary_edit(lens, rule, layer=layer, head=head, kv=kv, pair=pair, of=of)


def rotary_edit(
    lens: Lens,
    rule: RotaryRule,
    *,
    layer: IndexSelection = None,
    head: IndexSelection = None,
    kv: IndexSelection = None,
    pair: IndexSelection = None,
    of: str = "both",
) -> RotaryEdits:
    """Pairs turn by any rule, a function from positions [batch, pos] and frequencies [pair] to cos and sin.

    Raises PatchError for a place that this model has not got, and HookError (when it is run) for one head of a group
    under attention="sdpa", which writes no scores.
    """
    cfg = lens.cfg
    if of not in ("both", "q", "k"):
        raise PatchError(f"of is {of!r}; choose from 'both', 'q', 'k'")
    if head is not None and (kv is not None or of == "k"):
        raise PatchError("heads share keys: give head= for queries or scores, or kv= alone for keys and their group")
    layers, chosen = check_indices("layer", layer, cfg.n_layers), check_indices("pair", pair, cfg.d_rotary // 2)
    heads, groups = check_indices("head", head, cfg.n_heads), check_indices("kv", kv, cfg.n_kv_heads)
    readers = heads if kv is None else [g * cfg.n_groups + i for g in groups for i in range(cfg.n_groups)]
    how = PairRotation(cfg, rule, index_mask(chosen, cfg.d_rotary // 2, lens.device))
    found: RotaryEdits = []
    for i in layers:
        if of == "both" and head is None and kv is None:
            found += [(f"blocks.{i}.rotary.cos", how.edit_cos), (f"blocks.{i}.rotary.sin", how.edit_sin)]
        elif of == "both" and kv is None and cfg.n_groups > 1:
            scores = ScoreRotation(how, index_mask(heads, cfg.n_heads, lens.device))
            points = {"attn.q_rot": scores.keep_queries, "kv.k": scores.keep_keys, "attn.scores": scores.edit_scores}
            found += [(f"blocks.{i}.{point}", edit) for point, edit in points.items()]
        else:
            if of != "k":
                found.append((f"blocks.{i}.attn.q_rot", how.rotate_heads_edit(readers)))
            if of != "q":
                found.append(
                    (
                        f"blocks.{i}.attn.k_rot",
                        how.rotate_heads_edit(heads if kv is None and head is not None else groups),
                    )
                )
    return found


def check_indices(axis: str, places: IndexSelection, size: int) -> list[int]:
    asked = to_place_tuple(places, axis, size)
    return list(range(size)) if asked is None else [int(p) for p in asked]


def index_mask(places: Iterable[int], size: int, device: torch.device) -> Bool[Tensor, "size"]:
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[list(places)] = True
    return mask


@dataclass(frozen=True, eq=False)
class PairRotation:
    """A rule for some pairs; the others turn as published."""

    cfg: GLMConfig
    rule: RotaryRule
    pair_mask: Bool[Tensor, "pair"]

    def compute_angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Angles, Angles]:
        """cos and sin as the model turns, and as it should, in at least float32."""
        exact = torch.promote_types(dtype, torch.float32)
        frequency = compute_pair_frequencies(self.cfg, exact, positions.device)
        published, new = compute_angles(positions, frequency), self.rule(positions, frequency)
        mixed = [torch.where(self.pair_mask, b, a) for a, b in zip(published, new, strict=True)]
        return published, (mixed[0], mixed[1])

    def edit_cos(self, x: Tensor, point: Point) -> Tensor:
        return torch.where(self.differs_from_published(x, point), self.edited_angles(x, point)[0].to(x.dtype), x)

    def edit_sin(self, x: Tensor, point: Point) -> Tensor:
        return torch.where(self.differs_from_published(x, point), self.edited_angles(x, point)[1].to(x.dtype), x)

    def edited_angles(self, x: Tensor, point: Point) -> Angles:
        assert point.positions is not None
        (cos, sin), factor = self.compute_angles(point.positions, x.dtype)[1], get_rope_attention_factor(self.cfg)
        return cos * factor, sin * factor

    def rotate_heads_edit(self, heads: Iterable[int]) -> Edit:
        """The edit that turns these heads' channels on, where they have turned as published."""
        chosen = list(heads)

        def rotate_heads(x: Tensor, point: Point) -> Tensor:
            assert point.positions is not None
            x[:, :, chosen] = self.rotate_channels(x[:, :, chosen], point.positions)
            return x

        return rotate_heads

    def differs_from_published(self, x: Tensor, point: Point) -> Bool[Tensor, "batch pos pair"]:
        """Where the angles are not as published; elsewhere stays what is there, of other surgery too."""
        assert point.positions is not None
        (cos, sin), (new_cos, new_sin) = self.compute_angles(point.positions, x.dtype)
        return (cos != new_cos) | (sin != new_sin)

    def rotate_channels(self, x: Float[Tensor, "batch pos head rotated"], positions: Tensor) -> Tensor:
        return rerotate_channels(x, *self.compute_angles(positions, x.dtype))


@dataclass
class ScoreRotation:
    """New scores for some query heads alone: their queries and keys as they would have turned, compared again."""

    rotation: PairRotation
    heads: Bool[Tensor, "head"]
    q: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    k: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def keep_queries(self, x: Tensor, point: Point) -> Tensor:
        assert point.positions is not None
        self.q = [(x, self.rotation.rotate_channels(x, point.positions))]
        return x

    def keep_keys(self, x: Tensor, point: Point) -> Tensor:
        assert point.key_positions is not None
        k = x[..., : self.rotation.cfg.d_rotary]
        self.k = [(k, self.rotation.rotate_channels(k, point.key_positions))]
        return x

    def edit_scores(self, x: Tensor, point: Point) -> Tensor:
        if not self.k:  # no entry here whose key is meant to turn otherwise
            return x
        (q, new_q), (k, new_k) = self.q.pop(), self.k.pop()
        difference = self.compute_scores(new_q, new_k) - self.compute_scores(q, k)
        return torch.where(self.heads[:, None, None], x + difference.to(x.dtype), x)

    def compute_scores(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        k = repeat(k, "batch key kv rotated -> batch key (kv group) rotated", group=self.rotation.cfg.n_groups)
        found = einsum(q, k, "batch query head rotated, batch key head rotated -> batch head query key")
        return found * self.rotation.cfg.d_head**-0.5


@dataclass(frozen=True, eq=False)
class Breakage(LabelledGroup):
    """What each surgery breaks [surgery]: nats of next-token loss more, KL from the model as published, agreement.

    `loss` is the mean over the tokens that are said in the prompts less that of the published model, `kl`
    KL(published ‖ edited) in nats and `agreement` the share of positions at which both would say the same next token.
    """

    loss: Labelled
    kl: Labelled
    agreement: Labelled


def breakage(lens: Lens, prompt: Prompt, rotary_edits: Mapping[str, Hooks] | Any) -> Breakage:
    """Measure what hooks break, each of several by its name; prompts of any length are run in pieces."""
    rows = PromptBatch.from_prompt(lens, prompt)
    if not isinstance(rotary_edits, Mapping) or not rotary_edits:
        raise PatchError('no surgery to measure: give {"without pair 3": rotary.freeze(lens, pair=3), ...}')
    found = torch.stack([torch.stack(measure_breakage(rows, hooks)) for hooks in rotary_edits.values()])
    about = rows.describe(
        metric="what breaks", direction="edited against published", positions="all, means over tokens"
    )
    units = {
        "loss": "nats of next-token loss more",
        "kl": "KL(published ‖ edited), nats",
        "agreement": "share of positions",
    }
    labels = {"surgery": list(rotary_edits)}
    sheets = {
        name: Labelled(to_numpy(x), ("surgery",), labels, {**about, "metric": unit})
        for (name, unit), x in zip(units.items(), found.unbind(1), strict=True)
    }
    return Breakage(about, **sheets)


def measure_breakage(rows: PromptBatch, hooks: Hooks) -> tuple[Tensor, Tensor, Tensor]:
    """Over all real tokens: the loss more, the KL, and how often both say the same."""
    sums = torch.zeros(5, dtype=torch.float32, device=rows.tokens.device)
    runs = (run_in_chunks(rows, logits=True), run_in_chunks(rows, hooks=hooks, logits=True))
    for plain, edited in zip(*runs, strict=True):
        real = rows.positions[:, plain.columns] >= 0
        assert plain.logits is not None
        assert edited.logits is not None
        p, q = (
            x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (plain.logits, edited.logits)
        )
        after = rows.tokens[:, plain.columns.start + 1 : plain.columns.stop + 1]
        told = real[:, : after.shape[1]]
        said = [x[:, : after.shape[1]].gather(-1, after.unsqueeze(-1)).squeeze(-1)[told].sum() for x in (p, q)]
        kl = (p.exp() * (p - q)).sum(-1)[real].sum()
        same = (p.argmax(-1) == q.argmax(-1))[real].sum()
        sums += torch.stack([said[0] - said[1], told.sum(), kl, same, real.sum()])
    loss, told, kl, same, real = sums.unbind()
    return loss / told.clamp(min=1), kl / real, same / real
