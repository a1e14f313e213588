"""Figures: saved whole, beside the rows they were drawn from and the record of what they were made with."""

import csv
import json
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402

from pdpo import plots  # noqa: E402


def test_a_figure_is_saved_beside_its_rows_and_its_record_and_rows_that_were_not_drawn_are_refused(tmp_path):
    figure, axes = plt.subplots()
    plots.band(axes, [0, 1], [[1.0, 2.0], [3.0, 6.0]], style=0, label="line")
    assert axes.lines[-1].get_ydata().tolist() == [2.0, 4.0]  # the mean over seeds, and their range
    corners = axes.collections[-1].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1.0, 6.0)
    for wrong in ([], [{"x": 1}, {"y": 2}]):
        with pytest.raises(ValueError, match="all with the same keys"):
            plots.save_figure(figure, tmp_path / "name", wrong)
    assert not list(tmp_path.iterdir())
    rows = [{"x": 0, "y": 1 / 3}, {"x": 1, "y": 2.0}]
    path = plots.save_figure(figure, tmp_path / "deep" / "name", rows, info={"seed": 1})
    assert path.read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "deep" / "name.csv", newline="", encoding="utf-8") as file:
        assert [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)] == rows
    assert json.loads((tmp_path / "deep" / "name.run_info.json").read_text()) == {"seed": 1}
    assert sorted(each.name for each in path.parent.iterdir()) == ["name.csv", "name.png", "name.run_info.json"]
    plt.close(figure)


def test_a_slider_is_a_figure_where_ipywidgets_is_missing_or_nobody_looks(monkeypatch):
    drawn, values = [], [0.1, 0.5, 2.0]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # importing it would fail
    monkeypatch.setenv("PDPO_STATIC", "1")
    plots.slider(drawn.append, values=values, start=0.5, label="beta")
    monkeypatch.delenv("PDPO_STATIC")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    plots.slider(drawn.append, values=values, start=2.0, label="beta")
    assert drawn == [0.5, 2.0]
    with pytest.raises(ValueError, match="start to be one of the values"):
        plots.slider(print, values=values, start=3, label="x")


def test_committed_rows_are_numbers_where_they_read_as_such_and_their_command_where_there_are_none(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(plots, "committed_figures_dir", lambda: tmp_path)
    assert plots.committed_rows("study", command="make it") == []
    assert capsys.readouterr().out == "study.csv has not been made: make it\n"
    (tmp_path / "study.csv").write_text("method,beta,score\nSFT,,-1e-3\nDPO,0.3,5\n")
    rows = plots.committed_rows("study", command="make it")
    assert rows == [{"method": "SFT", "beta": "", "score": -0.001}, {"method": "DPO", "beta": 0.3, "score": 5.0}]
    assert capsys.readouterr().out == ""
