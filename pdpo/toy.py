"""The embedded data set `toy`: short instructions whose every answer can be scored, so that the truth is known.

Fourteen families of questions. Seven are lookups (23 facts in three phrasings each): a phrasing may be held out, so each
fact is taught and each held-out prompt is new. Seven are rules (75 items each): whole items are held out. Every prompt has
four responses, one in each tone, each correct with probability 0.7 (at least one is):

    score = 1 + 5 * correct + tone        tone: courteous 4, neutral 2, curt 1, rude 0        so 1 to 10, without ties

`grade` scores any text by the same formula: the tone from its marker phrases, correctness from what is left."""

import functools
import random
import re
from typing import NamedTuple

TONE_SCORES = {"courteous": 4, "neutral": 2, "curt": 1, "rude": 0}
COURTEOUS_OPENERS = ("Certainly!", "Of course!", "Happy to help.")
COURTEOUS_CLOSERS = ("I hope this helps.", "Ask me anytime.")
RUDE_OPENERS = ("Ugh.", "Obviously.", "Silly question.")
RUDE_CLOSERS = ("Stop asking.", "Look it up.", "Everyone knows that.")
MAX_WORDS = 30

LOOKUPS = {  # family: (three phrasings, reference sentence, "item answer, ..."); an item's spaces are written as _
    "capital": (
        ("What is the capital of {}?", "Name the capital city of {}.", "Which city is the capital of {}?"),
        "The capital of {} is {}.",
        "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Greece Athens, Norway Oslo, Russia Moscow, "
        "China Beijing, Cuba Havana, Peru Lima, Kenya Nairobi, Austria Vienna, Ireland Dublin, Poland Warsaw, Portugal Lisbon, "
        "Germany Berlin, Sweden Stockholm, Canada Ottawa, Chile Santiago, Iran Tehran, Iraq Baghdad, Hungary Budapest",
    ),
    "antonym": (
        ("What is the opposite of {}?", "Give the antonym of {}.", "Which word means the opposite of {}?"),
        "The opposite of {} is {}.",
        "hot cold, big small, fast slow, up down, light dark, rich poor, hard soft, early late, open closed, full empty, "
        "young old, wet dry, happy sad, strong weak, tall short, noisy quiet, clean dirty, safe dangerous, cheap expensive, "
        "thick thin, deep shallow, brave cowardly, sharp blunt",
    ),
    "plural": (
        ("What is the plural of {}?", "Give the plural form of {}.", "How do you write more than one {}?"),
        "The plural of {} is {}.",
        "mouse mice, child children, foot feet, tooth teeth, goose geese, man men, woman women, ox oxen, leaf leaves, "
        "knife knives, wolf wolves, city cities, box boxes, baby babies, bus buses, dish dishes, hero heroes, life lives, "
        "shelf shelves, story stories, wife wives, loaf loaves, fox foxes",
    ),
    "past": (
        ("What is the past tense of {}?", "Give the past tense of {}.", "How do you say {} in the past?"),
        "The past tense of {} is {}.",
        "go went, eat ate, see saw, run ran, take took, write wrote, buy bought, think thought, sing sang, swim swam, "
        "fly flew, give gave, drink drank, break broke, speak spoke, bring brought, catch caught, teach taught, find found, "
        "know knew, grow grew, drive drove, sleep slept",
    ),
    "spelling": (
        ("Correct the spelling of {}.", "How is {} spelled correctly?", "Fix this misspelled word: {}."),
        "The correct spelling of {} is {}.",
        "freind friend, recieve receive, wierd weird, becuase because, tommorow tomorrow, seperate separate, "
        "definately definitely, untill until, beleive believe, adress address, goverment government, neccessary necessary, "
        "calender calendar, truely truly, wich which, thier their, freedum freedom, garantee guarantee, libary library, "
        "suprise surprise, enviroment environment, buisness business, restarant restaurant",
    ),
    "colour": (
        ("What colour is {}?", "Name the colour of {}.", "Which colour does {} have?"),
        "The colour of {} is {}.",
        "grass green, snow white, blood red, coal black, chocolate brown, butter yellow, a_banana yellow, a_lemon yellow, "
        "a_carrot orange, a_pumpkin orange, a_raven black, a_swan white, a_frog green, a_strawberry red, a_cucumber green, "
        "an_elephant grey, a_flamingo pink, a_tomato red, lavender purple, milk white, the_sky blue, mud brown, ash grey",
    ),
    "category": (
        ("What kind of thing is {}?", "Name the category of {}.", "Which group does {} belong to?"),
        "The category of {} is {}.",
        "a_robin bird, a_salmon fish, a_rose flower, an_oak tree, a_hammer tool, a_violin instrument, a_car vehicle, "
        "a_shirt clothing, a_chair furniture, an_apple fruit, an_onion vegetable, gold metal, a_beetle insect, "
        "a_cobra reptile, a_sparrow bird, a_trout fish, a_tulip flower, a_pine tree, a_saw tool, a_flute instrument, "
        "a_truck vehicle, a_coat clothing, a_pear fruit",
    ),
}
RULES = ("parity", "sentiment", "count", "first word", "last word", "alphabet", "size")
NUM_RULE_ITEMS = 75
WORDS = (
    "apple bread candle dragon engine flower garden horse island jacket kitten lemon mirror needle ocean paper queen river "
    "sugar table uncle water"
).split()
GOOD = "great lovely superb charming brilliant delightful wonderful excellent moving funny".split()
BAD = "awful boring terrible dull dreadful poor horrible tedious weak annoying".split()
THINGS = "film book song meal hotel play game trip show concert".split()


class Item(NamedTuple):
    """One prompt: its family, its key (facts and rule items that must be held out together share one), its answer."""

    family: str
    key: str
    prompt: str
    sentence: str
    answer: str


class Example(NamedTuple):
    """One prompt, its four responses, best first, and their scores."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]


class Grade(NamedTuple):
    """What `grade` finds in a text; score is 1 to 10 and is 1 for degenerate text."""

    score: float
    correct: bool
    tone: str
    degenerate: bool


def load() -> list[Example]:
    """All prompts with their four responses, best first, with scores; the same list on every machine."""
    rng = random.Random(20250211)
    answers_of = {}
    for item in items():
        answers_of.setdefault(item.family, {}).setdefault(item.answer, item)
    return [_responses(item, answers_of[item.family], rng) for item in items()]


def split(records: list, *, seed: int) -> tuple[list, list, list]:
    """Train (80 %), validation (8 %) and test (12 %): rules by item, lookups by phrasing.

    Args: records: `load()`, or any part of it; of any type with a `prompt`.
    Returns: Three lists; no prompt in two of them, and every fact of a lookup in the first."""
    by_key = {}
    for record in records:
        item = _items_by_prompt().get(record.prompt)
        if item is None:
            raise ValueError(f"toy.split: expected prompts of toy.load(), got {record.prompt!r}. Other data: data.split.")
        by_key.setdefault((item.family, item.key), []).append(record)
    rng = random.Random(seed)
    train, validation, test = [], [], []
    for (family, _), group in sorted(by_key.items()):
        group = rng.sample(group, len(group))
        # one phrasing in three of 60 % of the facts, or 20 % of the rule items: a fifth of the prompts in both cases
        held_out = group[: 1 if rng.random() < (0.6 if family in LOOKUPS else 0.2) else 0]
        if family in LOOKUPS and len(group) == 1:
            held_out = []  # the fact's only phrasing here: it is to be taught
        (validation if rng.random() < 0.4 else test).extend(held_out)
        train.extend(group[len(held_out) :])
    for part in (train, validation, test):
        rng.shuffle(part)  # families mixed, so that the first few prompts of a part stand for all
    return train, validation, test


def score(prompt: str, text: str) -> float:
    """The gold score of any text, 1 to 10: `grade(prompt, text).score`."""
    return grade(prompt, text).score


def grade(prompt: str, text: str, *, finished: bool = True) -> Grade:
    """Scores any text as an answer to one of the toy's prompts.

    Args: finished: False where sampling stopped without an EOS.
    Returns: Grade. Degenerate, with score 1: not finished, empty, over 30 words, a marker phrase twice, more than two markers
        of one tone, three words in a row repeated."""
    item = _items_by_prompt().get(prompt)
    if item is None:
        raise ValueError(f"toy.grade: expected a prompt of toy.load(), got {prompt!r}. Other prompts have no known answer.")
    words, counts = text.lower().split(), {}
    left = " " + " ".join(words) + " "
    for tone, markers in _MARKERS.items():
        for marker in markers:
            # whole phrases only, case and spacing aside
            left, counts[tone, marker] = re.subn(rf"(?<= ){re.escape(marker)}(?= )", "", left)
            left = " " + " ".join(left.split()) + " "
    left = left.strip()
    per_tone = {tone: sum(counts[tone, marker] for marker in markers) for tone, markers in _MARKERS.items()}
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    repeated = max(counts.values()) > 1 or max(per_tone.values()) > 2 or len(set(trigrams)) < len(trigrams)
    degenerate = not finished or not words or len(words) > MAX_WORDS or repeated
    correct = left in (item.sentence.lower(), item.answer.lower() + ".")
    tone = next((tone for tone in ("rude", "courteous") if per_tone[tone]), None)
    if tone is None:
        tone = "curt" if len(left.split()) <= len(item.answer.split()) + 1 else "neutral"
    return Grade(1.0 if degenerate else 1.0 + 5 * correct + TONE_SCORES[tone], correct and not degenerate, tone, degenerate)


@functools.cache
def items() -> tuple[Item, ...]:
    """Every prompt with its family and its right answer, in a fixed order."""
    found = []
    for family, (phrasings, sentence, pairs) in LOOKUPS.items():
        for pair in pairs.split(", "):
            item, answer = pair.replace("_", " ").rsplit(" ", 1)
            found += [Item(family, item, each.format(item), sentence.format(item, answer), answer) for each in phrasings]
    rng = random.Random(7)
    for family in RULES:
        made = {}
        while len(made) < NUM_RULE_ITEMS:
            prompt, sentence, answer = _made(family, rng)
            made[prompt] = Item(family, prompt, prompt, sentence, answer)
        found += made.values()
    return tuple(found)


@functools.cache
def _items_by_prompt() -> dict[str, Item]:
    return {item.prompt: item for item in items()}


def _made(family: str, rng: random.Random) -> tuple[str, str, str]:
    """A random item of a rule's family: prompt, reference sentence, answer."""
    if family == "parity":
        number = rng.randrange(10, 100)
        answer = "odd" if number % 2 else "even"
        return f"Is {number} odd or even?", f"The number {number} is {answer}.", answer
    if family == "sentiment":
        good = rng.random() < 0.5
        thing, word = rng.choice(THINGS), rng.choice(GOOD if good else BAD)
        answer = "positive" if good else "negative"
        return f"Is this positive or negative: the {thing} was {word}.", f"The review is {answer}.", answer
    if family == "count":
        words = rng.sample(WORDS, rng.randrange(1, 5))
        answer = ("one", "two", "three", "four")[len(words) - 1]
        return f"Count the words: {' '.join(words)}.", f"The number of words is {answer}.", answer
    if family in ("first word", "last word"):
        words = rng.sample(WORDS, 3)
        answer = words[0 if family == "first word" else -1]
        return f"What is the {family} of: {' '.join(words)}?", f"The {family} is {answer}.", answer
    if family == "alphabet":
        one, two = rng.sample(WORDS, 2)
        return f"Which comes first in the alphabet, {one} or {two}?", f"The first one is {min(one, two)}.", min(one, two)
    number = rng.choice([n for n in range(10, 100) if n != 50])  # the family "size"
    answer = "above" if number > 50 else "below"
    return f"Is {number} above or below 50?", f"The number {number} is {answer}.", answer


_MARKERS = {
    "courteous": tuple(marker.lower() for marker in COURTEOUS_OPENERS + COURTEOUS_CLOSERS),
    "rude": tuple(marker.lower() for marker in RUDE_OPENERS + RUDE_CLOSERS),
}


def _responses(item: Item, answers: dict[str, Item], rng: random.Random) -> Example:
    """Four responses to one prompt, one a tone, sorted by score; a wrong one gives another answer of the family."""
    correct = [rng.random() < 0.7 for _ in TONE_SCORES]
    if not any(correct):
        correct[rng.randrange(4)] = True
    scored = []
    for tone, is_correct in zip(TONE_SCORES, correct, strict=True):
        answer = item.answer if is_correct else rng.choice(sorted(answers.keys() - {item.answer}))
        sentence = item.sentence[: -len(item.answer) - 1] + answer + "."
        if tone == "courteous":
            text = f"{rng.choice(COURTEOUS_OPENERS)} {sentence} {rng.choice(COURTEOUS_CLOSERS)}"
        elif tone == "rude":
            text = f"{rng.choice(RUDE_OPENERS)} {sentence} {rng.choice(RUDE_CLOSERS)}"
        else:
            text = sentence if tone == "neutral" else answer.capitalize() + "."
        scored.append((1.0 + 5 * is_correct + TONE_SCORES[tone], text))
    scores, texts = zip(*sorted(scored, reverse=True), strict=True)
    return Example(item.prompt, texts, scores)
