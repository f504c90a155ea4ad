"""A generation under way that keeps what every step said and why, and its edits as they were applied."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.batch import PromptBatch
from glmlens.analysis.chunks import CHUNK_SIZE, DecodingState, run_in_chunks
from glmlens.hook_points import HookError, Point
from glmlens.hooks import Edit, Hooks, Only, get_edit_name, list_edits, only
from glmlens.integers import Integers, read_integer, read_integers
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens
from glmlens.lens.generation import GenerationResult
from glmlens.lens.sampling import GenerationConfig
from glmlens.patch.apply import AppliedInterventions, InterventionHook
from glmlens.patch.interventions import Intervention, as_interventions
from glmlens.patch.sites import PatchError

CacheFunction = Callable[[KVCache], KVCache]
"""An operation such as `cache.evict(...)`, or any function from a cache to a new one."""
StepSelection = Integers
CACHE_POINT = "the cache"  # where operations between steps happen


@dataclass(frozen=True)
class AppliedEdit:
    """An edit as it was applied: at which step and point, what it is called, and whether any number changed."""

    step: int
    point: str
    edit_name: str
    changed: bool


@dataclass
class LoggedEdit:
    """An edit that keeps a list of when it was applied; in a run that goes on, its steps count from the first."""

    fn: Edit
    first_step: int = 0
    events: list[AppliedEdit] = field(default_factory=list)

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        point = replace(point, step=point.step + self.first_step)
        if not applies_at(self.fn, point):
            return x
        new = self.fn(x.clone(), point)
        changed = not (isinstance(new, Tensor) and torch.equal(new, x))
        self.events.append(AppliedEdit(point.step, point.name, get_edit_name(self.fn), changed))
        return new


def applies_at(fn: Edit, point: Point) -> bool:
    """Whether an edit has anything to do at a point: one that says where it holds, and does not hold here, has not."""
    if isinstance(fn, Only):
        return fn.select_positions(point) is not None and applies_at(fn.fn, point)
    return fn.applies_at(point) if isinstance(fn, InterventionHook) else True


@dataclass
class LastPositionRecorder:
    """Edits that change nothing and keep what each step has at its last position, and how its token will be drawn."""

    generator: torch.Generator | None = None
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    generator_states: list[Tensor | None] = field(default_factory=list)

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        self.values.setdefault(point.name, []).append(x[0, -1].clone())
        if point.name == "logits":
            self.generator_states.append(self.generator and self.generator.get_state())
        return x


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One step: the token that it chose and its logits, and what led there.

    `kv` is a cache whose first `before` entries are what the step began with, `entry` the token that it ran then (step
    0: the last of the prompt), and `draw` the state of the generator that it drew from.
    """

    step: int
    token: int
    logits: Float[Tensor, "vocab"]
    resid: Float[Tensor, "layer model"]
    q: Float[Tensor, "layer head d"]
    input_token: int
    kv: KVCache
    past_entries: int
    generator_state: Tensor | None = None

    def restore_state(self) -> DecodingState:
        """What this step began with, as a cache of its own, and the token that it ran."""
        kv = self.kv.fork(1)
        kv.truncate(self.past_entries)
        return DecodingState(kv, torch.tensor([self.input_token], device=kv.keys.device))


@dataclass
class TimelineRecorder:
    """A generation under way that keeps its moments."""

    lens: Lens
    hooks: Hooks
    cache_operations: Mapping[Any, CacheFunction]
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: list[StepRecord] = field(default_factory=list)
    events: list[AppliedEdit] = field(default_factory=list)
    runs: list[GenerationResult] = field(default_factory=list)
    applied_hooks: set[int] = field(default_factory=set)
    generator: torch.Generator | None = None

    def check_operations(self, first: int) -> None:
        """Raise ValueError for an operation at a step that does not come, TypeError for what is no operation."""
        self.cache_operations = {
            read_integer(step, "the step of an operation"): op for step, op in self.cache_operations.items()
        }
        wrong = [step for step in self.cache_operations if not first <= step < self.max_new_tokens]
        if wrong:
            raise ValueError(f"operations at steps {wrong}; this run has {first} to {self.max_new_tokens - 1}")
        for step, op in self.cache_operations.items():
            if not callable(op):
                raise TypeError(
                    f"the operation at step {step} is a {type(op).__name__}; expected a function from a cache to a new "
                    f"one; two of them are lambda kv: second(first(kv))"
                )

    def run_prompt(self, tokens: Int[Tensor, "one pos"]) -> None:
        """Run the prompt, a long one in pieces, and go on from there."""
        if tokens.shape[1] <= CHUNK_SIZE and 0 not in self.cache_operations:
            return self.generate_segment(tokens, None)
        kv, noted = self.lens.new_kv(1, tokens.shape[1] + min(self.max_new_tokens, 256)), self.log_hooks(0)
        if tokens.shape[1] > 1:
            for _ in run_in_chunks(PromptBatch(self.lens, tokens[:, :-1], None), hooks=noted, kv=kv):
                pass
        self.collect_events(noted)
        return self.continue_from(kv, int(tokens[0, -1]))

    def continue_from(self, kv: KVCache, token: int) -> None:
        self.generate_segment(torch.tensor([[token]], device=self.lens.device), kv)

    def generate_segment(self, tokens: Int[Tensor, "one pos"], kv: KVCache | None) -> None:
        """Generate up to the next operation on the cache or the end, then on from there."""
        start = len(self.steps)
        if start >= self.max_new_tokens or self.has_stopped():
            return
        if kv is not None and start in self.cache_operations:
            kv = apply_to_cache(self.cache_operations[start], kv)
            self.events.append(AppliedEdit(start, CACHE_POINT, operation_name(self.cache_operations[start]), True))
        stops = [step for step in self.cache_operations if step > start]
        until = min([*stops, self.max_new_tokens])
        watch, noted = LastPositionRecorder(self.generator), self.log_hooks(start)
        points = [
            "resid_post",
            "attn.q_rot",
            *(["attn.q_pass"] if self.lens.cfg.d_rotary < self.lens.cfg.d_head else []),
        ]
        edits = [*noted, *((name, watch) for name in [*points, "logits"])]
        options = {**self.options, **({} if self.generator is None else {"seed": self.generator})}
        names, every = options.pop("names", ()), torch.ones_like(tokens)
        run = self.lens.start_generation(
            tokens,
            until - start,
            hooks=edits,
            names=names,
            kv=kv,
            attention_mask=every,
            preceding_tokens=[step.token for step in self.steps],
            **options,
        ).run_to_end()
        self.collect_events(noted)
        self.runs.append(run)
        self.steps += build_step_records(self.lens, run, watch, start, tokens.shape[1], 0 if kv is None else kv.length)
        if not self.steps:
            raise KeyboardInterrupt  # before the first token: there is nothing to give back
        if len(self.steps) == until < self.max_new_tokens and run.stopped == "max_new_tokens":
            self.continue_from(run.kv, int(run.tokens[0, -1]))

    def has_stopped(self) -> bool:
        """Whether what was said has ended with a stop id or a stop string."""
        said = [moment.token for moment in self.steps]
        ids, strings = self.lens.resolve_stops(self.options.get("stop_ids"), self.options.get("stop_strings"))
        text = self.lens.to_string(said, continues=True) if strings else ""
        return bool(said) and (said[-1] in ids or any(s in text for s in strings))

    def log_hooks(self, start: int) -> list[tuple[str, Edit]]:
        return [(name, LoggedEdit(fn, start)) for name, fn in list_edits(self.hooks)]

    def collect_events(self, noted: Sequence[tuple[str, Edit]]) -> None:
        found = [event for _, edit in noted if isinstance(edit, LoggedEdit) for event in edit.events]
        self.events += sorted(found, key=lambda event: event.step)
        self.applied_hooks |= {i for i, (_, edit) in enumerate(noted) if isinstance(edit, LoggedEdit) and edit.events}

    def require_all_applied(self) -> None:
        """Raise HookError for an edit that never came to hold."""
        for i, (name, fn) in enumerate(list_edits(self.hooks)):
            if i not in self.applied_hooks and isinstance(fn, Only | InterventionHook):
                raise HookError(
                    f"{name!r}: {get_edit_name(fn)} asked for steps or positions that never came; "
                    f"the run ends with step {len(self.steps) - 1}"
                )

    def restore_generator(self, step: StepRecord | None) -> None:
        """Draw as a moment drew or, at the start, by the seed that was given or any; greedy runs draw nothing."""
        if self.options.get("temperature") is None:
            return
        how = GenerationConfig(**{name: self.options[name] for name in ("temperature", "seed") if name in self.options})
        state = how.make_generator(self.lens.device).get_state() if step is None else cast(Tensor, step.generator_state)
        self.generator = torch.Generator(self.lens.device)
        self.generator.set_state(state)

    def advance_generator(self) -> None:
        """Draw a token and leave it, where one was given in its place."""
        if self.generator is not None:
            torch.multinomial(
                torch.ones(1, self.lens.cfg.d_vocab, device=self.lens.device), 1, generator=self.generator
            )


def build_step_records(
    lens: Lens, run: GenerationResult, recorder: LastPositionRecorder, start: int, n_run: int, past_entries: int
) -> list[StepRecord]:
    """The steps of one run whose prompt had so many tokens behind so many entries."""
    kept, layers = recorder.values, range(lens.cfg.n_layers)
    found = []
    for i, token in enumerate(run.tokens[0, n_run:].tolist()):
        q = [[kept[f"blocks.{layer}.{n}"][i] for n in ("attn.q_rot", "attn.q_pass") if f"blocks.{layer}.{n}" in kept]
             for layer in layers]  # fmt: skip
        found.append(
            StepRecord(
                start + i,
                token,
                kept["logits"][i],
                torch.stack([kept[f"blocks.{layer}.resid_post"][i] for layer in layers]),
                torch.stack([torch.cat(parts, -1) for parts in q]),
                int(run.tokens[0, n_run + i - 1]),
                run.kv,
                past_entries + n_run + i - 1,
                recorder.generator_states[i],
            )
        )
    return found


def apply_to_cache(op: CacheFunction, kv: KVCache) -> KVCache:
    """The cache that an operation makes, of a copy: one that writes in place reaches no other run."""
    made: Any = op(kv.fork())
    if not isinstance(made, KVCache):
        raise PatchError(
            f"{operation_name(op)} returned {type(made).__name__}; expected a KVCache, end it with 'return kv'"
        )
    return made


def operation_name(op: CacheFunction) -> str:
    """What to call an operation on the cache."""
    return getattr(op, "__name__", type(op).__name__.lower())


def compile_hooks(
    lens: Lens,
    hooks: Hooks | None,
    interventions: Sequence[Intervention] | Intervention,
    tokens: Int[Tensor, "one pos"],
) -> Hooks:
    """Hooks, and interventions in a generation from these tokens, as hooks."""
    names = {"end": tokens.shape[1] - 1}
    return [*list_edits(hooks), *schedule_edits(lens, as_interventions(interventions), names=names)]


def schedule_edits(
    lens: Lens,
    hooks: Hooks | Sequence[Intervention] | Intervention | Any,
    *,
    steps: StepSelection = None,
    positions: StepSelection = None,
    names: Mapping[str, int] | None = None,
) -> list[tuple[str, Edit]]:
    """Hooks, an intervention or several, as hooks at some steps of a generation and some absolute positions alone.

    A list may hold both, in the order in which they are to hold at one point. `names` are positions by name, such as
    {"end": 8}: hooks do not know a prompt. Raises PatchError for what is neither, and for sites by query head.
    """
    edits: list[tuple[str, Edit]] = []
    single = [hooks] if isinstance(hooks, Intervention) else hooks
    listed: list[Any] = list(single.items() if isinstance(single, Mapping) else single)
    applied = AppliedInterventions.compile(
        lens, [one for one in listed if isinstance(one, Intervention)], position_names=names
    )
    if any(one.site.by_query_head for one in applied.interventions):
        raise PatchError("keys or values by query head need a cache that is not grouped: use patch.generate")
    done = 0  # interventions
    for entry in listed:
        if isinstance(entry, Intervention):
            edits += [(name, edit) for name, edit in applied.hooks if cast(InterventionHook, edit).index == done]
            done += 1
        else:
            if not isinstance(entry, tuple):
                raise PatchError(
                    f"{entry!r:.60}: hooks are {{'blocks.3.attn.z': fn}} or [('blocks.3.attn.z', fn), ...], and "
                    "interventions Intervention(site, change)"
                )
            edits += list_edits([entry])
    if steps is None and positions is None:
        return edits
    at = {what: None if asked is None else read_integers(asked, what, error=HookError)
          for what, asked in (("steps", steps), ("positions", positions))}  # fmt: skip
    return [(name, only(fn, **at)) for name, fn in edits]
