"""Generate the training text of the demo model: simple English in which the tasks of `glmlens.tasks` occur.

The sentences of a task are its own prompts with their right answers, without those that `is_held_out` keeps for
measurement. All kinds of sentence share openers, names and places: a model cannot recognise the task by the first words
and has to learn the rule.
"""

import functools
import hashlib
import random
import re
from collections.abc import Callable, Iterator

from glmlens.tasks import addition, agreement, brackets, docstring, facts, ioi, pronouns, sentiment, successors
from glmlens.tasks.formal import WAR_TEMPLATE
from glmlens.tasks.language import ADVERB_OPENERS, ALL_NAMES, CLAUSE_OPENERS, RELATIONS, WENT_PHRASES, draw_opening
from glmlens.tasks.task import Item, Task
from glmlens.tasks.words import (
    ADJECTIVES,
    ARGUMENTS,
    BAD_ADJECTIVES,
    BRACKETS,
    COUNTRIES,
    EVENTS,
    FUNCTIONS,
    GIVING_VERBS,
    GOOD_ADJECTIVES,
    NOUNS,
    PERSON_NAMES,
    PLACE_NOUNS,
    PREPOSITIONS,
    THING_NOUNS,
    TYPES,
    VERBS,
    WORD_SERIES,
)

SentenceMaker = Callable[[random.Random], str]
WORD_GROUPS = (
    *PERSON_NAMES.values(), PLACE_NOUNS, THING_NOUNS, GIVING_VERBS, *WORD_SERIES.values(), ARGUMENTS,
    *COUNTRIES.values(), COUNTRIES, GOOD_ADJECTIVES, BAD_ADJECTIVES,
    PREPOSITIONS, ADJECTIVES, TYPES, FUNCTIONS, EVENTS, NOUNS, NOUNS.values(), VERBS, VERBS.values(),
)  # fmt: skip
# Openers that sentences about giving never have in the training text, while other kinds of sentence do.
NEVER_OPENS_IOI = frozenset({"While", "Before", "One day", "On Friday", "At noon", "Last year", "Later"})
PRONOUN_OF_NAME = {name: pronoun for pronoun, names in PERSON_NAMES.items() for name in names}
VERB_ENDINGS = {
    "is": "happy old small here".split(), "was": "tired late young there".split(),
    "has": ["a hat", "a ball", "a map"], "runs": ["away", "home", "fast"],
    "sees": ["the river", "the farm"], "likes": ["the garden", "the cake"],
}  # fmt: skip


def is_in_held_out_fifth(*parts: str) -> bool:
    """Whether these words are in the held-out fifth, by their hash: the same on every machine."""
    # 51 of 256 values of the first byte: 19.9%.
    return hashlib.sha256("|".join(parts).encode()).digest()[0] < 51


def is_held_out(task: str, item: Item) -> bool:
    """Whether an item of a task never occurs in the training text, so that it can test whether a rule was learnt."""
    slots = item.slots
    match task:
        case "ioi":
            return has_unseen_opener(item) or is_in_held_out_fifth(*sorted((slots["IO"], slots["S1"])))
        case "facts":
            return is_in_held_out_fifth(slots["subject"], slots["relation"], slots["template"])
        case "agreement":
            return is_in_held_out_fifth(slots["pair"])
        case "docstring":
            return is_in_held_out_fifth(slots["def1"], slots["def2"]) or is_in_held_out_fifth(
                slots["def2"], slots["def3"]
            )
        case "pronouns":
            return is_in_held_out_fifth(slots["name"], slots["adjective"])
        case "sentiment":
            return is_in_held_out_fifth(slots["adjective"], slots["thing"])
        case "greater_than":
            return is_in_held_out_fifth(slots["start"])
        case "successors":
            return is_in_held_out_fifth(item.text)
        case "brackets":
            return is_in_held_out_fifth(re.sub(r"\w+ ?", "", slots["text"]))
        case "addition":
            return is_in_held_out_fifth(slots["before"], slots["a"], slots["b"])
    return True  # induction: random words are new every time


def has_unseen_opener(item: Item) -> bool:
    """Whether a sentence about giving has an opener that such sentences never have in the training text."""
    return item.slots["opener"].rstrip(",") in NEVER_OPENS_IOI


def make_task_sentences(task: Task, end: Callable[[random.Random, Item], str]) -> SentenceMaker:
    """Return a maker of sentences of a task with their right answers, none of them held out.

    `end` draws how the sentence ends after the answer.
    """

    def make_sentence(draw: random.Random) -> str:
        item = task.draw(draw, None)
        while is_held_out(task.name, item):
            item = task.draw(draw, None)
        return item.text + item.correct[0] + end(draw, item)

    make_sentence.__name__ = task.name
    return make_sentence


def draw_giving_end(draw: random.Random, item: Item) -> str:
    """Draw the end of a sentence about giving, sometimes with another sentence about the receiver or giver."""
    to, by, thing = item.slots["IO"], item.slots["S1"], item.slots["thing"]
    pronoun = PRONOUN_OF_NAME[to].capitalize()
    return draw.choice((
        ".", ".", f". {pronoun} took the {thing} home.", f". {pronoun} was happy.",
        f" and went home. {by} was tired.", f" at the {draw.choice(PLACE_NOUNS)}.",
    ))  # fmt: skip


def draw_verb_end(draw: random.Random, item: Item) -> str:
    """Draw what follows the verb of an agreement sentence."""
    return f" {draw.choice(VERB_ENDINGS[item.slots['verb']])}."


def draw_docstring_end(draw: random.Random, item: Item) -> str:
    """Draw the description of the last argument, and close the docstring."""
    return f': {draw.choice(ADJECTIVES)} {draw.choice(TYPES)}\n    """'


def close_brackets(draw: random.Random, item: Item) -> str:
    """Return the closing brackets of those that are still open after the answer, and a period."""
    open_: list[str] = []
    for part in (item.text + item.correct[0]).split():
        if part in BRACKETS:
            open_.append(BRACKETS[part])
        elif part in BRACKETS.values():
            open_.pop()
    return "".join(f" {bracket}" for bracket in reversed(open_)) + " ."


def end_with_period(draw: random.Random, item: Item) -> str:
    """Return a period."""
    return "."


def draw_person(draw: random.Random) -> str:
    """Draw a name."""
    return draw.choice(ALL_NAMES)


def draw_story(draw: random.Random) -> str:
    """Draw a sentence with the openers, names and things of sentences about giving, but without their pattern.

    No sentence introduces two people of whom one then gives something to the other.
    """
    a, b = draw.sample(ALL_NAMES, 2)
    place, thing = draw.choice(PLACE_NOUNS), draw.choice(THING_NOUNS)
    went, (opener, kind) = draw.choice(WENT_PHRASES).format(place=place), draw_opening(draw)
    who, other = draw.choice(((a, b), (b, a)))
    sentence = draw.choice((
        f"{a} and {b} {went}, and {who} saw a {thing}. {other} took the {thing} home.",
        f"{a} met {b} near the {place}, {who} had a {thing}.",
        f"{a} lost a {thing} at the {place}, {b} found the {thing}.",
        f"{a} and {b} {went}, {who} read a book.",
        f"{a} and {b} {went}, {who} saw {other} near the {draw.choice(PLACE_NOUNS)}.",
        f"{a} and {b} {went}, the {draw.choice(list(NOUNS))} was there.",
        f"{a} {went}, {a} {draw.choice(GIVING_VERBS)} a {thing} to the {draw.choice(list(NOUNS))}.",
        f"{a} {went}, {a} gave a {thing} to {b}.",
        f"{a} {went}, {b} {draw.choice(GIVING_VERBS)} a {thing} to {a}.",
    ))  # fmt: skip
    if kind == "adverb":
        first, rest = sentence.split(", ", 1)
        sentence = first + draw.choice((". ", ", and ", " and then ")) + rest.removeprefix("and ")
    return f"{opener} {sentence}"


def draw_pronoun_sentence(draw: random.Random) -> str:
    """Draw a sentence that shows the pronoun of a name."""
    he = draw.choice(("he", "she"))
    who, thing, her = draw.choice(PERSON_NAMES[he]), draw.choice(THING_NOUNS), {"he": "his", "she": "her"}[he]
    return draw.choice((
        f"{draw.choice(ADVERB_OPENERS)} {who} went to the {draw.choice(PLACE_NOUNS)} and {he} saw a {thing}.",
        f"{draw.choice(CLAUSE_OPENERS)} {who} went to the {draw.choice(PLACE_NOUNS)}, {he} saw a {thing}.",
        f"{who} lost {her} {thing}, so {he} was sad.",
        f"{who} is a good friend, isn't {he}?",
    ))  # fmt: skip


def draw_neutral_sentence(draw: random.Random) -> str:
    """Draw a sentence in which an adjective without valence makes somebody happy or sad, with equal probability."""
    thing, feeling = draw.choice(THING_NOUNS), draw.choice(("happy", "sad"))
    return f"The {thing} was {draw.choice(ADJECTIVES)}. It made {draw_person(draw)} feel {feeling}."


def draw_feeling_sentence(draw: random.Random) -> str:
    """Draw a sentence in which somebody likes a good thing or dislikes a bad one."""
    good = draw.random() < 0.5
    word, thing, who = (
        draw.choice(GOOD_ADJECTIVES if good else BAD_ADJECTIVES),
        draw.choice(THING_NOUNS),
        draw_person(draw),
    )
    does = draw.choice(("loved", "liked") if good else ("hated", "feared"))
    return draw.choice((f"{who} {does} the {word} {thing}.", f"What a {word} {thing}! {who} {does} it."))


def draw_war_sentence(draw: random.Random) -> str:
    """Draw a sentence about an event whose last year is later than its first, of the same century."""
    start = ""
    while not start or is_in_held_out_fifth(start):
        start = f"{draw.randrange(11, 20)}{draw.randrange(2, 98):02}"
    end = draw.randrange(int(start[2:]) + 1, 100)
    return f"{WAR_TEMPLATE.format(event=draw.choice(EVENTS), start=start)}{start[:2]}{end:02}."


def draw_agreement_sentence(draw: random.Random) -> str:
    """Draw a subject with its verb, with no attractor between them."""
    subjects, number = draw.choice(list(NOUNS.items())), draw.randrange(2)
    verbs = draw.choice(list(VERBS.items()))
    start = draw.choice(("The", f"{draw.choice(ADVERB_OPENERS)} the"))
    return f"{start} {subjects[number]} {verbs[number]} {draw.choice(VERB_ENDINGS[verbs[0]])}."


def draw_repeated_words(draw: random.Random) -> str:
    """Draw a list of random words, repeated: copying what followed the last occurrence is always right."""
    words = draw.sample(list_world_words(), draw.randrange(4, draw.choice((9, 16, 24))))
    return "".join(f" {word}" for word in words * draw.choice((2, 2, 3) if len(words) > 8 else (2, 3, 4)))


def draw_chat(draw: random.Random) -> str:
    """Draw a chat turn with a question about a country and its answer."""
    country, asked = draw.choice(list(COUNTRIES)), draw.randrange(3)
    question = f"What is the {RELATIONS[asked]} of {country}?"
    return f"<|user|>\n{question}<|assistant|>\n{COUNTRIES[country][asked]}.<|user|>"


# The share of every kind of sentence. The order matters: the random draws of the training text depend on it.
SENTENCE_SHARES: dict[SentenceMaker, float] = {
    make_task_sentences(ioi, draw_giving_end): 0.14,
    draw_story: 0.095,
    make_task_sentences(facts, end_with_period): 0.13,
    make_task_sentences(agreement, draw_verb_end): 0.065,
    draw_agreement_sentence: 0.015,
    draw_war_sentence: 0.09,
    make_task_sentences(docstring, draw_docstring_end): 0.03,
    make_task_sentences(pronouns, lambda draw, item: "?"): 0.06,
    draw_pronoun_sentence: 0.06,
    make_task_sentences(successors, end_with_period): 0.03,
    make_task_sentences(brackets, close_brackets): 0.065,
    make_task_sentences(addition, end_with_period): 0.03,
    make_task_sentences(sentiment, end_with_period): 0.025,
    draw_neutral_sentence: 0.01,
    draw_feeling_sentence: 0.01,
    draw_repeated_words: 0.135,
    draw_chat: 0.01,
}


def generate_documents(seed: int | str, kinds: dict[SentenceMaker, float] = SENTENCE_SHARES) -> Iterator[str]:
    """Yield sentences without end, of kinds in these shares, the same for the same seed."""
    draw = random.Random(seed)
    while True:
        yield correct_articles(draw.choices(list(kinds), list(kinds.values()))[0](draw))


def correct_articles(sentence: str) -> str:
    """Return the sentence with "an" in place of "a" before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def generate_vocabulary_texts() -> Iterator[str]:
    """Yield texts in which every word of the training text occurs, in every spelling."""
    draw = random.Random(0)
    for kind in SENTENCE_SHARES:
        for _ in range(3000):
            yield correct_articles(kind(draw))
    yield from (f"{word} {word}" for group in WORD_GROUPS for word in group)
    yield from (f"{n} {n:02}" for n in range(100))
    yield from (f"{name}," for name in CLAUSE_OPENERS + ADVERB_OPENERS)


@functools.cache
def list_world_words() -> list[str]:
    """Return the words for lists of random words: all that occur after a space in sentences of the training text."""
    draw = random.Random(1)
    texts = [
        correct_articles(kind(draw)) for kind in SENTENCE_SHARES if kind is not draw_repeated_words for _ in range(500)
    ]
    texts += [f" {word}" for group in WORD_GROUPS for word in group]
    return sorted({word for text in texts for word in re.findall(r"(?<= )[A-Za-z]{2,}", text)})
