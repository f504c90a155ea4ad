"""Measure and write the model card of the small GLM: `python -m glmlens.demo.card [FOLDER]`.

Abilities are measured on sentences that never occur in its training text (see `world.is_held_out`), mechanisms by
ablation and patching. The card is written twice: card.json holds the numbers, which tests compare with the thresholds
in this module, and README.md presents them as text and tables.
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
from glmlens.file_io import expand_path, read_json, write_bytes
from glmlens.hook_points import Point
from glmlens.lens import BUNDLED_MODEL, Lens, load
from glmlens.tasks import TASKS, Item
from glmlens.tasks.words import WORD_SERIES

ItemFilter = Callable[[Item], bool]


def filter_held_out(task: str) -> ItemFilter:
    """Return a filter for items of a task that never occur in the training text."""
    return lambda item: is_held_out(task, item)


def filter_trained(task: str) -> ItemFilter:
    """Return a filter for items of a task that occur in the training text."""
    return lambda item: not is_held_out(task, item)


@dataclass(frozen=True)
class CardRequirement:
    """One line of the card: a task, the items on which it is measured, and the required minimum of its measures.

    `asked` describes the items, `where` selects them. `minimum` maps fields of CardResult to numbers.
    """

    task: str
    asked: str
    where: ItemFilter
    minimum: dict[str, float]


def is_new_pair_of_names(item: Item) -> bool:
    """Whether a sentence about giving has a held-out pair of names, with an opener of the training text."""
    return is_held_out("ioi", item) and not has_unseen_opener(item)


def is_long_held_out_bracket_text(item: Item) -> bool:
    """Whether a bracket text is held out and has at least six parts: shorter ones begin longer ones in training."""
    return is_held_out("brackets", item) and len(item.slots["text"].split()) > 5


def require(task: str, asked: str, where: ItemFilter | None = None, **minimum: float) -> CardRequirement:
    """Return a requirement for a task, by default on its held-out items."""
    return CardRequirement(task=task, asked=asked, where=where or filter_held_out(task), minimum=minimum)


CARD_REQUIREMENTS = (
    require("ioi", "held-out pairs of names", is_new_pair_of_names, accuracy=0.98, difference=3.0),
    require("ioi", "openers that such sentences never have in training", has_unseen_opener, accuracy=0.9),
    require("induction", "new random words", first=0.95),
    require("facts", "sentences of the training text", filter_trained("facts"), first=0.95),
    require("facts", "facts in held-out phrasings", first=0.85),
    require("agreement", "held-out pairs of nouns", accuracy=0.98),
    require("docstring", "held-out sequences of arguments", first=0.98),
    require("pronouns", "held-out pairs of name and adjective", first=0.98),
    require("successors", "stretches that are never a whole sentence in training", first=0.98),
    require("greater_than", "held-out years", difference=0.7),
    require("brackets", "held-out texts of six parts or more", is_long_held_out_bracket_text, accuracy=0.95),
    require("addition", "held-out lines of sums", first=0.95),
    require("sentiment", "held-out pairs of adjective and thing", accuracy=0.95),
)


@dataclass(frozen=True)
class CardResult:
    """The results of a task on n items.

    `accuracy` is the share of items in which a right answer is more probable than every wrong one, `difference` the
    mean of the task's metric, and `first` the share in which a right answer is the most probable token. `first` is
    low where many other tokens fit as well: another verb, an opening bracket.
    """

    task: str
    asked: str
    n: int
    accuracy: float
    difference: float
    first: float


def measure_task(lens: Lens, requirement: CardRequirement, n: int = 300, seed: int | str = "card") -> CardResult:
    """Measure a task on n of the items that a requirement selects."""
    examples = TASKS[requirement.task].examples(lens, n, seed, where=requirement.where)
    logits = lens(examples.tokens, logits_to_keep=1)
    best = logits[:, -1].argmax(-1).tolist()
    n_first = sum(i in example.correct for i, example in zip(best, examples, strict=True))
    return CardResult(
        task=requirement.task,
        asked=requirement.asked,
        n=n,
        accuracy=examples.accuracy(logits),
        difference=float(examples.measure(logits).mean()),
        first=n_first / n,
    )


STEERING_STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def measure_steering(lens: Lens, layer: int = 1, n: int = 60) -> dict[str, float]:
    """Return the mean of logit(happy) - logit(sad) after an adjective without valence, by steering strength.

    The steering vector is the mean of the residual stream at good adjectives minus that at bad ones. It is added at the
    adjective, multiplied by the strength (Tigges et al. 2023, arXiv 2310.15154, section 3; Turner et al. 2023, arXiv
    2308.10248).
    """
    examples = TASKS["sentiment"].examples(lens, n, "steering")
    rows = torch.arange(n)
    at = examples.at("adjective")
    happy, sad = (lens.to_single_token(f" {feeling}") for feeling in ("happy", "sad"))
    _, acts = lens.run_with_cache(examples.tokens, f"blocks.{layer}.resid_post", logits=False)
    resid = acts["resid_post", layer][rows, at]  # [example, model]
    good = torch.tensor([example.correct[0] == happy for example in examples])
    direction = resid[good].mean(0) - resid[~good].mean(0)

    def measure_feeling(strength: float) -> float:
        """Return the mean logit difference with the vector added `strength` times."""

        def steer(x: Tensor, point: Point) -> Tensor:
            x[rows, at] += strength * direction
            return x

        hooks = {f"blocks.{layer}.resid_post": steer}
        last = lens.run_with_hooks(examples.counterfactual("neutral"), hooks, logits_to_keep=1)[:, -1]
        return float((last[:, happy] - last[:, sad]).mean())

    return {f"{strength:+.1f}": measure_feeling(strength) for strength in STEERING_STRENGTHS}


def measure_untrained_series(lens: Lens, shown: int = 3) -> list[tuple[str, str, float, str, int]]:
    """Measure series from their first word on, which never occur so in the training text.

    A row is the prompt, the most probable token, its probability, the right token, and the number of tokens that are
    more probable than the right one.
    """
    rows = []
    for series in WORD_SERIES.values():
        text = ", ".join(series[:shown]) + ","
        right = f" {series[shown]}"
        p = lens(text, logits_to_keep=1)[0, -1].softmax(-1)
        best = int(p.argmax())
        rank = int((p > p[lens.to_single_token(right)]).sum())
        rows.append((text, lens.to_string([best]).strip(), float(p[best]), right.strip(), rank))
    return rows


def measure_card(lens: Lens) -> dict[str, object]:
    """Return all measurements of the card, as written to card.json."""
    lines = [asdict(measure_task(lens, measure)) for measure in tqdm(CARD_REQUIREMENTS, desc="measuring tasks")]
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
IMPORTANT_SHARE = 0.2  # of the logit difference: the text names heads with larger effects


def format_card(card: dict[str, Any]) -> str:
    """Return the card as Markdown: README.md of the model's folder."""
    minimum = {
        (requirement.task, requirement.asked): ", ".join(
            f"{name} {bound}" for name, bound in requirement.minimum.items()
        )
        for requirement in CARD_REQUIREMENTS
    }
    lines = [
        f"| {line['task']} | {line['asked']} | {line['accuracy']:.1%} | {line['difference']:.2f} | "
        f"{line['first']:.1%} | {minimum[line['task'], line['asked']]} |"
        for line in card["tasks"]
    ]
    steered = [f"| {strength} | {difference:+.2f} |" for strength, difference in card["steering"].items()]
    induction, facts, ioi = card["induction"], card["facts"], card["ioi"]
    traced = [
        f"| {layer} | {subject:.2f} | {end:.2f} |"
        for layer, (subject, end) in enumerate(
            zip(facts["restored at the subject"], facts["restored at the end"], strict=True)
        )
    ]
    looks = [name for name in next(iter(ioi["heads"].values())) if " to " in name]
    heads = [
        f"| {head} | {format_effects(effects)} | {' | '.join(f'{effects[look]:.2f}' for look in looks)} |"
        for head, effects in ioi["heads"].items()
    ]
    mlps = [f"| MLP {i} | {format_effects(effects)} |{' |' * len(looks)}" for i, effects in ioi["mlps"].items()]
    unlearned = [
        f"| {text} | {best} | {p:.0%} | {right} | {rank} |"
        for text, best, p, right, rank in card["from the first word"]
    ]
    clean = ioi["clean"]

    def list_looking_heads(look: str) -> str:
        """Return the important heads whose attention goes mostly this way, such as "end to S2"."""
        important = [
            head
            for head, effects in ioi["heads"].items()
            if effects[look] > 0.8 and max(abs(effects[name]) for name in LOST_COLUMNS) > IMPORTANT_SHARE * clean
        ]
        return ", ".join(important) or "no head"

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


def format_effects(effects: dict[str, float]) -> str:
    """Return the table cells of the effects of a component."""
    lost = " | ".join(f"{effects[name]:+.2f}" for name in LOST_COLUMNS)
    return f"{lost} | {effects['direct']:+.2f}"


def format_history(history: dict[str, list[float]]) -> str:
    """Return the section on the training, empty without measurements of it."""
    if not history:
        return ""
    head = f"| step | {' | '.join(HISTORY_MEASURES)} |\n|{'---|' * (1 + len(HISTORY_MEASURES))}"
    rows = [f"| {step} | {' | '.join(f'{x:.2f}' for x in row)} |" for step, row in history.items()]
    return "\n".join([HISTORY_TEMPLATE, head, *rows, ""])


def format_head_scores(heads: dict[str, float]) -> str:
    """Return heads with their scores, as running text."""
    return ", ".join(f"{head} ({score:.2f})" for head, score in heads.items())


CARD_TEMPLATE = """\
# The GLM inside glmlens

A small GLM-4, trained from random weights on generated text in simple English (`glmlens/demo/world.py`). The tasks of
`glmlens.tasks` occur in that text. It has {parameters:.1f} M parameters: 4 layers, 8 query heads on 4 key-value heads,
rotary positions on half of each head's channels, biases on q, k and v, a fused gate and up projection, tied embeddings,
bfloat16. It knows nothing outside its training text.

`python -m glmlens.demo.train OUT` trains it. `python -m glmlens.demo.card` writes this page and card.json. All numbers
were measured on model {model} in float32. Training on another machine gives other weights, and nearly the same numbers.

## What it can do

Every line is measured on 300 prompts. "Held out" means that the prompts never occur in the training text: a fifth of
all pairs of words, chosen by a hash. "accuracy" is the share of prompts in which the right answer is more probable than
every wrong one. "difference" is the mean of the task's metric: a logit difference, for greater_than a difference of
probabilities. "first" is the share of prompts in which a right answer is the most probable token; it says little where
other words fit as well. The last column is the minimum that the tests require.

| task | prompts | accuracy | difference | first | minimum |
|---|---|---|---|---|---|
{tasks}

Sentiment can be steered. The steering vector is the mean residual stream after layer 1 at good adjectives minus that at
bad ones. It is added, multiplied by the strength, at an adjective without valence. The table shows the mean of
logit(happy) - logit(sad):

| strength | difference |
|---|---|
{steering}

## What it cannot do

It knows only the words and sentences of its training text. On other text it still predicts, often with high confidence.
Series are an example: in the training text they start with their second word or later, never with the first. Started
with the first, most of them continue wrongly. "rank" is the number of tokens that are more probable than the right one:

| prompt | most probable | probability | right | rank |
|---|---|---|---|---|
{unlearned}

## How it works

### Induction

The prompt is a list of 20 random words, repeated once. The model predicts {induction[accuracy]:.1%} of the repeated
words; chance is {induction[chance]:.1%}.

- Previous-token heads, with the attention to the previous token: {feeding}.
- Induction heads, with the attention to the token after the earlier occurrence: {copiers}.

Mean ablation replaces the output of heads by its mean over positions and prompts:

| ablated | repeated words predicted |
|---|---|
| the induction heads | {induction[without the induction heads]:.1%} |
| as many other heads of their layers | {induction[without as many others of their layers]:.1%} |
| the previous-token heads | {induction[without the previous-token heads]:.1%} |

### Facts

The prompt is like "The capital of France is". The logit difference to another country's answer is {facts[clean]:.2f},
and {facts[other subject]:.2f} with the other country in the prompt. We run the prompt with the other country, patch in
the original residual stream after one layer at one position, and measure the share of the difference that is restored:

| patched after layer | at the subject | at the last token |
|---|---|---|
{traced}

The information about the country is at its own position first. It moves to the last token in the layers in which the
first column falls.

### Indirect object identification

The prompt is like "When Mary and John went to the store, John gave a drink to". The logit difference of receiver and
giver is {ioi[clean]:.2f}, the accuracy {ioi[accuracy]:.1%}. Each component is patched with its output on the same
sentence about three different people. "lost without" is the drop of the logit difference: over all sentences, and over
those that name the receiver first ("Mary and John ... John gave") or second ("John and Mary ... John gave"). "direct"
is the direct contribution to the logit difference. The other columns are the mean attention from one position to
another (S2: the second mention of the giver; end: the last token):

| component | lost without | receiver first | receiver second | direct | {looks} |
|{rule}
{heads}

This is not the circuit of GPT-2: no head writes the name of the receiver to the output. All heads together add
{ioi[direct of all heads]:+.2f} directly, the last MLP {last[direct]:+.2f}. The heads move the information that this MLP
needs to the last token. They read the giver at its second mention (head {looking[end_to_S2]}) and at the verb (head
{looking[end_to_verb]}), to which head {looking[verb_to_S2]} has moved it. These heads raise the difference in both
orders.

Other heads read the names by their position, whoever gives: the first name (heads {looking[end_to_first_name]}) or the
second (heads {looking[end_to_second_name]}). Each of them raises the difference where its name is the receiver, and
lowers it about as much where its name is the giver, so the mean over both orders nearly hides its effect. The last MLP
then raises the name that is not the giver's.

With all heads of the table patched, a difference of {ioi[left without these heads]:.2f} is left. With all other heads
patched instead, {ioi[left with only these heads]:.2f} is left.
{history}"""
HISTORY_TEMPLATE = """
## How it formed in training

The trainer saves the model every hundred steps, and `python -m glmlens.demo.history OUT` measures these checkpoints.
First, heads attend to the previous token. Then induction heads form, and with them the model predicts repeated words.
Indirect object identification comes last. Columns: accuracy on repeated words, scores of the best previous-token and
induction head, accuracy and logit difference of indirect object identification.
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=BUNDLED_MODEL, help="the checkpoint folder")
    parser.add_argument(
        "--training", type=Path, metavar="OUT", help="the folder of its training, to measure the checkpoints"
    )
    args = parser.parse_args()
    folder = expand_path(args.folder)
    card = {**measure_card(load(folder, dtype="float32")), "model": load(folder).model_hash}
    path = folder / "card.json"
    before = read_json(path) if path.exists() else {}
    # A history needs the checkpoints of the training: keep that of the same model.
    if before.get("model") == card["model"] and "history" in before:
        card["history"] = before["history"]
    if args.training:
        history = measure_history(expand_path(args.training))
        card["history"] = dict(zip(history.labels["step"], history.values.tolist(), strict=True))
    card = round_values(card)
    assert isinstance(card, dict)
    write_bytes(path, (json.dumps(card, indent=1) + "\n").encode())
    write_bytes(folder / "README.md", format_card(card).encode())


def round_values(value: object) -> object:
    """Return the value with all its numbers rounded to four decimals."""
    if isinstance(value, dict):
        return {name: round_values(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_values(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
