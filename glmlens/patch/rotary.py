"""Edit rotary embeddings: other angles for some layers, heads and pairs, of queries or keys alone, as ordinary hooks.

Every function returns a list of (point, edit) for `run_with_hooks` and `generate`. The places are `layer=`, `pair=`
and one of `head=` (query heads) and `kv=` (a key-value head with all query heads that read it); None means all. `of` is
"both", "q" or "k". Keys that are rotated by `of="k"`, or for whole groups, are cached as they were rotated. One query
head of several on a key-value head cannot have keys of its own: for `head=` with `of="both"` its attention scores are
recomputed instead, which needs attention="eager".

Lists of edits of other pairs or other tokens add up, [*freeze(lens, pair=0), *shift(lens, {4: 3}, pair=1)]. For one
head of a group with `of="both"` only those of other pairs do: give its tokens in one call. Of two edits of the same
pair of the same token the second holds, unless they are of queries or keys alone: then the second rotates further from
the first.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from glmlens.analysis.chunked_runs import run_in_chunks
from glmlens.analysis.prompt_batch import PromptBatch, to_numpy, upcast
from glmlens.config import GLMConfig
from glmlens.deprecated import rename_keyword, resolve_old_names
from glmlens.hook_points import Point
from glmlens.hooks import Edit, Hooks, only
from glmlens.integers import Integer, Integers, read_integer
from glmlens.lens import Lens
from glmlens.model import Angles
from glmlens.patch.replacement_values import number
from glmlens.patch.sites import PatchError, repeat_kv, to_place_tuple
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


class RotaryPlaces(TypedDict, total=False):
    """The keywords with which every edit chooses its places; see the module."""

    layer: IndexSelection
    head: IndexSelection
    kv: IndexSelection
    pair: IndexSelection
    of: str


@dataclass(frozen=True, eq=False, kw_only=True)
class RotarySelection:
    """The layers, heads, pairs and sides that an edit rotates otherwise, as indices of one model."""

    layers: list[int]
    heads: list[int]
    kv_heads: list[int]
    pairs: list[int]
    of: str
    by_head: bool  # head= was given: query heads are chosen one by one
    by_group: bool  # kv= was given: key heads are chosen with their query heads

    @staticmethod
    def resolve(
        cfg: GLMConfig,
        *,
        layer: IndexSelection = None,
        head: IndexSelection = None,
        kv: IndexSelection = None,
        pair: IndexSelection = None,
        of: str = "both",
    ) -> "RotarySelection":
        """Return the indices that are meant; raise PatchError for a place that this model has not got."""
        if of not in ("both", "q", "k"):
            raise PatchError(f"of is {of!r}; choose from 'both', 'q', 'k'")
        if head is not None and (kv is not None or of == "k"):
            raise PatchError(
                "heads share keys: give head= for queries or scores, or kv= alone for keys and their group"
            )
        return RotarySelection(
            layers=check_indices("layer", layer, cfg.n_layers),
            heads=check_indices("head", head, cfg.n_heads),
            kv_heads=check_indices("kv", kv, cfg.n_kv_heads),
            pairs=check_indices("pair", pair, cfg.d_rotary // 2),
            of=of,
            by_head=head is not None,
            by_group=kv is not None,
        )

    def query_heads(self, group_size: int) -> list[int]:
        """Return the query heads chosen, by themselves or as readers of the key heads chosen."""
        if not self.by_group:
            return self.heads
        return [g * group_size + i for g in self.kv_heads for i in range(group_size)]


def freeze(lens: Lens, *, at: Integer = 0, **places: Unpack[RotaryPlaces]) -> RotaryEdits:
    """Rotate pairs as at position `at` at every position: of both sides, they compare content without distance."""
    at = read_integer(at, "at", least=0, error=PatchError)
    return rotary_edit(lens, freeze_positions(at), **places)


def silence(lens: Lens, **places: Unpack[RotaryPlaces]) -> RotaryEdits:
    """Set the channels of pairs to zero, so that they add nothing to any attention score."""
    return rotary_edit(lens, zero_rotary, **places)


def shift(lens: Lens, by: Integer | Mapping[Integer, Integer], **places: Unpack[RotaryPlaces]) -> RotaryEdits:
    """Rotate tokens as if they stood `by` positions later: all, or {absolute position: by how many}.

    The causal mask does not change. When run, a position that never comes raises HookError.
    """
    offsets = read_offsets(by)
    edits = rotary_edit(lens, shift_positions(offsets), **places)
    if isinstance(offsets, int):
        return edits
    # Edits are limited to the positions given. Scores are not: they are recomputed at every query that attends to a
    # shifted key, so the limit is at the keys that they are recomputed from.
    edits_scores = any(name.endswith("attn.scores") for name, _ in edits)
    return [
        (name, only(fn, positions=list(offsets)) if name.endswith("kv.k") or not edits_scores else fn)
        for name, fn in edits
    ]


def read_offsets(by: Any) -> int | dict[int, int]:
    """Return how far tokens are shifted, all alike or by position; raise PatchError for what is no whole number."""
    if not isinstance(by, Mapping):
        return read_integer(by, "by", error=PatchError)
    if not by:
        raise PatchError("by came out empty: give how far to move at least one position, {4: 3}")
    at = [read_integer(position, "a position to shift", least=0, error=PatchError) for position in by]
    offsets = (read_integer(offset, f"by[{p}]", error=PatchError) for p, offset in by.items())
    return dict(zip(at, offsets, strict=True))


def stretch(
    lens: Lens,
    kind: str,
    factor: float | int | Any,
    *,
    context: Integer | None = None,
    **places: Unpack[RotaryPlaces],
) -> RotaryEdits:
    """Rotate pairs by a rule that extends contexts: "theta", "linear", "ntk" or "yarn"; see `stretch_context`."""
    context = None if context is None else read_integer(context, "context", least=1, error=PatchError)
    factor = number(factor, "stretch: factor")
    return rotary_edit(lens, stretch_context(lens.cfg, kind, factor, context), **places)


def rotary_edit(lens: Lens, rule: RotaryRule, **places: Unpack[RotaryPlaces]) -> RotaryEdits:
    """Rotate pairs by any rule, a function from positions [batch, pos] and frequencies [pair] to cos and sin.

    Raise PatchError for a place that this model has not got. When run, one head of a group under attention="sdpa",
    which computes no scores, raises HookError.
    """
    cfg = lens.cfg
    chosen = RotarySelection.resolve(cfg, **places)
    rotation = PairRotation(cfg, rule, index_mask(chosen.pairs, cfg.d_rotary // 2, lens.device))
    edits: RotaryEdits = []
    for i in chosen.layers:
        if chosen.of == "both" and not chosen.by_head and not chosen.by_group:
            # Every head, both sides: the angles themselves are edited, and the model rotates by them.
            edits += [(f"blocks.{i}.rotary.cos", rotation.edit_cos), (f"blocks.{i}.rotary.sin", rotation.edit_sin)]
        elif chosen.of == "both" and not chosen.by_group and cfg.n_groups > 1:
            # Some query heads of a group, both sides: their key head is shared, so their scores are recomputed.
            scores = ScoreRotation(rotation, index_mask(chosen.heads, cfg.n_heads, lens.device))
            points = {"attn.q_rot": scores.keep_queries, "kv.k": scores.keep_keys, "attn.scores": scores.edit_scores}
            edits += [(f"blocks.{i}.{point}", edit) for point, edit in points.items()]
        else:
            # Otherwise channels that have been rotated as published are rotated further, to the new angles.
            if chosen.of != "k":
                heads = chosen.query_heads(cfg.n_groups)
                edits.append((f"blocks.{i}.attn.q_rot", rotation.rotate_heads_edit(heads)))
            if chosen.of != "q":
                # Without groups, head h has key head h of its own.
                key_heads = chosen.heads if chosen.by_head else chosen.kv_heads
                edits.append((f"blocks.{i}.attn.k_rot", rotation.rotate_heads_edit(key_heads)))
    return edits


def check_indices(axis: str, places: IndexSelection, size: int) -> list[int]:
    """Return places along an axis as numbers, None as all of them; raise PatchError for one that is not there."""
    asked = to_place_tuple(places, axis, size)
    return list(range(size)) if asked is None else [int(p) for p in asked]


def index_mask(places: Iterable[int], size: int, device: torch.device) -> Bool[Tensor, "size"]:
    """Return a mask that is True at these places."""
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[list(places)] = True
    return mask


@dataclass(frozen=True, eq=False)
class PairRotation:
    """A rule for some pairs; the others rotate as published."""

    cfg: GLMConfig
    rule: RotaryRule
    pair_mask: Bool[Tensor, "pair"]

    def compute_angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Angles, Angles]:
        """Return cos and sin as published and as edited, in at least float32."""
        exact = torch.promote_types(dtype, torch.float32)
        frequency = compute_pair_frequencies(self.cfg, exact, positions.device)
        published, new = compute_angles(positions, frequency), self.rule(positions, frequency)
        mixed = [torch.where(self.pair_mask, b, a) for a, b in zip(published, new, strict=True)]
        return published, (mixed[0], mixed[1])

    def edit_cos(self, x: Tensor, point: Point) -> Tensor:
        """Put the edited cos where it differs from the published one; other edits' numbers stay elsewhere."""
        return torch.where(self.differs_from_published(x, point), self.edited_angles(x, point)[0].to(x.dtype), x)

    def edit_sin(self, x: Tensor, point: Point) -> Tensor:
        """As `edit_cos`, for sin."""
        return torch.where(self.differs_from_published(x, point), self.edited_angles(x, point)[1].to(x.dtype), x)

    def edited_angles(self, x: Tensor, point: Point) -> Angles:
        """Return the edited cos and sin as the model holds them: times the attention factor of yarn."""
        assert point.positions is not None
        _, (cos, sin) = self.compute_angles(point.positions, x.dtype)
        factor = get_rope_attention_factor(self.cfg)
        return cos * factor, sin * factor

    def rotate_heads_edit(self, heads: Iterable[int]) -> Edit:
        """Return the edit that rotates these heads' channels from the published angles on to the edited ones."""
        chosen = list(heads)

        def rotate_heads(x: Tensor, point: Point) -> Tensor:
            assert point.positions is not None
            x[:, :, chosen] = self.rotate_channels(x[:, :, chosen], point.positions)
            return x

        return rotate_heads

    def differs_from_published(self, x: Tensor, point: Point) -> Bool[Tensor, "batch pos pair"]:
        """Return where the edited angles are not the published ones."""
        assert point.positions is not None
        (cos, sin), (new_cos, new_sin) = self.compute_angles(point.positions, x.dtype)
        return (cos != new_cos) | (sin != new_sin)

    def rotate_channels(self, x: Float[Tensor, "batch pos head rotated"], positions: Tensor) -> Tensor:
        """Return channels rotated to the edited angles, from channels rotated to the published ones."""
        return rerotate_channels(x, *self.compute_angles(positions, x.dtype))


@dataclass
class ScoreRotation:
    """Recompute the scores of some query heads from their queries and keys under the edited angles.

    `q` and `k` hold (as published, as edited) from the hooks at queries and keys until the hook at scores takes them.
    """

    rotation: PairRotation
    heads: Bool[Tensor, "head"]
    q: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    k: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def keep_queries(self, x: Tensor, point: Point) -> Tensor:
        """Hold the rotated queries for `edit_scores`."""
        assert point.positions is not None
        self.q = [(x, self.rotation.rotate_channels(x, point.positions))]
        return x

    def keep_keys(self, x: Tensor, point: Point) -> Tensor:
        """Hold the rotated channels of all keys, cached ones too, for `edit_scores`."""
        assert point.key_positions is not None
        k = x[..., : self.rotation.cfg.d_rotary]
        self.k = [(k, self.rotation.rotate_channels(k, point.key_positions))]
        return x

    def edit_scores(self, x: Tensor, point: Point) -> Tensor:
        """Add the change of the scores, so that what other edits have changed stays."""
        if not self.k:  # the edit at keys is limited to positions, and this call has none of them
            return x
        q, new_q = self.q.pop()
        k, new_k = self.k.pop()
        difference = self.compute_scores(new_q, new_k) - self.compute_scores(q, k)
        return torch.where(self.heads[:, None, None], x + difference.to(x.dtype), x)

    def compute_scores(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        """Return the part of the scores that rotated channels make."""
        k = repeat_kv(k, self.rotation.cfg.n_groups)
        products = einsum(q, k, "batch query head rotated, batch key head rotated -> batch head query key")
        return products * self.rotation.cfg.d_head**-0.5


@dataclass(frozen=True, eq=False)
class Breakage(LabelledGroup):
    """The damage of each rotary edit [surgery]: next-token loss, KL from the published model, agreement with it.

    `loss` is the mean next-token loss over the prompts' tokens less that of the published model, in nats; `kl` is
    KL(published ‖ edited) in nats, and `agreement` the share of positions at which both predict the same next token.
    """

    loss: Labelled
    kl: Labelled
    agreement: Labelled


@rename_keyword("surgeries", "rotary_edits")
def breakage(lens: Lens, prompt: Prompt, rotary_edits: Mapping[str, Hooks] | Any) -> Breakage:
    """Measure the damage of hooks, each list by its name; prompts of any length are run in pieces."""
    rows = PromptBatch.from_prompt(lens, prompt)
    if not isinstance(rotary_edits, Mapping) or not rotary_edits:
        raise PatchError('no rotary edit to measure: give {"without pair 3": rotary.freeze(lens, pair=3), ...}')
    measured = torch.stack([torch.stack(measure_breakage(rows, hooks)) for hooks in rotary_edits.values()])
    about = rows.describe(metric="damage", direction="edited against published", positions="all, means over tokens")
    units = {
        "loss": "increase of next-token loss, nats",
        "kl": "KL(published ‖ edited), nats",
        "agreement": "share of positions",
    }
    labels = {"surgery": list(rotary_edits)}
    arrays = {
        name: Labelled(to_numpy(x), ("surgery",), labels, {**about, "metric": unit})
        for (name, unit), x in zip(units.items(), measured.unbind(1), strict=True)
    }
    return Breakage(about, **arrays)


def measure_breakage(rows: PromptBatch, hooks: Hooks) -> tuple[Tensor, Tensor, Tensor]:
    """Return the increase of next-token loss, the KL and the agreement, as means over all tokens but padding."""
    sums = torch.zeros(5, dtype=torch.float32, device=rows.tokens.device)
    runs = (run_in_chunks(rows, logits=True), run_in_chunks(rows, hooks=hooks, logits=True))
    for published, edited in zip(*runs, strict=True):
        real = rows.positions[:, published.columns] >= 0
        assert published.logits is not None
        assert edited.logits is not None
        log_p, log_q = (upcast(x).log_softmax(-1) for x in (published.logits, edited.logits))
        # The last position of a prompt has no next token; the next one of a chunk's last position is in the next chunk.
        next_tokens = rows.tokens[:, published.columns.start + 1 : published.columns.stop + 1]
        has_next = real[:, : next_tokens.shape[1]]
        gain_p, gain_q = (
            x[:, : next_tokens.shape[1]].gather(-1, next_tokens.unsqueeze(-1)).squeeze(-1)[has_next].sum()
            for x in (log_p, log_q)
        )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[real].sum()
        same = (log_p.argmax(-1) == log_q.argmax(-1))[real].sum()
        sums += torch.stack([gain_p - gain_q, has_next.sum(), kl, same, real.sum()])
    loss, n_next, kl, same, n_real = sums.unbind()
    return loss / n_next.clamp(min=1), kl / n_real, same / n_real


__getattr__ = resolve_old_names("glmlens.patch.rotary", {"turning": "glmlens.patch.rotary.rotary_edit"})
