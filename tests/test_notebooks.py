"""What every notebook must be besides correct, which nbval sees to: openable in Colab, executed, clean, complete."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
NOTEBOOK_FILES = sorted(path for path in (ROOT / "notebooks").glob("**/*.ipynb") if "checkpoint" not in path.name)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem, scope="module")
def notebook(request):
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    notebook.metadata["stem"] = request.param.stem
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebooks_are_executed_in_order_without_errors(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "progress bars in the stored outputs"


def test_stored_outputs_hold_nobodys_folders(notebook):
    text = nbformat.writes(notebook)
    assert not re.search(r"/home/|/root/|/Users/|/tmp/|/work/|C:\\\\", text)


def test_stored_outputs_hold_figures_where_a_reader_has_sliders(notebook):
    """A widget lives in a running kernel; stored, it is an empty box. `pdpo run --save` stores the figure."""
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        assert not any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in cell.outputs)
        if "\nslider(" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs)


def test_notebooks_ask_first_and_end_with_takeaways_and_exercises(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for needed in ("question", "## Takeaways", "## Exercises"):
        assert needed in prose


def test_cells_are_short(notebook):
    long = [cell.source.splitlines()[0] for cell in code_cells(notebook) if len(cell.source.splitlines()) > 32]
    assert not long


@pytest.mark.parametrize("path", NOTEBOOK_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_fits_a_window_and_what_is_for_the_tests_alone_is_a_tag(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        wide = [line for line in cell.source.splitlines() if len(line) > 100]
        assert not wide, "JupyterLab's cell is about 100 columns wide beside the file browser"
        assert "NBVAL" not in cell.source


def test_cells_whose_output_depends_on_training_are_not_compared(notebook):
    """A cell that draws is never compared; a compared cell prints something or asserts silently."""
    for cell in code_cells(notebook):
        has_image = any("image/png" in output.get("data", {}) for output in cell.outputs)
        assert not has_image or "nbval-ignore-output" in cell.metadata.get("tags", ())


def test_a_prediction_folds_its_answer(notebook):
    """Asked in one cell, with an answer that has to be opened; the first cell only says how that is meant."""
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown":
            assert len(re.findall(r"\*Predict\b", cell.source)) <= cell.source.count("<details>"), cell.source


def prose_of(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def links(path):
    """Files that the prose of a notebook or a page links to."""
    return [path.parent / link for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose_of(path))]


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *NOTEBOOK_FILES]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(path):
    assert not [str(target) for target in links(path) if not target.exists()]


def test_each_exercise_is_the_turn_of_some_chapter():
    exercises = set((ROOT / "notebooks" / "exercises").glob("ex_*.ipynb"))
    linked = {
        target.resolve()
        for path in NOTEBOOKS
        if "**Your turn, with checks:**" in prose_of(path)
        for target in links(path)
        if target.parent.name == "exercises"
    }
    assert exercises and linked == exercises


def numbers(text):
    return re.findall(r"^(\d+)\. ", text, re.MULTILINE)


def test_every_exercise_has_an_answer_under_the_chapters_own_title(notebook):
    answers = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", answers, re.MULTILINE | re.DOTALL)
    exercises = next(cell.source for cell in notebook.cells if "## Exercises" in cell.source).split("## Exercises")[1]
    assert section and numbers(section[1]) == numbers(exercises) == [str(i + 1) for i in range(len(numbers(exercises)))]
    for code in re.findall(r"^ *```python\n(.*?)^ *```", section[1], re.MULTILINE | re.DOTALL):
        compile(re.sub("^   ", "", code, flags=re.MULTILINE), title, "exec")


def test_make_test_fails_on_a_cell_that_writes_anything_but_progress_to_stderr(tmp_path):
    """Also where its output is not compared, as in all cells that train."""
    says = "50%|#####     | 1/2 [00:01<00:01]", "TqdmWarning: IProgress"
    cells = [nbformat.v4.new_code_cell(f"import sys\nprint({each!r}, file=sys.stderr)") for each in says]
    for cell in cells:
        cell.metadata["tags"] = ["nbval-ignore-output"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_red.ipynb")
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout and "writes to stderr:\n  TqdmWarning" in done.stdout, done.stdout
