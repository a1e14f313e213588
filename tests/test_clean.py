"""Running the kit leaves the clone as it was: what git keeps changes only where a maintainer asks for it."""

import csv
import shutil
import subprocess
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT

from pdpo import kept, runner
from pdpo.__main__ import main


def status() -> str:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository around this package")
    done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git status failed: {done.stderr.strip()}")
    return done.stdout


@pytest.mark.slow
def test_a_notebook_that_draws_leaves_git_status_as_it_was(output, tmp_path):
    before, files = status(), {path: path.stat().st_mtime_ns for path in (ROOT / "figures").rglob("*")}
    said = output("-m", "pdpo", "run", "--notebooks", "01", PDPO_RUNS_DIR=str(tmp_path / "runs"), PDPO_FIGURES_DIR=None)
    assert status() == before
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "figures").rglob("*")} == files  # nor the same again
    drawn = {path.name for path in (tmp_path / "runs" / "figures").rglob("01_*.png")}
    committed = {path.name for path in (ROOT / "figures").rglob("01_*.png")}
    assert drawn == committed and len(drawn) > 3
    assert all(name in said for name in drawn)


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A notebooks folder with one notebook, which says where its figures would go, and a place for what git would keep."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cell = nbformat.v4.new_code_cell("import os\nprint('figures:', os.environ['PDPO_FIGURES_DIR'])")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "00_draws.ipynb")
    monkeypatch.setattr(runner, "notebooks_dir", lambda: folder)
    monkeypatch.setattr(runner, "committed_figures_dir", lambda: tmp_path / "committed")
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("PDPO_FIGURES_DIR", "")  # restored at the end, whatever the runner sets
    return folder


def test_save_alone_writes_what_git_keeps_and_minutes_are_kept_only_of_a_run_from_nothing(notebooks, tmp_path):
    run, table = ["run", "--preset", "tiny", "--jobs", "1"], "tiny/minutes.csv"

    def said(folder):
        return nbformat.read(folder / "00_draws.ipynb", 4).cells[0]

    assert main(run) == 0
    assert said(notebooks).execution_count is None and said(tmp_path / "runs" / "notebooks").outputs[0].text == "figures: \n"
    first, last = csv.DictReader((tmp_path / "runs" / "figures" / table).open())
    assert (first["notebook"], last["notebook"]) == ("00_draws", "all")
    assert 0 < float(first["minutes"]) <= float(last["minutes"])
    (tmp_path / "runs" / "tiny" / "sft-seed0").mkdir(parents=True)
    assert main([*run, "--save"]) == 0
    assert said(notebooks).outputs[0].text == f"figures: {tmp_path / 'committed'}\n"
    assert not (tmp_path / "committed" / table).exists()  # a stage was kept


@pytest.mark.parametrize("asked, executed", [([], "00_draws 14_last"), (["--notebooks", "all"], "00_draws 10_more 14_last")])
def test_a_run_leaves_the_later_chapters_out_unless_they_are_asked_for(notebooks, tmp_path, monkeypatch, asked, executed):
    monkeypatch.setattr(runner, "NotebookClient", lambda *_, **__: SimpleNamespace(execute=lambda: None))  # no kernels
    for name in ("10_more", "14_last"):
        shutil.copy(notebooks / "00_draws.ipynb", notebooks / f"{name}.ipynb")
    assert main(["run", "--preset", "tiny", "--jobs", "2", *asked]) == 0
    assert sorted(path.stem for path in (tmp_path / "runs" / "notebooks").glob("*")) == executed.split()
    assert kept.kept_stages() == []  # what lies there are no stages
