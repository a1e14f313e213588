"""Files that must be refused, for the loader's tests and for the command line's."""

import json
from pathlib import Path
from typing import NamedTuple

ABSENT, FOLDER = "absent", "folder"  # instead of bytes: no such file; a folder of that name


class Malformed(NamedTuple):
    """What to write where, and words that the error must hold besides the file's name."""

    name: str
    file: str
    content: bytes | str
    words: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        path = folder / self.file
        if self.content == FOLDER:
            path.mkdir()
        elif self.content != ABSENT:
            path.write_bytes(self.content)
        return path


GOOD = {"prompt": "Name a colour.", "chosen": "Red, gladly.", "rejected": "Dog."}
SCORED = GOOD | {"chosen_score": 3, "rejected_score": 1.5}
LISTED = {"prompt": "Name a colour.", "responses": ["Red, gladly.", "Blue.", "Dog."], "scores": [3, 2, 1]}


def _json(*rows) -> bytes:
    return json.dumps(list(rows)).encode()


def _jsonl(*rows) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def _without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


def _second(name: str, words: tuple[str, ...], row) -> Malformed:
    """A bad second row after a good first one."""
    return Malformed(name, "data.json", _json(GOOD, row), ("row 2", *words))


MALFORMED = [
    # the file
    Malformed("missing file", "absent.json", ABSENT, ("No such file",)),
    Malformed("a folder", "folder.json", FOLDER, ("Is a directory",)),
    Malformed("wrong suffix", "data.csv", b"prompt,chosen,rejected\na,b,c\n", (".json", ".jsonl")),
    Malformed("empty .json", "data.json", b"", ("expected JSON", "line 1")),
    Malformed("empty .jsonl", "data.jsonl", b"\n\n", ("at least one row",)),
    Malformed("empty list", "data.json", b"[]", ("at least one row",)),
    Malformed("bad JSON", "data.json", b"[{'prompt': 'a'}]", ("expected JSON", "line 1 column 3")),
    Malformed("truncated JSON", "data.json", _json(GOOD, GOOD)[:-20], ("expected JSON", "complete?")),
    Malformed("bad JSON in line 3", "data.jsonl", _jsonl(GOOD, GOOD, '{"prompt": "a",', GOOD), ("line 3", "expected JSON")),
    Malformed("bad JSON after a blank line", "data.jsonl", _jsonl(GOOD, "", "{"), ("line 3", "expected JSON")),
    Malformed("not UTF-8", "data.json", _json(GOOD).replace(b"Dog", b"D\xf6g"), ("UTF-8", "byte 70")),
    Malformed("UTF-16", "data.json", _json(GOOD).decode().encode("utf-16"), ("UTF-8", "byte 0")),
    Malformed("binary", "data.json", bytes(range(32)) * 8, ("expected JSON",)),
    Malformed("top level object", "data.json", json.dumps(GOOD).encode(), ("list of objects", "dict", ".jsonl")),
    Malformed("nested too deep", "data.json", b"[" * 200_000, ("expected JSON", "recursion")),
    Malformed("a number of 5000 digits", "data.json", b"[" + b"1" * 5000 + b"]", ("expected JSON", "4300 digits")),
    # the row
    Malformed("a list of texts", "data.json", _json("a", "b"), ("row 1", "expected an object", "str")),
    Malformed("a list in line 2", "data.jsonl", _jsonl(GOOD, "[1]"), ("line 2", "expected an object", "list")),
    Malformed("null in line 2", "data.jsonl", _jsonl(GOOD, "null"), ("line 2", "expected an object", "NoneType")),
    *(_second(f"no {key}", (f"'{key}'", "missing"), _without(GOOD, key)) for key in GOOD),
    *(_second(f"empty {key}", (f"'{key}'", "not empty"), GOOD | {key: ""}) for key in GOOD),
    *(_second(f"blank {key}", (f"'{key}'", "not empty"), GOOD | {key: " \n\t"}) for key in GOOD),
    *(_second(f"{key} is a number", (f"'{key}'", "text", "7"), GOOD | {key: 7}) for key in GOOD),
    _second("chosen is null", ("'chosen'", "text", "None"), GOOD | {"chosen": None}),
    _second("NUL in a text", ("'rejected'", "NUL"), GOOD | {"rejected": "D\0g."}),
    _second("half a surrogate pair", ("'rejected'", "surrogate"), GOOD | {"rejected": "Dog \ud83d."}),
    _second("empty instruction", ("'instruction'", "not empty"), {"instruction": "", "chosen": "a", "rejected": "b"}),
    _second("input is a number", ("'input'", "text", "7"), {"instruction": "a", "input": 7, "chosen": "a", "rejected": "b"}),
    # the scores of a pair
    Malformed("score NaN", "data.json", _json(SCORED, SCORED | {"chosen_score": float("nan")}), ("row 2", "'chosen_score'", "nan")),
    Malformed("score -Infinity", "data.jsonl", _jsonl(SCORED | {"rejected_score": -float("inf")}), ("line 1", "'rejected_score'", "-inf")),
    Malformed("score 1e999", "data.json", _json(SCORED).replace(b"1.5", b"1e999"), ("row 1", "'rejected_score'", "inf")),
    Malformed("score beyond float", "data.json", _json(SCORED).replace(b"1.5", b"9" * 400), ("row 1", "'rejected_score'", "finite")),
    _second("score a text", ("'chosen_score'", "'3'"), SCORED | {"chosen_score": "3"}),
    _second("score true", ("'chosen_score'", "True"), SCORED | {"chosen_score": True}),
    _second("score a list", ("'rejected_score'", "[1]"), SCORED | {"rejected_score": [1]}),
    _second("no chosen score", ("'chosen_score'", "both"), _without(SCORED, "chosen_score")),
    _second("no rejected score", ("'rejected_score'", "both"), _without(SCORED, "rejected_score")),
    _second("rejected score null", ("'rejected_score'", "both"), SCORED | {"rejected_score": None}),
    # ranked responses
    _second("one response", ("at least 2", "got 1"), LISTED | {"responses": ["Red."], "scores": [1]}),
    _second("no response", ("at least 2", "got 0"), LISTED | {"responses": [], "scores": []}),
    _second("responses a text", ("'responses'", "list", "str"), LISTED | {"responses": "Red."}),
    _second("a blank response", ("'responses'", "not empty"), LISTED | {"responses": ["Red.", " ", "Dog."]}),
    _second("a response null", ("'responses'", "None"), LISTED | {"responses": ["Red.", None, "Dog."]}),
    _second("scores not best first", ("'scores'", "best first"), LISTED | {"scores": [3, 1, 2]}),
    _second("too few scores", ("'scores'", "expected 3", "got 2"), LISTED | {"scores": [3, 2]}),
    _second("scores a number", ("'scores'", "list"), LISTED | {"scores": 3}),
    _second("one of the scores NaN", ("'scores'", "nan"), LISTED | {"scores": [3, float("nan"), 1]}),
    _second("one of the scores a text", ("'scores'", "'2'"), LISTED | {"scores": [3, "2", 1]}),
]  # fmt: skip
