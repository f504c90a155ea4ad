"""Recorded generation: what every step said and why, run again from any step, and where two runs part.

A step is recorded at its last position alone: its logits, the residual stream of every layer, its queries. Keys are in
the cache. So a timeline weighs little, attention is derived head by head when it is asked for, and a run that goes on
from step k starts from the cache as it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.batch import Token, layer_labels, read_layer_and_head, to_numpy, token_label, upcast
from glmlens.analysis.chunks import DecodingState
from glmlens.hook_points import HookError
from glmlens.hooks import Hooks, list_edits
from glmlens.integers import Integer, Integers, read_integer
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens
from glmlens.lens.generation import GenerationResult, cut_at_stop_string
from glmlens.lens.weights import Stamp, stamp_of
from glmlens.model import additive_mask, eager
from glmlens.patch.interventions import Intervention
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.timeline.recording import (
    CACHE_POINT,
    AppliedEdit,
    CacheFunction,
    StepRecord,
    TimelineRecorder,
    compile_hooks,
)

UNRECORDED_POINTS = (
    "kv.k",
    "attn.scores",
    "attn.pattern",
)  # edits there change attention, and neither queries nor the cache


@dataclass(frozen=True, eq=False, repr=False)
class Timeline:
    """A generation of one prompt, step by step; `runs` are the plain runs that it was made of, with what `names` said.

    `events` are the edits as they were applied, in order.
    """

    lens: Lens
    prompt: Int[Tensor, "one pos"]
    steps: tuple[StepRecord, ...]
    events: tuple[AppliedEdit, ...]
    runs: tuple[GenerationResult, ...]
    hooks: Hooks
    cache_operations: Mapping[int, CacheFunction]
    max_new_tokens: int
    options: Mapping[str, Any]
    stamp: Stamp | None = None  # of the weights that were run
    edits_left_out: bool = False  # by pickling, which keeps no functions

    @property
    def tokens(self) -> list[int]:
        """What was said, without the prompt."""
        return [moment.token for moment in self.steps]

    @property
    def text(self) -> str:
        """What was said, with the stop token, if one ended it, and without the stop string."""
        _, strings = self.lens.resolve_stops(stop_strings=self.options.get("stop_strings"))
        return cut_at_stop_string(strings, self.lens.to_string(self.tokens, continues=True))

    @property
    def logits(self) -> Float[Tensor, "step vocab"]:
        return torch.stack([moment.logits for moment in self.steps])

    def to_labelled(self, x: Tensor, axes: str, metric: str, **labels: Sequence[str]) -> Labelled:
        steps = [f"{m.step} {token_label(self.lens, m.token)}" for m in self.steps]
        about = {
            "metric": metric, "direction": "the token that each step chose", "positions": "steps of a generation",
            "prompt": " ".join(token_label(self.lens, i) for i in self.prompt[0].tolist()),
            "edits": ", ".join(dict.fromkeys(event.edit_name for event in self.events)) or "none",
            "model": self.model_hash,
        }  # fmt: skip
        return Labelled(to_numpy(x), tuple(axes.split()), {"step": steps, **labels}, about)

    def probability(self, token: Token | None = None) -> Labelled:
        """The probability [step] of the tokens that were chosen, or of one token at all steps."""
        probs = upcast(self.logits).softmax(-1)
        if token is None:
            ids = torch.tensor(self.tokens, device=probs.device)
            return self.to_labelled(probs.gather(1, ids[:, None]).squeeze(1), "step", "probability")
        i = self.lens.to_answer(token)
        return self.to_labelled(probs[:, i], "step", f"probability of {token_label(self.lens, i)}")

    def entropy(self) -> Labelled:
        """The entropy [step] of the next token, in nats."""
        logs = upcast(self.logits).log_softmax(-1)
        return self.to_labelled(-torch.xlogy(logs.exp(), logs.exp()).sum(-1), "step", "entropy, nats")

    def logit_lens(self) -> Labelled:
        """The probability [layer, step] of the chosen tokens by every layer's stream, read as if it were the last."""
        logs = upcast(self.unembed_layers()).log_softmax(-1)
        ids = torch.tensor(self.tokens, device=logs.device).expand(len(logs), -1)
        found = logs.gather(2, ids.unsqueeze(-1)).squeeze(-1).exp()
        return self.to_labelled(found, "layer step", "logit lens: probability", layer=layer_labels(self.lens))

    def unembed_layers(self) -> Float[Tensor, "layer step vocab"]:
        """The logits of every layer's stream; see `logit_lens`."""
        self.refuse_edited_weights("logit_lens")
        model, resid = self.lens.model, torch.stack([moment.resid for moment in self.steps], 1)
        return torch.stack([model.unembed(model.ln_final(x[None]))[0] for x in resid])

    def attention(self, layer: Integer, head: Integer) -> Labelled:
        """What every step's last position attended to [step, key], derived now; keys by absolute position.

        Raises HookError where an edit changed what attention reads after the cache: record "attn.pattern" then.
        """
        layer, head = read_layer_and_head(self.lens, layer, head)
        for event in self.events:
            if event.point.endswith(UNRECORDED_POINTS) and event.point.startswith(f"blocks.{layer}."):
                raise HookError(f"{event.edit_name} at {event.point} changed this: record it, names='attn.pattern'")
        n_keys = 1 + max(int(m.kv.positions[0, : m.past_entries + 1].max()) for m in self.steps)
        found = torch.zeros(len(self.steps), n_keys, dtype=self.lens.dtype, device=self.lens.device)
        for row, moment in zip(found, self.steps, strict=True):
            at = moment.kv.positions[:, : moment.past_entries + 1]
            real = at[0] >= 0
            row[at[0, real]] = self.derive_attention_row(moment, layer, head, at)[real]
        return self.to_labelled(
            found, "step key", f"attention of layer {layer}, head {head}", key=self.label_keys(n_keys)
        )

    def label_keys(self, n_keys: int) -> list[str]:
        """A label for every absolute position: its number and its token, of an edited cache all that stood there."""
        words: list[dict[str, None]] = [{} for _ in range(n_keys)]
        for kv, upto in {id(m.kv): (m.kv, m.past_entries + 1) for m in self.steps}.values():
            for at, token in zip(kv.positions[0, :upto].tolist(), kv.tokens[0, :upto].tolist(), strict=True):
                if at >= 0:
                    words[at][token_label(self.lens, token) if token >= 0 else "?"] = None
        return [" ".join([str(at), " / ".join(said)]).strip() for at, said in enumerate(words)]

    def derive_attention_row(
        self, step: StepRecord, layer: int, head: int, key_positions: Int[Tensor, "one key"]
    ) -> Float[Tensor, "key"]:
        keys = step.kv.keys[layer, :, : step.past_entries + 1, head // self.lens.cfg.n_groups].unsqueeze(2)
        q, seen = step.q[layer, head][None, None, None], dict[str, Tensor]()

        def keep_value(name: str, x: Tensor) -> Tensor:
            seen[name] = x
            return x

        eager(q, keys, keys, additive_mask(key_positions[:, -1:], key_positions, q.dtype), keep_value)
        return seen["attn.pattern"][0, 0, 0]

    def restore_state(self, step: Integer) -> DecodingState:
        """What a step began with: for `who_reads` and `leave_one_out`, or to go on from with other means."""
        return self.step_record(step).restore_state()

    def step_record(self, step: Integer) -> StepRecord:
        return self.steps[read_integer(step, "step", size=len(self.steps), outside=IndexError)]

    def rerun(
        self,
        step: Integer,
        *,
        token: Token | None = None,
        hooks: Hooks | None = None,
        interventions: Sequence[Intervention] | Intervention = (),
        at: Mapping[Integer, CacheFunction] | None = None,
        max_new_tokens: Integer | None = None,
    ) -> "Timeline":
        """The same run up to a step, from there with a change; what came before is not computed again.

        With `token`, that step says another token and the next ones go on from it. `hooks`, `interventions` and `at`
        are in place of this run's own, from that step on; their steps and positions count as in this run. What was done
        to the cache up to that step stays done. At step 0 the prompt is run anew. A sampled run draws as it drew then.
        """
        if self.edits_left_out and ((hooks is None and not interventions) or at is None):
            raise HookError(
                "this timeline was pickled without its edits, which are functions: give hooks= and at= again"
            )
        self.refuse_edited_weights("rerun")
        moment = self.step_record(step)
        step = moment.step
        last = self.max_new_tokens if max_new_tokens is None else read_integer(max_new_tokens, "max_new_tokens")
        if last <= step:
            raise ValueError(f"max_new_tokens is {last}, counted from the start: nothing is left to say at step {step}")
        given, anew = self.hooks if hooks is None else hooks, step == 0 and token is None
        later = {i: op for i, op in self.cache_operations.items() if anew or i > step}
        edits = compile_hooks(self.lens, given, interventions, self.prompt)
        going = TimelineRecorder(self.lens, edits, later if at is None else at, last)
        going.options, going.applied_hooks = (
            self.options,
            set(range(len(list_edits(self.hooks)))) if hooks is None else set(),
        )
        if at is not None:
            going.check_operations(step + (token is not None))
        going.restore_generator(moment)
        going.steps = list(self.steps[:step])
        if token is not None:
            said = self.lens.to_single_token(token) if isinstance(token, str) else self.lens.to_answer(token)
            going.steps.append(replace(moment, token=said))
            going.advance_generator()
            going.continue_from(self.cache_after(moment), said)
        elif anew:
            going.run_prompt(self.prompt)
        else:
            going.continue_from(moment.restore_state().kv, moment.input_token)
        stays = [
            e
            for e in self.events
            if e.step < step + (token is not None) or (e.point == CACHE_POINT and 0 < e.step <= step)
        ]
        return build_timeline(going, self.prompt, stays)

    def cache_after(self, step: StepRecord) -> KVCache:
        """The cache once this step's token has been run."""
        kv = step.kv.fork(1)
        kv.truncate(step.past_entries + 1)
        return kv

    def __reduce__(self) -> Any:
        """Pickle what was recorded and the model's hash: no model, and no edits, which are functions.

        What needs weights (`logit_lens`, `rerun`) waits for `with_lens`.
        """
        return restore_timeline, (pickled(self),)

    @property
    def model_hash(self) -> str:
        """The hash of the model that was run, also after an edit; "unknown" if it was not asked for before that."""
        return self.lens.model_hash if self.stamp is None else self.lens.model_hash_at(self.stamp)

    def refuse_edited_weights(self, what: str) -> None:
        """Raise HookError if the weights are not those that were run any more."""
        model = self.lens.model  # HookError in a timeline that was pickled without it
        if self.stamp is not None and self.stamp != stamp_of(model):
            raise HookError(f"{what}: the weights were edited after this timeline was recorded: record it again")

    def with_lens(self, lens: Lens) -> "Timeline":
        """This timeline with the model that it is of; ValueError for another."""
        if lens.model_hash != self.model_hash:
            raise ValueError(f"this timeline is of model {self.model_hash}; this lens has {lens.model_hash}")
        return replace(self, lens=lens, stamp=stamp_of(lens.model))

    def __repr__(self) -> str:
        said = " ".join(token_label(self.lens, token) for token in self.tokens)
        changed = sum(event.changed for event in self.events)
        return f"Timeline of {len(self.steps)} steps: {said}\n  edits applied: {len(self.events)}, {changed} of effect"


def record_timeline(
    lens: Lens,
    prompt: Prompt,
    max_new_tokens: Integer = 20,
    *,
    hooks: Hooks | None = None,
    interventions: Sequence[Intervention] | Intervention = (),
    at: Mapping[Integer, CacheFunction] | None = None,
    **options: Any,
) -> Timeline:
    """Generate from one prompt and keep what every step said and read.

    `hooks` and `interventions` are those of a plain forward, and hold at every step, or as `scheduled` says; "end" is
    the last position of the prompt. `at` are
    operations on the cache, {step: op}: before that step (at step 0, before the prompt's last token is run).
    `options` are those of `lens.generate`; `names=` records more, in `runs`. A prompt of more than 512 tokens is run in
    pieces, of which `names=` records the last token alone. A repetition penalty is on what is remembered. Raises
    HookError for an edit that never came to hold, and ValueError for several prompts or an operation at a step that
    this run cannot have.
    """
    tokens, mask = lens.to_batch(prompt)
    if tokens.shape[0] != 1:
        raise ValueError(f"a timeline is of one prompt, not of {tokens.shape[0]}")
    tokens = tokens if mask is None else tokens[:, mask[0].bool()]
    unknown = sorted({"kv", "attention_mask"} & set(options))
    if unknown:
        raise TypeError(f"{' and '.join(unknown)}: a timeline begins with its prompt; to go on, use rerun(step)")
    max_new_tokens = read_integer(max_new_tokens, "max_new_tokens", least=1)
    going = TimelineRecorder(lens, compile_hooks(lens, hooks, interventions, tokens), at or {}, max_new_tokens, options)
    going.check_operations(0)
    going.restore_generator(None)
    going.run_prompt(tokens)
    return build_timeline(going, tokens)


def build_timeline(
    recorder: TimelineRecorder, prompt: Int[Tensor, "one pos"], before: Sequence[AppliedEdit] = ()
) -> Timeline:
    """What was recorded, behind the events of the run that it goes on from; HookError for an edit that never held."""
    recorder.require_all_applied()
    return Timeline(
        recorder.lens,
        prompt,
        tuple(recorder.steps),
        (*before, *recorder.events),
        tuple(recorder.runs),
        recorder.hooks,
        recorder.cache_operations,
        recorder.max_new_tokens,
        recorder.options,
        stamp_of(recorder.lens.model),
    )


class PickledLens(Lens):
    """What a timeline that was pickled knows of its lens: sizes, the texts of its tokens, and the model's hash."""

    def __init__(self, known: Mapping[str, Any]):
        self.known = known
        self.tokenizer = cast(Any, self if known["labels"] else None)

    @property
    def model(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise HookError("this timeline was pickled without its model: line = line.with_lens(lens) gives it back")

    @property
    def cfg(self) -> Any:
        return SimpleNamespace(**self.known["sizes"])

    @property
    def dtype(self) -> torch.dtype:
        return self.known["dtype"]

    @property
    def device(self) -> torch.device:
        return self.known["device"]

    @property
    def model_hash(self) -> str:
        return self.known["model_hash"]

    def label(self, token: int) -> str:
        return self.known["labels"].get(token, f"⟨{token}⟩")

    def to_string(self, tokens: Tensor | Sequence[int], continues: bool = False) -> str:
        return self.known["text"]

    def to_answer(self, answer: str | Integer) -> int:
        # A text needs the tokenizer, which is not here: asking for the model raises the error that says so.
        return self.model.to_answer(answer) if isinstance(answer, str) else read_integer(answer, "answer")

    def stops(
        self, stop_ids: Integers = None, stop_strings: str | Sequence[str] | None = None
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return (), (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())

    def __repr__(self) -> str:
        return f"PickledLens(of model {self.model_hash}, which is not here)"


def pickled(line: Timeline) -> dict[str, Any]:
    """A timeline as dictionaries, lists and tensors, its runs and its caches."""
    lens, cfg = line.lens, line.lens.cfg
    caches = [moment.kv.tokens[0, : moment.kv.length].tolist() for moment in line.steps]
    ids = {i for row in [*caches, line.prompt[0].tolist(), line.tokens] for i in row if i >= 0}
    known = {
        "model_hash": line.model_hash, "device": lens.device, "dtype": lens.dtype,
        "sizes": {name: getattr(cfg, name) for name in ("n_layers", "n_heads", "n_groups")},
        "labels": {i: token_label(lens, i) for i in ids} if lens.tokenizer else {},
        "text": lens.to_string(line.tokens) if lens.tokenizer else "",
    }  # fmt: skip
    kept = {name: x for name, x in line.options.items() if name != "seed" or not isinstance(x, torch.Generator)}
    return {
        "lens": known, "prompt": line.prompt, "moments": [dict(vars(moment)) for moment in line.steps],
        "events": [dict(vars(event)) for event in line.events], "runs": list(line.runs), "last": line.max_new_tokens,
        "options": kept, "edits_left_out": line.edits_left_out or bool(list_edits(line.hooks)) or bool(line.cache_operations),
    }  # fmt: skip


def restore_timeline(state: dict[str, Any]) -> Timeline:
    """The timeline that was pickled."""
    parts = {**state, "lens": PickledLens(state["lens"]), "runs": tuple(state["runs"])}
    parts["moments"] = tuple(StepRecord(**moment) for moment in state["moments"])
    parts["events"] = tuple(AppliedEdit(**event) for event in state["events"])
    return Timeline(**parts, hooks=[], cache_operations={})  # the stamp is of weights that are not here


torch.serialization.add_safe_globals([restore_timeline])


@dataclass(frozen=True, eq=False, repr=False)
class Divergence:
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

    def __repr__(self) -> str:
        first, second = (p[i] for i, p in enumerate(self.probability.values))
        where = "at no layer" if self.layer is None else f"from layer {self.layer} on"
        return (
            f"Parting at step {self.step}: {self.words[0]!r} ({first:.1%}) and {self.words[1]!r} ({second:.1%}); "
            f"KL {self.kl.values[-1]:.3g} nats; streams that say different things {where}"
        )


def find_divergence(first: Timeline, second: Timeline) -> Divergence | None:
    """Where two runs part, or None where one says what the other begins with. ValueError for two models."""
    if first.model_hash != second.model_hash:
        raise ValueError(f"runs of two models, {first.model_hash} and {second.model_hash}")
    both = enumerate(zip(first.tokens, second.tokens, strict=False))
    step = next((i for i, (a, b) in both if a != b), None)
    if step is None:
        return None
    ids = (first.tokens[step], second.tokens[step])
    words = (token_label(first.lens, ids[0]), token_label(first.lens, ids[1]))
    logs = [upcast(run.logits[: step + 1]).log_softmax(-1) for run in (first, second)]
    probs = torch.stack([x[-1, list(ids)].exp() for x in logs])
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    best = [run.unembed_layers()[:, step].argmax(-1) for run in (first, second)]
    apart = (best[0] != best[1]).nonzero().flatten().tolist()
    about = {
        "direction": "the first run against the second",
        "positions": f"step {step}",
        "model": first.model_hash,
    }
    named = {"run": ["first", "second"], "token": list(words)}
    probability = Labelled(to_numpy(probs), ("run", "token"), named, {**about, "metric": "probability"})
    by_step = Labelled(to_numpy(kl), ("step",), {}, {**about, "metric": "KL(first ‖ second), nats"})
    return Divergence(step, ids, words, probability, by_step, apart[0] if apart else None)
