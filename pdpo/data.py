"""Preference data: one record type, one loader that refuses malformed files by file, row and key, one split, one report."""

import functools
import hashlib
import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

from pdpo import toy
from pdpo.encoding import encode, response_fits
from pdpo.files import SOURCES, locate
from pdpo.parsing import check_score, check_text, is_finite, parse_row, read_rows, scored_rows
from pdpo.reach import in_key

SCORED_NAMES = ("imdb", "tldr", "tldr-test")  # ODPO's data, whose rows `read_scored` gathers by prompt


@dataclass(frozen=True)
class Preference:
    """One prompt (no template) and K >= 2 responses, best first (no EOS); scores: K finite numbers, higher is better, or None."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        scores = "" if self.scores is None else f", scores {self.scores[0]:g} to {self.scores[-1]:g}"
        best, worst = short(self.responses[0]), short(self.responses[-1])
        return f"<Preference {short(self.prompt)}: {best} over {worst}, K = {len(self.responses)}{scores}>"

    def __post_init__(self):
        if len(self.responses) < 2:
            raise ValueError(f"expected at least 2 responses, got {len(self.responses)}. A preference compares responses.")
        for key, text in [("prompt", self.prompt), *(("responses", response) for response in self.responses)]:
            check_text(key, text)
        if self.scores is not None and len(self.scores) != len(self.responses):
            raise ValueError(f"key 'scores': expected {len(self.responses)} scores, one a response, got {len(self.scores)}.")
        for score in self.scores or ():
            check_score("scores", score)

    chosen = property(lambda self: self._pair()[0], doc="The better of two responses; ValueError where there are more.")
    rejected = property(lambda self: self._pair()[1], doc="The worse of two responses; ValueError where there are more.")

    def _pair(self) -> tuple[str, ...]:
        if len(self.responses) != 2:
            raise ValueError(f"Preference.chosen: expected K = 2 responses, got {len(self.responses)}. Use data.pairs first.")
        return self.responses


class Records(list):
    """Preferences; a list that a cell shows in one line, and not all of it."""

    def __repr__(self) -> str:
        return f"<{len(self)} preferences{f', the first: {self[0]!r}' if self else ''}>"


def load_preferences(path_or_name: str | Path) -> list[Preference]:
    """The records of a named data set or of a file: one Preference a row, in the file's order, duplicates kept.

    Named: "toy" (embedded); "instructions", "imdb", "tldr" and "tldr-test", from $PDPO_DATA_DIR or the cache, else downloaded,
    the last three by `read_scored`. Files: .json with a list of objects or .jsonl with an object a line, each one of
        {prompt, chosen, rejected, [chosen_score, rejected_score]}    TRL's columns (score_chosen too)
        {prompt, responses, [scores]}                                 best first
        {instruction, [input], chosen, rejected}                      the `instructions` data set"""
    name, path = str(path_or_name), Path(path_or_name)
    if name == "toy":
        return Records(_toy())
    if name in SOURCES:
        path = locate(*SOURCES[name])
    elif path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"load_preferences: expected 'toy', {', '.join(map(repr, SOURCES))}, .json or .jsonl, got {name!r}.")
    return read_scored(path)[0] if name in SCORED_NAMES else _read(path)


@functools.cache
def _toy() -> tuple[Preference, ...]:
    return tuple(Preference(*example) for example in toy.load())


def read_scored(path: Path) -> tuple[list[Preference], dict[str, int]]:
    """ODPO's scored data: K responses to each prompt, sorted by score, and what was left out on the way.

    Most continuations there lack the space that would join them to their prompt ("shocking" + "for the time"). The template
    puts a line break between the two, and both are stripped: a text with the space and one without are the same text.
    Args: path: .jsonl with {prompt, text, reward} a line (`imdb`), or .json with {prompt: {responses, rewards}} (`tldr`).
    Returns: Records in the order of their prompts' first rows; and counts: empty (responses without text), repeated (rows
        merged with an equal text of their prompt, with the mean score), alone (prompts left with one response), tied (prompts
        whose responses all score the same)."""
    scores: dict[str, dict[str, list[float]]] = {}
    dropped = dict.fromkeys(("empty", "repeated", "alone", "tied"), 0)
    for where, prompt, text, score in scored_rows(path):
        if not isinstance(prompt, str) or not isinstance(text, str) or not is_finite(score):
            got = short((prompt, text, score))
            raise ValueError(f"{path}, {where}: expected two texts and a finite score, got {got}. Mend the row.")
        of_prompt, text = scores.setdefault(prompt.strip(), {}), text.strip()
        dropped["empty"] += not text
        dropped["repeated"] += text in of_prompt
        if text:
            of_prompt.setdefault(text, []).append(score)
    records = Records()
    for prompt, of_prompt in scores.items():
        ranked = sorted(((sum(each) / len(each), text) for text, each in of_prompt.items()), key=lambda item: -item[0])
        if len(ranked) < 2 or ranked[0][0] == ranked[-1][0]:
            dropped["alone" if len(ranked) < 2 else "tied"] += 1
        else:
            records.append(Preference(prompt, tuple(text for _, text in ranked), tuple(score for score, _ in ranked)))
    return records, dropped


def identical(record: Preference) -> bool:
    """Whether all responses are one text: there is nothing to prefer, and DPO's gradient is exactly zero."""
    return len(set(record.responses)) == 1


Split = tuple[list[Preference], list[Preference], list[Preference]]  # train, validation, test


def split(records: list[Preference], *, seed: int, fractions: tuple[float, float, float] = (0.85, 0.05, 0.10)) -> Split:
    """Train, validation and test, these fractions of the prompts: no prompt is in two parts, and duplicates stay together.

    Returns: Three lists, each in the order of `records`, which does not matter for which prompt goes where."""
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0):
        raise ValueError(f"split: expected three fractions >= 0 that sum to 1, got {fractions}.")
    prompts = sorted({record.prompt.strip() for record in records})
    random.Random(seed).shuffle(prompts)
    first = round(fractions[0] * len(prompts))
    second = first + round(fractions[1] * len(prompts))
    sizes = (first, second - first, len(prompts) - second)
    if any(size < 1 for size, fraction in zip(sizes, fractions, strict=True) if fraction > 0):
        raise ValueError(f"split: expected enough prompts for three parts, got {len(prompts)} prompts: {sizes}. Add data.")
    part_of = {prompt: 0 if i < first else 1 if i < second else 2 for i, prompt in enumerate(prompts)}
    parts = (Records(), Records(), Records())
    for record in records:
        parts[part_of[record.prompt.strip()]].append(record)
    return parts


@in_key
def load_split(path_or_name: str | Path) -> Split:
    """The split that every stage and notebook uses: train, validation, test of one data set, with the fixed seed 0.

    Records whose responses are all one text are left out (`data_report` counts them in what `load_preferences` gives)."""
    loaded = load_preferences(path_or_name)
    records = [record for record in loaded if not identical(record)]
    if not records:
        raise ValueError(f"{path_or_name}: expected rows with different responses, got {len(loaded)} rows of equal ones.")
    return tuple(Records(part) for part in (toy.split if str(path_or_name) == "toy" else split)(records, seed=0))


def pairs(records: list[Preference], *, num_per_prompt: int | None = None, seed: int = 0) -> list[Preference]:
    """K ranked responses -> pairs (K = 2) of a better and a worse one, with their scores.

    Args: num_per_prompt: how many of the K(K-1)/2 pairs, drawn without replacement; None is all of them, each once.
    Returns: Pairs in the order of `records`; training shuffles them, so that those of one prompt spread over batches. Left out:
        pairs of one text twice, which teach nothing, and ties of a ranking with K > 2, whose order is an accident."""
    rng = random.Random(seed)
    made = Records()
    for record in records:
        texts, num = record.responses, len(record.responses)
        ranks = record.scores if record.scores is not None and num > 2 else range(num)
        choices = [(i, j) for i, j in itertools.combinations(range(num), 2) if texts[i] != texts[j] and ranks[i] != ranks[j]]
        if num_per_prompt is not None and num_per_prompt < len(choices):
            choices = sorted(rng.sample(choices, num_per_prompt))
        for i, j in choices:
            scores = None if record.scores is None else (record.scores[i], record.scores[j])
            made.append(Preference(record.prompt, (texts[i], texts[j]), scores))
    return made


def data_report(records: list[Preference], tokenizer, *, max_length: int | None = None, held_out=()) -> dict:
    """Counts of what commonly goes wrong in preference data.

    Args: max_length: tokens a sequence may have; None is the tokenizer's own limit. held_out: records to look for leaks in.
    Returns: rows, unique_prompts, duplicate_prompts (rows beyond the first of their prompt), identical (all responses one
        text), tied and flipped (score of the first not above, or below, that of the last), truncated (rows whose prompt loses
        tokens), too_long (rows with a response that does not fit: training refuses them), prompt_tokens, best_tokens,
        worst_tokens and length_gap (means; gap = best - worst, in tokens), best_longer (share of rows in which the best
        response has more tokens than the worst), leaked_prompts (also in held_out)."""
    limit = max_length or tokenizer.model_max_length
    prompts, held_out_prompts = ({record.prompt.strip() for record in part} for part in (records, held_out))
    lengths, truncated, too_long = [], 0, 0  # of prompt, best and worst response
    for record in records:
        encoded = [encode(tokenizer, record.prompt, text, max_length=10**9) for text in record.responses]
        ends = (len(each.input_ids) - each.num_prompt for each in (encoded[0], encoded[-1]))
        lengths.append((encoded[0].num_prompt, *ends))
        fits = all(response_fits(each, limit) for each in encoded)
        too_long += not fits
        truncated += fits and any(len(each.input_ids) > limit for each in encoded)
    scored, num = [record.scores for record in records if record.scores is not None], max(len(records), 1)
    prompt, best, worst = (sum(column) / num for column in zip(*lengths or [(0, 0, 0)], strict=True))
    return {
        "rows": len(records),
        "unique_prompts": len(prompts),
        "duplicate_prompts": len(records) - len(prompts),
        "identical": sum(map(identical, records)),
        "tied": sum(scores[0] == scores[-1] for scores in scored),
        "flipped": sum(scores[0] < scores[-1] for scores in scored),
        "truncated": truncated,
        "too_long": too_long,
        **{"prompt_tokens": round(prompt, 1), "best_tokens": round(best, 1), "worst_tokens": round(worst, 1)},
        "length_gap": round(best - worst, 1),
        "best_longer": round(sum(b > w for _, b, w in lengths) / num, 3),
        "leaked_prompts": len(held_out_prompts & prompts),
    }


def fingerprint(records: list[Preference]) -> str:
    """sha256 of the records, by which trained stages know their data."""
    rows = [[record.prompt, record.responses, record.scores] for record in records]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read(path: Path) -> list[Preference]:
    records = Records()
    for where, row in read_rows(path):
        try:
            records.append(record := Preference(*parse_row(row)))
            scores = list(record.scores or ())
            if isinstance(row.get("scores"), list) and scores != sorted(scores)[::-1]:
                raise ValueError(f"key 'scores': expected responses best first, got {short(scores)}. Sort each row by score.")
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from None
    return records
