"""The student's side of grading: executes cells, calls what they defined. Nothing here is trusted; `remote` is the other side."""

import contextlib
import ctypes
import errno
import io
import json
import linecache
import os
import pickle
import random
import re
import resource
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pdpo import exercises
from pdpo.exercises import core
from pdpo.grading.wire import Unpickler, encode, state_of, tensors_of, unpack

WATCHED = ("torch", "torch.nn.functional", "torch.testing", "torch.autograd")
NUM_GRAPHS = 64  # calls whose backward can still be asked for


def serve(connection: int, seconds: int, megabytes: int, output: int, user: int | None) -> None:
    """Answers requests until the connection ends, under limits (see `remote.Process`)."""
    torch.set_num_threads(1)
    channel = socket.socket(fileno=connection).makefile("rwb")
    exercises.tasks()  # imports all that the checks need
    notebook = Notebook()
    if Path("/proc/self/statm").exists():  # Linux; elsewhere the system keeps no such limit
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, [taken + megabytes * 2**20] * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, [output * 2**20] * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        for path in (os.__file__, torch.__file__, __file__):
            if not os.access(path, os.R_OK):  # it could not import what it has not imported yet
                raise PermissionError(f"user {user} cannot read {path}: install Python and pdpo where all users can read them")
    with contextlib.suppress(OSError, AttributeError):  # Linux: end with the grader's process, however that ends
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    _say(channel, None)
    while header := channel.read(8):
        request, *arguments = pickle.loads(channel.read(*struct.unpack("!Q", header)))
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, resource.RLIM_INFINITY))
        _say(channel, getattr(notebook, request)(*arguments))
    os._exit(0)


def _say(channel: Any, answer: Any) -> None:
    buffers: list[bytes] = []
    encoded = encode(answer, buffers)
    text = json.dumps([[len(each) for each in buffers], encoded]).encode()
    channel.write(struct.pack("!Q", len(text)) + text + b"".join(buffers))
    channel.flush()


class Notebook:
    """The names that a notebook's cells define, as in a kernel's `__main__`."""

    def __init__(self):
        self._module = types.ModuleType("__main__")
        self._module.__dict__.update(display=print, get_ipython=lambda: None)
        sys.modules["__main__"] = self._module
        self._calls, self._graphs = 0, {}
        self._out, self._err = sys.stdout, sys.stderr
        self._before = _functions()

    def cell(self, number: int, source: str) -> list[str] | None:
        """Executes a cell; None, or [kind, message] of what went wrong; the kinds "memory" and "output" leave a process unfit."""
        name = f"<cell {number}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for tracebacks
        try:
            try:
                code = compile(source, name, "exec")
            except SyntaxError:  # lines for IPython, such as %matplotlib inline and !pip install
                code = compile(re.sub(r"(?m)^(\s*)(?=[%!?])", r"\1pass  # ", source), name, "exec")
            exec(code, self._module.__dict__)
            self._out.flush()
            self._err.flush()
        except BaseException as error:
            return _kind_and_message(error)
        return None

    def functions(self, names: list[str]) -> dict[str, Any]:
        """Which of the names are callable, and which of torch's and the exercises' own functions the cells have replaced."""
        after = _functions()
        replaced = [
            name
            for name, function in self._before.items()
            if after.get(name) is not function and not _is_libraries(after.get(name))  # torch replaces some of its own
        ]
        return {"defined": [name for name in names if callable(vars(self._module).get(name))], "replaced": replaced}

    def call(self, name: str, data: bytes, sent: list[tuple], settings: dict) -> dict[str, Any]:
        """Calls a function; its result, or its exception, and what it changed in place."""
        leaves = [unpack(*each) for each in sent]
        arguments, named = Unpickler(io.BytesIO(data), leaves).load()
        before = [state_of(leaf) for leaf in leaves]
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(settings["seed"])
        error = value = None
        function = vars(self._module).get(name)
        if settings["adapter"]:
            function = settings["adapter"](function)
        with core._watched(settings["allowed"]) as called, torch.set_grad_enabled(settings["gradients"]):
            watcher = sys.getprofile()
            try:
                value = function(*arguments, **named)
            except BaseException as raised:
                error = [type(raised).__name__, str(raised)[:2000]]
            if sys.getprofile() is not watcher:
                called.append("sys.setprofile")
        self._calls += 1
        self._graphs.pop(self._calls - NUM_GRAPHS, None)
        results = [each for each in tensors_of(value) if each.requires_grad]
        self._graphs[self._calls] = results, [each for each in leaves if isinstance(each, torch.Tensor) and each.requires_grad]
        after = [state_of(leaf) for leaf in leaves]
        return {
            "number": self._calls, "value": value, "error": error, "called": called[:3],
            "changed": {str(i): new for i, (old, new) in enumerate(zip(before, after, strict=True)) if not _identical(old, new)},
            "containers": {str(i): each for i, each in enumerate(arguments) if isinstance(each, list | dict)},
            "grads": {
                str(i): leaf.grad for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.grad is not None
            },
        }  # fmt: skip

    def vjp(self, number: int, weights: list[torch.Tensor]) -> Any:
        """The gradients, for the leaves of call `number`, of its results weighted."""
        results, leaves = self._graphs[number]
        try:
            return list(torch.autograd.grad(results, leaves, weights, retain_graph=True, allow_unused=True))
        except Exception as error:
            return {"error": [type(error).__name__, str(error)[:2000]]}


def _kind_and_message(error: BaseException) -> list[str]:
    name, text = type(error).__name__, str(error)[:500]
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        return ["memory", f"{name}: {text}".rstrip(": ")]
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return ["output", f"{name}: {text}"]
    return ["exit" if isinstance(error, SystemExit) else "error", f"{name}: {text}".rstrip(": ")]


def _is_libraries(function: Callable | None) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] in ("torch", "pdpo")


def _functions() -> dict[str, Callable]:
    """What a notebook has no reason to replace."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name in WATCHED or name.startswith("pdpo."):
            found |= {f"{name}.{key}": value for key, value in list(vars(module).items()) if callable(value)}
    return found | {f"torch.Tensor.{key}": value for key, value in list(vars(torch.Tensor).items()) if callable(value)}


def _identical(a: Any, b: Any) -> bool:
    """Bit for bit, so that nan is nan."""
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.tobytes() == b.tobytes()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
