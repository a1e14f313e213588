"""Preference data: one record type, one loader that refuses malformed files by file, row and key, one split, one report."""

import functools
import hashlib
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

from pdpo.download import locate
from pdpo.encoding import encode, response_fits

_ODPO_DATA = "https://raw.githubusercontent.com/rycolab/odpo/6152f67c8cddc223ca5affc7e261d967568068ee/data/"
SOURCES = {  # name -> (file name, public address, sha256)
    "instructions": (
        "instruction-data-with-preference.json",
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/99af403b9f64dd0f820173402f5a56af41263536/"
        "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
        "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
    ),
    "imdb": (
        "imdb-sft-test.jsonl",
        _ODPO_DATA + "imdb-sft-test.jsonl",
        "9b19fb1dad943dd7a4fbe054ae005cedb458fbc904a493ca71942fbae3b2b613",
    ),
    "tldr": (
        "tldr-sft-train-rel.json",
        _ODPO_DATA + "tldr-sft-train-rel.json",
        "4faccc9ca37b64e2f848b89c8381560dadaa805b624507932b9692e6a32e9fff",
    ),
    "tldr-test": (
        "tldr-sft-test-rel.json",
        _ODPO_DATA + "tldr-sft-test-rel.json",
        "d982894172f9873409b45e2b703ab8ac9af7d789dbe96e630b18fd84ad59f0ea",
    ),
}
SCORED_NAMES = ("imdb", "tldr", "tldr-test")  # ODPO's data, whose rows `read_scored` gathers by prompt
CHOSEN_SCORE_KEYS = ("chosen_score", "score_chosen")
REJECTED_SCORE_KEYS = ("rejected_score", "score_rejected")


@dataclass(frozen=True)
class Preference:
    """One prompt and K >= 2 responses, best first.

    Attributes:
        prompt: the instruction, without a template.
        responses: K texts, best first, no EOS; no white space around them.
        scores: K finite numbers, higher is better, or None.
    Raises:
        ValueError: fewer than two responses, an empty text, a score that is missing or not finite.
    """

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None

    def __post_init__(self):
        if len(self.responses) < 2:
            raise ValueError(f"expected at least 2 responses, got {len(self.responses)}. A preference compares responses.")
        for key, text in [("prompt", self.prompt), *(("responses", response) for response in self.responses)]:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"key '{key}': expected a text that is not empty, got {short(text)}. Drop the row or fill it in."
                )
            if "\0" in text:
                raise ValueError(f"key '{key}': expected text, got a NUL character in it. The file is probably binary.")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"key '{key}': expected text, got half of a surrogate pair in it. Mend the \\u escapes.")
        if self.scores is not None:
            if len(self.scores) != len(self.responses):
                raise ValueError(
                    f"key 'scores': expected {len(self.responses)} scores, one a response, got {len(self.scores)}."
                )
            bad = [each for each in self.scores if not _is_finite_number(each)]
            if bad:
                raise ValueError(f"key 'scores': expected finite numbers, got {short(bad[0])}. Drop the row or mend the score.")

    @property
    def chosen(self) -> str:
        """The better of two responses; ValueError where there are more."""
        return self._pair()[0]

    @property
    def rejected(self) -> str:
        """The worse of two responses; ValueError where there are more."""
        return self._pair()[1]

    def _pair(self) -> tuple[str, ...]:
        if len(self.responses) != 2:
            raise ValueError(
                f"Preference.chosen: expected K = 2 responses, got {len(self.responses)}. Make pairs first (data.pairs)."
            )
        return self.responses


def load_preferences(path_or_name: str | Path) -> list[Preference]:
    """The records of a named data set or of a file.

    Args:
        path_or_name: "toy" (embedded), "instructions", "imdb", "tldr" or "tldr-test" (found in $PDPO_DATA_DIR or the cache,
            else downloaded; the last three by `read_scored`), or a .json file with a list of objects, or a .jsonl file with
            an object a line. An object has one of the shapes
            {prompt, chosen, rejected, [chosen_score, rejected_score]}          TRL's columns (score_chosen too)
            {prompt, responses, [scores]}                                       best first
            {instruction, [input], chosen, rejected}                            the `instructions` data set
    Returns:
        One Preference a row, in the file's order, duplicates kept; white space around texts stripped.
    Raises:
        ValueError: anything malformed, with file, row and key; nothing is half-read.
    """
    if str(path_or_name) in SCORED_NAMES:
        return read_scored(locate(*SOURCES[str(path_or_name)]))[0]
    if str(path_or_name) == "toy":
        return list(_toy())
    if str(path_or_name) in SOURCES:
        return _read(locate(*SOURCES[str(path_or_name)]))
    path = Path(path_or_name)
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"load_preferences: expected 'toy', {', '.join(map(repr, SOURCES))} or a .json or .jsonl file, got {str(path)!r}."
        )
    return _read(path)


@functools.cache
def _toy() -> tuple[Preference, ...]:
    from pdpo import toy  # not above: toy needs Preference from here

    return tuple(toy.load())


def read_scored(path: Path) -> tuple[list[Preference], dict[str, int]]:
    """ODPO's scored data: K responses to each prompt, sorted by score, and what was left out on the way.

    In these files most continuations lack the space that would join them to their prompt ("shocking" + "for the time"). Here
    nothing is joined: the one template puts a line break between prompt and response, and both are stripped, so that a text
    with the space and one without are the same text.

    Args:
        path: .jsonl with {prompt, text, reward} a line (`imdb`), or .json with {prompt: {responses, rewards}} (`tldr`).
    Returns:
        Records in the order of their prompts' first rows, best response first; and counts: empty (responses without text),
        repeated (rows merged with an equal text of their prompt, which keeps the mean score), alone (prompts left with one
        response), tied (prompts whose responses all score the same).
    Raises:
        ValueError: anything malformed, with file, row and key.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    dropped = dict.fromkeys(("empty", "repeated", "alone", "tied"), 0)
    for where, prompt, text, score in _scored_rows(path):
        if not isinstance(prompt, str) or not isinstance(text, str) or not _is_finite_number(score):
            raise ValueError(
                f"{path}, {where}: expected two texts and a finite score, got {short((prompt, text, score))}. Mend the row."
            )
        of_prompt = scores.setdefault(prompt.strip(), {})
        dropped["empty"] += not text.strip()
        dropped["repeated"] += text.strip() in of_prompt
        if text.strip():
            of_prompt.setdefault(text.strip(), []).append(score)
    records = []
    for prompt, of_prompt in scores.items():
        ranked = sorted(((sum(each) / len(each), text) for text, each in of_prompt.items()), key=lambda item: -item[0])
        dropped["alone"] += len(ranked) < 2
        dropped["tied"] += len(ranked) >= 2 and ranked[0][0] == ranked[-1][0]
        if len(ranked) >= 2 and ranked[0][0] > ranked[-1][0]:
            records.append(Preference(prompt, tuple(text for _, text in ranked), tuple(score for score, _ in ranked)))
    return records, dropped


def identical(record: Preference) -> bool:
    """Whether all responses are one text: there is nothing to prefer, and DPO's gradient is exactly zero."""
    return len(set(record.responses)) == 1


def split(
    records: list[Preference], *, seed: int, fractions: tuple[float, float, float] = (0.85, 0.05, 0.10)
) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """Train, validation and test, grouped by prompt: no prompt is in two parts, and duplicates stay together.

    Args:
        records: any; their order does not matter for which prompt goes where.
        seed: of the assignment.
        fractions: of the prompts, in the order train, validation, test; they sum to 1.
    Returns:
        Three lists, each in the order of `records`.
    Raises:
        ValueError: fractions that are negative or do not sum to 1; a part that would be empty though its fraction is not 0.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0):
        raise ValueError(f"split: expected three fractions >= 0 that sum to 1, got {fractions}.")
    prompts = sorted({record.prompt.strip() for record in records})
    random.Random(seed).shuffle(prompts)
    first = round(fractions[0] * len(prompts))
    second = first + round(fractions[1] * len(prompts))
    sizes = (first, second - first, len(prompts) - second)
    if any(size < 1 for size, fraction in zip(sizes, fractions, strict=True) if fraction > 0):
        raise ValueError(
            f"split: expected enough prompts for three parts, got {len(prompts)} prompts, which fractions {fractions} cut "
            f"into {sizes}. Add data or change the fractions."
        )
    part_of = {prompt: 0 if i < first else 1 if i < second else 2 for i, prompt in enumerate(prompts)}
    parts: tuple[list, list, list] = ([], [], [])
    for record in records:
        parts[part_of[record.prompt.strip()]].append(record)
    return parts


def load_split(path_or_name: str | Path) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """The split that every stage and notebook uses: train, validation, test of one data set, with the fixed seed 0.

    Records whose responses are all one text are left out (`data_report` counts them in what `load_preferences` gives).
    """
    records = [record for record in load_preferences(path_or_name) if not identical(record)]
    if str(path_or_name) == "toy":
        from pdpo import toy

        return toy.split(records, seed=0)
    return split(records, seed=0)


def pairs(records: list[Preference], *, num_per_prompt: int | None = None, seed: int = 0) -> list[Preference]:
    """K ranked responses -> pairs (K = 2) of a better and a worse one, with their scores.

    Args:
        records: K >= 2 responses each, best first.
        num_per_prompt: how many of the K(K-1)/2 pairs, drawn without replacement; None is all of them, each once.
        seed: of the draw.
    Returns:
        Pairs in the order of `records`; training shuffles them, so that those of one prompt spread over batches. Left out:
        pairs of one text twice, which teach nothing, and ties of a ranking with K > 2, whose order is an accident.
    """
    rng = random.Random(seed)
    made = []
    for record in records:
        num = len(record.responses)
        ranks = record.scores if record.scores is not None and num > 2 else range(num)
        choices = [
            (i, j)
            for i in range(num)
            for j in range(i + 1, num)
            if record.responses[i] != record.responses[j] and ranks[i] != ranks[j]
        ]
        if num_per_prompt is not None and num_per_prompt < len(choices):
            choices = sorted(rng.sample(choices, num_per_prompt))
        for i, j in choices:
            scores = None if record.scores is None else (record.scores[i], record.scores[j])
            made.append(Preference(record.prompt, (record.responses[i], record.responses[j]), scores))
    return made


def data_report(records: list[Preference], tokenizer, *, max_length: int | None = None, held_out=()) -> dict:
    """Counts of what commonly goes wrong in preference data.

    Args:
        records: the part to train on.
        tokenizer: `load_tokenizer(preset)`, for lengths.
        max_length: tokens a sequence may have; None is the tokenizer's own limit.
        held_out: records to look for leaks in.
    Returns:
        rows, unique_prompts, duplicate_prompts (rows beyond the first of their prompt), identical (all responses one
        text), tied and flipped (score of the first not above, or below, that of the last), truncated (rows whose prompt
        loses tokens), too_long (rows with a response that does not fit: training refuses them), prompt_tokens,
        best_tokens, worst_tokens and length_gap (means; gap = best - worst, in tokens), best_longer (share of rows in
        which the best response has more tokens than the worst), leaked_prompts (also in held_out).
    """
    limit = max_length or tokenizer.model_max_length
    prompts = Counter(record.prompt.strip() for record in records)
    best, worst, prompt_lengths, truncated, too_long = [], [], [], 0, 0
    for record in records:
        encoded = [encode(tokenizer, record.prompt, text, max_length=10**9) for text in record.responses]
        best.append(len(encoded[0].input_ids) - encoded[0].num_prompt)
        worst.append(len(encoded[-1].input_ids) - encoded[-1].num_prompt)
        prompt_lengths.append(encoded[0].num_prompt)
        fits = all(response_fits(each, limit) for each in encoded)
        too_long += not fits
        truncated += fits and any(len(each.input_ids) > limit for each in encoded)
    scored = [record.scores for record in records if record.scores is not None]
    held_out_prompts = {record.prompt.strip() for record in held_out}

    def mean(values):
        return sum(values) / max(len(values), 1)

    return {
        "rows": len(records),
        "unique_prompts": len(prompts),
        "duplicate_prompts": len(records) - len(prompts),
        "identical": sum(map(identical, records)),
        "tied": sum(scores[0] == scores[-1] for scores in scored),
        "flipped": sum(scores[0] < scores[-1] for scores in scored),
        "truncated": truncated,
        "too_long": too_long,
        "prompt_tokens": round(mean(prompt_lengths), 1),
        "best_tokens": round(mean(best), 1),
        "worst_tokens": round(mean(worst), 1),
        "length_gap": round(mean(best) - mean(worst), 1),
        "best_longer": round(mean([b > w for b, w in zip(best, worst, strict=True)]), 3),
        "leaked_prompts": len(held_out_prompts & prompts.keys()),
    }


def fingerprint(records: list[Preference]) -> str:
    """sha256 of the records, by which trained stages know their data."""
    rows = [[record.prompt, record.responses, record.scores] for record in records]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read(path: Path) -> list[Preference]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got byte {error.start} that is not. Convert the file to UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got: {error.strerror}. Check the path.") from None
    if path.suffix == ".jsonl":
        rows = [
            (f"line {number}", _parse(f"{path}, line {number}", line))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    else:
        parsed = _parse(str(path), text)
        if not isinstance(parsed, list):
            raise ValueError(
                f"{path}: expected a list of objects, got {type(parsed).__name__}. For one object a line use .jsonl."
            )
        rows = [(f"row {number}", row) for number, row in enumerate(parsed, 1)]
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none.")
    records = []
    for where, row in rows:
        try:
            records.append(_preference(row))
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from None
    return records


def _scored_rows(path: Path):
    """(where, prompt, text, score) for each row of a scored file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = _parse(f"{path}, line {number}", line)
                if not isinstance(row, dict) or not {"prompt", "text", "reward"} <= row.keys():
                    raise ValueError(f"{path}, line {number}: expected {{'prompt', 'text', 'reward'}}, got {short(row)}.")
                yield f"line {number}", row["prompt"], row["text"], row["reward"]
        return
    for prompt, row in _parse(str(path), text).items():
        lists = [row.get(key) for key in ("responses", "rewards")] if isinstance(row, dict) else [row]
        if not all(isinstance(each, list) for each in lists) or len({len(each) for each in lists}) != 1 or len(lists) != 2:
            raise ValueError(
                f"{path}, prompt {short(prompt)}: expected 'responses' and as many 'rewards', got {short(row)}. Mend the row."
            )
        for number, (response, score) in enumerate(zip(*lists, strict=True), 1):
            yield f"prompt {short(prompt)}, response {number}", prompt, response, score


def _parse(where: str, text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise ValueError(f"{where}: expected JSON, got: {error}. Is the file complete?") from None


def _preference(row) -> Preference:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}. A row is {{'prompt', 'chosen', 'rejected'}}.")
    prompt = _text(row, "instruction" if "instruction" in row and "prompt" not in row else "prompt")
    if "instruction" in row and "prompt" not in row and row.get("input") is not None and str(row["input"]).strip():
        prompt += "\n" + _text(row, "input")
    if "responses" in row:
        responses = row["responses"]
        if not isinstance(responses, list):
            raise ValueError(f"key 'responses': expected a list of texts, got {type(responses).__name__}.")
        scores = row.get("scores")
        if scores is not None and not isinstance(scores, list):
            raise ValueError(f"key 'scores': expected a list of numbers, got {type(scores).__name__}.")
        texts = tuple(text.strip() if isinstance(text, str) else text for text in responses)
        return _ranked(prompt, texts, None if scores is None else tuple(scores))
    responses = (_text(row, "chosen"), _text(row, "rejected"))
    found = [next((key for key in keys if row.get(key) is not None), None) for keys in (CHOSEN_SCORE_KEYS, REJECTED_SCORE_KEYS)]
    if found[0] is None and found[1] is None:
        return Preference(prompt, responses)
    for key, names in zip(found, (CHOSEN_SCORE_KEYS, REJECTED_SCORE_KEYS), strict=True):
        if key is None:
            raise ValueError(f"key '{names[0]}': expected a score for both responses or for none, got only the other one's.")
        if not _is_finite_number(row[key]):
            raise ValueError(f"key '{key}': expected a finite number, got {short(row[key])}. Drop the row or mend the score.")
    return Preference(prompt, responses, (float(row[found[0]]), float(row[found[1]])))


def _ranked(prompt: str, texts: tuple, scores: tuple | None) -> Preference:
    """A listed ranking; scores that contradict it mean that the file is not sorted best first."""
    record = Preference(prompt, texts, scores)
    if scores is not None and any(a < b for a, b in zip(scores, scores[1:], strict=False)):
        raise ValueError(
            f"key 'scores': expected responses best first, got scores {short(list(scores))}. Sort each row by score."
        )
    return record


def _text(row: dict, key: str) -> str:
    if key not in row:
        raise ValueError(f"key '{key}': missing; the row has {sorted(row)}. Expected 'prompt', 'chosen' and 'rejected'.")
    if isinstance(row[key], list):
        raise ValueError(f"key '{key}': expected a text, got a list. Chat messages are not read; flatten them to text.")
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"key '{key}': expected a text that is not empty, got {short(row[key])}. Drop the row or fill it in.")
    return row[key].strip()


def _is_finite_number(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float's range
        return False
