"""The call that a user makes, `load_policy` of openai-community/gpt2-medium, against a server on loopback that speaks the hub's
download protocol and serves a small model under that name. Each load is a process of its own: the client reads HF_ENDPOINT once."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

NAME, REVISION = "openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"
LOAD = """
import json
import torch
from pdpo.models import load_policy, load_tokenizer, model_revision
from pdpo.presets import get_preset
torch.set_num_threads(1)
preset = get_preset("gpt2-medium")
try:
    policy, tokenizer = load_policy(preset), load_tokenizer(preset)
    result = {"sum": float(sum(p.detach().double().abs().sum() for p in policy.parameters())),
              "revision": model_revision(preset.model),
              "tokens": tokenizer("to be").input_ids, "context": tokenizer.model_max_length}
except ValueError as error:
    result = {"error": str(error)}
print(json.dumps(result))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves `folder` as NAME; `cut` are files of which half is sent, `missing` those that are not there."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.cut, self.missing, self.asked = folder, set(), set(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, *, head: bool):
        path = self.path.split("?")[0].strip("/")
        self.server.asked.append(path)
        names = sorted(each.name for each in self.server.folder.iterdir() if each.name not in self.server.missing)
        api = f"api/models/{NAME}"
        bodies = {
            api: {"id": NAME, "modelId": NAME, "sha": REVISION, "tags": [], "siblings": [{"rfilename": n} for n in names]},
        }
        bodies |= {f"{api}/revision/{name}": bodies[api] for name in ("main", REVISION)}
        if path in bodies:
            return self.send(json.dumps(bodies[path]).encode(), {"Content-Type": "application/json"}, head)
        name = path.rsplit("/", 1)[-1]
        if not path.startswith(f"{NAME}/resolve/") or name not in names:
            return self.send(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": REVISION}, head, status=404)
        data = (self.server.folder / name).read_bytes()
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.send(data, headers, head, only=len(data) // 2 if name in self.server.cut else None)

    def send(self, data: bytes, headers: dict, head: bool, *, status: int = 200, only: int | None = None):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if not head:
            self.wfile.write(data[:only])
        if only is not None and not head:
            self.close_connection = True


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, gpt2_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2)).save_pretrained(folder)
    gpt2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(model_folder):
    server = Hub(model_folder)
    yield server
    server.shutdown()
    server.server_close()


def load(home: Path, port: int) -> dict:
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    root = Path(__file__).resolve().parent.parent
    finished = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, cwd=root, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.strip().splitlines()[-1])


def check(result: dict, folder: Path) -> None:
    expected = GPT2LMHeadModel.from_pretrained(folder)
    assert result["sum"] == float(sum(each.detach().double().abs().sum() for each in expected.parameters()))
    assert result["revision"] == REVISION and result["tokens"] == [1462, 307] and result["context"] == 1024


@pytest.mark.slow
def test_a_broken_download_is_an_error_which_the_next_load_mends_and_the_one_after_asks_no_hub(hub, model_folder, tmp_path):
    hub.cut.add("model.safetensors")
    result = load(tmp_path, hub.server_port)
    assert result["error"].startswith(f"{NAME}: ") and "Three ways out" in result["error"]
    assert "without sending complete message body" in result["error"]
    hub.cut.clear()
    check(load(tmp_path, hub.server_port), model_folder)
    hub.asked.clear()
    check(load(tmp_path, hub.server_port), model_folder)
    assert hub.asked == []


@pytest.mark.slow
def test_a_repository_without_safetensors_is_an_error(hub, tmp_path):
    hub.missing.add("model.safetensors")
    result = load(tmp_path, hub.server_port)
    assert result["error"].startswith(f"{NAME}: ") and "model.safetensors" in result["error"], result["error"]
    assert "Three ways out" in result["error"]
