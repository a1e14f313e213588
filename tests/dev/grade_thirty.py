"""Thirty notebooks, among them every hostile one, graded twice: each right task credited, no wrong one, twice the same table.

    PYTHONPATH=. python tests/dev/grade_thirty.py

Takes minutes on 2 cores, which is why CI grades ten of them (tests/test_grading.py). Prints the seconds of both runs.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from broken_notebooks import hand_in
from test_grading import check

from pdpo.grading import Limits, grade

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folder, tables = Path(folder), []
        handed = hand_in(folder / "in")
        for run in ("first", "second"):
            began = time.monotonic()
            check(handed, grade(folder / "in", folder / f"{run}.csv", seed=1, limits=Limits(seconds=20, megabytes=1024)))
            print(f"{run} run: {time.monotonic() - began:.0f} s")
            tables.append((folder / f"{run}.csv").read_text(encoding="utf-8"))
        assert tables[0] == tables[1]
        print(
            f"{len(handed)} notebooks, {sum(len(each.right) for each in handed)} right tasks credited and no wrong one, twice"
        )
