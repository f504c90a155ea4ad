"""Tasks in English: indirect objects, facts, subject-verb agreement, pronouns and sentiment."""

import random

from glmlens.tasks.task import Item, Task, item
from glmlens.tasks.words import (
    ADJECTIVES,
    BAD_ADJECTIVES,
    COUNTRIES,
    GIVING_VERBS,
    GOOD_ADJECTIVES,
    NOUNS,
    PERSON_NAMES,
    PLACE_NOUNS,
    PREPOSITIONS,
    THING_NOUNS,
    VERBS,
)
from glmlens.text.tokenizer import Tokenizer

ALL_NAMES = PERSON_NAMES["he"] + PERSON_NAMES["she"]
CLAUSE_OPENERS = (
    "When While After Before Once As Because".split()
)  # they open a subordinate clause, which ends with a comma
ADVERB_OPENERS = [
    "Then", "Later", "Yesterday", "Today", "Sometimes", "In the morning", "In the evening", "One day", "Last week",
    "At noon", "On Monday", "On Friday", "That day", "Last year", "At night", "Again", "Soon",
]  # fmt: skip
CLAUSE_JOINS = {"clause": [",", ", then", ", and"], "adverb": [".", ", and", " and then", " and", ". Then"]}
WENT_PHRASES = [
    "went to the {place}", "were at the {place}", "had lunch at the {place}", "got home from the {place}",
    "walked to the {place}", "were working at the {place}", "had a long walk near the {place}", "came to the {place}",
    "sat near the {place}", "played near the {place}",
]  # fmt: skip


def draw_opening(draw: random.Random) -> tuple[str, str]:
    """Draw the first words of a sentence; return them and their kind, "clause" or "adverb"."""
    if draw.random() < 0.4:
        return draw.choice(CLAUSE_OPENERS), "clause"
    return draw.choice(ADVERB_OPENERS) + draw.choice(("", ",")), "adverb"


def draw_ioi(draw: random.Random, _: Tokenizer | None = None) -> Item:
    """Draw a sentence in which one of two people gives the other a thing; the answer is who receives it.

    IO is the indirect object (the receiver), S1 and S2 the two mentions of the subject (the giver).
    """
    to, by, *others = draw.sample(ALL_NAMES, 5)
    opener, kind = draw_opening(draw)
    order = draw.choice(("ABBA", "BABA"))
    first = "{IO} and {S1}" if order == "ABBA" else "{S1} and {IO}"
    gave, thing = draw.choice(GIVING_VERBS), draw.choice(THING_NOUNS)
    article = "an" if thing[0] in "aeiou" else "a"
    went, join = draw.choice(WENT_PHRASES), draw.choice(CLAUSE_JOINS[kind])
    template = f"{{opener}} {first} {went}{join} {{S2}} {{verb}} {article} {{thing}} to"
    slots = {
        "opener": opener,
        "IO": to,
        "S1": by,
        "S2": by,
        "place": draw.choice(PLACE_NOUNS),
        "verb": gave,
        "thing": thing,
    }
    a, b, c = others
    return item(
        template,
        {**slots, "order": order, "went": went, "join": join},
        correct=f" {to}",
        wrong=f" {by}",
        flip={"S2": to},
        abc={"IO": a, "S1": b, "S2": c},
        names={"IO": a, "S1": b, "S2": b},
    )


ioi = Task(
    name="ioi",
    draw=draw_ioi,
    counterfactuals={
        "flip": "the second subject is the other name: right and wrong answer swap",
        "abc": "three different names: the sentence does not determine the answer",
        "names": "the same sentence about two other people",
    },
    source=(
        "Indirect object identification: Wang et al. 2022, arXiv 2211.00593, sections 2 and A; the flip is that of "
        "MIB, Mueller et al. 2025, arXiv 2504.13151"
    ),
)

FACT_TEMPLATES = [  # by relation; those of the first list name it in one word, which a counterfactual can exchange
    ["The {relation} of {subject} is", "In school we learn that the {relation} of {subject} is",
     "People say that the {relation} of {subject} is", "{opener} we learn that the {relation} of {subject} is"],
    ["The main city of {subject} is", "{subject} has its capital in", "The king of {subject} lives in",
     "If you visit {subject}, you will see"],
    ["In {subject} people speak", "Everyone in {subject} can read", "Children in {subject} learn"],
    ["{subject} is a country in", "The land of {subject} lies in", "You find {subject} on a map of"],
]  # fmt: skip
RELATIONS = ["capital", "language", "continent"]
PHRASINGS = [(template, kind) for kind in range(4) for template in FACT_TEMPLATES[kind]]


def draw_fact(draw: random.Random, _: Tokenizer | None = None) -> Item:
    """Draw a sentence about a country that ends before its capital, language or continent."""
    country = draw.choice(list(COUNTRIES))
    template, kind = draw.choice(PHRASINGS)
    asked = draw.randrange(3) if kind == 0 else kind - 1  # index of the relation in RELATIONS
    answer = COUNTRIES[country][asked]
    another = draw.choice([c for c, facts in COUNTRIES.items() if facts[asked] != answer])
    third = draw.choice([c for c in COUNTRIES if c not in (country, another)])
    slots = {
        "subject": country,
        "relation": RELATIONS[asked],
        "opener": draw.choice(ADVERB_OPENERS),
        "template": template,
    }
    changes = {"subject": {"subject": another}, "other": {"subject": third}}
    if kind == 0:
        changes["relation"] = {"relation": RELATIONS[(asked + draw.choice((1, 2))) % 3]}
    return item(template, slots, correct=f" {answer}", wrong=f" {COUNTRIES[another][asked]}", **changes)


facts = Task(
    name="facts",
    draw=draw_fact,
    counterfactuals={
        "subject": "another country: the wrong answer becomes right",
        "other": "a third country",
        "relation": "another relation of the same country (only in phrasings that name the relation)",
    },
    source=(
        "Facts about a subject: Meng et al. 2022, arXiv 2202.05262, section 2; relations as in Hernandez et al. 2023, "
        "arXiv 2308.09124"
    ),
)


def draw_agreement(draw: random.Random, _: Tokenizer | None = None) -> Item:
    """Draw a subject with another noun, the attractor, before the verb; the answer agrees with the subject."""
    subjects, attractors = (draw.choice(list(NOUNS.items())) for _ in range(2))
    number, other = draw.randrange(2), draw.randrange(2)
    verbs = draw.choice(list(VERBS.items()))
    start = draw.choice(("The", f"{draw.choice(ADVERB_OPENERS)} the"))
    between = draw.choice(PREPOSITIONS)
    slots = {"subject": subjects[number], "attractor": attractors[other], "preposition": between, "start": start}
    subject_changed = {"subject": subjects[1 - number]}
    attractor_changed = {"attractor": attractors[1 - other]}
    return item(
        "{start} {subject} {preposition} the {attractor}",
        {**slots, "pair": f"{subjects[0]} {attractors[0]}", "verb": verbs[0]},
        correct=f" {verbs[number]}",
        wrong=f" {verbs[1 - number]}",
        subject=subject_changed,
        attractor=attractor_changed,
        both={**subject_changed, **attractor_changed},
    )


agreement = Task(
    name="agreement",
    draw=draw_agreement,
    counterfactuals={
        "subject": "the subject in the other number: right and wrong answer swap",
        "attractor": "the attractor in the other number: the same answers",
        "both": "both nouns in the other number: right and wrong answer swap",
    },
    source=(
        "Subject-verb agreement with an attractor: Linzen et al. 2016, arXiv 1611.01368; counterfactuals as in "
        "Finlayson et al. 2021, arXiv 2106.06087"
    ),
)


def draw_pronoun(draw: random.Random, _: Tokenizer | None = None) -> Item:
    """Draw a tag question about a person; the answer is their pronoun."""
    he, she = draw.sample(("he", "she"), 2)
    who, same = draw.sample(PERSON_NAMES[he], 2)
    slots = {
        "name": who,
        "adjective": draw.choice(GOOD_ADJECTIVES),
        "noun": draw.choice(("friend", "person", "neighbor")),
    }
    template = "So {name} is such a {adjective} {noun}, isn't"
    changes = {"gender": {"name": draw.choice(PERSON_NAMES[she])}, "name": {"name": same}}
    return item(template, slots, correct=f" {he}", wrong=f" {she}", **changes)


pronouns = Task(
    name="pronouns",
    draw=draw_pronoun,
    counterfactuals={
        "gender": "a name of the other gender: right and wrong answer swap",
        "name": "another name of the same gender: the same answers",
    },
    source=(
        "Gendered pronouns: Mathwin et al. 2023 (Identifying a preliminary circuit for predicting gendered pronouns "
        "in GPT-2 small, Alignment Jam)"
    ),
)


def draw_sentiment(draw: random.Random, _: Tokenizer | None = None) -> Item:
    """Draw a thing with a good or bad adjective; the answer is how it makes a person feel."""
    feeling, other = draw.sample((("happy", GOOD_ADJECTIVES), ("sad", BAD_ADJECTIVES)), 2)
    who, somebody = draw.sample(ALL_NAMES, 2)
    thing = draw.choice(THING_NOUNS)
    slots = {"thing": thing, "adjective": draw.choice(feeling[1]), "name": who}
    return item(
        "The {thing} was {adjective}. It made {name} feel",
        slots,
        correct=f" {feeling[0]}",
        wrong=f" {other[0]}",
        valence={"adjective": draw.choice(other[1])},
        neutral={"adjective": draw.choice(ADJECTIVES)},
        name={"name": somebody},
    )


sentiment = Task(
    name="sentiment",
    draw=draw_sentiment,
    counterfactuals={
        "valence": "an adjective of the other valence: right and wrong answer swap",
        "neutral": "an adjective without valence",
        "name": "another person: the same answers",
    },
    source="Sentiment: Tigges et al. 2023, arXiv 2310.15154, section 2",
)
