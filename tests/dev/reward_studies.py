"""The studies of notebook 11b, which take too long for it; it draws and prints what this writes into figures/PRESET.

    python tests/dev/reward_studies.py overoptimisation details rudeness    # some minutes each, on one core
    python tests/dev/reward_studies.py overoptimisation details rudeness --new

overoptimisation: PPO and RLOO with hardly a brake, measured along the way, with one reward model and with the smallest score of
three, and best-of-N. details: PPO with single details switched. rudeness: DPO and ODPO on pairs of the policy's own samples,
ordered and offset by a classifier of rudeness alone (ODPO's Fig. 3). Each writes study_NAME.csv, of seeds 0 to 2, and its verdicts
into 11b_claims.csv; with --new it repeats the verdicts on seeds 21 to 23, which chose nothing. PPO's rate is notebook 11's; the beta
of 0.001 and the number of steps were chosen with seed 20 on validation prompts.
"""

import argparse
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from new_seeds import status
from torch.nn.functional import binary_cross_entropy_with_logits

from pdpo import experiments, toy
from pdpo.data import Preference, load_split
from pdpo.encoding import encode_records
from pdpo.evaluation import last_hidden, sequence_kl, toy_grades
from pdpo.exact import best_of_n_bound
from pdpo.files import replacing, write_csv
from pdpo.plots import committed_figures_dir, committed_rows
from pdpo.results import Run
from pdpo.rl import train_online
from pdpo.sampling import sample
from pdpo.statistics import Frontier, best_of, bootstrap_interval, height_between, resampled, with_interval

PUBLISHED, NEW = (0, 1, 2), (21, 22, 23)
STEPS, EVERY = 42, 3
LONG = {"method": "ppo", "beta": 0.001, "steps": STEPS, "num_evaluations": STEPS // EVERY}
ARMS = {  # what differs from it
    "PPO": {},
    "PPO, smallest of three": {"num_models": 3},
    "PPO, beta 0.05": {"beta": 0.05},
    "RLOO": {"method": "rloo"},
}
SIZES = (1, 2, 4, 8, 16, 32, 64)
train_records, validation, test = load_split("toy")


def measured(policy, sft: Run, *, score=None, num_samples: int, records=test) -> dict[str, np.ndarray]:
    """(prompts,) of each measure: means over a prompt's samples."""
    prompts = [record.prompt for record in records]
    samples = sample(
        policy, sft.load_tokenizer(), prompts, temperature=1.0, max_new_tokens=sft.preset.max_new_tokens, seed=sft.seed,
        num_samples=num_samples,
    )  # fmt: skip
    found = toy_grades(samples) | {"kl": sequence_kl(policy, sft.load_policy(), samples).exact.numpy()}
    if score:
        found["learned"] = score(samples).numpy()
    return {key: values.reshape(len(prompts), -1).mean(1) for key, values in found.items()}


def ensemble(sft: Run) -> list:
    """Three reward models of the same pairs: weights of the head and order of the pairs differ."""
    return [experiments.run_oracle(sft, seed=sft.seed + more) for more in (0, 100, 200)]


SCORERS: dict[Path, list] = {}  # of an SFT run, one a reward model: each is read and normalised once


def scorer(sft: Run, num_models: int):
    """As `score_of` the first models of the ensemble."""
    if sft.path not in SCORERS:
        SCORERS[sft.path] = [experiments.score_of([model], train_records) for model in ensemble(sft)]
    return lambda samples: torch.stack([score(samples) for score in SCORERS[sft.path][:num_models]]).min(0).values


def long_run(sft: Run, *, num_models: int = 1, records=test, **changes) -> dict[str, np.ndarray]:
    """(1 + measurements, prompts) of each measure, along one run."""
    config = replace(sft.preset.online, seed=sft.seed, **LONG | changes)
    score, curve = scorer(sft, num_models), []
    train_online(
        sft.load_policy(), sft.load_policy(), sft.load_tokenizer(), [record.prompt for record in train_records], score, config,
        max_new_tokens=sft.preset.max_new_tokens,
        measure=lambda policy: curve.append(measured(policy, sft, score=score, num_samples=2, records=records)) or {},
    )  # fmt: skip
    return {key: np.stack([each[key] for each in curve]) for key in curve[0]}


def best_of_sft(sft: Run, *, num_models: int) -> dict[str, np.ndarray]:
    """(sizes, prompts) of the best of N samples of SFT by the reward models; its KL is the bound."""
    prompts = [record.prompt for record in test]
    samples = sample(
        sft.load_policy(), sft.load_tokenizer(), prompts, temperature=1.0, max_new_tokens=sft.preset.max_new_tokens,
        seed=sft.seed, num_samples=SIZES[-1],
    )  # fmt: skip
    each = {(one.prompt, one.text, one.finished): one for one in samples}  # a text is often said twice
    score = scorer(sft, num_models)
    known = dict(zip(each, score(list(each.values())).tolist(), strict=True))
    grades = toy_grades(samples) | {"learned": np.array([known[one.prompt, one.text, one.finished] for one in samples])}
    grades = {key: values.reshape(len(prompts), -1) for key, values in grades.items()}
    found = {key: np.stack([best_of(values, n, by=grades["learned"]) for n in SIZES]) for key, values in grades.items()}
    return found | {"kl": np.broadcast_to([[best_of_n_bound(n)] for n in SIZES], found["score"].shape)}


def of_seeds(runs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([run[key] for run in runs]) for key in runs[0]}  # (seeds, ..., prompts)


def frontier(found: dict[str, np.ndarray]) -> Frontier:
    return Frontier(tuple(range(found["kl"].shape[1])), found["kl"], found["score"])


def difference(values: np.ndarray) -> tuple[float, float, float]:
    """Of (seeds, prompts) paired differences: mean and interval."""
    return float(values.mean()), *bootstrap_interval(values)


def compared(measure, *frontiers: Frontier) -> tuple[float, float, float]:
    """A statistic of frontiers' points, with its interval."""
    values = resampled(lambda points: measure(*points), list(frontiers))
    return float(measure(*(each.points() for each in frontiers))), *map(float, np.nanquantile(values, [0.025, 0.975]))


def since_peak(found: dict[str, np.ndarray], key: str) -> np.ndarray:
    """(seeds, prompts) of key at the last point less at the gold score's peak, which the other half of the prompts locates."""
    halves = np.arange(found["score"].shape[-1]) % 2
    parts = np.empty((len(found["score"]), len(halves)))
    for half in (0, 1):
        peak = found["score"][..., halves != half].mean((0, 2)).argmax()
        parts[:, halves == half] = (found[key][:, -1] - found[key][:, peak])[:, halves == half]
    return parts


def kl_at_peak(points) -> float:
    return float(points[0][points[1].argmax()])


def overoptimisation(sfts: list[Run]) -> tuple[list[dict], dict[str, tuple]]:
    found = {name: of_seeds([long_run(sft, **arm) for sft in sfts]) for name, arm in ARMS.items()}
    for name, num_models in (("best-of-N", 1), ("best-of-N, smallest of three", 3)):
        found[name] = of_seeds([best_of_sft(sft, num_models=num_models) for sft in sfts])
    rows, lines = [], {name: frontier(each) for name, each in found.items()}
    for name, each in found.items():
        places = SIZES if "best-of-N" in name else range(0, STEPS + 1, EVERY)
        for i, place in enumerate(places):
            row = {"method": name, "step_or_n": place}
            for key in ("kl", "score", "learned", "correct", "courteous", "degenerate"):
                row |= with_interval(key, each[key][:, i])
            by_seed = {f"{key}_{s}": float(each[key][s, i].mean()) for key in ("kl", "score") for s in range(len(sfts))}
            rows.append(row | by_seed)
    claims = {}
    for name in found:
        claims[f"{name}: gold score, last less at its peak"] = difference(since_peak(found[name], "score"))
        claims[f"{name}: learned reward, last less at the gold score's peak"] = difference(since_peak(found[name], "learned"))
        claims[f"{name}: KL at the gold score's peak"] = compared(kl_at_peak, lines[name])
    for name in list(ARMS)[1:]:
        for low, high in ((0, 3), (3, 12)):
            within = partial(height_between, within=(low, high))
            claims[f"{name} over PPO: gold score at equal KL, {low} to {high}"] = compared(within, lines[name], lines["PPO"])
        claims[f"{name} less PPO: KL at the gold score's peak"] = compared(
            lambda one, other: kl_at_peak(one) - kl_at_peak(other), lines[name], lines["PPO"]
        )
        claims[f"{name} less PPO: gold score, last"] = difference(found[name]["score"][:, -1] - found["PPO"]["score"][:, -1])
    one, three = found["best-of-N"]["score"], found["best-of-N, smallest of three"]["score"]
    for n in (4, 16, 64):
        i = SIZES.index(n)
        claims[f"best of {n}, smallest of three less one reward model: gold score"] = difference(three[:, i] - one[:, i])
    claims["best-of-N: gold score at 64 less at 16"] = difference(one[:, -1] - one[:, SIZES.index(16)])
    return rows, claims


DETAILS = {  # PPO of notebook 11, and what differs from it
    "default": {},
    "advantages not whitened": {"whiten": False},
    "values not clipped": {"value_clip": None},
    "KL in the loss": {"kl_in": "loss"},
}


def details(sfts: list[Run]) -> tuple[list[dict], dict[str, tuple]]:
    keys, found = ("score", "learned", "kl", "correct"), {}
    for name, changes in DETAILS.items():
        runs = []
        for sft in sfts:
            run = experiments.run_online(sft, **{"method": "ppo", "beta": 0.05} | changes)
            runs.append(measured(run.load_policy(), sft, score=scorer(sft, 1), num_samples=16))
        found[name] = of_seeds(runs)
    rows, claims = [], {}
    for name, each in found.items():
        default = found["default"]
        row = {"variant": name}
        for key in keys:
            row |= with_interval(key, each[key]) | with_interval(f"{key}_less_default", each[key] - default[key])
            if each is not default:
                claims[f"{name} less default: {key}"] = difference(each[key] - default[key])
        rows.append(row)
    return rows, claims


BETAS, NUM_PAIRS = (0.05, 0.5, 2.0), (400, None)
RUDE_LR = 1e-4  # of three with seed 20 on validation prompts: at 2e-4 nobody is rude any more, at 5e-5 little has moved


def manners(sft: Run):
    """A function of encoded responses, [[...], ...], to 1 - p(rude), by logistic regression on the SFT policy's last hidden state."""
    policy, texts = sft.load_policy(), encode_records(sft.load_tokenizer(), train_records)
    features = last_hidden(policy, texts).double()  # (records, 4, D)
    rude = torch.tensor([[toy.grade(each.prompt, text).tone == "rude" for text in each.responses] for each in train_records])
    mean, scale = features.mean((0, 1)), features.flatten(0, 1).std(0).clamp(min=1e-6)
    weights = torch.zeros(features.shape[-1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def logits(features):
        return (features - mean) / scale @ weights[1:] + weights[0]

    def closure():
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(logits(features), rude.double()) + 1e-3 * weights[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda encoded: logits(last_hidden(policy, encoded).double()).neg().sigmoid().detach()


def own_pairs(sft: Run, polite) -> list[Preference]:
    """Two pairs a prompt of the policy's own samples, the better first by the classifier; a text beside itself is no pair."""
    prompts = [record.prompt for record in train_records]
    samples = sample(
        sft.load_policy(), sft.load_tokenizer(), prompts, temperature=1.0, max_new_tokens=sft.preset.max_new_tokens,
        seed=sft.seed, num_samples=4,
    )  # fmt: skip
    scores, made = polite([[each.encoded] for each in samples])[:, 0].tolist(), []
    for i in range(0, len(samples), 2):
        (one, better), (other, worse) = sorted(((scores[j], samples[j].text) for j in (i, i + 1)), reverse=True)
        if better != worse and better and worse and one != other:
            made.append(Preference(samples[i].prompt, (better, worse), (one, other)))
    random.Random(sft.seed).shuffle(made)
    return made


def rudeness(sfts: list[Run]) -> tuple[list[dict], dict[str, tuple]]:
    """Its alpha of 1, the ends of its betas and a larger one; "clear pairs" are those whose scores differ by more than 1/2."""
    judges = {sft.seed: manners(sft) for sft in sfts}
    made = {sft.seed: own_pairs(sft, judges[sft.seed]) for sft in sfts}
    start = of_seeds([measured(sft.load_policy(), sft, num_samples=8) for sft in sfts])
    rows, lines = [], {}
    for size in NUM_PAIRS:
        for name in ("DPO", "ODPO") if size else ("DPO", "ODPO", "DPO, clear pairs"):
            stages = []
            for sft in sfts:
                records = made[sft.seed][:size]
                if "clear" in name:
                    records = [pair for pair in records if pair.scores[0] - pair.scores[1] > 0.5]
                options = {
                    "method": name.split(",")[0].lower(),
                    "alpha": 1.0,
                    "records": records,
                    "num_evaluations": 1,
                    "lr": RUDE_LR,
                }
                runs = [experiments.run_preference(sft, beta=beta, **options) for beta in BETAS]
                each = [measured(run.load_policy(), sft, num_samples=8) for run in runs]
                stages.append({key: np.stack([one[key] for one in each]) for key in each[0]} | {"pairs": len(records)})
            num_pairs = np.mean([stage.pop("pairs") for stage in stages])
            found = of_seeds(stages)
            lines[name, size] = Frontier(BETAS, found["kl"], found["rude"])
            for i, beta in enumerate(BETAS):
                row = {"method": name, "size": size or "all", "pairs": num_pairs, "beta": beta}
                for key in ("kl", "rude", "score", "correct", "degenerate"):
                    row |= with_interval(key, found[key][:, i]) | with_interval(f"{key}_of_sft", start[key])
                rows.append(row)
    claims, of_size = {}, {400: "400 pairs", None: "all pairs"}
    for size, told in of_size.items():
        dpo = lines["DPO", size]
        for name in ("ODPO",) if size else ("ODPO", "DPO, clear pairs"):
            line = lines[name, size]
            claims[f"{told}: {name} less DPO, share of rude answers at equal KL"] = compared(height_between, line, dpo)
            claims[f"{told}: {name} less DPO, KL at an equal share of rude answers"] = compared(
                lambda one, other: height_between(one[::-1], other[::-1]), line, dpo
            )
            for i, beta in enumerate(BETAS):
                for key in ("kl", "score"):
                    what = {"kl": "KL", "score": "share of rude answers"}[key]
                    values = getattr(line, key)[:, i] - getattr(dpo, key)[:, i]
                    claims[f"{told}: {name} less DPO at beta {beta:g}, {what}"] = difference(values)
    claims["all pairs: ODPO less DPO on clear pairs, share of rude answers at equal KL"] = compared(
        height_between, lines["ODPO", None], lines["DPO, clear pairs", None]
    )
    four = [lines[name, size] for size in of_size for name in ("ODPO", "DPO")]
    claims["400 pairs less all: ODPO less DPO, share of rude answers at equal KL"] = compared(
        lambda a, b, c, d: height_between(a, b) - height_between(c, d), *four
    )
    return rows, claims


STUDIES = {each.__name__: each for each in (overoptimisation, details, rudeness)}


def as_text(values: tuple) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)


def as_numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.replace("[", "").replace("]", "").replace(",", "").split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--new", action="store_true", help="only repeat the verdicts, on seeds 21 to 23")
    options = parser.parse_args()
    preset = experiments.start(options.preset)
    folder, column = committed_figures_dir() / preset.name, "repeated" if options.new else "published"
    sfts = [experiments.run_sft(preset, seed=seed) for seed in (NEW if options.new else PUBLISHED)]
    for name in options.studies:
        rows, claims = STUDIES[name](sfts)
        claims = {
            claim: values for claim, values in claims.items() if np.isfinite(values).all()
        }  # else no range of KL is shared
        known = committed_rows(f"{preset.name}/11b_claims", command="python tests/dev/reward_studies.py")
        mine = {row["claim"]: row for row in known if row["study"] == name}
        table = [row for row in known if row["study"] != name]
        for claim, values in claims.items():
            row = {"study": name, "claim": claim, "published": "", "repeated": ""}
            row |= {key: mine[claim][key] for key in row if claim in mine} | {column: as_text(values)}
            both = row["published"] and row["repeated"]
            status_of = status(as_numbers(row["published"]), as_numbers(row["repeated"])) if both else "not repeated yet"
            table.append(row | {"status": status_of})
            print(f"{status_of:14} {claim:70} {row['published']}   {row['repeated']}", flush=True)
        for file, content in (("11b_claims", table), (f"study_{name}", rows))[: 1 if options.new else 2]:
            with replacing(folder / f"{file}.csv") as temporary:
                write_csv(temporary, content)


if __name__ == "__main__":
    main()
