"""Thirty notebooks such as a class hands in, made from the solutions by breaking them; which of their tasks are right is known."""

import re
import shutil
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import nbformat

from pdpo.exercises import tasks

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"

SPOILT = """
import torch as _torch
_right = {name}
def {name}(*arguments):
    def spoil(value):
        if isinstance(value, _torch.Tensor):
            return ~value if value.dtype == _torch.bool else value + 1
        if isinstance(value, list | tuple):
            return tuple(map(spoil, value))
        return value + ("x" if isinstance(value, str) else 1)
    return spoil(_right(*arguments))
"""
# a cell that goes in after the last task's, the words that tell the notebook apart, and whether the last task is still right
CELLS = {
    "loops": ("while True:\n    pass", "computed for more than", True),
    "sleeps": ("import time\ntime.sleep(10**6)", "waited for more than", True),
    "asks_python_to_exit": ("exit()", "asked Python to exit", True),
    "ends_the_process": ("import os\nos._exit(0)", "ended the process (exit status 0)", True),
    "eats_memory": ("hoard = []\nwhile True:\n    hoard.append(b'1' * 2**24)", "ran out of memory", True),
    "floods": ("while True:\n    print('again and again' * 1000)", "printed or wrote without end", True),
    "deletes_its_files": ("import shutil\nshutil.rmtree('.', ignore_errors=True)", "deleted its own file", True),
    "forges": (SPOILT + "print('{name}: passed')", 'it printed "{name}: passed"', False),
    "patches_check": (
        SPOILT + "from pdpo.exercises import core\ncore._same = lambda *a, **k: True\n"
        "core.compare = core.call = lambda *a, **k: None\nfrom pdpo.exercises import check\ncheck('{name}', {name})",
        "it replaced", False,
    ),
    "patches_torch": (
        SPOILT + "_torch.allclose = _torch.equal = lambda *a, **k: True", "it replaced torch.allclose, torch.equal", False,
    ),
    "loops_when_called": ("def {name}(*arguments):\n    while True:\n        pass", "it computed for more than", False),
    "exits_when_called": ("import os\ndef {name}(*arguments):\n    os._exit(0)", "it ended the process", False),
    "speaks_out_of_turn": (
        "import os, stat\nfor number in range(3, 64):\n    try:\n        if stat.S_ISSOCK(os.fstat(number).st_mode):\n"
        "            os.write(number, b'\\0' * 7 + b'\\x09[[],null]')\n    except OSError:\n        pass",
        "wrote to the grader's connection", None,  # whom this notebook would fool is itself: none of its tasks counts
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Handed:
    """A notebook's file name, the tasks that are right in it, all that it has, and words that its remarks must hold."""

    name: str
    right: frozenset[str]
    tasks: frozenset[str]
    remark: str = ""


def hand_in(folder: Path, num: int = 30, *, exercises: tuple[str, ...] = (), hostile=tuple(CELLS)) -> list[Handed]:
    """Writes `num` notebooks: the hostile ones, one that is no notebook and one untouched stub, then solved and spoilt ones in turn."""
    paths = {path.stem[:5]: path for path in sorted((NOTEBOOKS / "solutions").glob("ex_*.ipynb"))}
    names: dict[str, list[str]] = {}
    for name, task in tasks().items():
        names.setdefault(task.exercise, []).append(name)
    exercises = exercises or tuple(paths)
    turn, handed = cycle(exercises), [Handed("no_notebook", frozenset(), frozenset(), "no notebook that can be read")]
    folder.mkdir(parents=True)
    (folder / "no_notebook.ipynb").write_text("{", encoding="utf-8")

    def write(exercise: str, kind: str, source: str = "", remark: str = "", last_is_right: bool | None = True) -> None:
        notebook, last = nbformat.read(paths[exercise], as_version=4), names[exercise][-1]
        number = next(i for i, cell in enumerate(notebook.cells) if re.search(rf"(?m)^def {last}\(", cell.source))
        notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(source.replace("{name}", last)))
        nbformat.write(notebook, folder / f"{exercise}_{kind}.ipynb")
        right = {True: names[exercise], False: names[exercise][:-1], None: []}[last_is_right]
        remark = remark.replace("{name}", last)
        handed.append(Handed(f"{exercise}_{kind}", frozenset(right), frozenset(names[exercise]), remark))

    for kind in hostile:
        write(next(turn), kind, *CELLS[kind])
    exercise = next(turn)
    shutil.copy(NOTEBOOKS / "exercises" / paths[exercise].name, folder / f"{exercise}_untouched.ipynb")
    handed.append(Handed(f"{exercise}_untouched", frozenset(), frozenset(names[exercise])))
    for number in range(num - len(handed)):
        spoilt = number % 2 == 1
        exercise = exercises[number // 2 % len(exercises)]
        write(exercise, f"student_{number}", SPOILT if spoilt else "", last_is_right=not spoilt)
    return handed
