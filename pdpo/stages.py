"""Stages: work that is done once, kept in runs/ and found there by the next call, also by that of another process.

A stage's folder is named by a hash of all that determines it: configuration, data, the stage it starts from and the code
that matters. A lock lets two processes that need one stage do it once; a killed stage goes on where it stopped.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
import pickle
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import torch
import transformers
from tqdm import tqdm

from pdpo.checkpoint import write_json
from pdpo.distributed import gather, is_leader, launch_rank, launched, on_leader, world_size
from pdpo.presets import device

HELP_AFTER_SECONDS = 2.0  # a stage that takes longer was not just read from the disk


class Busy(Exception):
    """Another process is at this stage, and the caller did not want to wait."""


def runs_dir() -> Path:
    """$PDPO_RUNS_DIR, else runs/ of the checkout that this package runs from, else runs/ of the current folder."""
    checkout = Path(__file__).resolve().parent.parent
    default = (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / "runs"
    return Path(os.environ.get("PDPO_RUNS_DIR") or default)


def shown(path: Path) -> str:
    """A path relative to the checkout where it lies in it: notebooks' outputs then hold no one's home folder."""
    checkout = Path(__file__).resolve().parent.parent
    return str(path.relative_to(checkout)) if path.is_relative_to(checkout) else str(path)


def run_stage(
    group: str, name: str, determinants: dict, code: tuple, build: Callable, *, wait: bool, together: bool = False
) -> tuple[Path, dict]:
    """The folder of a finished stage, built by build(folder) where it is not there yet, and its configuration.

    What build returns, if anything, goes on record beside the environment. Of a `distributed.process_group`, whose processes
    must see the same runs folder, the leader looks, locks, builds and writes while the others wait; `together`, all build.
    """
    config = json.loads(json.dumps({"stage": name, **determinants, "code": code_version(code)}))
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:10]
    path = runs_dir() / group / f"{name}-{key}"
    if on_leader(path.is_dir):
        return path, config
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, name, wait):
        if not on_leader(path.is_dir):  # else it was finished while we waited
            partial, began = path.with_name(path.name + ".partial"), time.monotonic()
            on_leader(lambda: partial.mkdir(exist_ok=True))
            if not all(seen := gather(partial.is_dir())):
                raise ValueError(
                    f"{partial}: expected a folder that all processes see, got {seen}. Set PDPO_RUNS_DIR to one that they share."
                )
            if device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            facts = (build(partial) if together else on_leader(lambda: build(partial))) or {}

            def finish() -> None:
                write_json(partial / "stage.json", {"config": config, "environment": environment(began) | facts})
                os.replace(partial, path)

            on_leader(finish)
    return path, config


@contextlib.contextmanager
def _locked(path: Path, name: str, wait: bool):
    """Holds the lock of the stage that belongs at `path`."""
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))

    def is_free() -> bool:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            return False
        return True

    if not on_leader(is_free):
        if not wait:
            raise Busy(name)
        print(f"waiting for {name}, which another process is at ({shown(path.parent)})", flush=True)
        if is_leader():
            lock.acquire()
    try:
        yield
    finally:
        lock.release()  # which does nothing where it is not held


def environment(began: float) -> dict:
    """What a result was made with: versions, device, minutes since `began` (time.monotonic()), peak memory in MB.

    Of several processes also how many; the rest is the leader's.
    """
    cuda = device().type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        **({"processes": world_size()} if world_size() > 1 else {}),
        "minutes": round((time.monotonic() - began) / 60, 3),
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else _peak_memory_mb(),
    }


def _peak_memory_mb() -> int | None:
    """This process's largest resident memory so far; None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


@functools.cache  # of the code that this process loaded, whatever happens to the files meanwhile
def code_version(modules: tuple[str, ...]) -> str:
    """A hash of these modules' code, blind to comments, docstrings and layout, so that only what computes counts."""
    digest = hashlib.sha256()
    for module in modules:
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def run_all(stage: Callable, settings: list[dict]) -> list:
    """stage(**setting) for every setting, in their order, by as many processes as there are cores ($PDPO_WORKERS at most).

    Each process takes what no other one is at, also the processes of another notebook, or the ranks of a sweep, that need
    the same stages. The others start once a stage has taken longer than reading it from the disk would.

    Args:
        stage: a function of a module that ends in `run_stage` and takes `wait`.
        settings: its keyword arguments, one dict a call.
    """
    results: dict[int, object] = {}
    helped = False
    description, hidden = f"{getattr(stage, '__name__', 'all')} stages", launch_rank() > 0
    bar = tqdm(total=len(settings), desc=description, disable=hidden, mininterval=1.0)
    wait = False
    try:
        while len(results) < len(settings):
            before = len(results)
            for i, setting in enumerate(settings):
                if i in results:
                    continue
                began = time.monotonic()
                try:
                    results[i] = stage(**setting, wait=wait)
                except Busy:
                    continue
                bar.update()
                wait = False
                left = [settings[j] for j in range(len(settings) - 1, i, -1) if j not in results]
                if not helped and len(left) > 1 and time.monotonic() - began > HELP_AFTER_SECONDS and _num_workers() > 1:
                    _ask_helpers(stage, left)
                    helped = True
            if len(results) == before:  # all that is left is busy elsewhere
                time.sleep(0.2 if helped else 0.0)  # mostly with our helpers, which need no word
                wait = not helped  # else wait for the first of them, and say so
    except BaseException:  # an error, or the user has stopped us: the helpers stop, too
        _end_helpers()
        raise
    finally:
        bar.close()
    return [results[i] for i in range(len(settings))]


def _num_workers() -> int:
    """$PDPO_WORKERS, else one for each core that is not used by this process's threads, four at most; one on a GPU.

    One under torchrun, too: that has started all that there should be.
    """
    if launched():
        return 1
    chosen = os.environ.get("PDPO_WORKERS", "")
    if chosen and not (chosen.isdigit() and int(chosen) > 0):
        raise ValueError(f"PDPO_WORKERS: expected a number of processes, at least 1, got {chosen!r}.")
    fitting = 1 if device().type == "cuda" else min((os.cpu_count() or 1) // torch.get_num_threads(), 4)
    return int(chosen) if chosen else max(fitting, 1)


_helpers: list[subprocess.Popen] = []


def _ask_helpers(stage: Callable, settings: list[dict]) -> None:
    """Gives a list of stages to the other processes, which start when first needed and end with this one, however it ends.

    They say nothing; what they do lies on the disk.
    """
    _helpers[:] = [helper for helper in _helpers if helper.poll() is None]
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    while len(_helpers) < _num_workers() - 1:
        command, silent = [sys.executable, "-c", "from pdpo.stages import _help; _help()"], subprocess.DEVNULL
        _helpers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, env=environment))
    variables = {key: value for key, value in os.environ.items() if key.startswith("PDPO_")} | {"PDPO_WORKERS": "1"}
    task = pickle.dumps((variables, torch.get_num_threads(), stage, settings))
    for helper in _helpers:
        threading.Thread(target=_send, args=(helper, task), daemon=True).start()  # a new process takes seconds to read


def _send(helper: subprocess.Popen, task: bytes) -> None:
    with contextlib.suppress(OSError):  # it is gone: then we do all the work ourselves
        helper.stdin.write(b"%d\n" % len(task) + task)
        helper.stdin.flush()


def _end_helpers() -> None:
    while _helpers:
        _helpers.pop().kill()


def _help() -> None:
    """What a helper runs: one list of stages after the other, until the process that sends them is gone."""
    tasks: queue.Queue[bytes] = queue.Queue()

    def receive():
        while line := sys.stdin.buffer.readline():
            tasks.put(sys.stdin.buffer.read(int(line)))
        os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        variables, num_threads, stage, settings = pickle.loads(tasks.get())
        os.environ.update(variables)
        torch.set_num_threads(num_threads)
        with contextlib.suppress(Exception):  # the sender will meet it, too, and say it
            run_all(stage, settings)


def check_new_folder(target: Path) -> None:
    """ValueError unless `target` is a folder that is empty or does not exist: results never overwrite anything."""
    if target.resolve() == Path.cwd():
        raise ValueError(f"{target}: expected a folder of its own for the results, got the current one. Give it a name.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: expected an empty or a new folder, got one that holds something. Choose another.")
