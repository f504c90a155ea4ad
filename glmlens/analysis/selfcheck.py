"""Whether the numbers hold: a model against its own config, and against identities that no good run can break."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, layer_scores, pattern_points
from glmlens.analysis.attribution import logit_attribution
from glmlens.analysis.batch import PromptBatch, upcast
from glmlens.analysis.residual import accumulated_residual, decompose_residual
from glmlens.errors import GlmlensError
from glmlens.hook_points import Point
from glmlens.lens import Lens
from glmlens.loading.checkpoint import build_meta_model
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.text_tables import format_table

POSITION_SHIFT = 5


class SelfCheckError(GlmlensError, AssertionError):
    """A model whose numbers do not hold; the message has a line for every check that failed."""


@dataclass(frozen=True)
class CheckRow:
    """One check: what was asked, the number found, and the largest that it may be."""

    check: str
    measured: float | int
    bound: float | int
    unit: str

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound  # nan does not hold

    def to_cells(self) -> tuple[str, str, str, str]:
        numbers = f"{self.measured:.3g} (at most {self.bound:.3g})"
        return "ok" if self.holds else "FAILED", self.check, numbers, self.unit


@dataclass(frozen=True, eq=False, repr=False)
class SelfCheck(Labelled):
    """The measured numbers [check]; `rows` has each with its bound."""

    rows: tuple[CheckRow, ...] = ()

    def __repr__(self) -> str:
        about = "".join(f"\n  {what}: {said}" for what, said in self.about.items())
        return f"SelfCheck{about}\n{format_table([row.to_cells() for row in self.rows])}"


def selfcheck(lens: Lens, prompt: Prompt | None = None) -> SelfCheck:
    """Check a model against its config and against identities that hold of every GLM: a table of all rows.

    By default on 12 random tokens after the prefix. A bound of 0 means equal bit for bit; the others are 1e-5 in
    float32, and more or less in other dtypes by their rounding. Without an unembedding, the checks of logits are left
    out. Raises SelfCheckError, with the measured number and the bound of every row that fails.
    """
    prompt = draw_tokens(lens) if prompt is None else prompt
    checks = {check: measure for check, measure in CHECKS.items() if lens.cfg.d_logits or check not in LOGIT_CHECKS}
    found = [run_check(check, measure, lens, prompt) for check, measure in checks.items()]
    about = PromptBatch.from_prompt(lens, prompt).describe(
        metric="largest departure", direction="0 is best", positions="all"
    )
    measured = np.array([row.measured for row in found])
    failed = [row for row in found if not row.holds]
    if failed:
        lines = format_table([row.to_cells()[1:] for row in failed])
        raise SelfCheckError(f"{len(failed)} of {len(found)} checks failed on model {lens.model_hash}:\n{lines}")
    return SelfCheck(measured, ("check",), {"check": [row.check for row in found]}, about, rows=tuple(found))


def run_check(check: str, measure: "CheckFunction", lens: Lens, prompt: Prompt) -> CheckRow:
    """A row for this check; one that cannot even be run does not hold."""
    try:
        return CheckRow(check, *measure(lens, prompt))
    except Exception as e:
        return CheckRow(check, np.nan, 0, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")


def draw_tokens(lens: Lens) -> Prompt:
    prefix = torch.tensor([lens.tokenizer.prefix if lens.tokenizer else ()], dtype=torch.long)
    drawn = torch.randint(lens.cfg.d_vocab, (1, 12), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([prefix, drawn], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


CheckResult = tuple[float | int, float | int, str]
CheckFunction = Callable[[Lens, Prompt], CheckResult]


def rounding_bound(lens: Lens) -> float:
    """The bound for numbers that rounding may move: 84 steps of the dtype (1e-5 in float32), or 16 of a half one.

    There sums are made in float32, so what is rounded is their results alone.
    """
    steps = 16 if lens.dtype.itemsize == 2 else 84
    return steps * torch.finfo(lens.dtype).eps


def largest_magnitude(x: Tensor) -> float:
    """The largest magnitude; nan if there is one."""
    return float(upcast(x).abs().max())


def relative_difference(lens: Lens, a: Tensor, b: Tensor) -> CheckResult:
    """How far two tensors are apart, of the largest number in them."""
    return largest_magnitude(upcast(a) - upcast(b)) / largest_magnitude(b), rounding_bound(lens), "of the largest"


def check_parameter_shapes(lens: Lens, prompt: Prompt) -> CheckResult:
    said = build_meta_model(lens.cfg, lens.model.attention, lens.dtype)
    claimed, found = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (said, lens.model))
    wrong = sorted(name for name in claimed.keys() | found.keys() if claimed.get(name) != found.get(name))
    return len(wrong), 0, f"parameters differ{': ' if wrong else ''}{', '.join(wrong[:3])}"


def check_finite_weights(lens: Lens, prompt: Prompt) -> CheckResult:
    return sum(int((~p.isfinite()).sum()) for p in lens.model.parameters()), 0, "numbers are nan or infinite"


def check_tied_embeddings(lens: Lens, prompt: Prompt) -> CheckResult:
    shared = lens.model.unembed.weight is lens.model.embed.weight
    return int(shared != lens.cfg.tied), 0, f"the config says {'one matrix' if lens.cfg.tied else 'two matrices'}"


def check_identity_hooks(lens: Lens, prompt: Prompt) -> CheckResult:
    """Logits of a run whose every point is recorded and replaced by itself, against a plain run."""

    def same(x: Tensor, point: Point) -> Tensor:
        return x

    rows = PromptBatch.from_prompt(lens, prompt)
    watched, _ = rows.run("all", {"*": same})
    plain = lens(rows.tokens, attention_mask=rows.mask)
    return largest_magnitude((watched - plain)[rows.positions >= 0]), 0, "logits"


def check_last_logit_lens(lens: Lens, prompt: Prompt) -> CheckResult:
    """The residual stream after the last layer, unembedded, against the logits."""
    rows = PromptBatch.from_prompt(lens, prompt)
    logits, acts = rows.run(f"blocks.{lens.cfg.n_layers - 1}.resid_post")
    own = lens.model.unembed(lens.model.ln_final(acts["resid_post", lens.cfg.n_layers - 1]))
    return largest_magnitude((own - logits)[rows.positions >= 0]), 0, "logits"


def iterate_patterns(lens: Lens, prompt: Prompt) -> Iterator[tuple[Tensor, Tensor]]:
    """The pattern of every layer, and where it should be 0: [batch, head, query, key], for real queries."""
    rows = PromptBatch.from_prompt(lens, prompt)
    at = rows.positions
    hidden = (at[:, None, None, :] > at[:, None, :, None]) | (at < 0)[:, None, None, :]
    acts = rows.record(pattern_points(lens))
    for layer in range(lens.cfg.n_layers):
        found = upcast(layer_pattern(acts, layer, at, at))
        real = (at >= 0)[:, None, :, None].expand_as(found)
        yield found.where(real, torch.zeros_like(found)) + (~real) / found.shape[-1], hidden & real


def check_attention_sums(lens: Lens, prompt: Prompt) -> CheckResult:
    gaps = torch.stack([(found.sum(-1) - 1).abs().max() for found, _ in iterate_patterns(lens, prompt)])
    return largest_magnitude(gaps), rounding_bound(lens), "attention"


def check_causal_mask(lens: Lens, prompt: Prompt) -> CheckResult:
    seen = torch.stack([(found * hidden).max() for found, hidden in iterate_patterns(lens, prompt)])
    return largest_magnitude(seen), 0, "attention"


def check_residual_sum(lens: Lens, prompt: Prompt) -> CheckResult:
    """The embedding, heads and MLPs, against the last residual stream."""
    parts = decompose_residual(lens, prompt, by="head").values
    last = accumulated_residual(lens, prompt).at(layer=lens.cfg.n_layers - 1).values
    gap = np.abs(parts.sum(-3, dtype=np.float64) - last)[~np.isnan(last)]  # nan is past a prompt's end
    return float(gap.max() / np.nan_to_num(np.abs(parts)).max()), rounding_bound(lens), "of the largest part"


def attribution_check(by: str) -> CheckFunction:
    """The parts of the most probable token's logit, against that logit."""

    def check(lens: Lens, prompt: Prompt) -> CheckResult:
        rows = PromptBatch.from_prompt(lens, prompt)
        logits, _ = rows.run_at(rows.columns_at(-1), ())
        found = logit_attribution(lens, prompt, logits.argmax(-1), by=by)
        parts = np.nan_to_num(np.abs(found.parts.values)).max()
        return float(np.abs(found.unexplained).max() / parts), rounding_bound(lens), "of the largest part"

    return check


def check_cached_decoding(lens: Lens, prompt: Prompt) -> CheckResult:
    """The logits of one token at a time, with a KV cache, against those of one pass."""
    rows = PromptBatch.from_prompt(lens, prompt)
    full, kv = lens(rows.tokens, attention_mask=rows.mask), lens.new_kv(rows.batch)
    steps = []
    for i in range(rows.tokens.shape[1]):
        mask = None if rows.mask is None else rows.mask[:, i : i + 1]
        steps.append(lens(rows.tokens[:, i : i + 1], kv=kv, attention_mask=mask))
    real = rows.positions >= 0
    return relative_difference(lens, torch.cat(steps, 1)[real], full[real])


def check_relative_positions(lens: Lens, prompt: Prompt) -> CheckResult:
    """The scores of the same tokens a few positions later: rotary knows distances only (Su et al. 2021, 3.2)."""
    rows = PromptBatch.from_prompt(lens, prompt)
    at, found = rows.positions, []
    real = (at >= 0)[:, None, :, None] & (at >= 0)[:, None, None, :] & (at[:, None, None, :] <= at[:, None, :, None])
    for shift in (0, POSITION_SHIFT):
        moved = torch.where(at >= 0, at + shift, at)
        acts = rows.record(pattern_points(lens, "attn.scores"), position_ids=moved.clamp(min=0))
        layers = [layer_scores(acts, i, moved, moved) for i in range(lens.cfg.n_layers)]
        found.append(torch.cat([x[real.expand_as(x)] for x in layers]))
    return relative_difference(lens, found[1], found[0])


TIED_CHECK = "embedding and unembedding are one where the config says so"
ATTRIBUTION_CHECKS = {
    f"a logit is the sum of its parts by {by}": attribution_check(by)
    for by in ("component", "head", "neuron", "source")
}
LOGIT_CHECKS = (TIED_CHECK, *ATTRIBUTION_CHECKS)
CHECKS: dict[str, CheckFunction] = {
    "parameters are what the config says": check_parameter_shapes,
    "every weight is a number": check_finite_weights,
    TIED_CHECK: check_tied_embeddings,
    "looking and putting back changes nothing": check_identity_hooks,
    "the last layer's logit lens is the output": check_last_logit_lens,
    "attention of every query sums to 1": check_attention_sums,
    "no attention to later tokens or padding": check_causal_mask,
    "the residual stream is the sum of what was added": check_residual_sum,
    **ATTRIBUTION_CHECKS,
    "one token at a time equals one pass": check_cached_decoding,
    "scores depend only on distance": check_relative_positions,
}
