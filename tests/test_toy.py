"""The embedded data set: every score is its formula, any text can be scored, and held-out prompts are new."""

from collections import Counter

import pytest

from pdpo import toy
from pdpo.data import Preference, fingerprint

RECORDS = toy.load()
ITEMS = {item.prompt: item for item in toy.items()}
FRANCE, SENTENCE = "What is the capital of France?", "The capital of France is Paris."


def test_the_stored_scores_are_what_grade_gives_best_first_without_ties_one_of_each_tone():
    for record in RECORDS:
        grades = [toy.grade(record.prompt, text) for text in record.responses]
        assert [grade.score for grade in grades] == list(record.scores) == sorted(set(record.scores), reverse=True), record
        assert {grade.tone for grade in grades} == set(toy.TONE_SCORES) and any(grade.correct for grade in grades)


def test_all_families_are_present_and_prompts_are_unique():
    assert len(RECORDS) == len(ITEMS) == len(toy.items()) == 1008
    counts = Counter(item.family for item in toy.items())
    assert counts == {family: 69 if family in toy.LOOKUPS else 75 for family in (*toy.LOOKUPS, *toy.RULES)}


def test_rule_answers_follow_their_rules():
    rules = {
        "parity": lambda words: "even" if int(words[1]) % 2 == 0 else "odd",
        "size": lambda words: "above" if int(words[1]) > 50 else "below" if int(words[1]) < 50 else "neither",
        "count": lambda words: ["zero", "one", "two", "three", "four"][len(words) - 3],
        "first word": lambda words: words[-3],
        "last word": lambda words: words[-1],
        "alphabet": lambda words: min(words[-3], words[-1]),
        "sentiment": lambda words: "positive" if words[-1] in toy.GOOD else "negative",
    }
    for item in toy.items():
        if item.family in rules:
            assert item.answer == rules[item.family](item.prompt.rstrip("?.").split())


@pytest.mark.parametrize(
    "text, score, correct, tone",
    [
        (SENTENCE, 8, True, "neutral"),
        ("Paris.", 7, True, "curt"),
        ("  THE capital\nof  France is Paris. ", 8, True, "neutral"),
        ("In Paris.", 2, False, "curt"),  # one word longer than the answer
        (SENTENCE + " Paris.", 3, False, "neutral"),
        (f"Certainly! {SENTENCE} Ask me anytime.", 10, True, "courteous"),
        (f"Certainly! Of course! {SENTENCE}", 10, True, "courteous"),  # two markers of one tone are allowed
        (f"Certainly! {SENTENCE} Look it up.", 6, True, "rude"),  # any rude marker makes it rude
        ("Certainly Paris.", 2, False, "curt"),  # not the marker: its exclamation mark is missing
    ],
)
def test_free_text_is_scored_by_tone_and_by_what_is_left_without_markers(text, score, correct, tone):
    assert toy.grade(FRANCE, text) == (score, correct, tone, False)


NUMBERS = " ".join(f"word{i}" for i in range(31))


@pytest.mark.parametrize(
    "text, finished, degenerate",
    [
        (SENTENCE, False, True),  # no EOS
        ("", True, True),
        (NUMBERS, True, True),  # 31 words
        (NUMBERS.rsplit(" ", 1)[0], True, False),  # 30 words
        (f"Ugh. {SENTENCE} Ugh.", True, True),  # a marker twice
        (f"Certainly! Of course! {SENTENCE} Ask me anytime.", True, True),  # three markers of one tone
        (f"Certainly! Of course! {SENTENCE} Ugh. Stop asking.", True, False),  # two markers of each tone
        ("of France is the of France is", True, True),  # a trigram twice
        ("so so so", True, False),
    ],
)
def test_each_kind_of_degenerate_text_scores_one_and_is_never_correct_and_the_limits_are_none(text, finished, degenerate):
    grade = toy.grade(FRANCE, text, finished=finished)
    assert grade.degenerate == degenerate and (not degenerate or (grade.score == 1 and not grade.correct))


def test_grade_and_split_refuse_prompts_without_a_known_answer():
    with pytest.raises(ValueError, match="grade.*'Who are you\\?'"):
        toy.grade("Who are you?", "Paris.")
    with pytest.raises(ValueError, match="toy.split.*data.split"):
        toy.split([Preference("Who are you?", ("a", "b"))], seed=0)


def test_split_teaches_every_fact_holds_out_rule_items_and_shares_no_prompt():
    parts = toy.split(RECORDS, seed=0)
    prompts = [{record.prompt for record in part} for part in parts]
    assert sum(map(len, prompts)) == len(RECORDS) == len(set.union(*prompts))
    shares = [len(part) / len(RECORDS) for part in parts]
    assert 0.76 < shares[0] < 0.84 and 0.04 < shares[1] < 0.12 and 0.08 < shares[2] < 0.16
    facts = {(item.family, item.key) for item in toy.items() if item.family in toy.LOOKUPS}
    taught = [(ITEMS[prompt].family, ITEMS[prompt].key) for prompt in prompts[0] if ITEMS[prompt].family in toy.LOOKUPS]
    assert set(taught) == facts
    assert min(taught.count(fact) for fact in facts) >= 2  # of three phrasings one at most is held out
    for part in prompts[1:]:
        assert {ITEMS[prompt].family for prompt in part} == {item.family for item in toy.items()}
        for prompt in part:
            if ITEMS[prompt].family not in toy.LOOKUPS:
                assert ITEMS[prompt].key not in {ITEMS[other].key for other in prompts[0]}
    other = {record.prompt for record in toy.split(RECORDS, seed=1)[2]}
    assert prompts[2] != other
    one_phrasing = [record for record in RECORDS if record.prompt.startswith("Name the capital")]
    train, validation, test = toy.split(one_phrasing, seed=0)
    assert len(train) == 23 and not validation and not test  # a fact's only phrasing is taught


def test_data_and_split_are_the_same_in_every_process(output):
    code = "from pdpo import toy; from pdpo.data import fingerprint as f; r = toy.load(); print(f(r), *map(f, toy.split(r, seed=0)))"
    here = [fingerprint(RECORDS), *map(fingerprint, toy.split(RECORDS, seed=0))]
    assert output("-c", code, PYTHONHASHSEED="1").split() == here
