"""Rows of preference files, in whichever of the known shapes; what is malformed is refused by file, row and key."""

import json
import math
from pathlib import Path
from reprlib import repr as short

MAX_CHARACTERS = 1_000_000  # of one text: far beyond every context, and still encoded within seconds
SCORE_KEYS = (("chosen_score", "score_chosen"), ("rejected_score", "score_rejected"))


def read_rows(path: Path, *, kind: type = list) -> list[tuple[str, object]]:
    """(where, row) of each row of a .jsonl file, or of a .json file with a list; with kind=dict, (key, value) of its object."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected a file, got a pipe or a device, which may have no end. Copy it to a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got byte {error.start} that is not. Convert the file to UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got: {error.strerror}. Check the path.") from None
    if path.suffix == ".jsonl":
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, _parse(f"{path}, {where}", line)) for where, line in lines]
    else:
        parsed = _parse(str(path), text)
        if not isinstance(parsed, kind):
            wanted = "a list of objects" if kind is list else "one object"
            raise ValueError(f"{path}: expected {wanted}, got {type(parsed).__name__}. For one object a line use .jsonl.")
        rows = list(parsed.items()) if kind is dict else [(f"row {number}", row) for number, row in enumerate(parsed, 1)]
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none.")
    return rows


def _parse(where: str, text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise ValueError(f"{where}: expected JSON, got: {error}. Is the file complete?") from None


def parse_row(row) -> tuple[str, tuple, tuple | None]:
    """A row's prompt, responses and scores, in whichever of the shapes of `data.load_preferences` it is."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}. A row is {{'prompt', 'chosen', 'rejected'}}.")
    if any(isinstance(row.get(key), list) for key in ("prompt", "chosen", "rejected")):
        row = _without_messages(row)
    key = "instruction" if "instruction" in row and "prompt" not in row else "prompt"
    prompt = _text(row, key)
    if key == "instruction" and row.get("input") is not None and str(row["input"]).strip():
        prompt += "\n" + _text(row, "input")
    if "responses" in row:
        for key, kind in (("responses", "texts"), ("scores", "numbers")):
            if not isinstance(row.get(key, []), list) and (key, row[key]) != ("scores", None):
                raise ValueError(f"key '{key}': expected a list of {kind}, got {type(row[key]).__name__}.")
        texts = tuple(text.strip() if isinstance(text, str) else text for text in row["responses"])
        return prompt, texts, None if row.get("scores") is None else tuple(row["scores"])
    responses = (_text(row, "chosen"), _text(row, "rejected"))
    found = [next((key for key in keys if row.get(key) is not None), None) for keys in SCORE_KEYS]
    if found == [None, None]:
        return prompt, responses, None
    for key, (name, _) in zip(found, SCORE_KEYS, strict=True):
        if key is None:
            raise ValueError(f"key '{name}': expected a score for both responses or for none, got only the other one's.")
        check_score(key, row[key])
    return prompt, responses, tuple(float(row[key]) for key in found)


def _without_messages(row: dict) -> dict:
    """A row of TRL's conversational format as texts. One message is its content; of several each begins with its role."""
    read = {}
    for key in ("prompt", "chosen", "rejected"):
        messages = row.get(key, [])
        read[key] = messages if isinstance(messages, list) else [{"role": "user", "content": messages}]
        well_formed = all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in read[key])
        if (key in row and not read[key]) or not well_formed:
            raise ValueError(f"key '{key}': expected a list of {{'role', 'content'}}, got {short(row[key])}. Mend the row.")
    if "prompt" not in row:  # then it is what the two conversations share
        equal = [a == b for a, b in zip(read["chosen"], read["rejected"], strict=False)]
        num = (equal + [False]).index(False)
        read = {"prompt": read["chosen"][:num], "chosen": read["chosen"][num:], "rejected": read["rejected"][num:]}
    for key, messages in read.items():
        for each in messages:
            check_text(key, each["content"])
    several = {key: "\n".join(f"{each['role']}: {each['content'].strip()}" for each in read[key]) for key in read}
    return row | {key: messages[0]["content"] if len(messages) == 1 else several[key] for key, messages in read.items()}


def _text(row: dict, key: str) -> str:
    if key not in row:
        raise ValueError(f"key '{key}': missing; the row has {sorted(row)}. Expected 'prompt', 'chosen' and 'rejected'.")
    check_text(key, row[key])
    return row[key].strip()


def scored_rows(path: Path):
    """(where, prompt, text, score) for each row of a scored file."""
    if path.suffix == ".jsonl":
        for where, row in read_rows(path):
            if not isinstance(row, dict) or not {"prompt", "text", "reward"} <= row.keys():
                raise ValueError(f"{path}, {where}: expected {{'prompt', 'text', 'reward'}}, got {short(row)}.")
            yield where, row["prompt"], row["text"], row["reward"]
        return
    for prompt, row in read_rows(path, kind=dict):
        lists = [row.get(key) for key in ("responses", "rewards")] if isinstance(row, dict) else [row]
        if len(lists) != 2 or not all(isinstance(each, list) for each in lists) or len(lists[0]) != len(lists[1]):
            where = f"{path}, prompt {short(prompt)}"
            raise ValueError(f"{where}: expected 'responses' and as many 'rewards', got {short(row)}. Mend the row.")
        for number, (response, score) in enumerate(zip(*lists, strict=True), 1):
            yield f"prompt {short(prompt)}, response {number}", prompt, response, score


def check_text(key: str, text) -> None:
    """ValueError unless it is a text with something in it that can be written as UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"key '{key}': expected a text that is not empty, got {short(text)}. Drop the row or fill it in.")
    if (num := len(text)) > MAX_CHARACTERS:
        raise ValueError(f"key '{key}': expected at most {MAX_CHARACTERS} characters, got {num}. Drop or shorten the row.")
    if "\0" in text:
        raise ValueError(f"key '{key}': expected text, got a NUL character in it. The file is probably binary.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"key '{key}': expected text, got half of a surrogate pair in it. Mend the \\u escapes.")


def check_score(key: str, score) -> None:
    """ValueError unless it is a finite number."""
    if not is_finite(score):
        raise ValueError(f"key '{key}': expected a finite number, got {short(score)}. Drop the row or mend the score.")


def is_finite(value) -> bool:
    """Whether it is a number, no bool, that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float's range
        return False
