"""What every check is made of: a careful call of a student's function, a comparison, and the name of the likely mistake.

A topic is one module beside this one, with `TASKS = (Task(...), ...)`; `task` builds the usual Task from a solution, cases and
mistakes. Inputs are drawn anew at every call of a check, so that stored answers cannot pass.
"""

import copy
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
FORM = "the result has the right form"
RTOL, ATOL = 1e-4, 1e-5  # float32's rounding in sums of some dozens of terms; every mistake is off by far more


class Wrong(Exception):
    """A check's verdict: the property that does not hold and the likely cause; the smallest input that shows it."""

    def __init__(self, property: str, why: str, *, given: Any = None, expected: Any = None, got: Any = None):
        super().__init__(property, why)
        self.property, self.why = property, why
        self.shown = {"given": given, "expected": expected, "got": got}

    def __str__(self) -> str:
        lines = [f"{name + ':':<14}{show(value)}" for name, value in self.shown.items() if value is not None]
        return "\n".join([f"{'property:':<14}{self.property}", *lines, f"likely cause: {self.why}"])


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


def fresh() -> torch.Generator:
    """A generator with a seed that nobody knows beforehand: stored answers do not fit what it draws."""
    return torch.Generator().manual_seed(random.SystemRandom().getrandbits(32))


def call(function: Callable, *arguments: Any, like: Any = None, names: Sequence[str] = (), allowed: Sequence[str] = ()) -> Any:
    """The student's function on copies of the arguments; its result, detached from no graph.

    Args:
        like: a right result; type, shape and kind of number must be the same. None: anything but None may come.
        names: what the arguments are called, for messages.
        allowed: qualified names in this package that the function may call, such as "TabularPolicy.forward".
    Raises:
        Wrong: it crashed, called this package's own function, changed its inputs, or returned another form.
    """
    given = _given(names, arguments)
    copies = [_copy(each) for each in arguments]
    result = _attempt(function, copies, allowed)
    if isinstance(result, NotImplementedError):
        raise Wrong("it is written", f"the function is still a stub ({result})")
    if isinstance(result, BaseException):
        raise Wrong("it runs", f"it raised {type(result).__name__}: {result}", given=given, got=result)
    changed = [i for i, (a, b) in enumerate(zip(arguments, copies, strict=True)) if not _same(a, b, exact=True)]
    if changed:
        name = names[changed[0]] if names else f"argument {changed[0] + 1}"
        why = f"{name} is changed in place (x += ..., x[...] = ..., x.sub_(...)): make a new tensor instead"
        raise Wrong(
            "it leaves its inputs as they were", why, given=given, got=f"{name} = {show(copies[changed[0]])} afterwards"
        )
    if like is not None and (form := _form(result, like)):
        raise Wrong(FORM, form, given=given, expected=like, got=result)
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
) -> None:
    """Passes where function and solution agree on every case, in value and in the gradient of the arguments `gradient`.

    Args:
        cases: (property, *arguments), from the smallest to the largest; the first that fails is reported.
        mistakes: (diagnosis, wrong function): the first that gives the student's results on every case names the cause.
    Raises:
        Wrong: whatever `call` raises, or a value or a gradient that differs.
    """
    cases = list(cases)
    first, theirs = None, []
    for property, *arguments in cases:
        right, problem = _outcome(solution, arguments, gradient), None
        try:
            value = call(function, *arguments, names=names, like=right[0], allowed=allowed)
        except Wrong as wrong:
            if wrong.property not in (FORM, "it runs"):
                raise
            problem, value = wrong, wrong.shown["got"]
        theirs.append((value, _gradient(function, arguments, gradient, allowed)))
        given = _given(names, arguments)
        if problem is None and not _same(value, right[0]):
            problem = Wrong(property, _guess(value, right[0]), given=given, expected=right[0], got=value)
        elif problem is None and not _same(theirs[-1][1], right[1]):
            problem = _wrong_gradient(property, theirs[-1][1], right[1], given, [names[i] for i in gradient])
        first = first or problem
    if first is None:
        return
    for diagnosis, mistake in mistakes:
        outcomes = (_outcome(mistake, arguments, gradient) for _, *arguments in cases)
        if all(_same(mine, wrong) for mine, wrong in zip(theirs, outcomes, strict=True)):
            raise Wrong(first.property, diagnosis, **first.shown)
    values = [each[0] for each in theirs]
    if len(cases) > 1 and all(
        isinstance(each, Tensor) and each.numel() and (each == values[0].flatten()[0]).all() for each in values
    ):
        raise Wrong("it depends on its inputs", "the result is one number, whatever comes in", **first.shown)
    raise first


def show(value: Any) -> str:
    """Short text for a message: small tensors as rounded lists, large ones by their shape and first numbers."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.numel() > 24:
            return f"a tensor of shape {tuple(value.shape)}, beginning {show(value.flatten()[:4])}"
        return show(value.tolist())
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ("[{}]" if isinstance(value, list) else "({})").format(", ".join(map(show, value)))
    return value if isinstance(value, str) else repr(value)[:200]


def _given(names: Sequence[str], arguments: Sequence) -> str:
    names = names or [f"argument {i + 1}" for i in range(len(arguments))]
    return ", ".join(f"{name} = {show(value)}" for name, value in zip(names, arguments, strict=True))


@contextmanager
def _watched(allowed: Sequence[str]) -> Iterator[list[str]]:
    """The names of this package's functions that run meanwhile, however they were imported or wrapped."""
    called: list[str] = []

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_PACKAGE) and code.co_filename != __file__:
            if code.co_qualname not in allowed:
                called.append(f"{frame.f_globals.get('__name__')}.{code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield called
    finally:
        sys.setprofile(before)


def _attempt(function: Callable, arguments: Sequence, allowed: Sequence[str] | None = None) -> Any:
    """The function's result, or the exception that it raised; with `allowed`, `Wrong` where it calls this package."""
    with _watched(allowed or ()) as called:
        try:
            result = function(*arguments)
        except (Exception, SystemExit) as error:
            result = error
    if called and allowed is not None:
        raise Wrong("it is your own work", f"the function calls {called[0]}, which is the answer: write it out yourself")
    return result


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _outcome(function: Callable, arguments: Sequence, gradient: Sequence[int]) -> tuple[Any, Any]:
    """(result, gradients): what two functions must share to be taken for the same."""
    value = _attempt(function, [_copy(each) for each in arguments])
    return value, _gradient(function, arguments, gradient)


def _gradient(function: Callable, arguments: Sequence, indices: Sequence[int], allowed: Sequence[str] | None = None) -> Any:
    """The gradient of a weighted sum of the result in each argument of `indices`; None: there is none; or an exception."""
    if not indices:
        return None
    inputs = [_copy(each).requires_grad_() if i in indices else _copy(each) for i, each in enumerate(arguments)]
    result, leaves = _attempt(function, inputs, allowed), [inputs[i] for i in indices]
    if not isinstance(result, Tensor) or not result.requires_grad:
        return result if isinstance(result, Exception) else None
    weights = torch.linspace(1, 2, result.numel(), dtype=result.dtype).view(result.shape)
    gradients = _attempt(lambda: torch.autograd.grad((result * weights).sum(), leaves, allow_unused=True), ())
    if isinstance(gradients, Exception):
        return gradients
    return tuple(torch.zeros_like(x) if each is None else each for x, each in zip(leaves, gradients, strict=True))


def _same(a: Any, b: Any, *, exact: bool = False) -> bool:
    """Equal in kind, shape and value; nan equals nan; two exceptions of one type are the same."""
    if type(a) is not type(b):
        number = isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool)
        return number and _same(torch.tensor(float(a)), torch.tensor(float(b)), exact=exact)
    if isinstance(a, Tensor):
        if a.shape != b.shape or (a.is_floating_point() != b.is_floating_point()):
            return False
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact or not a.is_floating_point() else {"rtol": RTOL, "atol": ATOL}
        return torch.allclose(a.detach().double(), b.detach().double(), equal_nan=True, **tolerance)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y, exact=exact) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return _same(torch.tensor(a), torch.tensor(b), exact=exact)
    return isinstance(a, Exception) or bool(a == b)


def _form(got: Any, right: Any) -> str:
    """What is wrong with the kind of the result; empty where it is as it should be."""
    if isinstance(right, Tensor):
        if type(got) is not Tensor:
            return f"expected a tensor of shape {tuple(right.shape)}, got {type(got).__name__}" + " (no return?)" * (
                got is None
            )
        if got.shape != right.shape:
            return f"expected shape {tuple(right.shape)}, got {tuple(got.shape)}"
        if got.is_floating_point() != right.is_floating_point() or (got.dtype == torch.bool) != (right.dtype == torch.bool):
            return f"expected {right.dtype}, got {got.dtype}"
    elif isinstance(right, tuple):
        if not isinstance(got, tuple | list) or len(got) != len(right):
            return f"expected {len(right)} results, got {show(got)}"
        return next((text for text in map(_form, got, right) if text), "")
    elif isinstance(right, float) and not isinstance(got, int | float):
        return f"expected a number, got {type(got).__name__}" + " (no return?)" * (got is None)
    return ""


def _guess(got: Any, right: Any) -> str:
    """A cause read from the numbers alone, for a mistake that nobody foresaw."""
    if not isinstance(got, Tensor) or not got.is_floating_point() or got.numel() == 0:
        return "none of the usual mistakes; work the given input by hand and compare each step"
    if not got.isfinite().all() and right.isfinite().all():
        return "nan or inf: an exp that overflows, a log of zero, or -inf * 0; stay in log space"
    if _same(-got, right):
        return "the sign is turned round"
    if _same(got.flip(-1), right):
        return "the order is turned round"
    ratio, shift = got / right, got - right
    if ratio.isfinite().all() and ratio.numel() > 1 and _same(ratio, ratio.flatten()[0].expand(ratio.shape)):
        return f"every value is {ratio.flatten()[0]:.4g} times what it should be"
    if shift.numel() > 1 and _same(shift, shift.flatten()[0].expand(shift.shape)):
        return f"every value is off by the same {shift.flatten()[0]:+.4g}"
    return "none of the usual mistakes; work the given input by hand and compare each step"


def _wrong_gradient(property: str, got: Any, right: Any, given: str, names: Sequence[str]) -> Wrong:
    """The values are right and the gradient is not."""
    if got is None:
        why = "no gradient flows back: a .item(), .tolist(), .detach(), .data or torch.tensor(...) cuts the graph"
        return Wrong("the gradient reaches the inputs", why, given=given)
    if isinstance(got, Exception):
        return Wrong("the gradient exists", f"backward raised {type(got).__name__}: {got}", given=given)
    i = next(i for i, (mine, true) in enumerate(zip(got, right, strict=True)) if not _same(mine, true))
    why = "the values are right but part of the graph is cut or bent (detach, where, clamp)"
    return Wrong(
        f"the gradient is right, too ({property})", why, given=given, expected=right[i], got=f"{show(got[i])} for {names[i]}"
    )
