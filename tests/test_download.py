"""Downloads against servers on loopback: what goes wrong is said in its own words and nothing half-done stays behind."""

import hashlib
import http.server
import re
import socket
import threading

import pytest

from pdpo import data, download
from pdpo.download import cache_dir, file_sha256, locate

BODY = b"preferences " * 20_000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == "/absent.json":
            return self.send_error(404)
        self.send_response(200)
        if self.path != "/unsized.json":
            self.send_header("Content-Length", str(len(BODY) + (1000 if self.path == "/short.json" else 0)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("PDPO_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Handler.requests.clear()


def listening(answer: bytes | None):
    """A port on which someone listens, who sends `answer` and hangs up, or, for None, never answers."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if answer is not None:
                connection.recv(4096)
                connection.sendall(answer)
                connection.close()

    held = []
    threading.Thread(target=serve, daemon=True).start()
    return listener


def refused(url: str, folder, sha256: str = SHA256, timeout: float = 5.0) -> str:
    """The error of a download that must fail, after checking that it left nothing behind and says how to go on by hand."""
    with pytest.raises(ValueError) as caught:
        download.download(url, folder / "data.json", sha256, timeout=timeout)
    assert list(folder.iterdir()) == []
    message = str(caught.value)
    assert message.startswith(url) and "in a browser" in message and "PDPO_DATA_DIR" in message
    return message


@pytest.mark.parametrize("name", ["good.json", "unsized.json"])
def test_a_good_file_arrives_whole_and_alone(server, tmp_path, name):
    target = tmp_path / "new" / "data.json"
    download.download(f"{server}/{name}", target, SHA256)
    assert target.read_bytes() == BODY and list(target.parent.iterdir()) == [target]


def test_a_wrong_digest(server, tmp_path):
    folder = tmp_path / "new"
    message = refused(f"{server}/good.json", folder, "0" * 64)
    assert f"expected sha256 {'0' * 64}, got {SHA256}" in message and "not used" in message


def test_a_body_cut_short(server, tmp_path):
    message = refused(f"{server}/short.json", tmp_path / "new")
    assert "cut short" in message and str(len(BODY)) in message


def test_a_404(server, tmp_path):
    assert "the server answered 404 Not Found" in refused(f"{server}/absent.json", tmp_path / "new")


def test_a_dead_server(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "cannot be reached" in refused(f"http://127.0.0.1:{port}/data.json", tmp_path / "new")


@pytest.mark.parametrize(
    "answer, words", [(None, "timed out"), (b"", "closed connection"), (b"220 mail.example.org ESMTP\r\n\r\n", "220 mail")]
)
def test_a_server_that_is_silent_hangs_up_or_speaks_another_language(tmp_path, answer, words):
    with listening(answer) as listener:
        message = refused(f"http://127.0.0.1:{listener.getsockname()[1]}/data.json", tmp_path / "new", timeout=0.3)
    assert re.search(rf"cannot be reached \(.*{words}", message), message


def test_a_failed_download_leaves_an_older_file_as_it_was(server, tmp_path):
    target = tmp_path / "data.json"
    target.write_text("older")
    with pytest.raises(ValueError, match="404"):
        download.download(f"{server}/absent.json", target, SHA256)
    assert target.read_text() == "older"


# finding


def test_locate_looks_in_the_named_folder_first_then_in_the_cache_then_downloads_once(server, tmp_path, monkeypatch):
    url = f"{server}/good.json"
    cached = locate("data.json", url, SHA256)
    assert cached == cache_dir() / "data.json" == tmp_path / "cache" / "pdpo" / "data.json"
    assert locate("data.json", url, SHA256) == cached and Handler.requests == ["/good.json"]
    monkeypatch.setenv("PDPO_DATA_DIR", str(tmp_path))
    assert locate("data.json", url, SHA256) == cached  # not in that folder
    (tmp_path / "data.json").write_bytes(BODY)
    assert locate("data.json", url, SHA256) == tmp_path / "data.json"
    assert Handler.requests == ["/good.json"]


@pytest.mark.parametrize("place", ["folder", "cache"])
def test_a_changed_file_is_refused_wherever_it_lies(server, tmp_path, monkeypatch, place):
    folder = cache_dir() if place == "cache" else tmp_path / "mine"
    folder.mkdir(parents=True)
    if place == "folder":
        monkeypatch.setenv("PDPO_DATA_DIR", str(folder))
    (folder / "data.json").write_bytes(BODY + b" ")
    with pytest.raises(ValueError, match=f"{folder}/data.json: expected sha256 {SHA256}, got .*has changed"):
        locate("data.json", f"{server}/good.json", SHA256)
    assert Handler.requests == []


def test_a_named_data_set_without_its_file_says_how_to_get_it_by_hand(tmp_path, monkeypatch):
    name, _, sha256 = data.SOURCES["instructions"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setitem(data.SOURCES, "instructions", (name, f"http://127.0.0.1:{port}/{name}", sha256))
    with pytest.raises(ValueError, match=f"put {name} into a folder that PDPO_DATA_DIR names"):
        data.load_preferences("instructions")


def test_the_pinned_digest_is_that_of_the_real_file(shared_data):
    name, url, sha256 = data.SOURCES["instructions"]
    assert file_sha256(shared_data / name) == sha256 and url.endswith("/" + name)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, server):
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(ValueError, match="cannot be written"):
        download.download(f"{server}/good.json", tmp_path / "file" / "cache" / "data.json", SHA256)
