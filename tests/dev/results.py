"""Fills README's numbers from the files that they come from, and draws the figure that it begins with: `make results`.

A block of README stands between `<!-- NAME -->` and `<!-- end -->`. tests/test_readme.py says where one is stale.
"""

import csv
import hashlib
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
from matplotlib.figure import Figure

from pdpo.exercises import tasks
from pdpo.files import replacing
from pdpo.plots import columns, interval

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


DARK = {
    "figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117", "savefig.facecolor": "#0d1117", "text.color": "#e6edf3",
    "axes.labelcolor": "#e6edf3", "axes.edgecolor": "#8b949e", "xtick.color": "#8b949e", "ytick.color": "#8b949e",
}  # fmt: skip
INK = {  # on white, on black
    "SFT": ("#24292f", "#e6edf3"), "DPO": ("#cc4125", "#ff9e80"), "ODPO": ("#0b5394", "#79c0ff"),
    "best of N": ("#7f6000", "#e3b341"), "SFT on the best": ("#674ea7", "#d2a8ff"), "ceiling": ("#8c959f", "#6e7681"),
}  # fmt: skip


def signature(rows: list[dict], *, dark: bool = False) -> Figure:
    """The figure that README begins with: score against KL of DPO and ODPO between where they start and what no policy can pass.

    Args: rows: of figures/<preset>/09_baselines.csv, numbers as float, what has no beta None. dark: for a dark background."""
    ink = {method: both[dark] for method, both in INK.items()}
    of = {method: [row for row in rows if row["method"] == method] for method in INK}
    with plt.rc_context((DARK if dark else {}) | {"font.size": 12, "axes.linewidth": 0.8}):
        figure, axes = plt.subplots(figsize=(11.0, 4.0))
        right = 1.08 * max(row["kl_high"] for row in rows)
        kl, score = np.array(
            sorted([(0.0, of["SFT"][0]["score"]), *zip(*columns(of["ceiling"], "kl", "score"), strict=True)])
        ).T
        axes.fill_between(kl, score, 10.0, color=ink["ceiling"], alpha=0.15, linewidth=0)
        axes.plot(kl, score, color=ink["ceiling"], linewidth=1.2, linestyle=(0, (4, 2)))
        axes.axhline(of["SFT"][0]["score"], color=ink["SFT"], linewidth=0.8, linestyle=(0, (1, 3)))
        for method, marker in (("DPO", "s"), ("ODPO", "o"), ("best of N", "v"), ("SFT on the best", "D"), ("SFT", "o")):
            look = {"color": ink[method], "marker": marker, "markersize": 7, "linewidth": 2.2}
            errors = {"xerr": interval(of[method], "kl"), "yerr": interval(of[method], "score")}
            axes.errorbar(*columns(of[method], "kl", "score"), **errors, elinewidth=0.8, **look)
        for row in of["best of N"][1:]:  # the first has no room
            axes.annotate(
                row["label"], (row["kl"], row["score"]), xytext=(10, -10), textcoords="offset points",
                color=ink["best of N"], fontsize=10,
            )  # fmt: skip
        say = {"fontsize": 12, "va": "center"}
        best = max(of["ODPO"], key=lambda row: row["score"])
        for method, up in (("ODPO", 0.3), ("DPO", -0.35)):  # beside the line that leads away from its highest point
            top, next_one = sorted(of[method], key=lambda row: row["kl"])[-3:-1]
            where = ((top[key] + next_one[key]) / 2 for key in ("kl", "score"))
            axes.text(next(where), next(where) + up, method, color=ink[method], weight="bold", ha="center", **say)
        axes.text(best["kl"] + 1.2, best["score"] + 0.45, f"below beta {best['beta']:g}: further, not higher", **say)
        axes.text(
            0.12, of["SFT"][0]["score"] - 0.22, "SFT, where they start: it imitates good and bad alike", color=ink["SFT"], **say
        )
        far = of["SFT on the best"][0]
        axes.text(
            far["kl"] - 0.12,
            far["score"] + 0.85,
            "imitation of the best response alone:\nhigher, but another policy",
            color=ink["SFT on the best"],
            ha="center",
            **say,
        )
        axes.text(
            2.1,
            of["best of N"][-1]["score"] - 0.55,
            "best of N samples of SFT, chosen by the true score",
            color=ink["best of N"],
            **say,
        )
        axes.text(0.06, 9.6, "out of reach\nat this KL", color=ink["ceiling"], fontsize=10, va="center")
        axes.text(right, 4.3, "bars: 95 % intervals over seeds and prompts", color=ink["ceiling"], fontsize=10, ha="right")
        axes.set(
            xlim=(-0.12, right),
            ylim=(4.2, 10.0),
            xlabel="KL from the reference (nats a response)",
            ylabel="true score (1 to 10)",
        )
        axes.set_title("What preferences gain, and what they leave", loc="left", fontsize=15, weight="bold", pad=10)
    return figure


def main() -> None:
    """Writes README's blocks and figures/signature_light.png and _dark.png."""
    for name in ("light", "dark"):
        drawn = signature(rows_of(TINY / "09_baselines.csv"), dark=name == "dark")
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
