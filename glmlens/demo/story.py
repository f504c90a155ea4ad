"""The report of `glmlens demo`: a continuation, head effects, activation patching, steering and induction heads.

Every section prints text and adds it, with its figures, to one HTML file.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmlens import analysis, patch
from glmlens.demo.circuits import RepeatedPrompts
from glmlens.hook_points import Point
from glmlens.hooks import Hooks
from glmlens.lens import Lens
from glmlens.patch import Site, Sweep
from glmlens.results import Labelled
from glmlens.tasks import TASKS, Examples, TaskError
from glmlens.text_tables import format_table

DEMO_PROMPT = "When Mary and John went to the store, John gave a drink to"
N_SENTENCES = 40  # prompts of the IOI section; a fifth of them for large models
SMALL_MODEL_PARAMETERS = 20e6  # models up to this size get every head patched in turn


class DemoReport:
    """The text and figures of the report, in order. Text is printed as soon as it is added."""

    def __init__(self, lens: Lens):
        self.lens = lens
        self.parts: list[Any] = []

    def add_text(self, *lines: str) -> None:
        """Print lines and add them to the report."""
        text = "\n".join(lines)
        self.parts.append(text)
        print(f"{text}\n", flush=True)

    def add_figure(self, figure: Any) -> None:
        """Add a Plotly figure to the report."""
        self.parts.append(figure)


def write_demo_report(lens: Lens, prompt: str, out: Path | None) -> Path:
    """Examine a model, print the findings, and write them with their figures to one HTML file. Return its path.

    Sections that need a tokenizer, or words that it lacks, are left out.
    """
    from glmlens.html_report import save_html

    report = DemoReport(lens)
    report.add_text(repr(lens))
    report_answer(report, prompt)
    if lens.tokenizer is not None:
        try:
            report_ioi(report)
            report_steering(report)
        except TaskError as e:
            report.add_text(f"(left out, because the task does not fit this tokenizer: {e})")
    report_induction(report)
    path = (out or Path(tempfile.mkdtemp(prefix="glmlens-"))) / "glmlens-demo.html"
    return save_html(path, "glmlens demo", report.parts)


def report_answer(report: DemoReport, prompt: str) -> None:
    """Report the continuation of the prompt and the most probable next tokens."""
    lens = report.lens
    # Without a tokenizer there is no text: run a few token ids instead.
    inputs = prompt if lens.tokenizer else torch.arange(2, min(16, lens.cfg.d_vocab))[None]
    run = lens.generate(inputs, 12)
    continuation = run.text.replace("\n", "↵") if isinstance(run.text, str) else run.new_tokens.tolist()
    probs, ids = lens(inputs, logits_to_keep=1)[0, -1].float().softmax(-1).topk(5)
    top = [f"  {p:6.1%}  {format_token(lens, i)}" for p, i in zip(probs.tolist(), ids.tolist(), strict=True)]
    report.add_text(
        f"> {inputs if isinstance(inputs, str) else inputs.tolist()}",
        f"  {continuation}",
        "",
        "The most probable next tokens:",
        *top,
    )


def format_token(lens: Lens, i: int) -> str:
    """Return the quoted text of a token, or its id without a tokenizer."""
    return repr(lens.tokenizer.decode_each([i])[0]) if lens.tokenizer else str(i)


def report_ioi(report: DemoReport) -> None:
    """Report indirect object identification: accuracy, the effect of every head, and activation patching."""
    from glmlens import plot

    lens = report.lens
    small = sum(p.numel() for p in lens.model.parameters()) <= SMALL_MODEL_PARAMETERS
    examples = TASKS["ioi"].examples(lens, N_SENTENCES if small else N_SENTENCES // 5, "demo")
    logits = lens(examples, logits_to_keep=1)
    difference = float(examples.measure(logits).mean())
    report.add_text(
        f"Who receives the gift? We run {len(examples)} sentences like this one, in which one person gives another "
        "something.",
        f"The receiver is more probable than the giver in {examples.accuracy(logits):.0%} of them. On average the "
        f"receiver's logit is {difference:.2f} higher.",
    )
    if small:
        effects = measure_lost_difference(lens, examples)
        title = "Drop of the logit difference when one head is patched"
        heading = (
            "Which heads matter? We replace the output of one head at a time with its output on a sentence that names "
            "three\ndifferent people. The largest effects, as the drop of the logit difference:"
        )
    else:
        effects = analysis.logit_attribution(lens, examples, by="head")
        title = "Direct contribution of every head to the logit difference"
        heading = "Which heads matter? The largest direct contributions to the logit difference:"
    rows = [(f"  head {layer}.{head}", f"{value:+.2f}") for (layer, head), value in effects.top(5)]
    report.add_text(heading, format_table(rows))
    report.add_figure(plot.head_scores(effects, what="logits", title=title))
    (layer, head), _ = effects.top(1)[0]
    row = torch.tensor(examples.tokens[:1])
    report_pattern(report, row, layer=int(layer), head=int(head), title=f"Attention of head {layer}.{head}")
    report_patching(report, examples)


def measure_lost_difference(lens: Lens, examples: Examples) -> Labelled:
    """Return how much the logit difference drops when each head is patched [layer, head].

    The head gets its output on the counterfactual "abc", a sentence that names three different people.
    """
    over = ("layer", "head")
    # Noising: the original run, with one head at a time patched from the counterfactual.
    sweep = patch.sweep(lens, examples, "abc", Site("attn.z"), over=over, direction="noise", normalise=False,
                        progress=False)  # fmt: skip
    return Labelled(values=sweep.clean.mean() - sweep.values, axes=sweep.axes, labels=sweep.labels, about=sweep.about)


def report_pattern(report: DemoReport, row: Tensor, layer: int, head: int, title: str) -> None:
    """Add a figure of the attention pattern of one head on one prompt [one, pos]."""
    from glmlens import plot

    _, acts = report.lens.run_with_cache(row, f"blocks.{layer}.attn.pattern", logits=False)
    pattern = acts["attn.pattern", layer][0, head].float().cpu().numpy()
    report.add_figure(plot.attention_pattern(pattern, report.lens.to_labels(row), title=title))


def report_patching(report: DemoReport, examples: Examples) -> None:
    """Report activation patching of the residual stream, from the original sentences into flipped ones."""
    from glmlens import plot

    position_names = ("IO", "S1", "S2", "end")
    n_layers = report.lens.cfg.n_layers
    site = Site("resid_pre", layer=range(0, n_layers, max(1, n_layers // 8)), pos=position_names)
    sweep: Sweep = patch.sweep(report.lens, examples, "flip", site, over=("layer", "pos"), progress=False)
    head = ("  entering layer", *position_names)
    labels = sweep.labels["layer"]
    rows = [(f"  {layer}", *(f"{x:.2f}" for x in row)) for layer, row in zip(labels, sweep.values, strict=True)]
    report.add_text(
        "Where does the model hold who gives? In the same sentences, we let the other person give. We patch the",
        "residual stream at one position with that of the original sentence, and measure the share of the logit",
        "difference that is restored (IO: receiver, S1 and S2: mentions of the giver, end: last token):",
        format_table([head, *rows]),
    )
    title = "Share of the logit difference restored by patching the residual stream at one position"
    report.add_figure(plot.patch_grid(sweep, title=title))


def report_steering(report: DemoReport) -> None:
    """Report the continuations of a sentence with a steering vector for sentiment added at one word."""
    examples = TASKS["sentiment"].examples(report.lens, 24, "demo").of_length()
    at = examples.at("adjective").tolist()
    # Prompts cut after the adjective, split by its valence: the vector is fitted at the last position.
    good: list[list[int]] = []
    bad: list[list[int]] = []
    for example, position in zip(examples, at, strict=True):
        side = good if example.item.correct[0] == " happy" else bad
        side.append(example.tokens[: position + 1])
    n = min(len(good), len(bad))
    layer = report.lens.cfg.n_layers // 4
    vector = patch.fit_steering(report.lens, good[:n], bad[:n], layers=layer)
    prompt = examples[0].counterfactuals["neutral"]
    lines = []
    for times in (-2, 0, 2):
        if times:
            edits = vector.interventions(times, pos=at[0])
            run = patch.generate_with_interventions(report.lens, prompt, 2, edits)
        else:
            run = report.lens.generate(prompt, 2)
        lines.append(f"  {times:+d}  {run.text}")
    n_prefix = len(report.lens.tokenizer.prefix) if report.lens.tokenizer else 0
    report.add_text(
        f"> {report.lens.to_string(prompt[n_prefix:])}",
        "Can we change how this sentence ends? We compute a steering vector: the mean residual stream at good",
        f"adjectives minus that at bad ones, after layer {layer}. We add it at the adjective, times -2, 0 or 2:",
        *lines,
    )


def report_induction(report: DemoReport) -> None:
    """Report the previous-token and induction heads, and the loss without the induction heads."""
    from glmlens import plot

    lens = report.lens
    length = 20  # words in a list
    scores = analysis.head_scores(lens, length=length)
    lines = [
        "Which heads copy? We run lists of random words, each list repeated once. The heads with the highest scores",
        f"are (uniform attention has an induction score of {scores.chance['induction']:.2f}):",
    ]
    for what, name in (("previous", "previous token"), ("induction", "induction")):
        best = "  ".join(f"{layer}.{head} {value:.2f}" for layer, head, value in scores.best(what))
        lines.append(f"  {name:15}{best}")
    best = scores.best("induction", lens.cfg.n_layers * lens.cfg.n_heads)
    induction_heads = [(layer, head) for layer, head, value in best if value > 0.5] or [best[0][:2]]
    repeats = RepeatedPrompts.draw(lens, rows=4, length=length)
    tokens = repeats.tokens
    before = repeats.measure_loss(lens(tokens))
    after = repeats.measure_loss(lens.run_with_hooks(tokens, silence_heads(induction_heads)))
    listed = ", ".join(f"{layer}.{head}" for layer, head in induction_heads)
    report.add_text(
        *lines,
        f"Do they matter? With the output of {'heads' if len(induction_heads) > 1 else 'head'} {listed} set to zero,",
        f"the loss on the repeated words goes from {before:.2f} to {after:.2f} nats per token.",
    )
    layer, head = induction_heads[0]
    title = "Induction score of every head, on repeated lists of random words"
    report.add_figure(plot.head_scores(scores, n_kv_heads=lens.cfg.n_kv_heads, title=title))
    report_pattern(
        report,
        tokens[:1],
        layer=layer,
        head=head,
        title=f"Attention of head {layer}.{head} on a repeated list of random words",
    )


def silence_heads(heads: list[tuple[int, int]]) -> Hooks:
    """Return hooks that set the outputs of these heads to zero."""

    # One function serves all layers: the point says which one it runs at.
    def silence_head(z: Tensor, point: Point) -> Tensor:
        z[:, :, [head for layer, head in heads if layer == point.layer]] = 0
        return z

    return {f"blocks.{layer}.attn.z": silence_head for layer, _ in heads}
