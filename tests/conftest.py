"""What all tests share: one thread, no network, temporary folders for runs and caches, small fixtures."""

import atexit
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

_TEMPORARY = Path(tempfile.mkdtemp(prefix="pdpo-tests-"))
atexit.register(shutil.rmtree, _TEMPORARY, ignore_errors=True)
os.environ |= {  # before anything of pdpo or of the hub's client is imported: both read them once
    "PDPO_PRESET": "tiny",
    "PDPO_WORKERS": "1",
    "PDPO_RUNS_DIR": str(_TEMPORARY / "runs"),
    "XDG_CACHE_HOME": str(_TEMPORARY / "cache"),
    "HF_HOME": str(_TEMPORARY / "hub"),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


LONGEST = "claims gpt2_medium stages gpu_benchmark trust exercises derivations distributed grading remote command_line training"


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # else xdist begins with the files of many tests, not with the long ones
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest files first, so that no core waits for one at the end."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """$PDPO_DATA_DIR, where the `instructions` file lies."""
    folder = os.environ.get("PDPO_DATA_DIR")
    if not folder:
        pytest.skip("PDPO_DATA_DIR is not set: no real data set here")
    if not (Path(folder) / "instruction-data-with-preference.json").is_file():
        pytest.skip(f"PDPO_DATA_DIR={folder} lacks instruction-data-with-preference.json")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    """GPT-2's real vocabulary, from the folder models/gpt2-tokenizer beside $PDPO_DATA_DIR."""
    from dataclasses import replace

    from pdpo.models import load_tokenizer
    from pdpo.presets import get_preset

    data = os.environ.get("PDPO_DATA_DIR")
    folder = Path(data).resolve().parent / "models" / "gpt2-tokenizer" if data else None
    if folder is None or not (folder / "vocab.json").is_file():
        pytest.skip("no models/gpt2-tokenizer beside PDPO_DATA_DIR: no real GPT-2 vocabulary here")
    return load_tokenizer(replace(get_preset("tiny"), tokenizer=str(folder), context=1024))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The preset tiny's own BPE, trained on the toy's training split."""
    from pdpo.models import load_tokenizer
    from pdpo.presets import get_preset

    return load_tokenizer(get_preset("tiny"))


@pytest.fixture(params=["tiny", "gpt2"])
def any_tokenizer(request):
    """The tiny BPE, and GPT-2's real vocabulary where it is at hand."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def python():
    """Starts `python -c code` (or a script and its arguments) with the tests' environment; ends what is left at the end."""
    started = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | environment
        variables = {key: value for key, value in variables.items() if value is not None}
        process = subprocess.Popen(
            [sys.executable, *arguments], env=variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Forked:
    """A function in a process of its own, with what tests use of a Popen."""

    def __init__(self, context, function, arguments, options):
        from stages import become

        (input, write), (read, output), (read_errors, errors) = (context.Pipe(duplex=False) for _ in range(3))
        given = function, arguments, options, dict(os.environ), (input, output, errors)
        self._process = context.Process(target=become, args=given)
        self._process.start()
        for each in (input, output, errors):
            each.close()
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(os.dup(each.fileno()), mode) for each, mode in ((write, "w"), (read, "r"), (read_errors, "r"))
        )
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join(timeout=300)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        self.stdin.close()
        said = self.stdout.read(), self.stderr.read()
        self.wait()
        return said


@pytest.fixture(scope="session")
def fork_server():
    """One process that has imported the package, from which others are forked: each start of Python costs seconds of imports."""
    from pdpo import device

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker", "stages", "ranks"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        forkserver.ensure_running()
    with pytest.MonkeyPatch.context() as patched:  # a command that fails in this process ends its children: not this one
        patched.setattr(device, "end_children", lambda: None)
        yield context


@pytest.fixture
def forked(fork_server):
    """Starts `function(*arguments, **options)` with the tests' environment; ends what is left at the end."""
    started = []

    def start(function, *arguments, **options) -> Forked:
        started.append(Forked(fork_server, function, arguments, options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def output(python):
    """The standard output of `python -c code`, once it has ended well."""

    def run(*arguments: str, **environment: str) -> str:
        process = python(*arguments, **environment)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out

    return run


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A preset that trains in a second, with a runs folder of this test's own and no SBERT."""
    import stages

    from pdpo import experiments

    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(experiments, "load_judge", lambda *_, **__: stages.Judge())
    return stages.preset(tmp_path)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The methods of the trainings that begin in this process, in their order."""
    from pdpo import making

    begun, train = [], making.train

    def counted(policy, rows, config, **options):
        begun.append(config.method)
        return train(policy, rows, config, **options)

    monkeypatch.setattr(making, "train", counted)
    return begun


def wait_until(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def same_weights(one, other) -> bool:
    """Whether two runs ended with the same bits."""
    weights, others = one.load_policy().state_dict(), other.load_policy().state_dict()
    return all(torch.equal(value, others[key]) for key, value in weights.items())


def refusal(capsys, *arguments: str) -> str:
    """The one line that `python -m pdpo` prints where its input is bad."""
    from pdpo.__main__ import main

    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line
