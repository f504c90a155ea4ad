"""What `glmlens demo` tells: a prompt, its answer, the heads that it comes from, and what changing them does."""

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
N_SENTENCES = 40  # sentences about giving
SMALL_MODEL_PARAMETERS = 20e6  # parameters up to which every head is taken away in turn


class DemoReport:
    """Text as it is told, and the figures that go with it."""

    def __init__(self, lens: Lens):
        self.lens = lens
        self.parts: list[Any] = []

    def add_text(self, *lines: str) -> None:
        text = "\n".join(lines)
        self.parts.append(text)
        print(f"{text}\n", flush=True)

    def add_figure(self, figure: Any) -> None:
        self.parts.append(figure)


def write_demo_report(lens: Lens, prompt: str, out: Path | None) -> Path:
    """Tell the story of a model and write it, with its figures, to one HTML file; returns the file."""
    from glmlens.html_report import save_html

    story = DemoReport(lens)
    story.add_text(repr(lens))
    report_answer(story, prompt)
    if lens.tokenizer is not None:
        try:
            report_ioi(story)
            report_steering(story)
        except TaskError as e:
            story.add_text(f"(not asked of this model: {e})")
    report_induction(story)
    path = (out or Path(tempfile.mkdtemp(prefix="glmlens-"))) / "glmlens-demo.html"
    return save_html(path, "glmlens demo", story.parts)


def report_answer(story: DemoReport, prompt: str) -> None:
    """How the prompt goes on, and the most probable next tokens."""
    lens = story.lens
    asked = prompt if lens.tokenizer else torch.arange(2, min(16, lens.cfg.d_vocab))[None]
    run = lens.generate(asked, 12)
    said = run.text.replace("\n", "↵") if isinstance(run.text, str) else run.new_tokens.tolist()
    probs = lens(asked, logits_to_keep=1)[0, -1].float().softmax(-1).topk(5)
    top = [f"  {p:6.1%}  {format_token(lens, i)}" for p, i in zip(*(x.tolist() for x in probs), strict=True)]
    story.add_text(f"> {prompt if isinstance(asked, str) else asked.tolist()}", f"  {said}", "", "the next token", *top)


def format_token(lens: Lens, i: int) -> str:
    return repr(lens.tokenizer.decode_each([i])[0]) if lens.tokenizer else str(i)


def report_ioi(story: DemoReport) -> None:
    """Where the answer comes from, head by head, and what putting an activation back does."""
    from glmlens import plot

    lens = story.lens
    small = sum(p.numel() for p in lens.model.parameters()) <= SMALL_MODEL_PARAMETERS
    examples = TASKS["ioi"].examples(lens, N_SENTENCES if small else N_SENTENCES // 5, "demo")
    logits = lens(examples, logits_to_keep=1)
    difference = float(examples.measure(logits).mean())
    story.add_text(
        f"who receives? {len(examples)} sentences like this one: the right name is more probable than the wrong one in "
        f"{examples.accuracy(logits):.0%}, by {difference:.2f} logits on average"
    )
    if small:
        what, worth = (
            "what is lost when one head says what it says where three people are named",
            measure_lost_difference(lens, examples),
        )
    else:
        what, worth = "what one head adds directly", analysis.logit_attribution(lens, examples, by="head")
    rows = [(f"  head {layer}.{head}", f"{value:+.2f}") for (layer, head), value in worth.top(5)]
    story.add_text(what, format_table(rows))
    story.add_figure(plot.head_scores(worth, what="logits", title=f"Who receives: {what}"))
    (layer, head), _ = worth.top(1)[0]
    row = torch.tensor(examples.tokens[:1])
    report_pattern(story, row, int(layer), int(head), f"Head {layer}.{head}: where each token looks")
    report_patching(story, examples)


def measure_lost_difference(lens: Lens, examples: Examples) -> Labelled:
    """The logit difference lost without each head: with its output in the sentence of three people instead."""
    over = ("layer", "head")
    found = patch.sweep(lens, examples, "abc", Site("attn.z"), over=over, direction="noise", normalise=False,
                        progress=False)  # fmt: skip
    return Labelled(found.clean.mean() - found.values, found.axes, found.labels, found.about)


def report_pattern(story: DemoReport, row: Tensor, layer: int, head: int, title: str) -> None:
    """What a head looks at in one row of tokens [one, pos]."""
    from glmlens import plot

    _, acts = story.lens.run_with_cache(row, f"blocks.{layer}.attn.pattern", logits=False)
    pattern = acts["attn.pattern", layer][0, head].float().cpu().numpy()
    story.add_figure(plot.attention_pattern(pattern, story.lens.to_labels(row), title=title))


def report_patching(story: DemoReport, examples: Examples) -> None:
    """Where the names are exchanged, what comes back when one activation is that of the sentence as it was."""
    from glmlens import plot

    places, n_layers = ("IO", "S1", "S2", "end"), story.lens.cfg.n_layers
    site = Site("resid_pre", layer=range(0, n_layers, max(1, n_layers // 8)), pos=places)
    found: Sweep = patch.sweep(story.lens, examples, "flip", site, over=("layer", "pos"), progress=False)
    head = ("  entering layer", *places)
    labels = found.labels["layer"]
    rows = [(f"  {layer}", *(f"{x:.2f}" for x in row)) for layer, row in zip(labels, found.values, strict=True)]
    story.add_text(
        "the same sentences in which the other person gives: the share of the difference that comes back when the",
        "residual stream is exchanged at one place",
        format_table([head, *rows]),
    )
    title = "Recovered by one residual stream, by layer and place"
    story.add_figure(plot.patch_grid(found, title=title))


def report_steering(story: DemoReport) -> None:
    """How a sentence goes on when a feeling is added to one word."""
    examples = TASKS["sentiment"].examples(story.lens, 24, "demo").of_length()
    at = examples.at("adjective").tolist()
    happy = [example.item.correct[0] == " happy" for example in examples]
    cut = [example.tokens[: position + 1] for example, position in zip(examples, at, strict=True)]
    good, bad = ([row for row, is_good in zip(cut, happy, strict=True) if is_good == side] for side in (True, False))
    n, layer = min(len(good), len(bad)), story.lens.cfg.n_layers // 4
    vector = patch.fit_steering(story.lens, good[:n], bad[:n], layers=layer)
    prompt = examples[0].counterfactuals["neutral"]
    lines = []
    for times in (-2, 0, 2):
        edits = vector.interventions(times, pos=at[0]) if times else []
        run = (
            patch.generate_with_interventions(story.lens, prompt, 2, edits) if times else story.lens.generate(prompt, 2)
        )
        lines.append(f"  {times:+d}  {run.text}")
    said = story.lens.to_string(prompt[len(story.lens.tokenizer.prefix) if story.lens.tokenizer else 0 :])
    story.add_text(f"> {said}", f"with a feeling added to the adjective in layer {layer}, so many times", *lines)


def report_induction(story: DemoReport) -> None:
    """The heads that copy what came before, and what they are worth."""
    from glmlens import plot

    lens, length = story.lens, 20
    scores = analysis.head_scores(lens, length=length)
    lines = [f"heads, on random words said twice (by chance: {scores.chance['induction']:.2f})"]
    for what, name in (("previous", "previous token"), ("induction", "induction")):
        best = "  ".join(f"{layer}.{head} {value:.2f}" for layer, head, value in scores.best(what))
        lines.append(f"  {name:15}{best}")
    best = scores.best("induction", lens.cfg.n_layers * lens.cfg.n_heads)
    copiers = [(layer, head) for layer, head, value in best if value > 0.5] or [best[0][:2]]
    repeats = RepeatedPrompts.draw(lens, rows=4, length=length)
    tokens = repeats.tokens
    before, after = (
        repeats.measure_loss(lens.run_with_hooks(tokens, hooks)) for hooks in (None, silence_heads(copiers))
    )
    named = ", ".join(f"{layer}.{head}" for layer, head in copiers)
    story.add_text(
        *lines,
        f"without head {named}, the loss on what is said for the second time goes from {before:.2f} to "
        f"{after:.2f} nats per token",
    )
    layer, head = copiers[0]
    title = "Induction score of every head: random words said twice"
    story.add_figure(plot.head_scores(scores, n_kv_heads=lens.cfg.n_kv_heads, title=title))
    report_pattern(story, tokens[:1], layer, head, f"Head {layer}.{head} on random words said twice")


def silence_heads(heads: list[tuple[int, int]]) -> Hooks:
    """Hooks that make these heads say nothing."""

    def silence_head(z: Tensor, point: Point) -> Tensor:
        z[:, :, [head for layer, head in heads if layer == point.layer]] = 0
        return z

    return {f"blocks.{layer}.attn.z": silence_head for layer, _ in heads}
