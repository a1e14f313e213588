"""A function in another process behaves as if it were here: values, gradients, exceptions, in-place changes, and every check's verdict."""

import random

import numpy as np
import pytest
import torch

from pdpo.exercises import core, tasks
from pdpo.grading.remote import Ended, Process, Remote

CELL = """
import os, signal, sys, time
import numpy as np
import torch
import pdpo

def mixed(x, y, scale=1.0): return scale * (x * y).sum(-1), x.detach() > 0, {"a": [1, 2.5, None, "s"]}
def halves(x): return x.detach().half(), np.float32(3), np.arange(3), torch.zeros(0, 2)
def grow(numbers): numbers.append(3)
def add(x): return x.add_(1).sum()
def train(policy, optimizer, x):
    optimizer.zero_grad(); loss = policy(x).square().mean(); loss.backward(); optimizer.step()
    return loss.item()
def stub(x): raise NotImplementedError("write me")
class Odd(Exception): pass
def odd(x): raise Odd("of its own kind")
def package(a, b, c, d, beta): return pdpo.dpo_loss(a, b, c, d, beta=beta).losses
def unwatched(a, b, c, d, beta):
    sys.setprofile(None)
    return pdpo.dpo_loss(a, b, c, d, beta=beta).losses
def leave(x): os._exit(0)
def loop(x):
    while True: pass
def closes(x): os.closerange(3, 100); time.sleep(60)
def hoards(x): return torch.ones(2**33)
def speaks(x):
    for number in range(3, 100):
        try: os.write(number, b"\\0" * 7 + b"\\x12" + b'[[],{"number":true}]')
        except OSError: pass
    return x
def strange(x): return object()
def waits(x): time.sleep(10**6)
"""

COPIES = """
OTHERS = {"reward_head": "_head", "planted_bug": "_diagnosis"}
import importlib, inspect, pdpo.exercises, pkgutil
for module in pkgutil.iter_modules(pdpo.exercises.__path__):
    module = importlib.import_module("pdpo.exercises." + module.name)
    copy = dict(vars(module))
    exec(compile(inspect.getsource(module), "<copied>", "exec"), copy)  # the same functions, and not the package's own
    for task in copy.get("TASKS", ()):
        solution = inspect.getclosurevars(task.check).nonlocals.get("solution") or copy[OTHERS[task.name]]
        for number, function in enumerate([solution, *(mistake for _, mistake in task.mistakes)]):
            globals()[f"{task.name}_{number}"] = function
"""


def start(folder, cell: str = CELL, **limits) -> Process:
    process = Process(folder, open(folder / "log", "w"), **{"seconds": 20, "megabytes": 1024, "output": 1} | limits)
    assert process.ask("cell", 1, cell) is None
    return process


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    process = start(tmp_path_factory.mktemp("remote"))
    yield process
    process.close()


@pytest.fixture
def short_lived(tmp_path):
    process = start(tmp_path, seconds=2)
    yield process
    process.close()


def test_values_and_gradients_come_back(process):
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    total, positive, rest = Remote(process, "mixed")(x, y, scale=2.0)
    torch.testing.assert_close(total, 2 * (x * y).sum(-1))
    assert torch.equal(positive, x > 0) and rest == {"a": [1, 2.5, None, "s"]}
    weights = torch.randn(3)
    (gradient,) = torch.autograd.grad((total * weights).sum(), x)
    torch.testing.assert_close(gradient, 2 * weights[:, None] * y)
    with torch.no_grad():
        assert not Remote(process, "mixed")(x, y)[0].requires_grad


def test_kinds_of_number_come_back(process):
    half, scalar, array, empty = Remote(process, "halves")(torch.tensor([1.5, float("nan")]))
    assert half.dtype == torch.float16 and half[0] == 1.5 and half[1].isnan()
    assert type(scalar) is np.float32 and array.tolist() == [0, 1, 2] and empty.shape == (0, 2)
    assert type(Remote(process, "strange")(1)).__name__ == "object"


def test_changes_in_place_come_back(process):
    x, numbers = torch.zeros(2), [1]
    Remote(process, "grow")(numbers)
    Remote(process, "add")(x[:1])
    assert numbers == [1, 3] and x.tolist() == [1, 0]
    policy = torch.nn.Linear(2, 1)
    before = policy.weight.detach().clone()
    Remote(process, "train")(policy, torch.optim.SGD(policy.parameters(), lr=0.1), torch.ones(3, 2))
    torch.testing.assert_close(policy.weight.detach(), before - 0.1 * policy.weight.grad)
    assert policy.weight.grad.norm() > 0


def test_exceptions_come_back_by_their_names(process):
    with pytest.raises(NotImplementedError, match="write me"):
        Remote(process, "stub")(1)
    with pytest.raises(Exception, match="of its own kind") as raised:
        Remote(process, "odd")(1)
    assert type(raised.value).__name__ == "Odd"
    with pytest.raises(RuntimeError, match="allocate"):
        Remote(process, "hoards")(1)


@pytest.mark.parametrize(("name", "called"), [("package", "pdpo.losses.dpo_loss"), ("unwatched", "sys.setprofile")])
def test_the_packages_own_function_is_seen(process, name, called):
    with pytest.raises(core.Wrong, match=called):
        tasks()["dpo_loss"].check(Remote(process, name))


@pytest.mark.parametrize(
    ("name", "kind"), [("leave", "exit"), ("loop", "time"), ("waits", "time"), ("closes", "exit"), ("speaks", "forged")]
)
def test_a_function_that_ends_its_process_ends_the_check(short_lived, name, kind):
    with pytest.raises(Ended) as ended:
        core.call(Remote(short_lived, name), torch.ones(1))  # which catches Exception
        core.call(Remote(short_lived, name), torch.ones(1))  # answers out of turn are noticed with the next
    assert ended.value.kind == kind


def verdict(task: core.Task, function, seed: int) -> str:
    core.SEEDS = random.Random(seed)
    torch.manual_seed(seed)
    try:
        task.check(function)
    except core.Wrong as wrong:
        return f"{wrong.property}: {wrong.why}"
    finally:
        core.SEEDS = random.SystemRandom()
    return "passed"


def test_every_check_says_of_a_remote_function_what_it_says_of_a_local_one(tmp_path):
    here = {}
    exec(COPIES, here)
    process = start(tmp_path, COPIES)
    for task in tasks().values():
        for number in range(len(task.mistakes) + 1):
            local = verdict(task, here[f"{task.name}_{number}"], seed=number)
            assert verdict(task, Remote(process, f"{task.name}_{number}"), seed=number) == local, (task.name, number)
            assert number > 0 or local == "passed", (task.name, local)
    process.close()
