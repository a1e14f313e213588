"""Finding a public file: a folder that the user names, the cache, else a checked download."""

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path


def cache_dir() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/pdpo, else ~/.cache/pdpo."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdpo"


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(name: str, url: str, sha256: str) -> Path:
    """A file with the pinned digest: from $PDPO_DATA_DIR, else the cache, else downloaded into the cache.

    Raises:
        ValueError: the file is found with another digest, or cannot be had; the message says how to get it by hand.
    """
    folder = os.environ.get("PDPO_DATA_DIR")
    if folder and (Path(folder) / name).is_file():
        return _checked(Path(folder) / name, sha256)
    cached = cache_dir() / name
    if not cached.is_file():
        download(url, cached, sha256)
    return _checked(cached, sha256)


def download(url: str, target: Path, sha256: str, *, timeout: float = 10.0) -> None:
    """Fetches url to target through a temporary file; on any failure target does not appear and nothing is left behind.

    Args:
        url: http or https.
        target: where the file goes; its folder is made.
        sha256: expected digest, in hexadecimal.
        timeout: seconds without an answer after which the server counts as dead.
    Raises:
        ValueError: no answer, an HTTP error, a body cut short, a wrong digest or a target that cannot be written, each
            in its own words.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    by_hand = f"Download {url} in a browser and put {target.name} into a folder that PDPO_DATA_DIR names."
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=timeout) as answer, open(temporary, "wb") as file:
            expected = answer.headers.get("Content-Length")
            while block := answer.read(1 << 16):
                file.write(block)
            received = file.tell()
        if expected is not None and received != int(expected):
            raise ValueError(f"{url}: the download was cut short ({received} of {expected} bytes). Try again. {by_hand}")
        digest = file_sha256(temporary)
        if digest != sha256:
            raise ValueError(
                f"{url}: expected sha256 {sha256}, got {digest}. The file there has changed or was altered on its way; "
                f"it is not used. {by_hand}"
            )
        os.replace(temporary, target)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: the server answered {error.code} {error.reason}. {by_hand}") from None
    except http.client.IncompleteRead as error:
        raise ValueError(f"{url}: the download was cut short after {len(error.partial)} bytes. Try again. {by_hand}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{url}: the server cannot be reached ({reason}). {by_hand}") from None
    except OSError as error:  # the errors above are OSErrors, too: these are the disk's
        raise ValueError(f"{target}: cannot be written ({error.strerror}). Point XDG_CACHE_HOME elsewhere. {by_hand}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _checked(path: Path, sha256: str) -> Path:
    digest = file_sha256(path)
    if digest != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {digest}. The file has changed; remove it to fetch it again.")
    return path
