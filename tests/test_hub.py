"""The call that a user makes, `load_policy` of openai-community/gpt2-medium, against a server on loopback that speaks the hub's
download protocol and serves a small model under that name. The loads are made in other processes: the client reads HF_ENDPOINT once."""

import hashlib
import http.server
import json
import os
import threading

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

NAME, REVISION = "openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"
WAYS_OUT = "Three ways out: connect to the network; pass a local folder that holds the files; or use the preset 'tiny'"
LOAD = """
import json, sys
from dataclasses import replace
import torch
from pdpo import models
from pdpo.presets import get_preset
torch.set_num_threads(1)
for line in sys.stdin:
    load, name = line.split()
    preset = replace(get_preset("gpt2-medium"), model=name, judge=name)
    try:
        policy, tokenizer = getattr(models, load)(preset), models.load_tokenizer(preset)
        result = {"sum": float(sum(p.detach().double().abs().sum() for p in policy.parameters())),
                  "revision": models.model_revision(name),
                  "tokens": tokenizer("to be").input_ids, "context": tokenizer.model_max_length}
    except Exception as error:
        result = {"error": f"{type(error).__name__} {error}"}
    print(json.dumps(result), flush=True)
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `folder` as NAME; of its file `cut` half is sent."""

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
        names = sorted(each.name for each in self.server.folder.iterdir())
        about = {"id": NAME, "modelId": NAME, "sha": REVISION, "tags": [], "siblings": [{"rfilename": name} for name in names]}
        bodies = {f"api/models/{NAME}": about}
        for revision in ("main", REVISION):
            bodies[f"api/models/{NAME}/revision/{revision}"] = about
            bodies |= {f"{NAME}/resolve/{revision}/{name}": self.server.folder / name for name in names}
        found = bodies.get(path)
        if isinstance(found, dict):
            return self.send(json.dumps(found).encode(), {"Content-Type": "application/json"}, head)
        if found is None:
            return self.send(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": REVISION}, head, status=404)
        data = found.read_bytes()
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.send(data, headers, head, only=len(data) // 2 if found.name == self.server.cut else None)

    def send(self, data: bytes, headers: dict, head: bool, *, status: int = 200, only: int | None = None):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if not head:
            self.wfile.write(data[:only])
        if only is not None and not head:
            self.close_connection = True


@pytest.mark.slow
def test_a_broken_download_is_mended_by_the_next_load_after_which_no_hub_is_asked_and_one_out_of_reach_is_an_error(
    python, tiny_tokenizer, tmp_path
):
    folder, home = tmp_path / "model", tmp_path / "home"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=8, n_layer=2, n_head=2))
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    expected = {
        "sum": float(sum(each.detach().double().abs().sum() for each in model.parameters())), "revision": REVISION,
        "tokens": tiny_tokenizer("to be").input_ids, "context": 1024,
    }  # fmt: skip
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.folder, hub.cut, hub.asked = folder, "model.safetensors", []
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = dict.fromkeys(["HF_HUB_OFFLINE", *(key for key in os.environ if "proxy" in key.lower())])
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}

    def ask(process, name: str, load: str = "load_policy") -> dict:
        process.stdin.write(f"{load} {name}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline() or process.communicate()[1])

    first = python("-c", LOAD, **environment)
    error = ask(first, NAME)["error"]
    assert error.startswith(f"ValueError {NAME}: ") and WAYS_OUT in error
    assert "without sending complete message body" in error
    hub.cut = None
    assert ask(first, NAME) == expected
    hub.asked.clear()
    again = python("-c", LOAD, **environment)
    assert ask(again, NAME) == expected and hub.asked == []
    hub.shutdown()
    hub.server_close()
    for load in ("load_policy", "load_tokenizer", "load_judge"):
        error = ask(again, "someone/something", load)["error"]
        assert error.startswith("ValueError someone/something: ")
        assert "127.0.0.1 cannot be reached" in error and WAYS_OUT in error
