"""Grading a folder of notebooks: each is executed in a process of its own, under limits, and its functions are checked from outside.

The checks run in the grader's process and reach a student's function through `Remote`. So nothing that a notebook prints,
patches or deletes can pass a check; what it can do beyond that, a container must prevent (docs/teaching.md).
"""

import json
import os
import random
import re
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pdpo.exercises import core, tasks
from pdpo.grading.remote import FORGED, Ended, Process, Remote
from pdpo.grading.report import Grade, write_pages, write_table

ATTEMPTS = 6  # processes for one notebook: each cell or function that ends one is left out of the next
LARGEST_NOTEBOOK = 50 * 2**20  # bytes


@dataclass(frozen=True)
class Limits:
    """For one cell, or one call of a function: seconds of processor time; megabytes of memory, and of anything it writes or prints."""

    seconds: int = 60
    megabytes: int = 2048
    output: int = 16
    user: int | None = None


def grade(
    folder: Path, out: Path, *, jobs: int | None = None, seed: int | None = None, limits: Limits | None = None
) -> list[Grade]:
    """Grades every notebook under a folder; writes a table, and a page for each student beside it.

    Args:
        folder: notebooks; those in a sub-folder belong to the student whom it names, others to the student whom their file names.
        out: a new CSV file; the pages go into a new folder of the same name without ".csv".
        jobs: notebooks at a time; None is one a core, two at most.
        seed: of the inputs that the checks draw; None draws one and prints it.
    Returns:
        A Grade for each notebook, in the order of their paths.
    Raises:
        ValueError: no such folder, no notebooks in it, or something that would be overwritten.
    """
    if os.name == "nt":
        raise ValueError("grade: expected Linux or macOS, got Windows, which lacks the limits. Grade in WSL or in a container.")
    if not folder.is_dir():
        raise ValueError(
            f"grade: expected a folder of notebooks, got {folder}. Pass the folder into which they were handed in."
        )
    paths = sorted(
        path for path in folder.rglob("*.ipynb") if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise ValueError(
            f"grade: expected .ipynb files in {folder} or below, got none. Pass the folder into which they were handed in."
        )
    pages = out.with_suffix("")
    for each in {out, pages}:
        if each.exists():
            raise ValueError(
                f"grade: expected a new name for the table, got {each}, which exists. Choose another, or delete it."
            )
    if out.suffix != ".csv":
        raise ValueError(
            f"grade: expected --out to end in .csv, got {out}. The pages go into a folder of that name without .csv."
        )
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    jobs = jobs or min(os.cpu_count() or 1, 2)
    submitted = [
        (*_names(path, folder), _read(path)) for path in paths
    ]  # all of them first: a notebook could delete the others
    print(f"{len(paths)} notebooks, {jobs} at a time; seed {seed} (the same seed, the same table)", flush=True)
    grades = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for each in pool.map(partial(_grade, seed=seed, limits=limits or Limits()), submitted):
            grades.append(each)
            remarks = "".join(f"; {remark}" for remark in each.remarks)
            name = f"{each.student}: {each.notebook}"
            print(f"[{len(grades)}/{len(paths)}] {name}: {each.num_passed} of {len(each.reasons)} tasks{remarks}", flush=True)
    pages.mkdir(parents=True)
    write_table(grades, out)
    links = write_pages(grades, pages)
    print(f"table: {out}; a page for each of {len(links)} students: {pages / 'index.html'}")
    return grades


def _names(path: Path, folder: Path) -> tuple[str, str]:
    """(student, notebook)."""
    student, *rest = path.relative_to(folder).parts
    return (student, "/".join(rest)) if rest else (path.stem, path.name)


def _read(path: Path) -> bytes | str:
    """The file, or why it cannot be graded."""
    if path.is_symlink() or not path.is_file():
        return "it is no file"
    if path.stat().st_size > LARGEST_NOTEBOOK:
        return f"it is larger than {LARGEST_NOTEBOOK // 2**20} MB: clear its outputs"
    return path.read_bytes()


def _grade(submitted: tuple[str, str, bytes | str], *, seed: int, limits: Limits) -> Grade:
    """One notebook; runs in a worker."""
    student, notebook, content = submitted
    torch.set_num_threads(1)
    row = Grade(student, notebook)
    if isinstance(content, str):
        row.remarks.append(content)
        return row
    try:
        cells = _code_cells(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        row.remarks.append("it is no notebook that can be read")
        return row
    wanted = _tasks_of(notebook, cells)
    if not wanted:
        row.remarks.append("no exercise is recognised: neither ex_NN in the file's name nor a check(...) in a cell")
        return row
    row.sources = {name: source for name, task in wanted.items() for source in cells.values() if _defines(task, source)}
    spoilt: dict[int, str] = {}
    for _ in range(ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix="pdpo-grade-"))
        (folder / Path(notebook).name).write_bytes(content)
        if limits.user is not None:
            for each in (folder, *folder.iterdir()):
                os.chown(each, limits.user, limits.user)
        try:
            with tempfile.TemporaryFile() as log:
                finished = _attempt(row, folder, log, cells, wanted, spoilt, seed, limits)
                log.seek(0)
                text = log.read(limits.output * 2**20).decode(errors="replace")
            if not (folder / Path(notebook).name).exists():
                spoilt.setdefault(0, "it deleted its own file")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if finished:
            break
    if -2 in spoilt:  # the fault is likely the installation's: show what it said
        row.remarks.append((text.strip().splitlines() or ["it printed nothing"])[-1][:300])
    row.output = text[:4000] + ("\n[...]" if len(text) > 4000 else "")
    row.remarks = [why if number < 1 else f"cell {number}: {why}" for number, why in sorted(spoilt.items())] + row.remarks
    for name in wanted:
        if row.reasons.setdefault(name, "not graded: " + "; ".join(row.remarks)) and f"{name}: passed" in text:
            row.remarks.append(f'it printed "{name}: passed", and the grader\'s check says otherwise')
    row.reasons = {name: row.reasons[name] for name in wanted}
    return row


def _attempt(row: Grade, folder: Path, log: Any, cells: dict, wanted: dict, spoilt: dict, seed: int, limits: Limits) -> bool:
    """Executes the cells that are not yet spoilt and checks the tasks that have no verdict; whether it came to the end."""
    at: Any = None
    process = None
    try:
        process = Process(folder, log, **vars(limits))
        row.errors = []
        for at, source in cells.items():
            if at not in spoilt:
                kind, why = _cell_answer(process.ask("cell", at, source))
                if kind in ("memory", "output"):
                    raise Ended(
                        kind,
                        f"it ran out of memory ({why})" if kind == "memory" else f"it printed or wrote without end ({why})",
                    )
                if kind:
                    row.errors.append(f"cell {at}: {why}")
                if kind == "exit":
                    row.remarks.append(f"cell {at}: it asked Python to exit")
        at = None
        names = {name: _function_name(task) for name, task in wanted.items()}
        defined, replaced = _functions_answer(process.ask("functions", sorted(names.values())))
        for name, task in wanted.items():
            if name not in row.reasons:
                at = name
                if names[name] in defined:
                    row.reasons[name], row.messages[name] = _check(
                        task, Remote(process, names[name]), f"{seed}/{row.student}/{name}"
                    )
                else:
                    row.reasons[name] = row.messages[name] = _missing(row, task, cells, spoilt)
        if replaced:
            row.remarks.append(f"it replaced {', '.join(replaced[:5])}")
        return True
    except Ended as ended:
        if isinstance(at, int):
            spoilt[at] = str(ended)
        elif isinstance(at, str):
            row.reasons[at] = row.messages[at] = f"when called, {ended}"
        else:
            spoilt[-1 if process else -2] = str(ended) if process else f"the grader could not start a process: {ended}"
            return True
        return False
    finally:
        if process:
            process.close()


def _check(task: core.Task, function: Remote, seed: str) -> tuple[str, str]:
    """(reason, message), both empty where the function is right."""
    core.SEEDS = random.Random(seed)
    torch.manual_seed(random.Random(seed).getrandbits(32))
    try:
        task.check(function)
    except core.Wrong as wrong:
        return " ".join(f"{wrong.property}: {wrong.why}".split()), str(wrong)
    except Exception as error:  # a check that itself fails has passed nobody
        return "the check could not deal with what came", f"{type(error).__name__}: {error}"
    return "", "passed"


def _missing(row: Grade, task: core.Task, cells: dict[int, str], spoilt: dict[int, str]) -> str:
    number = next((number for number, source in reversed(cells.items()) if _defines(task, source)), None)
    if number is None:
        return f"no cell defines {_function_name(task)}"
    problem = spoilt.get(number) or next(
        (error for error in row.errors if error.startswith(f"cell {number}:")), "it was not defined"
    )
    return f"cell {number} defines {_function_name(task)}, but: {problem}"


def _function_name(task: core.Task) -> str:
    found = re.match(r"def (\w+)", task.signature)
    return found[1] if found else task.name


def _defines(task: core.Task, source: str) -> bool:
    return bool(re.search(rf"(?m)^\s*(def {_function_name(task)}\b|{_function_name(task)}\s*=)", source))


def _code_cells(content: bytes) -> dict[int, str]:
    """Source by number, counted from 1 over code cells as Jupyter does."""
    sources = [cell["source"] for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
    return {number: "".join(source) for number, source in enumerate(sources, 1)}


def _tasks_of(notebook: str, cells: dict[int, str]) -> dict[str, core.Task]:
    """The tasks of the exercise that the file's name names, or else of those that its cells check."""
    named = re.search(r"ex_\d\d", Path(notebook).name)
    exercises = {named[0]} if named else set()
    if not any(task.exercise in exercises for task in tasks().values()):
        called = re.findall(r"""check\(\s*["'](\w+)["']""", "\n".join(cells.values()))
        exercises = {tasks()[name].exercise for name in called if name in tasks()}
    return {name: task for name, task in tasks().items() if task.exercise in exercises}


def _cell_answer(answer: Any) -> tuple[str, str]:
    if answer is None:
        return "", ""
    if not isinstance(answer, list) or len(answer) != 2 or not all(isinstance(each, str) for each in answer):
        raise Ended("forged", FORGED)
    return answer[0], " ".join(answer[1].split())[:300]


def _functions_answer(answer: Any) -> tuple[list[str], list[str]]:
    try:
        return [str(each) for each in answer["defined"]], [str(each)[:80] for each in answer["replaced"]]
    except (TypeError, KeyError):
        raise Ended("forged", FORGED) from None
