"""A micro-world of simple English in which the field's tasks occur in running text.

Every sentence comes from a seeded generator, so that what is true in it is known token by token. Openers, names and
places are shared by all kinds of sentence: a model cannot tell the task from its first words.
"""

import random
import re
from collections.abc import Callable, Iterator

NAMES = {
    "he": "John Tom Paul Mark Jack Bob Sam Ben Max Leo Adam Carl Dan Eric Fred Greg Hugo Ivan Karl Luke".split(),
    "she": (
        "Mary Anna Kate Lucy Emma Alice Rose Jane Sara Lily Amy Beth Cora Dora Ella Fay Gina Ida Julia Nora"
    ).split(),
}
PLACES = "store park school market station garden library river beach farm office cafe museum house".split()
THINGS = "drink book ball ring basket letter flower apple cake map lamp box coin hat key bell".split()
VERBS = "gave handed passed sent brought offered".split()
OPENERS = (
    "When Then While After Before Later Yesterday Today Once Sometimes In_the_morning In_the_evening "
    "One_day Last_week At_noon On_Monday On_Friday That_day"
).split()
GOING = [
    "went to the {place}", "were at the {place}", "had lunch at the {place}", "got home from the {place}",
    "walked to the {place}", "were working at the {place}", "had a long walk near the {place}", "came to the {place}",
]  # fmt: skip

FACTS = {  # country: capital, language, continent
    "France": ("Paris", "French", "Europe"), "Spain": ("Madrid", "Spanish", "Europe"),
    "Italy": ("Rome", "Italian", "Europe"), "Germany": ("Berlin", "German", "Europe"),
    "Greece": ("Athens", "Greek", "Europe"), "Poland": ("Warsaw", "Polish", "Europe"),
    "Norway": ("Oslo", "Norwegian", "Europe"), "Sweden": ("Stockholm", "Swedish", "Europe"),
    "Finland": ("Helsinki", "Finnish", "Europe"), "Russia": ("Moscow", "Russian", "Europe"),
    "Hungary": ("Budapest", "Hungarian", "Europe"), "Portugal": ("Lisbon", "Portuguese", "Europe"),
    "Japan": ("Tokyo", "Japanese", "Asia"), "China": ("Beijing", "Chinese", "Asia"),
    "Korea": ("Seoul", "Korean", "Asia"), "Thailand": ("Bangkok", "Thai", "Asia"),
    "Vietnam": ("Hanoi", "Vietnamese", "Asia"), "Iran": ("Tehran", "Persian", "Asia"),
    "Nepal": ("Kathmandu", "Nepali", "Asia"), "Mongolia": ("Ulaanbaatar", "Mongolian", "Asia"),
    "Egypt": ("Cairo", "Arabic", "Africa"), "Kenya": ("Nairobi", "Swahili", "Africa"),
    "Somalia": ("Mogadishu", "Somali", "Africa"), "Rwanda": ("Kigali", "Rwandan", "Africa"),
}  # fmt: skip
ASKING = {
    0: [
        "The capital of {c} is", "{c} has its capital in", "The main city of {c} is", "People in {c} love the city of",
        "If you visit {c} , you will see", "The king of {c} lives in",
    ],
    1: ["The language of {c} is", "In {c} people speak", "Everyone in {c} can read", "Children in {c} learn"],
    2: ["{c} is a country in", "The land of {c} lies in", "{c} is a part of", "You find {c} on a map of"],
}  # fmt: skip
NOUNS = {
    "cat": "cats", "dog": "dogs", "bird": "birds", "horse": "horses", "boy": "boys", "girl": "girls",
    "farmer": "farmers", "teacher": "teachers", "child": "children", "man": "men", "woman": "women", "king": "kings",
}  # fmt: skip
PREPOSITIONS = "near behind with above beside under".split()
VERB_PAIRS = [("is", "are"), ("was", "were"), ("has", "have"), ("runs", "run"), ("sees", "see"), ("likes", "like")]
AFTER_VERB = {
    "is": "happy old small here".split(), "was": "tired late young there".split(),
    "has": ["a hat", "a ball", "a map"], "runs": ["away", "home", "fast"],
    "sees": ["the river", "the farm"], "likes": ["the garden", "the cake"],
}  # fmt: skip
EVENTS = "war storm journey project voyage feast trial reign siege search".split()
GOOD = "lovely wonderful great bright sweet kind".split()
BAD = "awful terrible cruel dark bitter mean".split()
SERIES = [
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
    "one two three four five six seven eight nine ten eleven twelve".split(),
    list("ABCDEFGHIJKLMNOP"),
    "first second third fourth fifth sixth seventh eighth".split(),
]
ARGUMENTS = "files names size colour width height path mode text index value limit score label count".split()
FUNCTIONS = "load save open find sort draw make read send move".split()
TYPES = "list string number table word line".split()
ADJECTIVES = "old small red happy quiet tall".split()

Sentence = Callable[[random.Random], str]


def name(draw: random.Random) -> str:
    return draw.choice(NAMES[draw.choice(("he", "she"))])


def two_names(draw: random.Random) -> tuple[str, str]:
    first = name(draw)
    return first, draw.choice([other for other in NAMES["he"] + NAMES["she"] if other != first])


def opener(draw: random.Random) -> str:
    return draw.choice(OPENERS).replace("_", " ")


def ioi(draw: random.Random) -> str:
    """Two people, one of them gives: the other receives (Wang et al. 2022, arXiv 2211.00593)."""
    a, b = two_names(draw)
    giver, other = draw.choice(((a, b), (b, a)))
    going = draw.choice(GOING).format(place=draw.choice(PLACES))
    comma = draw.choice((" ,", " ,", " , and", "", " and then"))
    return (
        f"{opener(draw)} {a} and {b} {going}{comma} {giver} {draw.choice(VERBS)} a {draw.choice(THINGS)} to {other} ."
    )


def story(draw: random.Random) -> str:
    """The same openers and names with no giving to the other."""
    a, b = two_names(draw)
    place, thing = draw.choice(PLACES), draw.choice(THINGS)
    return opener(draw) + " " + draw.choice((
        f"{a} and {b} went to the {place} . {a} saw a {thing} . {b} took the {thing} home .",
        f"{a} met {b} near the {place} , and {b} had a {thing} .",
        f"{a} lost a {thing} at the {place} , but {b} found the {thing} .",
        f"{a} and {b} sat in the {place} and {draw.choice((a, b))} read a book .",
        f"{a} {draw.choice(VERBS)} a {thing} to the {draw.choice(list(NOUNS))} at the {place} .",
    ))  # fmt: skip


def fact(draw: random.Random) -> str:
    country = draw.choice(list(FACTS))
    kind = draw.randrange(3)
    return f"{draw.choice(ASKING[kind]).format(c=country)} {FACTS[country][kind]} ."


def agreement(draw: random.Random) -> str:
    """The verb agrees with its subject, not with the nearer noun (Linzen et al. 2016, arXiv 1611.01368)."""
    subject, attractor = (draw.choice(list(NOUNS.items())) for _ in range(2))
    number, other = draw.randrange(2), draw.randrange(2)
    singular, plural = draw.choice(VERB_PAIRS)
    between = f" {draw.choice(PREPOSITIONS)} the {attractor[other]}" if draw.random() < 0.7 else ""
    start = draw.choice(("The", f"{opener(draw)} the"))
    return f"{start} {subject[number]}{between} {(singular, plural)[number]} {draw.choice(AFTER_VERB[singular])} ."


def greater_than(draw: random.Random) -> str:
    """An end comes after its beginning (Hanna et al. 2023, arXiv 2305.00586)."""
    century, start = draw.randrange(11, 20), draw.randrange(2, 98)
    end = draw.randrange(start + 1, 100)
    return f"The {draw.choice(EVENTS)} lasted from the year {century}{start:02} to the year {century}{end:02} ."


def docstring(draw: random.Random) -> str:
    """Parameters are described in the order of the signature (Heimersheim & Janiak 2023)."""
    args = draw.sample(ARGUMENTS, draw.choice((3, 3, 4)))
    lines = " ".join(f": param {arg} {draw.choice(ADJECTIVES)} {draw.choice(TYPES)}" for arg in args)
    return f"def {draw.choice(FUNCTIONS)} ( self , {' , '.join(args)} ) : {draw.choice(FUNCTIONS)} {lines} ."


def pronoun(draw: random.Random) -> str:
    he = draw.choice(("he", "she"))
    who, thing = draw.choice(NAMES[he]), draw.choice(THINGS)
    return draw.choice((
        f"So {who} is such a {draw.choice(GOOD)} friend , isn't {he} ?",
        f"{opener(draw)} {who} went to the {draw.choice(PLACES)} and {he} saw a {thing} .",
        f"{who} lost {('his', 'her')[he == 'she']} {thing} , so {he} was sad .",
    ))  # fmt: skip


def successor(draw: random.Random) -> str:
    series = draw.choice(SERIES)
    start = draw.randrange(len(series) - 3)
    n = draw.randrange(3, min(6, len(series) - start) + 1)
    return " ".join(series[start : start + n]) + " ."


def brackets(draw: random.Random) -> str:
    pairs, open_, out = ["()", "[]", "{}"], [], []
    for _ in range(draw.randrange(3, 7)):
        if open_ and draw.random() < 0.4:
            out.append(open_.pop())
        else:
            pair = draw.choice(pairs)
            out.append(pair[0])
            open_.append(pair[1])
            if draw.random() < 0.3:
                out.append(draw.choice(THINGS))
    return " ".join(out + open_[::-1]) + " ."


def addition(draw: random.Random) -> str:
    a, b = draw.randrange(10), draw.randrange(10)
    return f"{a} + {b} = {a + b} ."


def sentiment(draw: random.Random) -> str:
    good = draw.random() < 0.5
    word, thing = draw.choice(GOOD if good else BAD), draw.choice(THINGS)
    feels, does = (("happy", "loved"), ("sad", "hated"))[not good]
    who = name(draw)
    return draw.choice((
        f"The {thing} was {word} . It made {who} feel {feels} .",
        f"{who} {does} the {word} {thing} .",
        f"What a {word} {thing} ! {who} was {feels} .",
    ))  # fmt: skip


def repeated(draw: random.Random) -> str:
    """Random words said twice or more, so that to copy what followed last time is always right."""
    words = draw.sample(WORDS, draw.randrange(5, 25))
    return " ".join(words * draw.choice((2, 2, 3)))


def chat(draw: random.Random) -> str:
    country = draw.choice(list(FACTS))
    kind = draw.randrange(3)
    what = ("the capital", "the language", "the continent")[kind]
    return f"<|user|>\nWhat is {what} of {country} ?<|assistant|>\n{FACTS[country][kind]} .<|user|>"


KINDS: dict[Sentence, float] = {
    ioi: 0.17, story: 0.1, fact: 0.1, agreement: 0.09, greater_than: 0.07, docstring: 0.07, pronoun: 0.06,
    successor: 0.03, brackets: 0.05, addition: 0.03, sentiment: 0.04, repeated: 0.17, chat: 0.02,
}  # fmt: skip


REPEATING = {kind: 0.55 * share for kind, share in KINDS.items()} | {repeated: 0.5}


def documents(seed: int | str, kinds: dict[Sentence, float] = KINDS) -> Iterator[str]:
    """Texts without end, of kinds in these shares, the same for the same seed."""
    draw = random.Random(seed)
    while True:
        yield written(draw.choices(list(kinds), list(kinds.values()))[0](draw))


def written(sentence: str) -> str:
    """The sentence as people write it: no space before a stop, "an" before a vowel."""
    sentence = re.sub(r" ([,.?!])", r"\1", sentence)
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def everything() -> Iterator[str]:
    """Texts in which every word of the world occurs."""
    draw = random.Random(0)
    for kind in KINDS:
        for _ in range(3000):
            yield written(kind(draw))
    groups = [*NAMES.values(), PLACES, THINGS, VERBS, *SERIES, ARGUMENTS, *FACTS.values(), FACTS, GOOD, BAD]
    yield from (f"{word} {word}" for group in groups for word in group)
    yield from (f"{n} {n:02}" for n in range(100))


WORDS = sorted(NAMES["he"] + NAMES["she"] + PLACES + THINGS + VERBS + list(FACTS) + list(NOUNS) + EVENTS + ARGUMENTS)
