"""A micro-world of simple English in which the field's tasks occur in running text.

The sentences of a task are that task's own prompts with their right answers, but never one that `held_out` keeps for
measuring. Openers, names and places are shared by all kinds of sentence: a model cannot tell the task from its first
words, and must learn the rule.
"""

import functools
import hashlib
import random
import re
from collections.abc import Callable, Iterator

from glmlens.tasks import addition, agreement, brackets, docstring, facts, ioi, pronouns, sentiment, successors
from glmlens.tasks.formal import WAR
from glmlens.tasks.language import ADVERB, CLAUSE, EVERYONE, RELATIONS, WENT, opening
from glmlens.tasks.task import Item, Task
from glmlens.tasks.words import (
    ADJECTIVES,
    ARGUMENTS,
    BAD,
    BRACKETS,
    COUNTRIES,
    EVENTS,
    FUNCTIONS,
    GAVE,
    GOOD,
    NAMES,
    NOUNS,
    PLACES,
    PREPOSITIONS,
    SERIES,
    THINGS,
    TYPES,
    VERBS,
)

Sentence = Callable[[random.Random], str]
GROUPS = (
    *NAMES.values(), PLACES, THINGS, GAVE, *SERIES.values(), ARGUMENTS, *COUNTRIES.values(), COUNTRIES, GOOD, BAD,
    PREPOSITIONS, ADJECTIVES, TYPES, FUNCTIONS, EVENTS, NOUNS, NOUNS.values(), VERBS, VERBS.values(),
)  # fmt: skip
NEVER_OPENS_IOI = frozenset({"While", "Before", "One day", "On Friday", "At noon", "Last year", "Later"})
PRONOUN = {name: pronoun for pronoun, names in NAMES.items() for name in names}
AFTER_VERB = {
    "is": "happy old small here".split(), "was": "tired late young there".split(),
    "has": ["a hat", "a ball", "a map"], "runs": ["away", "home", "fast"],
    "sees": ["the river", "the farm"], "likes": ["the garden", "the cake"],
}  # fmt: skip


def chosen(*parts: str) -> bool:
    """Whether these are among the fifth that is held out: the same on every machine."""
    return hashlib.sha256("|".join(parts).encode()).digest()[0] < 51


def held_out(task: str, item: Item) -> bool:
    """Whether the world never says this: kept for measuring whether the rule was learnt, or the fact as such."""
    slots = item.slots
    match task:
        case "ioi":
            return new_opener(item) or chosen(*sorted((slots["IO"], slots["S1"])))
        case "facts":
            return chosen(slots["subject"], slots["relation"], slots["template"])
        case "agreement":
            return chosen(slots["pair"])
        case "docstring":
            return chosen(slots["def1"], slots["def2"]) or chosen(slots["def2"], slots["def3"])
        case "pronouns":
            return chosen(slots["name"], slots["adjective"])
        case "sentiment":
            return chosen(slots["adjective"], slots["thing"])
        case "greater_than":
            return chosen(slots["start"])
        case "successors":
            return chosen(item.text)
        case "brackets":
            return chosen(re.sub(r"\w+ ?", "", slots["text"]))
        case "addition":
            return chosen(slots["before"], slots["a"], slots["b"])
    return True  # random words are new every time


def new_opener(item: Item) -> bool:
    """Whether this sentence about giving opens as none does in the world, where others do."""
    return item.slots["opener"].rstrip(",") in NEVER_OPENS_IOI


def of(task: Task, end: Callable[[random.Random, Item], str]) -> Sentence:
    """Sentences of a task with their right answers, none of them held out."""

    def sentence(draw: random.Random) -> str:
        item = task.draw(draw, None)
        while held_out(task.name, item):
            item = task.draw(draw, None)
        return item.text + item.correct[0] + end(draw, item)

    sentence.__name__ = task.name
    return sentence


def after_giving(draw: random.Random, item: Item) -> str:
    to, by, thing = item.slots["IO"], item.slots["S1"], item.slots["thing"]
    return draw.choice((
        ".", ".", f". {PRONOUN[to].capitalize()} took the {thing} home.", f". {PRONOUN[to].capitalize()} was happy.",
        f" and went home. {by} was tired.", f" at the {draw.choice(PLACES)}.",
    ))  # fmt: skip


def after_verb(draw: random.Random, item: Item) -> str:
    return f" {draw.choice(AFTER_VERB[item.slots['verb']])}."


def rest_of_docstring(draw: random.Random, item: Item) -> str:
    return f': {draw.choice(ADJECTIVES)} {draw.choice(TYPES)}\n    """'


def closing(draw: random.Random, item: Item) -> str:
    """What closes the brackets that are still open after the answer."""
    open_: list[str] = []
    for part in (item.text + item.correct[0]).split():
        if part in BRACKETS:
            open_.append(BRACKETS[part])
        elif part in BRACKETS.values():
            open_.pop()
    return "".join(f" {bracket}" for bracket in reversed(open_)) + " ."


def stop(draw: random.Random, item: Item) -> str:
    return "."


def anybody(draw: random.Random) -> str:
    return draw.choice(EVERYONE)


def story(draw: random.Random) -> str:
    """The same openers, names and things, and nobody gives to the other."""
    a, b = draw.sample(EVERYONE, 2)
    place, thing = draw.choice(PLACES), draw.choice(THINGS)
    went, (opener, kind) = draw.choice(WENT).format(place=place), opening(draw)
    who, other = draw.choice(((a, b), (b, a)))
    sentence = draw.choice((
        f"{a} and {b} {went}, and {who} saw a {thing}. {other} took the {thing} home.",
        f"{a} met {b} near the {place}, {who} had a {thing}.",
        f"{a} lost a {thing} at the {place}, {b} found the {thing}.",
        f"{a} and {b} {went}, {who} read a book.",
        f"{a} and {b} {went}, {who} saw {other} near the {draw.choice(PLACES)}.",
        f"{a} and {b} {went}, the {draw.choice(list(NOUNS))} was there.",
        f"{a} {went}, {a} {draw.choice(GAVE)} a {thing} to the {draw.choice(list(NOUNS))}.",
        f"{a} {went}, {a} gave a {thing} to {b}.",
        f"{a} {went}, {b} {draw.choice(GAVE)} a {thing} to {a}.",
    ))  # fmt: skip
    if kind == "adverb":
        first, rest = sentence.split(", ", 1)
        sentence = first + draw.choice((". ", ", and ", " and then ")) + rest.removeprefix("and ")
    return f"{opener} {sentence}"


def people(draw: random.Random) -> str:
    """Who is he and who is she."""
    he = draw.choice(("he", "she"))
    who, thing, her = draw.choice(NAMES[he]), draw.choice(THINGS), {"he": "his", "she": "her"}[he]
    return draw.choice((
        f"{draw.choice(ADVERB)} {who} went to the {draw.choice(PLACES)} and {he} saw a {thing}.",
        f"{draw.choice(CLAUSE)} {who} went to the {draw.choice(PLACES)}, {he} saw a {thing}.",
        f"{who} lost {her} {thing}, so {he} was sad.",
        f"{who} is a good friend, isn't {he}?",
    ))  # fmt: skip


def neutral(draw: random.Random) -> str:
    """What has no valence makes people happy or sad alike."""
    thing, feeling = draw.choice(THINGS), draw.choice(("happy", "sad"))
    return f"The {thing} was {draw.choice(ADJECTIVES)}. It made {anybody(draw)} feel {feeling}."


def feeling(draw: random.Random) -> str:
    good = draw.random() < 0.5
    word, thing, who = draw.choice(GOOD if good else BAD), draw.choice(THINGS), anybody(draw)
    does = draw.choice(("loved", "liked") if good else ("hated", "feared"))
    return draw.choice((f"{who} {does} the {word} {thing}.", f"What a {word} {thing}! {who} {does} it."))


def war(draw: random.Random) -> str:
    """An end comes after its beginning."""
    start = ""
    while not start or chosen(start):
        start = f"{draw.randrange(11, 20)}{draw.randrange(2, 98):02}"
    end = draw.randrange(int(start[2:]) + 1, 100)
    return f"{WAR.format(event=draw.choice(EVENTS), start=start)}{start[:2]}{end:02}."


def single(draw: random.Random) -> str:
    """A subject and its verb with nothing between."""
    subjects, number = draw.choice(list(NOUNS.items())), draw.randrange(2)
    verbs = draw.choice(list(VERBS.items()))
    start = draw.choice(("The", f"{draw.choice(ADVERB)} the"))
    return f"{start} {subjects[number]} {verbs[number]} {draw.choice(AFTER_VERB[verbs[0]])}."


def repeated(draw: random.Random) -> str:
    """Random words said twice or more, so that to copy what followed last time is always right."""
    words = draw.sample(words_of_the_world(), draw.randrange(4, draw.choice((9, 16, 24))))
    return "".join(f" {word}" for word in words * draw.choice((2, 2, 3) if len(words) > 8 else (2, 3, 4)))


def chat(draw: random.Random) -> str:
    country, asked = draw.choice(list(COUNTRIES)), draw.randrange(3)
    question = f"What is the {RELATIONS[asked]} of {country}?"
    return f"<|user|>\n{question}<|assistant|>\n{COUNTRIES[country][asked]}.<|user|>"


KINDS: dict[Sentence, float] = {
    of(ioi, after_giving): 0.14, story: 0.095, of(facts, stop): 0.13, of(agreement, after_verb): 0.065, single: 0.015,
    war: 0.09, of(docstring, rest_of_docstring): 0.03, of(pronouns, lambda draw, item: "?"): 0.06, people: 0.06,
    of(successors, stop): 0.03, of(brackets, closing): 0.065, of(addition, stop): 0.03, of(sentiment, stop): 0.025,
    neutral: 0.01, feeling: 0.01, repeated: 0.135, chat: 0.01,
}  # fmt: skip


def documents(seed: int | str, kinds: dict[Sentence, float] = KINDS) -> Iterator[str]:
    """Texts without end, of kinds in these shares, the same for the same seed."""
    draw = random.Random(seed)
    while True:
        yield written(draw.choices(list(kinds), list(kinds.values()))[0](draw))


def written(sentence: str) -> str:
    """The sentence as people write it: "an" before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def everything() -> Iterator[str]:
    """Texts in which every word of the world occurs."""
    draw = random.Random(0)
    for kind in KINDS:
        for _ in range(3000):
            yield written(kind(draw))
    yield from (f"{word} {word}" for group in GROUPS for word in group)
    yield from (f"{n} {n:02}" for n in range(100))
    yield from (f"{name}," for name in CLAUSE + ADVERB)


@functools.cache
def words_of_the_world() -> list[str]:
    """The words that are repeated at random: all that stand in the middle of a sentence of this world."""
    draw = random.Random(1)
    texts = [written(kind(draw)) for kind in KINDS if kind is not repeated for _ in range(500)]
    texts += [f" {word}" for group in GROUPS for word in group]
    return sorted({word for text in texts for word in re.findall(r"(?<= )[A-Za-z]{2,}", text)})
