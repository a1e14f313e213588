"""Figures: saved whole, beside the rows they were drawn from and the record of what they were made with."""

import csv
import json
import sys
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402

from pdpo import plots  # noqa: E402
from pdpo.presets import get_preset  # noqa: E402


@pytest.fixture
def figure():
    figure, axes = plt.subplots()
    axes.plot([0, 1], [1, 2])
    yield figure
    plt.close("all")


def test_a_figure_is_saved_beside_its_rows_and_its_record(figure, tmp_path):
    rows = [{"x": 0, "y": 1 / 3}, {"x": 1, "y": 2.0}]
    path = plots.save_figure(figure, tmp_path / "deep" / "name", rows, info={"seed": 1})
    assert path.read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "deep" / "name.csv", newline="", encoding="utf-8") as file:
        assert [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)] == rows
    assert json.loads((tmp_path / "deep" / "name.run_info.json").read_text()) == {"seed": 1}
    assert sorted(each.name for each in path.parent.iterdir()) == ["name.csv", "name.png", "name.run_info.json"]


@pytest.mark.parametrize("rows", [[], [{"x": 1}, {"y": 2}]])
def test_rows_that_were_not_drawn_are_refused_and_nothing_is_written(figure, tmp_path, rows):
    with pytest.raises(ValueError, match="all with the same keys"):
        plots.save_figure(figure, tmp_path / "name", rows)
    assert not list(tmp_path.iterdir())


def test_a_band_is_the_mean_and_the_range_over_seeds(figure):
    axes = figure.axes[0]
    plots.band(axes, [0, 1], [[1.0, 2.0], [3.0, 6.0]], style=0, label="line")
    assert axes.lines[-1].get_ydata().tolist() == [2.0, 4.0]
    corners = axes.collections[-1].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1.0, 6.0)


def test_a_method_without_a_beta_is_drawn_as_a_level_with_its_interval():
    rows = [{"method": "SFT", "beta": None, "win": 0.5, "win_low": 0.4, "win_high": 0.6}]
    rows += [{"method": "DPO", "beta": beta, "win": 0.7, "win_low": 0.6, "win_high": 0.8} for beta in (0.1, 1.0)]
    figure, drawn = plots.lines_with_intervals([("win", "win rate")], rows, x="beta", xlabel="beta", title="claim", log_x=True)
    axes = figure.axes[0]
    assert drawn == rows
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["SFT", "DPO"]
    assert axes.get_xscale() == "log" and "95 % intervals" in figure.get_suptitle()
    plt.close(figure)


def test_claims_are_made_for_the_toy_alone_on_which_they_are_checked():
    tiny, other = get_preset("tiny"), replace(get_preset("tiny"), data="imdb")
    assert tiny.claim("it rises", "score") == "it rises" and other.claim("it rises", "score") == "score"
    assert other.claim("it rises").startswith("no claim")


def test_a_slider_is_a_figure_where_ipywidgets_is_missing(monkeypatch):
    monkeypatch.delenv("PDPO_STATIC", raising=False)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # importing it would fail
    drawn = []
    plots.slider(drawn.append, values=[1, 2, 3], start=2, label="x")
    assert drawn == [2]


def test_a_slider_that_is_moved_redraws_at_its_new_position(monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    monkeypatch.delenv("PDPO_STATIC", raising=False)
    made, real = [], ipywidgets.SelectionSlider
    monkeypatch.setattr(ipywidgets, "SelectionSlider", lambda **options: made.append(real(**options)) or made[-1])
    drawn = []
    plots.slider(drawn.append, values=[0.1, 0.5, 2.0], start=0.5, label="beta")
    assert drawn == [0.5] and made[0].options == (0.1, 0.5, 2.0) and made[0].description == "beta"
    made[0].value = 2.0
    assert drawn == [0.5, 2.0]
    monkeypatch.setenv("PDPO_STATIC", "1")
    plots.slider(drawn.append, values=[0.1, 0.5, 2.0], start=0.1, label="beta")
    assert drawn == [0.5, 2.0, 0.1] and len(made) == 1


def test_a_slider_refuses_a_start_that_is_no_position():
    with pytest.raises(ValueError, match="start to be one of the values"):
        plots.slider(print, values=[1, 2], start=3, label="x")


def test_a_points_label_stands_beside_it_in_the_place_of_beta():
    point = {"kl": 1.0, "kl_low": 0.5, "kl_high": 1.5, "score": 5.0, "score_low": 4.0, "score_high": 6.0}
    rows = [
        point | {"method": "DPO", "beta": 0.3},
        point | {"method": "best of N", "beta": 4, "label": "N = 4"},
        point | {"method": "SFT", "beta": None},
    ]
    figure, _ = plots.frontier_curves(rows, ylabel="score", title="a claim")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.3", "N = 4", ""]


def test_committed_rows_are_numbers_where_they_read_as_such_and_their_command_where_there_are_none(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(plots, "committed_figures_dir", lambda: tmp_path)
    assert plots.committed_rows("tiny/study", command="make it") == []
    assert capsys.readouterr().out == "tiny/study.csv has not been made: make it\n"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "study.csv").write_text("method,beta,score\nSFT,,-1e-3\nDPO,0.3,5\n")
    rows = plots.committed_rows("tiny/study", command="make it")
    assert rows == [{"method": "SFT", "beta": "", "score": -0.001}, {"method": "DPO", "beta": 0.3, "score": 5.0}]
    assert capsys.readouterr().out == ""
