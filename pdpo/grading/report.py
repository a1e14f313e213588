"""What the teacher reads: a table with a row a notebook, and a page a student."""

import csv
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdpo.exercises import tasks

STYLE = """body { font-family: sans-serif; max-width: 60em; margin: 2em auto }
pre { background: #f4f4f4; padding: 0.6em; white-space: pre-wrap }
td, th { padding: 0.2em 1em 0.2em 0; text-align: left; vertical-align: top }"""


@dataclass
class Grade:
    """A notebook's row: for each task "" (passed) or the reason, and the whole message; what else the teacher should know."""

    student: str
    notebook: str
    reasons: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    output: str = ""

    @property
    def num_passed(self) -> int:
        return sum(not reason for reason in self.reasons.values())


def write_table(grades: list[Grade], out: Path) -> None:
    with open(out, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table(grades))


def table(grades: list[Grade]) -> Iterator[list[str]]:
    """A head, and a row a notebook: a column a task, "passed" or the reason, empty where the notebook has no such task."""
    names = [name for name in tasks() if any(name in each.reasons for each in grades)]
    yield ["student", "notebook", "passed", "tasks", "remarks", *names]
    for each in grades:
        verdicts = ["" if name not in each.reasons else each.reasons[name] or "passed" for name in names]
        cells = [each.student, each.notebook, str(each.num_passed), str(len(each.reasons)), "; ".join(each.remarks), *verdicts]
        yield ["'" + cell if cell[:1] in ("=", "+", "-", "@") else cell for cell in cells]  # no formula for a spreadsheet


def write_pages(grades: list[Grade], folder: Path) -> dict[str, str]:
    """index.html and a page a student; the students and their files."""
    links: dict[str, str] = {}
    for each in grades:
        links.setdefault(each.student, f"{len(links) + 1:03}_{re.sub(r'[^A-Za-z0-9_-]+', '_', each.student)[:60]}.html")
    lines = []
    for student, link in links.items():
        theirs = [each for each in grades if each.student == student]
        (folder / link).write_text(_page(student, "".join(map(_section, theirs))), encoding="utf-8")
        passed, num_tasks = sum(each.num_passed for each in theirs), sum(len(each.reasons) for each in theirs)
        remarks = html.escape("; ".join(remark for each in theirs for remark in each.remarks))
        lines.append(f'<tr><td><a href="{link}">{html.escape(student)}</a><td>{passed} of {num_tasks}<td>{remarks}\n')
    table = "<table><tr><th>student<th>passed<th>remarks\n" + "".join(lines) + "</table>"
    (folder / "index.html").write_text(_page("Grades", table), encoding="utf-8")
    return links


def _page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{html.escape(title)}</h1>\n{body}</body></html>\n'


def _section(grade: Grade) -> str:
    def folded(title: str, text: str) -> str:
        return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>\n" if text else ""

    parts = [f"<h2>{html.escape(grade.notebook)}: {grade.num_passed} of {len(grade.reasons)} tasks</h2>\n"]
    parts += [f"<p><b>{html.escape(remark)}</b></p>\n" for remark in grade.remarks]
    for name, reason in grade.reasons.items():
        parts.append(f"<h3>{'✓' if not reason else '✗'} {html.escape(name)}</h3>\n")
        parts.append(f"<pre>{html.escape(grade.messages.get(name, reason))}</pre>\n" if reason else "")
        parts.append(folded("the cell", grade.sources.get(name, "")))
    return (
        "".join(parts)
        + folded("cells that raised an exception", "\n".join(grade.errors))
        + folded("what it printed", grade.output)
    )
