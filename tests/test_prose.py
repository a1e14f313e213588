"""What notebooks say of results: claims beside their data, and of the toy where it is the toy's."""

import ast
import contextlib
import os
import re
from dataclasses import replace

import nbformat
import pytest
from conftest import ROOT

from pdpo import experiments
from pdpo.presets import get_preset

CHAPTERS = [path for number in ("00", "06", "07", "08", "09") for path in (ROOT / "notebooks").glob(f"{number}_*.ipynb")]


def code_of(path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code" and "google.colab" not in cell.source]


def after_a_failure(sources: list[str]) -> dict:
    """The names of a notebook whose cells that compute have all failed: its imports, and what it begins empty."""
    space = {"preset": get_preset("tiny")}
    for node in ast.parse("\n".join(sources)).body:
        empty = isinstance(node, ast.Assign) and ast.unparse(node.value) in ("{}", "[]", "None")
        if isinstance(node, ast.Import | ast.ImportFrom) or empty:
            exec(ast.unparse(node), space)
    return space


def claims(path) -> list[str]:
    """The cells that check something and then say it in words."""
    checked = [source for source in code_of(path) if "assert " in source and re.search(r"^ *print\(", source, re.MULTILINE)]
    return [source for source in checked if 'preset.data == "toy"' in source]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_claim_is_printed_whose_data_is_missing(path, capsys):
    found = claims(path)
    assert found
    for source in found:
        with contextlib.suppress(Exception):  # whatever comes first: it is not there
            exec(source, after_a_failure(code_of(path)))
        assert not capsys.readouterr().out, source


def test_where_the_data_is_not_the_toy_the_first_output_says_what_the_prose_is_about(capsys, monkeypatch):
    monkeypatch.setattr(experiments.torch, "set_num_threads", lambda _: None)
    experiments.start(replace(get_preset("tiny"), name="other", data="imdb"))
    assert "the text tells of the toy" in capsys.readouterr().out
    experiments.start("tiny")
    assert "tells of" not in capsys.readouterr().out


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_says_that_its_results_are_the_toys(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert "What the text says of results it says of the toy (preset `tiny`)" in first.replace("\n", " ")


def test_the_first_notebook_stays_on_the_toy_unless_told_otherwise(monkeypatch, capsys):
    """Also where there is a GPU, on which the others take the larger preset."""
    (source,) = [source for source in code_of(CHAPTERS[0]) if "experiments.start(" in source]
    chosen = []
    monkeypatch.setattr(experiments, "start", lambda preset=None: chosen.append(preset))
    for given in (None, "small"):
        monkeypatch.delenv("PDPO_PRESET", raising=False)
        if given:
            monkeypatch.setenv("PDPO_PRESET", given)
        exec(source, {"experiments": experiments, "os": os})
    assert chosen == ["tiny", "small"]
