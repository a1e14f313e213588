"""Stages: work that is done once, kept in runs/ and found there by the next call, also by that of another process.

A stage's folder is named by a hash of all that determines it: configuration, data, the stage it starts from and the code that
it can reach. A lock lets two processes that need one stage do it once; a killed stage goes on where it stopped."""

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import joblib
import tokenizers
import torch
import transformers
from joblib.parallel import get_active_backend

from pdpo.device import device, num_cores
from pdpo.distributed import gather, is_leader, launched, on_leader, world_size
from pdpo.files import CHECKOUT, file_digests, file_sha256, flush, read_json, set_aside, shown, write_json
from pdpo.progress import progress
from pdpo.reach import code_version, name_of

LARGE = 2**26  # bytes: files above are checked when they are first needed
# loky says so when it replaces a process that has grown by 300 MB, which a model in memory does; no run is lost
warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")


class Missing(Exception):
    """A stage is not kept, and the caller only wanted to look."""


def runs_dir() -> Path:
    """$PDPO_RUNS_DIR, else runs/ of the checkout that this package runs from, else runs/ of the current folder."""
    folder = CHECKOUT if (CHECKOUT / "notebooks").is_dir() else Path.cwd()
    return Path(os.environ.get("PDPO_RUNS_DIR") or folder / "runs")


def run_stage(group: str, name: str, determinants: dict, build: Callable, *, together: bool = False) -> Path:
    """The folder of a finished stage, built by build(folder) where it is not there yet.

    What build returns, if anything, goes on record beside the environment. Of a `distributed.process_group`, whose processes
    must see the same runs folder, the leader looks, locks, builds and writes while the others wait; `together`, all build."""
    made_by = {"code": code_version(build), "libraries": library_versions()}
    config = json.loads(json.dumps({"stage": name, **determinants, **made_by}))
    key = _digest(config)[:10]
    path = runs_dir() / group / f"{name}-{key}"
    if on_leader(lambda: _is_kept(path)):
        return path
    if _only_looking:
        raise Missing(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, name):
        if not on_leader(lambda: _is_kept(path)):  # else it was finished while we waited
            partial, began = path.with_name(path.name + ".partial"), time.monotonic()
            on_leader(lambda: partial.mkdir(exist_ok=True))
            if not all(seen := gather(partial.is_dir())):
                wanted = f"a folder that all processes see, got {seen}. Set PDPO_RUNS_DIR to one that they share"
                raise ValueError(f"{partial}: expected {wanted}.")
            if device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            facts = (build(partial) if together else on_leader(lambda: build(partial))) or {}

            def finish() -> None:
                record = {"config": config, "built_by": name_of(build), "environment": environment(began) | facts}
                record["files"] = file_digests(partial)
                write_json(partial / "stage.json", record | {"digest": _digest(record)})
                flush(partial)
                os.replace(partial, path)

            on_leader(finish)
    return path


def library_versions() -> dict[str, str]:
    """Of those that the numbers pass through."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}


def _is_kept(path: Path) -> bool:
    """Whether the stage is there, as it was written; one that is damaged is set aside."""
    if not os.path.lexists(path):
        return False
    if reason := damage(path):
        set_aside(path, reason)
    return not reason


def damage(path: Path, *, large: bool = False) -> str:
    """What is wrong with a finished stage's files, or "". Either the `LARGE` ones are read, or the others."""
    try:
        record = read_json(path / "stage.json")
        if record.pop("digest") != _digest(record):
            return "stage.json is not what was written"
        for name, digest in record["files"].items():
            if ((path / name).stat().st_size > LARGE) == large and file_sha256(path / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"damaged ({type(error).__name__}: {error})"
    return ""


@functools.cache
def check_large_files(path: Path) -> None:
    """ValueError where a stage's weights are damaged; read once a process, when they are first needed."""
    if reason := damage(path, large=True):
        set_aside(path, reason)
        raise ValueError(f"{shown(path)}: this stage was damaged and has been set aside. Run the same again: it is made anew.")


def _digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path, name: str):
    """Holds the lock of the stage that belongs at `path`; of several processes the leader does."""
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))

    def acquire() -> None:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            print(f"waiting for {name}, which another process is at ({shown(path.parent)})", flush=True)
            lock.acquire()

    on_leader(acquire)
    try:
        yield
    finally:
        if is_leader():
            lock.release()


def environment(began: float) -> dict:
    """What a result was made with: versions, device, threads, minutes since `began` (time.monotonic()), peak memory in MB.

    Of several processes also how many; the rest is the leader's."""
    cuda = device().type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: version for name, version in library_versions().items() if name != "tokenizers"},
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


def run_all(stage: Callable, settings: list[dict]) -> list:
    """stage(**setting) for every setting, in their order; what is not kept yet is made by several processes.

    On a CPU there are as many processes as cores ($PDPO_WORKERS at most), each with one of the runs; on several GPUs one for
    each. Within `joblib.parallel_config(backend="dask")`, or "ray", the runs go to that cluster, whose machines must share
    the runs folder.
    Args: stage: a function of a module that ends in `run_stage`. settings: its keyword arguments, one dict a call."""
    results = [_kept(stage, setting) for setting in settings]
    missing = [i for i, result in enumerate(results) if result is None]
    made, done = _made(stage, [settings[i] for i in missing]), len(settings) - len(missing)
    made = progress(made, f"{stage.__name__} stages", total=len(settings), done=done)
    results_of = dict(zip(missing, made, strict=True))
    return [results_of.get(i, result) for i, result in enumerate(results)]


_only_looking: list[bool] = []


def _kept(stage: Callable, setting: dict):
    """What the stage gives where it is kept, else None."""
    _only_looking.append(True)
    try:
        return stage(**setting)
    except Missing:
        return None
    finally:
        _only_looking.pop()


def _made(stage: Callable, settings: list[dict]):
    """The results of stages that are to be made, one by one, in their order."""
    backend, num_jobs = get_active_backend()
    on_cluster = type(backend).__name__ not in ("LokyBackend", "SequentialBackend")
    num_workers = min(num_runs_at_a_time(), len(settings))
    if not on_cluster and num_workers < 2:
        yield from (stage(**setting) for setting in settings)
        return
    variables = {key: value for key, value in os.environ.items() if key.startswith("PDPO_")} | {"PDPO_WORKERS": "1"}
    share = torch.get_num_threads() if on_cluster else max(num_cores() // num_workers, 1)
    there = {"variables": variables, "num_threads": min(torch.get_num_threads(), share)}
    if on_cluster:  # of which joblib would make no use where it has one worker
        backend.effective_n_jobs = lambda n_jobs: max(type(backend).effective_n_jobs(backend, n_jobs), 2)
    else:
        num_jobs, there["parent"] = num_workers, os.getpid()
    as_they_come = "generator" if backend.supports_return_generator else "list"
    parallel = joblib.Parallel(n_jobs=num_jobs, batch_size=1, pre_dispatch="all", return_as=as_they_come)
    yield from parallel(joblib.delayed(_in_worker)(stage, setting, **there) for setting in settings)


def _in_worker(stage: Callable, setting: dict, *, variables: dict[str, str], num_threads: int, parent: int | None = None):
    """One call of `run_all`, in a process of the cluster's or of joblib's, which ends when its parent does."""
    os.environ.update(variables)
    torch.set_num_threads(num_threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(claim_one(torch.cuda.device_count()))
    if parent is not None:
        _end_with(parent)
    # bars would overwrite each other; a Dask worker may have several threads, which would share torch's generator
    with _one_at_a_time, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return stage(**setting)


_one_at_a_time = threading.Lock()
_claimed: list[filelock.FileLock] = []


@functools.cache
def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def claim_one(count: int) -> int:
    """A number below `count` that no other process of this machine has claimed: its GPU. It is this process's until it ends.

    Where all are taken, by sweeps beside this one, it is shared: the process's number modulo count."""
    if not _claimed:
        folder = Path(tempfile.gettempdir()) / f"pdpo-gpus-{os.getuid() if hasattr(os, 'getuid') else 0}"
        folder.mkdir(exist_ok=True)
        for index in range(count):
            lock = filelock.FileLock(folder / str(index))
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(blocking=False)
                _claimed.append(lock)
                break
        else:
            return os.getpid() % count
    return int(Path(_claimed[0].lock_file).name)


def num_runs_at_a_time() -> int:
    """$PDPO_WORKERS, else one for each core that is not used by this process's threads, four at most; on CUDA one a GPU.

    One under torchrun, too: that has started all that there should be."""
    if launched():
        return 1
    chosen = os.environ.get("PDPO_WORKERS", "")
    if chosen and not (chosen.isdecimal() and 0 < int(chosen) < 10_000):
        raise ValueError(f"PDPO_WORKERS: expected a number of processes, at least 1, got {chosen!r}.")
    fitting = torch.cuda.device_count() if device().type == "cuda" else min(num_cores() // torch.get_num_threads(), 4)
    return int(chosen) if chosen else max(fitting, 1)
