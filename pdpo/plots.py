"""Figures: the only module that imports matplotlib. Each is saved as PNG beside the CSV of the rows it was drawn from.

What draws a whole figure takes its claim as the title and returns the figure and its rows, one dict a drawn point."""

import csv
import io
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator

from pdpo.files import CHECKOUT, replacing, write_csv, write_json
from pdpo.stages import runs_dir

# distinguishable in black and white: line style and marker differ as well as colour
STYLES = [
    {"color": "#0b5394", "linestyle": "-", "marker": "o"},
    {"color": "#cc4125", "linestyle": "--", "marker": "s"},
    {"color": "#38761d", "linestyle": "-.", "marker": "^"},
    {"color": "#674ea7", "linestyle": ":", "marker": "D"},
    {"color": "#7f6000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#444444", "linestyle": (0, (1, 3)), "marker": "x"},
]
plt.rc("figure", figsize=(7.0, 4.2), dpi=110, **{"constrained_layout.use": True})
plt.rc("savefig", dpi=150)
warnings.filterwarnings("ignore", "Creating legend with loc")  # it says how busy the machine is, on red
plt.rc("axes", titlesize=11, **{"spines.top": False, "spines.right": False})
plt.rc("lines", markersize=5)
plt.rc("legend", frameon=False)


def save_figure(figure: Figure, path: str | Path, rows: list[dict], *, info: dict | None = None) -> Path:
    """Writes the figure as `path`.png, its rows as `path`.csv and info as `path`.run_info.json, through temporary files.

    Args: path: without suffix, under `figures_dir()` unless absolute, for example "derivations/02_choice_probabilities".
          rows: one dict a drawn point (or bar, or bin), all with the same keys; numbers unrounded.
          info: what the rows were made with, `experiments.run_info`; None for what no run went into.
    Returns: The PNG's path."""
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"save_figure: expected rows, all with the same keys, got {len(rows)} for {path}. Pass what is drawn.")
    target = figures_dir() / path
    write_csv(target.with_name(target.name + ".csv"), rows)
    with replacing(target.with_name(target.name + ".png")) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    if info is not None:
        write_json(target.with_name(target.name + ".run_info.json"), info)
    return target.with_name(target.name + ".png")


def figures_dir() -> Path:
    """Where figures are written: $PDPO_FIGURES_DIR, else figures/ in the runs folder, which git ignores."""
    return Path(os.environ.get("PDPO_FIGURES_DIR") or runs_dir() / "figures")


def committed_figures_dir() -> Path:
    """figures/ of the checkout, which git keeps and README shows; `python -m pdpo run --save` writes there."""
    return CHECKOUT / "figures"


def committed_rows(path: str, *, command: str) -> list[dict]:
    """The rows of a table that a command too slow for a notebook wrote; where it has not been run, says so and gives none.

    Args: path: without suffix, under `committed_figures_dir()`. command: what writes it.
    Returns: One dict a row: what reads as a number is float, all else text."""
    file = committed_figures_dir() / f"{path}.csv"
    if not file.exists():
        print(f"{path}.csv has not been made: {command}")
        return []

    def value(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    with open(file, newline="", encoding="utf-8") as lines:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(lines)]


def slider(draw: Callable, *, values: Sequence, start, label: str) -> None:
    """A slider that redraws a figure; a figure at `start` where ipywidgets is missing or PDPO_STATIC is set.

    Args: draw: called with one value; makes a figure with `plt.subplots`. values: the slider's positions, in order.
          start: the first position, one of values. label: the slider's name, with its unit."""
    if start not in values:
        raise ValueError(f"slider: expected start to be one of the values, got {start!r}. Pass one of {list(values)}.")
    if os.environ.get("PDPO_STATIC") or find_spec("ipywidgets") is None:
        draw(start)
        return
    import ipywidgets  # an optional extra: everything else works without

    look = {"style": {"description_width": "initial"}, "layout": {"width": "36em"}}  # room for the label and for the track
    control = ipywidgets.SelectionSlider(options=list(values), value=start, description=label, **look)
    ipywidgets.interact(lambda value: draw(value), value=control)


def band(axes: Axes, x, values_by_seed, *, style: int, label: str) -> None:
    """A line through the mean over seeds and a band over their range; values_by_seed is (num_seeds, len(x))."""
    values = np.asarray(values_by_seed, dtype=float)
    look = STYLES[style % len(STYLES)]
    axes.plot(x, values.mean(0), label=label, **look)
    axes.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)


def sft_curves(runs: list, *, title: str) -> tuple[Figure, list[dict]]:
    """Loss per token of SFT `experiments.Run`s, one a seed: training batches and held-out prompts against optimizer steps."""
    keys = {"training batch": "loss", "held-out prompts": "eval_loss"}
    rows = [
        {"seed": run.seed, "step": row["step"], "part": part, "loss": row[key]}
        for run in runs
        for part, key in keys.items()
        for row in run.history
        if key in row
    ]
    figure, axes = plt.subplots()
    for style, part in enumerate(keys):
        mine = [row for row in rows if row["part"] == part]
        band(axes, sorted({row["step"] for row in mine}), by_seed(mine, "loss"), style=style, label=part)
    axes.lines[0].set(marker="", linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_title(f"{title}{_over_seeds(runs)}")
    axes.legend()
    return figure, rows


def training_curves(runs: list, *, title: str) -> tuple[Figure, list[dict]]:
    """Held-out loss and KL of preference `experiments.Run`s per epoch: a column a method, a line a beta (the report's Fig. 3)."""
    keys = ("epoch", "eval_loss", "eval_kl")
    rows = [
        {"method": run.method, "beta": run.beta, "seed": run.seed} | {key: row[key] for key in keys}
        for run in runs
        for row in run.history
        if "eval_kl" in row
    ]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, grid = plt.subplots(2, len(methods), figsize=(9.5, 6.2), sharex=True, sharey="row", squeeze=False)
    for column, method in enumerate(methods):
        for style, beta in enumerate(sorted({row["beta"] for row in rows})):
            mine = [row for row in rows if row["method"] == method and row["beta"] == beta]
            epochs = sorted({row["epoch"] for row in mine})
            label = "no beta" if beta is None else f"beta {beta:g}"
            for axes, key in zip(grid[:, column], ("eval_loss", "eval_kl"), strict=True):
                band(axes, epochs, by_seed(mine, key), style=style, label=label)
        grid[0, column].set_title(method.upper())
        grid[1, column].set_xlabel("epoch")
    grid[0, 0].set_ylabel("held-out loss (nats a pair)")
    grid[1, 0].set_ylabel("KL(policy || reference)\n(nats a response)")
    grid[1, 0].legend(fontsize=8)
    figure.suptitle(f"{title}{_over_seeds(runs)}", fontsize=11)
    return figure, rows


def _over_seeds(runs: list) -> str:
    return "\n(line: mean over seeds; band: their range)" if len({run.seed for run in runs}) > 1 else ""


def png(figure: Figure) -> bytes:
    """The figure as PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


ROAD = [
    ("data", "prompts with\nranked responses", "notebooks 00, 14"),
    ("SFT", "imitate\nthe responses", "notebook 06"),
    ("pairs", "chosen, rejected;\na model of choices", "notebooks 01, 02"),
    ("DPO, ODPO", "prefer the chosen,\nstay near SFT", "notebooks 03, 04, 04b, 05, 07"),
    ("samples", "ask the policies\nnew prompts", "notebook 08"),
    ("measures", "wins, score, KL,\nwith intervals", "notebooks 08 to 09c"),
]


def roadmap(*, title: str) -> tuple[Figure, list[dict]]:
    """The way from data to measures as boxes, with the notebooks that cover each, and the figure's claim as title; and its rows."""
    figure, axes = plt.subplots(figsize=(11.0, 2.6))
    for x, (name, what, notebooks) in enumerate(ROAD):
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": STYLES[0]["color"], "linewidth": 1.5}
        axes.text(x, 1.0, name, ha="center", va="center", fontsize=11, fontweight="bold", bbox=box)
        axes.text(x, 0.55, what, ha="center", va="center", fontsize=8.5)
        axes.text(x, 0.15, notebooks, ha="center", va="center", fontsize=8.5, color=STYLES[1]["color"])
        if x > 0:
            arrow = {"arrowstyle": "->", "color": "0.3", "linewidth": 1.5}
            axes.annotate("", (x - 0.42, 1.0), (x - 0.62, 1.0), arrowprops=arrow)
    axes.set(xlim=(-0.6, len(ROAD) - 0.4), ylim=(0.0, 1.3), title=title)
    axes.axis("off")
    return figure, [{"step": name, "what": what.replace("\n", " "), "notebooks": notebooks} for name, what, notebooks in ROAD]


def by_seed(rows: list[dict], key: str) -> list[list[float]]:
    """rows[key] as one list a seed, each in the order of the rows."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return [[row[key] for row in rows if row["seed"] == seed] for seed in seeds]


def columns(rows: list[dict], *keys: str) -> list[list[float]]:
    """rows[key] for each key, in the order of the rows."""
    return [[row[key] for row in rows] for key in keys]


def interval(rows: list[dict], key: str) -> np.ndarray:
    """(2, num_rows): how far the interval of rows[key] reaches down and up, as matplotlib's errorbar takes it."""
    values, low, high = np.array(columns(rows, key, f"{key}_low", f"{key}_high"))
    return np.abs(np.stack([low, high]) - values)


def lines_with_intervals(
    panels: list[tuple[str, str]], rows: list[dict], *, x: str, xlabel: str, title: str, log_x: bool = False
) -> tuple[Figure, list[dict]]:
    """One panel a measure, one line a method, with its 95 % intervals.

    Args: panels: (key, y label) of each panel; rows: "method", the value of x, and of each panel key, key_low and key_high.
          x: the key of the horizontal axis; a method whose rows have None there is drawn as a level with its interval."""
    figure, grid = plt.subplots(1, len(panels), figsize=(4.9 * len(panels), 4.2), squeeze=False)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axes, (key, ylabel) in zip(grid[0], panels, strict=True):
        for style, method in enumerate(methods):
            mine = [row for row in rows if row["method"] == method and key in row]
            look = STYLES[style % len(STYLES)]
            if mine and mine[0][x] is None:
                axes.axhline(mine[0][key], color=look["color"], linestyle=look["linestyle"], label=method)
                axes.axhspan(mine[0][f"{key}_low"], mine[0][f"{key}_high"], color=look["color"], alpha=0.12, linewidth=0)
                continue
            axes.errorbar(*columns(mine, x, key), yerr=interval(mine, key), capsize=3, label=method, **look)
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear")
        if log_x:
            ticks = sorted({row[x] for row in rows if row[x] is not None})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axes.xaxis.minorticks_off()
    grid[0, 0].legend()
    figure.suptitle(f"{title}\n(bars and shades: 95 % intervals)", fontsize=11)
    return figure, rows


def frontier_curves(rows: list[dict], *, ylabel: str, title: str) -> tuple[Figure, list[dict]]:
    """Score against KL, a line a method through its betas, with 95 % intervals in both directions.

    Args: rows: `statistics.frontier_rows`; a method with beta None (SFT) is one point. A row's "label", if it has one, stands beside
          its point instead of beta. ylabel: what the score is."""
    figure, axes = plt.subplots(figsize=(7.0, 4.8))
    for style, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["kl"])
        look = STYLES[style % len(STYLES)]
        errors = {"xerr": interval(mine, "kl"), "yerr": interval(mine, "score")}
        axes.errorbar(*columns(mine, "kl", "score"), **errors, elinewidth=0.7, capsize=2, label=method, **look)
        place = {"xytext": (-5, 7), "ha": "right"} if style % 2 == 0 else {"xytext": (5, -11)}  # clear of the other line's
        beside = {"textcoords": "offset points", "fontsize": 7, "color": look["color"], "zorder": 5, **place}
        beside["path_effects"] = [withStroke(linewidth=2, foreground="white")]
        for row in mine:
            label = row.get("label", "" if row["beta"] is None else f"{row['beta']:g}")
            axes.annotate(label, (row["kl"], row["score"]), **beside)
    axes.set(xlabel="KL(policy || reference) (nats a response)", ylabel=ylabel)
    numbers = "" if any("label" in row for row in rows) else "numbers: beta; "
    axes.set_title(f"{title}\n({numbers}bars: 95 % intervals over seeds and prompts)")
    axes.legend()
    return figure, rows
