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


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_claims_are_said_to_be_the_toys_and_none_is_printed_whose_data_is_missing(path, capsys):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert "What the text says of results it says of the toy (preset `tiny`)" in first.replace("\n", " ")
    sources = code_of(path)
    claims = [each for each in sources if "assert " in each and re.search(r"^ *print\(", each, re.MULTILINE)]
    claims = [each for each in claims if 'preset.data == "toy"' in each]
    assert claims
    for source in claims:
        with contextlib.suppress(Exception):  # whatever comes first: it is not there
            exec(source, after_a_failure(sources))
        assert not capsys.readouterr().out, source


def test_where_the_data_is_not_the_toy_the_first_output_says_what_the_prose_is_about(capsys, monkeypatch):
    monkeypatch.setattr(experiments.torch, "set_num_threads", lambda _: None)
    experiments.start(replace(get_preset("tiny"), name="other", data="imdb"))
    assert "the text tells of the toy" in capsys.readouterr().out
    experiments.start("tiny")
    assert "tells of" not in capsys.readouterr().out


def test_the_first_notebook_stays_on_the_toy_unless_told_otherwise(monkeypatch):
    """Also where there is a GPU, on which the others take the larger preset."""
    (source,) = [source for source in code_of(CHAPTERS[0]) if "experiments.start(" in source]
    chosen = []
    monkeypatch.setattr(experiments, "start", lambda preset=None: chosen.append(preset))
    monkeypatch.setenv("PDPO_PRESET", "small")
    exec(source, {"experiments": experiments, "os": os})
    monkeypatch.delenv("PDPO_PRESET")
    exec(source, {"experiments": experiments, "os": os})
    assert chosen == ["small", "tiny"]
