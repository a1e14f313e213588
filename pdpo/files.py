"""Files: found, fetched and read with errors that say what to do, written so that nothing is ever half there."""

import contextlib
import csv
import errno
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import socket
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short

import torch
from safetensors import SafetensorError

_ODPO_DATA = "https://raw.githubusercontent.com/rycolab/odpo/6152f67c8cddc223ca5affc7e261d967568068ee/data/"
SOURCES = {  # name -> (file name, public address, sha256)
    "instructions": (
        "instruction-data-with-preference.json",
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/99af403b9f64dd0f820173402f5a56af41263536/"
        "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
        "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
    ),
    "imdb": (
        "imdb-sft-test.jsonl",
        _ODPO_DATA + "imdb-sft-test.jsonl",
        "9b19fb1dad943dd7a4fbe054ae005cedb458fbc904a493ca71942fbae3b2b613",
    ),
    "tldr": (
        "tldr-sft-train-rel.json",
        _ODPO_DATA + "tldr-sft-train-rel.json",
        "4faccc9ca37b64e2f848b89c8381560dadaa805b624507932b9692e6a32e9fff",
    ),
    "tldr-test": (
        "tldr-sft-test-rel.json",
        _ODPO_DATA + "tldr-sft-test-rel.json",
        "d982894172f9873409b45e2b703ab8ac9af7d789dbe96e630b18fd84ad59f0ea",
    ),
}
MAX_CHARACTERS = 1_000_000  # of one text: far beyond every context, and still encoded within seconds
SCORE_KEYS = (("chosen_score", "score_chosen"), ("rejected_score", "score_rejected"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder, which takes its place when the block ends well.

    Files reach the disk before the rename: a killed process, or a machine that loses power, leaves the old or the new one.
    """
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
    for file in sorted(path.rglob("*"), reverse=True) if path.is_dir() else []:
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
    with contextlib.suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()


def disk_trouble(error: Exception) -> str:
    """One line on what the disk refused, and what to do; "" for an error that is none of the disk's.

    A full disk reaches us in many coats: torch says "unexpected pos", safetensors and shutil have errors of their own.
    """
    text, number = str(error), getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(
        "No space left|File too large|unexpected pos|file write failed", text
    ):
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
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path):
    """What `write_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
SEAL = b"\nsha256 "


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
    free = shutil.disk_usage(above).free
    if free < num_bytes:
        raise ValueError(
            f"{target}: expected a disk with {num_bytes / 1e9:.1f} GB free for what will be written, got {free / 1e9:.1f} GB. "
            "Free some, or choose another disk (PDPO_RUNS_DIR, --out)."
        )


def checkout_folder(name: str, variable: str) -> Path:
    """$variable, else the folder `name` of the checkout that this package runs from, else that of the current folder."""
    checkout = Path(__file__).resolve().parent.parent
    default = (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / name
    return Path(os.environ.get(variable) or default)


def shown(path: Path) -> str:
    """A path relative to the checkout where it lies in it: notebooks' outputs then hold no one's home folder."""
    checkout = Path(__file__).resolve().parent.parent
    return str(path.relative_to(checkout)) if path.is_relative_to(checkout) else str(path)


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
    folder = os.environ.get("PDPO_DATA_DIR")
    path = Path(folder) / name if folder else cache_dir() / name
    if not path.is_file():
        path = cache_dir() / name
    if not path.is_file():
        download(url, path, sha256)
    if (digest := file_sha256(path)) != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {digest}. The file has changed; remove it to fetch it again.")
    return path


def download(url: str, target: Path, sha256: str, *, timeout: float = 10.0) -> None:
    """Fetches url to target; on any failure target does not appear and nothing is left behind.

    Args:
        url: http or https.
        target: where the file goes; its folder is made.
        sha256: expected digest, in hexadecimal.
        timeout: seconds without an answer after which the server counts as dead.
    """
    by_hand = f"Download {url} in a browser and put {target.name} into a folder that PDPO_DATA_DIR names."
    before = socket.getdefaulttimeout()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(timeout)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256, progress=False)
    except RuntimeError as error:  # the digest's
        raise ValueError(
            f"{url}: {error}. The file there has changed, or was cut short or altered on its way; it is not used. {by_hand}"
        ) from None
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: the server answered {error.code} {error.reason}. {by_hand}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: the server cannot be reached ({getattr(error, 'reason', error)}). {by_hand}") from None
    except OSError as error:  # the errors above are OSErrors, too: these are the disk's
        raise ValueError(f"{target}: cannot be written ({error.strerror}). Point XDG_CACHE_HOME elsewhere. {by_hand}") from None
    finally:
        socket.setdefaulttimeout(before)


def read_rows(path: Path, *, kind: type = list) -> list[tuple[str, object]]:
    """(where, row) of each row of a .jsonl file, or of a .json file with a list; with kind=dict, (key, value) of its object."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected a file, got a pipe or a device, which may have no end. Copy it to a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got byte {error.start} that is not. Convert the file to UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got: {error.strerror}. Check the path.") from None
    if path.suffix == ".jsonl":
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, _parse(f"{path}, {where}", line)) for where, line in lines]
    else:
        parsed = _parse(str(path), text)
        if not isinstance(parsed, kind):
            wanted = "a list of objects" if kind is list else "one object"
            raise ValueError(f"{path}: expected {wanted}, got {type(parsed).__name__}. For one object a line use .jsonl.")
        rows = list(parsed.items()) if kind is dict else [(f"row {number}", row) for number, row in enumerate(parsed, 1)]
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none.")
    return rows


def _parse(where: str, text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise ValueError(f"{where}: expected JSON, got: {error}. Is the file complete?") from None


def parse_row(row) -> tuple[str, tuple, tuple | None]:
    """A row's prompt, responses and scores, in whichever of the shapes of `data.load_preferences` it is."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}. A row is {{'prompt', 'chosen', 'rejected'}}.")
    if any(isinstance(row.get(key), list) for key in ("prompt", "chosen", "rejected")):
        row = _without_messages(row)
    prompt = _text(row, "instruction" if "instruction" in row and "prompt" not in row else "prompt")
    if "instruction" in row and "prompt" not in row and row.get("input") is not None and str(row["input"]).strip():
        prompt += "\n" + _text(row, "input")
    if "responses" in row:
        responses = row["responses"]
        if not isinstance(responses, list):
            raise ValueError(f"key 'responses': expected a list of texts, got {type(responses).__name__}.")
        scores = row.get("scores")
        if scores is not None and not isinstance(scores, list):
            raise ValueError(f"key 'scores': expected a list of numbers, got {type(scores).__name__}.")
        texts = tuple(text.strip() if isinstance(text, str) else text for text in responses)
        return prompt, texts, None if scores is None else tuple(scores)
    responses = (_text(row, "chosen"), _text(row, "rejected"))
    found = [next((key for key in keys if row.get(key) is not None), None) for keys in SCORE_KEYS]
    if found == [None, None]:
        return prompt, responses, None
    for key, names in zip(found, SCORE_KEYS, strict=True):
        if key is None:
            raise ValueError(f"key '{names[0]}': expected a score for both responses or for none, got only the other one's.")
        check_score(key, row[key])
    return prompt, responses, (float(row[found[0]]), float(row[found[1]]))


def _without_messages(row: dict) -> dict:
    """A row of TRL's conversational format as texts. One message is its content; of several each begins with its role."""
    read = {}
    for key in ("prompt", "chosen", "rejected"):
        messages = row.get(key, [])
        messages = messages if isinstance(messages, list) else [{"role": "user", "content": messages}]
        if (
            not isinstance(messages, list)
            or (key in row and not messages)
            or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
        ):
            raise ValueError(f"key '{key}': expected a list of {{'role', 'content'}}, got {short(row[key])}. Mend the row.")
        read[key] = messages
    if "prompt" not in row:  # then it is what the two conversations share
        equal = [a == b for a, b in zip(read["chosen"], read["rejected"], strict=False)]
        num = (equal + [False]).index(False)
        read = {"prompt": read["chosen"][:num], "chosen": read["chosen"][num:], "rejected": read["rejected"][num:]}
    for key, messages in read.items():
        for each in messages:
            check_text(key, each["content"])
    several = {key: "\n".join(f"{each['role']}: {each['content'].strip()}" for each in read[key]) for key in read}
    return row | {key: messages[0]["content"] if len(messages) == 1 else several[key] for key, messages in read.items()}


def _text(row: dict, key: str) -> str:
    if key not in row:
        raise ValueError(f"key '{key}': missing; the row has {sorted(row)}. Expected 'prompt', 'chosen' and 'rejected'.")
    check_text(key, row[key])
    return row[key].strip()


def scored_rows(path: Path):
    """(where, prompt, text, score) for each row of a scored file."""
    if path.suffix == ".jsonl":
        for where, row in read_rows(path):
            if not isinstance(row, dict) or not {"prompt", "text", "reward"} <= row.keys():
                raise ValueError(f"{path}, {where}: expected {{'prompt', 'text', 'reward'}}, got {short(row)}.")
            yield where, row["prompt"], row["text"], row["reward"]
        return
    for prompt, row in read_rows(path, kind=dict):
        lists = [row.get(key) for key in ("responses", "rewards")] if isinstance(row, dict) else [row]
        if not all(isinstance(each, list) for each in lists) or len({len(each) for each in lists}) != 1 or len(lists) != 2:
            raise ValueError(
                f"{path}, prompt {short(prompt)}: expected 'responses' and as many 'rewards', got {short(row)}. Mend the row."
            )
        for number, (response, score) in enumerate(zip(*lists, strict=True), 1):
            yield f"prompt {short(prompt)}, response {number}", prompt, response, score


def check_text(key: str, text) -> None:
    """ValueError unless it is a text with something in it that can be written as UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"key '{key}': expected a text that is not empty, got {short(text)}. Drop the row or fill it in.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"key '{key}': expected at most {MAX_CHARACTERS} characters, got {len(text)}. Drop or shorten the row."
        )
    if "\0" in text:
        raise ValueError(f"key '{key}': expected text, got a NUL character in it. The file is probably binary.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"key '{key}': expected text, got half of a surrogate pair in it. Mend the \\u escapes.")


def check_score(key: str, score) -> None:
    """ValueError unless it is a finite number."""
    if not is_finite(score):
        raise ValueError(f"key '{key}': expected a finite number, got {short(score)}. Drop the row or mend the score.")


def is_finite(value) -> bool:
    """Whether it is a number, no bool, that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float's range
        return False
