"""Recording and editing: the points of a model, the plan of one run, and the hook that carries the plan out."""

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
KV_VIEWS = frozenset({"kv.k", "kv.v"})  # views of the cache's memory, which later steps write to


def trace_points(
    model: GLM, batch: int = 1, pos: int = 1, past: int = 0, logits_to_keep: int | Tensor | None = None
) -> dict[str, Point]:
    """Return every point of this model with its shape, found by running the code on the meta device.

    `past` is the number of cache entries before the run. All layers have the same points, so that one layer is run and
    its points are repeated for the others.
    """
    cfg = replace(model.cfg, n_layers=1)
    dtype = model.ln_final.weight.dtype
    one = build_meta_model(cfg, model.attention, dtype)
    kv = replace(KVCache.empty(cfg, batch, past + pos, dtype, "meta"), length=past) if past else None
    embeds = torch.empty(batch, pos, cfg.d_model, dtype=dtype, device="meta")
    points: dict[str, Point] = {}
    one(inputs_embeds=embeds, kv=kv, hook=PointCollector(points), logits_to_keep=logits_to_keep)
    before = [p for p in points.values() if p.name == "embed"]
    layer = [p for p in points.values() if p.layer is not None]
    after = [p for p in points.values() if p.layer is None and p.name != "embed"]
    layers = [replace(p, name=f"blocks.{i}.{p.local}") for i in range(model.cfg.n_layers) for p in layer]
    return {p.name: p for p in (*before, *layers, *after)}


@dataclass
class PointCollector:
    """A hook that collects the name and shape of every point, those that are computed only on request too."""

    points: dict[str, Point]

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name in self.points:
            raise HookError(f"{name} fired twice in one pass")
        self.points[name] = Point(name, axes_of(name), tuple(x.shape), x.dtype)
        return x

    def wants(self, name: str) -> bool:
        return True


class ForwardStopped(Exception):
    """Raised inside a forward to end it after the last requested point. Control flow, not an error."""


@dataclass(frozen=True)
class RequestedEdit:
    """One entry of `hooks`: its pattern as typed, the edit, and the points that the pattern matches."""

    pattern: str
    fn: Edit
    points: list[str]


@dataclass
class RunPlan:
    """The points that a run records and edits, resolved against those that it passes.

    `recorded_names` are in the order in which they fire. `edits_by_point` holds, by point, indices into
    `requested_edits` in the order given. `applied_edits` grows while the run calls them. Of the recorded points,
    `stored_names` are stored; the others are derived from them.
    """

    recorded_names: list[str]
    requested_edits: list[RequestedEdit]
    edits_by_point: dict[str, list[int]]
    applied_edits: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.stored_names = frozenset(self.recorded_names)

    def store_only_needed(self, model: GLM, edited: frozenset[str], past_entries: bool) -> None:
        """Restrict `stored_names` to the points from which the other recorded ones can be derived."""
        self.stored_names = frozenset(
            select_points_to_store(self.recorded_names, model, make_underivable_check(edited, model, past_entries))
        )

    @staticmethod
    def from_request(points: Sequence[str], names: str | Sequence[str] | None, hooks: Hooks | None) -> "RunPlan":
        """Return the plan for these names and hooks; HookError for a name that matches no point."""
        requested = [RequestedEdit(pattern, fn, resolve_names(pattern, points)) for pattern, fn in list_edits(hooks)]
        edits: dict[str, list[int]] = {}
        for i, entry in enumerate(requested):
            for name in entry.points:
                edits.setdefault(name, []).append(i)
        return RunPlan([] if names is None else resolve_names(names, points), requested, edits)

    def list_hook_calls(self) -> list[tuple[str, list[str]]]:
        """Return every entry of `hooks` as typed, with the points at which it was called."""
        return [
            (f"{entry.pattern} <- {get_edit_name(entry.fn)}", entry.points if i in self.applied_edits else [])
            for i, entry in enumerate(self.requested_edits)
        ]

    def check_reachable(self, last_step: int, last_position: int) -> None:
        """Raise HookError for an edit restricted to steps or positions beyond the end of this run."""
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
        """Raise HookError for an edit restricted to steps or positions that this one pass does not have."""
        for entry in self.requested_edits:
            only = entry.fn
            if isinstance(only, Only) and not any(
                only.select_positions(hook.make_point(n)) is not None for n in entry.points
            ):
                raise self.make_unreached_error(entry, hook)

    def check_applied(self, last: "RecordingHook | None") -> None:
        """Raise HookError if an edit restricted to steps or positions was never applied."""
        for i, entry in enumerate(self.requested_edits):
            if isinstance(entry.fn, Only) and i not in self.applied_edits:
                raise self.make_unreached_error(entry, last)

    def make_unreached_error(self, entry: RequestedEdit, last: "RecordingHook | None") -> HookError:
        """Return the error for an edit whose steps and positions did not occur, with the last ones that did."""
        only = entry.fn
        assert isinstance(only, Only)
        steps = "" if only.steps is None else f" step {', '.join(map(str, sorted(only.steps)))}"
        at = "" if only.positions is None else f" position {', '.join(map(str, sorted(only.positions)))}"
        run = "" if last is None else f"; the run ends with step {last.step}, position {last.last_position()}"
        return HookError(f"{entry.pattern!r}: asked for{steps}{at}, which never came{run}")


@dataclass
class RecordingHook:
    """The hook of one pass: calls the edits of a plan, checks what they return, and stores the values after them.

    `copied_points` are points whose memory belongs to something else: their values are stored as copies. With
    `stop_when_done` the forward ends after the last requested point. `real_device` is set in a check on the meta
    device: tensors that edits return from that device count as meta there, and an edit that raises is skipped, its
    error kept in `edit_errors`.
    """

    plan: RunPlan
    step: int
    positions: Int[Tensor, "batch pos"]
    key_positions: Int[Tensor, "batch key"]
    copied_points: frozenset[str] = frozenset()
    logits_to_keep: int | Tensor | None = None
    stop_when_done: bool = False
    with_gradients: bool = False
    values: dict[str, Tensor] = field(default_factory=dict)
    real_device: torch.device | None = None
    edit_errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pending = set(self.plan.stored_names) | set(self.plan.edits_by_point)

    def last_position(self) -> int:
        """Return the highest position of the pass; -1 on the meta device."""
        return -1 if self.positions.is_meta else int(self.positions.max())

    def wants(self, name: str) -> bool:
        """Whether this point is recorded or edited and has not fired yet."""
        return name in self.pending

    def make_point(self, name: str, x: Tensor | None = None) -> Point:
        """Return the point with its axes, shape, step and positions, as an edit receives it."""
        positions = select_logit_positions(self.positions, self.logits_to_keep) if name == "logits" else self.positions
        shape = () if x is None else tuple(x.shape)
        dtype = torch.float32 if x is None else x.dtype
        return Point(name, axes_of(name), shape, dtype, self.step, positions, self.key_positions)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self.pending:
            return x
        self.pending.discard(name)
        original = x
        if name in self.plan.edits_by_point:
            point = self.make_point(name, x)  # edits keep shape and dtype: one point serves them all
            for i in self.plan.edits_by_point[name]:
                x = self.apply_edit(i, point, x)
        if name in self.plan.stored_names:
            if self.with_gradients:
                # The gradient is taken at a node of its own. After an edit that cut the graph, a new graph begins here.
                self.values[name] = x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
            elif x is not original or local_name(name) in self.copied_points:
                self.values[name] = x.clone()  # the edit may hold on to its result, and the cache is written to later
            else:
                self.values[name] = x
        if self.stop_when_done and not self.pending:
            raise ForwardStopped
        return x

    def apply_edit(self, i: int, point: Point, x: Tensor) -> Tensor:
        """Return x after the edit with this index; x itself where the edit is restricted to other positions."""
        fn = self.plan.requested_edits[i].fn
        where = fn.select_positions(point) if isinstance(fn, Only) else None
        if isinstance(fn, Only) and where is None:
            return x
        self.plan.applied_edits.add(i)
        try:
            # The edit gets a copy, so that writing to it in place changes neither the model nor the recording.
            new = (fn.fn if isinstance(fn, Only) else fn)(x.clone(), point)
        except Exception as e:
            if self.real_device is not None:
                self.edit_errors.append(f"{get_edit_name(fn)} at {point.name}: {type(e).__name__}: {e}")
                return x
            if hasattr(e, "add_note"):  # Python 3.11
                e.add_note(f"in the hook {get_edit_name(fn)} at {point.name}, step {self.step}")
            raise
        if isinstance(new, Tensor) and new.device == self.real_device:
            new = new.to("meta")
        new = check_edit_result(new, x, fn, point)
        return match_layout(x, fn.merge(new, x, point, where) if isinstance(fn, Only) else new)

    def compact_values(self) -> dict[str, Tensor]:
        """Return the stored values; those that are views of larger memory are copied, to free the rest of it."""
        used_bytes: dict[int, int] = {}  # by storage: views of one storage may together fill it
        for x in self.values.values():
            address = x.untyped_storage().data_ptr()
            used_bytes[address] = used_bytes.get(address, 0) + x.nbytes
        for name, x in self.values.items():
            if used_bytes[x.untyped_storage().data_ptr()] < x.untyped_storage().nbytes():
                self.values[name] = x.clone()
        return self.values


def match_layout(x: Tensor, new: Tensor) -> Tensor:
    """Return `new` with the strides of x, so that an edit that changes no value changes no bit of the logits."""
    if new.stride() == x.stride() or 0 in x.stride():
        return new
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(new)


def check_edit_result(new: Any, x: Tensor, fn: Edit, point: Point) -> Tensor:
    """Return what a hook returned; HookError unless it has the type, shape, dtype and device of x."""
    if isinstance(new, Tensor) and (new.shape, new.dtype, new.device) == (x.shape, x.dtype, x.device):
        return new
    where = f"{point.name}: the hook {get_edit_name(fn)} returned"
    if new is None:
        raise HookError(f"{where} None; end it with 'return x'")
    if not isinstance(new, Tensor):
        raise HookError(f"{where} {type(new).__name__}; expected a tensor of shape {tuple(x.shape)}")
    for what, actual, expected in (
        ("shape", tuple(new.shape), tuple(x.shape)),
        ("dtype", new.dtype, x.dtype),
        ("device", new.device, x.device),
    ):
        if actual != expected:
            axes = f" ({' '.join(point.axes)})" if what == "shape" else ""
            raise HookError(f"{where} {what} {actual}; expected {expected}{axes}, nothing is broadcast or converted")
    return new


class GenerationRecorder:
    """Collects the recorded passes of one generation, each once it has ended, and joins them over the steps."""

    def __init__(self, plan: RunPlan):
        self.plan = plan
        self.passes: list[dict[str, Tensor]] = []
        self.current_hook: RecordingHook | None = None

    def make_step_hook(self, step: int, positions: Tensor, key_positions: Tensor) -> Hook:
        """Return the hook of one step; `off` where nothing is recorded or edited."""
        if not self.plan.stored_names and not self.plan.edits_by_point:
            return off
        self.current_hook = RecordingHook(self.plan, step, positions, key_positions, KV_VIEWS, logits_to_keep=1)
        return self.current_hook

    def commit_pass(self) -> None:
        """Store the values of the pass that has just ended."""
        if self.current_hook is not None:
            self.passes.append(self.current_hook.compact_values())

    def collect_activations(self, run_info: RunInfo) -> Activations:
        """Return the recording so far, joined over the steps."""
        names = self.plan.recorded_names if self.passes else []
        return Activations(
            {name: concatenate_passes(name, [values[name] for values in self.passes]) for name in names},
            run_info=run_info,
        )


def concatenate_passes(name: str, passes: list[Tensor]) -> Tensor | list[Tensor]:
    """Return one point joined over all passes, along pos or query.

    Keys are padded on the right to the longest pass. `kv.k` and `kv.v` stay a list, with a tensor per pass.
    """
    axes = axes_of(name)
    if local_name(name) in KV_VIEWS:
        return passes
    if "key" not in axes:
        return torch.cat(passes, axes.index("pos"))
    longest = max(part.shape[-1] for part in passes)
    masked = float("-inf") if local_name(name) == "attn.scores" else 0.0
    return torch.cat([F.pad(part, (0, longest - part.shape[-1]), value=masked) for part in passes], axes.index("query"))
