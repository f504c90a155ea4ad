"""Tasks of form: induction, greater-than, docstrings, series, brackets and addition."""

import random

from glmlens.tasks.task import PROBABILITY_DIFFERENCE, Item, Task, TaskError, TextWithSpans, item
from glmlens.tasks.words import ADJECTIVES, ARGUMENTS, BRACKETS, EVENTS, FUNCTIONS, THING_NOUNS, TYPES, WORD_SERIES
from glmlens.text.tokenizer import Tokenizer


def draw_induction(draw: random.Random, tokenizer: Tokenizer | None) -> Item:
    """Draw random words of the vocabulary, of which the first ones are repeated.

    The prompt ends with a word that has occurred before. The right answer is the word that followed it. Raises
    TaskError without a tokenizer, or if its vocabulary has too few words.
    """
    words = require_vocabulary(tokenizer).list_words()
    length = draw.randrange(8, 21)
    if len(words) < 2 * length + 2:
        raise TaskError(f"induction repeats words of the vocabulary, and this one has {len(words)}")
    drawn = draw.sample(words, 2 * length + 1)
    first, fresh, other = drawn[:length], drawn[length:-1], drawn[-1]
    again = draw.randrange(1, length)  # how many words are repeated; the last one is "current"
    # previous: the earlier occurrence of the last word; copied: the word after it, which is the right answer.
    template = "".join(
        [f"{{w{i}}}" for i in range(again - 1)]
        + ["{previous}{copied}"]
        + [f"{{w{i}}}" for i in range(again + 1, length)]
        + first[: again - 1]
        + ["{current}"]
    )
    slots = {f"w{i}": word for i, word in enumerate(first)}
    slots |= {"previous": first[again - 1], "copied": first[again], "current": first[again - 1]}
    new = {f"w{i}": word for i, word in enumerate(fresh)} | {"previous": fresh[again - 1], "copied": fresh[again]}
    drawn_item = item(
        template,
        slots,
        correct=first[again],
        wrong=draw.choice([w for w in first if w != first[again]]),
        fresh=new,
        copied={"copied": other},
    )
    part_names = ("previous", "copied", "current")
    return Item(
        prompt=select_spans(drawn_item.prompt, part_names),
        correct=drawn_item.correct,
        wrong=drawn_item.wrong,
        counterfactuals={name: select_spans(text, part_names) for name, text in drawn_item.counterfactuals.items()},
        slots={"length": str(length), "again": str(again)},
    )


def require_vocabulary(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer. Raises TaskError if there is none."""
    if tokenizer is None:
        raise TaskError("this task draws from a tokenizer's vocabulary: it needs a tokenizer, or a lens that has one")
    return tokenizer


def select_spans(prompt: TextWithSpans, part_names: tuple[str, ...]) -> TextWithSpans:
    """Return the text with the spans of these parts only."""
    return TextWithSpans(prompt.text, {name: prompt.spans[name] for name in part_names})


induction = Task(
    name="induction",
    draw=draw_induction,
    counterfactuals={
        "fresh": "other words before the repetition: there is nothing to copy",
        "copied": "another word at the position to copy from, which occurs nowhere else",
    },
    source=(
        "Repeated random tokens: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits); Olsson et al. "
        "2022, arXiv 2209.11895"
    ),
)

WAR_TEMPLATE = "The {event} lasted from the year {start} to the year "


def draw_greater_than(draw: random.Random, tokenizer: Tokenizer | None) -> Item:
    """Draw a sentence about an event with its first year; the prompt ends within the last year.

    It ends after the century, or after the first token that goes beyond it. This fits tokenizers that split digits in
    any way: right answers begin only later years, wrong ones only the first year or earlier ones. A token that begins
    both (a decade, for a tokenizer of single digits) is neither.
    """
    event, another = draw.sample(EVENTS, 2)
    century, year = draw.randrange(11, 20), draw.randrange(2, 98)
    start = f"{century}{year:02}"
    tokenizer = require_vocabulary(tokenizer)
    years = [f"{century}{y:02}" for y in range(100)]
    pieces = {later: tokenizer.decode_each(tokenizer.encode_continuation(later)) for later in years}
    shown = ""  # the digits of the last year that the prompt shows
    for piece in pieces[start]:
        if len(shown) >= 2:
            break
        shown += piece
    right: set[str] = set()
    wrong: set[str] = set()
    for later, spelt in pieces.items():
        # The piece that continues `shown`, if the tokenizer splits this year there.
        lengths = [i for i in range(len(spelt)) if "".join(spelt[:i]) == shown]
        if lengths:
            answers = right if later > start else wrong
            answers.add(spelt[lengths[0]])
    both = right & wrong
    slots = {"event": event, "start": start}
    # The counterfactual start: the first year that the shown digits can begin, before which no end is.
    first = f"{shown}01"[:4] if len(shown) == 2 else f"{shown}0"
    return item(
        WAR_TEMPLATE + shown,
        slots,
        correct=sorted(right - both),
        wrong=sorted(wrong - both),
        first={"start": first},
        event={"event": another},
    )


greater_than = Task(
    name="greater_than",
    draw=draw_greater_than,
    counterfactuals={
        "first": "starts in the first year of its century (or decade): every last year is later",
        "event": "another event: the same answers",
    },
    source="Greater-than: Hanna et al. 2023, arXiv 2305.00586, sections 2 and 3",
    metric=PROBABILITY_DIFFERENCE,
)

DEF_TEMPLATE = 'def {function}(self, {def1}, {def2}, {def3}):\n    """{verb} the {what}.\n\n'
PARAMS_TEMPLATE = "    :param {doc1}: {about1}\n    :param {doc2}: {about2}\n    :param"


def draw_docstring(draw: random.Random, _: Tokenizer | None = None) -> Item:
    """Draw a function with a docstring that describes two of its three arguments; the answer is the third."""
    a, b, c, d, e, f = draw.sample(ARGUMENTS, 6)
    function, verb = draw.choice(FUNCTIONS), draw.choice(FUNCTIONS).capitalize()
    about = [f"{draw.choice(ADJECTIVES)} {draw.choice(TYPES)}" for _ in range(3)]
    slots = {"function": function, "verb": verb, "what": about[2], "about1": about[0], "about2": about[1]}
    slots |= {"def1": a, "def2": b, "def3": c, "doc1": a, "doc2": b}
    return item(
        DEF_TEMPLATE + PARAMS_TEMPLATE,
        slots,
        correct=f" {c}",
        wrong=[f" {a}", f" {b}"],
        random_def={"def1": d, "def2": e, "def3": f},
        random_doc={"doc1": d, "doc2": e},
        random_answer={"def3": d},
    )


docstring = Task(
    name="docstring",
    draw=draw_docstring,
    counterfactuals={
        "random_def": "the signature has other arguments",
        "random_doc": "the docstring describes other arguments than the signature has",
        "random_answer": "the third argument of the signature is a different one",
    },
    source=(
        "Docstring arguments: Heimersheim and Janiak 2023 (A circuit for Python docstrings in a 4-layer attention-only "
        "transformer, Alignment Forum)"
    ),
)


def draw_successor(draw: random.Random, _: Tokenizer | None = None) -> Item:
    """Draw a stretch of a series such as the days of the week; the answer is its next word."""
    kind = draw.choice(list(WORD_SERIES))
    series = WORD_SERIES[kind]
    shown = draw.randrange(3, min(6, len(series) - 2) + 1)
    start = draw.randrange(1, len(series) - shown)
    words = series[start : start + shown]
    earlier = series[start - 1 : start + shown - 1]
    mixed = words[1:-1] + words[:1]
    template = ", ".join([f"{{w{i}}}" for i in range(shown - 1)] + ["{last}"]) + ","
    slot_names = [f"w{i}" for i in range(shown - 1)] + ["last"]
    return item(
        template,
        {**dict(zip(slot_names, words, strict=True)), "kind": kind},
        correct=f" {series[start + shown]}",
        wrong=f" {words[-1]}",
        earlier=dict(zip(slot_names, earlier, strict=True)),
        mixed=dict(zip(slot_names, mixed, strict=False)),
    )


successors = Task(
    name="successors",
    draw=draw_successor,
    counterfactuals={
        "earlier": "the series one step earlier: its last word becomes the right answer",
        "mixed": "the first word is moved to just before the last",
    },
    source="Successors: Gould et al. 2023, arXiv 2312.09230",
)


def draw_brackets(draw: random.Random, tokenizer: Tokenizer | None = None) -> Item:
    """Draw a Dyck text with at least two open brackets; the answer closes the innermost one.

    Things may follow a bracket that opens.
    """
    open_: list[tuple[int, str]] = []  # index in `out` and kind of the open brackets, innermost last
    out: list[str] = []
    for _ in range(draw.randrange(2, 8)):
        if len(open_) > 1 and draw.random() < 0.45:
            out.append(BRACKETS[open_.pop()[1]])
        else:
            bracket = draw.choice(list(BRACKETS))
            open_.append((len(out), bracket))
            out.append(bracket)
            if draw.random() < 0.4:
                out.append(draw.choice(THING_NOUNS))
    if len(open_) < 2:
        return draw_brackets(draw)  # too few are open: draw again
    (outer, _), (inner, bracket) = open_[-2], open_[-1]
    another = draw.choice([b for b in BRACKETS if b != bracket])
    outside = draw.choice([b for b in BRACKETS if b != out[outer]])
    slots = {"outer": out[outer], "open": bracket}
    # The braces of the text are escaped: only {open} and {outer} are slots.
    parts = [part.replace("{", "{{").replace("}", "}}") for part in out]
    parts[inner] = "{open}"
    parts[outer] = "{outer}"
    template = " ".join(parts)
    wrong = [f" {BRACKETS[b]}" for b in (another, *BRACKETS) if b != bracket]
    return item(
        template,
        {**slots, "text": " ".join(out)},
        correct=f" {BRACKETS[bracket]}",
        wrong=list(dict.fromkeys(wrong)),
        open={"open": another},
        outer={"outer": outside},
    )


brackets = Task(
    name="brackets",
    draw=draw_brackets,
    counterfactuals={
        "open": "another kind of innermost open bracket: a wrong answer becomes right",
        "outer": "another kind of bracket around it: the same answer",
    },
    source="Closing brackets: bounded Dyck languages, Hewitt et al. 2020, arXiv 2010.07515",
)


def draw_addition(draw: random.Random, tokenizer: Tokenizer | None = None) -> Item:
    """Draw a sum of two digits after one to three solved sums; the answer is its result."""
    a, b = draw.randrange(10), draw.randrange(10)
    others = [(draw.randrange(10), draw.randrange(10)) for _ in range(draw.randrange(1, 4))]
    before = "".join(f"{x}+{y}={x + y}, " for x, y in others)
    # Preferably a first number whose sum has as many digits, so that the counterfactual is as long as the prompt.
    another = draw.choice([x for x in range(10) if x != a and len(str(x + b)) == len(str(a + b))] or [(a + 1) % 10])
    second = draw.choice([y for y in range(10) if y != b])
    return item(
        before + "{a}+{b}=",
        {"a": str(a), "b": str(b), "before": before},
        correct=str(a + b),
        wrong=str(another + b),
        a={"a": str(another)},
        b={"b": str(second)},
    )


addition = Task(
    name="addition",
    draw=draw_addition,
    counterfactuals={"a": "another first number: the wrong answer becomes right", "b": "another second number"},
    source="Addition of small numbers: Nanda et al. 2023, arXiv 2301.05217; Stolfo et al. 2023, arXiv 2305.15054",
)
