"""A generation under way that keeps what every step said and why, and its edits as they were applied."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.passes import PIECE, Memory, pieces
from glmlens.analysis.rows import Rows
from glmlens.generate import Sampling
from glmlens.hooks import Edit, HookError, Hooks, Only, Point, called, only, pairs
from glmlens.integers import Integers, read_integer, read_integers
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens
from glmlens.patch.interventions import Intervention, as_interventions
from glmlens.patch.running import Applied, Applying
from glmlens.patch.sites import PatchError
from glmlens.run import Run

OnCache = Callable[[KVCache], KVCache]
"""An operation such as `cache.evict(...)`, or any function from a cache to a new one."""
Which = Integers
CACHE = "the cache"  # where operations between steps happen


@dataclass(frozen=True)
class Event:
    """An edit as it was applied: at which step and point, what it is called, and whether any number changed."""

    step: int
    point: str
    what: str
    changed: bool


@dataclass
class Noted:
    """An edit that keeps a list of when it was applied; in a run that goes on, its steps count from the first."""

    fn: Edit
    start: int = 0
    events: list[Event] = field(default_factory=list)

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        point = replace(point, step=point.step + self.start)
        if not holds(self.fn, point):
            return x
        new = self.fn(x.clone(), point)
        changed = not (isinstance(new, Tensor) and torch.equal(new, x))
        self.events.append(Event(point.step, point.name, called(self.fn), changed))
        return new


def holds(fn: Edit, point: Point) -> bool:
    """Whether an edit has anything to do at a point: one that says where it holds, and does not hold here, has not."""
    if isinstance(fn, Only):
        return fn.selects(point) is not None and holds(fn.fn, point)
    return fn.holds(point) if isinstance(fn, Applying) else True


@dataclass
class Last:
    """Edits that change nothing and keep what each step has at its last position, and how its token will be drawn."""

    draw: torch.Generator | None = None
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    drawn: list[Tensor | None] = field(default_factory=list)

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        self.kept.setdefault(point.name, []).append(x[0, -1].clone())
        if point.name == "logits":
            self.drawn.append(self.draw and self.draw.get_state())
        return x


@dataclass(frozen=True, eq=False)
class Moment:
    """One step: the token that it chose and its logits, and what led there.

    `kv` is a cache whose first `before` entries are what the step began with, `entry` the token that it ran then (step
    0: the last of the prompt), and `draw` the state of the generator that it drew from.
    """

    step: int
    token: int
    logits: Float[Tensor, "vocab"]
    resid: Float[Tensor, "layer model"]
    q: Float[Tensor, "layer head d"]
    entry: int
    kv: KVCache
    before: int
    draw: Tensor | None = None

    def memory(self) -> Memory:
        """What this step began with, as a cache of its own, and the token that it ran."""
        kv = self.kv.fork(1)
        kv.truncate(self.before)
        return Memory(kv, torch.tensor([self.entry], device=kv.keys.device))


@dataclass
class Recording:
    """A generation under way that keeps its moments."""

    lens: Lens
    hooks: Hooks
    at: Mapping[Any, OnCache]
    last: int
    options: Mapping[str, Any] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    draw: torch.Generator | None = None

    def possible(self, first: int) -> None:
        """Raise ValueError for an operation at a step that does not come, TypeError for what is no operation."""
        self.at = {read_integer(step, "the step of an operation"): op for step, op in self.at.items()}
        wrong = [step for step in self.at if not first <= step < self.last]
        if wrong:
            raise ValueError(f"operations at steps {wrong}; this run has {first} to {self.last - 1}")
        for step, op in self.at.items():
            if not callable(op):
                raise TypeError(
                    f"the operation at step {step} is a {type(op).__name__}; expected a function from a cache to a new "
                    f"one; two of them are lambda kv: second(first(kv))"
                )

    def begin(self, tokens: Int[Tensor, "one pos"]) -> None:
        """Run the prompt, a long one in pieces, and go on from there."""
        if tokens.shape[1] <= PIECE and 0 not in self.at:
            return self.segment(tokens, None)
        kv, noted = self.lens.new_kv(1, tokens.shape[1] + min(self.last, 256)), self.noted(0)
        if tokens.shape[1] > 1:
            for _ in pieces(Rows(self.lens, tokens[:, :-1], None), hooks=noted, kv=kv):
                pass
        self.note(noted)
        return self.go(kv, int(tokens[0, -1]))

    def go(self, kv: KVCache, token: int) -> None:
        self.segment(torch.tensor([[token]], device=self.lens.device), kv)

    def segment(self, tokens: Int[Tensor, "one pos"], kv: KVCache | None) -> None:
        """Generate up to the next operation on the cache or the end, then on from there."""
        start = len(self.moments)
        if start >= self.last or self.said_enough():
            return
        if kv is not None and start in self.at:
            kv = operated(self.at[start], kv)
            self.events.append(Event(start, CACHE, named(self.at[start]), True))
        stops = [step for step in self.at if step > start]
        until = min([*stops, self.last])
        watch, noted = Last(self.draw), self.noted(start)
        points = [
            "resid_post",
            "attn.q_rot",
            *(["attn.q_pass"] if self.lens.cfg.d_rotary < self.lens.cfg.d_head else []),
        ]
        edits = [*noted, *((name, watch) for name in [*points, "logits"])]
        options = {**self.options, **({} if self.draw is None else {"seed": self.draw})}
        names, every = options.pop("names", ()), torch.ones_like(tokens)
        going = self.lens._start(tokens, until - start, names, hooks=edits, kv=kv, attention_mask=every, **options)
        going.said = tuple(moment.token for moment in self.moments)
        run = going.whole()
        self.note(noted)
        self.runs.append(run)
        self.moments += moments(self.lens, run, watch, start, tokens.shape[1], 0 if kv is None else kv.length)
        if not self.moments:
            raise KeyboardInterrupt  # before the first token: there is nothing to give back
        if len(self.moments) == until < self.last and run.stopped == "max_new_tokens":
            self.go(run.kv, int(run.tokens[0, -1]))

    def said_enough(self) -> bool:
        """Whether what was said has ended with a stop id or a stop string."""
        said = [moment.token for moment in self.moments]
        ids, strings = self.lens.stops(self.options.get("stop_ids"), self.options.get("stop_strings"))
        text = self.lens.to_string(said, continues=True) if strings else ""
        return bool(said) and (said[-1] in ids or any(s in text for s in strings))

    def noted(self, start: int) -> list[tuple[str, Edit]]:
        return [(name, Noted(fn, start)) for name, fn in pairs(self.hooks)]

    def note(self, noted: Sequence[tuple[str, Edit]]) -> None:
        found = [event for _, edit in noted if isinstance(edit, Noted) for event in edit.events]
        self.events += sorted(found, key=lambda event: event.step)
        self.held |= {i for i, (_, edit) in enumerate(noted) if isinstance(edit, Noted) and edit.events}

    def all_held(self) -> None:
        """Raise HookError for an edit that never came to hold."""
        for i, (name, fn) in enumerate(pairs(self.hooks)):
            if i not in self.held and isinstance(fn, Only | Applying):
                raise HookError(
                    f"{name!r}: {called(fn)} asked for steps or positions that never came; "
                    f"the run ends with step {len(self.moments) - 1}"
                )

    def draw_from(self, moment: Moment | None) -> None:
        """Draw as a moment drew or, at the start, by the seed that was given or any; greedy runs draw nothing."""
        if self.options.get("temperature") is None:
            return
        how = Sampling(**{name: self.options[name] for name in ("temperature", "seed") if name in self.options})
        state = how.generator(self.lens.device).get_state() if moment is None else cast(Tensor, moment.draw)
        self.draw = torch.Generator(self.lens.device)
        self.draw.set_state(state)

    def draw_once(self) -> None:
        """Draw a token and leave it, where one was given in its place."""
        if self.draw is not None:
            torch.multinomial(torch.ones(1, self.lens.cfg.d_vocab, device=self.lens.device), 1, generator=self.draw)


def moments(lens: Lens, run: Run, watch: Last, start: int, ran: int, past: int) -> list[Moment]:
    """The steps of one run whose prompt had so many tokens behind so many entries."""
    kept, layers = watch.kept, range(lens.cfg.n_layers)
    found = []
    for i, token in enumerate(run.tokens[0, ran:].tolist()):
        q = [[kept[f"blocks.{layer}.{n}"][i] for n in ("attn.q_rot", "attn.q_pass") if f"blocks.{layer}.{n}" in kept]
             for layer in layers]  # fmt: skip
        found.append(
            Moment(
                start + i,
                token,
                kept["logits"][i],
                torch.stack([kept[f"blocks.{layer}.resid_post"][i] for layer in layers]),
                torch.stack([torch.cat(parts, -1) for parts in q]),
                int(run.tokens[0, ran + i - 1]),
                run.kv,
                past + ran + i - 1,
                watch.drawn[i],
            )
        )
    return found


def operated(op: OnCache, kv: KVCache) -> KVCache:
    """The cache that an operation makes, of a copy: one that writes in place reaches no other run."""
    made: Any = op(kv.fork())
    if not isinstance(made, KVCache):
        raise PatchError(f"{named(op)} returned {type(made).__name__}; expected a KVCache, end it with 'return kv'")
    return made


def named(op: OnCache) -> str:
    """What to call an operation on the cache."""
    return getattr(op, "__name__", type(op).__name__.lower())


def compiled(
    lens: Lens,
    hooks: Hooks | None,
    interventions: Sequence[Intervention] | Intervention,
    tokens: Int[Tensor, "one pos"],
) -> Hooks:
    """Hooks, and interventions in a generation from these tokens, as hooks."""
    names = {"end": tokens.shape[1] - 1}
    return [*pairs(hooks), *scheduled(lens, as_interventions(interventions), names=names)]


def scheduled(
    lens: Lens,
    what: Hooks | Sequence[Intervention] | Intervention | Any,
    *,
    steps: Which = None,
    positions: Which = None,
    names: Mapping[str, int] | None = None,
) -> list[tuple[str, Edit]]:
    """Hooks, an intervention or several, as hooks at some steps of a generation and some absolute positions alone.

    A list may hold both, in the order in which they are to hold at one point. `names` are positions by name, such as
    {"end": 8}: hooks do not know a prompt. Raises PatchError for what is neither, and for sites by query head.
    """
    edits: list[tuple[str, Edit]] = []
    single = [what] if isinstance(what, Intervention) else what
    listed: list[Any] = list(single.items() if isinstance(single, Mapping) else single)
    applied = Applied.to(lens, [one for one in listed if isinstance(one, Intervention)], names=names)
    if any(one.site.ungrouped for one in applied.interventions):
        raise PatchError("keys or values by query head need a cache that is not grouped: use patch.generate")
    done = 0  # interventions
    for entry in listed:
        if isinstance(entry, Intervention):
            edits += [(name, edit) for name, edit in applied.hooks if cast(Applying, edit).i == done]
            done += 1
        else:
            if not isinstance(entry, tuple):
                raise PatchError(
                    f"{entry!r:.60}: hooks are {{'blocks.3.attn.z': fn}} or [('blocks.3.attn.z', fn), ...], and "
                    "interventions Intervention(site, change)"
                )
            edits += pairs([entry])
    if steps is None and positions is None:
        return edits
    at = {what: None if asked is None else read_integers(asked, what, error=HookError)
          for what, asked in (("steps", steps), ("positions", positions))}  # fmt: skip
    return [(name, only(fn, **at)) for name, fn in edits]
