"""The words of the tasks. With the space before it, each is one token in most vocabularies."""

PERSON_NAMES = {
    "he": "John Tom Paul Mark Jack Bob Sam Ben Max Leo Adam Carl Dan Eric Fred Greg Hugo Ivan Karl Luke".split(),
    "she": (
        "Mary Anna Kate Lucy Emma Alice Rose Jane Sara Lily Amy Beth Cora Dora Ella Fay Gina Ida Julia Nora"
    ).split(),
}
PLACE_NOUNS = "store park school market station garden library river beach farm office cafe museum house".split()
THING_NOUNS = "drink book ball ring basket letter flower apple cake map lamp box coin hat key bell".split()
GIVING_VERBS = "gave handed passed sent brought offered".split()
COUNTRIES = {  # country: (capital, language, continent)
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
NOUNS = {  # singular: plural
    "cat": "cats", "dog": "dogs", "bird": "birds", "horse": "horses", "boy": "boys", "girl": "girls",
    "farmer": "farmers", "teacher": "teachers", "child": "children", "man": "men", "woman": "women", "king": "kings",
}  # fmt: skip
PREPOSITIONS = "near behind with above beside under".split()
# singular: plural
VERBS = {"is": "are", "was": "were", "has": "have", "runs": "run", "sees": "see", "likes": "like"}
EVENTS = "war storm journey project voyage feast trial reign siege search".split()
GOOD_ADJECTIVES = "lovely wonderful great bright sweet kind".split()
BAD_ADJECTIVES = "awful terrible cruel dark bitter mean".split()
WORD_SERIES = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months": (
        "January February March April May June July August September October November December"
    ).split(),
    "numbers": "one two three four five six seven eight nine ten eleven twelve".split(),
    "letters": list("ABCDEFGHIJKLMNOP"),
    "ranks": "first second third fourth fifth sixth seventh eighth".split(),
}  # fmt: skip
ARGUMENTS = "files names size colour width height path mode text index value limit score label count".split()
FUNCTIONS = "load save open find sort draw make read send move".split()
TYPES = "list string number table word line".split()
ADJECTIVES = "old small red new quiet tall".split()
# opening: closing
BRACKETS = {"(": ")", "[": "]", "{": "}"}
