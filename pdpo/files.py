"""Files: found, fetched and read with errors that say what to do, written so that nothing is ever half there."""

import contextlib
import csv
import errno
import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import socket
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

_BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/99af403b9f64dd0f820173402f5a56af41263536/"
_ODPO = "https://raw.githubusercontent.com/rycolab/odpo/6152f67c8cddc223ca5affc7e261d967568068ee/data/"
_PINNED = {
    "instructions": _BOOK + "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
    "imdb": _ODPO + "imdb-sft-test.jsonl",
    "tldr": _ODPO + "tldr-sft-train-rel.json",
    "tldr-test": _ODPO + "tldr-sft-test-rel.json",
}
_SHA256 = {
    "instructions": "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
    "imdb": "9b19fb1dad943dd7a4fbe054ae005cedb458fbc904a493ca71942fbae3b2b613",
    "tldr": "4faccc9ca37b64e2f848b89c8381560dadaa805b624507932b9692e6a32e9fff",
    "tldr-test": "d982894172f9873409b45e2b703ab8ac9af7d789dbe96e630b18fd84ad59f0ea",
}
SOURCES = {name: (Path(url).name, url, _SHA256[name]) for name, url in _PINNED.items()}  # file name, public address, sha256
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
CHECKOUT = Path(__file__).resolve().parent.parent  # that this package runs from, where it is not installed without one
SEAL = b"\nsha256 "


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder, which takes its place when the block ends well.

    Files reach the disk before the rename: a killed process, or a machine that loses power, leaves the old or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        flush(temporary)
        if path.is_dir():
            path.rmdir()  # an empty one: `check_new_folder`
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def flush(path: Path) -> None:
    """Hands a file, or all files in a folder, from the system's memory to the disk."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def remove(path: Path) -> None:
    """Removes a file, or a folder and all in it; nothing where there is none."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def disk_trouble(error: Exception) -> str:
    """One line on what the disk refused, and what to do; "" for an error that is none of the disk's.

    A full disk reaches us in many coats: torch says "unexpected pos", safetensors and shutil have errors of their own."""
    text, full = str(error), "No space left|File too large|unexpected pos|file write failed"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(full, text):
        return f"the disk is full, or a file too large for it ({text}). Free some, or point PDPO_RUNS_DIR or --out elsewhere."
    if isinstance(error, OSError | shutil.Error | SafetensorError):
        return f"{text}. Expected a place to write to: choose another with PDPO_RUNS_DIR or --out."
    return ""


def write_json(path: Path, value) -> None:
    """Writes value as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes rows, which share their keys, as CSV."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path):
    """What `write_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def seal(path: Path) -> None:
    """Appends the digest of a file to it, by which `is_whole` knows it."""
    digest = file_sha256(path)
    with open(path, "ab") as file:
        file.write(SEAL + digest.encode())


def is_whole(path: Path) -> bool:
    """Whether a sealed file is what was written."""
    digest, left = hashlib.sha256(), path.stat().st_size - len(SEAL) - 64
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        return left == 0 and file.read() == SEAL + digest.hexdigest().encode()


def set_aside(path: Path, reason: str) -> None:
    """Renames what is damaged, so that it is neither used nor lost, and says so in one line."""
    target = next(each for n in itertools.count(1) if not (each := path.with_name(f"{path.name}.damaged{n}")).exists())
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.replace(path, target)
        print(f"{shown(path)}: {reason}; set aside as {target.name}, and made again", flush=True)


def write_sealed(path: Path, content: bytes) -> None:
    """Writes a file that knows whether it is whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        seal(temporary)


def read_sealed(path: Path) -> bytes | None:
    """What a sealed file holds; None where there is none, or where it is damaged and has been set aside."""
    if not path.exists():
        return None
    if not is_whole(path):
        return set_aside(path, "not what was written")
    return path.read_bytes()[: -len(SEAL) - 64]


def check_new_folder(target: Path) -> None:
    """ValueError unless `target` is a folder that is empty or does not exist: results never overwrite anything."""
    if target.resolve() == Path.cwd():
        raise ValueError(f"{target}: expected a folder of its own for the results, got the current one. Give it a name.")
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: expected an empty or a new folder, got one that holds something. Choose another.")
    check_writable(target)


def check_writable(target: Path, num_bytes: int = 0) -> None:
    """ValueError unless a file or folder can be made at `target`, on a disk with room for num_bytes."""
    above = next(each for each in (target.absolute(), *target.absolute().parents) if os.path.lexists(each))
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "a folder that may not be written to" if above.is_dir() else "no folder"
        raise ValueError(f"{target}: expected a place to write to, but {above} is {what}. Choose another.")
    if (free := shutil.disk_usage(above).free) < num_bytes:
        got = f"{num_bytes / 1e9:.1f} GB free for what will be written, got {free / 1e9:.1f} GB"
        raise ValueError(f"{target}: expected a disk with {got}. Free some, or choose another (PDPO_RUNS_DIR, --out).")


def shown(path: Path) -> str:
    """A path relative to the checkout where it lies in it: notebooks' outputs then hold no one's home folder."""
    return str(path.relative_to(CHECKOUT)) if path.is_relative_to(CHECKOUT) else str(path)


def cache_dir() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/pdpo, else ~/.cache/pdpo."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdpo"


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


@functools.cache
def source_digest(source: str | None) -> str | None:
    """What a model, tokenizer or judge is known by: of a folder the digests of its files, read once a process; else its name."""
    if source is None or not Path(source).is_dir():
        return source
    files = [path for pattern in ("*", "*/*") for path in sorted(Path(source).glob(pattern)) if path.suffix in MODEL_SUFFIXES]
    if not files:
        raise ValueError(f"{source}: expected a folder with a model's or tokenizer's files, got none of them. Check the path.")
    return hashlib.sha256(json.dumps([[path.name, file_sha256(path)] for path in files]).encode()).hexdigest()


def locate(name: str, url: str, sha256: str) -> Path:
    """A file with the pinned digest: from $PDPO_DATA_DIR, else the cache, else downloaded into the cache."""
    path = Path(os.environ.get("PDPO_DATA_DIR") or cache_dir()) / name
    path = path if path.is_file() else cache_dir() / name
    if not path.is_file():
        download(url, path, sha256)
    if (digest := file_sha256(path)) != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {digest}. The file has changed; remove it to fetch it again.")
    return path


def download(url: str, target: Path, sha256: str, *, timeout: float = 10.0) -> None:
    """Fetches url to target, a file with this sha256 (hexadecimal); on any failure target does not appear and nothing is left behind.

    timeout: seconds without an answer after which the server counts as dead."""
    by_hand = f"Download {url} in a browser and put {target.name} into a folder that PDPO_DATA_DIR names."
    before = socket.getdefaulttimeout()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(timeout)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256, progress=False)
    except RuntimeError as error:  # the digest's
        changed = "The file there has changed, or was cut short or altered on its way; it is not used."
        raise ValueError(f"{url}: {error}. {changed} {by_hand}") from None
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: the server answered {error.code} {error.reason}. {by_hand}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: the server cannot be reached ({getattr(error, 'reason', error)}). {by_hand}") from None
    except OSError as error:  # the errors above are OSErrors, too: these are the disk's
        raise ValueError(f"{target}: cannot be written ({error.strerror}). Point XDG_CACHE_HOME elsewhere. {by_hand}") from None
    finally:
        socket.setdefaulttimeout(before)
