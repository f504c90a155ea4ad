"""Check a model against its own config, and its runs against identities that hold for every GLM."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, layer_scores, pattern_points
from glmlens.analysis.logit_attribution import logit_attribution
from glmlens.analysis.prompt_batch import PromptBatch
from glmlens.analysis.residual import accumulated_residual, decompose_residual
from glmlens.dtypes import upcast
from glmlens.errors import GlmlensError
from glmlens.hook_points import Point
from glmlens.lens import Lens
from glmlens.loading.checkpoint import build_meta_model
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.text_tables import format_table

POSITION_SHIFT = 5  # positions; any number would do


class SelfCheckError(GlmlensError, AssertionError):
    """A model that fails its self-check; the message has a line for every failed check."""


@dataclass(frozen=True)
class CheckRow:
    """One check: its name, the measured number, and the largest number that passes."""

    check: str
    measured: float | int
    bound: float | int
    unit: str

    @property
    def holds(self) -> bool:
        """Whether the measured number is within the bound."""
        return self.measured <= self.bound  # nan does not hold

    def to_cells(self) -> tuple[str, str, str, str]:
        """Return the row as text: ok or FAILED, the check, the numbers, the unit."""
        numbers = f"{self.measured:.3g} (at most {self.bound:.3g})"
        return "ok" if self.holds else "FAILED", self.check, numbers, self.unit


@dataclass(frozen=True, eq=False, repr=False)
class SelfCheck(Labelled):
    """The measured numbers [check]; `rows` holds each with its bound."""

    rows: tuple[CheckRow, ...] = ()

    def __repr__(self) -> str:
        about = "".join(f"\n  {field}: {text}" for field, text in self.about.items())
        return f"SelfCheck{about}\n{format_table([row.to_cells() for row in self.rows])}"


def selfcheck(lens: Lens, prompt: Prompt | None = None) -> SelfCheck:
    """Check a model against its config and against identities that hold for every GLM, and return a table of checks.

    The prompt is by default 12 random tokens after the prefix. A bound of 0 means equal bit for bit; other bounds are
    1e-5 in float32, and follow the rounding of other dtypes. Without an unembedding, checks of logits are left out.
    Raises SelfCheckError with the measured number and the bound of every failed check.
    """
    prompt = draw_tokens(lens) if prompt is None else prompt
    checks = {check: measure for check, measure in CHECKS.items() if lens.cfg.d_logits or check not in LOGIT_CHECKS}
    rows = [run_check(check, measure, lens, prompt) for check, measure in checks.items()]
    about = PromptBatch.from_prompt(lens, prompt).describe(
        metric="largest departure", direction="0 is best", positions="all"
    )
    measured = np.array([row.measured for row in rows])
    failed = [row for row in rows if not row.holds]
    if failed:
        lines = format_table([row.to_cells()[1:] for row in failed])
        raise SelfCheckError(f"{len(failed)} of {len(rows)} checks failed on model {lens.model_hash}:\n{lines}")
    return SelfCheck(measured, ("check",), {"check": [row.check for row in rows]}, about, rows=tuple(rows))


def run_check(check: str, measure: "CheckFunction", lens: Lens, prompt: Prompt) -> CheckRow:
    """Run one check and return its row; a check that raises an exception fails."""
    try:
        measured, bound, unit = measure(lens, prompt)
    except Exception as e:
        first_line = str(e).splitlines()[0] if str(e) else ""
        return CheckRow(check, measured=np.nan, bound=0, unit=f"{type(e).__name__}: {first_line}")
    return CheckRow(check, measured, bound, unit)


def draw_tokens(lens: Lens) -> Prompt:
    """Return the prefix and 12 random tokens, always the same."""
    prefix = torch.tensor([lens.tokenizer.prefix if lens.tokenizer else ()], dtype=torch.long)
    drawn = torch.randint(lens.cfg.d_vocab, (1, 12), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([prefix, drawn], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


CheckResult = tuple[float | int, float | int, str]
"""The measured number, the bound, and the unit."""
CheckFunction = Callable[[Lens, Prompt], CheckResult]


def rounding_bound(lens: Lens) -> float:
    """Return the bound for rounding errors: 84 eps of the dtype (1e-5 in float32), or 16 eps of a 16-bit dtype.

    In 16-bit dtypes sums are computed in float32, and only their results are rounded.
    """
    steps = 16 if lens.dtype.itemsize == 2 else 84
    return steps * torch.finfo(lens.dtype).eps


def largest_magnitude(x: Tensor) -> float:
    """Return the largest magnitude, or nan if there is any nan."""
    return float(upcast(x).abs().max())


def relative_difference(lens: Lens, a: Tensor, b: Tensor) -> CheckResult:
    """Return the largest difference of two tensors, relative to the largest magnitude in `b`."""
    return largest_magnitude(upcast(a) - upcast(b)) / largest_magnitude(b), rounding_bound(lens), "of the largest"


def check_parameter_shapes(lens: Lens, prompt: Prompt) -> CheckResult:
    """Count parameters whose shape or dtype is not that of a model built from the config."""
    from_config = build_meta_model(lens.cfg, lens.model.attention, lens.dtype)
    expected, present = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (from_config, lens.model))
    wrong = sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))
    return len(wrong), 0, f"parameters differ{': ' if wrong else ''}{', '.join(wrong[:3])}"


def check_finite_weights(lens: Lens, prompt: Prompt) -> CheckResult:
    """Count weights that are nan or infinite."""
    return sum(int((~p.isfinite()).sum()) for p in lens.model.parameters()), 0, "numbers are nan or infinite"


def check_tied_embeddings(lens: Lens, prompt: Prompt) -> CheckResult:
    """Compare whether embedding and unembedding are one tensor with the config."""
    shared = lens.model.unembed.weight is lens.model.embed.weight
    return int(shared != lens.cfg.tied), 0, f"the config has {'one matrix' if lens.cfg.tied else 'two matrices'}"


def check_identity_hooks(lens: Lens, prompt: Prompt) -> CheckResult:
    """Compare the logits of a run with an identity edit and recording at every point with those of a plain run."""

    def identity(x: Tensor, point: Point) -> Tensor:
        return x

    rows = PromptBatch.from_prompt(lens, prompt)
    hooked, _ = rows.run("all", {"*": identity})
    plain = lens(rows.tokens, attention_mask=rows.mask)
    return largest_magnitude((hooked - plain)[rows.positions >= 0]), 0, "logits"


def check_last_logit_lens(lens: Lens, prompt: Prompt) -> CheckResult:
    """Compare the unembedded residual stream after the last layer with the logits."""
    rows = PromptBatch.from_prompt(lens, prompt)
    logits, acts = rows.run(f"blocks.{lens.cfg.n_layers - 1}.resid_post")
    unembedded = lens.model.unembed(lens.model.ln_final(acts["resid_post", lens.cfg.n_layers - 1]))
    return largest_magnitude((unembedded - logits)[rows.positions >= 0]), 0, "logits"


def iterate_patterns(lens: Lens, prompt: Prompt) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pattern of every layer, and where it must be 0: [batch, head, query, key].

    Padding queries get uniform attention, so that every row sums to 1, and no key that must be 0.
    """
    rows = PromptBatch.from_prompt(lens, prompt)
    positions = rows.positions
    hidden = (positions[:, None, None, :] > positions[:, None, :, None]) | (positions < 0)[:, None, None, :]
    acts = rows.record(pattern_points(lens))
    for layer in range(lens.cfg.n_layers):
        pattern = upcast(layer_pattern(acts, layer, positions, positions))
        is_token = (positions >= 0)[:, None, :, None].expand_as(pattern)
        filled = pattern.where(is_token, torch.zeros_like(pattern)) + (~is_token) / pattern.shape[-1]
        yield filled, hidden & is_token


def check_attention_sums(lens: Lens, prompt: Prompt) -> CheckResult:
    """Measure how far the attention of a query is from summing to 1."""
    gaps = torch.stack([(pattern.sum(-1) - 1).abs().max() for pattern, _ in iterate_patterns(lens, prompt)])
    return largest_magnitude(gaps), rounding_bound(lens), "attention"


def check_causal_mask(lens: Lens, prompt: Prompt) -> CheckResult:
    """Measure the largest attention to a later token or to padding."""
    leaks = torch.stack([(pattern * hidden).max() for pattern, hidden in iterate_patterns(lens, prompt)])
    return largest_magnitude(leaks), 0, "attention"


def check_residual_sum(lens: Lens, prompt: Prompt) -> CheckResult:
    """Compare the sum of embedding, heads and MLPs with the last residual stream."""
    parts = decompose_residual(lens, prompt, by="head").values
    last = accumulated_residual(lens, prompt).at(layer=lens.cfg.n_layers - 1).values
    gap = np.abs(parts.sum(-3, dtype=np.float64) - last)[~np.isnan(last)]  # nan is past a prompt's end
    return float(gap.max() / np.nan_to_num(np.abs(parts)).max()), rounding_bound(lens), "of the largest part"


def attribution_check(by: str) -> CheckFunction:
    """Return a check that compares the sum of the parts of the most probable token's logit with that logit."""

    def check(lens: Lens, prompt: Prompt) -> CheckResult:
        rows = PromptBatch.from_prompt(lens, prompt)
        logits, _ = rows.run_at(rows.columns_at(-1), ())
        attribution = logit_attribution(lens, prompt, logits.argmax(-1), by=by)
        parts = np.nan_to_num(np.abs(attribution.parts.values)).max()
        return float(np.abs(attribution.unexplained).max() / parts), rounding_bound(lens), "of the largest part"

    return check


def check_cached_decoding(lens: Lens, prompt: Prompt) -> CheckResult:
    """Compare the logits of decoding one token at a time, with a KV cache, with those of one pass."""
    rows = PromptBatch.from_prompt(lens, prompt)
    full = lens(rows.tokens, attention_mask=rows.mask)
    kv = lens.new_kv(rows.batch)
    steps = []
    for i in range(rows.tokens.shape[1]):
        mask = None if rows.mask is None else rows.mask[:, i : i + 1]
        steps.append(lens(rows.tokens[:, i : i + 1], kv=kv, attention_mask=mask))
    is_token = rows.positions >= 0
    return relative_difference(lens, torch.cat(steps, 1)[is_token], full[is_token])


def check_relative_positions(lens: Lens, prompt: Prompt) -> CheckResult:
    """Compare scores with those of the same tokens at later positions (Su et al. 2021, section 3.2)."""
    rows = PromptBatch.from_prompt(lens, prompt)
    positions = rows.positions
    is_token = positions >= 0
    causal = positions[:, None, None, :] <= positions[:, None, :, None]
    visible = is_token[:, None, :, None] & is_token[:, None, None, :] & causal
    scores = []
    for shift in (0, POSITION_SHIFT):
        shifted = torch.where(is_token, positions + shift, positions)
        acts = rows.record(pattern_points(lens, "attn.scores"), position_ids=shifted.clamp(min=0))
        layers = [layer_scores(acts, i, shifted, shifted) for i in range(lens.cfg.n_layers)]
        scores.append(torch.cat([x[visible.expand_as(x)] for x in layers]))
    return relative_difference(lens, scores[1], scores[0])


TIED_CHECK = "embedding and unembedding are tied as in the config"
ATTRIBUTION_CHECKS = {
    f"a logit is the sum of its parts by {by}": attribution_check(by)
    for by in ("component", "head", "neuron", "source")
}
LOGIT_CHECKS = (TIED_CHECK, *ATTRIBUTION_CHECKS)
CHECKS: dict[str, CheckFunction] = {
    "parameters are those of the config": check_parameter_shapes,
    "every weight is finite": check_finite_weights,
    TIED_CHECK: check_tied_embeddings,
    "identity hooks change nothing": check_identity_hooks,
    "the last layer's logit lens is the output": check_last_logit_lens,
    "attention of every query sums to 1": check_attention_sums,
    "no attention to later tokens or padding": check_causal_mask,
    "the residual stream is the sum of its contributions": check_residual_sum,
    **ATTRIBUTION_CHECKS,
    "one token at a time equals one pass": check_cached_decoding,
    "scores depend only on distance": check_relative_positions,
}
