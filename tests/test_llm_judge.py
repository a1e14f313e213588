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
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from pdpo.__main__ import main
from pdpo.data import load_split
from pdpo.encoding import chat_template
from pdpo.llm_judge import ASKS, LLMJudge, read_verdict
from pdpo.models import load_policy, load_tokenizer
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
def loopback(monkeypatch):
    """No key, and no proxy between us and this machine."""
    pytest.importorskip("openai", reason="the extra `judge` is not installed")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path, loopback):
    """judge(rule, ...): an LLMJudge on a server whose answers are rule(question, number) -> text, or a function of the handler.

    The next server takes the place of the one before, at the same address."""
    servers = []

    def start(rule, *, model="stub", elsewhere=False, **options):
        asked, port = [], 0
        if servers and not elsewhere:
            port = servers[-1].server_port
            stop(servers.pop())

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                asked.append(question)
                self.body, answer = body, rule(question, len(asked))
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

        http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        servers.append(http)
        url = f"http://127.0.0.1:{http.server_port}/v1"
        return LLMJudge(url, model, cache=tmp_path / "kept.jsonl", **{"max_retries": 2, "timeout": 20.0} | options), asked

    def stop(http):
        http.shutdown()
        http.server_close()

    yield start
    for http in servers:
        stop(http)


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


def test_a_server_that_says_how_long_to_wait_is_not_asked_sooner(server):
    times = []

    def busy(handler):
        times.append(time.monotonic())
        handler.reply(
            429, '{"error": {"message": "slow down"}}', Retry_After="2"
        )  # the client alone would wait for half a second

    def rule(question, number):
        times.append(time.monotonic())
        return busy if number == 1 else by_goodness(question, number)

    judge, asked = server(rule)
    assert judge.compare(PROMPTS[:1], GOOD[:1], BAD[:1]).wins.tolist() == [1] and len(asked) == 3
    assert times[2] - times[1] >= 1.9


def test_where_every_answer_comes_too_late_or_the_server_breaks_down_the_error_names_it(server):
    judge, asked = server(lambda question, number: lambda handler: time.sleep(1.0), timeout=0.2, max_retries=1)
    with pytest.raises(ValueError, match="stub at http://127.* gave no answer .APITimeoutError"):
        judge.compare(PROMPTS, GOOD, BAD)
    assert len(asked) == 2
    judge, asked = server(lambda question, number: lambda handler: handler.reply(500, "down"), max_retries=1)
    with pytest.raises(ValueError, match="gave no answer .InternalServerError"):
        judge.compare(PROMPTS, GOOD, BAD)
    assert len(asked) == 2


def test_a_model_that_takes_no_temperature_is_asked_without_and_any_other_refusal_is_an_error(server, capsys):
    def choosy(question, number):
        refusal = '{"error": {"message": "Unsupported parameter: max_tokens"}}'
        answer = by_goodness(question, number)
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "stub"}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}]
        takes = {"model", "messages"}
        return lambda handler: handler.reply(*((200, json.dumps(reply)) if handler.body.keys() == takes else (400, refusal)))

    judge, asked = server(choosy)
    found = judge.compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [1, 1, 1] and len(asked) == 7  # the first question twice
    assert found.num_tokens == 0 and "asked without" in capsys.readouterr().out  # it says nothing of tokens
    judge, asked = server(
        lambda *_: lambda handler: handler.reply(400, '{"error": {"message": "no such model"}}'), model="other"
    )
    with pytest.raises(ValueError, match="other at .* gave no answer .BadRequestError.*no such model"):
        judge.compare(PROMPTS, GOOD, BAD)
    assert len(asked) == 2


def test_the_key_is_the_environments_and_what_is_kept_is_of_one_endpoint_model_and_task(server, monkeypatch):
    seen = []

    def rule(question, number):
        return lambda handler: (seen.append((handler.headers["Authorization"], handler.body)), handler.reply(200, "{}"))

    judge, _ = server(rule)
    judge.compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge, _ = server(rule, model="large")
    judge.compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert [key for key, _ in seen] == ["Bearer none"] * 2 + ["Bearer secret"] * 2
    assert [body["model"] for _, body in seen] == ["stub"] * 2 + ["large"] * 2
    assert all(body["temperature"] == 0 and body["max_tokens"] == 200 for _, body in seen)

    judge, asked = server(by_goodness)
    judge.compare(PROMPTS, GOOD, BAD)
    for number, others in enumerate(
        ({"model": "large"}, {"task": "summary"}, {"task": "concise-summary"}, {"elsewhere": True})
    ):
        judge, asked = server(by_goodness, **others)
        judge.compare(PROMPTS, GOOD, BAD)
        assert len(asked) == 6 and ASKS[judge.task] in asked[0], number
    assert len({*ASKS.values()}) == 3


def test_neither_is_a_tie_that_was_read(server):
    judge, _ = server(lambda question, number: "They say the same.\nBetter: neither")
    found = judge.compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [0.5] * 3 and found.unreadable == 0 and found.first != found.first  # nothing was decided


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
    assert all(line.endswith(f"; {2 * num * 100} tokens") for line in lines)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny language models with a chat template: one with random weights, one that answers "Better: A" whatever it is asked."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models")
    preset = replace(PRESETS["tiny"], context=1024, embedding=16, layers=1, heads=1)
    tokenizer = load_tokenizer(preset)
    tokenizer.chat_template = chat_template(tokenizer)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False)
    chain = [tokenizer(asked).input_ids[-1], *tokenizer("Better: A").input_ids, tokenizer.eos_token_id]
    assert len({*chain}) == len(chain)  # so that the last token alone says which is the next
    sizes = {"n_positions": 1024, "n_embd": 64, "n_layer": 1, "n_head": 1}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False}
    certain = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ends))
    with torch.no_grad():
        certain.transformer.wte.weight.normal_(generator=torch.Generator().manual_seed(0))
        certain.transformer.wpe.weight.zero_()
        certain.lm_head.weight.zero_()
        certain.lm_head.weight[chain[1:]] = certain.transformer.wte.weight[chain[:-1]]
    for name, policy in (("random", load_policy(preset, tokenizer=tokenizer)), ("certain", certain)):
        policy.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def served(folders, loopback):
    """The address of `transformers serve`, which loads the model whose folder a request names."""
    for package in ("fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install transformers[serving]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folders / "serve.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--device", "cpu"]
    with open(log, "w") as file:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                assert b"ok" in urllib.request.urlopen(f"{url}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise AssertionError(f"transformers serve did not start: {log.read_text()}")
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_real_server_is_asked_and_its_answers_are_read_counted_and_kept(served, folders, tmp_path):
    def judge(name, **options):
        return LLMJudge(served, str(folders / name), cache=tmp_path / "kept.jsonl", timeout=120.0, max_retries=0, **options)

    found = judge("certain").compare(PROMPTS, GOOD, BAD)
    assert found.wins.tolist() == [0.5] * 3 and found.first == 1.0 and found.unreadable == 0
    random = judge("random").compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert random.wins.tolist() == [0.5] and random.unreadable == 2
    rows = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines() if line]
    assert [row["text"] for row in rows[:6]] == ["Better: A"] * 6
