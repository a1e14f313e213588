"""Fills README's numbers from the files that they come from, and draws the figure that it begins with: `make results`.

A block of README stands between `<!-- NAME -->` and `<!-- end -->`. tests/test_readme.py says where one is stale.
"""

import csv
import hashlib
import re
from pathlib import Path

import nbformat

from pdpo import plots
from pdpo.exercises import tasks
from pdpo.files import replacing

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "figures" / "tiny"
DIGEST = "Drawn from"  # the PNG's field with the sha256 of its table


def rows_of(path: Path) -> list[dict]:
    """A figure's rows: numbers as float, what is empty as None (but a label as "")."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    words = ("method", "label", "notebook")
    return [{key: text if key in words else float(text) if text else None for key, text in row.items()} for row in rows]


def figure() -> str:
    rows = rows_of(TINY / "09_baselines.csv")

    def best(method: str) -> dict:
        return max((row for row in rows if row["method"] == method), key=lambda row: row["score"])

    (start,) = (row for row in rows if row["method"] == "SFT")
    (four,) = (row for row in rows if row["label"] == "N = 4")
    alone, dpo, odpo = best("SFT on the best"), best("DPO"), best("ODPO")
    return (
        f"*A 0.16 million parameter GPT-2 on a toy whose true scores are known: from {start['score']:.1f} for the policy that they "
        f"start from, DPO gains {dpo['score'] - start['score']:.1f} points at best and ODPO {odpo['score'] - start['score']:.1f}. The "
        f"best of four samples of that first policy scores {four['score']:.1f}, at a KL of at most {four['kl']:.1f} nats; imitating "
        f"the best response alone {alone['score']:.1f}, {alone['kl']:.1f} nats away.*"
    )


def samples() -> str:
    """Of the answers of SFT and DPO to four test prompts, as notebook 00 stores them, the first two that differ."""
    notebook = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and "answers[name][i].text" in cell.source)
    found = re.findall(r"^(\S.*)\n  SFT: (.*)\n  DPO: (.*)$", cell.outputs[0].text, re.MULTILINE)
    table = ["| asked, and not trained on | SFT says | DPO says |", "|---|---|---|"]
    differ = [each for each in found if each[1] != each[2]]
    return "\n".join(table + [f"| {' | '.join(each)} |" for each in differ[:2]])


def notebooks() -> str:
    """A row a notebook: title, the question that 00 says it asks, minutes from nothing where they have been measured."""
    minutes = {}
    if (TINY / "minutes.csv").exists():
        minutes = {row["notebook"]: row["minutes"] for row in rows_of(TINY / "minutes.csv")}
    road = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4).cells[-1].source
    table = ["| notebook | question |", "|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
        asked = re.search(rf"\({re.escape(path.name)}\) \| (.*) \|", road)
        question = asked[1] if asked else "What will you do, on which hardware, with which data?"
        taken = f" {max(minutes[path.stem], 0.1):.1f} min" if path.stem in minutes else ""
        table.append(f"| [{title}](notebooks/{path.name}){taken} | {question} |")
    return "\n".join(table)


def duration() -> str:
    if not (TINY / "minutes.csv").exists():
        return "from nothing it takes some tens of minutes on two cores, once: what has been trained is kept."
    (whole,) = (row for row in rows_of(TINY / "minutes.csv") if row["notebook"] == "all")
    return f"from nothing it takes {whole['minutes']:.0f} minutes on two cores, once: what has been trained is kept."


def exercises() -> str:
    return f"{len(tasks())} exercises in {len(list((ROOT / 'notebooks' / 'exercises').glob('*.ipynb')))} notebooks"


BLOCKS = {each.__name__: each for each in (figure, duration, samples, notebooks, exercises)}


def filled(text: str) -> str:
    """README's text with every block as its files say."""
    for name, block in BLOCKS.items():
        pattern = rf"(<!-- {name} -->)(\n?).*?(<!-- end -->)"
        if len(re.findall(pattern, text, re.DOTALL)) != 1:
            raise ValueError(f"README: expected one block <!-- {name} --> ... <!-- end -->, got none or more. Mend README.")
        text = re.sub(
            pattern, lambda found, block=block: found[1] + found[2] + block() + found[2] + found[3], text, flags=re.DOTALL
        )
    return text


def table_digest() -> str:
    """Of what the first figure is drawn from."""
    return hashlib.sha256((TINY / "09_baselines.csv").read_bytes()).hexdigest()


def main() -> None:
    """Writes README's blocks and figures/signature_light.png and _dark.png."""
    for name in ("light", "dark"):
        drawn = plots.signature(rows_of(TINY / "09_baselines.csv"), dark=name == "dark")
        with replacing(ROOT / "figures" / f"signature_{name}.png") as temporary:
            drawn.savefig(temporary, format="png", dpi=200, metadata={"Software": None, DIGEST: table_digest()})
    readme = ROOT / "README.md"
    text = filled(readme.read_text(encoding="utf-8"))
    with replacing(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")
    missing = (
        "" if (TINY / "minutes.csv").exists() else "; no minutes: figures/tiny/minutes.csv is written by a run from nothing"
    )
    print(f"README.md and figures/signature_*.png are as their files say{missing}")


if __name__ == "__main__":
    main()
