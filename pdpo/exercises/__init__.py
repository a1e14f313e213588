"""Exercises: `check` a function that you wrote, ask for a `hint`, look at your `progress`. Offline; nothing is stored."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from pdpo.exercises.core import Task, Wrong, by_position

__all__ = ["check", "hint", "progress"]
_passed: set[str] = set()
_hints_shown: dict[str, int] = {}


@cache
def tasks() -> dict[str, Task]:
    """Every task by its name, in the order of the exercises."""
    modules = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    found = [task for module in modules for task in getattr(module, "TASKS", ())]
    return {task.name: task for task in sorted(found, key=lambda task: task.exercise)}


def check(task: str, function: Callable) -> None:
    """Tries your function on fixed and on freshly drawn inputs; one line where it is right.

    Args:
        task: its name, such as "dpo_loss".
        function: your own; `check` never passes one of this package's.
    Raises:
        AssertionError: the function is wrong; the message says which property fails, on which input, and the likely cause.
        ValueError: there is no such task, or what came is not a function.
    """
    found = _find("check", task)
    if not callable(function):
        raise ValueError(
            f"check: expected a function, got {type(function).__name__}. Pass its name without brackets: check({task!r}, {task})."
        )
    _passed.discard(task)
    try:
        found.check(by_position(function))
    except Wrong as wrong:
        raise AssertionError(f"{task} is not right yet\n{wrong}\n(stuck? hint({task!r}))") from None
    _passed.add(task)
    print(f"{task}: passed")


def hint(task: str) -> None:
    """Prints the task's next hint of three, from a nudge to almost the answer.

    Raises:
        ValueError: there is no such task.
    """
    hints = _find("hint", task).hints
    number = min(_hints_shown.get(task, 0), 2)
    _hints_shown[task] = number + 1
    print(f"{task}, hint {number + 1} of 3: {hints[number]}")


def progress() -> None:
    """Prints the tasks of each exercise that you have begun, with a cross at those passed since Python (the kernel) started."""
    exercises: dict[str, list[str]] = {}
    for task in tasks().values():
        exercises.setdefault(task.exercise, []).append(f"[{'x' if task.name in _passed else ' '}] {task.name}")
    begun = [f"{exercise}  " + "  ".join(names) for exercise, names in exercises.items() if "[x]" in "".join(names)]
    print("\n".join(begun) or f"no task passed yet; there are {len(tasks())} in {len(exercises)} exercises")


def _find(function: str, task: str) -> Task:
    if task not in tasks():
        close = difflib.get_close_matches(str(task), tasks(), n=1)
        raise ValueError(
            f"{function}: expected the name of a task, got {task!r}. "
            + (f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(tasks())}.")
        )
    return tasks()[task]
