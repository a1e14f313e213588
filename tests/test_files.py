"""Files: downloads against servers on loopback, the pinned ones found, and writing of which nothing half-done stays behind."""

import hashlib
import http.server
import re
import socket
import socketserver
import threading

import pytest

from pdpo import data, files
from pdpo.files import cache_dir, check_new_folder, download, file_sha256, locate, read_json, replacing, write_csv, write_json

BODY = b"preferences " * 20_000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    requests: list[str] = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == "/absent.json":
            return self.send_error(404)
        self.send_response(200)
        if self.path != "/unsized.json":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:1000] if self.path == "/short.json" else BODY)

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


class Answer(socketserver.BaseRequestHandler):
    """Sends its server's `answer` and hangs up, or, for None, says nothing."""

    def handle(self):
        self.request.recv(4096)
        self.request.sendall(self.server.answer) if self.server.answer is not None else self.request.recv(1)


def refused(url: str, folder, sha256: str = SHA256, timeout: float = 5.0) -> str:
    """The error of a download that must fail, after checking that it left an older file as it was, alone, and how to go on."""
    (folder / "data.json").write_text("older")
    with pytest.raises(ValueError) as caught:
        download(url, folder / "data.json", sha256, timeout=timeout)
    assert [path.name for path in folder.iterdir()] == ["data.json"] and (folder / "data.json").read_text() == "older"
    message = str(caught.value)
    assert message.startswith(url) and "in a browser" in message and "PDPO_DATA_DIR" in message
    return message


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "new"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", ["good.json", "unsized.json"])
def test_a_good_file_arrives_whole_and_alone(server, tmp_path, name):
    target = tmp_path / "deep" / "new" / "data.json"
    download(f"{server}/{name}", target, SHA256)
    assert target.read_bytes() == BODY and list(target.parent.iterdir()) == [target]
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name, sha256", [("good.json", "0" * 64), ("short.json", SHA256)])
def test_another_content_or_a_body_cut_short_is_not_used(server, folder, name, sha256):
    message = refused(f"{server}/{name}", folder, sha256)
    assert f'expected "{sha256}"' in message and "changed, or was cut short" in message and "not used" in message


def test_a_404_and_a_dead_server(server, folder):
    assert "the server answered 404 Not Found" in refused(f"{server}/absent.json", folder)
    assert "cannot be reached" in refused(f"http://127.0.0.1:{unused_port()}/data.json", folder)


@pytest.mark.parametrize(
    "answer, words", [(None, "timed out"), (b"", "closed connection"), (b"220 mail.example.org ESMTP\r\n\r\n", "220 mail")]
)
def test_a_server_that_is_silent_hangs_up_or_speaks_another_language(folder, answer, words):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as listener:
        listener.answer = answer
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        message = refused(f"http://127.0.0.1:{listener.server_address[1]}/data.json", folder, timeout=0.3)
        listener.shutdown()
    assert re.search(rf"cannot be reached \(.*{words}", message), message
    assert socket.getdefaulttimeout() is None  # other sockets of this process wait as before


def test_a_cache_that_cannot_be_written_is_named(tmp_path, server):
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(ValueError, match="cannot be written"):
        download(f"{server}/good.json", tmp_path / "file" / "cache" / "data.json", SHA256)


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


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


def test_a_changed_file_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PDPO_DATA_DIR", str(tmp_path))
    (tmp_path / "data.json").write_bytes(BODY + b" ")
    with pytest.raises(ValueError, match=f"{tmp_path}/data.json: expected sha256 {SHA256}, got .*has changed"):
        locate("data.json", f"{server}/good.json", SHA256)
    assert Handler.requests == []


def test_a_named_data_set_without_its_file_says_how_to_get_it_by_hand(monkeypatch):
    name, _, sha256 = files.SOURCES["instructions"]
    monkeypatch.setitem(files.SOURCES, "instructions", (name, f"http://127.0.0.1:{unused_port()}/{name}", sha256))
    with pytest.raises(ValueError, match=f"put {name} into a folder that PDPO_DATA_DIR names"):
        data.load_preferences("instructions")


def test_the_pinned_digests_are_those_of_the_real_files(shared_data):
    for name, url, sha256 in files.SOURCES.values():
        assert file_sha256(shared_data / name) == sha256 and url.endswith("/" + name)


# writing


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_written_takes_the_place_of_the_old_when_it_is_complete(tmp_path, is_folder):
    target = tmp_path / "new" / "results"
    target.mkdir(parents=True) if is_folder else write_json(target, "older")
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        write_json(temporary / "deep" / "file" if is_folder else temporary, 1)
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == [target]
    assert list(target.iterdir()) == [] if is_folder else read_json(target) == "older"
    with replacing(target) as temporary:
        write_json(temporary / "deep" / "file" if is_folder else temporary, {"x": [1, "é"]})
    assert list(target.parent.iterdir()) == [target]
    assert read_json(target / "deep" / "file" if is_folder else target) == {"x": [1, "é"]}


def test_results_go_into_a_new_or_an_empty_folder_alone(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    check_new_folder(tmp_path / "empty"), check_new_folder(tmp_path / "absent")
    for held in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="expected an empty or a new folder"):
            check_new_folder(held)
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected a folder of its own for the results, got the current one"):
        check_new_folder(tmp_path / "empty")


def test_csv_has_a_header_a_line_a_row_and_no_carriage_returns(tmp_path):
    write_csv(tmp_path / "a.csv", [{"x": 1, "y": "a,b"}, {"x": 2, "y": "é"}])
    assert (tmp_path / "a.csv").read_bytes() == 'x,y\n1,"a,b"\n2,é\n'.encode()
