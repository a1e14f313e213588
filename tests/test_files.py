"""Files: downloads against a server on loopback, the pinned ones found, and writing of which nothing half-done stays behind."""

import hashlib
import http.server
import re
import socket
import threading
import time

import pytest

from pdpo import files
from pdpo.files import cache_dir, check_new_folder, download, file_sha256, locate, read_json, replacing, write_csv, write_json

BODY = b"preferences " * 20_000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    requests: list[str] = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == "/absent":
            return self.send_error(404)
        if self.path == "/silent":
            time.sleep(1.0)
        if self.path in ("/silent", "/hangs-up", "/mail"):
            return self.wfile.write(b"220 mail.example.org ESMTP\r\n\r\n" if self.path == "/mail" else b"")
        self.send_response(200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:1000] if self.path == "/short" else BODY)

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


# fetching


@pytest.mark.parametrize("name", ["good", "unsized"])
def test_a_good_file_arrives_whole_and_alone(server, tmp_path, name):
    target = tmp_path / "deep" / "new" / "data.json"
    download(f"{server}/{name}", target, SHA256)
    assert target.read_bytes() == BODY and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "name, words",
    [
        ("another", 'expected "0{64}".*changed, or was cut short'),
        ("short", f'expected "{SHA256}".*changed, or was cut short.*not used'),
        ("absent", "the server answered 404 Not Found"),
        ("silent", r"cannot be reached \(.*timed out"),
        ("hangs-up", r"cannot be reached \(.*closed connection"),
        ("mail", r"cannot be reached \(.*220 mail"),
        ("dead", "cannot be reached"),
    ],
)
def test_a_download_that_fails_leaves_the_older_file_alone_and_says_how_to_go_on(server, tmp_path, name, words):
    target = tmp_path / "folder" / "data.json"
    target.parent.mkdir()
    target.write_text("older")
    with socket.create_server(("127.0.0.1", 0)) as free:
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    url = f"{dead if name == 'dead' else server}/{name}"
    with pytest.raises(ValueError) as caught:
        download(url, target, "0" * 64 if name == "another" else SHA256, timeout=0.5)
    assert list(target.parent.iterdir()) == [target] and target.read_text() == "older"
    message = str(caught.value)
    assert message.startswith(url) and re.search(words, message), message
    assert "in a browser and put data.json into a folder that PDPO_DATA_DIR names" in message
    assert socket.getdefaulttimeout() is None  # other sockets of this process wait as before


def test_a_cache_that_cannot_be_written_is_named(tmp_path, server):
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(ValueError, match="cannot be written"):
        download(f"{server}/good", tmp_path / "file" / "cache" / "data.json", SHA256)


def test_locate_looks_in_the_named_folder_first_then_in_the_cache_then_downloads_once_and_refuses_what_changed(
    server, tmp_path, monkeypatch
):
    url = f"{server}/good"
    cached = locate("data.json", url, SHA256)
    assert cached == cache_dir() / "data.json" == tmp_path / "cache" / "pdpo" / "data.json"
    monkeypatch.setenv("PDPO_DATA_DIR", str(tmp_path))
    assert locate("data.json", url, SHA256) == cached  # not in that folder
    (tmp_path / "data.json").write_bytes(BODY)
    assert locate("data.json", url, SHA256) == tmp_path / "data.json"
    (tmp_path / "data.json").write_bytes(BODY + b" ")
    with pytest.raises(ValueError, match=f"{tmp_path}/data.json: expected sha256 {SHA256}, got .*has changed"):
        locate("data.json", url, SHA256)
    assert Handler.requests == ["/good"]


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
