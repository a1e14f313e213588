"""The studies of notebooks 09b, 09c, 11 and 11c that take too long to be made whenever the notebooks run; they draw what this writes.

    python tests/dev/studies.py grid sizes alphas temperatures    # figures/PRESET/study_*.csv; five to ten minutes each, on two cores
    python tests/dev/studies.py imitation --seeds 21 22 23        # seed 20 chooses beta
    python tests/dev/studies.py pipeline --seeds 20
    python tests/dev/studies.py judges --seeds 21 22 23           # figures/PRESET/11c_claims.csv

grid: each frontier of notebooks 09 to 09c on validation prompts, rate x beta, nine tries each, by which rates and SLiC-HF's pull are
chosen. sizes: ODPO against DPO on test prompts at three sizes of data, on graded pairs with equal steps and with equal passes, and
on pairs of the policy's own samples. alphas: ODPO at the seven alphas of its paper's Fig. 6. temperatures: DPO's and ODPO's win
rates for every beta and sampling temperature. imitation: DPO against SFT on the best response, where that response is missing, where
only two mediocre ones are left, and where the order is noisy. pipeline: by which notebook 11's rates and strengths were chosen.
judges: the claims of notebook 11c on its own seeds and on new ones. Seeds 0 to 2 where no others are given; what was trained is kept.
"""

import argparse
import json
from dataclasses import replace
from unittest import mock

import nbformat
import numpy as np
import torch
from new_seeds import status

from pdpo import experiments
from pdpo.data import Preference, load_split, pairs
from pdpo.files import replacing, write_csv
from pdpo.plots import committed_figures_dir
from pdpo.preferences import gumbel_ranking
from pdpo.presets import PRESETS, Preset
from pdpo.runner import notebooks_dir
from pdpo.stages import runs_dir
from pdpo.statistics import frontier_rows, height_with_interval, with_interval

BETAS = (0.1, 0.3, 1.0)
RATES = (5e-5, 2e-4, 4e-4)
SIZES = (100, 400, None)  # pairs; None: all
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)


def on_validation(sft, **options):
    """One run, measured on validation prompts."""
    run = experiments.run_preference(sft, **options)
    few = replace(run, preset=replace(run.preset, num_samples=8))
    return experiments.run_win_rate(few, records=load_split(sft.preset.data)[1])


GRID = {  # the frontiers of notebooks 09 to 09c: what each asks of `run_preference`, and its rates
    "SLiC-HF, pull 0.1": ({"method": "slic"}, RATES),
    "SLiC-HF, pull 0": ({"method": "slic", "slic_weight": 0.0}, RATES),
    "DPO with SGD": ({"method": "dpo", "optimizer": "sgd"}, (0.01, 0.03, 0.1)),
    "DPO": ({"method": "dpo"}, RATES),
    "ODPO, alpha 0.5": ({"method": "odpo"}, RATES),
    "ODPO, alpha 1": ({"method": "odpo", "alpha": 1.0}, RATES),
    "control, alpha 0.5": ({"method": "odpo", "offset_scale": "mean"}, RATES),
}


def grid(sfts) -> list[dict]:
    """One row a method, rate and beta: KL and gold score on validation prompts, which row is a method's best, and how far the
    others lie below it, prompt by prompt."""
    keys = [(name, rate, beta) for name, (_, rates) in GRID.items() for rate in rates for beta in BETAS]
    settings = [
        {"sft": sft, **GRID[name][0], "lr": rate, "beta": beta, "num_evaluations": 0}
        for name, rate, beta in keys
        for sft in sfts
    ]
    measured = iter(experiments.run_all(on_validation, settings))
    stages = {key: [next(measured) for _ in sfts] for key in keys}
    scores = {key: np.array([each.column("score") for each in found]) for key, found in stages.items()}  # (seeds, prompts)
    rows = []
    for (name, rate, beta), found in stages.items():
        mine = scores[name, rate, beta]
        best = max((other for other in scores if other[0] == name), key=lambda other: scores[other].mean())
        row = {"method": name, "lr": rate, "beta": beta, **with_interval("kl", [each.column("kl") for each in found])}
        row |= with_interval("score", mine) | with_interval("above_best", mine - scores[best])
        rows.append(row | {"best": int((name, rate, beta) == best)})
    return rows


def sizes(sfts) -> list[dict]:
    """One row a source of pairs, size, budget, method and beta; with ODPO's height above DPO's at that source, size and budget,
    and at one beta ODPO less DPO. Own samples: four a prompt, graded by the truth (Amini 2024, arXiv:2402.10571, Eq. 17)."""
    preset = sfts[0].preset
    made = {"graded": {sft.seed: load_split(preset.data)[0] for sft in sfts}}
    made["sampled"] = {sft.seed: experiments.bootstrapped_rankings(sft, num_samples=4)[0] for sft in sfts}
    drawn = {
        source: {seed: pairs(each, num_per_prompt=preset.pairs_per_prompt, seed=seed) for seed, each in of_seed.items()}
        for source, of_seed in made.items()
    }
    counts = {source: round(np.mean([len(each) for each in of_seed.values()])) for source, of_seed in drawn.items()}
    keys = [("graded", size, "equal steps") for size in SIZES] + [("graded", size, "equal passes") for size in SIZES]
    keys += [("sampled", size, "equal steps") for size in SIZES]
    wanted = {}
    for source, size, budget in keys:
        steps = preset.preference.steps
        if budget == "equal passes" and size:
            steps = max(round(steps * size / counts[source]), 1)
        records = {seed: each[:size] for seed, each in drawn[source].items()}
        options = {"betas": BETAS, "records": records, "steps": steps, "num_evaluations": 0}
        wanted |= {(source, size, budget, method): {"method": method, **options} for method in ("dpo", "odpo")}
    frontiers = experiments.run_frontiers(sfts, wanted)
    rows = []
    for (source, size, budget, method), frontier in frontiers.items():
        dpo, odpo = (frontiers[source, size, budget, each] for each in ("dpo", "odpo"))
        found = height_with_interval(odpo, dpo)
        about = {
            "source": source,
            "pairs": size or counts[source],
            "budget": budget,
            "steps": frontier.stages[0].run.train.steps,
        }
        heights = {"odpo_over_dpo": found["height"]} | {f"odpo_over_dpo_{end}": found[end] for end in ("low", "high")}
        for i, row in enumerate(frontier_rows({method.upper(): frontier})):
            for key in ("score", "kl"):
                row |= with_interval(f"odpo_less_dpo_{key}", getattr(odpo, key)[:, i] - getattr(dpo, key)[:, i])
            rows.append(about | row | heights | {"kl_by_seed": " ".join(f"{each:.3f}" for each in frontier.kl[:, i].mean(1))})
    return rows


def alphas(sfts) -> list[dict]:
    """One row an alpha and beta: KL and score, and the alpha's height above DPO's frontier (alpha 0)."""
    alpha_of = {"DPO": 0.0} | {f"ODPO, alpha {alpha:g}": alpha for alpha in ALPHAS[1:]}
    wanted = {
        name: {"method": "odpo", "alpha": alpha, "betas": BETAS, "num_evaluations": 0} for name, alpha in alpha_of.items()
    }
    wanted["DPO"] = {"method": "dpo", "betas": BETAS}  # the notebooks' runs
    frontiers = experiments.run_frontiers(sfts, wanted)
    rows = []
    for name, frontier in frontiers.items():
        found = height_with_interval(frontier, frontiers["DPO"])
        heights = {f"over_dpo_{key}": found[key] for key in ("height", "low", "high")}
        rows += [{"alpha": alpha_of[name]} | row | heights for row in frontier_rows({name: frontier})]
    return rows


def temperatures(sfts) -> list[dict]:
    """One row a method, beta and temperature: SBERT win rate, and on the toy the gold score."""
    preset = sfts[0].preset
    asked = [{"sft": sft, "method": "sft", "beta": None} for sft in sfts]
    asked += [{"sft": sft, "method": name, "beta": beta} for name in ("dpo", "odpo") for beta in preset.betas for sft in sfts]
    settings = [each | {"temperature": temperature} for each in asked for temperature in preset.temperatures]
    found: dict[tuple, list] = {}
    for each, result in zip(settings, experiments.run_all(at_temperature, settings), strict=True):
        found.setdefault((each["method"].upper(), each["beta"], each["temperature"]), []).append(result)
    rows = []
    for (method, beta, temperature), stages in found.items():
        row = {"method": method, "beta": beta, "temperature": temperature}
        for key in ("win", "score") if preset.data == "toy" else ("win",):
            row |= with_interval(key, [each.column(key) for each in stages])
        rows.append(row)
    return rows


def at_temperature(sft, *, method, beta, temperature):
    run = sft if method == "sft" else experiments.run_preference(sft, method=method, beta=beta)
    return experiments.run_win_rate(run, temperature=temperature)


def in_world(name: str, record: Preference, generator: torch.Generator) -> Preference:
    """What a world holds of a training record; a ranking without scores."""
    responses = record.responses
    if name == "noisy order":  # Plackett-Luce of score / 3: the best response comes first in two prompts of three or so
        order = gumbel_ranking(torch.tensor(record.scores) / 3, generator=generator)
        responses = tuple(responses[i] for i in order)
    return Preference(record.prompt, {"best missing": responses[1:], "two mediocre": responses[1:3]}.get(name, responses))


def world(name: str, preset: Preset) -> Preset:
    """The preset on a file of what a world holds of the toy's training records, which is split anew: a policy learns from 85 % of
    them, and the toy's validation and test prompts are in none of the parts."""
    generator = torch.Generator().manual_seed(0)
    records = [in_world(name, each, generator) for each in load_split("toy")[0]]
    path = runs_dir() / "worlds" / f"{name.replace(' ', '_')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": each.prompt, "responses": each.responses}) for each in records]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    asked = {record.prompt for part in load_split("toy")[1:] for record in part}
    assert not asked & {record.prompt for record in load_split(path)[0]}
    return replace(preset, data=str(path))


def on_toy(run, *, validation: bool):
    """A run's policy on the toy's prompts, graded, whatever it was trained on."""
    graded = replace(run, preset=replace(run.preset, data="toy"))
    return experiments.run_win_rate(graded, records=load_split("toy")[1] if validation else None)


WORLDS = ("all four", "best missing", "two mediocre", "noisy order")
ARMS = {"DPO": BETAS, "imitation, then DPO": (0.3, 1.0, 5.0)}


def imitation(sfts) -> list[dict]:
    """One row a world and arm: SFT on all responses, SFT on the best of each prompt (imitation), and DPO from either, at the beta
    that scores best on the validation prompts with seed 20; score, share of right and of courteous answers, and the score over
    imitation's. Pairs are drawn from all that a world holds."""
    seeds, rows = [20, *(sft.seed for sft in sfts)], []
    worlds = {name: world(name, sfts[0].preset) for name in WORLDS}
    best_only = {name: replace(preset, sft_all_responses=False) for name, preset in worlds.items()}
    keys = [(name, arm, seed) for name in WORLDS for arm in ("SFT", "imitation") for seed in seeds]
    asked = [{"preset": (worlds if arm == "SFT" else best_only)[name], "seed": seed} for name, arm, seed in keys]
    runs = {(*key, None): run for key, run in zip(keys, experiments.run_all(experiments.run_sft, asked), strict=True)}
    keys = [(name, arm, seed, beta) for name in WORLDS for arm, betas in ARMS.items() for seed in seeds for beta in betas]
    asked = [
        {
            "sft": runs[name, "SFT" if arm == "DPO" else "imitation", seed, None],
            "method": "dpo",
            "beta": beta,
            "num_evaluations": 0,
        }
        for name, arm, seed, beta in keys
    ]
    runs |= dict(zip(keys, experiments.run_all(experiments.run_preference, asked), strict=True))
    tried = [key for key in runs if key[2] == 20]
    found = experiments.run_all(on_toy, [{"run": runs[key], "validation": True} for key in tried])
    scores = {key: float(each.column("score").mean()) for key, each in zip(tried, found, strict=True)}
    chosen = {}
    for name, arm, _, _ in tried:
        mine = {beta: score for (of, method, _, beta), score in scores.items() if (of, method) == (name, arm)}
        chosen[name, arm] = max(mine, key=mine.__getitem__)
    keys = [(*key, seed, beta) for key, beta in chosen.items() for seed in seeds[1:]]
    found = experiments.run_all(on_toy, [{"run": runs[key], "validation": False} for key in keys])
    stages: dict[tuple, list] = {}
    for (name, arm, _, _), stage in zip(keys, found, strict=True):
        stages.setdefault((name, arm), []).append(stage)
    for (name, arm), of in stages.items():
        row = {"world": name, "arm": arm, "beta": chosen[name, arm] or ""}
        for key in ("score", "correct", "courteous"):
            row |= with_interval(key, [each.column(key) for each in of])
        pairs_of = zip(of, stages[name, "imitation"], strict=True)
        rows.append(row | with_interval("over_imitation", [a.column("score") - b.column("score") for a, b in pairs_of]))
    return rows


def pipeline(sfts) -> list[dict]:
    """Four tries for each method of notebook 11, on validation prompts; the best score at a KL below 5 chooses."""
    two = [{"lr": lr} for lr in (2e-4, 1e-3)]
    tries = {method: [each | {"beta": beta} for each in two for beta in (0.1, 0.3)] for method in ("dpo", "odpo")}
    tries |= {method: [{"lr": lr, "beta": beta} for lr in (3e-4, 1e-3) for beta in (0.05, 0.2)] for method in ("ppo", "rloo")}
    tries["unlikelihood"] = [each | {"beta": None, "unlikelihood_weight": weight} for each in two for weight in (0.1, 0.5)]
    tries["preferred-ft"] = [{"beta": None, "lr": lr} for lr in (2e-4, 1e-3, 3e-3, 6e-3)]
    experiments.run_all(experiments.run_oracle, [{"sft": sft} for sft in sfts])  # of which several runs have need
    wanted = [(method, each) for method, of_method in tries.items() for each in of_method]
    settings = [{"sft": sft, "method": method, "num_evaluations": 1, **each} for method, each in wanted for sft in sfts]
    measured = iter(experiments.run_all(on_validation, settings))
    rows = []
    for method, each in wanted:
        stages = [next(measured) for _ in sfts]
        row = {"method": method, "beta": "", "unlikelihood_weight": ""} | {key: each[key] or "" for key in each}
        rows.append(row | {key: float(np.mean([stage.column(key) for stage in stages])) for key in ("kl", "score", "correct")})
    for row in rows:
        near = [other for other in rows if other["method"] == row["method"] and other["kl"] < 5]
        row["chosen"] = int(row is max(near, key=lambda other: other["score"]))
    return rows


def judges(sfts) -> list[dict]:
    """One row a claim of notebook 11c, whose cells are run with its own seeds and with these, up to the one that lists the claims."""
    preset, found = sfts[0].preset, []
    cells = nbformat.read(notebooks_dir() / "11c_judges.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code" and "google.colab" not in cell.source]
    last = next(i for i, source in enumerate(code) if "claims = {" in source)
    for seeds in (preset.seeds, tuple(sft.seed for sft in sfts)):
        space: dict = {}
        with mock.patch.dict(PRESETS, {preset.name: replace(preset, seeds=seeds)}):
            for source in code[: last + 1]:
                exec(source, space)
        found.append(space["claims"])
    old, new = found
    rows = []
    for claim in old:
        published, repeated = ("{:+.2f} [{:+.2f}, {:+.2f}]".format(*each[claim]) for each in found)
        rows.append({"claim": claim, "published": published, "repeated": repeated, "status": status(old[claim], new[claim])})
    return rows


STUDIES = {each.__name__: each for each in (grid, sizes, alphas, temperatures, imitation, pipeline, judges)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the preset's, 0 to 2")
    options = parser.parse_args()
    preset = experiments.start(options.preset)
    seeds = options.seeds or preset.seeds
    sfts = experiments.run_all(experiments.run_sft, [{"preset": preset, "seed": seed} for seed in seeds])
    for name in options.studies:
        rows = STUDIES[name](sfts)
        target = committed_figures_dir() / preset.name / ("11c_claims.csv" if name == "judges" else f"study_{name}.csv")
        with replacing(target) as temporary:
            write_csv(temporary, rows)
        print(f"{target}: {len(rows)} rows")


if __name__ == "__main__":
    main()
