"""The LLM judge against a server that answers by rule, is slow, refuses, breaks off or talks nonsense, and against a real one."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import wait_until
from transformers import GPT2Config, GPT2LMHeadModel

from pdpo.__main__ import main
from pdpo.data import load_split
from pdpo.encoding import TEMPLATE, chat_template
from pdpo.llm_judge import ASKS, LLMJudge, read_verdict
from pdpo.presets import PRESETS

PROMPTS, GOOD, BAD = ["one?", "two?", "three?"], ["good 1", "good 2", "good 3"], ["bad 1", "bad 2", "bad 3"]
REPLY = {"id": "1", "object": "chat.completion", "created": 1, "model": "stub"}


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("B is longer.\nBetter: A", "A"),
        ("better: **b**", "B"),
        ("Better: neither.", "neither"),
        ("Better: A, one may think. But no.\nBetter: B", "B"),
        ("A is better", None),
        ("Better: Answer", None),
    ],
)
def test_the_last_verdict_in_an_answer_is_read(answer, verdict):
    assert read_verdict(answer) == verdict


def test_without_the_package_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r'pip install "pdpo\[judge\]"'):
        LLMJudge("http://localhost:1/v1", "m", cache=tmp_path / "kept")


@pytest.fixture
def loopback(monkeypatch):
    """No key, and no proxy between us and this machine."""
    pytest.importorskip("openai", reason="the extra `judge` is not installed")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def choices(answer: str) -> list[dict]:
    return [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}]


class Handler(BaseHTTPRequestHandler):
    """Notes the question; answers what its server's rule says, or does it, where that is a function of this handler."""

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = self.body["messages"][0]["content"]
        self.server.asked.append(question)
        answer = self.server.rule(question, len(self.server.asked))
        if callable(answer):
            return answer(self)
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        self.reply(200, json.dumps(REPLY | {"choices": choices(answer), "usage": usage}))

    def reply(self, status, text, **headers):
        self.send_response(status)
        for key, value in ({"Content_Type": "application/json", "Content_Length": str(len(text))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, loopback):
    """server(rule, ...): an LLMJudge on a server, always the same, whose answers are from now on rule(question, number), and the
    questions that it is asked."""

    def start(rule, *, model="stub", path="v1", **options):
        http.rule, http.asked = rule, []
        url = f"http://127.0.0.1:{http.server_port}/{path}"
        options = {"max_retries": 2, "timeout": 20.0} | options
        return LLMJudge(url, model, cache=tmp_path / "kept.jsonl", **options), http.asked

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield start
        http.shutdown()


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


def test_a_judge_who_prefers_what_stands_first_ties_every_pair_and_is_found_out_and_neither_is_a_tie_that_was_read(server):
    found = server(lambda question, number: "Better: A")[0].compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [0.5] * 3 and found.first == 1.0
    found = server(lambda question, number: "Better: neither", model="other")[0].compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [0.5] * 3 and found.unreadable == 0 and found.first != found.first  # nothing was decided


def test_unreadable_answers_are_ties_that_are_counted_and_nonsense_is_asked_again_the_next_time(server):
    nonsense = [
        lambda handler: handler.reply(200, "<html>busy</html>", Content_Type="text/html"),
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
    times = []

    def busy(handler):  # the client alone would wait for half a second
        handler.reply(429, '{"error": {"message": "slow down"}}', Retry_After="1")

    def slow(handler):
        time.sleep(1.5)

    def rule(question, number):
        times.append(time.monotonic())
        return {1: busy, 3: slow}.get(number) or by_goodness(question, number)

    judge, asked = server(rule, timeout=1.0)
    assert judge.compare(PROMPTS[:1], GOOD[:1], BAD[:1]).wins.tolist() == [1] and len(asked) == 4
    assert times[1] - times[0] > 0.95

    judge, asked = server(lambda question, number: busy if number > 2 else by_goodness(question, number))
    with pytest.raises(ValueError, match="gave no answer .RateLimitError.*kept in .*kept.jsonl; the same call goes on"):
        judge.compare(PROMPTS, GOOD, BAD)
    assert len(asked) == 2 + 3  # two new answers, then a question and two more tries
    with open(tmp_path / "kept.jsonl", "a") as file:
        file.write('\n{"key": "half of a li')
    for num_asked in (2, 0):
        judge, asked = server(by_goodness)
        assert judge.compare(PROMPTS, GOOD, BAD).wins.tolist() == [1, 1, 1] and len(asked) == num_asked


@pytest.mark.parametrize(
    "answer, timeout, error",
    [
        (lambda handler: time.sleep(1.0), 0.2, "APITimeoutError"),
        (lambda handler: handler.reply(500, "down"), 20, "InternalServerError"),
        (lambda handler: handler.reply(400, '{"error": {"message": "no such model"}}'), 20, "BadRequestError.*no such model"),
    ],
    ids=["too late", "broken down", "refused"],
)
def test_where_no_answer_comes_the_error_names_the_server_and_why(server, answer, timeout, error):
    judge, asked = server(lambda question, number: answer, timeout=timeout, max_retries=1)
    with pytest.raises(ValueError, match=f"stub at http://127.* gave no answer .{error}"):
        judge.compare(PROMPTS, GOOD, BAD)
    assert len(asked) == 2


def test_a_model_that_takes_no_temperature_is_asked_without(server, capsys):
    def choosy(question, number):
        refusal = '{"error": {"message": "Unsupported parameter: max_tokens"}}'
        reply = json.dumps(REPLY | {"choices": choices(by_goodness(question, number))})
        takes = {"model", "messages"}
        return lambda handler: handler.reply(*((200, reply) if handler.body.keys() == takes else (400, refusal)))

    judge, asked = server(choosy)
    found = judge.compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [1, 1, 1] and len(asked) == 7  # the first question twice
    assert found.num_tokens == 0 and "asked without" in capsys.readouterr().out  # it says nothing of tokens


def test_the_key_is_the_environments_and_what_is_kept_is_of_one_endpoint_model_and_task(server, monkeypatch):
    seen = []

    def rule(question, number):
        return lambda handler: (seen.append((handler.headers["Authorization"], handler.body)), handler.reply(200, "{}"))

    server(rule)[0].compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server(rule, model="large")[0].compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert [key for key, _ in seen] == ["Bearer none"] * 2 + ["Bearer secret"] * 2
    assert [body["model"] for _, body in seen] == ["stub"] * 2 + ["large"] * 2
    assert all(body["temperature"] == 0 and body["max_tokens"] == 200 for _, body in seen)
    for others in ({}, {"model": "large"}, {"task": "summary"}, {"task": "concise-summary"}, {"path": "v2"}):
        judge, asked = server(by_goodness, **others)
        judge.compare(PROMPTS, GOOD, BAD)
        assert len(asked) == 6 and ASKS[judge.task] in asked[0], others
    with pytest.raises(ValueError, match="expected task in"):
        server(by_goodness, task="poem")


def test_train_asks_the_judge_about_every_policy_at_its_end(server, quick, monkeypatch, capsys):
    # what is ours stands first, then second
    judge, asked = server(lambda question, number: "Better: A" if number % 2 else "Better: B")
    monkeypatch.setitem(PRESETS, "tiny", quick)
    options = ["--judge-url", judge.url, "--judge-model", "stub"]
    assert main(["train", "--preset", "tiny", "--data", quick.data, "--method", "unlikelihood", "--steps", "2", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "answers unreadable" in line]
    num = len(load_split(quick.data)[2])
    assert [line.split()[0] for line in lines] == ["sft", "unlikelihood"] and len(asked) >= 2 * num
    assert "wins 1.000 [1.000, 1.000]; of what it decided it named the first in 0.50" in lines[0]
    assert all(f" 0 of {2 * num} answers" in line and line.endswith(f"; {2 * num * 100} tokens") for line in lines)


@pytest.fixture
def certain(tmp_path, tiny_tokenizer):
    """The folder of a tiny language model with a chat template that answers "Better: A" whatever it is asked."""
    asked, answer = (tiny_tokenizer(text).input_ids for text in (TEMPLATE.format(prompt="?"), "Better: A"))
    chain = [asked[-1], *answer, tiny_tokenizer.eos_token_id]
    assert len({*chain}) == len(chain)  # so that the last token alone says which is the next
    sizes = {"n_positions": 1024, "n_embd": 64, "n_layer": 1, "n_head": 1, "tie_word_embeddings": False}
    ends = {"bos_token_id": tiny_tokenizer.eos_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), **sizes, **ends))
    with torch.no_grad():
        policy.transformer.wte.weight.normal_(generator=torch.Generator().manual_seed(0))
        policy.transformer.wpe.weight.zero_()
        policy.lm_head.weight.zero_()
        policy.lm_head.weight[chain[1:]] = policy.transformer.wte.weight[chain[:-1]]
    policy.save_pretrained(tmp_path / "certain")
    tiny_tokenizer.save_pretrained(tmp_path / "certain")
    (tmp_path / "certain" / "chat_template.jinja").write_text(chat_template(tiny_tokenizer))
    return tmp_path / "certain"


@pytest.mark.slow
def test_a_real_server_is_asked_and_its_answers_are_read_counted_and_kept(certain, loopback, tmp_path):
    for package in ("fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install transformers[serving]")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=os.environ)

    def healthy() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            return b"ok" in urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
        except OSError:
            return False

    try:
        wait_until(healthy)
        judge = LLMJudge(f"http://127.0.0.1:{port}/v1", str(certain), cache=tmp_path / "kept", timeout=120.0, max_retries=0)
        found = judge.compare(PROMPTS, GOOD, BAD)
    finally:
        process.kill()
        process.wait()
    assert found.wins.tolist() == [0.5] * 3 and found.first == 1.0 and found.unreadable == 0
    rows = [json.loads(line) for line in (tmp_path / "kept").read_text().splitlines() if line]
    assert [row["text"] for row in rows] == ["Better: A"] * 6
