"""Whether the numbers hold: a model against its own config, and against identities that no good run can break."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glmlens.analysis.attribution import logit_attribution
from glmlens.analysis.pattern import pattern, pattern_points, scores
from glmlens.analysis.residual import accumulated_residual, decomposed_residual
from glmlens.analysis.rows import Rows, exact
from glmlens.checkpoint import blank
from glmlens.hooks import Point
from glmlens.lens import Lens
from glmlens.prompt import Prompt
from glmlens.results import Labelled
from glmlens.tables import table

SHIFT = 5


class SelfCheckError(AssertionError):
    """A model whose numbers do not hold; the message has a line for every check that failed."""


@dataclass(frozen=True)
class Row:
    """One check: what was asked, the number found, and the largest that it may be."""

    check: str
    measured: float | int
    bound: float | int
    unit: str

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound  # nan does not hold

    def cells(self) -> tuple[str, str, str, str]:
        numbers = f"{self.measured:.3g} (at most {self.bound:.3g})"
        return "ok" if self.holds else "FAILED", self.check, numbers, self.unit


@dataclass(frozen=True, eq=False, repr=False)
class SelfCheck(Labelled):
    """The measured numbers [check]; `rows` has each with its bound."""

    rows: tuple[Row, ...] = ()

    def __repr__(self) -> str:
        about = "".join(f"\n  {what}: {said}" for what, said in self.about.items())
        return f"SelfCheck{about}\n{table([row.cells() for row in self.rows])}"


def selfcheck(lens: Lens, prompt: Prompt | None = None) -> SelfCheck:
    """Check a model against its config and against identities that hold of every GLM: a table of all rows.

    By default on 12 random tokens after the prefix. A bound of 0 means equal bit for bit; the others are 1e-5 in
    float32, and more or less in other dtypes by their rounding. Without an unembedding, the checks of logits are left
    out. Raises SelfCheckError, with the measured number and the bound of every row that fails.
    """
    prompt = random_tokens(lens) if prompt is None else prompt
    checks = {check: measure for check, measure in CHECKS.items() if lens.cfg.d_logits or check not in OF_LOGITS}
    found = [tried(check, measure, lens, prompt) for check, measure in checks.items()]
    about = Rows.of(lens, prompt).about(metric="largest departure", direction="0 is best", positions="all")
    measured = np.array([row.measured for row in found])
    failed = [row for row in found if not row.holds]
    if failed:
        lines = table([row.cells()[1:] for row in failed])
        raise SelfCheckError(f"{len(failed)} of {len(found)} checks failed on model {lens.model_hash}:\n{lines}")
    return SelfCheck(measured, ("check",), {"check": [row.check for row in found]}, about, rows=tuple(found))


def tried(check: str, measure: "Check", lens: Lens, prompt: Prompt) -> Row:
    """A row for this check; one that cannot even be run does not hold."""
    try:
        return Row(check, *measure(lens, prompt))
    except Exception as e:
        return Row(check, np.nan, 0, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")


def random_tokens(lens: Lens) -> Prompt:
    prefix = torch.tensor([lens.tokenizer.prefix if lens.tokenizer else ()], dtype=torch.long)
    drawn = torch.randint(lens.cfg.d_vocab, (1, 12), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([prefix, drawn], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


Measured = tuple[float | int, float | int, str]
Check = Callable[[Lens, Prompt], Measured]


def rounding(lens: Lens) -> float:
    """The bound for numbers that rounding may move: 84 steps of the dtype (1e-5 in float32), or 16 of a half one.

    There sums are made in float32, so what is rounded is their results alone.
    """
    steps = 16 if lens.dtype.itemsize == 2 else 84
    return steps * torch.finfo(lens.dtype).eps


def largest(x: Tensor) -> float:
    """The largest magnitude; nan if there is one."""
    return float(exact(x).abs().max())


def departure(lens: Lens, a: Tensor, b: Tensor) -> Measured:
    """How far two tensors are apart, of the largest number in them."""
    return largest(exact(a) - exact(b)) / largest(b), rounding(lens), "of the largest"


def shapes(lens: Lens, prompt: Prompt) -> Measured:
    said = blank(lens.cfg, lens.model.attention, lens.dtype)
    claimed, found = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (said, lens.model))
    wrong = sorted(name for name in claimed.keys() | found.keys() if claimed.get(name) != found.get(name))
    return len(wrong), 0, f"parameters differ{': ' if wrong else ''}{', '.join(wrong[:3])}"


def finite(lens: Lens, prompt: Prompt) -> Measured:
    return sum(int((~p.isfinite()).sum()) for p in lens.model.parameters()), 0, "numbers are nan or infinite"


def tied(lens: Lens, prompt: Prompt) -> Measured:
    shared = lens.model.unembed.weight is lens.model.embed.weight
    return int(shared != lens.cfg.tied), 0, f"the config says {'one matrix' if lens.cfg.tied else 'two matrices'}"


def unmoved(lens: Lens, prompt: Prompt) -> Measured:
    """Logits of a run whose every point is recorded and replaced by itself, against a plain run."""

    def same(x: Tensor, point: Point) -> Tensor:
        return x

    rows = Rows.of(lens, prompt)
    watched, _ = rows.run("all", {"*": same})
    plain = lens(rows.tokens, attention_mask=rows.mask)
    return largest((watched - plain)[rows.positions >= 0]), 0, "logits"


def last_row(lens: Lens, prompt: Prompt) -> Measured:
    """The residual stream after the last layer, unembedded, against the logits."""
    rows = Rows.of(lens, prompt)
    logits, acts = rows.run(f"blocks.{lens.cfg.n_layers - 1}.resid_post")
    own = lens.model.unembed(lens.model.ln_final(acts["resid_post", lens.cfg.n_layers - 1]))
    return largest((own - logits)[rows.positions >= 0]), 0, "logits"


def patterns(lens: Lens, prompt: Prompt) -> Iterator[tuple[Tensor, Tensor]]:
    """The pattern of every layer, and where it should be 0: [batch, head, query, key], for real queries."""
    rows = Rows.of(lens, prompt)
    at = rows.positions
    hidden = (at[:, None, None, :] > at[:, None, :, None]) | (at < 0)[:, None, None, :]
    acts = rows.record(pattern_points(lens))
    for layer in range(lens.cfg.n_layers):
        found = exact(pattern(acts, layer, at, at))
        real = (at >= 0)[:, None, :, None].expand_as(found)
        yield found.where(real, torch.zeros_like(found)) + (~real) / found.shape[-1], hidden & real


def sums(lens: Lens, prompt: Prompt) -> Measured:
    gaps = torch.stack([(found.sum(-1) - 1).abs().max() for found, _ in patterns(lens, prompt)])
    return largest(gaps), rounding(lens), "attention"


def causal(lens: Lens, prompt: Prompt) -> Measured:
    seen = torch.stack([(found * hidden).max() for found, hidden in patterns(lens, prompt)])
    return largest(seen), 0, "attention"


def added(lens: Lens, prompt: Prompt) -> Measured:
    """The embedding, heads and MLPs, against the last residual stream."""
    parts = decomposed_residual(lens, prompt, by="head").values
    last = accumulated_residual(lens, prompt).at(layer=lens.cfg.n_layers - 1).values
    gap = np.abs(parts.sum(-3, dtype=np.float64) - last)[~np.isnan(last)]  # nan is past a prompt's end
    return float(gap.max() / np.nan_to_num(np.abs(parts)).max()), rounding(lens), "of the largest part"


def attributed(by: str) -> Check:
    """The parts of the most probable token's logit, against that logit."""

    def check(lens: Lens, prompt: Prompt) -> Measured:
        rows = Rows.of(lens, prompt)
        logits, _ = rows.run_at(rows.columns(-1), ())
        found = logit_attribution(lens, prompt, logits.argmax(-1), by=by)
        parts = np.nan_to_num(np.abs(found.parts.values)).max()
        return float(np.abs(found.unexplained).max() / parts), rounding(lens), "of the largest part"

    return check


def remembered(lens: Lens, prompt: Prompt) -> Measured:
    """The logits of one token at a time, with a KV cache, against those of one pass."""
    rows = Rows.of(lens, prompt)
    full, kv = lens(rows.tokens, attention_mask=rows.mask), lens.new_kv(rows.batch)
    steps = []
    for i in range(rows.tokens.shape[1]):
        mask = None if rows.mask is None else rows.mask[:, i : i + 1]
        steps.append(lens(rows.tokens[:, i : i + 1], kv=kv, attention_mask=mask))
    real = rows.positions >= 0
    return departure(lens, torch.cat(steps, 1)[real], full[real])


def relative(lens: Lens, prompt: Prompt) -> Measured:
    """The scores of the same tokens a few positions later: rotary knows distances only (Su et al. 2021, 3.2)."""
    rows = Rows.of(lens, prompt)
    at, found = rows.positions, []
    real = (at >= 0)[:, None, :, None] & (at >= 0)[:, None, None, :] & (at[:, None, None, :] <= at[:, None, :, None])
    for shift in (0, SHIFT):
        moved = torch.where(at >= 0, at + shift, at)
        acts = rows.record(pattern_points(lens, "attn.scores"), position_ids=moved.clamp(min=0))
        layers = [scores(acts, i, moved, moved) for i in range(lens.cfg.n_layers)]
        found.append(torch.cat([x[real.expand_as(x)] for x in layers]))
    return departure(lens, found[1], found[0])


TIED = "embedding and unembedding are one where the config says so"
PARTS = {f"a logit is the sum of its parts by {by}": attributed(by) for by in ("component", "head", "neuron", "source")}
OF_LOGITS = (TIED, *PARTS)
CHECKS: dict[str, Check] = {
    "parameters are what the config says": shapes,
    "every weight is a number": finite,
    TIED: tied,
    "looking and putting back changes nothing": unmoved,
    "the last layer's logit lens is the output": last_row,
    "attention of every query sums to 1": sums,
    "no attention to later tokens or padding": causal,
    "the residual stream is the sum of what was added": added,
    **PARTS,
    "one token at a time equals one pass": remembered,
    "scores depend only on distance": relative,
}
