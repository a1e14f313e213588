"""Writes exercises/ from solutions/: solved lines become stubs, hints fold out. `make exercises` runs it, a test compares.

In a code cell the lines from `# solution` to `# end` (or to the end of the cell) become one `raise NotImplementedError`. In a markdown
cell the line `<!-- hints: NAME -->` becomes the three hints of that task. A cell that begins with `**Solved.**` is left out.
"""

import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from pdpo.exercises import tasks

HERE = Path(__file__).resolve().parent
STUB = (
    "raise NotImplementedError(",
    '    "Your turn: write {0}, run this cell again, then go on. "',
    '    "Stuck? hint({0!r})"',
    ")",
)


def stub(source: str) -> str:
    """The cell with its solutions cut out."""
    lines, name, inside = [], "", False
    for line in source.splitlines():
        if found := re.match(r"\s*def (\w+)", line):
            name = name if inside else found[1]
        if line.strip() == "# solution":
            inside = True
            lines += [line.replace("# solution", each.format(name)) for each in STUB]
        elif line.strip() == "# end":
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def fold_hints(found: re.Match) -> str:
    """Three blocks that fold out, for `<!-- hints: NAME -->`."""
    blocks = [
        f"<details><summary>Hint {number} of 3</summary>\n\n{text}\n\n</details>"
        for number, text in enumerate(tasks()[found[1]].hints, start=1)
    ]
    return "\n".join(blocks)


def exercise(solved: NotebookNode) -> NotebookNode:
    """The notebook that a student opens: no solutions, no outputs."""
    cells = []
    for cell in solved.cells:
        if cell.source.startswith("**Solved.**"):
            continue
        cell = NotebookNode(cell)
        if cell.cell_type == "code":
            cell.source, cell.outputs, cell.execution_count = stub(cell.source), [], None
        else:
            source = re.sub(r"<!-- hints: (\w+) -->", fold_hints, cell.source)
            cell.source = source.replace("/notebooks/solutions/", "/notebooks/exercises/")
        cells.append(cell)
    return NotebookNode(solved, cells=cells)


def main() -> None:
    target = HERE / "exercises"
    target.mkdir(exist_ok=True)
    sources = sorted((HERE / "solutions").glob("ex_*.ipynb"))
    for stale in {path.name for path in target.glob("*.ipynb")} - {path.name for path in sources}:
        (target / stale).unlink()
    for path in sources:
        (target / path.name).write_text(nbformat.writes(exercise(nbformat.read(path, as_version=4))) + "\n", encoding="utf-8")
    print(f"{len(sources)} exercises written to notebooks/exercises")


if __name__ == "__main__":
    main()
