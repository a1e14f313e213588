"""README says what the files say: `make results` fills it, and these tests fail where that has not been run."""

import re
import runpy
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conftest import ROOT  # noqa: E402
from PIL import Image  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
results = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "dev" / "results.py")))


def test_readmes_numbers_are_those_of_the_files_whatever_stood_there_and_a_missing_block_is_named():
    assert results.filled(README) == README, "stale: run `make results`"
    stale = re.sub(r"gains \d\.\d", "gains 9.9", README)
    assert stale != README and results.filled(stale) == README
    with pytest.raises(ValueError, match="<!-- samples -->"):
        results.filled(README.replace("<!-- samples -->", ""))


def test_the_first_figures_claims_hold_in_the_table_it_is_drawn_from():
    rows = results.rows_of(results.TINY / "09_baselines.csv")
    assert {row["method"] for row in rows} == set(results.INK)  # nothing is left out
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
def test_the_first_figure_is_drawn_from_todays_table(name):
    with Image.open(ROOT / "figures" / f"signature_{name}.png") as image:
        assert image.text[results.DIGEST] == results.table_digest(), "stale: run `make results`"
        corner = np.array(image.convert("L"))[3, 3]
        assert image.width >= 2000 and (corner > 200) == (name == "light")


def test_readme_begins_with_what_a_reader_came_for():
    first = "\n".join(README.splitlines()[:24])
    for needed in ("colab-badge.svg", "git clone", "make run", "signature_light.png", "prefers-color-scheme: dark"):
        assert needed in first
    assert README.count("beta: KL strength; a larger beta keeps the policy closer to the reference.") == 1
