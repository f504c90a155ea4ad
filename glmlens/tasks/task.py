"""Define tasks: prompts with right and wrong answers, counterfactual prompts, named positions and a metric.

A `Task` draws `Item`s, which are text. `Task.examples` tokenizes them to `Examples`, which a lens can run.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.errors import GlmlensError
from glmlens.integers import Integer, read_integer
from glmlens.text.tokenizer import Tokenizer

LOGIT_DIFFERENCE = "logit difference"
PROBABILITY_DIFFERENCE = "probability difference"


class TaskError(GlmlensError, ValueError):
    """An item does not fit the tokenizer, or an example lacks the requested position or counterfactual."""


@dataclass(frozen=True)
class TextWithSpans:
    """A text, and the range of characters [start, end) of each of its named parts."""

    text: str
    spans: Mapping[str, tuple[int, int]]


def fill_template(template: str, slots: Mapping[str, str]) -> TextWithSpans:
    """Fill the {slots} of a template; return the text with the spans of its slots."""
    text = ""
    spans: dict[str, tuple[int, int]] = {}
    for before, name, _, _ in Formatter().parse(template):
        text += before
        if name is not None:
            spans[name] = (len(text), len(text) + len(slots[name]))
            text += slots[name]
    return TextWithSpans(text, spans)


@dataclass(frozen=True)
class Item:
    """One prompt of a task as text, with its right and wrong answers and its counterfactual prompts by name.

    `slots` holds the words that were drawn for it. An answer includes the space before it in running text.
    """

    prompt: TextWithSpans
    correct: tuple[str, ...]
    wrong: tuple[str, ...]
    counterfactuals: Mapping[str, TextWithSpans]
    slots: Mapping[str, str]

    @property
    def text(self) -> str:
        """The prompt as text."""
        return self.prompt.text


def item(
    template: str,
    slots: Mapping[str, str],
    correct: str | Sequence[str],
    wrong: str | Sequence[str],
    **counterfactuals: Mapping[str, str],
) -> Item:
    """Return an item made from a template. Each counterfactual maps the slots that it changes to their new words."""
    return Item(
        prompt=fill_template(template, slots),
        correct=(correct,) if isinstance(correct, str) else tuple(correct),
        wrong=(wrong,) if isinstance(wrong, str) else tuple(wrong),
        counterfactuals={name: fill_template(template, {**slots, **new}) for name, new in counterfactuals.items()},
        slots=slots,
    )


@dataclass(frozen=True)
class Example:
    """One prompt of a task as token ids with their prefix, and the absolute position of every named part.

    The position of a part of several tokens is that of its last token. "end" is the last position of the prompt.
    `correct` and `wrong` are the token ids of the answers.
    """

    item: Item
    tokens: list[int]
    counterfactuals: dict[str, list[int]]
    correct: tuple[int, ...]
    wrong: tuple[int, ...]
    positions: dict[str, int]

    def at(self, name: str) -> int:
        """Return the absolute position of a named part. "S1+1" is the position after S1.

        Raises TaskError for an unknown name and for a position outside the prompt.
        """
        # A name with an optional offset, such as "S1+1" or "end-2".
        part, sign, offset = re.fullmatch(r"(.*?)(?:([+-])(\d+))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
        if part not in self.positions:
            raise TaskError(
                f"no position {name!r} here; there are {', '.join(self.positions)}, and 'S1+1' for the next one"
            )
        position = self.positions[part] + int(f"{sign}{offset}" if sign else 0)
        if not 0 <= position < len(self.tokens):
            raise TaskError(f"{name!r} is position {position} of a prompt that has 0 to {len(self.tokens) - 1}")
        return position


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Examples of one task under one tokenizer. `dropped` counts items that did not fit the tokenizer, by reason."""

    task: "Task"
    examples: tuple[Example, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> "Examples": ...
    def __getitem__(self, i: int | slice) -> "Example | Examples":
        return replace(self, examples=self.examples[i]) if isinstance(i, slice) else self.examples[i]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of every prompt, unpadded. A lens takes this list as a batch."""
        return [example.tokens for example in self.examples]

    @property
    def texts(self) -> list[str]:
        """The prompts as text."""
        return [example.item.text for example in self.examples]

    def counterfactual(self, name: str) -> list[list[int]]:
        """Return the counterfactual prompts of this name as token ids, each as long as its own prompt.

        Raises TaskError for an unknown name.
        """
        known = self.task.counterfactuals
        if name not in known:
            raise TaskError(f"{self.task.name} has no counterfactual {name!r}; it has {', '.join(known)}")
        return [example.counterfactuals[name] for example in self.examples]

    def at(self, name: str) -> Int[Tensor, "example"]:
        """Return the absolute position of a named part in every example. Positions count the prefix."""
        return torch.tensor([example.at(name) for example in self.examples], dtype=torch.long)

    def where(self, keep: Callable[[Example], bool]) -> "Examples":
        """Return the examples for which `keep` returns True."""
        return replace(self, examples=tuple(filter(keep, self.examples)))

    def of_length(self, length: int | None = None) -> "Examples":
        """Return the examples whose prompts have `length` tokens, by default the most frequent length."""
        if length is None:  # ties go to the length that occurs first
            length = Counter(map(len, self.tokens)).most_common(1)[0][0]
        return self.where(lambda example: len(example.tokens) == length)

    def measure(self, logits: Float[Tensor, "example pos vocab"]) -> Float[Tensor, "example"]:
        """Return the task's metric for every example, from logits whose last position is the last of the prompts.

        The logit difference is the largest logit of a right answer minus the largest of a wrong one. The probability
        difference is the probability of all right answers minus that of all wrong ones. Raises TaskError if the
        numbers of rows and examples differ.
        """
        if logits.shape[0] != len(self):
            raise TaskError(f"logits of {logits.shape[0]} rows for {len(self)} examples")
        last = logits[:, -1].float()  # rows are left-padded: the last position is the end of every prompt
        differences = []
        for row, example in zip(last, self.examples, strict=True):
            if self.task.metric == LOGIT_DIFFERENCE:
                difference = row[list(example.correct)].max() - row[list(example.wrong)].max()
            else:
                probs = row.softmax(-1)
                difference = probs[list(example.correct)].sum() - probs[list(example.wrong)].sum()
            differences.append(difference)
        return torch.stack(differences) if differences else last.new_zeros(0)

    def accuracy(self, logits: Float[Tensor, "example pos vocab"]) -> float:
        """Return the share of examples with a positive metric.

        With the logit difference: examples in which a right answer is more probable than every wrong one.
        """
        return float((self.measure(logits) > 0).float().mean())

    def __repr__(self) -> str:
        dropped = "".join(f", {n} dropped: {why}" for why, n in self.dropped.items())
        first = f"; the first: {self.examples[0].item.text!r}" if self.examples else ""
        return f"{len(self)} examples of {self.task.name}{dropped}{first}"


@dataclass(frozen=True)
class Task:
    """A kind of prompt with known answers.

    `draw` draws one item. `counterfactuals` describes what each counterfactual changes, `source` names the papers that
    the task comes from.
    """

    name: str
    draw: Callable[[random.Random, Tokenizer | None], Item]
    counterfactuals: Mapping[str, str]
    source: str
    metric: str = LOGIT_DIFFERENCE

    def items(self, tokenizer: Tokenizer | None, seed: int | str = 0) -> Iterator[Item]:
        """Yield items without end, the same for the same seed."""
        draw = random.Random(f"{self.name}/{seed}")  # the name too: tasks with one seed draw different words
        while True:
            yield self.draw(draw, tokenizer)

    def examples(
        self,
        tokenizer: Any,
        n: Integer = 100,
        seed: int | str = 0,
        *,
        where: Callable[[Item], bool] | None = None,
        strict: bool = False,
    ) -> Examples:
        """Return n examples under a tokenizer or a lens that has one, the same for the same seed.

        Items for which `where` returns False are skipped. Items that do not fit the tokenizer, because an answer has
        several tokens or a counterfactual another length, are dropped and counted; with `strict` they raise a TaskError
        that shows the tokens. Raises TaskError if too few of the drawn items fit.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not isinstance(tokenizer, Tokenizer):
            raise TaskError(f"{self.name} needs a tokenizer, or a lens that has one; got {type(tokenizer).__name__}")
        n = read_integer(n, "n", least=0, error=TaskError)
        examples: list[Example] = []
        dropped: Counter[str] = Counter()
        last: TaskError | None = None
        for tried, drawn in enumerate(self.items(tokenizer, seed)):
            if len(examples) == n:
                break
            if tried > 200 * n + 2000:  # items never end: give up when hardly any fits
                raise TaskError(
                    f"{len(examples)} of {n} examples of {self.name} after {tried} tries: {dict(dropped)}; {last}"
                )
            if where is not None and not where(drawn):
                continue
            try:
                examples.append(build_example(drawn, tokenizer))
            except UnaskableItem as e:
                last = TaskError(f"{self.name}: {e}")
                if strict:
                    raise last from None
                dropped[e.reason] += 1
        return Examples(self, tuple(examples), dict(dropped))


class UnaskableItem(GlmlensError, ValueError):
    """An item does not fit the tokenizer. `reason` is the kind of misfit; the message shows the tokens as well."""

    def __init__(self, reason: str, shown: str):
        super().__init__(f"{reason}: {shown}")
        self.reason = reason


def build_example(drawn: Item, tokenizer: Tokenizer) -> Example:
    """Return an item as an example under a tokenizer.

    Raises UnaskableItem if an answer has several tokens, if a right and a wrong answer have the same token, or if a
    counterfactual equals the prompt or differs from it in length or positions.
    """
    tokens, positions = locate_spans(drawn.prompt, tokenizer)
    counterfactuals = {}
    for name, text in drawn.counterfactuals.items():
        ids, other_positions = locate_spans(text, tokenizer)
        if len(ids) != len(tokens) or other_positions != positions:
            shown = f"{tokenizer.decode_each(tokens)} and {tokenizer.decode_each(ids)}"
            raise UnaskableItem("a counterfactual of another length", f"{len(tokens)} and {len(ids)} tokens: {shown}")
        if ids == tokens:
            raise UnaskableItem("a counterfactual that is the prompt itself", f"{name}: {tokenizer.decode_each(ids)}")
        counterfactuals[name] = ids
    correct, wrong = (
        tuple(encode_answer(drawn.text, tokens, answer, tokenizer) for answer in answers)
        for answers in (drawn.correct, drawn.wrong)
    )
    if set(correct) & set(wrong):
        raise UnaskableItem("right and wrong begin alike", f"{drawn.correct} and {drawn.wrong}")
    return Example(
        item=drawn,
        tokens=tokens,
        counterfactuals=counterfactuals,
        correct=correct,
        wrong=wrong,
        positions=positions,
    )


def locate_spans(prompt: TextWithSpans, tokenizer: Tokenizer) -> tuple[list[int], dict[str, int]]:
    """Return the token ids of a text, and the position of the last token of each of its named parts."""
    ids, offsets = tokenizer.encode_with_offsets(prompt.text)
    # A token belongs to a part if their characters overlap: many tokens begin with the space before a word.
    positions = {
        name: max(i for i, (a, b) in enumerate(offsets) if a < end and b > start)
        for name, (start, end) in prompt.spans.items()
        if end > start
    }
    return ids, {**positions, "end": len(ids) - 1}


def encode_answer(text: str, tokens: list[int], answer: str, tokenizer: Tokenizer) -> int:
    """Return the token that continues `tokens` when the text continues with `answer`.

    Raises UnaskableItem if the answer has several tokens, or changes the tokens before it.
    """
    # Tokenize prompt and answer together: a tokenizer may merge them differently than apart.
    ids = tokenizer.encode(text + answer, suffix=False)
    if ids[:-1] != tokens:
        shown = tokenizer.decode_each(ids[max(0, len(tokens) - 1) :])
        raise UnaskableItem("an answer of several tokens", f"{answer!r} after {text[-20:]!r} is {shown}")
    return ids[-1]
