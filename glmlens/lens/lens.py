"""`Lens`: a GLM with its tokenizer. `load` opens a checkpoint as one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from glmlens import losses
from glmlens.config import CheckpointError, ConfigReader
from glmlens.deprecated import rename_method
from glmlens.file_io import expand_path
from glmlens.foreign_keywords import NoKeywords, refuse_keywords
from glmlens.hook_points import HookError
from glmlens.hooks import Hook, Hooks
from glmlens.integers import Integer, Integers, read_integer
from glmlens.kv_cache import KVCache
from glmlens.lens.forward import ForwardMixin, ForwardOptions, PointNames, count_positions
from glmlens.lens.generation import ActiveGeneration, GenerationResult, StopCondition
from glmlens.lens.sampling import (
    GenerationConfig,
    GenerationStep,
    StepHookFactory,
    TokenChooser,
    generate_steps,
    read_stop_ids,
    read_stop_strings,
    show_generation_options,
)
from glmlens.lens.weights import WeightsMixin, stamp_of
from glmlens.loading import checkpoint, hub, saving
from glmlens.model import GLM
from glmlens.recording.harvest import Harvest, harvest
from glmlens.recording.recorder import GenerationRecorder, RunPlan
from glmlens.recording.sparse_dictionaries import Coder, place_dictionary
from glmlens.text.prompts import Prompt
from glmlens.text.tokenizer import Tokenizer

BUNDLED_MODEL = Path(__file__).parents[1] / "demo" / "model"
GENERATION_KEYWORDS = ("hooks", "names", "kv", "attention_mask", "config")  # of generate, besides GenerationConfig's


def load(
    path_or_hub_id: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "eager",
    revision: str | None = None,
    rope_theta: float | int | None = None,
    untie: bool = False,
) -> "Lens":
    """Open a checkpoint: the small GLM inside this package, a local folder, or a hub id.

    Of a hub repository only config, tokenizer and safetensors are downloaded. The formats are `glm`, `glm4`, `chatglm`,
    `llama` and `qwen2`; no code of a checkpoint is ever run. `rope_theta` is used instead of the config's.
    `dtype` defaults to the checkpoint's own; `attention` is "eager" or "sdpa" (faster, without scores and pattern).
    With `untie`, a tied unembedding becomes a copy of the embedding: an edit of `W_E` does not change `W_U`.
    With device="meta" only the config is read, for `check` and `points`. Raises CheckpointError.
    """
    if path_or_hub_id is None and revision is not None:
        raise CheckpointError(f"revision {revision!r} of what? Name a hub id; without one the model inside is opened")
    folder = BUNDLED_MODEL if path_or_hub_id is None else hub.find_checkpoint(path_or_hub_id, revision)
    dtype_to_load = None if dtype is None else checkpoint.parse_dtype(dtype)
    model = checkpoint.load_model(folder, dtype_to_load, device, attention, rope_theta=rope_theta, untie=untie)
    cfg = folder / "generation_config.json"
    stated = ConfigReader(checkpoint.read_json(cfg), str(cfg)) if cfg.exists() else ConfigReader({}, str(cfg))
    stop, pad = stated.read_token_ids("eos_token_id"), stated.read_token_ids("pad_token_id")
    for name in ("tokenizer.json", "tokenizer.model"):
        checkpoint.check_regular_file(folder / name, checkpoint.MAX_TOKENIZER_BYTES)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        checkpoint.check_regular_file(folder / name, checkpoint.MAX_TEXT_BYTES)
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except ValueError as e:
        raise CheckpointError(str(e)) from e
    return Lens(model, tokenizer, stop_ids=stop or None, pad_id=pad[0] if pad else None, folder=folder)


class Lens(ForwardMixin, WeightsMixin):
    """A GLM with its tokenizer, to run, record, edit and generate with.

    Its parameters are frozen; gradients flow to the tensors that hooks return. Only `to` changes a lens.
    """

    def __init__(
        self,
        model: GLM,
        tokenizer: Tokenizer | None = None,
        *,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        folder: Path | None = None,
    ):
        self.folder = folder  # where the tokenizer's files lie, for `save`
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.stop_ids = model.cfg.eos_token_ids if stop_ids is None else tuple(stop_ids)
        candidates = (pad_id, model.cfg.pad_token_id, *self.stop_ids, 0)
        self.pad_id = next(i for i in candidates if i is not None and 0 <= i < model.cfg.d_vocab)
        super().__init__()

    spliced = rename_method("spliced", "with_dictionary")

    def with_dictionary(self, writes: str, coder: Coder, *, reads: str | None = None) -> "Lens":
        """Return a copy of this lens with a sparse autoencoder at a point, or a transcoder from `reads` to `writes`.

        Its features are a point, "blocks.2.resid_post.features" [batch, pos, feature], and so is the reconstruction
        error, "blocks.2.resid_post.error". Logits are unchanged until a feature is edited: the error is added back.
        The copy shares the weights. Raises HookError for a point where a dictionary cannot be.
        """
        dictionary = place_dictionary(coder, reads, writes, self.points(), self.device)
        if any(dictionary.writes == other.writes for other in self.dictionaries):
            raise HookError(f"there is a dictionary at {writes!r} already: its features would have the same name")
        return cast(Lens, self.copy_with_dictionaries((*self.dictionaries, dictionary)))

    def harvest(
        self,
        prompts: Iterable[Any],
        names: PointNames,
        out: str | Path,
        *,
        batch: Integer = 16,
        shard_tokens: Integer = 16_384,
    ) -> Harvest:
        """Write the activations of any number of prompts to disk, a row per token; see `harvest.harvest`."""
        hashes = {"model": self.model_hash, "tokenizer": self.tokenizer_hash}
        return harvest(self, prompts, names, out, hashes=hashes, batch=batch, shard_tokens=shard_tokens)

    # ---- generating ----

    @show_generation_options
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: Integer | None = None,
        *,
        hooks: Hooks | None = None,
        names: PointNames = (),
        kv: KVCache | None = None,
        attention_mask: Tensor | None = None,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Continue the prompt until every row has produced a stop id or string, or `max_new_tokens` tokens.

        The options are those of `GenerationConfig`, as keywords or in a `config`; keywords override the config.
        Decoding is greedy unless a temperature is given. Sampling is that of transformers, from a generator of this
        run: the same seed gives the same tokens. A torch.Generator as the seed is sampled from, and its state advances.
        The stop ids default to the checkpoint's. With `kv`, a repetition penalty covers the cached tokens too.

        `hooks` run at every step: `point.step` is 0 for the prompt, `point.positions` are absolute. `names` are the
        points to record, joined over the steps. With `kv`, the prompt follows the cache, which is copied and not
        changed: a text, or the next message of a chat, after the token that was chosen last (which is run first); of a
        whole chat, the part that is not cached yet. Interrupting returns the result so far.

        Raises HookError (with the result so far as its `.run`) for an edit at a step or position that was never
        reached, ValueError for a chat that does not begin as the cache does, TypeError for an unknown option.
        """
        return self.start_generation(
            prompt,
            max_new_tokens,
            hooks=hooks,
            names=names,
            kv=kv,
            attention_mask=attention_mask,
            config=GenerationConfig.from_options("generate", config, options, GENERATION_KEYWORDS),
        ).run_to_end()

    @show_generation_options
    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: Integer | None = None,
        *,
        hooks: Hooks | None = None,
        kv: KVCache | None = None,
        attention_mask: Tensor | None = None,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> Iterator[GenerationStep]:
        """Yield the steps of `generate`, which has the same options, each with the text that it completes."""
        takes = [name for name in GENERATION_KEYWORDS if name != "names"]
        generation = self.start_generation(
            prompt,
            max_new_tokens,
            hooks=hooks,
            kv=kv,
            attention_mask=attention_mask,
            config=GenerationConfig.from_options("stream", config, options, takes),
        )
        return self._stream_steps(generation)

    def _stream_steps(self, generation: ActiveGeneration) -> Iterator[GenerationStep]:
        shown = [""] * generation.tokens.shape[0]
        for step in generation:
            texts = generation.decode_texts(final=False) or shown
            pieces = [new[len(old) :] for new, old in zip(texts, shown, strict=True)]
            shown = texts
            yield replace(step, text=pieces[0] if len(pieces) == 1 else pieces)

    @show_generation_options
    def start_generation(
        self,
        prompt: Prompt,
        max_new_tokens: Integer | None = None,
        *,
        hooks: Hooks | None = None,
        names: PointNames = (),
        kv: KVCache | None = None,
        attention_mask: Tensor | None = None,
        preceding_tokens: Sequence[int] = (),
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> ActiveGeneration:
        """Return a generation of which no step has run yet; `generate` has the same options and runs it to its end.

        Iterate over it for its steps; `make_result` returns the result so far. `preceding_tokens` are those of the one
        row before the prompt, in which a stop string may begin. Raises the errors of `generate` that do not take a run.
        """
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        config = GenerationConfig.from_options("start_generation", config, options, GENERATION_KEYWORDS)
        self._require_language_model("generate")
        n_new = int(config.max_new_tokens)
        forward: ForwardOptions = {"kv": kv, "attention_mask": attention_mask}
        self.before_run(forward)
        tokens = cast(Tensor, self.prepare_inputs(prompt, forward))
        self.check_token_ids(tokens)
        mask = forward.get("attention_mask")
        n_positions = count_positions(tokens, kv, mask)
        batch, n_prompt = tokens.shape
        max_run = n_prompt + n_new - 1  # the last token is chosen and not run
        capacity = min(max_run, n_prompt + 256)  # the cache grows by itself: tokens after a stop take no memory
        if kv is None:
            kv = self.new_kv(batch, capacity)
        else:
            kv.fits_model(self.cfg, batch, self.dtype, self.device)
            kv = kv.fork(capacity)
        plan = RunPlan.from_request(self.list_passed_points(tokens, {}), names, hooks)
        plan.check_reachable(n_new - 1, int(kv.next_positions().max()) + max_run - 1)
        stop_ids, stop_strings = self.resolve_stops(config.stop_ids, config.stop_strings)
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("a prompt is padded on the left: the last column of attention_mask must be all 1")
        recorder = GenerationRecorder(plan)
        stop = StopCondition(stop_ids, stop_strings, self.tokenizer, n_prompt, tuple(preceding_tokens))
        choose = self._make_chooser(config, kv, None if mask is None else mask == 0)
        steps = generate_steps(
            self.model,
            tokens,
            mask,
            kv,
            self._warn_at_context(self.make_step_hooks(recorder), n_positions),
            max_new_tokens=n_new,
            choose=self._check_before_choosing(choose, edited=bool(plan.edits_by_point)),
            stop_ids=stop_ids,
            should_stop=stop.find_stop_strings if stop_strings else None,
            pad_id=self.pad_id,
        )
        nothing = kv.positions[:, :0]  # the positions follow with every step
        return ActiveGeneration(
            steps=steps,
            recorder=recorder,
            kv=kv,
            cached_length=kv.length,
            tokens=tokens,
            max_length=n_prompt + n_new,
            stop=stop,
            run_info=self.make_run_info(prompt, None, kv, nothing, nothing),
        )

    def _warn_at_context(self, make_step_hook: StepHookFactory, n_positions: int) -> StepHookFactory:
        """Return `make_step_hook` with a warning at the first step beyond the context."""

        def make_warning_hook(step: int, positions: Tensor, key_positions: Tensor) -> Hook:
            self.warn_beyond_context(n_positions + step)
            return make_step_hook(step, positions, key_positions)

        return make_warning_hook

    def resolve_stops(
        self, stop_ids: Integers = None, stop_strings: str | Sequence[str] | None = None
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the stop ids and strings of a generation with these options: by default the checkpoint's ids.

        Raises ValueError for an empty string, and for strings without a tokenizer.
        """
        strings = read_stop_strings(stop_strings)
        if strings:
            self.require_tokenizer()
        ids = read_stop_ids(stop_ids)
        return self.stop_ids if ids is None else ids, strings

    def _make_chooser(self, config: GenerationConfig, kv: KVCache, padding: Tensor | None) -> TokenChooser:
        """Return the function that chooses tokens; a repetition penalty covers those of the cache."""
        cached_positions = kv.positions[:, : kv.length]
        cached_tokens = kv.tokens[:, : kv.length]
        if config.repetition_penalty is not None and bool(((cached_tokens < 0) & (cached_positions >= 0)).any()):
            raise ValueError("repetition_penalty: this cache does not know its tokens; it was filled from embeddings")
        if padding is not None or bool((cached_positions < 0).any()):
            if padding is None:
                padding = torch.zeros(kv.batch, 0, dtype=torch.bool, device=kv.positions.device)
            padding = torch.cat([cached_positions < 0, padding], 1)
        return config.make_chooser(kv.positions.device, cached_tokens, padding)

    def _check_before_choosing(self, choose: TokenChooser, edited: bool = False) -> TokenChooser:
        """Return `choose` with a check that the logits are not nan."""

        def choose_checked(logits: Tensor, tokens: Tensor) -> Tensor:
            self.refuse_nan(logits, edited)
            return choose(logits, tokens)

        return choose_checked

    def new_kv(self, batch: Integer = 1, capacity: Integer = 256) -> KVCache:
        """Return an empty KV cache for this model; it grows when it is full."""
        batch, capacity = read_integer(batch, "batch", least=1), read_integer(capacity, "capacity", least=0)
        return KVCache.empty(self.cfg, batch, capacity, self.dtype, self.device)

    # ---- text ----

    def test_prompt(
        self,
        prompt: Prompt,
        answer: str | Sequence[str],
        top: Integer = 10,
        *,
        hooks: Hooks | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> None:
        """Print the rank and probability of each token of the answer (or of each answer), and the top tokens there.

        `hooks` edit the run.
        """
        refuse_keywords("test_prompt", unknown, ["prompt", "answer", "top", "hooks"])
        self._require_language_model("test_prompt")
        top = min(read_integer(top, "top", least=1), self.cfg.d_vocab)
        for text in [answer] if isinstance(answer, str) else answer:
            ids, (tokens, mask) = self.require_tokenizer().encode_continuation(text), self.to_batch(prompt)
            if not ids or tokens.shape[0] != 1:
                raise ValueError(f"one prompt and an answer of at least one token: got {tokens.shape[0]} and {text!r}")
            full = torch.cat([tokens, torch.tensor([ids], device=tokens.device)], 1)
            real = torch.ones_like(full)
            if mask is not None:
                real[:, : mask.shape[1]] = mask
            logits = self._edited_logits(full, hooks, attention_mask=real, logits_to_keep=len(ids) + 1)
            probs = logits[0, :-1].to(torch.float32).softmax(-1)
            print(f"{self.to_labels(tokens)[-1]!r} ← {text!r}")
            for i, p in zip(ids, probs, strict=True):
                rank = int((p > p[i]).sum())
                print(f"  {self.require_tokenizer().label(i)!r}: rank {rank}, probability {float(p[i]):.2%}")
                best = ", ".join(
                    f"{self.require_tokenizer().label(int(j))!r} {float(p[j]):.1%}" for j in p.topk(top).indices
                )
                print(f"    top {top}: {best}")

    def log_probs(
        self, prompt: Prompt, *, hooks: Hooks | None = None, **unknown: Unpack[NoKeywords]
    ) -> Float[Tensor, "batch next"]:
        """Return the log-probability in nats of every token but the first, given those before it; nan at padding.

        `hooks` edit the run.
        """
        refuse_keywords("log_probs", unknown, ["prompt", "hooks"])
        tokens, mask = self.to_batch(prompt)
        self._require_language_model("log_probs")
        log_probs = losses.token_log_probs(self._edited_logits(tokens, hooks, attention_mask=mask), tokens)
        return log_probs if mask is None else log_probs.masked_fill(mask[:, :-1] == 0, torch.nan)

    def _edited_logits(self, tokens: Tensor, hooks: Hooks | None, **forward: Unpack[ForwardOptions]) -> Tensor:
        """Return the logits of a run with hooks, or of the model without hooks."""
        return self(tokens, **forward) if hooks is None else self.run_with_hooks(tokens, hooks, **forward)

    def classify(
        self,
        prompt: Prompt | None = None,
        hooks: Hooks | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Float[Tensor, "batch *pos label"]:
        """Return the logits of a class head: [batch, label] for sequences, or [batch, pos, label] for tokens.

        A sequence is classified at its right-most token that is not the config's pad_token_id; see `losses.pooled`.
        """
        if not self.cfg.labels:
            raise ValueError("this model has no class head: it was saved as a language model or without a head")
        forward: ForwardOptions = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        tokens = self.prepare_inputs(prompt, forward)
        if forward.get("attention_mask") is None:  # there is no padding: a mask of ones says so to the run below
            entering = cast(Tensor, forward.get("inputs_embeds") if tokens is None else tokens)
            forward["attention_mask"] = torch.ones(entering.shape[:2], dtype=torch.long, device=entering.device)
        logits = self.run_with_hooks(tokens, hooks, **forward)
        return logits if self.cfg.head == "token" else losses.pool_last_token(logits, tokens, self.cfg.pad_token_id)

    def loss(
        self,
        prompt: Prompt,
        labels: Tensor | None = None,
        num_items: int | Tensor | None = None,
        *,
        hooks: Hooks | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> Float[Tensor, ""]:
        """Return the mean next-token cross-entropy in nats, without padding, its predictions, and labels of -100.

        `labels` [batch, pos] default to the tokens themselves. With `num_items` the sum is divided by that number
        instead. A class head needs its labels: [batch, pos] for tokens, without padding, or [batch] or [batch, label]
        for sequences; see `losses.sequence_loss`. `hooks` edit the run.
        """
        refuse_keywords("loss", unknown, ["prompt", "labels", "num_items", "hooks"])
        tokens, mask = self.to_batch(prompt)
        if labels is None:
            self._require_language_model("loss without labels")
        labels = tokens if labels is None else labels.to(self.device)
        if self.cfg.head == "sequence":
            if num_items is not None:
                raise ValueError("num_items counts tokens; the loss of sequences is a mean over them")
            return losses.sequence_loss(
                self.classify(tokens, hooks, attention_mask=mask), labels, self.cfg.problem_type
            )
        if mask is not None:
            labels = labels.masked_fill(mask == 0, -100)
        if self.cfg.head == "token":
            return losses.token_loss(self._edited_logits(tokens, hooks, attention_mask=mask), labels, num_items)
        self._require_language_model("loss")
        if mask is not None:
            labels = labels.masked_fill(torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0, -100)
        return losses.next_token_loss(self._edited_logits(tokens, hooks, attention_mask=mask), labels, num_items)

    def _require_language_model(self, what: str) -> None:
        """Raise ValueError unless this is a language model; `what` was called."""
        if self.cfg.head != "vocab":
            has = f"a head of classes ({', '.join(self.cfg.labels)})" if self.cfg.labels else "no head"
            raise ValueError(f"{what}: this checkpoint has {has}, and predicts no next token")

    # ---- the model ----

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> "Lens":
        """Move this lens to a device or dtype, in place as in torch, and return it."""
        before = stamp_of(self.model)
        self.model.to(device=device, dtype=None if dtype is None else checkpoint.parse_dtype(dtype))
        if stamp_of(self.model) != before:  # no longer views of the file
            checkpoint.MAPPED.pop(self.model, None)
        return self

    def save(self, folder: str | Path, *, shard_bytes: int = saving.MAX_SHARD_BYTES) -> Path:
        """Write this model and its tokenizer as a checkpoint that transformers opens; return the folder.

        The format is `glm` or, with sandwich norms, `glm4`; a model opened as `chatglm`, `llama` or `qwen2` becomes a
        `glm` with the same maths. Weights are in this lens's dtype, in files of at most `shard_bytes`. Inserted
        dictionaries are not saved. The folder is written atomically. Raises FileExistsError unless it is new or empty.
        """
        if self.device.type == "meta":
            raise ValueError("on the meta device there are no numbers to save: load on the CPU")
        folder = expand_path(folder)
        with saving.create_folder_atomically(folder) as new:
            saving.write_json(new / "config.json", saving.make_config_json(self.model))
            stated = self.folder / "generation_config.json" if self.folder else new
            config = checkpoint.read_json(stated) if stated.is_file() else {}
            stops = {"eos_token_id": [*self.stop_ids] or None, "pad_token_id": self.pad_id}
            saving.write_json(new / "generation_config.json", config | stops)
            if self.tokenizer is not None:
                saving.write_tokenizer(new, self.tokenizer, self.folder)
            saving.write_weights(new, saving.collect_tensors(self.model), shard_bytes)
        return folder

    def __repr__(self) -> str:
        c = self.cfg
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        head = f", labels {', '.join(c.labels)}" if c.labels else "" if c.d_logits else ", no unembedding"
        head += ", W_U is W_E" if c.tied else ""
        heads = f"{c.n_heads} heads on {c.n_kv_heads} kv heads of {c.d_head} ({c.d_rotary} of them rotated)"
        return (
            f"Lens({c.model_type}: {c.n_layers} layers, d_model {c.d_model}, {heads}, d_mlp {c.d_mlp}, "
            f"vocab {c.d_vocab:,}{head}; {millions:,.1f} M parameters, {self.dtype}, {self.device}, "
            f"{self.model.attention})"
        )
