"""Timelines: recorded generations with per-step analyses, reruns from any step, and the first difference of two runs.

A step is recorded at its last position only: the logits, the residual stream after every layer and the queries. Keys
and values stay in the KV cache. A timeline therefore takes little memory: attention is derived head by head on
request, and a rerun from step k starts from the cache as it was before that step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.analysis.chunked_runs import DecodingState
from glmlens.analysis.prompt_batch import Token, layer_labels, read_layer_and_head, to_numpy, token_label, upcast
from glmlens.deprecated import rename_attribute, rename_method
from glmlens.hook_points import HookError
from glmlens.hooks import Hooks, list_edits
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache
from glmlens.lens import Lens
from glmlens.lens.generation import GenerationResult, cut_at_stop_string
from glmlens.lens.weights import Stamp, stamp_of
from glmlens.model import additive_mask, eager
from glmlens.patch.interventions import Intervention
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.timeline.pickling import PickledLens
from glmlens.timeline.recorder import (
    CACHE_POINT,
    AppliedEdit,
    CacheFunction,
    StepRecord,
    TimelineRecorder,
    compile_hooks,
    make_generator,
    read_cache_operations,
)

# Edits at these points change attention, but neither the recorded queries nor the KV cache.
UNRECORDED_POINTS = ("kv.k", "attn.scores", "attn.pattern")


@dataclass(frozen=True, eq=False, repr=False)
class Timeline:
    """A recorded generation of one prompt.

    `steps` are the records of its steps, `events` the applications of edits in order. `runs` are the results of the
    segments of the generation, with the activations that the option `names` recorded.
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
    stamp: Stamp | None = None  # identifies the weights with which it was recorded
    edits_left_out: bool = False  # whether edits were lost in pickling, which keeps no functions

    moments = rename_attribute("moments", "steps")
    at = rename_attribute("at", "cache_operations")
    last = rename_attribute("last", "max_new_tokens")

    @property
    def tokens(self) -> list[int]:
        """The generated token ids, without the prompt."""
        return [record.token for record in self.steps]

    @property
    def text(self) -> str:
        """The generated text, with the stop token if one ended it, cut before a stop string."""
        _, strings = self.lens.resolve_stops(stop_strings=self.options.get("stop_strings"))
        return cut_at_stop_string(strings, self.lens.to_string(self.tokens, continues=True))

    @property
    def logits(self) -> Float[Tensor, "step vocab"]:
        """The logits from which each step chose its token."""
        return torch.stack([record.logits for record in self.steps])

    def to_labelled(self, x: Tensor, axes: str, metric: str, **labels: Sequence[str]) -> Labelled:
        """Return `x` with labelled axes, metric, prompt, applied edits and model hash."""
        steps = [f"{record.step} {token_label(self.lens, record.token)}" for record in self.steps]
        about = {
            "metric": metric, "direction": "the token that each step chose", "positions": "steps of a generation",
            "prompt": " ".join(token_label(self.lens, i) for i in self.prompt[0].tolist()),
            "edits": ", ".join(dict.fromkeys(event.edit_name for event in self.events)) or "none",
            "model": self.model_hash,
        }  # fmt: skip
        return Labelled(values=to_numpy(x), axes=tuple(axes.split()), labels={"step": steps, **labels}, about=about)

    def probability(self, token: Token | None = None) -> Labelled:
        """Return the probability [step] of the chosen tokens or, with `token`, of one token at every step."""
        probs = upcast(self.logits).softmax(-1)
        if token is None:
            ids = torch.tensor(self.tokens, device=probs.device)
            return self.to_labelled(probs.gather(1, ids[:, None]).squeeze(1), "step", "probability")
        i = self.lens.to_answer(token)
        return self.to_labelled(probs[:, i], "step", f"probability of {token_label(self.lens, i)}")

    def entropy(self) -> Labelled:
        """Return the entropy [step] of the next-token distribution, in nats."""
        probs = upcast(self.logits).log_softmax(-1).exp()
        return self.to_labelled(-torch.xlogy(probs, probs).sum(-1), "step", "entropy, nats")

    def logit_lens(self) -> Labelled:
        """Return the probability [layer, step] of the chosen tokens in the logit lens of every layer.

        The residual stream after each layer goes through the final norm and the unembedding.
        """
        logs = upcast(self.unembed_layers()).log_softmax(-1)
        ids = torch.tensor(self.tokens, device=logs.device).expand(len(logs), -1)
        probs = logs.gather(2, ids.unsqueeze(-1)).squeeze(-1).exp()
        return self.to_labelled(probs, "layer step", "logit lens: probability", layer=layer_labels(self.lens))

    def unembed_layers(self) -> Float[Tensor, "layer step vocab"]:
        """Return the logits of the residual stream after every layer.

        Raises HookError if the weights were edited since the recording.
        """
        self.refuse_edited_weights("logit_lens")
        model = self.lens.model
        resid = torch.stack([record.resid for record in self.steps], 1)  # [layer, step, model]
        return torch.stack([model.unembed(model.ln_final(x[None]))[0] for x in resid])

    def attention(self, layer: Integer, head: Integer) -> Labelled:
        """Return the attention [step, key] of one head from the last position of every step; keys by absolute position.

        It is derived from the recorded queries and the cached keys. Raises HookError if an edit changed keys, scores or
        patterns of the layer after the cache was read: record "attn.pattern" then.
        """
        layer, head = read_layer_and_head(self.lens, layer, head)
        for event in self.events:
            if event.point.endswith(UNRECORDED_POINTS) and event.point.startswith(f"blocks.{layer}."):
                raise HookError(
                    f"{event.edit_name} at {event.point} changed this attention: record it, names='attn.pattern'"
                )
        n_keys = 1 + max(int(record.kv.positions[0, : record.past_entries + 1].max()) for record in self.steps)
        pattern = torch.zeros(len(self.steps), n_keys, dtype=self.lens.dtype, device=self.lens.device)
        for row, record in zip(pattern, self.steps, strict=True):
            positions = record.kv.positions[:, : record.past_entries + 1]
            real = positions[0] >= 0  # padding and evicted entries have negative positions
            row[positions[0, real]] = self.derive_attention_row(record, layer, head, positions)[real]
        metric = f"attention of layer {layer}, head {head}"
        return self.to_labelled(pattern, "step key", metric, key=self.label_keys(n_keys))

    def label_keys(self, n_keys: int) -> list[str]:
        """Return a label for every absolute position: its number and its token, "?" for an unknown token.

        With an edited cache a position can hold different tokens at different steps: all stand in its label.
        """
        # A dict per position serves as an ordered set of labels.
        labels: list[dict[str, None]] = [{} for _ in range(n_keys)]
        # Steps of a segment share a cache; the last step of each segment has read the most entries of it.
        n_read = {id(record.kv): (record.kv, record.past_entries + 1) for record in self.steps}
        for kv, n in n_read.values():
            for position, token in zip(kv.positions[0, :n].tolist(), kv.tokens[0, :n].tolist(), strict=True):
                if position >= 0:
                    labels[position][token_label(self.lens, token) if token >= 0 else "?"] = None
        return [" ".join([str(position), " / ".join(words)]).strip() for position, words in enumerate(labels)]

    def derive_attention_row(
        self, step: StepRecord, layer: int, head: int, key_positions: Int[Tensor, "one key"]
    ) -> Float[Tensor, "key"]:
        """Return the attention of one head at one step, over the entries of the cache that it read."""
        # The KV head that serves this query head, as a cache of one head: [one, key, head, d].
        keys = step.kv.keys[layer, :, : step.past_entries + 1, head // self.lens.cfg.n_groups].unsqueeze(2)
        q = step.q[layer, head][None, None, None]
        seen: dict[str, Tensor] = {}

        def keep_value(name: str, x: Tensor) -> Tensor:
            """Hook that keeps the activations of the attention function by name."""
            seen[name] = x
            return x

        # The keys stand in for the values as well: the pattern does not depend on values.
        eager(q, keys, keys, additive_mask(key_positions[:, -1:], key_positions, q.dtype), keep_value)
        return seen["attn.pattern"][0, 0, 0]

    def restore_state(self, step: Integer) -> DecodingState:
        """Return the KV cache and the input token with which a step started.

        `analysis.cache_reads` and `analysis.leave_one_out` take it, as does any other way to continue from there.
        """
        return self.step_record(step).restore_state()

    memory = rename_method("memory", "restore_state")

    def step_record(self, step: Integer) -> StepRecord:
        """Return the record of a step. Raises IndexError for a step that is not there."""
        return self.steps[read_integer(step, "step", size=len(self.steps), outside=IndexError)]

    moment = rename_method("moment", "step_record")

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
        """Return the same run with a change from one step on; earlier steps are kept, not computed again.

        With `token`, the step chooses that token, and the next steps continue from it. `hooks`, `interventions` and
        `at` replace those of this run from that step on; steps and positions count as in this run. Changes of the cache
        before the step stay. Step 0 without a token runs the prompt again. A sampled run draws as it drew.

        Raises HookError if the weights were edited since the recording, if an edit restricted to steps or positions is
        never applied, or if edits were lost in pickling and are not given again; ValueError if no step is left to run
        or an operation is at a step outside the rerun; IndexError for a step that is not there.
        """
        if self.edits_left_out and ((hooks is None and not interventions) or at is None):
            raise HookError(
                "this timeline was pickled without its edits, which are functions: give hooks= and at= again"
            )
        self.refuse_edited_weights("rerun")
        record = self.step_record(step)
        step = record.step
        last = self.max_new_tokens if max_new_tokens is None else read_integer(max_new_tokens, "max_new_tokens")
        if last <= step:
            raise ValueError(
                f"max_new_tokens is {last}, counted from the start: no token is left to choose at step {step}"
            )
        hooks_to_run = self.hooks if hooks is None else hooks
        edits = compile_hooks(self.lens, hooks_to_run, interventions, self.prompt)
        first_run = step + (token is not None)  # the first step that runs: a step with a given token does not
        from_prompt = step == 0 and token is None
        if at is not None:
            operations = read_cache_operations(at, first_run, last)
        else:  # the cache of the step already has the operation before it, but not when the prompt runs again
            operations = {i: op for i, op in self.cache_operations.items() if from_prompt or i > step}
        # The first run has checked that its own hooks are applied: they count as applied.
        applied = set(range(len(list_edits(self.hooks)))) if hooks is None else set[int]()
        recorder = TimelineRecorder(
            lens=self.lens,
            hooks=edits,
            cache_operations=operations,
            max_new_tokens=last,
            options=self.options,
            steps=list(self.steps[:step]),
            applied_hooks=applied,
            generator=make_generator(self.lens, self.options, record),
        )
        if token is not None:
            token_id = self.lens.to_single_token(token) if isinstance(token, str) else self.lens.to_answer(token)
            recorder.steps.append(replace(record, token=token_id))
            recorder.advance_generator()
            recorder.continue_from(self.cache_after(record), token_id)
        elif from_prompt:
            recorder.run_prompt(self.prompt)
        else:
            recorder.continue_from(record.restore_state().kv, record.input_token)
        # An operation at `step` itself happened before the step started: its event stays, unless the prompt ran again.
        earlier_events = [
            event
            for event in self.events
            if event.step < first_run or (event.point == CACHE_POINT and 0 < event.step <= step)
        ]
        return build_timeline(recorder, self.prompt, earlier_events)

    def cache_after(self, step: StepRecord) -> KVCache:
        """Return the KV cache after a step: with the entry of the step's input token."""
        kv = step.kv.fork(1)
        kv.truncate(step.past_entries + 1)
        return kv

    def __reduce__(self) -> Any:
        """Pickle the recorded values and the model's hash, without the model and without edits, which are functions.

        Methods that need weights (`logit_lens`, `rerun`) raise HookError until `with_lens` gives the model back.
        """
        return restore_timeline, (dump_timeline(self),)

    @property
    def model_hash(self) -> str:
        """The hash of the model with which the timeline was recorded.

        It is "unknown" if the weights were edited since and the hash had never been computed before.
        """
        return self.lens.model_hash if self.stamp is None else self.lens.model_hash_at(self.stamp)

    def refuse_edited_weights(self, what: str) -> None:
        """Raise HookError if the weights were edited since the recording."""
        model = self.lens.model  # HookError in a timeline that was pickled without it
        if self.stamp is not None and self.stamp != stamp_of(model):
            raise HookError(f"{what}: the weights were edited after this timeline was recorded: record it again")

    def with_lens(self, lens: Lens) -> "Timeline":
        """Return this timeline with its model. Raises ValueError for a lens on another model."""
        if lens.model_hash != self.model_hash:
            raise ValueError(f"this timeline is of model {self.model_hash}; this lens has {lens.model_hash}")
        return replace(self, lens=lens, stamp=stamp_of(lens.model))

    def __repr__(self) -> str:
        words = " ".join(token_label(self.lens, token) for token in self.tokens)
        n_changed = sum(event.changed for event in self.events)
        edits = f"edits applied {len(self.events)} times, {n_changed} of them changed a number"
        return f"Timeline of {len(self.steps)} steps: {words}\n  {edits}"


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
    """Generate from one prompt, and record the logits, residual streams, queries and KV cache of every step.

    `hooks` and `interventions` are those of a forward pass. They run at every step, or at those that `schedule_edits`
    selects; the position "end" is the last of the prompt. `at` maps steps to operations on the KV cache, which run
    before that step (at step 0, before the last token of the prompt). `options` are those of `lens.generate`: `names`
    records more activations, in `runs`. A prompt of more than 512 tokens is run in chunks, and `names` then records
    only its last token. A repetition penalty covers the tokens in the cache.

    Raises HookError if an edit restricted to steps or positions is never applied, ValueError for several prompts or an
    operation at a step outside the run, and TypeError for `kv` or `attention_mask`.
    """
    tokens, mask = lens.to_batch(prompt)
    if tokens.shape[0] != 1:
        raise ValueError(f"a timeline is of one prompt, not of {tokens.shape[0]}")
    tokens = tokens if mask is None else tokens[:, mask[0].bool()]  # without padding
    unknown = sorted({"kv", "attention_mask"} & set(options))
    if unknown:
        raise TypeError(
            f"{' and '.join(unknown)}: a timeline starts with its prompt; to continue from a step, use rerun(step)"
        )
    max_new_tokens = read_integer(max_new_tokens, "max_new_tokens", least=1)
    edits = compile_hooks(lens, hooks, interventions, tokens)
    recorder = TimelineRecorder(
        lens=lens,
        hooks=edits,
        cache_operations=read_cache_operations(at or {}, 0, max_new_tokens),
        max_new_tokens=max_new_tokens,
        options=options,
        generator=make_generator(lens, options, None),
    )
    recorder.run_prompt(tokens)
    return build_timeline(recorder, tokens)


def build_timeline(
    recorder: TimelineRecorder, prompt: Int[Tensor, "one pos"], before: Sequence[AppliedEdit] = ()
) -> Timeline:
    """Return the timeline of a finished recording, with the events that a rerun keeps before its own.

    Raises HookError if an edit restricted to steps or positions was never applied.
    """
    recorder.require_all_applied()
    return Timeline(
        lens=recorder.lens,
        prompt=prompt,
        steps=tuple(recorder.steps),
        events=(*before, *recorder.events),
        runs=tuple(recorder.runs),
        hooks=recorder.hooks,
        cache_operations=recorder.cache_operations,
        max_new_tokens=recorder.max_new_tokens,
        options=recorder.options,
        stamp=stamp_of(recorder.lens.model),
    )


# Pickled timelines keep the names that fields had when the format was fixed.
PICKLED_STEP_FIELDS = {"input_token": "entry", "past_entries": "before", "generator_state": "draw"}
PICKLED_EVENT_FIELDS = {"edit_name": "what"}


def rename_keys(values: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """Return a dictionary with some keys renamed."""
    return {new_names.get(name, name): value for name, value in values.items()}


def dump_timeline(line: Timeline) -> dict[str, Any]:
    """Return a timeline as dictionaries, lists and tensors, with its generation results and KV caches."""
    lens = line.lens
    cfg = lens.cfg
    # Labels of all tokens that the timeline can show: those of the prompt, the steps and the caches.
    cached = [record.kv.tokens[0, : record.kv.length].tolist() for record in line.steps]
    ids = {i for row in [*cached, line.prompt[0].tolist(), line.tokens] for i in row if i >= 0}
    lens_state = {
        "model_hash": line.model_hash,
        "device": lens.device,
        "dtype": lens.dtype,
        "sizes": {name: getattr(cfg, name) for name in ("n_layers", "n_heads", "n_groups")},
        "labels": {i: token_label(lens, i) for i in ids} if lens.tokenizer else {},
        "text": lens.to_string(line.tokens) if lens.tokenizer else "",
    }
    # A generator cannot be pickled; the steps hold its states.
    options = {
        name: value for name, value in line.options.items() if name != "seed" or not isinstance(value, torch.Generator)
    }
    return {
        "lens": lens_state,
        "prompt": line.prompt,
        "moments": [rename_keys(vars(record), PICKLED_STEP_FIELDS) for record in line.steps],
        "events": [rename_keys(vars(event), PICKLED_EVENT_FIELDS) for event in line.events],
        "runs": list(line.runs),
        "last": line.max_new_tokens,
        "options": options,
        "edits_left_out": line.edits_left_out or bool(list_edits(line.hooks)) or bool(line.cache_operations),
    }


def restore_timeline(state: dict[str, Any]) -> Timeline:
    """Return the timeline of which `dump_timeline` made this state."""
    step_fields = {old: new for new, old in PICKLED_STEP_FIELDS.items()}
    event_fields = {old: new for new, old in PICKLED_EVENT_FIELDS.items()}
    return Timeline(
        lens=PickledLens(state["lens"]),
        prompt=state["prompt"],
        steps=tuple(StepRecord(**rename_keys(record, step_fields)) for record in state["moments"]),
        events=tuple(AppliedEdit(**rename_keys(event, event_fields)) for event in state["events"]),
        runs=tuple(state["runs"]),
        hooks=[],
        cache_operations={},
        max_new_tokens=state["last"],
        options=state["options"],
        edits_left_out=state["edits_left_out"],
    )


torch.serialization.add_safe_globals([restore_timeline])


@dataclass(frozen=True, eq=False, repr=False)
class Divergence:
    """The first step at which two runs choose different tokens.

    `tokens` are the two tokens and `words` their texts. `probability` [run, token] is the probability of both tokens in
    both runs at that step, `kl` KL(first ‖ second) of the next-token distributions in nats at every step up to it
    [step]. `layer` is the first layer whose logit lens has different top tokens in the two runs, None if none has.
    """

    step: int
    tokens: tuple[int, int]
    words: tuple[str, str]
    probability: Labelled
    kl: Labelled
    layer: int | None

    def __repr__(self) -> str:
        first, second = (probs[i] for i, probs in enumerate(self.probability.values))
        where = "at no layer" if self.layer is None else f"from layer {self.layer} on"
        return (
            f"Divergence at step {self.step}: {self.words[0]!r} ({first:.1%}) and {self.words[1]!r} ({second:.1%}); "
            f"KL {self.kl.values[-1]:.3g} nats; logit lens top tokens differ {where}"
        )


def find_divergence(first: Timeline, second: Timeline) -> Divergence | None:
    """Return where two runs first choose different tokens, None if one begins with the whole other.

    Raises ValueError for runs of two models.
    """
    if first.model_hash != second.model_hash:
        raise ValueError(f"runs of two models, {first.model_hash} and {second.model_hash}")
    pairs = enumerate(zip(first.tokens, second.tokens, strict=False))
    step = next((i for i, (a, b) in pairs if a != b), None)
    if step is None:
        return None
    ids = (first.tokens[step], second.tokens[step])
    words = (token_label(first.lens, ids[0]), token_label(first.lens, ids[1]))
    logs = [upcast(run.logits[: step + 1]).log_softmax(-1) for run in (first, second)]  # [step, vocab] each
    probs = torch.stack([x[-1, list(ids)].exp() for x in logs])
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    # The top token of every layer at the step of the divergence, in both runs.
    top = [run.unembed_layers()[:, step].argmax(-1) for run in (first, second)]
    differing_layers = (top[0] != top[1]).nonzero().flatten().tolist()
    about = {
        "direction": "the first run against the second",
        "positions": f"step {step}",
        "model": first.model_hash,
    }
    axis_labels = {"run": ["first", "second"], "token": list(words)}
    return Divergence(
        step=step,
        tokens=ids,
        words=words,
        probability=Labelled(
            values=to_numpy(probs), axes=("run", "token"), labels=axis_labels, about={**about, "metric": "probability"}
        ),
        kl=Labelled(
            values=to_numpy(kl), axes=("step",), labels={}, about={**about, "metric": "KL(first ‖ second), nats"}
        ),
        layer=differing_layers[0] if differing_layers else None,
    )
