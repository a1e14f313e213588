"""A function in another process, called as if it were here: tensors and gradients travel, trust does not.

`Process` and `Remote` are the side that checks; `student.serve` is the other side, which executes cells and calls the functions that
they defined. To that side objects go pickled; from it come numbers, text and raw tensors, and nothing that comes is ever executed.
"""

import builtins
import io
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pdpo.grading.wire import Pickler, decode, pack, refill, replace, restore, tensors_of

LARGEST_REPLY = 2**26  # bytes
FORGED = "it wrote to the grader's connection"


class Ended(BaseException):
    """The other process is no more: `kind` is "time", "exit" or "forged". No `except Exception` of a check hides it."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


class Process:
    """A process that executes cells and calls functions under limits, in its own process group.

    Args:
        folder: where it works; its HOME, too.
        log: an open file for what it prints.
        seconds: of processor time for each request; and so many on the clock that it may wait without computing.
        megabytes: of memory beyond what torch takes.
        output: megabytes that it may write to a file, or print.
        user: the number of a user to become, where the caller is root.
    """

    def __init__(self, folder: Path, log: Any, *, seconds: int, megabytes: int, output: int, user: int | None = None):
        ours, theirs = socket.socketpair()
        self.seconds, self._socket = seconds, ours
        limits = f"{theirs.fileno()}, {seconds}, {megabytes}, {output}, {user}"
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT")}
        environment = kept | {
            "HOME": str(folder), "TMPDIR": str(folder), "PDPO_RUNS_DIR": str(folder / "runs"), "PDPO_FIGURES_DIR": str(folder / "figures"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent.parent), *filter(None, sys.path)]), "PYTHONHASHSEED": "0",
            "PDPO_PRESET": "tiny", "PDPO_WORKERS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from pdpo.grading.student import serve; serve({limits})"], cwd=folder, env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(theirs.fileno(),), start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._began = time.monotonic() + 300, 0.0  # to import torch may take long on a busy machine
        self._receive()  # it has imported torch, and waits

    def ask(self, *request: Any) -> Any:
        """The answer to a request; Ended where none comes."""
        data = pickle.dumps(request)
        self._began = time.monotonic(), self._computed()
        try:
            self._socket.settimeout(20 * self.seconds)
            self._socket.sendall(struct.pack("!Q", len(data)) + data)
        except OSError:
            self._end()
        return self._receive()

    def close(self) -> None:
        """Kills it and whatever it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._socket.close()

    def _computed(self) -> float:
        """Seconds of processor time so far; 0 where the system does not say."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _waits(self) -> bool:
        """Whether it waits instead of computing. A busy machine may let it compute as little as a twentieth of the time."""
        began, computed = self._began
        return time.monotonic() - began > self.seconds + 20 * (self._computed() - computed)

    def _receive(self) -> Any:
        """A length, JSON of that length, and the buffers whose lengths it begins with."""
        (length,) = struct.unpack("!Q", self._read(8))
        try:
            lengths, answer = json.loads(self._read(length))
            if not all(0 <= each <= LARGEST_REPLY for each in [*lengths, sum(lengths)]):
                raise ValueError
            return decode(answer, [self._read(each) for each in lengths])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, RecursionError, OverflowError):
            self.close()
            raise Ended("forged", FORGED) from None

    def _read(self, length: int) -> bytearray:
        if length > LARGEST_REPLY:
            raise ValueError
        data = bytearray()
        while len(data) < length:
            self._socket.settimeout(1)
            try:
                piece = self._socket.recv(min(length - len(data), 2**20))
            except TimeoutError:
                piece = None if self._process.poll() is None and not self._waits() else b""
            except OSError:
                piece = b""
            if piece == b"":
                self._end()
            data += piece or b""
        return data

    def _end(self) -> None:
        """Says why no answer came."""
        waits = self._waits()
        try:
            status = self._process.wait(5)  # an end of the connection comes a moment before the end of the process
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        if status == -signal.SIGXCPU:
            raise Ended("time", f"it computed for more than {self.seconds} seconds")
        if status is None and waits:
            raise Ended("time", f"it waited for more than {self.seconds} seconds")
        by = "closed its connection" if status is None else f"signal {-status}" if status < 0 else f"exit status {status}"
        raise Ended("exit", f"it ended the process ({by})")


class Remote:
    """A function of the other process. In-place changes of its arguments, gradients and exceptions come back as if it were here."""

    def __init__(self, process: Process, name: str, adapter: Callable | None = None):
        self.process, self.__name__, self._adapter = process, name, adapter
        self._allowed, self._called = (), []

    @contextmanager
    def watched(self, allowed: Sequence[str]) -> Iterator[list[str]]:
        """What `pdpo.exercises` uses to see which of this package's functions it calls, watched over there."""
        self._allowed, self._called = allowed, []
        try:
            yield self._called
        finally:
            self._allowed = ()

    def through(self, adapter: Callable) -> "Remote":
        """adapter(function), made over there: for functions of modules and of other functions, which cannot travel."""
        return Remote(self.process, self.__name__, adapter)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        data, leaves = io.BytesIO(), []
        Pickler(data, leaves).dump((arguments, named))
        sent = [pack(leaf) for leaf in leaves]
        seed = int(torch.randint(2**31, ()))  # from this side's global generator: seed that, and both sides repeat themselves
        settings = {
            "allowed": tuple(self._allowed),
            "seed": seed,
            "gradients": torch.is_grad_enabled(),
            "adapter": self._adapter,
        }
        answer = self.process.ask("call", self.__name__, data.getvalue(), sent, settings)
        try:
            self._called.extend(str(each) for each in answer["called"])
            for index, value in answer["changed"].items():
                restore(leaves[int(index)], value)
            for index, value in answer["containers"].items():
                refill(arguments[int(index)], value)
            for index, value in answer["grads"].items():
                leaves[int(index)].grad = value
            leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
            error = answer["error"] and _exception(*answer["error"])
            value, number = answer["value"], answer["number"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError):
            self.process.close()
            raise Ended("forged", FORGED) from None
        if error:
            raise error
        found = [each for each in tensors_of(value) if each.requires_grad] if leaves else []
        linked = iter(_Linked.apply(self.process, number, len(found), *found, *leaves) if found else ())
        return replace(value, lambda each: next(linked) if each.requires_grad and found else each)


class _Linked(torch.autograd.Function):
    """The results of call `number`, with a backward that asks the other process for the vector-Jacobian product."""

    @staticmethod
    def forward(ctx, process, number, num_results, *tensors):
        ctx.process, ctx.number, ctx.num_results = process, number, num_results
        ctx.shapes = [(each.shape, each.dtype) for each in tensors[num_results:]]
        return tuple(each.detach().clone() for each in tensors[:num_results])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        answer = ctx.process.ask("vjp", ctx.number, [each.clone() for each in grads])
        if isinstance(answer, dict) and isinstance(answer.get("error"), list):
            raise _exception(*map(str, answer["error"][:2]))
        fits = isinstance(answer, list) and len(answer) == len(ctx.shapes)
        if not fits or not all(
            each is None or (isinstance(each, Tensor) and (each.shape, each.dtype) == expected)
            for each, expected in zip(answer, ctx.shapes, strict=True)
        ):
            ctx.process.close()
            raise Ended("forged", FORGED)
        return None, None, None, *[None] * ctx.num_results, *answer


def _exception(name: str, message: str) -> BaseException:
    """The exception that was raised there, if Python has it; else one of that name."""
    kind = getattr(builtins, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, Exception | SystemExit)):
        kind = type(str(name), (Exception,), {})
    try:
        return kind(str(message))
    except TypeError:  # such as UnicodeDecodeError, which wants five arguments
        return type(str(name), (Exception,), {})(str(message))
