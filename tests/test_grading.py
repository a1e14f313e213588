"""Grading: each notebook costs its own row only, every right task is credited and no wrong one; bad input is refused by name."""

import csv
import json

import pytest
from broken_notebooks import Handed, hand_in

from pdpo.__main__ import main
from pdpo.grading import Limits, grade
from pdpo.grading.report import Grade


def check(handed: list[Handed], grades: list[Grade]) -> None:
    """Each notebook has its row, with the verdicts that are known."""
    by_name = {each.student: each for each in grades}
    assert len(grades) == len(handed) and set(by_name) == {each.name for each in handed}
    for each in handed:
        row = by_name[each.name]
        assert set(row.reasons) == each.tasks
        assert {name for name, reason in row.reasons.items() if not reason} == each.right, (each.name, row.reasons, row.remarks)
        assert each.remark in "; ".join(row.remarks) and bool(each.remark) == bool(row.remarks), (each.name, row.remarks)


def test_every_right_task_is_credited_and_no_wrong_one(tmp_path):
    hostile = ("loops", "eats_memory", "floods", "deletes_its_files", "forges", "patches_check")
    handed = hand_in(tmp_path / "in", 10, exercises=("ex_04",), hostile=hostile)
    limits = Limits(seconds=5, megabytes=1024, output=1)
    grades = grade(tmp_path / "in", tmp_path / "grades.csv", seed=1, limits=limits)
    check(handed, grades)
    rows = list(csv.DictReader(open(tmp_path / "grades.csv", encoding="utf-8")))
    assert [row["student"] for row in rows] == sorted(each.name for each in handed)
    for row, graded in zip(rows, grades, strict=True):
        assert int(row["passed"]) == graded.num_passed and int(row["tasks"]) == len(graded.reasons)
        assert all(row[name] == (reason or "passed") for name, reason in graded.reasons.items())
    pages = {path.name for path in (tmp_path / "grades").iterdir()} - {"index.html"}
    index = (tmp_path / "grades" / "index.html").read_text(encoding="utf-8")
    assert len(pages) == 10 and all(f'href="{page}"' in index for page in pages)


def notebook(*sources: str) -> str:
    cells = [
        {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None} for source in sources
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_folders_are_students_and_reasons_name_what_is_missing(tmp_path, capsys):
    right = "def gumbel_noise(uniform):\n    return -(-uniform.log()).log()"
    wrong = "def gumbel_noise(uniform):\n    return -uniform.log()"
    for path, sources in {
        "=Ada <b>/mine.ipynb": ("%matplotlib inline\n!true", right, "check('gumbel_noise', 1)"),
        ".ipynb_checkpoints/ex_01.ipynb": (right,),
        "ex_01_bob.ipynb": (wrong, "def gumbel_ranking(scores, noise):\n    return ]"),
        "poem.ipynb": ("print('roses')",),
    }.items():
        (target := tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        target.write_text(notebook(*sources))
    assert main(["grade", str(tmp_path / "in"), "--out", str(tmp_path / "out.csv"), "--seed", "3"]) == 0
    rows = {row["notebook"]: row for row in csv.DictReader(open(tmp_path / "out.csv", encoding="utf-8"))}
    assert set(rows) == {"mine.ipynb", "ex_01_bob.ipynb", "poem.ipynb"} and "seed 3" in capsys.readouterr().out
    ada, bob, poem = rows["mine.ipynb"], rows["ex_01_bob.ipynb"], rows["poem.ipynb"]
    assert ada["student"] == "'=Ada <b>" and ada["gumbel_noise"] == "passed" and ada["passed"] == "1"  # no formula
    assert ada["gumbel_ranking"] == "no cell defines gumbel_ranking" and "exponential" in bob["gumbel_noise"]
    assert "cell 2 defines gumbel_ranking, but: cell 2: SyntaxError" in bob["gumbel_ranking"]
    assert poem["tasks"] == "0" and "no exercise is recognised" in poem["remarks"]
    page = next((tmp_path / "out").glob("*Ada*.html")).read_text(encoding="utf-8")
    assert "<h1>=Ada &lt;b&gt;</h1>" in page


@pytest.mark.parametrize(
    ("names", "out", "message"),
    [
        ([], "grades.csv", "expected a folder of notebooks"),
        (["in/a.txt"], "grades.csv", "expected .ipynb files"),
        (["in/a.ipynb"], "grades.xlsx", "expected --out to end in .csv"),
        (["in/a.ipynb", "grades/kept.html"], "grades.csv", "grades, which exists"),
    ],
)
def test_what_cannot_be_graded_is_refused(tmp_path, names, out, message, capsys):
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert main(["grade", str(tmp_path / "in"), "--out", str(tmp_path / out)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "grades.csv").exists()
