"""What a task is: prompts with a right and a wrong answer, counterfactuals, named positions, and a metric."""

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
    """An item that cannot be asked under this tokenizer, or a position that an example has not got."""


@dataclass(frozen=True)
class TextWithSpans:
    """A text, and the characters [start, end) at which each of its named parts stands."""

    text: str
    spans: Mapping[str, tuple[int, int]]


def fill_template(template: str, slots: Mapping[str, str]) -> TextWithSpans:
    """The template with its {slots} filled."""
    text, spans = "", {}
    for before, name, _, _ in Formatter().parse(template):
        text += before
        if name is not None:
            spans[name] = (len(text), len(text) + len(slots[name]))
            text += slots[name]
    return TextWithSpans(text, spans)


@dataclass(frozen=True)
class Item:
    """One question, in text: the prompt, the answers after it, and prompts that differ from it in a named way.

    `slots` is what was drawn for it. Answers begin with the space that is before them in running text.
    """

    prompt: TextWithSpans
    correct: tuple[str, ...]
    wrong: tuple[str, ...]
    counterfactuals: Mapping[str, TextWithSpans]
    slots: Mapping[str, str]

    @property
    def text(self) -> str:
        return self.prompt.text


def item(
    template: str,
    slots: Mapping[str, str],
    correct: str | Sequence[str],
    wrong: str | Sequence[str],
    **counterfactuals: Mapping[str, str],
) -> Item:
    """An item made of a template; each counterfactual is the slots that it fills otherwise."""
    return Item(
        fill_template(template, slots),
        (correct,) if isinstance(correct, str) else tuple(correct),
        (wrong,) if isinstance(wrong, str) else tuple(wrong),
        {name: fill_template(template, {**slots, **changes}) for name, changes in counterfactuals.items()},
        slots,
    )


@dataclass(frozen=True)
class Example:
    """One question as a model sees it: token ids with their prefix, and the absolute position of every named part.

    A part of several tokens has the position of its last one; "end" is the last of the prompt.
    """

    item: Item
    tokens: list[int]
    counterfactuals: dict[str, list[int]]
    correct: tuple[int, ...]
    wrong: tuple[int, ...]
    positions: dict[str, int]

    def at(self, name: str) -> int:
        """The absolute position of a named part; "S1+1" is the token after it. TaskError for another name."""
        part, sign, offset = re.fullmatch(r"(.*?)(?:([+-])(\d+))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
        if part not in self.positions:
            raise TaskError(
                f"no position {name!r} here; there are {', '.join(self.positions)}, and 'S1+1' for the next"
            )
        position = self.positions[part] + int(f"{sign}{offset}" if sign else 0)
        if not 0 <= position < len(self.tokens):
            raise TaskError(f"{name!r} is position {position} of a prompt that has 0 to {len(self.tokens) - 1}")
        return position


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Examples of one task under one tokenizer; `dropped` counts the items that it could not ask, by reason."""

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
        """The prompts: a row of ids for each, of the lengths that they have. A lens takes them as they are."""
        return [example.tokens for example in self.examples]

    @property
    def texts(self) -> list[str]:
        return [example.item.text for example in self.examples]

    def counterfactual(self, name: str) -> list[list[int]]:
        """The counterfactual prompts of this name, each as long as the prompt that it belongs to."""
        known = self.task.counterfactuals
        if name not in known:
            raise TaskError(f"{self.task.name} has no counterfactual {name!r}; it has {', '.join(known)}")
        return [example.counterfactuals[name] for example in self.examples]

    def at(self, name: str) -> Int[Tensor, "example"]:
        """The absolute position of a named part in every example, prefix counted."""
        return torch.tensor([example.at(name) for example in self.examples], dtype=torch.long)

    def where(self, keep: Callable[[Example], bool]) -> "Examples":
        """The examples for which `keep` holds."""
        return replace(self, examples=tuple(filter(keep, self.examples)))

    def of_length(self, length: int | None = None) -> "Examples":
        """The examples whose prompts have this many tokens; by default, as most of them have."""
        if length is None:
            length = Counter(map(len, self.tokens)).most_common(1)[0][0]
        return self.where(lambda example: len(example.tokens) == length)

    def measure(self, logits: Float[Tensor, "example pos vocab"]) -> Float[Tensor, "example"]:
        """The task's metric for every example, from logits whose last position is the prompts' last.

        The logit difference is the best right answer's logit less the best wrong one's; the probability difference,
        the probability of all right answers less that of all wrong ones.
        """
        if logits.shape[0] != len(self):
            raise TaskError(f"logits of {logits.shape[0]} rows for {len(self)} examples")
        last = logits[:, -1].float()
        best = self.task.metric == LOGIT_DIFFERENCE
        scores = last if best else last.softmax(-1)
        pairs = []
        for row, example in zip(scores, self.examples, strict=True):
            right, wrong = row[list(example.correct)], row[list(example.wrong)]
            pairs.append(right.max() - wrong.max() if best else right.sum() - wrong.sum())
        return torch.stack(pairs) if pairs else last.new_zeros(0)

    def accuracy(self, logits: Float[Tensor, "example pos vocab"]) -> float:
        """The share of examples in which a right answer is more probable than every wrong one."""
        return float((self.measure(logits) > 0).float().mean())

    def __repr__(self) -> str:
        dropped = "".join(f", {n} dropped: {why}" for why, n in self.dropped.items())
        first = f"; the first: {self.examples[0].item.text!r}" if self.examples else ""
        return f"{len(self)} examples of {self.task.name}{dropped}{first}"


@dataclass(frozen=True)
class Task:
    """A kind of question with known answers.

    `counterfactuals` says what each changes; `source` where the task comes from.
    """

    name: str
    draw: Callable[[random.Random, Tokenizer | None], Item]
    counterfactuals: Mapping[str, str]
    source: str
    metric: str = LOGIT_DIFFERENCE

    def items(self, tokenizer: Tokenizer | None, seed: int | str = 0) -> Iterator[Item]:
        """Items without end, the same for the same seed."""
        draw = random.Random(f"{self.name}/{seed}")
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
        """n examples under a tokenizer (or a lens', which has one), the same for the same seed.

        Items for which `where` does not hold are passed over. Items that this tokenizer cannot ask - an answer of
        several tokens, a counterfactual of another length - are dropped and counted, or with `strict` a TaskError
        that shows the tokens. Raises TaskError when too few of what is drawn can be asked.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not isinstance(tokenizer, Tokenizer):
            raise TaskError(f"{self.name} needs a tokenizer, or a lens that has one; got {type(tokenizer).__name__}")
        n = read_integer(n, "n", least=0, error=TaskError)
        found: list[Example] = []
        dropped: Counter[str] = Counter()
        last: TaskError | None = None
        for tried, drawn in enumerate(self.items(tokenizer, seed)):
            if len(found) == n:
                break
            if tried > 200 * n + 2000:
                raise TaskError(
                    f"{len(found)} of {n} examples of {self.name} after {tried} tries: {dict(dropped)}; {last}"
                )
            if where is not None and not where(drawn):
                continue
            try:
                found.append(build_example(drawn, tokenizer))
            except UnaskableItem as e:
                last = TaskError(f"{self.name}: {e}")
                if strict:
                    raise last from None
                dropped[e.reason] += 1
        return Examples(self, tuple(found), dict(dropped))


class UnaskableItem(GlmlensError, ValueError):
    """Why an item cannot be asked under a tokenizer, in a word and with its tokens."""

    def __init__(self, reason: str, shown: str):
        super().__init__(f"{reason}: {shown}")
        self.reason = reason


def build_example(drawn: Item, tokenizer: Tokenizer) -> Example:
    """The item under a tokenizer; Unaskable when its answers are not one token or its lengths differ."""
    tokens, positions = locate_spans(drawn.prompt, tokenizer)
    others = {}
    for name, said in drawn.counterfactuals.items():
        ids, places = locate_spans(said, tokenizer)
        if len(ids) != len(tokens) or places != positions:
            shown = f"{tokenizer.decode_each(tokens)} and {tokenizer.decode_each(ids)}"
            raise UnaskableItem("a counterfactual of another length", f"{len(tokens)} and {len(ids)} tokens: {shown}")
        if ids == tokens:
            raise UnaskableItem("a counterfactual that is the prompt itself", f"{name}: {tokenizer.decode_each(ids)}")
        others[name] = ids
    correct, wrong = (
        tuple(encode_answer(drawn.text, tokens, answer, tokenizer) for answer in answers)
        for answers in (drawn.correct, drawn.wrong)
    )
    if set(correct) & set(wrong):
        raise UnaskableItem("right and wrong begin alike", f"{drawn.correct} and {drawn.wrong}")
    return Example(drawn, tokens, others, correct, wrong, positions)


def locate_spans(prompt: TextWithSpans, tokenizer: Tokenizer) -> tuple[list[int], dict[str, int]]:
    """The ids of a text, and the position of the last token of each of its named parts."""
    ids, offsets = tokenizer.encode_with_offsets(prompt.text)
    positions = {
        name: max(i for i, (a, b) in enumerate(offsets) if a < end and b > start)
        for name, (start, end) in prompt.spans.items()
        if end > start
    }
    return ids, {**positions, "end": len(ids) - 1}


def encode_answer(text: str, tokens: list[int], answer: str, tokenizer: Tokenizer) -> int:
    """The one token that continues `tokens` when the text goes on with `answer`."""
    ids = tokenizer.encode(text + answer, suffix=False)
    if ids[:-1] != tokens:
        shown = tokenizer.decode_each(ids[max(0, len(tokens) - 1) :])
        raise UnaskableItem("an answer of several tokens", f"{answer!r} after {text[-20:]!r} is {shown}")
    return ids[-1]
