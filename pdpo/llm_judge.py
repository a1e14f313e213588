"""A language model as the judge, behind any OpenAI-compatible endpoint: which of two responses is better?

Each pair is asked twice, the second time in the other order; answers are kept in a file, from which a run that broke off goes on."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pdpo.progress import progress

ASKS = {  # what the papers ask of their judges, in our own words: two ways for a summary, one for a dialogue
    "summary": "Here are a text and two summaries of it. Which of them tells better what matters most in the text?",
    "concise-summary": "Here are a text and two summaries of it. Which of them tells better what matters most in the text, and nothing "
    "that does not? A summary that adds minor details, or says a thing twice, is worse for it.",
    "dialogue": "Here are a request to an assistant and two answers. Which of them helps more?",
}
FORM = """{ask}

[TEXT]
{prompt}

[A]
{a}

[B]
{b}

First write one sentence that compares the two. Then end with a line that reads "Better: A", "Better: B" or "Better: neither"."""


class Verdicts(NamedTuple):
    """Of N pairs, each asked in both orders."""

    wins: np.ndarray  # (N,): 1 where the text won, 0 where the other did, 0.5 for a tie; the mean of both orders
    first: float  # share of decided answers that named what stood first; 0.5 where position does not matter
    unreadable: int  # of the 2 N answers: no verdict could be read from them, and they count as ties
    num_tokens: int  # of questions and answers, also of those that were kept already


class LLMJudge:
    """Asks `model` at `url`; the key is $OPENAI_API_KEY, where the endpoint wants one.

    Args:
        url: such as http://localhost:8000/v1.
        task: a key of `ASKS`.
        cache: a file, JSON lines: what has been answered is not asked again.
        timeout, max_retries: seconds for one answer, and how often it is asked for again (with growing pauses, and as long as the
            server says) after a time-out, a 429 or an error of the server.
    """

    def __init__(
        self, url: str, model: str, *, task: str = "dialogue", cache: Path, timeout: float = 60.0, max_retries: int = 5
    ):
        try:
            import openai
        except ImportError:
            raise ValueError(
                'LLMJudge: an LLM judge needs the package openai. Install it: pip install "pdpo[judge]".'
            ) from None
        if task not in ASKS:
            raise ValueError(f"LLMJudge: expected task in {tuple(ASKS)}, got {task!r}.")
        self.url, self.model, self.task, self.cache, self.errors = url, model, task, Path(cache), openai.OpenAIError
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.options = {"temperature": 0.0, "max_tokens": 200}  # some models take neither
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=max_retries)

    def compare(self, prompts: Sequence[str], texts: Sequence[str], others: Sequence[str]) -> Verdicts:
        """Verdicts on text against other, for N prompts."""
        questions = []
        for prompt, text, other in zip(prompts, texts, others, strict=True):
            for a, b in ((text, other), (other, text)):
                questions.append(FORM.format(ask=ASKS[self.task], prompt=prompt, a=a, b=b))
        known = self._known()
        new = [each for each in dict.fromkeys(questions) if self._key(each) not in known]
        for question in progress(new, "asking the judge"):
            answer = known[self._key(question)] = self._ask(question)
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "a", encoding="utf-8") as file:  # begins a line: the last may have been left half written
                file.write("\n" + json.dumps({"key": self._key(question)} | answer) * bool(answer["text"]))
        answers = [known[self._key(each)] for each in questions]
        letters = [read_verdict(each["text"]) for each in answers]
        for_text = [{"A": 1.0, "B": 0.0}.get(letter, 0.5) for letter in letters]
        wins = [(one + 1 - two) / 2 for one, two in zip(for_text[::2], for_text[1::2], strict=True)]
        decided = [letter for letter in letters if letter in ("A", "B")]
        first = decided.count("A") / len(decided) if decided else float("nan")
        return Verdicts(np.array(wins), first, letters.count(None), sum(each["tokens"] for each in answers))

    def _ask(self, question: str) -> dict:
        messages = [{"role": "user", "content": question}]
        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages, **self.options)
            choice = reply.choices[0].message.content
            return {"text": choice or "", "tokens": reply.usage.total_tokens if reply.usage else 0}
        except (AttributeError, LookupError, TypeError, ValueError):  # not the protocol: unreadable, and asked again next time
            return {"text": "", "tokens": 0}
        except self.errors as error:
            if self.options and getattr(error, "status_code", None) == 400:
                print(f"{self.model} may not take {' and '.join(self.options)}: it is asked without ({str(error)[:100]})")
                self.options = {}
                return self._ask(question)
            raise ValueError(
                f"LLMJudge: {self.model} at {self.url} gave no answer ({type(error).__name__}: {str(error)[:200]}). What was answered is "
                f"kept in {self.cache}; the same call goes on from there."
            ) from None

    def _key(self, question: str) -> str:
        return hashlib.sha256(f"{self.url}\n{self.model}\n{question}".encode()).hexdigest()

    def _known(self) -> dict[str, dict]:
        """What has been answered; a last line that a killed process left half written is passed over."""
        found = {}
        for line in self.cache.read_text(encoding="utf-8").splitlines() if self.cache.is_file() else ():
            try:
                row = json.loads(line)
                found[row["key"]] = {"text": row["text"], "tokens": row["tokens"]}
            except (ValueError, LookupError, TypeError):
                continue
        return found


def read_verdict(answer: str) -> str | None:
    """ "A", "B" or "neither": the last verdict in an answer; None where there is none to read."""
    found = re.findall(r"better:\W*(A|B|neither)\b", answer, flags=re.IGNORECASE)
    return {"a": "A", "b": "B", "neither": "neither"}[found[-1].lower()] if found else None
