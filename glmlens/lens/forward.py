"""Run a model: plain, recorded or edited, in one pass; and check such a run on the meta device."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypedDict, cast

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from glmlens.config import CheckpointError, GLMConfig
from glmlens.foreign_keywords import refuse_keywords
from glmlens.hook_points import HookError, Point
from glmlens.hooks import Hook, Hooks, off
from glmlens.integers import as_python, read_integer, read_integers
from glmlens.kv_cache import KVCache, refuse_other_caches
from glmlens.lens.weights import ModelHash, Stamp, stamp_of
from glmlens.loading.checkpoint import refuse_rewritten_files
from glmlens.model import absolute_positions
from glmlens.recording import recorder as record
from glmlens.recording.activations import Activations
from glmlens.recording.recorder import ForwardStopped, GenerationRecorder, RecordingHook, RunPlan
from glmlens.recording.run_check import MetaDeviceMode, Points, RunCheck
from glmlens.recording.run_info import RunInfo
from glmlens.recording.sparse_dictionaries import DictionaryHook, InsertedDictionary
from glmlens.text.prompt_kinds import TokenizedPrompts
from glmlens.text.prompts import Prompt, TextMixin

PointNames = str | Sequence[str]
LogitMetric = Callable[[Tensor], Tensor]
FP16_MAX = torch.finfo(torch.float16).max


class ForwardOptions(TypedDict, total=False):
    """The keywords of a run, besides its prompt and hooks; see `GLM.forward`."""

    kv: KVCache | None
    start_layer: Any
    stop_layer: Any
    position_ids: Tensor | None
    attention_mask: Tensor | None
    inputs_embeds: Tensor | None
    logits_to_keep: Any


def read_positions_to_keep(asked: Any) -> int | Tensor:
    """Return `logits_to_keep`: the number of last positions, or a tensor of indices or a mask of positions."""
    if isinstance(asked, Tensor) and asked.ndim == 1 and not asked.is_floating_point():
        return asked
    if isinstance(as_python(asked), Iterable | slice):
        return torch.tensor(read_integers(asked, "logits_to_keep", negative=True))
    return read_integer(asked, "logits_to_keep")


class ForwardMixin(TextMixin):
    """Single passes of `self.model`: logits, recordings, edited runs, gradients and checks."""

    dictionaries: tuple[InsertedDictionary, ...] = ()

    def __init__(self) -> None:
        self._point_names: list[str] = []
        self._warned_beyond_context = False
        self._hash = ModelHash()
        self._finite_at: Stamp | None = None  # the stamp of the weights that were last found to be finite

    def __call__(
        self, prompt: Prompt | None = None, **forward: Unpack[ForwardOptions]
    ) -> Float[Tensor, "batch kept vocab"]:
        """Return the logits of the model without hooks; with stop_layer, the residual stream that enters that layer."""
        self.before_run(forward)
        out = self.model(self.prepare_inputs(prompt, forward), **forward)
        self.check_weights_finite(out[:, -1:])
        return out

    def run_with_cache(
        self,
        prompt: Prompt | None = None,
        names: PointNames = "all",
        hooks: Hooks | None = None,
        *,
        logits: bool = True,
        gradients_of: LogitMetric | None = None,
        **forward: Unpack[ForwardOptions],
    ) -> tuple[Tensor | None, Activations]:
        """Return the logits and the activations at the named points, after all hooks.

        `names` are names ("blocks.3.attn.z"), globs ("blocks.*.resid_post"), layer-local names ("resid_post") or
        "all". Points that follow from other named ones are not stored but derived on access. With `logits=False` the
        run ends after the last named point and returns None for the logits. `gradients_of` is a function of the logits
        to one number or one per row; its gradient at every named point is then `acts.gradients`.
        Raises HookError for a name that matches nothing.
        """
        return self._run_and_record(prompt, names, hooks, logits, forward, gradients_of)

    def run_with_hooks(
        self, prompt: Prompt | None = None, hooks: Hooks | None = None, **forward: Unpack[ForwardOptions]
    ) -> Float[Tensor, "batch kept vocab"]:
        """Return the logits of a run with `hooks`, {"blocks.3.attn.z": fn} or [("blocks.*.attn.z", fn), ...].

        `fn(x, point)` gets a copy of the activations at the point and returns the tensor to use instead. Hooks run in
        the order given.
        """
        return cast(Tensor, self._run_and_record(prompt, (), hooks, True, forward)[0])

    def _run_and_record(
        self,
        prompt: Prompt | None,
        names: PointNames,
        hooks: Hooks | None,
        logits: bool,
        forward: ForwardOptions,
        metric: LogitMetric | None = None,
    ) -> tuple[Tensor | None, Activations]:
        self.before_run(forward)
        tokens = self.prepare_inputs(prompt, forward)
        kv = forward.get("kv")
        plan = RunPlan.from_request(self.list_passed_points(tokens, forward), names, hooks)
        edited = self._find_edited_points(plan)
        if metric is None:  # gradients are needed at every point, and do not follow from each other
            plan.store_only_needed(self.model, edited, kv is not None and kv.length > 0)
        # A run that fills a cache goes on to its end, whatever is recorded.
        recorder = self._make_recording_hook(
            plan, tokens, forward, stop_when_done=not logits and kv is None, with_gradients=metric is not None
        )
        run_info = self.make_run_info(prompt, tokens, kv, recorder.positions, recorder.key_positions, edited)
        plan.check_possible(recorder)
        if metric is not None:
            return self._run_with_gradients(tokens, forward, recorder, metric, run_info)
        try:
            out = self.model(tokens, hook=self._insert_dictionaries(recorder), **forward)
        except ForwardStopped:
            out = None
        values = recorder.compact_values()
        if out is not None and out.shape[1]:
            self.check_weights_finite(out[:, -1:])
        elif values:  # the run ended early, or kept the logits of no position: check the last recorded value
            self.check_weights_finite(next(reversed(values.values())))
        return out if logits else None, Activations(values, plan.recorded_names, run_info)

    def check_weights_finite(self, out: Tensor) -> None:
        """Raise CheckpointError naming a weight that is nan or infinite, if `out` is not finite.

        Loading does not check the weights, which would read the whole file. The output at the last position shows nan
        and infinity at no cost. Where all weights are finite, an overflow or a hook is the cause: no error here.
        """
        if out.is_meta or bool(out.isfinite().all()):
            return
        stamp = stamp_of(self.model)
        if self._finite_at == stamp:
            return
        for name, p in self.model.named_parameters():
            if (count := int((~p.isfinite()).sum())) > 0:
                why = "the file is bad, or an edit made them so"
                if p.dtype == torch.float16:
                    hint = f"float16 ends at {FP16_MAX:,.0f}: load with dtype='bfloat16' or 'float32'"
                    why = f"{hint}; if they stay, {why}"
                raise CheckpointError(f"{name}: {count:,} of its {p.numel():,} numbers are nan or infinite: {why}")
        self._finite_at = stamp

    def refuse_nan(self, logits: Tensor, edited: bool) -> None:
        """Raise HookError for logits that are nan although every weight is finite."""
        if not bool(logits.isnan().any()):
            return
        self.check_weights_finite(logits)
        why = "a hook made them so, or " if edited else ""
        hint = ": load with dtype='bfloat16' or 'float32'" if self.dtype == torch.float16 else ""
        raise HookError(
            f"the logits are nan, and no token can be chosen by them: {why}a sum went beyond "
            f"{torch.finfo(self.dtype).max:,.5g}, where {str(self.dtype).removeprefix('torch.')} ends{hint}"
        )

    def before_run(self, forward: ForwardOptions) -> None:
        """Raise an error for a KV cache of another model, and for weights whose file was rewritten since loading."""
        refuse_other_caches(forward.get("kv"), self.cfg, self.dtype, self.device)
        refuse_rewritten_files(self.model)

    def _run_with_gradients(
        self,
        tokens: Tensor | None,
        forward: ForwardOptions,
        hook: RecordingHook,
        metric: LogitMetric,
        run_info: RunInfo,
    ) -> tuple[Tensor, Activations]:
        """Run with an autograd graph that begins at the embeddings; record values and gradients of the metric."""
        if any(p.is_inference() for p in self.model.parameters()):
            raise HookError("no gradients here: this model was made under torch.inference_mode(); load it outside")
        with torch.inference_mode(False), torch.enable_grad():
            entering = cast(Tensor, forward.pop("inputs_embeds", None) if tokens is None else tokens)
            if not entering.is_floating_point():
                entering = self.model.embed(entering)
            entering = entering.detach().requires_grad_()
            if forward.get("start_layer"):
                logits = self.model(entering, hook=self._insert_dictionaries(hook), **forward)
            else:
                logits = self.model(hook=self._insert_dictionaries(hook), **{**forward, "inputs_embeds": entering})
            self.check_weights_finite(logits[:, -1:])
            value = metric(logits)
            if not isinstance(value, Tensor) or not value.requires_grad:
                raise HookError(f"gradients_of must give a number that follows from the logits; it gave {value!r:.80}")
            if value.ndim and value.shape != (len(logits),):
                raise HookError(
                    f"gradients_of must give one number, or one per row [{len(logits)}]; it gave {tuple(value.shape)}: "
                    f"end it with .sum() if the sum is meant"
                )
            stored = dict(hook.values)
            # The rows of a batch do not interact: the gradient of the sum is each row's own.
            slopes = torch.autograd.grad(value.sum(), list(stored.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(x) if slope is None else slope  # None: the metric does not depend on the point
            for (name, x), slope in zip(stored.items(), slopes, strict=True)
        }
        run_info = replace(run_info, model=None)  # gradients cannot be derived from each other as values can
        names = hook.plan.recorded_names
        values = {name: x.detach() for name, x in stored.items()}
        return logits.detach(), Activations(values, names, run_info, Activations(gradients, names, run_info))

    def make_run_info(
        self,
        prompt: Prompt | None,
        tokens: Tensor | None,
        kv: KVCache | None,
        positions: Tensor,
        key_positions: Tensor,
        edited: frozenset[str] = frozenset(),
    ) -> RunInfo:
        """Return the run info of a recording of the model as it is now."""
        stamp = stamp_of(self.model)
        model_hash = self._hash
        model = self.model
        return RunInfo(
            # A residual stream or embeddings as the prompt are no tokens.
            tokens=None if tokens is None or tokens.is_floating_point() else tokens,
            positions=positions,
            key_positions=key_positions,
            model=model,
            model_hash=lambda: model_hash.at(stamp, model),
            tokenizer=self.tokenizer,
            find_named_positions=prompt.at if isinstance(prompt, TokenizedPrompts) else None,
            edited_points=edited,
            past_entries=kv is not None and kv.length > 0,
            unchanged=lambda: stamp == stamp_of(model),
        )

    def _make_recording_hook(
        self, plan: RunPlan, tokens: Tensor | None, forward: ForwardOptions, **options: Any
    ) -> RecordingHook:
        """Return the hook of one pass, with the positions that the pass will have; `options` are the hook's fields."""
        entering = cast(Tensor, forward.get("inputs_embeds") if tokens is None else tokens)
        kv = forward.get("kv")
        if kv is not None:
            kv.check_fits(self.cfg, torch.empty(entering.shape[0], 0, 0, dtype=self.dtype, device=self.device))
        positions = absolute_positions(
            entering.shape[:2], entering.device, kv, forward.get("position_ids"), forward.get("attention_mask")
        )
        key_positions = positions if kv is None else kv.concatenate_positions(positions)
        # The memory of the cache and of embeddings passed in belongs to the caller, who may write to it.
        copied_points = record.KV_VIEWS if kv is not None else frozenset[str]()
        if tokens is None:
            copied_points |= {"embed"}
        return RecordingHook(
            plan,
            step=0,
            positions=positions,
            key_positions=key_positions,
            copied_points=copied_points,
            logits_to_keep=forward.get("logits_to_keep"),
            **options,
        )

    def list_passed_points(self, tokens: Tensor | None, forward: ForwardOptions) -> list[str]:
        """Return the points that a run with these arguments passes, in order."""
        if not self._point_names:
            self._point_names = list(self._trace_points())
        start, stop = forward.get("start_layer", 0), forward.get("stop_layer")
        layers = self.model.layers(start, stop)
        ends = {"embed"} if tokens is None or not tokens.is_floating_point() else set()
        ends |= {"ln_final.scale", "ln_final.normalized", "logits"} if stop is None else set()
        return [
            n for n in self._point_names if n in ends or (n.startswith("blocks.") and int(n.split(".")[1]) in layers)
        ]

    def _trace_points(self, *shape: int, past: int = 0, logits_to_keep: int | Tensor | None = None) -> dict[str, Point]:
        """Return every point of this model and of its inserted dictionaries, in the order in which they fire."""
        points = record.trace_points(self.model, *shape, past=past, logits_to_keep=logits_to_keep)
        for dictionary in self.dictionaries:
            points = {p.name: p for point in points.values() for p in dictionary.surround_point(point)}
        return points

    # ---- dictionaries ----

    def copy_with_dictionaries(self, dictionaries: tuple[InsertedDictionary, ...]) -> "ForwardMixin":
        """Return a copy of this lens with these dictionaries; it shares the weights."""
        other = copy.copy(self)
        other.dictionaries = dictionaries
        other._point_names = []  # traced anew, with the points of the dictionaries
        return other

    def _insert_dictionaries(self, hook: Hook) -> Hook:
        return DictionaryHook(hook, self.dictionaries) if self.dictionaries and hook is not off else hook

    def make_step_hooks(self, recorder: GenerationRecorder) -> Callable[[int, Tensor, Tensor], Hook]:
        """Return the function that makes the hook of each step of a generation."""
        return lambda step, positions, keys: self._insert_dictionaries(recorder.make_step_hook(step, positions, keys))

    def _find_edited_points(self, plan: RunPlan) -> frozenset[str]:
        """Return the edited points: those with an edit, and those that dictionaries with an edit write to."""
        edited = frozenset(plan.edits_by_point)
        return edited | {s.writes for s in self.dictionaries if s.features in edited or s.error in edited}

    # ---- checks on the meta device ----

    def points(self, prompt: Prompt | None = None) -> Points:
        """Return the points of this model, with shapes for `prompt` (by default one token)."""
        shape = (1, 1) if prompt is None else self.to_batch(prompt, may_be_open=True)[0].shape
        return Points(self._trace_points(*shape).values())

    def check(
        self,
        prompt: Prompt | None = None,
        names: PointNames = (),
        hooks: Hooks | None = None,
        **forward: Unpack[ForwardOptions],
    ) -> RunCheck:
        """Return the points and bytes that a run would store and where its hooks fire, without computing anything.

        Hooks are called with tensors on the meta device. A hook that needs numbers is reported and skipped. Raises the
        errors of the run: HookError for a name that matches nothing, or for a result that does not fit.
        """
        self.before_run(forward)
        tokens = self.prepare_inputs(prompt, forward)
        kv = forward.get("kv")
        order = self.list_passed_points(tokens, forward)
        plan = RunPlan.from_request(order, names, hooks)
        recorder = self._make_recording_hook(plan, tokens, forward, real_device=self.device)
        past = kv.length if kv else 0
        points = self._trace_points(*recorder.positions.shape, past=past, logits_to_keep=forward.get("logits_to_keep"))
        plan.check_possible(recorder)
        plan.store_only_needed(self.model, self._find_edited_points(plan), bool(past))
        with MetaDeviceMode():
            for point in (points[name] for name in order if name in plan.edits_by_point):
                recorder(point.name, torch.empty(point.shape, dtype=point.dtype, device="meta"))
        stored = Points(points[name] for name in plan.recorded_names if name in plan.stored_names)
        return RunCheck(
            Points(points[name] for name in plan.recorded_names), stored, plan.list_hook_calls(), recorder.edit_errors
        )

    def prepare_inputs(self, prompt: Prompt | None, forward: ForwardOptions) -> Tensor | None:
        """Return the first argument of `GLM.forward`; write its other arguments, the mask among them, to `forward`.

        Raises TypeError for an unknown keyword, ValueError for embeddings or a residual stream that may be padded.
        """
        refuse_keywords("a run", forward.keys() - ForwardOptions.__annotations__.keys(), ForwardOptions.__annotations__)
        if prompt is None and forward.get("inputs_embeds") is None:
            raise TypeError("no prompt: give text, chat messages, token ids, or inputs_embeds=")
        for name in ("start_layer", "stop_layer"):
            if (layer := forward.get(name)) is not None:
                forward[name] = read_integer(layer, name)
        if (positions := forward.get("logits_to_keep")) is not None:
            forward["logits_to_keep"] = read_positions_to_keep(positions)
        for name in ("position_ids", "attention_mask", "inputs_embeds"):
            if (given := forward.get(name)) is not None:
                forward[name] = given.to(self.device, torch.long if name == "attention_mask" else None)
        kv = forward.get("kv")
        if prompt is None or (isinstance(prompt, Tensor) and prompt.is_floating_point() and prompt.ndim == 3):
            entering = cast(Tensor, forward.get("inputs_embeds") if prompt is None else prompt.to(self.device))
            self._refuse_unknown_padding(entering, forward)
            tokens = None if prompt is None else entering
        else:
            given, prompt = forward.get("attention_mask"), self.continue_prompt(prompt, kv)
            entering, forward["attention_mask"] = self.to_batch(prompt, kv is None or kv.length == 0, given)
            tokens = entering
        mask = forward.get("attention_mask")
        if mask is not None and mask.shape == entering.shape[:2] and not mask.is_meta and bool(mask.all()):
            forward["attention_mask"] = mask = None  # no padding: the run without a mask, bit for bit
        self.warn_beyond_context(count_positions(entering, kv, mask))
        return tokens

    def _refuse_unknown_padding(self, entering: Tensor, forward: ForwardOptions) -> None:
        """Raise ValueError for embeddings or a residual stream that may be padded, without a mask or positions."""
        known = forward.get("attention_mask") is not None or forward.get("position_ids") is not None
        if known or entering.is_meta or entering.ndim != 3 or entering.shape[1] < 2:
            return
        batch, pos, _ = entering.shape
        type_this = f"pass attention_mask=torch.ones({batch}, {pos}) where none are, or that of lens.to_batch(texts)"
        if forward.get("start_layer", 0) > 0:
            if batch > 1:
                raise ValueError(
                    f"a residual stream of {batch} rows that enters layer {forward.get('start_layer')}: which of its "
                    f"positions are padding cannot be seen; {type_this}"
                )
            return
        padding = self.model.embed.weight[self.pad_id].to(entering)
        if entering.shape[2] == len(padding) and bool((entering[:, 0] == padding).all(-1).any()):
            raise ValueError(
                f"embeddings of which a row begins with that of the padding id {self.pad_id}: whether it is padding "
                f"cannot be seen; {type_this}"
            )

    def warn_beyond_context(self, positions: int) -> None:
        """Warn, once per lens, about a run over more positions than the model's context."""
        if positions > self.cfg.n_ctx and not self._warned_beyond_context:
            self._warned_beyond_context = True
            warnings.warn(
                f"{positions:,} tokens, and this model's context is {self.cfg.n_ctx:,} (max_position_embeddings): "
                "it was not trained on longer inputs, and its predictions there are unreliable",
                UserWarning,
                stacklevel=frames_of_package(),
            )

    @property
    def cfg(self) -> GLMConfig:
        """The config of the model."""
        return self.model.cfg

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.ln_final.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.ln_final.weight.device

    @property
    def model_hash(self) -> str:
        """12 hex digits that identify the model with its weights as they are now; see `weights.ModelHash`."""
        return self._hash.of(self.model)

    def model_hash_at(self, stamp: Stamp) -> str:
        """Return the hash of this model at this stamp; "unknown" if it was edited since and not hashed before."""
        return self._hash.at(stamp, self.model)

    @cached_property
    def tokenizer_hash(self) -> str:
        """12 hex digits that identify the tokenizer, or "none"."""
        return "none" if self.tokenizer is None else self.tokenizer.fingerprint()


def count_positions(entering: Tensor, kv: KVCache | None, mask: Tensor | None) -> int:
    """Return the number of positions at the end of a run, cached ones included, in its longest row."""
    if mask is None or mask.is_meta or mask.ndim != 2:
        new = entering.shape[1] if entering.ndim > 1 else 0
    else:
        new = int(mask.bool().sum(1).max())
    return new if kv is None or not kv.length or kv.positions.is_meta else new + int(kv.next_positions().max())


def frames_of_package() -> int:
    """Return the stacklevel for a warning: the number of frames up to the code that called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "glmlens":
        level, frame = level + 1, frame.f_back
    return level
