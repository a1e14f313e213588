"""README says what the files say: `make results` fills it, and these tests fail where that has not been run."""

import importlib.util
import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conftest import ROOT  # noqa: E402
from PIL import Image  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "tests" / "dev" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readmes_numbers_are_those_of_the_files(results):
    assert results.filled(README) == README, "stale: run `make results`"


def test_a_block_is_filled_whatever_stood_there_and_a_missing_one_is_named(results):
    stale = re.sub(r"gains \d\.\d", "gains 9.9", README)
    assert stale != README and results.filled(stale) == README
    with pytest.raises(ValueError, match="<!-- samples -->"):
        results.filled(README.replace("<!-- samples -->", ""))


def test_the_first_figures_claims_hold_in_the_table_it_is_drawn_from(results):
    rows = results.rows_of(results.TINY / "09_baselines.csv")
    of = {name: [row for row in rows if row["method"] == name] for name in results.INK}
    (start,), (alone,) = of["SFT"], of["SFT on the best"]
    for name in ("DPO", "ODPO"):
        best = max(of[name], key=lambda row: row["score"])
        assert start["score_high"] < best["score_low"] and best["beta"] == 0.3  # "below beta 0.3: further, not higher"
        beyond = [row for row in of[name] if row["beta"] < 0.3]
        assert beyond and all(row["kl"] > best["kl"] and row["score"] < best["score"] for row in beyond)
        assert alone["score"] > best["score"] and alone["kl"] > max(row["kl"] for row in of[name])
    ceiling = sorted((row["kl"], row["score"]) for row in of["ceiling"])
    for row in (*of["DPO"], *of["ODPO"], *of["best of N"]):
        if row["kl"] < ceiling[-1][0]:
            assert row["score"] < np.interp(row["kl"], *zip(*ceiling, strict=True)) + 0.3


@pytest.mark.parametrize("name", ["light", "dark"])
def test_the_first_figure_is_drawn_from_todays_table(results, name):
    with Image.open(ROOT / "figures" / f"signature_{name}.png") as image:
        assert image.text[results.DIGEST] == results.table_digest(), "stale: run `make results`"
        corner = np.array(image.convert("L"))[3, 3]
        assert image.width >= 2000 and (corner > 200) == (name == "light")
    assert f"figures/signature_{name}.png" in README


def test_the_first_figure_shows_every_row_once(results):
    rows = results.rows_of(results.TINY / "09_baselines.csv")
    figure = results.signature(rows)
    (axes,) = figure.axes
    drawn = {(round(x, 6), round(y, 6)) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
    plt.close(figure)
    assert {(round(row["kl"], 6), round(row["score"], 6)) for row in rows} <= drawn
    texts = " ".join(text.get_text() for text in axes.texts)
    assert "below beta 0.3" in texts and "N = 16" in texts and "95 % intervals" in texts


def test_readme_is_short_and_begins_with_what_a_reader_came_for():
    lines = README.splitlines()
    assert len(lines) < 120
    first = "\n".join(lines[:24])
    for needed in ("colab-badge.svg", "git clone", "make run", "<picture>", "prefers-color-scheme: dark"):
        assert needed in first
    assert README.count("beta: KL strength; a larger beta keeps the policy closer to the reference.") == 1
