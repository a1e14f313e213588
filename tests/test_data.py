"""Preference files: every shape is read, everything malformed is refused by file, row and key; splits do not leak."""

import json
import random
from collections import Counter

import pytest
from malformed import GOOD, LISTED, MALFORMED, SCORED

from pdpo.data import (
    SCORED_NAMES,
    Preference,
    data_report,
    fingerprint,
    identical,
    load_preferences,
    load_split,
    pairs,
    read_scored,
    split,
)
from pdpo.encoding import TEMPLATE, encode
from pdpo.files import SOURCES
from pdpo.training import batch_indices

# reading


def read(folder, rows, name="data.json"):
    text = "\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else json.dumps(rows)
    (folder / name).write_text(text, encoding="utf-8")
    return load_preferences(folder / name)


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
    ({"instruction": "Sing.", "input": None, "chosen": "La", "rejected": "No"}, Preference("Sing.", ("La", "No"))),
    ({"prompt": "a", "instruction": "b", "input": "c", "chosen": "d", "rejected": "e"}, Preference("a", ("d", "e"))),
    ({"prompt": " é\n", "chosen": "\t日本 ", "rejected": " 😀\r\n"}, Preference("é", ("日本", "😀"))),
]  # fmt: skip


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_load_preferences_reads_every_shape_in_both_kinds_of_file_in_order_and_with_duplicates(tmp_path, name):
    rows, expected = zip(*SHAPES, *SHAPES[:1], strict=True)
    assert read(tmp_path, rows, name) == list(expected)


def test_load_preferences_takes_a_byte_order_mark_windows_line_ends_blank_lines_and_a_path_as_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join([json.dumps(GOOD).encode()] * 2) + b"\r\n")
    assert load_preferences(str(path)) == [PAIR] * 2


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_a_malformed_file_is_refused_by_file_row_and_key(tmp_path, case):
    path = case.write(tmp_path)
    with pytest.raises(ValueError) as caught:
        load_preferences(path)
    message = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in message and len(message) < 400
    for word in (path.name, *case.words):
        assert word in message, message


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'toy', 'instructions'.*got 'toys'"):
        load_preferences("toys")


# records


def test_a_record_of_two_has_a_chosen_and_a_rejected_response_and_a_longer_one_has_not():
    record = Preference("a", ("b", "c"))
    assert (record.chosen, record.rejected) == ("b", "c")
    for name in ("chosen", "rejected"):
        with pytest.raises(ValueError, match="K = 2.*got 3.*data.pairs"):
            getattr(Preference("a", ("b", "c", "d")), name)


def test_identical_means_one_text_in_all_places():
    assert [identical(Preference("p", each)) for each in (("a", "a"), ("a", "b"), ("a", "a", "b"))] == [True, False, False]


def test_fingerprint_changes_with_every_part_of_a_record():
    records = [
        Preference("p", ("a", "b")), Preference("q", ("a", "b")), Preference("p", ("b", "a")),
        Preference("p", ("a", "b"), (1, 0)), Preference("p", ("a", "b"), (2, 0)), Preference("p", ("a", "b", "c")),
    ]  # fmt: skip
    assert len({fingerprint([record]) for record in records} | {fingerprint([]), fingerprint(records[:1] * 2)}) == 8


# splitting


def numbered(num: int) -> list[Preference]:
    return [Preference(f"prompt {i}", ("good", "bad")) for i in range(num)]


def test_split_groups_by_prompt_with_duplicates_on_one_side_and_loses_nothing():
    records = numbered(200) + [Preference(f" prompt {i} ", ("other", "bad")) for i in range(0, 200, 3)]
    parts = split(records, seed=3)
    prompts = [{record.prompt.strip() for record in part} for part in parts]
    assert [len(each) for each in prompts] == [170, 10, 20]
    assert len(set.union(*prompts)) == 200
    assert Counter(record for part in parts for record in part) == Counter(records)
    assert all(part == [record for record in records if record in set(part)] for part in parts)  # in the records' order


def test_split_of_a_prompt_depends_on_the_seed_and_not_on_the_order():
    records = numbered(100)
    shuffled = random.Random(0).sample(records, 100)
    assert [set(part) for part in split(records, seed=1)] == [set(part) for part in split(shuffled, seed=1)]
    assert set(split(records, seed=1)[2]) != set(split(records, seed=2)[2])


def test_split_follows_the_fractions_refuses_what_are_none_and_leaves_no_part_empty():
    for fractions, sizes in (((1, 0, 0), [10, 0, 0]), ((0.5, 0.5, 0), [5, 5, 0]), ((0.8, 0.1, 0.1), [8, 1, 1])):
        assert [len(part) for part in split(numbered(10), seed=0, fractions=fractions)] == sizes
    for fractions in ((0.5, 0.5), (0.5, 0.5, 0.5), (1.5, -0.25, -0.25), (float("nan"), 0.5, 0.5)):
        with pytest.raises(ValueError, match="split: expected three fractions"):
            split(numbered(10), seed=0, fractions=fractions)
    with pytest.raises(ValueError, match="split: expected enough prompts.*got 5 prompts"):
        split(numbered(5), seed=0)


def test_load_split_drops_identical_responses(tmp_path):
    rows = [GOOD | {"prompt": f"prompt {i}"} for i in range(40)] + [
        GOOD | {"prompt": f"same {i}", "chosen": "Dog."} for i in range(40)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    parts = load_split(tmp_path / "data.json")
    assert [len(part) for part in parts] == [34, 2, 4] and not any(identical(record) for part in parts for record in part)


def test_load_split_of_the_toy_is_its_own_split():
    from pdpo import toy

    records = load_preferences("toy")
    assert all(type(record) is Preference for record in records)
    assert [(each.prompt, each.responses, each.scores) for each in records] == [tuple(example) for example in toy.load()]
    assert load_split("toy") == toy.split(records, seed=0)


# pairs


def test_pairs_are_all_better_worse_combinations_with_their_scores():
    made = pairs([Preference("p", ("a", "b", "c"), (3, 2, 1)), Preference("q", ("d", "e"))])
    assert made == [
        Preference("p", ("a", "b"), (3, 2)), Preference("p", ("a", "c"), (3, 1)), Preference("p", ("b", "c"), (2, 1)),
        Preference("q", ("d", "e")),
    ]  # fmt: skip


def test_pairs_leave_out_one_text_twice():
    assert pairs([Preference("p", ("a", "b", "a"))]) == [Preference("p", ("a", "b")), Preference("p", ("b", "a"))]
    assert pairs([Preference("p", ("a", "a"))], num_per_prompt=1) == []


def test_pairs_leave_out_the_ties_of_a_ranking_but_keep_a_pair_that_the_data_labels():
    made = pairs([Preference("p", ("a", "b", "c"), (2, 2, 1)), Preference("q", ("d", "e"), (1, 1))])
    assert [pair.responses for pair in made] == [("a", "c"), ("b", "c"), ("d", "e")]


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


def test_imdb_rows_are_gathered_by_prompt_sorted_by_score_and_what_is_odd_is_counted(tmp_path):
    records, dropped = read_scored(scored_file(tmp_path, IMDB_ROWS))
    assert records == [Preference("I found it", ("superb.", ", I must say, fine.", "dull."), (1.5, 1, 0.25))]
    assert dropped == {"empty": 2, "repeated": 1, "alone": 1, "tied": 1}


def test_tldr_rows_are_sorted_by_score_and_what_is_odd_is_counted(tmp_path):
    records, dropped = read_scored(scored_file(tmp_path, TLDR_ROWS))
    assert records == [Preference("A long post\nof two lines", ("good", "meh"), (7, 2))]
    assert dropped == {"empty": 1, "repeated": 2, "alone": 1, "tied": 1}


def test_a_text_with_the_space_at_the_junction_and_one_without_are_the_same_tokens(any_tokenizer):
    glued, spaced = (encode(any_tokenizer, "It was real shocking", text) for text in ("for the time", " for the time"))
    assert glued == spaced
    text = any_tokenizer.decode(glued.input_ids[:-1])
    assert text == TEMPLATE.format(prompt="It was real shocking") + "for the time" and "shockingfor" not in text


@pytest.mark.parametrize(
    "rows, words",
    [
        ([IMDB_ROWS[0], {"prompt": "p", "text": "t"}], "line 2: expected {'prompt', 'text', 'reward'}"),
        ([IMDB_ROWS[0], ["p"]], "line 2: expected"),
        ([IMDB_ROWS[0] | {"reward": None}], "line 1: expected two texts and a finite score, got ('I found it', 'dull.', None)"),
        ([IMDB_ROWS[0] | {"reward": float("nan")}], "line 1: expected two texts and a finite score"),
        ([IMDB_ROWS[0] | {"text": None}], "line 1: expected two texts"),
        ([IMDB_ROWS[0] | {"prompt": 3}], "line 1: expected two texts"),
        ({"p": {"responses": ["a", "b"], "rewards": [1]}}, "prompt 'p': expected 'responses' and as many 'rewards'"),
        ({"p": {"responses": ["a"], "rewards": 1}}, "prompt 'p': expected 'responses'"),
        (
            {"p": {"responses": ["a", "b"], "rewards": [1, "2"]}},
            "prompt 'p', response 2: expected two texts and a finite score",
        ),
        ({"p": ["a"]}, "prompt 'p': expected 'responses'"),
    ],
)
def test_malformed_scored_rows_are_refused_by_file_and_row(tmp_path, rows, words):
    path = scored_file(tmp_path, rows)
    with pytest.raises(ValueError) as caught:
        read_scored(path)
    assert str(caught.value).startswith(f"{path}, ") and words in str(caught.value)


# the report


def test_data_report_counts_on_hand_made_rows(tiny_tokenizer):
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


def test_data_report_lengths(tiny_tokenizer):
    words = [len(tiny_tokenizer("Paris." * n, add_special_tokens=False).input_ids) + 1 for n in (1, 3)]  # with EOS
    report = data_report(
        [Preference("a", ("Paris." * 3, "Paris.")), Preference("b", ("Paris.", "Paris." * 3))] * 2, tiny_tokenizer
    )
    mean = round(sum(words) / 2, 1)
    keys = ("best_tokens", "worst_tokens", "length_gap", "best_longer")
    assert [report[key] for key in keys] == [mean, mean, 0.0, 0.5]
    report = data_report([Preference("a", ("Paris." * 3, "Paris."))], tiny_tokenizer)
    assert (report["best_tokens"], report["length_gap"], report["best_longer"]) == (words[1], words[1] - words[0], 1.0)
    prompt = tiny_tokenizer("Instruction: a\nResponse:\n", add_special_tokens=False).input_ids
    assert report["prompt_tokens"] == len(prompt)


def test_the_toys_training_split_has_nothing_to_report(tiny_tokenizer):
    train, validation, test = load_split("toy")
    report = data_report(train, tiny_tokenizer, held_out=validation + test)
    keys = ("duplicate_prompts", "identical", "tied", "flipped", "truncated", "too_long", "leaked_prompts")
    assert {report[key] for key in keys} == {0}


# the real file


def test_instructions_has_its_known_facts_and_does_not_leak(shared_data, monkeypatch, gpt2_tokenizer):
    monkeypatch.setenv("PDPO_DATA_DIR", str(shared_data))
    records = load_preferences("instructions")
    report = data_report(records, gpt2_tokenizer)
    expected = {"rows": 1100, "unique_prompts": 1075, "duplicate_prompts": 25, "identical": 6, "truncated": 0, "too_long": 0}
    assert {key: report[key] for key in expected} == expected
    parts = load_split("instructions")
    assert sum(map(len, parts)) == 1094
    prompts = [{record.prompt for record in part} for part in parts]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert data_report(parts[0], gpt2_tokenizer, held_out=parts[1] + parts[2])["leaked_prompts"] == 0


@pytest.mark.parametrize(
    "name, prompts, responses, dropped, num_pairs",
    [
        ("imdb", 252, 2543, {"empty": 17, "repeated": 0, "alone": 0, "tied": 0}, 11874),
        ("tldr", 567, 4065, {"empty": 0, "repeated": 32, "alone": 3, "tied": 2}, 9954),
        ("tldr-test", 101, 759, {"empty": 0, "repeated": 74, "alone": 0, "tied": 1}, 2024),
    ],
)
def test_the_scored_files_have_their_known_facts(shared_data, monkeypatch, name, prompts, responses, dropped, num_pairs):
    monkeypatch.setenv("PDPO_DATA_DIR", str(shared_data))
    records, counted = read_scored(shared_data / SOURCES[name][0])
    assert (len(records), sum(len(record.responses) for record in records), counted) == (prompts, responses, dropped)
    assert load_preferences(name) == records
    made = pairs(records)
    assert len(made) == len(set(made)) == num_pairs and all(pair.scores[0] > pair.scores[1] for pair in made)
    prompts = [{record.prompt for record in part} for part in load_split(name)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == len(records)


def test_all_pairs_of_the_scored_files_spread_over_batches(shared_data):
    for name in SCORED_NAMES:
        made = pairs(read_scored(shared_data / SOURCES[name][0])[0])
        batches = [batch_indices(len(made), 16, seed=0, step=step) for step in range(0, len(made) // 16, 30)]
        distinct = [len({made[i].prompt for i in batch}) for batch in batches]
        assert sum(distinct) / len(distinct) > 13
