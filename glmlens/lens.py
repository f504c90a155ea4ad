"""Lens: a GLM, its tokenizer, and what a notebook does with them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from glmlens import checkpoint, record
from glmlens.activations import Activations, Of
from glmlens.check import Check, OnMeta, Points
from glmlens.config import CheckpointError, GLMConfig, Reader
from glmlens.generate import Sampling, Step, steps
from glmlens.harvest import Harvest, harvest
from glmlens.hooks import HookError, Hooks
from glmlens.kv_cache import KVCache
from glmlens.model import GLM, absolute_positions, loss, token_log_probs
from glmlens.prompt import Prompt, Prompts, Rows
from glmlens.record import Enough, Plan, Recorder, Watch
from glmlens.run import Going, Run
from glmlens.tokenizer import Tokenizer
from glmlens.weights import Weights, fingerprint

Names = str | Sequence[str]
Metric = Callable[[Tensor], Tensor]

EMBEDDED = Path(__file__).parent / "demo" / "model"


class Forward(TypedDict, total=False):
    """What a forward takes besides its prompt and hook; see `GLM.forward`."""

    kv: KVCache | None
    start_layer: int
    stop_layer: int | None
    position_ids: Tensor | None
    attention_mask: Tensor | None
    inputs_embeds: Tensor | None
    logits_to_keep: int | Tensor | None


class Options(TypedDict, total=False):
    """What a generation takes besides its prompt; see `Lens.generate`."""

    hooks: Hooks | None
    kv: KVCache | None
    attention_mask: Tensor | None
    stop_ids: Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


def load(
    path_or_hub_id: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "eager",
    revision: str | None = None,
) -> "Lens":
    """Open a checkpoint: the small GLM inside this package, a local folder, or a hub id.

    Of a hub repository only config, tokenizer and safetensors are downloaded.
    `dtype` defaults to the checkpoint's own; `attention` is "eager" or "sdpa" (faster, without scores and pattern).
    With device="meta" only the config is read, for `check` and `points`. Raises CheckpointError.
    """
    if path_or_hub_id is None and revision is not None:
        raise CheckpointError(f"revision {revision!r} of what? Name a hub id; without one the model inside is opened")
    folder = EMBEDDED if path_or_hub_id is None else checkpoint.find(path_or_hub_id, revision)
    chosen = None if dtype is None else checkpoint.dtype_named(dtype)
    model, cfg = checkpoint.load_model(folder, chosen, device, attention), folder / "generation_config.json"
    stated = Reader(checkpoint.read_json(cfg), str(cfg)) if cfg.exists() else Reader({}, str(cfg))
    stop, pad = stated.ids("eos_token_id"), stated.ids("pad_token_id")
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except ValueError as e:
        raise CheckpointError(str(e)) from e
    return Lens(model, tokenizer, stop_ids=stop or None, pad_id=pad[0] if pad else None)


class Lens(Prompts, Weights):
    """A GLM to look into.

    Its parameters are frozen; gradients flow to what a hook returns. No question that is asked of it changes it.
    """

    def __init__(
        self,
        model: GLM,
        tokenizer: Tokenizer | None = None,
        *,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
    ):
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.stop_ids = model.cfg.eos_token_ids if stop_ids is None else tuple(stop_ids)
        wishes = (pad_id, model.cfg.pad_token_id, *self.stop_ids, 0)
        self.pad_id = next(i for i in wishes if i is not None and 0 <= i < model.cfg.d_vocab)
        self._names: list[str] = []

    @cached_property
    def model_hash(self) -> str:
        """12 hex digits that tell this model from others."""
        return fingerprint(self.model)

    @cached_property
    def tokenizer_hash(self) -> str:
        """12 hex digits that tell this tokenizer from others, or "none"."""
        return "none" if self.tokenizer is None else self.tokenizer.fingerprint()

    # ---- running ----

    def __call__(self, prompt: Prompt | None = None, **forward: Unpack[Forward]) -> Float[Tensor, "batch kept vocab"]:
        """The logits of the published model; with stop_layer, the residual stream that enters that layer."""
        return self.model(self._inputs(prompt, forward), **forward)

    def run_with_cache(
        self,
        prompt: Prompt | None = None,
        names: Names = "all",
        hooks: Hooks | None = None,
        *,
        logits: bool = True,
        gradients_of: Metric | None = None,
        **forward: Unpack[Forward],
    ) -> tuple[Tensor | None, Activations]:
        """The logits, and what was at the named points after all hooks.

        `names` are names ("blocks.3.attn.z"), globs ("blocks.*.resid_post"), layer-local names ("resid_post") or
        "all". What follows from other points asked for is not stored but derived when it is read. With `logits=False`
        the run ends after the last point asked for, and None stands for the logits. `gradients_of`, a function of the
        logits to one number or one per row, also leaves its gradient at every point, `acts.gradients`.
        Raises HookError for a name that matches nothing.
        """
        return self._run(prompt, names, hooks, logits, forward, gradients_of)

    def run_with_hooks(
        self, prompt: Prompt | None = None, hooks: Hooks | None = None, **forward: Unpack[Forward]
    ) -> Float[Tensor, "batch kept vocab"]:
        """Logits with `hooks`, {"blocks.3.attn.z": fn} or [("blocks.*.attn.z", fn), ...], run in the order given.

        `fn(x, point)` gets a copy of the tensor there and returns what the model should use instead.
        """
        return cast(Tensor, self._run(prompt, (), hooks, True, forward)[0])

    def _run(
        self,
        prompt: Prompt | None,
        names: Names,
        hooks: Hooks | None,
        logits: bool,
        forward: Forward,
        metric: Metric | None = None,
    ) -> tuple[Tensor | None, Activations]:
        tokens, kv = self._inputs(prompt, forward), forward.get("kv")
        plan = Plan.of(self._passed(tokens, forward), names, hooks)
        watch = self._watch(plan, tokens, forward)
        of = self._of(prompt, tokens, kv, watch.positions, watch.key_positions, frozenset(plan.edits))
        plan.possible(watch)
        if metric is not None:
            return self._differentiated(tokens, forward, watch, metric, of)
        plan.store_the_basis(self.model, of.past_entries)
        watch.left = set(plan.names) | set(plan.edits)
        watch.stop_when_done = not logits and kv is None
        try:
            out = self.model(tokens, hook=watch, **forward)
        except Enough:
            out = None
        return out if logits else None, Activations(watch.recorded(), plan.named, of)

    def _differentiated(
        self, tokens: Tensor | None, forward: Forward, watch: Watch, metric: Metric, of: Of
    ) -> tuple[Tensor, Activations]:
        """A run whose graph begins at the embeddings, the metric of it, and the gradient at every kept point."""
        watch.in_graph = True
        with torch.enable_grad():
            entering = cast(Tensor, forward.pop("inputs_embeds", None) if tokens is None else tokens)
            if not entering.is_floating_point():
                entering = self.model.embed(entering)
            entering = entering.detach().requires_grad_()
            if forward.get("start_layer"):
                logits = self.model(entering, hook=watch, **forward)
            else:
                logits = self.model(hook=watch, **{**forward, "inputs_embeds": entering})
            value = metric(logits)
            if not isinstance(value, Tensor) or not value.requires_grad:
                raise HookError(f"gradients_of must give a number that follows from the logits; it gave {value!r:.80}")
            kept = dict(watch.kept)
            found = torch.autograd.grad(value.sum(), list(kept.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(kept.items(), found, strict=True)
        }
        of = replace(of, model=None)  # a gradient does not follow from others as a value does
        values, named = {name: x.detach() for name, x in kept.items()}, watch.plan.named
        return logits.detach(), Activations(values, named, of, Activations(gradients, named, of))

    def _of(
        self,
        prompt: Prompt | None,
        tokens: Tensor | None,
        kv: KVCache | None,
        positions: Tensor,
        key_positions: Tensor,
        edited: frozenset[str] = frozenset(),
    ) -> Of:
        """What a recording is of."""
        return Of(
            None if tokens is None or tokens.is_floating_point() else tokens,
            positions,
            key_positions,
            self.model,
            lambda: self.model_hash,
            self.tokenizer,
            prompt.at if isinstance(prompt, Rows) else None,
            edited,
            past_entries=kv is not None and kv.length > 0,
        )

    def _watch(self, plan: Plan, tokens: Tensor | None, forward: Forward) -> Watch:
        """The hook of one plain forward, which knows the positions that the forward will have."""
        entering = cast(Tensor, forward.get("inputs_embeds") if tokens is None else tokens)
        kv, ids, mask = forward.get("kv"), forward.get("position_ids"), forward.get("attention_mask")
        if kv is not None:
            kv.fits(self.cfg, torch.empty(entering.shape[0], 0, 0, dtype=self.dtype, device=self.device))
        positions = absolute_positions(entering.shape[:2], entering.device, kv, ids, mask)
        key_positions = positions if kv is None else kv.with_positions(positions)
        not_ours = (record.KV_VIEWS if kv is not None else frozenset()) | ({"embed"} if tokens is None else frozenset())
        return Watch(plan, 0, positions, key_positions, not_ours, forward.get("logits_to_keep"))

    def _passed(self, tokens: Tensor | None, forward: Forward) -> list[str]:
        """The points that a forward of these arguments comes by, in order."""
        if not self._names:
            self._names = list(record.catalogue(self.model))
        start, stop = forward.get("start_layer", 0), forward.get("stop_layer")
        layers = self.model.layers(start, stop)
        ends = {"embed"} if tokens is None or not tokens.is_floating_point() else set()
        ends |= {"ln_final.scale", "ln_final.normalized", "logits"} if stop is None else set()
        return [n for n in self._names if n in ends or (n.startswith("blocks.") and int(n.split(".")[1]) in layers)]

    def harvest(
        self,
        prompts: Iterable[Any],
        names: Names,
        out: str | Path,
        *,
        batch: int = 16,
        shard_tokens: int = 16_384,
    ) -> Harvest:
        """Write what is at the named points, a row per token, for any number of prompts; see `harvest.harvest`."""
        hashes = {"model": self.model_hash, "tokenizer": self.tokenizer_hash}
        return harvest(self, prompts, names, out, hashes=hashes, batch=batch, shard_tokens=shard_tokens)

    def points(self, prompt: Prompt | None = None) -> Points:
        """The catalogue of points alive in this model, with shapes for `prompt` (by default one token)."""
        shape = (1, 1) if prompt is None else self.to_batch(prompt)[0].shape
        return Points(record.catalogue(self.model, *shape).values())

    def check(
        self,
        prompt: Prompt | None = None,
        names: Names = (),
        hooks: Hooks | None = None,
        **forward: Unpack[Forward],
    ) -> Check:
        """What a run would store, what that weighs, and where its hooks fire, found on the meta device.

        Nothing is computed: hooks are called with tensors without numbers, and one that needs numbers is reported and
        passed over. Raises what the run would raise: HookError for a name that matches nothing or a result that does
        not fit.
        """
        tokens, kv = self._inputs(prompt, forward), forward.get("kv")
        order = self._passed(tokens, forward)
        plan = Plan.of(order, names, hooks)
        watch = self._watch(plan, tokens, forward)
        watch.real_device = self.device
        batch, pos = watch.positions.shape
        points = record.catalogue(self.model, batch, pos, kv.length if kv else 0, forward.get("logits_to_keep"))
        plan.possible(watch)
        plan.store_the_basis(self.model, bool(kv and kv.length))
        with OnMeta():
            for point in (points[name] for name in order if name in plan.edits):
                watch(point.name, torch.empty(point.shape, dtype=point.dtype, device="meta"))
        stored = Points(points[name] for name in plan.named if name in plan.names)
        return Check(Points(points[name] for name in plan.named), stored, plan.fires(), watch.raised)

    # ---- generating ----

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 20,
        *,
        hooks: Hooks | None = None,
        names: Names = (),
        kv: KVCache | None = None,
        attention_mask: Tensor | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Run:
        """Continue the prompt, greedily unless a temperature is given, until every row has said a stop id or string.

        The stop ids are by default the checkpoint's. Sampling is transformers' own, drawn from a generator of this
        run: the same seed gives the same tokens.

        `hooks` work at every step: `point.step` is 0 for the prompt, `point.positions` are absolute. `names` records
        what really happened, joined over the steps. With `kv`, the prompt is what comes after the cache, which stays
        as it was. Interrupting returns what there is. Raises HookError (with what there is as its `.run`) for an edit
        at a step or position that was never reached.
        """
        going = self._start(
            prompt,
            max_new_tokens,
            names,
            hooks=hooks,
            kv=kv,
            attention_mask=attention_mask,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        try:
            for _ in going:
                pass
        except KeyboardInterrupt:
            return going.run("interrupted")
        except Exception as e:
            setattr(e, "run", going.run("failed"))  # noqa: B010 - nothing already computed is lost
            raise
        return going.run()

    def stream(self, prompt: Prompt, max_new_tokens: int = 20, **options: Unpack[Options]) -> Iterator[Step]:
        """The steps of `generate`, which has the same options, as they happen, each with the text that it completes."""
        return self._flow(self._start(prompt, max_new_tokens, (), **options))

    def _flow(self, going: Going) -> Iterator[Step]:
        shown = [""] * going.tokens.shape[0]
        for step in going:
            now = going.texts(whole=False) or shown
            pieces = [new[len(old) :] for new, old in zip(now, shown, strict=True)]
            shown = now
            yield replace(step, text=pieces[0] if len(pieces) == 1 else pieces)

    def _start(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        names: Names,
        *,
        hooks: Hooks | None = None,
        kv: KVCache | None = None,
        attention_mask: Tensor | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> Going:
        how = Sampling(**sampling)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        forward: Forward = {"kv": kv, "attention_mask": attention_mask}
        tokens = cast(Tensor, self._inputs(prompt, forward))
        self._check_ids(tokens)
        room = tokens.shape[1] + max_new_tokens - 1
        kv = self.new_kv(tokens.shape[0], room) if kv is None else kv.fork(room)
        plan = Plan.of(self._passed(tokens, {}), names, hooks)
        plan.reachable(max_new_tokens - 1, int(kv.next_positions().max()) + room - 1)
        stop_ids = self.stop_ids if stop_ids is None else tuple(stop_ids)
        strings = (
            () if stop_strings is None else (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        )
        if strings:
            self._text()  # raises without a tokenizer
        if not all(strings):
            raise ValueError("an empty stop string would stop everything at once")
        mask, recorder = forward.get("attention_mask"), Recorder(plan)
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("a prompt is padded on the left: the last column of attention_mask must be all 1")
        going = Going(iter(()), recorder, kv, kv.length, tokens, tokens.shape[1], stop_ids, strings, self.tokenizer)
        going.last = tokens.shape[1] + max_new_tokens
        going.of = self._of(prompt, None, kv, kv.positions[:, :0], kv.positions[:, :0])
        going.steps = steps(
            self.model,
            tokens,
            mask,
            kv,
            recorder.hook_at,
            max_new_tokens=max_new_tokens,
            choose=how.chooser(tokens.device, None if mask is None else mask.int().argmax(1)),
            stop_ids=stop_ids,
            said_enough=going.said_enough if strings else None,
            pad_id=self.pad_id,
        )
        return going

    def new_kv(self, batch: int = 1, capacity: int = 256) -> KVCache:
        """An empty KV cache for this model; it grows when it is full."""
        return KVCache.empty(self.cfg, batch, capacity, self.dtype, self.device)

    # ---- text ----

    def _inputs(self, prompt: Prompt | None, forward: Forward) -> Tensor | None:
        """What `GLM.forward` takes first; the mask that padding of texts needs goes into `forward`."""
        for name in forward.keys() - Forward.__annotations__.keys():
            known = ", ".join(Forward.__annotations__)
            raise TypeError(f"unexpected keyword argument {name!r}; a forward takes {known}")
        if prompt is None and forward.get("inputs_embeds") is None:
            raise TypeError("no prompt: give text, chat messages, token ids, or inputs_embeds=")
        for name in ("position_ids", "attention_mask", "inputs_embeds"):
            if (given := forward.get(name)) is not None:
                forward[name] = given.to(self.device)
        if prompt is None or (isinstance(prompt, Tensor) and prompt.is_floating_point()):
            return prompt if prompt is None else prompt.to(self.device)
        kv = forward.get("kv")
        tokens, mask = self.to_batch(prompt, prefix=kv is None or kv.length == 0)
        if forward.get("attention_mask") is None and mask is not None:
            forward["attention_mask"] = mask
        return tokens

    def test_prompt(self, prompt: Prompt, answer: str | Sequence[str], top: int = 10) -> None:
        """Print the rank and probability of each token of the answer (or of each answer), and the top tokens there."""
        for text in [answer] if isinstance(answer, str) else answer:
            ids, (tokens, _) = self._text().encode(text, prefix=False), self.to_batch(prompt)
            if not ids or tokens.shape[0] != 1:
                raise ValueError(f"one prompt and an answer of at least one token: got {tokens.shape[0]} and {text!r}")
            whole = torch.cat([tokens, torch.tensor([ids], device=tokens.device)], 1)
            probs = self(whole, logits_to_keep=len(ids) + 1)[0, :-1].to(torch.float32).softmax(-1)
            print(f"{self.to_labels(prompt)[-1]!r} ← {text!r}")
            for i, p in zip(ids, probs, strict=True):
                rank = int((p > p[i]).sum())
                print(f"  {self._text().label(i)!r}: rank {rank}, probability {float(p[i]):.2%}")
                best = ", ".join(f"{self._text().label(int(j))!r} {float(p[j]):.1%}" for j in p.topk(top).indices)
                print(f"    top {top}: {best}")

    def log_probs(self, prompt: Prompt) -> Float[Tensor, "batch next"]:
        """The log-probability in nats of every token but the first, given those before it; nan at padding."""
        tokens, mask = self.to_batch(prompt)
        found = token_log_probs(self(tokens, attention_mask=mask), tokens)
        return found if mask is None else found.masked_fill(mask[:, :-1] == 0, torch.nan)

    def loss(self, prompt: Prompt, labels: Int[Tensor, "batch pos"] | None = None) -> Float[Tensor, ""]:
        """The mean next-token cross-entropy in nats; padding, what it predicts, and labels of -100 do not count."""
        tokens, mask = self.to_batch(prompt)
        labels = tokens if labels is None else labels.to(self.device)
        if mask is not None:
            before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
            labels = labels.masked_fill((mask == 0) | (before == 0), -100)
        return loss(self(tokens, attention_mask=mask), labels)

    # ---- the model ----

    @property
    def cfg(self) -> GLMConfig:
        return self.model.cfg

    @property
    def dtype(self) -> torch.dtype:
        return self.model.ln_final.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.ln_final.weight.device

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> "Lens":
        """Move this lens to a device or dtype, in place as in torch, and return it."""
        self.model.to(device=device, dtype=None if dtype is None else checkpoint.dtype_named(dtype))
        return self

    def __repr__(self) -> str:
        c = self.cfg
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        heads = f"{c.n_heads} heads on {c.n_kv_heads} kv heads of {c.d_head} ({c.d_rotary} of them turn)"
        return (
            f"Lens({c.model_type}: {c.n_layers} layers, d_model {c.d_model}, {heads}, d_mlp {c.d_mlp}, "
            f"vocab {c.d_vocab:,}; {millions:,.1f} M parameters, {self.dtype}, {self.device}, {self.model.attention})"
        )
