"""What checks are made of: a careful call of a student's function, a comparison, and the name of the likely mistake.

A topic is one module beside this one, with `TASKS = (Task(...), ...)`; `task` builds the usual Task from a solution, cases and
mistakes. Inputs are drawn anew at every check, so that stored answers cannot pass.
"""

import copy
import importlib
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PACKAGE = str(Path(__file__).parent.parent) + os.sep
SEEDS: random.Random = random.SystemRandom()  # the grader puts a seeded one in its place
_TOLERANCE = 1e-4  # relative: float32's rounding in sums of dozens of terms; every mistake is off by far more
_USUAL = (  # mistakes that can be made in any task: what they make of a right result
    ("the sign is turned round", lambda right: -right),
    ("the logarithm is missing: this is its exponential", lambda right: right.exp()),
    ("the rows are averaged: one value a row is asked", lambda right: right.mean()),
    ("the rows are summed: one value a row is asked", lambda right: right.sum()),
    ("the order in each row is turned round", lambda right: right.flip(-1)),
    ("no gradient flows back: .item(), .tolist(), .detach() or torch.tensor(...) cuts the graph", lambda right: right.detach()),
)


class Wrong(Exception):
    """A check's verdict: the property that does not hold, the likely cause, and the smallest input that shows it."""

    def __init__(self, property: str, why: str, *, given: Any = None, expected: Any = None, got: Any = None):
        super().__init__(property, why)
        self.property, self.why = property, why
        self.shown = {"given": given, "expected": expected, "got": got}

    def __str__(self) -> str:
        lines = {"property": self.property, **self.shown, "likely cause": self.why}
        return "\n".join(f"{name + ':':<14}{show(value)}" for name, value in lines.items() if value is not None)


@dataclass(frozen=True)
class Task:
    """One function for a student to write.

    Args:
        name, exercise: such as "dpo_loss" and "ex_05".
        signature: one line, as the student writes it: "def dpo_loss(policy_chosen_logps, ..., beta):".
        hints: three texts, from a nudge to almost the answer.
        check: raises `Wrong` unless the student's function is right.
        mistakes: (diagnosis, wrong function) pairs that `check` recognises.
    """

    name: str
    exercise: str
    signature: str
    hints: tuple[str, str, str]
    check: Callable[[Callable], None]
    mistakes: tuple[tuple[str, Callable], ...] = ()


def task(
    name: str,
    exercise: str,
    signature: str,
    hints: tuple[str, str, str],
    solution: Callable,
    cases: Callable[[torch.Generator], Iterable[tuple]],
    mistakes: tuple[tuple[str, Callable], ...],
    **options: Any,
) -> Task:
    """A Task whose check is `compare`: `cases(generator)` gives (property, argument, argument, ...) tuples, smallest first."""
    names = signature[signature.index("(") + 1 : signature.index(")")].split(", ")

    def check(function: Callable) -> None:
        compare(function, solution, cases(fresh()), mistakes, names=names, **options)

    return Task(name, exercise, signature, hints, check, mistakes)


def by_position(function: Callable) -> Callable:
    """The same function where its keyword-only arguments, as in f(..., *, beta), may be given by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin, perhaps, that does not tell
        return function
    names = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
    if not names:
        return function
    return lambda *given: function(*given[: -len(names)], **dict(zip(names, given[-len(names) :], strict=False)))


def fresh() -> torch.Generator:
    """A generator with a seed that nobody knows beforehand: stored answers do not fit what it draws."""
    return torch.Generator().manual_seed(SEEDS.getrandbits(32))


def call(function: Callable, *arguments: Any, names: Sequence[str] = (), allowed: Sequence[str] = ()) -> Any:
    """The result of the student's function on copies of the arguments.

    Args:
        names: what the arguments are called, for messages.
        allowed: qualified names in this package that the function may call, such as "TabularPolicy.forward".
    Raises:
        Wrong: it is a stub, crashed, called this package's own function, or changed its inputs.
    """
    given, copies = _given(names, arguments), [_copy(each) for each in arguments]
    result = _attempt(function, copies, allowed)
    if isinstance(result, NotImplementedError):
        raise Wrong("it is written", f"the function is still a stub ({result})")
    if isinstance(result, BaseException):
        raise Wrong("it runs", f"it raised {type(result).__name__}: {result}", given=given)
    for i, (before, after) in enumerate(zip(arguments, copies, strict=True)):
        if not _same(before, after, tolerance=0):
            name = names[i] if names else f"argument {i + 1}"
            why = f"{name} is changed in place (x += ..., x[...] = ..., x.sub_(...)): make a new tensor instead"
            raise Wrong("it leaves its inputs as they were", why, given=given, got=f"{name} = {show(after)} afterwards")
    if isinstance(result, Tensor) and type(result) is not Tensor:
        raise Wrong("the result has the right form", f"expected a plain tensor, got {type(result).__name__}", given=given)
    return result


def compare(
    function: Callable,
    solution: Callable,
    cases: Iterable[tuple],
    mistakes: Sequence[tuple[str, Callable]] = (),
    *,
    names: Sequence[str] = (),
    gradient: Sequence[int] = (),
    allowed: Sequence[str] = (),
    tolerance: float = _TOLERANCE,
) -> None:
    """Passes where function and solution agree on every case, in value and in the gradient of the arguments `gradient`.

    Args:
        cases: (property, *arguments), from the smallest to the largest; the first that fails is reported.
        mistakes: (diagnosis, wrong function): the first that gives the student's results on every case names the cause.
        tolerance: relative difference up to which numbers are equal; the absolute one is a tenth of it.
    Raises:
        Wrong: whatever `call` raises, or a value or a gradient that differs.
    """
    cases, first, mine, right = list(cases), None, [], []
    for property, *arguments in cases:
        right.append(_outcome(solution, arguments, gradient))
        given = _given(names, arguments)
        try:
            value = call(function, *arguments, names=names, allowed=allowed)
        except Wrong as wrong:
            raise first or wrong from None
        mine.append((value, _gradient(function, arguments, gradient, allowed)))
        if first is None and not _same(mine[-1], right[-1], tolerance):
            first = _difference(property, given, mine[-1], right[-1], [names[i] for i in gradient])
    if first is None:
        return
    values, true = [value for value, _ in mine], [value for value, _ in right]
    parts = slice(0, 2 if _same(values, true, tolerance) else 1)  # gradients tell mistakes apart only where values are right
    for diagnosis, mistake in (*mistakes, *((text, lambda *a, f=change: f(solution(*a))) for text, change in _USUAL)):
        wrong = (_outcome(mistake, arguments, gradient if parts.stop == 2 else ()) for _, *arguments in cases)
        if all(_same(x[parts], y[parts], tolerance) for x, y in zip(mine, wrong, strict=True)):
            raise Wrong(first.property, diagnosis, **first.shown)
    if why := _pattern(values, true):
        raise Wrong(first.property, why, **first.shown)
    raise first


def show(value: Any) -> str:
    """Short text for a message: small tensors as rounded lists, large ones by their shape and first numbers."""
    if isinstance(value, Tensor) and value.numel() > 24:
        return f"a tensor of shape {tuple(value.shape)}, beginning {show(value.flatten()[:4])}"
    if isinstance(value, Tensor):
        return show(value.tolist())
    if isinstance(value, float):
        return f"{value + 0.0:.5g}"  # 0, not -0
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    return value if isinstance(value, str) else repr(value)[:200]


def _given(names: Sequence[str], arguments: Sequence) -> str:
    names = names or [f"argument {i + 1}" for i in range(len(arguments))]
    return ", ".join(f"{name} = {show(value)}" for name, value in zip(names, arguments, strict=True))


@contextmanager
def _watched(allowed: Sequence[str]) -> Iterator[list[str]]:
    """The names of this package's functions that run meanwhile, however they were imported or wrapped."""
    for name in ("data", "logps", "losses", "preferences"):  # else their import would look like a call
        importlib.import_module(f"pdpo.{name}")

    called: list[str] = []

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_PACKAGE) and code.co_filename != __file__:
            if code.co_qualname not in (*allowed, "__getattr__"):  # the package's names come when they are asked for
                called.append(f"{frame.f_globals.get('__name__')}.{code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield called
    finally:
        sys.setprofile(before)


def _attempt(function: Callable, arguments: Sequence, allowed: Sequence[str] | None = None) -> Any:
    """The function's result, or the exception that it raised; with `allowed`, `Wrong` where it calls this package."""
    with getattr(function, "watched", _watched)(allowed or ()) as called:  # a function of another process is watched there
        try:
            result = function(*arguments)
        except (Exception, SystemExit) as error:
            result = error
    if called and allowed is not None:
        raise Wrong("it is your own work", f"the function calls {called[0]}, which is the answer: write it out yourself")
    return result


def adapted(adapter: Callable, function: Callable) -> Callable:
    """adapter(function); where the function lives in another process, so does then the adapter."""
    return function.through(adapter) if hasattr(function, "through") else adapter(function)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _outcome(function: Callable, arguments: Sequence, gradient: Sequence[int]) -> tuple[Any, Any]:
    """(result, gradients): what two functions must share to be taken for the same."""
    return _attempt(function, [_copy(each) for each in arguments]), _gradient(function, arguments, gradient)


def _gradient(function: Callable, arguments: Sequence, indices: Sequence[int], allowed: Sequence[str] | None = None) -> Any:
    """The gradient of a weighted sum of the result in each argument of `indices`; None: there is none; or an exception."""
    inputs = [_copy(each).requires_grad_() if i in indices else _copy(each) for i, each in enumerate(arguments)]
    result = _attempt(function, inputs, allowed) if indices else None
    if not isinstance(result, Tensor) or not result.requires_grad:
        return result if isinstance(result, Exception) else None
    total = (result * torch.linspace(1, 2, result.numel(), dtype=result.dtype).view(result.shape)).sum()
    return _attempt(lambda: torch.autograd.grad(total, [inputs[i] for i in indices], materialize_grads=True), ())


def _same(a: Any, b: Any, tolerance: float = _TOLERANCE) -> bool:
    """Equal in kind, shape and value; nan equals nan; 2 equals 2.0; no exception equals another."""
    if isinstance(a, int | float) and isinstance(b, int | float) and isinstance(a, bool) == isinstance(b, bool):
        a, b = torch.tensor(float(a)), torch.tensor(float(b))
    if type(a) is not type(b) and not (isinstance(a, list | tuple) and isinstance(b, list | tuple)):
        return False
    if isinstance(a, Tensor):
        if a.shape != b.shape or _kind(a) != _kind(b):
            return False
        return torch.allclose(a.detach().double(), b.detach().double(), tolerance, tolerance / 10, equal_nan=True)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == b


def _kind(tensor: Tensor) -> str:
    return "floats" if tensor.is_floating_point() else "booleans" if tensor.dtype == torch.bool else "integers"


def _form(got: Any, right: Any) -> str:
    """What is wrong with the type, shape or kind of the result; empty where they are right."""
    if isinstance(right, tuple) and isinstance(got, tuple | list) and len(got) == len(right):
        return next((why for why in map(_form, got, right) if why), "")
    if isinstance(right, int | float) and isinstance(got, int | float):
        return ""
    if type(got) is not type(right) or isinstance(right, tuple):
        wanted = (
            f"a tensor of shape {tuple(right.shape)}" if isinstance(right, Tensor) else f"{type(right).__name__} {show(right)}"
        )
        return f"expected {wanted}, got {type(got).__name__}" + " (is there a return?)" * (got is None)
    if not isinstance(right, Tensor) or (got.shape, _kind(got)) == (right.shape, _kind(right)):
        return ""
    return f"expected {_kind(right)} of shape {tuple(right.shape)}, got {_kind(got)} of shape {tuple(got.shape)}"


def _difference(property: str, given: str, got: tuple[Any, Any], right: tuple[Any, Any], names: Sequence[str]) -> Wrong:
    """How the first (result, gradients) pair that is not right differs, for mistakes that nobody foresaw."""
    shown = {"given": given, "expected": right[0], "got": got[0]}
    if why := _form(got[0], right[0]):
        return Wrong("the result has the right form", why, **shown)
    if not _same(got[0], right[0]):
        return Wrong(property, "none of the usual mistakes: work the given input by hand and compare each step", **shown)
    why = "the values are right; part of the graph is cut or bent"
    if isinstance(got[1], Exception):
        why = f"backward raised {got[1]!r}"
    elif got[1] is not None:
        i = next(i for i, (mine, true) in enumerate(zip(got[1], right[1], strict=True)) if not _same(mine, true))
        shown |= {"expected": f"gradient in {names[i]} {show(right[1][i])}", "got": got[1][i]}
    return Wrong(f"the gradient, too, is right: {property}", why, **shown)


def _pattern(got: list, right: list) -> str:
    """A cause read from all results together; empty where there is none to be seen."""
    if not all(isinstance(x, Tensor) and _kind(x) == _kind(y) and x.shape == y.shape for x, y in zip(got, right, strict=True)):
        return ""
    mine, true = (torch.cat([each.detach().flatten().double() for each in values]) for values in (got, right))
    if len(mine) > 1 and (mine == mine[0]).all():
        return "the result is one number, whatever comes in"
    if not mine.isfinite().all() and true.isfinite().all():
        return "nan or inf: an exp that overflows, a log of zero, or -inf * 0; stay in log space"
    if _same(mine, true):  # it is the gradient that is wrong
        return ""
    if _same(mine - true, (mine - true).mean().expand(mine.shape)):
        return f"every value is off by the same {(mine - true).mean():+.4g}"
    scale = (mine * true).sum() / (true * true).sum()
    return f"every value is {scale:.4g} times what it should be" if _same(mine, scale * true) else ""
