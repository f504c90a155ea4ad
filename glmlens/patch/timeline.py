"""Recorded generation: what every step said and why, run again from any step, and where two runs part.

A step is recorded at its last position alone: its logits, the residual stream of every layer, its queries. Keys are in
the cache. So a timeline weighs little, attention is derived head by head when it is asked for, and a run that goes on
from step k starts from the cache as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.passes import PIECE, Memory, pieces
from glmlens.analysis.rows import Rows, Token, exact, label, layers_of, numbers
from glmlens.hooks import Edit, HookError, Hooks, Only, Point, called, only, pairs
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens
from glmlens.model import additive_mask, eager
from glmlens.patch.interventions import Intervention
from glmlens.patch.running import Applied
from glmlens.patch.sites import PatchError
from glmlens.prompt import Prompt
from glmlens.results import Labelled
from glmlens.run import Run

OnCache = Callable[[KVCache], KVCache]
"""An operation such as `cache.evict(...)`, or any function from a cache to a new one."""
Which = int | Sequence[int] | range | None
CACHE = "the cache"  # where operations between steps happen
WHOLE = ("repetition_penalty", "stop_strings")  # look at all that was said, of which a run that goes on has a part
UNSEEN = ("kv.k", "attn.scores", "attn.pattern")  # edits there change attention, and neither queries nor the cache


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
        if isinstance(self.fn, Only) and self.fn.selects(point) is None:
            return x
        new = self.fn(x.clone(), point)
        changed = not (isinstance(new, Tensor) and torch.equal(new, x))
        self.events.append(Event(point.step, point.name, called(self.fn), changed))
        return new


@dataclass
class Last:
    """Edits that change nothing and keep what each step has at its last position."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        self.kept.setdefault(point.name, []).append(x[0, -1].clone())
        return x


@dataclass(frozen=True, eq=False)
class Moment:
    """One step: the token that it chose and its logits, and what led there.

    `kv` is a cache whose first `before` entries are what the step began with, `entry` the token that it ran then (step
    0: the last of the prompt).
    """

    step: int
    token: int
    logits: Float[Tensor, "vocab"]
    resid: Float[Tensor, "layer model"]
    q: Float[Tensor, "layer head d"]
    entry: int
    kv: KVCache
    before: int

    def memory(self) -> Memory:
        """What this step began with, as a cache of its own, and the token that it ran."""
        kv = self.kv.fork(1)
        kv.truncate(self.before)
        return Memory(kv, torch.tensor([self.entry], device=kv.keys.device))


@dataclass(frozen=True, eq=False, repr=False)
class Timeline:
    """A generation of one prompt, step by step; `runs` are the plain runs that it was made of, with what `names` said.

    `events` are the edits as they were applied, in order.
    """

    lens: Lens
    prompt: Int[Tensor, "one pos"]
    moments: tuple[Moment, ...]
    events: tuple[Event, ...]
    runs: tuple[Run, ...]
    hooks: Hooks
    at: Mapping[int, OnCache]
    last: int
    options: Mapping[str, Any]

    @property
    def tokens(self) -> list[int]:
        """What was said, without the prompt."""
        return [moment.token for moment in self.moments]

    @property
    def text(self) -> str:
        return self.lens.to_string(self.tokens)

    @property
    def logits(self) -> Float[Tensor, "step vocab"]:
        return torch.stack([moment.logits for moment in self.moments])

    def labelled(self, x: Tensor, axes: str, metric: str, **labels: Sequence[str]) -> Labelled:
        steps = [f"{m.step} {label(self.lens, m.token)}" for m in self.moments]
        about = {
            "metric": metric, "direction": "the token that each step chose", "positions": "steps of a generation",
            "prompt": " ".join(label(self.lens, i) for i in self.prompt[0].tolist()[-12:]),
            "edits": ", ".join(dict.fromkeys(event.what for event in self.events)) or "none",
            "model": self.lens.model_hash,
        }  # fmt: skip
        return Labelled(numbers(x), tuple(axes.split()), {"step": steps, **labels}, about)

    def probability(self, token: Token | None = None) -> Labelled:
        """The probability [step] of the tokens that were chosen, or of one token at all steps."""
        probs = exact(self.logits).softmax(-1)
        if token is None:
            ids = torch.tensor(self.tokens, device=probs.device)
            return self.labelled(probs.gather(1, ids[:, None]).squeeze(1), "step", "probability")
        i = token if isinstance(token, int) else self.lens.to_single_token(token)
        return self.labelled(probs[:, i], "step", f"probability of {label(self.lens, i)}")

    def entropy(self) -> Labelled:
        """The entropy [step] of the next token, in nats."""
        logs = exact(self.logits).log_softmax(-1)
        return self.labelled(-torch.xlogy(logs.exp(), logs.exp()).sum(-1), "step", "entropy, nats")

    def logit_lens(self) -> Labelled:
        """The probability [layer, step] of the chosen tokens by every layer's stream, read as if it were the last."""
        logs = exact(self.readings()).log_softmax(-1)
        ids = torch.tensor(self.tokens, device=logs.device).expand(len(logs), -1)
        found = logs.gather(2, ids.unsqueeze(-1)).squeeze(-1).exp()
        return self.labelled(found, "layer step", "logit lens: probability", layer=layers_of(self.lens))

    def readings(self) -> Float[Tensor, "layer step vocab"]:
        """The logits of every layer's stream; see `logit_lens`."""
        model, resid = self.lens.model, torch.stack([moment.resid for moment in self.moments], 1)
        return torch.stack([model.unembed(model.ln_final(x[None]))[0] for x in resid])

    def attention(self, layer: int, head: int) -> Labelled:
        """What every step's last position attended to [step, key], derived now; keys by absolute position.

        Raises HookError where an edit changed what attention reads after the cache: record "attn.pattern" then.
        """
        for event in self.events:
            if event.point.endswith(UNSEEN) and event.point.startswith(f"blocks.{layer}."):
                raise HookError(f"{event.what} at {event.point} changed this: record it, names='attn.pattern'")
        n_keys = 1 + max(int(m.kv.positions[0, : m.before + 1].max()) for m in self.moments)
        found = torch.zeros(len(self.moments), n_keys, dtype=self.lens.dtype, device=self.lens.device)
        for row, moment in zip(found, self.moments, strict=True):
            at = moment.kv.positions[:, : moment.before + 1]
            real = at[0] >= 0
            row[at[0, real]] = self.attended(moment, layer, head, at)[real]
        places = [str(i) for i in range(n_keys)]
        return self.labelled(found, "step key", f"attention of layer {layer}, head {head}", key=places)

    def attended(self, moment: Moment, layer: int, head: int, at: Int[Tensor, "one key"]) -> Float[Tensor, "key"]:
        keys = moment.kv.keys[layer, :, : moment.before + 1, head // self.lens.cfg.n_groups].unsqueeze(2)
        q, seen = moment.q[layer, head][None, None, None], dict[str, Tensor]()

        def note(name: str, x: Tensor) -> Tensor:
            seen[name] = x
            return x

        eager(q, keys, keys, additive_mask(at[:, -1:], at, q.dtype), note)
        return seen["attn.pattern"][0, 0, 0]

    def memory(self, step: int) -> Memory:
        """What a step began with: for `who_reads` and `leave_one_out`, or to go on from with other means."""
        return self.moment(step).memory()

    def moment(self, step: int) -> Moment:
        if not 0 <= step < len(self.moments):
            raise IndexError(f"step {step} asked for; this timeline has 0 to {len(self.moments) - 1}")
        return self.moments[step]

    def rerun(
        self,
        step: int,
        *,
        token: Token | None = None,
        hooks: Hooks | None = None,
        interventions: Sequence[Intervention] | Intervention = (),
        at: Mapping[int, OnCache] | None = None,
        max_new_tokens: int | None = None,
    ) -> "Timeline":
        """The same run up to a step, from there with a change; what came before is not computed again.

        With `token`, that step says another token and the next ones go on from it. `hooks`, `interventions` and `at`
        are in place of this run's own, from that step on; their steps and positions count as in this run. What was done
        to the cache up to that step stays done. At step 0 the prompt is run anew.
        """
        moment, last = self.moment(step), self.last if max_new_tokens is None else max_new_tokens
        if last <= step:
            raise ValueError(f"max_new_tokens is {last}, counted from the start: nothing is left to say at step {step}")
        given, anew = self.hooks if hooks is None else hooks, step == 0 and token is None
        later = {i: op for i, op in self.at.items() if anew or i > step}
        going = Recording(self.lens, compiled(self.lens, given, interventions), later if at is None else at, last)
        going.options, going.held = self.options, set(range(len(pairs(self.hooks)))) if hooks is None else set()
        going.moments = list(self.moments[:step])
        if token is not None:
            said = token if isinstance(token, int) else self.lens.to_single_token(token)
            going.moments.append(replace(moment, token=said))
            going.go(self.after(moment), said)
        elif anew:
            going.begin(self.prompt)
        else:
            going.go(moment.memory().kv, moment.entry)
        stays = [
            e for e in self.events if e.step < step + (token is not None) or (e.point == CACHE and 0 < e.step <= step)
        ]
        return going.timeline(self.prompt, stays)

    def after(self, moment: Moment) -> KVCache:
        """The cache once this step's token has been run."""
        kv = moment.kv.fork(1)
        kv.truncate(moment.before + 1)
        return kv

    def __repr__(self) -> str:
        said = " ".join(label(self.lens, token) for token in self.tokens)
        changed = sum(event.changed for event in self.events)
        return (
            f"Timeline of {len(self.moments)} steps: {said}\n  edits applied: {len(self.events)}, {changed} of effect"
        )


@dataclass
class Recording:
    """A generation under way that keeps its moments."""

    lens: Lens
    hooks: Hooks
    at: Mapping[int, OnCache]
    last: int
    options: Mapping[str, Any] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    held: set[int] = field(default_factory=set)

    def begin(self, tokens: Int[Tensor, "one pos"]) -> None:
        """Run the prompt, a long one in pieces, and go on from there."""
        if tokens.shape[1] <= PIECE and 0 not in self.at:
            return self.segment(tokens, None)
        kv, noted = self.lens.new_kv(1, tokens.shape[1] + self.last), self.noted(0)
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
        if start >= self.last:
            return
        if kv is not None and start in self.at:
            kv = self.at[start](kv)
            self.events.append(Event(start, CACHE, named(self.at[start]), True))
        stops = [step for step in self.at if step > start]
        until = min([*stops, self.last])
        watch, noted = Last(), self.noted(start)
        points = [
            "resid_post",
            "attn.q_rot",
            *(["attn.q_pass"] if self.lens.cfg.d_rotary < self.lens.cfg.d_head else []),
        ]
        edits = [*noted, *((name, watch) for name in [*points, "logits"])]
        seed = self.options.get("seed")
        options = {**self.options, **({} if seed is None else {"seed": seed + start})}
        run = self.lens.generate(tokens, until - start, hooks=edits, kv=kv, **options)
        self.note(noted)
        self.runs.append(run)
        self.moments += moments(self.lens, run, watch, start, tokens.shape[1], 0 if kv is None else kv.length)
        if len(self.moments) == until < self.last and run.stopped == "max_new_tokens":
            self.go(run.kv, int(run.tokens[0, -1]))

    def noted(self, start: int) -> list[tuple[str, Edit]]:
        return [(name, Noted(fn, start)) for name, fn in pairs(self.hooks)]

    def note(self, noted: Sequence[tuple[str, Edit]]) -> None:
        found = [event for _, edit in noted if isinstance(edit, Noted) for event in edit.events]
        self.events += sorted(found, key=lambda event: event.step)
        self.held |= {i for i, (_, edit) in enumerate(noted) if isinstance(edit, Noted) and edit.events}

    def timeline(self, prompt: Int[Tensor, "one pos"], before: Sequence[Event] = ()) -> Timeline:
        """What there is; HookError for an edit that never came to hold."""
        for i, (name, fn) in enumerate(pairs(self.hooks)):
            if i not in self.held and isinstance(fn, Only):
                raise HookError(
                    f"{name!r}: {called(fn)} asked for steps or positions that never came; "
                    f"the run ends with step {len(self.moments) - 1}"
                )
        return Timeline(
            self.lens,
            prompt,
            tuple(self.moments),
            (*before, *self.events),
            tuple(self.runs),
            self.hooks,
            self.at,
            self.last,
            self.options,
        )


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
            )
        )
    return found


def timeline(
    lens: Lens,
    prompt: Prompt,
    max_new_tokens: int = 20,
    *,
    hooks: Hooks | None = None,
    interventions: Sequence[Intervention] | Intervention = (),
    at: Mapping[int, OnCache] | None = None,
    **options: Any,
) -> Timeline:
    """Generate from one prompt and keep what every step said and read.

    `hooks` and `interventions` are those of a plain forward, and hold at every step, or as `scheduled` says. `at` are
    operations on the cache, {step: op}: before that step (at step 0, before the prompt's last token is run).
    `options` are those of `lens.generate`; `names=` records more, in `runs`. A prompt of more than 512 tokens is run in
    pieces, of which `names=` records the last token alone. A run that goes on at step k, after an operation or in
    `rerun`, draws from seed + k. Raises HookError for an edit that never came to hold, and
    ValueError for several prompts or an operation at a step that this run cannot have.
    """
    tokens, mask = lens.to_batch(prompt)
    if tokens.shape[0] != 1 or mask is not None:
        raise ValueError(f"a timeline is of one prompt without padding, not of {tokens.shape[0]}")
    unknown = sorted({"kv", "attention_mask"} & set(options))
    if unknown:
        raise TypeError(f"{' and '.join(unknown)}: a timeline begins with its prompt; to go on, use rerun(step)")
    whole = sorted(set(WHOLE) & set(options))
    if whole:
        raise TypeError(f"{' and '.join(whole)}: not in a timeline, which may go on from any step; use lens.generate")
    wrong = [step for step in at or {} if not 0 <= step < max_new_tokens]
    if wrong:
        raise ValueError(f"operations at steps {wrong}; this run has 0 to {max_new_tokens - 1}")
    going = Recording(lens, compiled(lens, hooks, interventions), at or {}, max_new_tokens, options)
    going.begin(tokens)
    return going.timeline(tokens)


def named(op: OnCache) -> str:
    """What to call an operation on the cache."""
    return getattr(op, "__name__", type(op).__name__.lower())


def compiled(lens: Lens, hooks: Hooks | None, interventions: Sequence[Intervention] | Intervention) -> Hooks:
    """Hooks and interventions as hooks."""
    return [*pairs(hooks), *scheduled(lens, interventions)]


def scheduled(
    lens: Lens,
    what: Hooks | Sequence[Intervention] | Intervention,
    *,
    steps: Which = None,
    positions: Which = None,
) -> list[tuple[str, Edit]]:
    """Hooks, an intervention or several, as hooks at some steps of a generation and some absolute positions alone."""
    if isinstance(what, Intervention):
        what = [what]
    ours = [one for one in what if isinstance(one, Intervention)] if not isinstance(what, Mapping) else []
    if any(one.site.ungrouped for one in ours):
        raise PatchError("keys or values by query head need a cache that is not grouped: use patch.generate")
    edits: list[tuple[str, Edit]] = Applied.to(lens, ours).hooks if ours else pairs(cast(Hooks, what) or None)
    if steps is None and positions is None:
        return edits
    return [(name, only(fn, steps=steps, positions=positions)) for name, fn in edits]


@dataclass(frozen=True, eq=False)
class Parting:
    """The first step at which two runs say different things.

    `probability` [run, token] is what each gave to both tokens there, `kl` KL(first ‖ second) in nats at every step up
    to it [step], and `layer` the first layer whose stream, read as if it were the last, says different things there.
    """

    step: int
    tokens: tuple[int, int]
    words: tuple[str, str]
    probability: Labelled
    kl: Labelled
    layer: int | None


def parting(first: Timeline, second: Timeline) -> Parting | None:
    """Where two runs part, or None where one says what the other begins with. ValueError for two models."""
    if first.lens.model_hash != second.lens.model_hash:
        raise ValueError(f"runs of two models, {first.lens.model_hash} and {second.lens.model_hash}")
    both = enumerate(zip(first.tokens, second.tokens, strict=False))
    step = next((i for i, (a, b) in both if a != b), None)
    if step is None:
        return None
    ids = (first.tokens[step], second.tokens[step])
    words = (label(first.lens, ids[0]), label(first.lens, ids[1]))
    logs = [exact(run.logits[: step + 1]).log_softmax(-1) for run in (first, second)]
    probs = torch.stack([x[-1, list(ids)].exp() for x in logs])
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    best = [run.readings()[:, step].argmax(-1) for run in (first, second)]
    apart = (best[0] != best[1]).nonzero().flatten().tolist()
    about = {
        "direction": "the first run against the second",
        "positions": f"step {step}",
        "model": first.lens.model_hash,
    }
    named = {"run": ["first", "second"], "token": list(words)}
    probability = Labelled(numbers(probs), ("run", "token"), named, {**about, "metric": "probability"})
    by_step = Labelled(numbers(kl), ("step",), {}, {**about, "metric": "KL(first ‖ second), nats"})
    return Parting(step, ids, words, probability, by_step, apart[0] if apart else None)
