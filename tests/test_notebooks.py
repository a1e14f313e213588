"""What every notebook must be besides correct, which nbval sees to: executed, clean, complete, and readable in its window."""

import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
NOTEBOOK_FILES = sorted(path for path in (ROOT / "notebooks").glob("**/*.ipynb") if "checkpoint" not in path.name)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *NOTEBOOK_FILES]
ANSWERS = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem, scope="module")
def notebook(request):
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose_of(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def links(path):
    """Files that the prose of a notebook or a page links to."""
    return [path.parent / link for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose_of(path))]


def test_stored_outputs_are_of_one_run_without_errors_and_hold_nobodys_folders(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not re.search(r"/home/|/root/|/Users/|/tmp/|/work/|C:\\\\", nbformat.writes(notebook))


def test_stored_outputs_hold_figures_where_a_reader_has_sliders_and_no_figure_is_compared(notebook):
    """A widget lives in a running kernel; stored, it is an empty box. `pdpo run --save` stores the figure."""
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert "application/vnd.jupyter.widget-view+json" not in kinds
        assert "image/png" in kinds or "\nslider(" not in cell.source
        assert "image/png" not in kinds or "nbval-ignore-output" in cell.metadata.get("tags", ())


def test_a_chapter_asks_first_folds_what_it_answers_and_ends_with_takeaways_and_exercises(notebook):
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for needed in ("question", "## Takeaways", "## Exercises"):
        assert needed in "\n".join(prose)
    for source in prose[1:]:  # the first cell only says how predictions are meant
        assert len(re.findall(r"\*Predict\b", source)) <= source.count("<details>"), source


@pytest.mark.parametrize("path", NOTEBOOK_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_cell_fits_a_window_and_what_is_for_the_tests_alone_is_a_tag(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        lines = cell.source.splitlines()
        assert len(lines) <= 32 and max(map(len, lines), default=0) <= 100, (
            cell.source
        )  # the width that the file browser leaves
        assert "NBVAL" not in cell.source


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(path):
    assert not [str(target) for target in links(path) if not target.exists()]


def test_each_exercise_is_the_turn_of_some_chapter():
    turns = [path for path in NOTEBOOKS if "**Your turn, with checks:**" in prose_of(path)]
    linked = {target.resolve() for path in turns for target in links(path) if target.parent.name == "exercises"}
    assert linked == set((ROOT / "notebooks" / "exercises").glob("ex_*.ipynb"))


def test_every_exercise_has_an_answer_under_the_chapters_own_title(notebook):
    title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", ANSWERS, re.MULTILINE | re.DOTALL)[1]
    exercises = next(cell.source for cell in notebook.cells if "## Exercises" in cell.source).split("## Exercises")[1]
    answered, asked = (re.findall(r"^(\d+)\. ", text, re.MULTILINE) for text in (section, exercises))
    assert answered == asked == [str(i + 1) for i in range(len(asked))]
    for code in re.findall(r"^ *```python\n(.*?)^ *```", section, re.MULTILINE | re.DOTALL):
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
