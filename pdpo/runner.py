"""Executing notebooks from the command line: a line for each cell, two notebooks at a time, a summary at the end."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from pdpo.device import device, end_children, num_cores
from pdpo.files import CHECKOUT, replacing, shown, write_csv
from pdpo.plots import committed_figures_dir, figures_dir
from pdpo.presets import Preset
from pdpo.stages import runs_dir


def notebooks_dir() -> Path:
    """notebooks/ of the checkout that this package runs from; ValueError where it is installed without one."""
    if not (folder := CHECKOUT / "notebooks").is_dir():
        raise ValueError(f"run: expected the notebooks in {folder}, got no such folder. Run this in a clone of the repository.")
    return folder


def run_notebooks(preset: Preset, numbers: list[str] | None = None, *, jobs: int | None = None, save: bool = False) -> bool:
    """Executes notebooks and prints a line as each cell starts and ends.

    Args: preset: passed to the notebooks as PDPO_PRESET.
          numbers: their numbers or first characters, such as ["06", "04b"]; ["all"]; None leaves out 10 to 13, on which no other builds.
          jobs: notebooks at a time; None is one for each core, two at most, and one on a GPU.
          save: True writes outputs into notebooks/ and figures into figures/; executed copies go to runs/ either way.
    Returns: Whether every cell of every notebook succeeded."""
    every = sorted(notebooks_dir().glob("[0-9][0-9]*_*.ipynb"))
    core = [path for path in every if not "10" <= path.name[:2] < "14"]
    chosen = core if not numbers else every if numbers == ["all"] else [_find(number, every) for number in numbers]
    jobs = jobs or (1 if device().type == "cuda" else min(num_cores(), 2))
    os.environ["PDPO_PRESET"] = preset.name  # the kernels inherit it
    os.environ["PDPO_STATIC"] = "1"  # nobody is there to move a slider; a figure is kept
    if save:
        os.environ["PDPO_FIGURES_DIR"] = os.environ.get("PDPO_FIGURES_DIR") or str(committed_figures_dir())
    from_nothing = chosen in (core, every) and not any((runs_dir() / preset.name).glob("*"))
    began = time.time()
    print(f"{len(chosen)} notebooks, {jobs} at a time; executed copies in {runs_dir() / 'notebooks'}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            results = list(pool.map(lambda path: _execute(path, save), reversed(chosen)))[::-1]  # the last ones take longest
        except BaseException:  # stopped: else the pool would wait for what its kernels are at
            pool.shutdown(wait=False, cancel_futures=True)
            end_children()
            raise
    print(f"\n{'notebook':34} minutes  result")
    for path, (minutes, error) in zip(chosen, results, strict=True):
        print(f"{path.stem:34} {minutes:7.1f}  {error or 'done'}")
    if from_nothing:  # else a notebook's minutes say what was kept, and not how long it takes
        taken = {path.stem: minutes for path, (minutes, _) in zip(chosen, results, strict=True)}
        taken["all"] = (time.time() - began) / 60
        rows = [{"notebook": name, "minutes": round(minutes, 2)} for name, minutes in taken.items()]
        write_csv(figures_dir() / preset.name / "minutes.csv", rows)
    figures = sorted(path for path in figures_dir().rglob("*.png") if path.stat().st_mtime >= began)
    print(f"{(time.time() - began) / 60:.1f} minutes in all. {len(figures)} figures in {shown(figures_dir())}:")
    for path in figures:
        print(f"  {path.relative_to(figures_dir())}")
    return not any(error for _, error in results)


def stray(text: str) -> str:
    """What of a cell's stderr is no progress line: the lines, drawn over one another or not, that no bar of tqdm is."""
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;]*\w", "", text))
    return "\n".join(line for line in lines if line.strip() and not re.search(r"(\d+%\||\d+it) ?.*\[.*\]\s*$", line))


def _find(number: str, every: list[Path]) -> Path:
    found = [path for path in every if path.name.split("_")[0] == number]  # "04" is 04_*, not 04b_*
    found = found or [path for path in every if path.name.startswith(number)]
    if len(found) != 1:
        names = ", ".join(path.stem for path in every)
        raise ValueError(f"run: expected --notebooks to name one notebook each, got {number!r} for {len(found)} of: {names}.")
    return found[0]


def _execute(path: Path, save: bool) -> tuple[float, str]:
    """Minutes taken, and "" or what went wrong."""
    notebook = nbformat.read(path, as_version=4)
    of_code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    began, started = time.monotonic(), {}

    def say(text: str) -> None:
        with _print_lock:
            print(f"[{path.stem.split('_')[0]}] {text}", flush=True)

    def on_start(cell, cell_index):
        if cell_index in of_code:
            started[cell_index] = time.monotonic()
            lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
            say(f"cell {of_code.index(cell_index) + 1}/{len(of_code)}: {lines[0][:70] if lines else ''}")

    def on_executed(cell, cell_index, execute_reply):
        if (seconds := time.monotonic() - started[cell_index]) > 5:
            say(f"cell {of_code.index(cell_index) + 1}/{len(of_code)} took {seconds:.0f} s")

    client = NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=on_start, on_cell_executed=on_executed, extra_arguments=["--log-level=ERROR"],
    )  # fmt: skip
    error = ""
    try:
        client.execute()
    except CellExecutionError as failure:
        error = f"failed: {failure.ename}: {failure.evalue.splitlines()[0] if failure.evalue else ''}"
        say(error)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which would change at each run
        if "outputs" in cell:
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr" or stray(each.text)]
            for each in cell.outputs:
                if each.get("name") == "stderr":
                    say(f"cell {cell.execution_count} wrote to stderr: {stray(each.text)[:200]}")
    notebook.metadata.language_info = {"name": "python"}
    for target in [runs_dir() / "notebooks" / path.name, *([path] if save and not error else [])]:
        with replacing(target) as temporary:
            nbformat.write(notebook, temporary)
    return (time.monotonic() - began) / 60, error


_print_lock = threading.Lock()
