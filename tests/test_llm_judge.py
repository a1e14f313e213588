"""The LLM judge against a server that answers by rule, is slow, refuses, breaks off or talks nonsense."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pdpo.__main__ import main
from pdpo.data import load_split
from pdpo.llm_judge import ASKS, LLMJudge, read_verdict
from pdpo.presets import PRESETS

PROMPTS, GOOD, BAD = ["one?", "two?", "three?"], ["good 1", "good 2", "good 3"], ["bad 1", "bad 2", "bad 3"]


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("B is longer.\nBetter: A", "A"),
        ("better: **b**", "B"),
        ("Better: neither.", "neither"),
        ("Better: A, one may think. But no.\nBetter: B", "B"),
        ("A is better", None),
        ("Better: Answer", None),
        ("", None),
    ],
)
def test_the_last_verdict_in_an_answer_is_read(answer, verdict):
    assert read_verdict(answer) == verdict


def test_without_the_package_or_with_another_task_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ValueError, match=r'pip install "pdpo\[judge\]"'):
        LLMJudge("http://localhost:1/v1", "m", cache=tmp_path / "kept")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """judge(rule, ...): an LLMJudge on a server whose answers are rule(question, number) -> text, or a function of the handler."""
    pytest.importorskip("openai", reason="the extra `judge` is not installed")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(rule, **options):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                asked.append(question)
                answer = rule(question, len(asked))
                if callable(answer):
                    return answer(self)
                choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}]
                usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
                reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": choices}
                self.reply(200, json.dumps(reply | {"usage": usage}))

            def reply(self, status, text, kind="application/json", **headers):
                self.send_response(status)
                for key, value in ({"Content-Type": kind, "Content-Length": str(len(text))} | headers).items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        servers.append(http)
        url = f"http://127.0.0.1:{http.server_port}/v1"
        return LLMJudge(url, "stub", cache=tmp_path / "kept.jsonl", **{"max_retries": 2, "timeout": 20.0} | options), asked

    yield start
    for http in servers:
        http.shutdown()
        http.server_close()


def by_goodness(question, _):
    a, b = re.search(r"\[A\]\n(.*)\n\n\[B\]\n(.*)\n", question).groups()
    return f"Hm.\nBetter: {'A' if 'good' in a else 'B' if 'good' in b else 'neither'}"


def test_a_judge_who_sees_what_is_good_finds_it_in_both_orders_and_its_answers_are_kept(server):
    judge, asked = server(by_goodness)
    found = judge.compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [1, 1, 1] and found.first == 0.5 and (found.unreadable, found.num_tokens) == (0, 600)
    assert len(asked) == 6 and ASKS["dialogue"] in asked[0] and asked[0].index("good 1") < asked[0].index("bad 1")
    assert asked[1].index("bad 1") < asked[1].index("good 1")
    assert judge.compare(PROMPTS, BAD, GOOD).wins.tolist() == [0, 0, 0] and len(asked) == 6  # the same questions
    again, asked = server(by_goodness)
    assert again.compare(PROMPTS + ["four?"], BAD + ["x"], BAD + ["x"]).wins.tolist() == [0.5] * 4
    assert len(asked) == 4  # each pair of equals is one question


def test_a_judge_who_prefers_what_stands_first_ties_every_pair_and_is_found_out(server):
    judge, _ = server(lambda question, number: "Better: A")
    found = judge.compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [0.5] * 3 and found.first == 1.0


def test_unreadable_answers_are_ties_that_are_counted_and_nonsense_is_asked_again_the_next_time(server):
    nonsense = [
        lambda handler: handler.reply(200, "<html>busy</html>", kind="text/html"),
        lambda handler: handler.reply(200, '{"choices": []}'),
        lambda handler: handler.reply(200, '{"choices'),
    ]
    judge, asked = server(lambda question, number: "I would not say." if number == 1 else nonsense[number % 3])
    found = judge.compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [0.5] * 3 and found.unreadable == 6 and found.num_tokens == 100
    judge, asked = server(by_goodness)
    assert judge.compare(PROMPTS, GOOD, BAD).wins.tolist() == [0.75, 1, 1]  # of the first pair one answer is kept
    assert len(asked) == 5


def test_a_429_and_a_time_out_are_tried_again_and_where_the_server_stays_away_what_was_answered_is_kept(server, tmp_path):
    def busy(handler):
        handler.reply(429, '{"error": {"message": "slow down"}}', Retry_After="0")

    def slow(handler):
        time.sleep(1.5)

    judge, asked = server(lambda question, number: {1: busy, 3: slow}.get(number) or by_goodness(question, number), timeout=1.0)
    assert judge.compare(PROMPTS[:1], GOOD[:1], BAD[:1]).wins.tolist() == [1] and len(asked) == 4

    judge, asked = server(lambda question, number: busy if number > 2 else by_goodness(question, number))
    with pytest.raises(ValueError, match="gave no answer .RateLimitError.*kept in .*kept.jsonl; the same call goes on"):
        judge.compare(PROMPTS, GOOD, BAD)
    assert len(asked) == 2 + 3  # two new answers, then a question and two more tries
    with open(tmp_path / "kept.jsonl", "a") as file:
        file.write('\n{"key": "half of a li')
    judge, asked = server(by_goodness)
    assert judge.compare(PROMPTS, GOOD, BAD).wins.tolist() == [1, 1, 1] and len(asked) == 2
    judge, asked = server(by_goodness)
    assert judge.compare(PROMPTS, GOOD, BAD).wins.tolist() == [1, 1, 1] and not asked
    with pytest.raises(ValueError, match="expected task in"):
        server(by_goodness, task="poem")


def test_train_asks_the_judge_about_every_policy_at_its_end(server, quick, monkeypatch, capsys):
    judge, asked = server(
        lambda question, number: "Better: A" if number % 2 else "Better: B"
    )  # what is ours stands first, then second
    monkeypatch.setitem(PRESETS, "tiny", quick)
    options = ["--judge-url", judge.url, "--judge-model", "stub"]
    assert main(["train", "--preset", "tiny", "--data", quick.data, "--method", "unlikelihood", "--steps", "2", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "answers unreadable" in line]
    num = len(load_split(quick.data)[2])
    assert [line.split()[0] for line in lines] == ["sft", "unlikelihood"] and all(
        f" 0 of {2 * num} answers" in line for line in lines
    )
    assert "wins 1.000 [1.000, 1.000]; of what it decided it named the first in 0.50" in lines[0] and len(asked) >= 2 * num
