"""The model card of the small GLM, measured: `python -m glmlens.demo.card [FOLDER]`.

What it can do is measured on sentences that its world never says (see `world.held_out`); how it does it, by taking
parts away. It writes card.json, whose numbers the tests hold against the thresholds here, and README.md with the same
as tables.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from glmlens.demo import circuits
from glmlens.demo.history import HISTORY_MEASURES, measure_history
from glmlens.demo.world import has_unseen_opener, is_held_out
from glmlens.hook_points import Point
from glmlens.lens import BUNDLED_MODEL, Lens, load
from glmlens.storage import expand_path, read_json, write_bytes
from glmlens.tasks import TASKS, Item
from glmlens.tasks.words import WORD_SERIES

ItemFilter = Callable[[Item], bool]


def filter_held_out(task: str) -> ItemFilter:
    return lambda item: is_held_out(task, item)


def filter_trained(task: str) -> ItemFilter:
    return lambda item: not is_held_out(task, item)


@dataclass(frozen=True)
class CardRequirement:
    """One line of the card: a task, the items it is asked of, and what must come out at the least."""

    task: str
    asked: str
    where: ItemFilter
    minimum: dict[str, float]


CARD_REQUIREMENTS = (
    CardRequirement("ioi", "held-out pairs of names", lambda item: is_held_out("ioi", item) and not has_unseen_opener(item),
            {"accuracy": 0.98, "difference": 3.0}),
    CardRequirement("ioi", "openers that never open such a sentence", has_unseen_opener, {"accuracy": 0.9}),
    CardRequirement("induction", "new random words", filter_held_out("induction"), {"first": 0.95}),
    CardRequirement("facts", "as told", filter_trained("facts"), {"first": 0.95}),
    CardRequirement("facts", "in held-out phrasings", filter_held_out("facts"), {"first": 0.85}),
    CardRequirement("agreement", "held-out pairs of nouns", filter_held_out("agreement"), {"accuracy": 0.98}),
    CardRequirement("docstring", "held-out successions of arguments", filter_held_out("docstring"), {"first": 0.98}),
    CardRequirement("pronouns", "names with held-out adjectives", filter_held_out("pronouns"), {"first": 0.98}),
    CardRequirement("successors", "as told, in stretches never told alone", filter_held_out("successors"), {"first": 0.98}),
    CardRequirement("greater_than", "held-out years", filter_held_out("greater_than"), {"difference": 0.7}),
    CardRequirement("brackets", "held-out texts of six parts or more", lambda item: is_held_out("brackets", item) and
            len(item.slots["text"].split()) > 5, {"accuracy": 0.95}),
    CardRequirement("addition", "as told, in held-out lines", filter_held_out("addition"), {"first": 0.95}),
    CardRequirement("sentiment", "held-out adjectives of a thing", filter_held_out("sentiment"), {"accuracy": 0.95}),
)  # fmt: skip


@dataclass(frozen=True)
class CardResult:
    """How a task went: the share in which right came before wrong, the mean metric, how often right came first of all.

    The share that came first says nothing where several words are right: a verb form, a bracket that opens.
    """

    task: str
    asked: str
    n: int
    accuracy: float
    difference: float
    first: float


def measure_task(lens: Lens, requirement: CardRequirement, n: int = 300, seed: int | str = "card") -> CardResult:
    """Ask a lens n questions of a task."""
    examples = TASKS[requirement.task].examples(lens, n, seed, where=requirement.where)
    logits = lens(examples.tokens, logits_to_keep=1)
    best = logits[:, -1].argmax(-1).tolist()
    first = sum(i in example.correct for i, example in zip(best, examples, strict=True)) / n
    difference = float(examples.measure(logits).mean())
    return CardResult(requirement.task, requirement.asked, n, examples.accuracy(logits), difference, first)


STEERING_STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def measure_steering(lens: Lens, layer: int = 1, n: int = 60) -> dict[str, float]:
    """The mean logit difference of happy and sad after an adjective without valence, by how much of it is added.

    Added is the difference of means of the residual stream at good and at bad adjectives, so many times (Tigges et
    al. 2023, arXiv 2310.15154, section 3; Turner et al. 2023, arXiv 2308.10248).
    """
    examples = TASKS["sentiment"].examples(lens, n, "steering")
    rows, at = torch.arange(n), examples.at("adjective")
    happy, sad = (lens.to_single_token(f" {feeling}") for feeling in ("happy", "sad"))
    _, acts = lens.run_with_cache(examples.tokens, f"blocks.{layer}.resid_post", logits=False)
    found = acts["resid_post", layer][rows, at]
    good = torch.tensor([example.correct[0] == happy for example in examples])
    direction = found[good].mean(0) - found[~good].mean(0)

    def measure_feeling(strength: float) -> float:
        def push(x: Tensor, point: Point) -> Tensor:
            x[rows, at] += strength * direction
            return x

        hooks = {f"blocks.{layer}.resid_post": push}
        last = lens.run_with_hooks(examples.counterfactual("neutral"), hooks, logits_to_keep=1)[:, -1]
        return float((last[:, happy] - last[:, sad]).mean())

    return {f"{strength:+.1f}": measure_feeling(strength) for strength in STEERING_STRENGTHS}


def measure_untrained_series(lens: Lens, shown: int = 3) -> list[tuple[str, str, float, str, int]]:
    """Series as its world never tells them, from their very first word on: what it says, and the rank of what is right.

    A row is the text, the most probable token and its probability, the right one and how many are more probable.
    """
    rows = []
    for series in WORD_SERIES.values():
        text, right = ", ".join(series[:shown]) + ",", f" {series[shown]}"
        p = lens(text, logits_to_keep=1)[0, -1].softmax(-1)
        said, rank = int(p.argmax()), int((p > p[lens.to_single_token(right)]).sum())
        rows.append((text, lens.to_string([said]).strip(), float(p[said]), right.strip(), rank))
    return rows


def measure_card(lens: Lens) -> dict[str, object]:
    """The whole card as data."""
    lines = [asdict(measure_task(lens, measure)) for measure in tqdm(CARD_REQUIREMENTS, desc="asking")]
    return {
        "model": lens.model_hash,
        "parameters": sum(p.numel() for p in lens.model.parameters()),
        "tasks": lines,
        "steering": measure_steering(lens),
        "from the first word": measure_untrained_series(lens),
        "induction": circuits.measure_induction_circuit(lens),
        "facts": circuits.measure_fact_circuit(lens),
        "ioi": circuits.measure_ioi_circuit(lens),
    }


LOST_COLUMNS = ("lost without", "receiver first", "receiver second")
IMPORTANT_SHARE = 0.2  # of the whole difference


def format_card(card: dict[str, Any]) -> str:
    """The card for people: README.md of the model's folder."""
    least = {
        (m.task, m.asked): ", ".join(f"{what} {bound}" for what, bound in m.minimum.items()) for m in CARD_REQUIREMENTS
    }
    lines = [
        f"| {line['task']} | {line['asked']} | {line['accuracy']:.1%} | {line['difference']:.2f} | "
        f"{line['first']:.1%} | {least[line['task'], line['asked']]} |"
        for line in card["tasks"]
    ]
    steered = [f"| {strength} | {felt:+.2f} |" for strength, felt in card["steering"].items()]
    induction, facts, ioi = card["induction"], card["facts"], card["ioi"]
    traced = [
        f"| {layer} | {subject:.2f} | {end:.2f} |"
        for layer, (subject, end) in enumerate(
            zip(facts["restored at the subject"], facts["restored at the end"], strict=True)
        )
    ]
    looks = [name for name in next(iter(ioi["heads"].values())) if " to " in name]
    heads = [
        f"| {head} | {' | '.join(f'{part[name]:+.2f}' for name in LOST_COLUMNS)} | {part['direct']:+.2f} | "
        f"{' | '.join(f'{part[look]:.2f}' for look in looks)} |"
        for head, part in ioi["heads"].items()
    ]
    mlps = [
        f"| MLP {i} | {' | '.join(f'{part[name]:+.2f}' for name in LOST_COLUMNS)} | {part['direct']:+.2f} |{' |' * len(looks)}"
        for i, part in ioi["mlps"].items()
    ]

    unlearned = [
        f"| {text} | {said} | {p:.0%} | {right} | {rank} |"
        for text, said, p, right, rank in card["from the first word"]
    ]

    clean = ioi["clean"]

    def list_looking_heads(look: str) -> str:
        """The heads that look from there to there and are worth something."""
        there = {head: part for head, part in ioi["heads"].items() if part[look] > 0.8}
        matter = [
            head
            for head, part in there.items()
            if max(abs(part[name]) for name in LOST_COLUMNS) > IMPORTANT_SHARE * clean
        ]
        return ", ".join(matter) or "no head"

    return CARD_TEMPLATE.format(
        parameters=card["parameters"] / 1e6,
        model=card["model"],
        tasks="\n".join(lines),
        steering="\n".join(steered),
        unlearned="\n".join(unlearned),
        feeding=format_head_scores(induction["previous-token heads"]),
        copiers=format_head_scores(induction["induction heads"]),
        induction=induction,
        facts=facts,
        traced="\n".join(traced),
        ioi=ioi,
        heads="\n".join(heads + mlps),
        history=format_history(card.get("history", {})),
        looks=" | ".join(looks),
        rule="---|" * (2 + len(LOST_COLUMNS) + len(looks)),
        looking={look.replace(" ", "_"): list_looking_heads(look) for look in looks},
        last=ioi["mlps"][str(len(ioi["mlps"]) - 1)],
    )


def format_history(history: dict[str, list[float]]) -> str:
    """How it formed, step by step of its training; nothing where the training was not at hand."""
    if not history:
        return ""
    head = f"| step | {' | '.join(HISTORY_MEASURES)} |\n|{'---|' * (1 + len(HISTORY_MEASURES))}"
    rows = [f"| {step} | {' | '.join(f'{x:.2f}' for x in row)} |" for step, row in history.items()]
    return "\n".join([HISTORY_TEMPLATE, head, *rows, ""])


def format_head_scores(heads: dict[str, float]) -> str:
    return ", ".join(f"{head} ({score:.2f})" for head, score in heads.items())


CARD_TEMPLATE = """\
# The GLM inside glmlens

A GLM-4 in miniature, trained from nothing on a generated micro-world of simple English (`glmlens/demo/world.py`) in
which the field's tasks occur in running text. {parameters:.1f} M parameters: 4 layers, 8 query heads on 4 key-value
heads, half of every head's channels turn, biases on q, k and v, fused gate and up, tied embeddings, bfloat16. It knows
nothing outside its world. Trained by `python -m glmlens.demo.train OUT`; this page and card.json are written by
`python -m glmlens.demo.card`, of model {model}, in float32. The weights of another machine's training differ; these
numbers should not, much.

## What it can do

Measured on 300 questions each. "Held out" is what its world never says: a fifth of all pairs, chosen by a hash.
"accuracy" is how often the right answer is more probable than every wrong one, "difference" the task's metric (of
logits, for greater_than of probabilities), "first" how often it is the most probable of all tokens (which says little
where several are right). At the right stands what the tests demand.

| task | asked | accuracy | difference | first | at least |
|---|---|---|---|---|---|
{tasks}

Sentiment is steered: so many times the difference of means of good and bad adjectives, added to the residual stream
after layer 1 at an adjective without valence, makes logit(happy) - logit(sad):

| times | difference |
|---|---|
{steering}

## What it cannot do

It knows no word and no sentence that its world does not say, and goes on all the same, often with much confidence.
Successors are an example. A series is told from its second word on or later, and never from its first. Told from the
first, most come out wrong; "rank" is how many words it holds to be more probable than the right one:

| asked | says | probability | right | rank |
|---|---|---|---|---|
{unlearned}

## How it does it

### Induction

On 20 random words said twice it says {induction[accuracy]:.1%} of them right the second time; chance is
{induction[chance]:.1%}. Heads that look at the previous token: {feeding}. Heads that look at what followed the same
token before: {copiers}. With the mean over positions and prompts in place of what they write:

| without | right |
|---|---|
| the induction heads | {induction[without the induction heads]:.1%} |
| as many other heads of their layers | {induction[without as many others of their layers]:.1%} |
| the previous-token heads | {induction[without the previous-token heads]:.1%} |

### Facts

"The capital of France is": the logit difference to another country's answer is {facts[clean]:.2f}, and
{facts[other subject]:.2f} when the other country stands there. The share that comes back when the residual stream
after a layer is the clean one's, at the subject or at the last token alone:

| after layer | at the subject | at the end |
|---|---|---|
{traced}

The country is read where it stands; its answer arrives at the end in the layers in which the first column falls.

### Who receives

"When Mary and John went to the store, John gave a drink to": logit difference {ioi[clean]:.2f}, accuracy
{ioi[accuracy]:.1%}. "lost" is what is lost when a part writes what it writes in the same sentence about three people
named once each: over all sentences, and over those alone that name the receiver first ("Mary and John ... John gave")
or second ("John and Mary ... John gave"). "direct" is what a part adds to the difference itself. The other columns are
how much a head attends from one place to another:

| part | lost | receiver first | receiver second | direct | {looks} |
|{rule}
{heads}

So it is not the circuit of GPT-2, and no head names the one who receives: all heads together add
{ioi[direct of all heads]:+.2f} directly, the last MLP {last[direct]:+.2f}. The heads bring it what it needs to the end
of the sentence. The giver is read there where it is named for the second time (by {looking[end_to_S2]}), and once more
at the verb (by {looking[end_to_verb]}), where {looking[verb_to_S2]} has put it. These help in either order.

Both names are read by where they stand, whoever gives: the first by {looking[end_to_first_name]}, the second by
{looking[end_to_second_name]}. Each of these helps where its name is the one who receives, and hinders as much where it
is the one who gives. The mean over both orders nearly hides them. The last MLP says the one who is not the giver.

Without the heads of the table together {ioi[left without these heads]:.2f} is left; with all other heads exchanged
instead, {ioi[left with only these heads]:.2f}.
{history}"""
HISTORY_TEMPLATE = """
## How it formed

The trainer keeps the model of every hundredth step, and `python -m glmlens.demo.history OUT` measures them: first heads
look at the word before, then heads copy what followed it, and with them words are said again; who receives comes last.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=BUNDLED_MODEL)
    parser.add_argument("--training", type=Path, metavar="OUT", help="the training that it is from, for its history")
    args = parser.parse_args()
    folder = expand_path(args.folder)
    card = {**measure_card(load(folder, dtype="float32")), "model": load(folder).model_hash}
    path = folder / "card.json"
    before = read_json(path) if path.exists() else {}
    if before.get("model") == card["model"] and "history" in before:
        card["history"] = before["history"]
    if args.training:
        found = measure_history(expand_path(args.training))
        card["history"] = dict(zip(found.labels["step"], found.values.tolist(), strict=True))
    card = round_values(card)
    assert isinstance(card, dict)
    write_bytes(path, (json.dumps(card, indent=1) + "\n").encode())
    write_bytes(folder / "README.md", format_card(card).encode())


def round_values(value: object) -> object:
    """The numbers of the card to four digits after the point."""
    if isinstance(value, dict):
        return {name: round_values(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_values(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
