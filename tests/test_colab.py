"""Colab: the address that it installs from stands in pyproject.toml; the cell says what to do where it does not answer."""

import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
ADDRESS = re.search(r'Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
CELL = """# Colab only: install pdpo. Anywhere else this cell does nothing.
import sys
from importlib.util import find_spec

if "google.colab" in sys.modules:
    %pip install -q git+{address}
    kept = "Results go to runs/, lost on disconnect. To keep them: mount Drive, set PDPO_RUNS_DIR."
    stuck = "Not installed. Upload the repository's zip, or clone it on Drive: %pip install PATH"
    print(kept if find_spec("pdpo") else stuck)"""
SHELL = """
import sys, types
from pathlib import Path

sys.meta_path = [each for each in sys.meta_path if "editable" not in repr(each)]  # forget the pdpo of this checkout
sys.path = [each for each in sys.path if each and not (Path(each) / "pdpo").is_dir()]
sys.path.append(sys.argv[1])
if sys.argv[2] == "colab":
    sys.modules["google.colab"] = types.ModuleType("google.colab")

from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.run_cell(sys.stdin.read()).raise_error()
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_notebook_begins_with_the_same_badge_and_the_same_cell(path):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source == CELL.format(address=ADDRESS)
    place = f"{ADDRESS.removeprefix('https://github.com/')}/blob/main/{path.relative_to(ROOT).as_posix()}"
    assert f"https://colab.research.google.com/github/{place}" in notebook.cells[0].source


@pytest.mark.parametrize("path", ["README.md", "CITATION.cff"])
def test_no_other_address_is_named(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    named = re.findall(r"github(?:\.com)?/([\w.-]+/pdpo)\b", text)
    assert named and {f"https://github.com/{each}" for each in named} == {ADDRESS}


def run_cell(address: str, tmp_path, where: str, monkeypatch) -> tuple[str, bool]:
    """What the cell prints, and whether pdpo is there then; pip installs without dependencies into a folder that is on the path."""
    target = tmp_path / "installed"
    target.mkdir()
    for name, value in {"TARGET": str(target), "NO_DEPS": "1", "NO_BUILD_ISOLATION": "0", "NO_INDEX": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)  # that last 0 means that there is none
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", SHELL, str(target), where],
        input=CELL.format(address=address), capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, (target / "pdpo" / "__init__.py").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_cell_installs_in_colab_and_says_where_results_go(tmp_path, monkeypatch):
    folder = tmp_path / "repository"  # a git repository of this package, as the address would be one
    shutil.copytree(ROOT / "pdpo", folder / "pdpo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, folder)
    identity = ["-c", "user.name=a test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    said, installed = run_cell(f"file://{folder}", tmp_path, "colab", monkeypatch)
    assert installed and "Results go to runs/, lost on disconnect" in said and "Not installed" not in said


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_where_the_address_does_not_answer_the_cell_says_in_one_line_what_to_do(tmp_path, monkeypatch):
    said, installed = run_cell("file:///nowhere", tmp_path, "colab", monkeypatch)
    (line,) = [line for line in said.splitlines() if "Not installed" in line]
    assert not installed and "zip" in line and "clone" in line and "Results go to" not in said


def test_anywhere_else_the_cell_does_nothing(tmp_path, monkeypatch):
    assert run_cell("file:///nowhere", tmp_path, "elsewhere", monkeypatch) == ("", False)
