"""The numbers of docs/answers.md: runs a chapter's cells, then the code under its heading there.

    PYTHONPATH=. python tests/dev/answers.py 01        one chapter: 00, 01, 02, 03, 04, 04b, 05, 06, 07, 08, 09, 09b, 09c

Of 01 to 05 all cells run but the figures; of the others, whose cells train, only the first one or two (imports and settings).
"""

import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("PDPO_FIGURES_DIR", tempfile.mkdtemp())

import nbformat

ROOT = Path(__file__).resolve().parents[2]
FIRST = {"00": 1, "06": 2, "07": 2, "08": 2, "09": 1, "09b": 1, "09c": 1}  # cells after that for Colab


def blocks(chapter: str) -> list[str]:
    """The code of docs/answers.md under the chapter's heading."""
    text = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {chapter} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"^ *```python\n(.*?)^ *```", section, re.MULTILINE | re.DOTALL)


def cells(chapter: str) -> list[str]:
    """The chapter's code that the answers go on from."""
    (path,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"][1:]
    if chapter in FIRST:
        code = code[: FIRST[chapter]]
    else:
        code = [cell for cell in code if "nbval-ignore-output" not in cell.metadata.get("tags", ())]
    return [cell.source for cell in code]


def main(chapter: str) -> None:
    space: dict = {}
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        shown, sys.stdout = sys.stdout, nowhere
        try:
            for code in cells(chapter):
                exec(code, space)
        finally:
            sys.stdout = shown
    for code in blocks(chapter):
        exec(re.sub(r"^   ", "", code, flags=re.MULTILINE), space)


if __name__ == "__main__":
    main(sys.argv[1])
