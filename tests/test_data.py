"""Preference files: every shape is read, everything malformed is refused by file, row and key; splits do not leak."""

import json
import random
from collections import Counter

import pytest

from pdpo import toy
from pdpo.data import Preference, data_report, fingerprint, identical, load_preferences, load_split, pairs, read_scored, split
from pdpo.files import SOURCES

GOOD = {"prompt": "Name a colour.", "chosen": "Red, gladly.", "rejected": "Dog."}
SCORED = GOOD | {"chosen_score": 3, "rejected_score": 1.5}
LISTED = {"prompt": "Name a colour.", "responses": ["Red, gladly.", "Blue.", "Dog."], "scores": [3, 2, 1]}
NAN = float("nan")

# reading

ASKED, ANSWER, OTHER = (
    {"role": role, "content": text} for role, text in [("user", " Q "), ("assistant", "A"), ("assistant", "B")]
)
CHAT = {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [OTHER]}
PAIR = Preference("Name a colour.", ("Red, gladly.", "Dog."))
RANKED = ("Red, gladly.", "Blue.", "Dog.")
SHAPES = [
    (GOOD, PAIR),
    (SCORED, Preference(PAIR.prompt, PAIR.responses, (3.0, 1.5))),
    (GOOD | {"score_chosen": 1, "score_rejected": 2}, Preference(PAIR.prompt, PAIR.responses, (1.0, 2.0))),
    (GOOD | {"chosen_score": None, "rejected_score": None}, PAIR),
    (LISTED, Preference("Name a colour.", RANKED, (3, 2, 1))),
    (LISTED | {"scores": None}, Preference("Name a colour.", RANKED)),
    (LISTED | {"scores": [2, 2, 2]}, Preference("Name a colour.", RANKED, (2, 2, 2))),
    ({"instruction": "Add.", "input": "1 and 2", "output": "x", "chosen": "3", "rejected": "4"}, Preference("Add.\n1 and 2", ("3", "4"))),
    ({"instruction": "Sing.", "input": " ", "chosen": "La", "rejected": "No"}, Preference("Sing.", ("La", "No"))),
    ({"prompt": "a", "instruction": "b", "input": "c", "chosen": "d", "rejected": "e"}, Preference("a", ("d", "e"))),
    (CHAT, Preference("Q", ("A", "B"))),
    ({"chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER]}, Preference("Q", ("A", "B"))),  # the prompt is what they share
    (CHAT | {"prompt": [{"role": "system", "content": "Be brief."}, ASKED]}, Preference("system: Be brief.\nuser: Q", ("A", "B"))),
    ({"prompt": " é\n", "chosen": "\t日本 ", "rejected": " 😀\r\n"}, Preference("é", ("日本", "😀"))),
]  # fmt: skip


def test_every_shape_is_read_in_both_kinds_of_file_in_order_and_with_duplicates(tmp_path):
    rows, expected = zip(*SHAPES, *SHAPES[:1], strict=True)
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    assert load_preferences(tmp_path / "data.json") == list(expected)
    lines = b"\r\n\r\n".join(json.dumps(row).encode() for row in rows)  # as Windows writes them, with a byte order mark
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n")
    assert load_preferences(str(tmp_path / "data.jsonl")) == list(expected)


def listed(*rows) -> bytes:
    return json.dumps(rows).encode()


MALFORMED = [  # a file's name, what it holds, and what the error says
    ("absent.json", None, "No such file"),
    ("data.csv", b"prompt,chosen,rejected\na,b,c\n", ".jsonl"),
    ("data.json", b"[]", "at least one row"),
    ("data.json", b"[{'prompt': 'a'}]", "line 1 column 3"),
    ("data.jsonl", json.dumps(GOOD).encode() + b"\n\n{", "line 3: expected JSON"),
    ("data.json", listed(GOOD).replace(b"Dog", b"D\xf6g"), "UTF-8, got byte 70"),
    ("data.json", json.dumps(GOOD).encode(), "list of objects, got dict"),
    ("data.json", b"[" * 200_000, "recursion"),
    ("data.json", b"[" + b"1" * 5000 + b"]", "4300 digits"),
    ("data.jsonl", json.dumps(GOOD).encode() + b"\nnull", "line 2: expected an object, got NoneType"),
    ("data.json", listed(SCORED).replace(b"1.5", b"9" * 400), "row 1: key 'rejected_score': expected a finite number"),
]
SECOND_ROWS = [  # after a good one
    ("a text", "expected an object, got str"),
    ({"prompt": "a", "chosen": "b"}, "key 'rejected': missing"),
    (GOOD | {"chosen": " \n\t"}, "key 'chosen': expected a text that is not empty"),
    (GOOD | {"prompt": 7}, "key 'prompt': expected a text that is not empty, got 7"),
    (GOOD | {"rejected": "D\0g."}, "key 'rejected': expected text, got a NUL"),
    (GOOD | {"rejected": "Dog \ud83d."}, "key 'rejected': expected text, got half of a surrogate pair"),
    ({"instruction": "a", "input": 7, "chosen": "a", "rejected": "b"}, "key 'input': expected a text"),
    (SCORED | {"chosen_score": NAN}, "key 'chosen_score': expected a finite number, got nan"),
    (SCORED | {"chosen_score": True}, "key 'chosen_score': expected a finite number, got True"),
    (SCORED | {"rejected_score": None}, "key 'rejected_score': expected a score for both"),
    (CHAT | {"prompt": [{"role": "user"}]}, "key 'prompt': expected a list of {'role', 'content'}"),
    (CHAT | {"prompt": [ASKED, "text"]}, "key 'prompt': expected a list of {'role', 'content'}"),
    (CHAT | {"prompt": []}, "key 'prompt': expected a list of {'role', 'content'}"),
    (LISTED | {"responses": ["Red."], "scores": [1]}, "expected at least 2 responses, got 1"),
    (LISTED | {"responses": "Red."}, "key 'responses': expected a list of texts, got str"),
    (LISTED | {"scores": [3, 1, 2]}, "key 'scores': expected responses best first"),
    (LISTED | {"scores": [3, 2]}, "key 'scores': expected 3 scores, one a response, got 2"),
    (LISTED | {"scores": 3}, "key 'scores': expected a list of numbers"),
]
MALFORMED += [("data.json", listed(GOOD, row), f"data.json, row 2: {words}") for row, words in SECOND_ROWS]


@pytest.mark.parametrize("name, content, words", MALFORMED, ids=[words for *_, words in MALFORMED])
def test_a_malformed_file_is_refused_by_file_row_and_key(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_preferences(tmp_path / name)
    message = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in message and len(message) < 400
    assert name in message and words in message, message


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'toy', 'instructions'.*got 'toys'"):
        load_preferences("toys")


def test_fingerprint_changes_with_every_part_of_a_record():
    records = [
        Preference("p", ("a", "b")), Preference("q", ("a", "b")), Preference("p", ("b", "a")),
        Preference("p", ("a", "b"), (1, 0)), Preference("p", ("a", "b"), (2, 0)), Preference("p", ("a", "b", "c")),
    ]  # fmt: skip
    assert len({fingerprint([record]) for record in records} | {fingerprint([]), fingerprint(records[:1] * 2)}) == 8


# splitting


def numbered(num: int) -> list[Preference]:
    return [Preference(f"prompt {i}", ("good", "bad")) for i in range(num)]


def test_split_groups_by_prompt_loses_nothing_and_depends_on_the_seed_but_not_on_the_order():
    records = numbered(200) + [Preference(f" prompt {i} ", ("other", "bad")) for i in range(0, 200, 3)]
    parts = split(records, seed=3)
    prompts = [{record.prompt.strip() for record in part} for part in parts]
    assert [len(each) for each in prompts] == [170, 10, 20]
    assert len(set.union(*prompts)) == 200
    assert Counter(record for part in parts for record in part) == Counter(records)
    assert all(part == [record for record in records if record in set(part)] for part in parts)  # in the records' order
    shuffled = random.Random(0).sample(records, len(records))
    assert [set(part) for part in split(shuffled, seed=3)] == [set(part) for part in parts]
    assert set(split(records, seed=2)[2]) != set(parts[2])


def test_split_follows_the_fractions_refuses_what_are_none_and_leaves_no_part_empty():
    for fractions, sizes in (((1, 0, 0), [10, 0, 0]), ((0.8, 0.1, 0.1), [8, 1, 1])):
        assert [len(part) for part in split(numbered(10), seed=0, fractions=fractions)] == sizes
    for fractions in ((0.5, 0.5), (0.5, 0.5, 0.5), (1.5, -0.25, -0.25), (NAN, 0.5, 0.5)):
        with pytest.raises(ValueError, match="split: expected three fractions"):
            split(numbered(10), seed=0, fractions=fractions)
    with pytest.raises(ValueError, match="split: expected enough prompts.*got 5 prompts"):
        split(numbered(5), seed=0)


def test_load_split_drops_identical_responses(tmp_path):
    rows = [GOOD | {"prompt": f"prompt {i}"} for i in range(40)]
    rows += [GOOD | {"prompt": f"same {i}", "chosen": "Dog."} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    parts = load_split(tmp_path / "data.json")
    assert [len(part) for part in parts] == [34, 2, 4] and not any(identical(record) for part in parts for record in part)


# pairs


def test_pairs_are_all_better_worse_combinations_with_their_scores_without_ties_of_a_ranking_and_one_text_twice():
    made = pairs([Preference("p", ("a", "b", "c"), (3, 2, 1)), Preference("q", ("d", "e"))])
    assert made == [
        Preference("p", ("a", "b"), (3, 2)), Preference("p", ("a", "c"), (3, 1)), Preference("p", ("b", "c"), (2, 1)),
        Preference("q", ("d", "e")),
    ]  # fmt: skip
    assert pairs([Preference("p", ("a", "b", "a"))]) == [Preference("p", ("a", "b")), Preference("p", ("b", "a"))]
    made = pairs([Preference("p", ("a", "b", "c"), (2, 2, 1)), Preference("q", ("d", "e"), (1, 1))])
    assert [pair.responses for pair in made] == [("a", "c"), ("b", "c"), ("d", "e")]  # the last one the data labels


def test_drawn_pairs_are_distinct_as_many_as_asked_reproducible_and_dependent_on_the_seed():
    records = [Preference(f"p{i}", ("a", "b", "c", "d"), (4, 3, 2, 1)) for i in range(30)]
    made = pairs(records, num_per_prompt=2, seed=1)
    assert made == pairs(records, num_per_prompt=2, seed=1) != pairs(records, num_per_prompt=2, seed=2)
    assert len(made) == len(set(made)) == 60 and set(made) <= set(pairs(records))
    assert Counter(pair.prompt for pair in made) == {f"p{i}": 2 for i in range(30)}
    assert len({pair.responses for pair in made}) == 6  # every kind of pair is drawn
    assert len(pairs(records, num_per_prompt=99)) == 180


# scored data

IMDB_ROWS = [
    {"prompt": "I found it", "text": "dull.", "reward": 0.25},
    {"prompt": "I found it", "text": "superb.", "reward": 1.75},
    {"prompt": "The end", "text": "came.", "reward": 1.0},
    {"prompt": "I found it ", "text": " , I must say, fine.", "reward": 1},  # white space on both sides; after another prompt
    {"prompt": "I found it", "text": "", "reward": 1.9},  # empty, best by score
    {"prompt": "The end", "text": " \n", "reward": 1.5},  # empty, which leaves its prompt one response
    {"prompt": "I found it", "text": "superb. ", "reward": 1.25},  # repeated, with another score
    {"prompt": "Ties", "text": "a", "reward": 1.0},
    {"prompt": "Ties", "text": "b", "reward": 1.0},
]
TLDR_ROWS = {
    "A long post\nof two lines ": {"responses": [" meh", " good", " meh ", ""], "rewards": [1, 7, 3, 2]},
    "Alone": {"responses": [" one"], "rewards": [4]},
    "None": {"responses": [], "rewards": []},
    "Ties": {"responses": [" a", " b", " a"], "rewards": [4, 4, 4]},
}


def scored_file(folder, rows):
    path = folder / ("rows.json" if isinstance(rows, dict) else "rows.jsonl")
    path.write_text(json.dumps(rows) if isinstance(rows, dict) else "\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_scored_rows_are_gathered_by_prompt_sorted_by_score_and_what_is_odd_is_counted(tmp_path):
    records, dropped = read_scored(scored_file(tmp_path, IMDB_ROWS))
    assert records == [Preference("I found it", ("superb.", ", I must say, fine.", "dull."), (1.5, 1, 0.25))]
    assert dropped == {"empty": 2, "repeated": 1, "alone": 1, "tied": 1}
    records, dropped = read_scored(scored_file(tmp_path, TLDR_ROWS))
    assert records == [Preference("A long post\nof two lines", ("good", "meh"), (7, 2))]
    assert dropped == {"empty": 1, "repeated": 2, "alone": 1, "tied": 1}


@pytest.mark.parametrize(
    "rows, words",
    [
        ([IMDB_ROWS[0], {"prompt": "p", "text": "t"}], "line 2: expected {'prompt', 'text', 'reward'}"),
        ([IMDB_ROWS[0] | {"reward": None}], "line 1: expected two texts and a finite score, got ('I found it', 'dull.', None)"),
        ([IMDB_ROWS[0] | {"prompt": 3}], "line 1: expected two texts"),
        ({"p": {"responses": ["a", "b"], "rewards": [1]}}, "prompt 'p': expected 'responses' and as many 'rewards'"),
        ({"p": {"responses": ["a", "b"], "rewards": [1, "2"]}}, "prompt 'p', response 2: expected two texts and a finite"),
        ({"p": ["a"]}, "prompt 'p': expected 'responses'"),
    ],
)
def test_malformed_scored_rows_are_refused_by_file_and_row(tmp_path, rows, words):
    path = scored_file(tmp_path, rows)
    with pytest.raises(ValueError) as caught:
        read_scored(path)
    assert str(caught.value).startswith(f"{path}, ") and words in str(caught.value)


# the report


def test_data_report_counts_and_measures_hand_made_rows(tiny_tokenizer):
    long, longer = "apple " * 8, "apple " * 40
    records = [
        Preference("a", ("Paris.", "Rome."), (2, 1)),
        Preference("a", ("Rome.", "Paris."), (1, 2)),  # duplicate prompt, flipped
        Preference("b", ("Rome.", "Rome."), (1, 1)),  # identical, tied
        Preference("c", ("Paris.", "Rome."), (1, 1)),  # tied
        Preference(long, ("Paris.", "Rome.")),  # its prompt does not fit into 16 tokens
        Preference("d", ("Paris.", longer, "Rome.")),  # the middle response does not fit
    ]
    report = data_report(records, tiny_tokenizer, max_length=16, held_out=[records[0], Preference("z", ("x", "y"))])
    expected = {
        "rows": 6, "unique_prompts": 5, "duplicate_prompts": 1, "identical": 1, "tied": 2, "flipped": 1,
        "truncated": 1, "too_long": 1, "leaked_prompts": 1,
    }  # fmt: skip
    assert {key: report[key] for key in expected} == expected
    short, long = (len(tiny_tokenizer("Paris." * n, add_special_tokens=False).input_ids) + 1 for n in (1, 3))  # with EOS
    prompt = tiny_tokenizer("Instruction: a\nResponse:\n", add_special_tokens=False).input_ids
    report = data_report([Preference("a", ("Paris." * 3, "Paris."))] * 2, tiny_tokenizer)
    keys = ("prompt_tokens", "best_tokens", "worst_tokens", "length_gap", "best_longer")
    assert [report[key] for key in keys] == [len(prompt), long, short, long - short, 1.0]


# named data


def test_the_toys_split_is_its_own():
    records = load_preferences("toy")
    assert [(each.prompt, each.responses, each.scores) for each in records] == [tuple(example) for example in toy.load()]
    assert load_split("toy") == toy.split(records, seed=0)


def test_instructions_has_its_known_facts_and_does_not_leak(shared_data, gpt2_tokenizer):
    report = data_report(load_preferences("instructions"), gpt2_tokenizer)
    expected = {"rows": 1100, "unique_prompts": 1075, "duplicate_prompts": 25, "identical": 6, "truncated": 0, "too_long": 0}
    assert {key: report[key] for key in expected} == expected
    parts = load_split("instructions")
    assert sum(map(len, parts)) == 1094
    assert data_report(parts[0], gpt2_tokenizer, held_out=parts[1] + parts[2])["leaked_prompts"] == 0


@pytest.mark.parametrize(
    "name, prompts, responses, dropped",
    [
        ("imdb", 252, 2543, {"empty": 17, "repeated": 0, "alone": 0, "tied": 0}),
        ("tldr", 567, 4065, {"empty": 0, "repeated": 32, "alone": 3, "tied": 2}),
        ("tldr-test", 101, 759, {"empty": 0, "repeated": 74, "alone": 0, "tied": 1}),
    ],
)
def test_the_scored_files_have_their_known_facts(shared_data, name, prompts, responses, dropped):
    records, counted = read_scored(shared_data / SOURCES[name][0])
    assert (len(records), sum(len(record.responses) for record in records), counted) == (prompts, responses, dropped)
    assert load_preferences(name) == records
