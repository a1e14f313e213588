"""Figures: the only module that imports matplotlib. Each is saved as PNG beside the CSV of the rows it was drawn from."""

import csv
import os
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# distinguishable in black and white: line style and marker differ as well as colour
STYLES = [
    {"color": "#0b5394", "linestyle": "-", "marker": "o"},
    {"color": "#cc4125", "linestyle": "--", "marker": "s"},
    {"color": "#38761d", "linestyle": "-.", "marker": "^"},
    {"color": "#674ea7", "linestyle": ":", "marker": "D"},
    {"color": "#7f6000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#444444", "linestyle": (0, (1, 3)), "marker": "x"},
]
plt.rcParams.update(
    {
        "figure.figsize": (7.0, 4.2),
        "figure.dpi": 110,
        "savefig.dpi": 150,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "lines.markersize": 5,
        "legend.frameon": False,
    }
)


def save_figure(figure: Figure, path: str | Path, rows: list[dict]) -> Path:
    """Writes the figure as `path`.png and its rows as `path`.csv, each through a temporary file.

    Args:
        figure: what was drawn.
        path: without suffix, under `figures_dir()` unless absolute, for example "derivations/02_choice_probabilities".
        rows: one dict a drawn point (or bar, or bin), all with the same keys; numbers unrounded.
    Returns:
        The PNG's path.
    Raises:
        ValueError: no rows, or rows whose keys differ.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(
            f"save_figure: expected at least one row, all with the same keys, got {len(rows)} rows for {path}. "
            "Pass the values that were drawn."
        )
    target = figures_dir() / path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, target.with_name(target.name + ".csv"))
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, target.with_name(target.name + ".png"))
    return target.with_name(target.name + ".png")


def figures_dir() -> Path:
    """Where figures go: figures/ of the checkout that this package runs from, else figures/ of the current folder."""
    checkout = Path(__file__).resolve().parent.parent
    return (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / "figures"
