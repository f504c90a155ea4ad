"""Recording: which points there are, what a run was asked to do at them, and the hook that does it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from glmlens.hook_points import HookError, Point, axes_of, local_name, resolve_names
from glmlens.hooks import Edit, Hook, Hooks, Only, get_edit_name, list_edits, off
from glmlens.kv_cache import KVCache
from glmlens.loading.checkpoint import build_meta_model
from glmlens.model import GLM, select_logit_positions
from glmlens.recording.activations import Activations
from glmlens.recording.derive import make_underivable_check, select_points_to_store
from glmlens.recording.run_info import RunInfo

PointCatalogue = Mapping[str, Point]
KV_VIEWS = frozenset({"kv.k", "kv.v"})  # what is recalled from a cache is a view of memory that later steps write


def trace_points(
    model: GLM, batch: int = 1, pos: int = 1, past: int = 0, logits_to_keep: int | Tensor | None = None
) -> dict[str, Point]:
    """Every point of this model and its shape, read off the code by running it on the meta device.

    `past` is the number of cache entries before this call. The layers are made alike, so one is run, and its points
    are said of all.
    """
    cfg, dtype = replace(model.cfg, n_layers=1), model.ln_final.weight.dtype
    one = build_meta_model(cfg, model.attention, dtype)
    kv = replace(KVCache.empty(cfg, batch, past + pos, dtype, "meta"), length=past) if past else None
    embeds = torch.empty(batch, pos, cfg.d_model, dtype=dtype, device="meta")
    found: dict[str, Point] = {}
    one(inputs_embeds=embeds, kv=kv, hook=PointCollector(found), logits_to_keep=logits_to_keep)
    before = [p for p in found.values() if p.name == "embed"]
    layer = [p for p in found.values() if p.layer is not None]
    after = [p for p in found.values() if p.layer is None and p.name != "embed"]
    layers = [replace(p, name=f"blocks.{i}.{p.local}") for i in range(model.cfg.n_layers) for p in layer]
    return {p.name: p for p in (*before, *layers, *after)}


@dataclass
class PointCollector:
    """A hook that notes the name and shape of all it hears, also of what is computed only on request."""

    points: dict[str, Point]

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name in self.points:
            raise HookError(f"{name} fired twice in one pass")
        self.points[name] = Point(name, axes_of(name), tuple(x.shape), x.dtype)
        return x

    def wants(self, name: str) -> bool:
        return True


class ForwardStopped(Exception):
    """Raised inside a forward to end it after the last point that anybody asked for."""


@dataclass(frozen=True)
class RequestedEdit:
    """One entry of `hooks`: what was typed, the edit, and the points that it names."""

    pattern: str
    fn: Edit
    points: list[str]


@dataclass
class RunPlan:
    """What a run was asked to record and edit, resolved against the points that it passes."""

    recorded_names: list[str]  # the points to record, in the order in which they fire
    requested_edits: list[RequestedEdit]
    edits_by_point: dict[str, list[int]]  # by point, the entries of `asked` in the order given
    applied_edits: set[int] = field(default_factory=set)  # the entries that have been called

    def __post_init__(self) -> None:
        self.stored_names = frozenset(self.recorded_names)  # those that are stored: all, unless some follow from others

    def store_only_needed(self, model: GLM, edited: frozenset[str], past_entries: bool) -> None:
        """Store only the points from which the others follow."""
        self.stored_names = frozenset(
            select_points_to_store(self.recorded_names, model, make_underivable_check(edited, model, past_entries))
        )

    @staticmethod
    def from_request(points: Sequence[str], names: str | Sequence[str] | None, hooks: Hooks | None) -> "RunPlan":
        """The plan for these names and hooks; HookError for one that matches no point."""
        asked = [RequestedEdit(pattern, fn, resolve_names(pattern, points)) for pattern, fn in list_edits(hooks)]
        edits: dict[str, list[int]] = {}
        for i, entry in enumerate(asked):
            for name in entry.points:
                edits.setdefault(name, []).append(i)
        return RunPlan([] if names is None else resolve_names(names, points), asked, edits)

    def list_hook_calls(self) -> list[tuple[str, list[str]]]:
        """Every entry of `hooks` as typed, and the points at which it was called."""
        return [
            (f"{entry.pattern} <- {get_edit_name(entry.fn)}", entry.points if i in self.applied_edits else [])
            for i, entry in enumerate(self.requested_edits)
        ]

    def check_reachable(self, last_step: int, last_position: int) -> None:
        """Raise HookError for an edit at steps or positions that this run cannot come to."""
        for entry in self.requested_edits:
            only = entry.fn
            if not isinstance(only, Only):
                continue
            for what, chosen, last in (("step", only.steps, last_step), ("position", only.positions, last_position)):
                if chosen is not None and min(chosen) > last:
                    raise HookError(
                        f"{entry.pattern!r}: asked for {what} {min(chosen)}, but the last {what} of this run is {last}"
                    )

    def check_possible(self, hook: "RecordingHook") -> None:
        """Raise HookError for an edit that this one pass cannot come to, before it is run."""
        for entry in self.requested_edits:
            only = entry.fn
            if isinstance(only, Only) and not any(
                only.select_positions(hook.make_point(n)) is not None for n in entry.points
            ):
                raise self.make_unreached_error(entry, hook)

    def check_applied(self, last: "RecordingHook | None") -> None:
        """Raise HookError if an edit restricted to steps or positions never held."""
        for i, entry in enumerate(self.requested_edits):
            if isinstance(entry.fn, Only) and i not in self.applied_edits:
                raise self.make_unreached_error(entry, last)

    def make_unreached_error(self, entry: RequestedEdit, last: "RecordingHook | None") -> HookError:
        only = entry.fn
        assert isinstance(only, Only)
        steps = "" if only.steps is None else f" step {', '.join(map(str, sorted(only.steps)))}"
        at = "" if only.positions is None else f" position {', '.join(map(str, sorted(only.positions)))}"
        run = "" if last is None else f"; the run ends with step {last.step}, position {last.last_position()}"
        return HookError(f"{entry.pattern!r}: asked for{steps}{at}, which never came{run}")


@dataclass
class RecordingHook:
    """The hook of one pass: runs the edits of a plan, checks what they return, keeps what was asked for."""

    plan: RunPlan
    step: int
    positions: Int[Tensor, "batch pos"]
    key_positions: Int[Tensor, "batch key"]
    copied_points: frozenset[str] = frozenset()  # points whose memory is somebody else's: kept as copies
    logits_to_keep: int | Tensor | None = None
    stop_when_done: bool = False
    with_gradients: bool = False  # gradients are wanted at what is kept
    values: dict[str, Tensor] = field(default_factory=dict)
    real_device: torch.device | None = None  # on meta: what edits return from there is taken for meta
    edit_errors: list[str] = field(
        default_factory=list
    )  # on meta: what edits raised, to whom it was as if they were not

    def __post_init__(self) -> None:
        self.pending = set(self.plan.stored_names) | set(self.plan.edits_by_point)

    def last_position(self) -> int:
        return -1 if self.positions.is_meta else int(self.positions.max())

    def wants(self, name: str) -> bool:
        return name in self.pending

    def make_point(self, name: str, x: Tensor | None = None) -> Point:
        """Where an edit at this point is."""
        positions = select_logit_positions(self.positions, self.logits_to_keep) if name == "logits" else self.positions
        shape, dtype = ((), torch.float32) if x is None else (tuple(x.shape), x.dtype)
        return Point(name, axes_of(name), shape, dtype, self.step, positions, self.key_positions)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self.pending:
            return x
        self.pending.discard(name)
        mine = x
        for i in self.plan.edits_by_point.get(name, ()):
            x = self.apply_edit(i, name, x)
        if self.with_gradients and name in self.plan.stored_names:
            # A node of its own, which the run goes through; after an edit that cut the graph, its beginning.
            self.values[name] = x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        elif name in self.plan.stored_names:
            self.values[name] = x.clone() if x is not mine or local_name(name) in self.copied_points else x
        if self.stop_when_done and not self.pending:
            raise ForwardStopped
        return x

    def apply_edit(self, i: int, name: str, x: Tensor) -> Tensor:
        fn, point = self.plan.requested_edits[i].fn, self.make_point(name, x)
        where = fn.select_positions(point) if isinstance(fn, Only) else None
        if isinstance(fn, Only) and where is None:
            return x
        self.plan.applied_edits.add(i)
        try:
            new = (fn.fn if isinstance(fn, Only) else fn)(x.clone(), point)  # a copy: an edit in place reaches nobody
        except Exception as e:
            if self.real_device is not None:
                self.edit_errors.append(f"{get_edit_name(fn)} at {name}: {type(e).__name__}: {e}")
                return x
            if hasattr(e, "add_note"):
                e.add_note(f"in the hook {get_edit_name(fn)} at {name}, step {self.step}")
            raise
        if isinstance(new, Tensor) and new.device == self.real_device:
            new = new.to("meta")
        new = check_edit_result(new, x, fn, point)
        return match_layout(x, fn.merge(new, x, point, where) if isinstance(fn, Only) else new)

    def compact_values(self) -> dict[str, Tensor]:
        """What was kept, holding no more memory than it weighs: a view of something larger is copied out of it."""
        held: dict[int, int] = {}
        for x in self.values.values():
            held[x.untyped_storage().data_ptr()] = held.get(x.untyped_storage().data_ptr(), 0) + x.nbytes
        for name, x in self.values.items():
            if held[x.untyped_storage().data_ptr()] < x.untyped_storage().nbytes():
                self.values[name] = x.clone()
        return self.values


def match_layout(x: Tensor, new: Tensor) -> Tensor:
    """`new` with the strides of x: the last bits of what follows depend on them, and an unchanged value is no edit."""
    if new.stride() == x.stride() or 0 in x.stride():
        return new
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(new)


def check_edit_result(new: Any, x: Tensor, fn: Edit, point: Point) -> Tensor:
    """What a hook returned, or HookError unless it can stand in for x."""
    where = f"{point.name}: the hook {get_edit_name(fn)} returned"
    if new is None:
        raise HookError(f"{where} None; end it with 'return x'")
    if not isinstance(new, Tensor):
        raise HookError(f"{where} {type(new).__name__}; expected a tensor of shape {tuple(x.shape)}")
    for what, found, expected in (
        ("shape", tuple(new.shape), tuple(x.shape)),
        ("dtype", new.dtype, x.dtype),
        ("device", new.device, x.device),
    ):
        if found != expected:
            axes = f" ({' '.join(point.axes)})" if what == "shape" else ""
            raise HookError(f"{where} {what} {found}; expected {expected}{axes}, nothing is broadcast or converted")
    return new


class GenerationRecorder:
    """Collects the passes of one generation, each only when it is whole, and joins them."""

    def __init__(self, plan: RunPlan):
        self.plan = plan
        self.passes: list[dict[str, Tensor]] = []
        self.current_hook: RecordingHook | None = None

    def make_step_hook(self, step: int, positions: Tensor, key_positions: Tensor) -> Hook:
        if not self.plan.stored_names and not self.plan.edits_by_point:
            return off
        self.current_hook = RecordingHook(self.plan, step, positions, key_positions, KV_VIEWS, logits_to_keep=1)
        return self.current_hook

    def commit_pass(self) -> None:
        """Keep the pass that has just ended."""
        if self.current_hook is not None:
            self.passes.append(self.current_hook.compact_values())

    def collect_activations(self, run_info: RunInfo) -> Activations:
        """What has been recorded so far, joined over the steps."""
        names = self.plan.recorded_names if self.passes else []
        return Activations(
            {name: concatenate_passes(name, [kept[name] for kept in self.passes]) for name in names}, run_info=run_info
        )


def concatenate_passes(name: str, passes: list[Tensor]) -> Tensor | list[Tensor]:
    """One point over all passes: along pos or query, keys padded to the longest; what was recalled stays a list."""
    axes = axes_of(name)
    if local_name(name) in KV_VIEWS:
        return passes
    if "key" not in axes:
        return torch.cat(passes, axes.index("pos"))
    longest = max(part.shape[-1] for part in passes)
    nothing = float("-inf") if local_name(name) == "attn.scores" else 0.0
    return torch.cat(
        [F.pad(part, (0, longest - part.shape[-1]), value=nothing) for part in passes], axes.index("query")
    )
