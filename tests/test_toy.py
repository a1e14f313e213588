"""The embedded data set: every score is its formula, any text can be scored, and held-out prompts are new."""

import pytest

from pdpo import toy
from pdpo.data import Preference, fingerprint

RECORDS = toy.load()
ITEMS = {item.prompt: item for item in toy.items()}
FAMILIES = {
    "capital", "antonym", "plural", "past", "spelling", "colour", "category",
    "parity", "sentiment", "count", "first word", "last word", "alphabet", "size",
}  # fmt: skip
FRANCE, SENTENCE = "What is the capital of France?", "The capital of France is Paris."


def tone_and_body(text: str) -> tuple[str, str]:
    """How the data was written, read back without `grade`: opener, sentence, closer; or a sentence; or a word."""
    for tone, openers, closers in (
        ("courteous", toy.COURTEOUS_OPENERS, toy.COURTEOUS_CLOSERS),
        ("rude", toy.RUDE_OPENERS, toy.RUDE_CLOSERS),
    ):
        for opener in openers:
            for closer in closers:
                if text.startswith(opener + " ") and text.endswith(" " + closer):
                    return tone, text[len(opener) + 1 : -len(closer) - 1]
    return ("curt" if len(text.split()) == 1 else "neutral"), text


# the records


def test_every_score_is_its_formula_and_what_grade_gives():
    for record in RECORDS:
        item = ITEMS[record.prompt]
        for text, score in zip(record.responses, record.scores, strict=True):
            tone, body = tone_and_body(text)
            correct = body == item.sentence or body.lower() == item.answer.lower() + "."
            assert score == 1 + 5 * correct + {"courteous": 4, "neutral": 2, "curt": 1, "rude": 0}[tone], (record, text)
            assert toy.grade(record.prompt, text) == (score, correct, tone, False)
            assert toy.score(record.prompt, text) == score


def test_every_record_has_the_four_tones_best_first_without_ties_and_one_correct_at_least():
    for record in RECORDS:
        assert {tone_and_body(text)[0] for text in record.responses} == set(toy.TONE_SCORES)
        assert list(record.scores) == sorted(set(record.scores), reverse=True) and len(record.scores) == 4
        assert any(toy.grade(record.prompt, text).correct for text in record.responses)


def test_about_seven_responses_in_ten_are_correct():
    correct = [toy.grade(record.prompt, text).correct for record in RECORDS for text in record.responses]
    assert 0.68 < sum(correct) / len(correct) < 0.74


def test_all_families_are_present_and_prompts_are_unique():
    assert len(RECORDS) == len(ITEMS) == len(toy.items()) == 1008
    counts = {}
    for item in toy.items():
        counts[item.family] = counts.get(item.family, 0) + 1
    assert counts == {family: 69 if family in toy.LOOKUPS else 75 for family in FAMILIES}


def test_lookup_answers():
    assert ITEMS["Name the capital city of Peru."].answer == "Lima" and ITEMS["What colour is a banana?"].answer == "yellow"


def test_rule_answers_follow_their_rules():
    for item in toy.items():
        words = item.prompt.rstrip("?.").split()
        if item.family == "parity":
            assert item.answer == ("even" if int(words[1]) % 2 == 0 else "odd")
        elif item.family == "size":
            assert int(words[1]) != 50 and item.answer == ("above" if int(words[1]) > 50 else "below")
        elif item.family == "count":
            assert item.answer == ["zero", "one", "two", "three", "four"][len(words) - 3]
        elif item.family == "first word":
            assert item.answer == words[-3]
        elif item.family == "last word":
            assert item.answer == words[-1]
        elif item.family == "alphabet":
            assert item.answer == sorted([words[-3], words[-1]])[0]
        elif item.family == "sentiment":
            assert item.answer == ("positive" if words[-1] in toy.GOOD else "negative")


# free text


@pytest.mark.parametrize(
    "text, score, correct, tone",
    [
        (SENTENCE, 8, True, "neutral"),
        ("Paris.", 7, True, "curt"),
        ("  THE capital\nof  France is Paris. ", 8, True, "neutral"),
        ("Paris", 2, False, "curt"),  # the full stop is part of the answer
        ("In Paris.", 2, False, "curt"),  # one word longer than the answer
        ("It is Paris.", 3, False, "neutral"),  # two words longer
        (SENTENCE + " Paris.", 3, False, "neutral"),
        (f"Certainly! {SENTENCE} Ask me anytime.", 10, True, "courteous"),
        (f"{SENTENCE} I hope this helps.", 10, True, "courteous"),
        ("happy to help. Paris.", 10, True, "courteous"),
        (f"Certainly! Of course! {SENTENCE}", 10, True, "courteous"),  # two markers of one tone are allowed
        (f"Ugh. {SENTENCE} Stop asking.", 6, True, "rude"),
        (f"Certainly! {SENTENCE} Look it up.", 6, True, "rude"),  # any rude marker makes it rude
        ("Obviously. The capital of France is Rome. Look it up.", 1, False, "rude"),
        ("Certainly Paris.", 2, False, "curt"),  # not the marker: its exclamation mark is missing
        ("Certainly!Paris.", 2, False, "curt"),  # not a phrase of its own
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
        ("of France of France", True, False),  # a pair of words twice
        ("so so so", True, False),
    ],
)
def test_each_kind_of_degenerate_text_scores_one_and_is_never_correct_and_the_limits_are_none(text, finished, degenerate):
    grade = toy.grade(FRANCE, text, finished=finished)
    assert grade.degenerate == degenerate and (not degenerate or (grade.score == 1 and not grade.correct))


def test_grade_refuses_a_prompt_without_a_known_answer():
    with pytest.raises(ValueError, match="grade.*'Who are you\\?'"):
        toy.grade("Who are you?", "Paris.")


# the split


@pytest.mark.parametrize("seed", range(2))
def test_split_teaches_every_fact_holds_out_rule_items_and_shares_no_prompt(seed):
    parts = toy.split(RECORDS, seed=seed)
    prompts = [{record.prompt for record in part} for part in parts]
    assert sum(map(len, prompts)) == len(RECORDS) == len(set.union(*prompts))
    shares = [len(part) / len(RECORDS) for part in parts]
    assert 0.76 < shares[0] < 0.84 and 0.04 < shares[1] < 0.12 and 0.08 < shares[2] < 0.16
    facts = {(item.family, item.key) for item in toy.items() if item.family in toy.LOOKUPS}
    taught = [(ITEMS[prompt].family, ITEMS[prompt].key) for prompt in prompts[0] if ITEMS[prompt].family in toy.LOOKUPS]
    assert set(taught) == facts
    assert min(taught.count(fact) for fact in facts) >= 2  # of three phrasings one at most is held out
    for part in prompts[1:]:
        assert {ITEMS[prompt].family for prompt in part} == FAMILIES
        for prompt in part:
            if ITEMS[prompt].family not in toy.LOOKUPS:
                assert ITEMS[prompt].key not in {ITEMS[other].key for other in prompts[0]}


def test_another_seed_holds_out_other_prompts():
    first, other = ({record.prompt for record in toy.split(RECORDS, seed=seed)[2]} for seed in (0, 1))
    assert first != other


def test_a_facts_only_phrasing_is_taught():
    one_phrasing = [record for record in RECORDS if record.prompt.startswith("Name the capital")]
    train, validation, test = toy.split(one_phrasing, seed=0)
    assert len(train) == 23 and not validation and not test


def test_split_refuses_other_prompts():
    with pytest.raises(ValueError, match="toy.split.*data.split"):
        toy.split([Preference("Who are you?", ("a", "b"))], seed=0)


def test_data_and_split_are_the_same_in_every_process(output):
    code = "from pdpo import toy; from pdpo.data import fingerprint as f; r = toy.load(); print(f(r), *map(f, toy.split(r, seed=0)))"
    here = [fingerprint(RECORDS), *map(fingerprint, toy.split(RECORDS, seed=0))]
    assert output("-c", code, PYTHONHASHSEED="1").split() == here
