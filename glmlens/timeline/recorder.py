"""Record a generation step by step: logits, residual streams, queries and KV cache of every step, and applied edits.

A generation runs in segments. A segment ends where an operation on the KV cache is due; the next one starts from the
cache that the operation returns. One set of hooks records the last position of every forward pass, another runs the
caller's edits and logs each call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.chunked_runs import CHUNK_SIZE, DecodingState, run_in_chunks
from glmlens.analysis.prompt_batch import PromptBatch
from glmlens.deprecated import rename_attribute, rename_keyword, rename_method
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
"""An operation such as `cache.evict(...)`, or any function that takes a KV cache and returns a new one."""
StepSelection = Integers
CACHE_POINT = "the cache"  # stands for the hook point in events of operations on the KV cache


@dataclass(frozen=True)
class AppliedEdit:
    """One application of an edit: the step, the hook point, the name of the edit, and whether it changed any number."""

    step: int
    point: str
    edit_name: str
    changed: bool

    what = rename_attribute("what", "edit_name")


@dataclass
class LoggedEdit:
    """An edit that logs its applications in `events`.

    `first_step` is the step with which the segment starts: hooks count steps from the start of their segment, events
    from the start of the timeline.
    """

    fn: Edit
    first_step: int = 0
    events: list[AppliedEdit] = field(default_factory=list)

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        point = replace(point, step=point.step + self.first_step)
        if not applies_at(self.fn, point):
            return x
        # The edit gets a clone: one that writes in place would otherwise change `x`, and the comparison see no change.
        new = self.fn(x.clone(), point)
        changed = not (isinstance(new, Tensor) and torch.equal(new, x))
        event = AppliedEdit(step=point.step, point=point.name, edit_name=get_edit_name(self.fn), changed=changed)
        self.events.append(event)
        return new


def applies_at(fn: Edit, point: Point) -> bool:
    """Whether an edit does anything at `point`; False for one that is restricted to other steps or positions."""
    if isinstance(fn, Only):  # may wrap another restricted edit
        return fn.select_positions(point) is not None and applies_at(fn.fn, point)
    return fn.applies_at(point) if isinstance(fn, InterventionHook) else True


@dataclass
class LastPositionRecorder:
    """A hook that records the last position of every step, and the generator's state before the step's draw."""

    generator: torch.Generator | None = None
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    generator_states: list[Tensor | None] = field(default_factory=list)

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        self.values.setdefault(point.name, []).append(x[0, -1].clone())
        if point.name == "logits":
            # Logits are the last point of a forward pass: the step's token is drawn next, from this state.
            self.generator_states.append(None if self.generator is None else self.generator.get_state())
        return x


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One step of a generation: the chosen token, the logits, and the activations at the last position.

    `resid` is the residual stream after every layer, `q` the queries as attention uses them (rotated channels, then
    unrotated ones). `input_token` is the token that the step ran: at step 0 the last one of the prompt, later the token
    chosen at the step before. The first `past_entries` entries of `kv` are the cache with which the step started; all
    steps of a segment share one `kv`. `generator_state` is the random generator's state before the draw, None for a
    greedy step.
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
        """Return the state with which the step started: a cache of its own, and the token that the step ran."""
        kv = self.kv.fork(1)
        kv.truncate(self.past_entries)
        return DecodingState(kv, torch.tensor([self.input_token], device=kv.keys.device))

    memory = rename_method("memory", "restore_state")


@dataclass
class TimelineRecorder:
    """A generation of one prompt that is recorded while it runs.

    `cache_operations` are operations on the KV cache by the step before which they run, `applied_hooks` the indices of
    the hooks that were applied at least once. A rerun starts with the steps that it keeps and their generator.
    """

    lens: Lens
    hooks: Hooks
    cache_operations: Mapping[int, CacheFunction]
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: list[StepRecord] = field(default_factory=list)
    events: list[AppliedEdit] = field(default_factory=list)
    runs: list[GenerationResult] = field(default_factory=list)
    applied_hooks: set[int] = field(default_factory=set)
    generator: torch.Generator | None = None

    def run_prompt(self, tokens: Int[Tensor, "one pos"]) -> None:
        """Run the prompt, a long one in chunks, and generate."""
        if tokens.shape[1] <= CHUNK_SIZE and 0 not in self.cache_operations:
            return self.generate_segment(tokens, None)
        # All tokens but the last fill the cache. The last one is the input of step 0, so that an operation at step 0
        # finds a complete cache, and the logits of step 0 come after it.
        kv = self.lens.new_kv(1, tokens.shape[1] + min(self.max_new_tokens, 256))
        noted = self.log_hooks(0)
        if tokens.shape[1] > 1:
            for _ in run_in_chunks(PromptBatch(self.lens, tokens[:, :-1], None), hooks=noted, kv=kv):
                pass
        self.collect_events(noted)
        return self.continue_from(kv, int(tokens[0, -1]))

    def continue_from(self, kv: KVCache, token: int) -> None:
        """Run `token` after a KV cache, and generate."""
        self.generate_segment(torch.tensor([[token]], device=self.lens.device), kv)

    def generate_segment(self, tokens: Int[Tensor, "one pos"], kv: KVCache | None) -> None:
        """Generate up to the next operation on the KV cache, then continue with the next segment; return at the end.

        Raises KeyboardInterrupt if it was interrupted before the first step of all. Later interruptions end the run.
        """
        start = len(self.steps)
        if start >= self.max_new_tokens or self.has_stopped():
            return
        if kv is not None and start in self.cache_operations:
            operation = self.cache_operations[start]
            kv = apply_to_cache(operation, kv)
            name = operation_name(operation)
            self.events.append(AppliedEdit(step=start, point=CACHE_POINT, edit_name=name, changed=True))
        until = min([*(step for step in self.cache_operations if step > start), self.max_new_tokens])
        noted = self.log_hooks(start)
        watch = LastPositionRecorder(self.generator)
        points = ["resid_post", "attn.q_rot", "logits"]
        if self.lens.cfg.d_rotary < self.lens.cfg.d_head:
            points.append("attn.q_pass")  # a point only of models with unrotated channels
        edits = [*noted, *((name, watch) for name in points)]  # recorded after the edits: the edited values
        options = dict(self.options)
        if self.generator is not None:
            options["seed"] = self.generator  # one generator for all segments
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
        self.steps += build_step_records(
            self.lens, run, watch, start=start, n_run=tokens.shape[1], past_entries=0 if kv is None else kv.length
        )
        if not self.steps:
            raise KeyboardInterrupt  # interrupted before the first token: no timeline to return
        # The segment ended where an operation is due, neither at a stop nor by an interruption: run the next one.
        if len(self.steps) == until < self.max_new_tokens and run.stopped == "max_new_tokens":
            self.continue_from(run.kv, int(run.tokens[0, -1]))

    def has_stopped(self) -> bool:
        """Whether the generated tokens end with a stop id or contain a stop string."""
        tokens = [record.token for record in self.steps]
        ids, strings = self.lens.resolve_stops(self.options.get("stop_ids"), self.options.get("stop_strings"))
        text = self.lens.to_string(tokens, continues=True) if strings else ""
        return bool(tokens) and (tokens[-1] in ids or any(string in text for string in strings))

    def log_hooks(self, start: int) -> list[tuple[str, Edit]]:
        """Return the hooks, each wrapped to log its applications, for a segment that starts with step `start`."""
        return [(name, LoggedEdit(fn, start)) for name, fn in list_edits(self.hooks)]

    def collect_events(self, noted: Sequence[tuple[str, Edit]]) -> None:
        """Append the events of logged hooks in the order of steps, and note which hooks were applied."""
        events = [event for _, edit in noted if isinstance(edit, LoggedEdit) for event in edit.events]
        self.events += sorted(events, key=lambda event: event.step)
        self.applied_hooks |= {i for i, (_, edit) in enumerate(noted) if isinstance(edit, LoggedEdit) and edit.events}

    def require_all_applied(self) -> None:
        """Raise HookError if an edit restricted to steps or positions was never applied."""
        for i, (name, fn) in enumerate(list_edits(self.hooks)):
            if i not in self.applied_hooks and isinstance(fn, Only | InterventionHook):
                raise HookError(
                    f"{name!r}: {get_edit_name(fn)} is restricted to steps or positions that never came; "
                    f"the run ends with step {len(self.steps) - 1}"
                )

    def advance_generator(self) -> None:
        """Draw one token and discard it.

        A step whose token is given draws none. With this draw, the steps after it draw as they would have.
        """
        if self.generator is not None:
            uniform = torch.ones(1, self.lens.cfg.d_vocab, device=self.lens.device)
            torch.multinomial(uniform, 1, generator=self.generator)


def make_generator(lens: Lens, options: Mapping[str, Any], step: StepRecord | None) -> torch.Generator | None:
    """Return the generator of a sampled run, None for a greedy one.

    It has the state from which `step` drew its token or, without a step, that of the option `seed`.
    """
    if options.get("temperature") is None:
        return None
    if step is None:
        sampling = GenerationConfig(**{name: options[name] for name in ("temperature", "seed") if name in options})
        state = sampling.make_generator(lens.device).get_state()
    else:
        state = cast(Tensor, step.generator_state)  # recorded at every step of a sampled run
    generator = torch.Generator(lens.device)
    generator.set_state(state)
    return generator


def read_cache_operations(
    operations: Mapping[Any, CacheFunction], first_step: int, max_new_tokens: int
) -> dict[int, CacheFunction]:
    """Return operations on the KV cache by step.

    Raises ValueError for steps outside [first_step, max_new_tokens), TypeError for an operation that is no function.
    """
    by_step = {read_integer(step, "the step of an operation"): op for step, op in operations.items()}
    outside = [step for step in by_step if not first_step <= step < max_new_tokens]
    if outside:
        raise ValueError(f"operations at steps {outside}; this run has {first_step} to {max_new_tokens - 1}")
    for step, op in by_step.items():
        if not callable(op):
            raise TypeError(
                f"the operation at step {step} is a {type(op).__name__}; expected a function that takes a cache and "
                f"returns a new one; two of them are lambda kv: second(first(kv))"
            )
    return by_step


def build_step_records(
    lens: Lens, run: GenerationResult, recorder: LastPositionRecorder, *, start: int, n_run: int, past_entries: int
) -> list[StepRecord]:
    """Return the records of a segment's steps.

    The segment started with step `start`, by running `n_run` tokens after `past_entries` cache entries.
    """
    values = recorder.values
    layers = range(lens.cfg.n_layers)
    records = []
    for i, token in enumerate(run.tokens[0, n_run:].tolist()):
        queries = []
        for layer in layers:
            points = (f"blocks.{layer}.attn.q_rot", f"blocks.{layer}.attn.q_pass")
            # Rotated channels first, then unrotated ones, as in the cached keys.
            queries.append(torch.cat([values[point][i] for point in points if point in values], -1))
        record = StepRecord(
            step=start + i,
            token=token,
            logits=values["logits"][i],
            resid=torch.stack([values[f"blocks.{layer}.resid_post"][i] for layer in layers]),
            q=torch.stack(queries),
            input_token=int(run.tokens[0, n_run + i - 1]),
            kv=run.kv,
            past_entries=past_entries + n_run + i - 1,  # without the entry of the input token
            generator_state=recorder.generator_states[i],
        )
        records.append(record)
    return records


def apply_to_cache(op: CacheFunction, kv: KVCache) -> KVCache:
    """Return the KV cache that `op` returns for a copy of `kv`. Raises PatchError if it returns no cache.

    The copy keeps an operation that writes in place from changing the caches of other runs.
    """
    changed: Any = op(kv.fork())
    if not isinstance(changed, KVCache):
        raise PatchError(
            f"{operation_name(op)} returned {type(changed).__name__}; expected a KVCache, end it with 'return kv'"
        )
    return changed


def operation_name(op: CacheFunction) -> str:
    """Return the name under which an operation on the KV cache stands in events."""
    return getattr(op, "__name__", type(op).__name__.lower())


def compile_hooks(
    lens: Lens,
    hooks: Hooks | None,
    interventions: Sequence[Intervention] | Intervention,
    tokens: Int[Tensor, "one pos"],
) -> Hooks:
    """Return hooks and interventions as one list of hooks; the position "end" is the last of `tokens`."""
    position_names = {"end": tokens.shape[1] - 1}
    return [*list_edits(hooks), *schedule_edits(lens, as_interventions(interventions), position_names=position_names)]


@rename_keyword("what", "hooks")
@rename_keyword("names", "position_names")
def schedule_edits(
    lens: Lens,
    hooks: Hooks | Sequence[Intervention] | Intervention | Any,
    *,
    steps: StepSelection = None,
    positions: StepSelection = None,
    position_names: Mapping[str, int] | None = None,
) -> list[tuple[str, Edit]]:
    """Return hooks and interventions as hooks that run at some steps of a generation or absolute positions only.

    `hooks` is hooks, an intervention, or a list of both in the order in which they run at one point. Steps count from
    0, the one that chooses the first new token; None restricts nothing. `position_names` maps names to positions, such
    as {"end": 8}, for sites that use names: hooks do not know the prompt. Raises PatchError for anything else in the
    list, and for sites by query head of keys or values.
    """
    listed: list[Any]
    if isinstance(hooks, Intervention):
        listed = [hooks]
    else:
        listed = list(hooks.items() if isinstance(hooks, Mapping) else hooks)
    applied = AppliedInterventions.compile(
        lens, [entry for entry in listed if isinstance(entry, Intervention)], position_names=position_names
    )
    if any(intervention.site.by_query_head for intervention in applied.interventions):
        raise PatchError(
            "keys or values by query head need a cache that is not grouped: use patch.generate_with_interventions"
        )
    # All interventions were compiled together; take the hooks of each where it stands in the list.
    edits: list[tuple[str, Edit]] = []
    n_interventions = 0
    for entry in listed:
        if isinstance(entry, Intervention):
            index = n_interventions
            edits += [(name, edit) for name, edit in applied.hooks if cast(InterventionHook, edit).index == index]
            n_interventions += 1
        elif isinstance(entry, tuple):
            edits += list_edits([entry])
        else:
            raise PatchError(
                f"{entry!r:.60}: hooks are {{'blocks.3.attn.z': fn}} or [('blocks.3.attn.z', fn), ...], and "
                "interventions Intervention(site, change)"
            )
    if steps is None and positions is None:
        return edits
    chosen_steps = None if steps is None else read_integers(steps, "steps", error=HookError)
    chosen_positions = None if positions is None else read_integers(positions, "positions", error=HookError)
    return [(name, only(fn, steps=chosen_steps, positions=chosen_positions)) for name, fn in edits]
