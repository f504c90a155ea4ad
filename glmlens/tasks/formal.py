"""Tasks of form: what came next before, what comes next in a series, what is greater, what closes what is open."""

import random

from glmlens.tasks.task import PROBABILITY_DIFFERENCE, Item, Task, TaskError, TextWithSpans, item
from glmlens.tasks.words import ADJECTIVES, ARGUMENTS, BRACKETS, EVENTS, FUNCTIONS, THING_NOUNS, TYPES, WORD_SERIES
from glmlens.text.tokenizer import Tokenizer


def draw_induction(draw: random.Random, tokenizer: Tokenizer | None) -> Item:
    words = require_vocabulary(tokenizer).list_words()
    length = draw.randrange(8, 21)
    if len(words) < 2 * length + 2:
        raise TaskError(f"induction repeats words of the vocabulary, and this one has {len(words)}")
    said = draw.sample(words, 2 * length + 1)
    first, fresh, other = said[:length], said[length:-1], said[-1]
    again = draw.randrange(1, length)  # words said for the second time
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
    made = item(template, slots, first[again], draw.choice([w for w in first if w != first[again]]),
                fresh=new, copied={"copied": other})  # fmt: skip
    named = ("previous", "copied", "current")
    return Item(select_spans(made.prompt, named), made.correct, made.wrong,
                {name: select_spans(said, named) for name, said in made.counterfactuals.items()},
                {"length": str(length), "again": str(again)})  # fmt: skip


def require_vocabulary(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise TaskError("this task is made of what a tokenizer has: it needs one")
    return tokenizer


def select_spans(prompt: TextWithSpans, part_names: tuple[str, ...]) -> TextWithSpans:
    return TextWithSpans(prompt.text, {name: prompt.spans[name] for name in part_names})


induction = Task(
    "induction",
    draw_induction,
    {
        "fresh": "the first time other words are said: nothing to copy",
        "copied": "the word to copy is another, which was said nowhere else",
    },
    "Repeated random tokens: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits); Olsson et al. "
    "2022, arXiv 2209.11895",
)

WAR_TEMPLATE = "The {event} lasted from the year {start} to the year "


def draw_greater_than(draw: random.Random, tokenizer: Tokenizer | None) -> Item:
    """The prompt ends after the century, or after the first token that goes beyond it.

    Whatever a tokenizer makes of digits: right answers begin only later years, wrong ones only the start year or
    earlier ones; a token that begins both (a decade, to a tokenizer of single digits) is neither.
    """
    event, another = draw.sample(EVENTS, 2)
    century, year = draw.randrange(11, 20), draw.randrange(2, 98)
    start = f"{century}{year:02}"
    tokenizer = require_vocabulary(tokenizer)
    years = [f"{century}{y:02}" for y in range(100)]
    pieces = {later: tokenizer.decode_each(tokenizer.encode_continuation(later)) for later in years}
    shown = ""
    for piece in pieces[start]:
        if len(shown) >= 2:
            break
        shown += piece
    answers: tuple[set[str], set[str]] = (set(), set())
    for later, spelt in pieces.items():
        head = [i for i in range(len(spelt)) if "".join(spelt[:i]) == shown]
        if head:
            answers[later <= start].add(spelt[head[0]])
    both = answers[0] & answers[1]
    slots = {"event": event, "start": start}
    first = f"{shown}01"[:4] if len(shown) == 2 else f"{shown}0"
    return item(WAR_TEMPLATE + shown, slots, sorted(answers[0] - both), sorted(answers[1] - both),
                first={"start": first}, event={"event": another})  # fmt: skip


greater_than = Task(
    "greater_than",
    draw_greater_than,
    {
        "first": "the first year of its century (or decade): every end is later",
        "event": "another event: the answers stay",
    },
    "Greater-than: Hanna et al. 2023, arXiv 2305.00586, sections 2 and 3",
    PROBABILITY_DIFFERENCE,
)

DEF_TEMPLATE = 'def {function}(self, {def1}, {def2}, {def3}):\n    """{verb} the {what}.\n\n'
PARAMS_TEMPLATE = "    :param {doc1}: {about1}\n    :param {doc2}: {about2}\n    :param"


def draw_docstring(draw: random.Random, _: Tokenizer | None = None) -> Item:
    a, b, c, d, e, f = draw.sample(ARGUMENTS, 6)
    function, verb = draw.choice(FUNCTIONS), draw.choice(FUNCTIONS).capitalize()
    about = [f"{draw.choice(ADJECTIVES)} {draw.choice(TYPES)}" for _ in range(3)]
    slots = {"function": function, "verb": verb, "what": about[2], "about1": about[0], "about2": about[1]}
    slots |= {"def1": a, "def2": b, "def3": c, "doc1": a, "doc2": b}
    return item(
        DEF_TEMPLATE + PARAMS_TEMPLATE,
        slots,
        f" {c}",
        [f" {a}", f" {b}"],
        random_def={"def1": d, "def2": e, "def3": f},
        random_doc={"doc1": d, "doc2": e},
        random_answer={"def3": d},
    )


docstring = Task(
    "docstring",
    draw_docstring,
    {
        "random_def": "the signature has other arguments",
        "random_doc": "the docstring describes other arguments",
        "random_answer": "the third argument of the signature is another",
    },
    "Docstring arguments: Heimersheim and Janiak 2023 (A circuit for Python docstrings in a 4-layer attention-only "
    "transformer, Alignment Forum)",
)


def draw_successor(draw: random.Random, _: Tokenizer | None = None) -> Item:
    kind = draw.choice(list(WORD_SERIES))
    series = WORD_SERIES[kind]
    shown = draw.randrange(3, min(6, len(series) - 2) + 1)
    start = draw.randrange(1, len(series) - shown)
    words, earlier = series[start : start + shown], series[start - 1 : start + shown - 1]
    mixed = words[1:-1] + words[:1]
    template = ", ".join([f"{{w{i}}}" for i in range(shown - 1)] + ["{last}"]) + ","
    names = [f"w{i}" for i in range(shown - 1)] + ["last"]
    return item(
        template,
        {**dict(zip(names, words, strict=True)), "kind": kind},
        f" {series[start + shown]}",
        f" {words[-1]}",
        earlier=dict(zip(names, earlier, strict=True)),
        mixed=dict(zip(names, mixed, strict=False)),
    )


successors = Task(
    "successors",
    draw_successor,
    {
        "earlier": "the series one step earlier: what was last is right",
        "mixed": "the first word comes just before the last",
    },
    "Successors: Gould et al. 2023, arXiv 2312.09230",
)


def draw_brackets(draw: random.Random, tokenizer: Tokenizer | None = None) -> Item:
    """A Dyck text that is not yet closed."""
    open_: list[tuple[int, str]] = []
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
        return draw_brackets(draw)
    (outer, _), (inner, bracket) = open_[-2], open_[-1]
    another = draw.choice([b for b in BRACKETS if b != bracket])
    outside = draw.choice([b for b in BRACKETS if b != out[outer]])
    slots = {"outer": out[outer], "open": bracket}
    template = " ".join(
        "{open}" if i == inner else "{outer}" if i == outer else part.replace("{", "{{").replace("}", "}}")
        for i, part in enumerate(out)
    )
    wrong = [f" {BRACKETS[b]}" for b in (another, *BRACKETS) if b != bracket]
    return item(template, {**slots, "text": " ".join(out)}, f" {BRACKETS[bracket]}", list(dict.fromkeys(wrong)),
                open={"open": another}, outer={"outer": outside})  # fmt: skip


brackets = Task(
    "brackets",
    draw_brackets,
    {
        "open": "the innermost open bracket is of another kind: a wrong answer is right",
        "outer": "the bracket around it is of another kind: the answer stays",
    },
    "Closing brackets: bounded Dyck languages, Hewitt et al. 2020, arXiv 2010.07515",
)


def draw_addition(draw: random.Random, tokenizer: Tokenizer | None = None) -> Item:
    a, b = draw.randrange(10), draw.randrange(10)
    others = [(draw.randrange(10), draw.randrange(10)) for _ in range(draw.randrange(1, 4))]
    before = "".join(f"{x}+{y}={x + y}, " for x, y in others)
    another = draw.choice([x for x in range(10) if x != a and len(str(x + b)) == len(str(a + b))] or [(a + 1) % 10])
    second = draw.choice([y for y in range(10) if y != b])
    return item(before + "{a}+{b}=", {"a": str(a), "b": str(b), "before": before}, str(a + b), str(another + b),
                a={"a": str(another)}, b={"b": str(second)})  # fmt: skip


addition = Task(
    "addition",
    draw_addition,
    {"a": "another first number: the wrong answer is right", "b": "another second number"},
    "Addition of small numbers: Nanda et al. 2023, arXiv 2301.05217; Stolfo et al. 2023, arXiv 2305.15054",
)
