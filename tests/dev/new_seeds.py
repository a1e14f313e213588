"""Repeats the verdicts of notebooks 08 and 09 on seeds that chose nothing, and writes figures/<preset>/09_claims.csv.

    python tests/dev/new_seeds.py [--seeds 10 11 12 13 14] [--published 0 1 2]

A quarter of an hour on two cores with the preset tiny, from nothing; what was trained is kept. A claim's value is a paired difference
with its 95 % bootstrap interval over seeds and prompts. "repeated": clear of 0 on both sets of seeds, on the same side;
"resolved now": clear on the new seeds alone; "not repeated": clear on the old ones alone; "contradicted": clear on opposite sides;
"not told apart": on neither.
"""

import argparse
from dataclasses import replace

import numpy as np

from pdpo import experiments
from pdpo.files import replacing, write_csv
from pdpo.plots import committed_figures_dir
from pdpo.statistics import bootstrap_interval, height_with_interval

FEW = {"betas": (0.1, 0.3, 1.0), "num_evaluations": 1}
STRONG = {"method": "odpo", "alpha": 1.0, **FEW}
HEIGHTS = [  # at equal KL; the first two were named before any run
    ("ODPO", "DPO"),
    ("alpha 1", "alpha 1, mean margin"),
    ("alpha 1", "DPO"),
    ("SLiC-HF", "DPO"),
    ("SGD", "DPO"),
]


def measured(preset, seeds: list[int]) -> dict[str, tuple[float, float, float]]:
    """claim -> (value, low, high) over these seeds."""
    sfts = experiments.run_all(experiments.run_sft, [{"preset": preset, "seed": seed} for seed in seeds])
    frontiers = experiments.run_frontiers(
        sfts,
        {
            "SFT": {"method": "sft"},
            "DPO": {"method": "dpo", "betas": (0.05, *FEW["betas"])},  # the notebook's runs
            "ODPO": {"method": "odpo", "betas": FEW["betas"]},
            "alpha 1": STRONG,
            "alpha 1, mean margin": STRONG | {"offset_scale": "mean"},
            "SLiC-HF": {"method": "slic", **FEW},
            "SGD": {"method": "dpo", "optimizer": "sgd", "lr": 0.03, **FEW, "betas": (0.05, 0.3, 1.0)},
        },
    )
    found = {}
    for one, other in HEIGHTS:
        height = height_with_interval(frontiers[one], frontiers[other])
        found[f"{one} over {other}, score at equal KL"] = height["height"], height["low"], height["high"]
    imitating = replace(preset, sft_all_responses=False)
    best = experiments.run_all(experiments.run_sft, [{"preset": imitating, "seed": seed} for seed in seeds])
    settings = [{"run": run, "reference": sft} for run, sft in zip(best, sfts, strict=True)]
    stages = {("best", None): experiments.run_all(experiments.run_win_rate, settings)}
    for name in ("SFT", "DPO"):
        for each in frontiers[name].stages:
            stages.setdefault((each.run.method, each.run.beta), []).append(each)

    def difference(claim: str, key: str, one: tuple, other: tuple) -> None:
        values = np.stack([a.column(key) - b.column(key) for a, b in zip(stages[one], stages[other], strict=True)])
        found[claim] = float(values.mean()), *bootstrap_interval(values)

    sft = ("sft", None)
    difference("SFT on the best over DPO at beta 0.3, score", "score", ("best", None), ("dpo", 0.3))
    for beta in (0.1, 0.3, 1.0):
        difference(f"DPO at beta {beta:g} over SFT, score", "score", ("dpo", beta), sft)
        difference(f"DPO at beta {beta:g} over SFT, SBERT win rate", "win", ("dpo", beta), sft)
    for beta in (0.05, 1.0):
        difference(f"DPO at beta {beta:g} over SFT, share of correct answers", "correct", ("dpo", beta), sft)
    difference("DPO at beta 0.05 over beta 1, KL", "kl", ("dpo", 0.05), ("dpo", 1.0))
    difference("DPO at beta 0.05 over beta 1, score", "score", ("dpo", 0.05), ("dpo", 1.0))
    return found


def side(low: float, high: float) -> int:
    """1: the interval lies above 0; -1: below; 0: it holds 0."""
    return int(low > 0) - int(high < 0)


def status(published: tuple, repeated: tuple) -> str:
    old, new = side(*published[1:]), side(*repeated[1:])
    if old and new:
        return "repeated" if old == new else "contradicted"
    return "not repeated" if old else "resolved now" if new else "not told apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--published", nargs="+", type=int, default=[0, 1, 2], help="the notebooks' seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13, 14], help="the new ones")
    options = parser.parse_args()
    preset = experiments.start(options.preset)
    old, new = (measured(preset, seeds) for seeds in (options.published, options.seeds))
    rows = []
    for claim in old:
        shown = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*values[claim]) for values in (old, new)]
        rows.append({"claim": claim, "published": shown[0], "repeated": shown[1], "status": status(old[claim], new[claim])})
        print(f"{rows[-1]['status']:14} {claim:60} {shown[0]}   {shown[1]}")
    target = committed_figures_dir() / preset.name / "09_claims.csv"
    with replacing(target) as temporary:
        write_csv(temporary, rows)
    print(f"seeds {options.published} and {options.seeds}; {target}")


if __name__ == "__main__":
    main()
