"""The studies of notebook 11b, which take too long for it; it draws and prints what this writes into figures/PRESET.

    python tests/dev/reward_studies.py overoptimisation details rudeness    # some minutes each, on one core; also side by side
    python tests/dev/reward_studies.py overoptimisation details rudeness --new

overoptimisation: PPO and RLOO with hardly a brake, measured along the way, with one reward model and with the smallest score of
three, PPO at two larger betas, and best-of-N. details: PPO with single details switched, and the place of the KL with whitening
off, too. rudeness: DPO and ODPO on pairs of the policy's own samples, ordered and offset by a classifier of rudeness alone (ODPO's
Fig. 3). Each writes study_NAME.csv, of seeds 0 to 2, and its verdicts into 11b_claims.csv; with --new it repeats the verdicts on
seeds 21 to 23, which chose nothing: training anew, on the same test prompts. PPO's rate is notebook 11's; the beta of 0.001, the
number of steps and the rate of `rudeness` were chosen with seed 20 on validation prompts, in tries that were not kept.

Three verdicts are primary, named before any was repeated (`PRIMARY`): PPO's fall from its peak; the smallest of three reward models
over one at equal KL, expected not to be told apart; ODPO less DPO, share of rude answers at equal KL with all pairs. The others are
exploratory. No interval is adjusted for their number.
"""

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import filelock
import numpy as np
import torch
from new_seeds import status
from torch.nn.functional import binary_cross_entropy_with_logits

from pdpo import experiments, rl, toy
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
PRIMARY = (
    "PPO: gold score, last less at its peak",
    "PPO, smallest of three over PPO: gold score at equal KL, 0 to 3",
    "all pairs: ODPO less DPO, share of rude answers at equal KL",
)
STEPS, EVERY = 42, 3
LONG = {"method": "ppo", "beta": 0.001, "steps": STEPS, "num_evaluations": STEPS // EVERY}
ARMS = {  # what differs from it
    "PPO": {},
    "PPO, smallest of three": {"num_models": 3},
    "PPO, beta 0.05": {"beta": 0.05},
    "PPO, beta 0.3": {"beta": 0.3},
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
    """(1 + measurements, prompts) of each measure, along one run; "learned" is the first model's score, whatever trains."""
    config = replace(sft.preset.online, seed=sft.seed, **LONG | changes)
    score, first, curve = scorer(sft, num_models), scorer(sft, 1), []
    train_online(
        sft.load_policy(), sft.load_policy(), sft.load_tokenizer(), [record.prompt for record in train_records], score, config,
        max_new_tokens=sft.preset.max_new_tokens,
        measure=lambda policy: curve.append(measured(policy, sft, score=first, num_samples=2, records=records)) or {},
    )  # fmt: skip
    return {key: np.stack([each[key] for each in curve]) for key in curve[0]}


def best_of_sft(sft: Run, *, num_models: int) -> dict[str, np.ndarray]:
    """(sizes, prompts) of the best of N samples of SFT by the smallest of the models' rewards; "learned" is the first one's, and
    the KL is the bound."""
    prompts = [record.prompt for record in test]
    samples = sample(
        sft.load_policy(), sft.load_tokenizer(), prompts, temperature=1.0, max_new_tokens=sft.preset.max_new_tokens,
        seed=sft.seed, num_samples=SIZES[-1],
    )  # fmt: skip
    each = {(one.prompt, one.text, one.finished): one for one in samples}  # a text is often said twice
    by, first = (
        dict(zip(each, scorer(sft, num)(list(each.values())).tolist(), strict=True)) for num in (num_models, 1)
    )  # of each text, what is picked by and what is measured
    said = [(one.prompt, one.text, one.finished) for one in samples]
    grades = toy_grades(samples) | {"learned": np.array([first[one] for one in said])}
    grades = {key: values.reshape(len(prompts), -1) for key, values in grades.items()}
    picked = np.array([by[one] for one in said]).reshape(len(prompts), -1)
    found = {key: np.stack([best_of(values, n, by=picked) for n in SIZES]) for key, values in grades.items()}
    return found | {"kl": np.broadcast_to([[best_of_n_bound(n)] for n in SIZES], found["score"].shape)}


def of_seeds(runs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([run[key] for run in runs]) for key in runs[0]}  # (seeds, ..., prompts)


def frontier(found: dict[str, np.ndarray]) -> Frontier:
    return Frontier(tuple(range(found["kl"].shape[1])), found["kl"], found["score"])


class Claim(NamedTuple):
    """A difference, or where `estimate` a quantity that cannot lie below 0, with its 95 % interval."""

    value: float
    low: float
    high: float
    over: str = ""  # the range that a mean height was read over, and in how many draws there was none
    estimate: bool = False
    shared: str = "KL"  # what there is no range of where value or interval is nan

    def __str__(self) -> str:
        if not all(map(math.isfinite, self[:3])):
            return f"no shared {self.shared}"
        return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*self[:3])


def difference(values: np.ndarray) -> Claim:
    """Of (seeds, prompts) paired differences: mean and interval."""
    return Claim(float(values.mean()), *bootstrap_interval(values))


def compared(measure, *frontiers: Frontier, over: str = "", **about) -> Claim:
    """A statistic of frontiers' points, with its interval over the draws in which there is one."""
    values = resampled(lambda points: measure(*points), list(frontiers))
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    without = [f"none in {1 - len(known) / len(values):.1%} of draws"] if len(known) < len(values) else []
    over = "; ".join([over] * bool(over) + without)
    return Claim(float(measure(*(each.points() for each in frontiers))), float(low), float(high), over, **about)


def height(one: Frontier, other: Frontier, *, within: tuple[float, float] = (0.0, math.inf), axis: int = 0) -> Claim:
    """How much higher one frontier lies over the KL (axis 1: further to the right over the score) that both cover, and that range."""
    ends = [(line.points()[axis].min(), line.points()[axis].max()) for line in (one, other)]
    low, high = max(within[0], *(end[0] for end in ends)), min(within[1], *(end[1] for end in ends))

    def measure(points, others) -> float:
        return height_between(*(each[:: -1 if axis else 1] for each in (points, others)), within=within)

    digits = 3 if axis else 2
    over = f"{low:.{digits}f} to {high:.{digits}f}" if low < high else ""
    return compared(measure, one, other, over=over, shared="share" if axis else "KL")


def at_peak(found: dict[str, np.ndarray], key: str) -> np.ndarray:
    """(seeds, prompts) of key where the gold score is highest by the other seeds and the other half of the prompts."""
    values, halves = np.empty_like(found["score"][:, 0]), np.arange(found["score"].shape[-1]) % 2
    for s in range(len(values)):
        others = np.delete(found["score"], s, axis=0) if len(values) > 1 else found["score"]
        for half in (0, 1):
            peak = others[..., halves != half].mean((0, 2)).argmax()
            values[s, halves == half] = found[key][s, peak, halves == half]
    return values


def since_peak(found: dict[str, np.ndarray], key: str) -> np.ndarray:
    """(seeds, prompts) of key at the last point less `at_peak`: as peaks are located elsewhere, it may be above 0 for the score."""
    return found[key][:, -1] - at_peak(found, key)


def kl_at_peak(points) -> float:
    return float(points[0][points[1].argmax()])


def overoptimisation(sfts: list[Run]) -> tuple[list[dict], dict[str, Claim]]:
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
        claims[f"{name}: KL at the gold score's peak"] = compared(kl_at_peak, lines[name], estimate=True)
    ppo = found["PPO"]
    for key, what in (("correct", "right"), ("courteous", "courteous")):
        peak = at_peak(ppo, key)
        claims[f"PPO: share of {what} answers, at the gold score's peak less at the start"] = difference(peak - ppo[key][:, 0])
        claims[f"PPO: share of {what} answers, last less at the gold score's peak"] = difference(since_peak(ppo, key))
    for name in list(ARMS)[1:]:
        for low, high in ((0, 3), (3, 12)):
            claim = height(lines[name], lines["PPO"], within=(low, high))
            claims[f"{name} over PPO: gold score at equal KL, {low} to {high}"] = claim
        claims[f"{name} less PPO: KL at the gold score's peak"] = compared(
            lambda one, other: kl_at_peak(one) - kl_at_peak(other), lines[name], lines["PPO"]
        )
        claims[f"{name} less PPO: gold score, last"] = difference(found[name]["score"][:, -1] - ppo["score"][:, -1])
    claims["RLOO less PPO: gold score at its peak"] = difference(at_peak(found["RLOO"], "score") - at_peak(ppo, "score"))
    for name in ("PPO", "RLOO"):
        claims[f"best-of-N over {name}: gold score at equal KL"] = height(lines["best-of-N"], lines[name])
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
    "KL in the loss, not whitened": {"kl_in": "loss", "whiten": False},
}


def values_clipped(sft: Run) -> float:
    """The share of tokens' values that lie further than the clip from what they were at the sampling, over the default's updates."""
    counts, score, value_loss = np.zeros(2), scorer(sft, 1), rl.value_loss

    def counting(values, old_values, returns, *, clip):
        inside = returns != 0  # 0 past the end
        counts[:] += int(((values - old_values).abs() > clip)[inside].sum()), int(inside.sum())
        return value_loss(values, old_values, returns, clip=clip)

    with mock.patch.object(rl, "value_loss", counting):
        train_online(
            sft.load_policy(), sft.load_policy(), sft.load_tokenizer(), [record.prompt for record in train_records], score,
            replace(sft.preset.online, method="ppo", beta=0.05, seed=sft.seed), max_new_tokens=sft.preset.max_new_tokens,
        )  # fmt: skip
    return float(counts[0] / counts[1])


def details(sfts: list[Run]) -> tuple[list[dict], dict[str, Claim]]:
    keys, found = ("score", "learned", "kl", "correct"), {}
    for name, changes in DETAILS.items():
        runs = []
        for sft in sfts:
            run = experiments.run_online(sft, **{"method": "ppo", "beta": 0.05} | changes)
            runs.append(measured(run.load_policy(), sft, score=scorer(sft, 1), num_samples=16))
        found[name] = of_seeds(runs)
    rows, claims, clipped = [], {}, float(np.mean([values_clipped(sft) for sft in sfts]))
    for name, each in found.items():
        default = found["default"]
        row = {"variant": name, "values_clipped": clipped if each is default else ""}
        for key in keys:
            row |= with_interval(key, each[key]) | with_interval(f"{key}_less_default", each[key] - default[key])
            if each is not default:
                claims[f"{name} less default: {key}"] = difference(each[key] - default[key])
        rows.append(row)
    loss, plain = (found[f"KL in the loss{end}"] for end in ("", ", not whitened"))
    for key in keys:
        claims[f"KL in the loss, not whitened less whitened: {key}"] = difference(plain[key] - loss[key])
    return rows, claims


BETAS, NUM_PAIRS = (0.05, 0.5, 2.0), (400, None)
RUDE_LR = 1e-4  # of three with seed 20 on validation prompts: at 2e-4 nobody is rude any more, at 5e-5 little has moved
ARE_CLEAR = " on clear pairs"  # those whose scores differ by more than 1/2
DPO_CLEAR, ODPO_CLEAR, FEW_STEPS = "DPO" + ARE_CLEAR, "ODPO" + ARE_CLEAR, f"DPO{ARE_CLEAR}, equal passes"
RUDE_ARMS = {400: ("DPO", "ODPO"), None: ("DPO", "ODPO", DPO_CLEAR, ODPO_CLEAR, FEW_STEPS)}
RUDE_HEIGHTS = {  # at equal KL
    400: [("ODPO", "DPO")],
    None: [
        *((name, "DPO") for name in ("ODPO", DPO_CLEAR, ODPO_CLEAR, FEW_STEPS)),
        ("ODPO", DPO_CLEAR),
        ("ODPO", FEW_STEPS),
        (ODPO_CLEAR, DPO_CLEAR),
        (FEW_STEPS, DPO_CLEAR),
    ],
}


def is_rude(prompt: str, texts) -> list[bool]:
    return [toy.grade(prompt, text).tone == "rude" for text in texts]


def manners(sft: Run):
    """A function of encoded responses, [[...], ...], to 1 - p(rude), by logistic regression on the SFT policy's last hidden state."""
    policy, texts = sft.load_policy(), encode_records(sft.load_tokenizer(), train_records)
    features = last_hidden(policy, texts).double()  # (records, 4, D)
    rude = torch.tensor([is_rude(each.prompt, each.responses) for each in train_records])
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


def rude_records(sft: Run, made: list[Preference], name: str, size: int | None) -> tuple[list[Preference], int]:
    """What an arm trains on, and its steps: the preset's, or as many as see each pair as often as all pairs are seen in those."""
    records, steps = made[:size], sft.preset.preference.steps
    if ARE_CLEAR in name:
        clear = [pair for pair in records if pair.scores[0] - pair.scores[1] > 0.5]
        records, steps = clear, round(steps * len(clear) / len(records)) if name == FEW_STEPS else steps
    return records, steps


def rude_facts(sft: Run, polite, records: list[Preference], steps: int) -> dict[str, float]:
    """Of the pairs of an arm, and of the classifier."""
    rude = np.array([is_rude(pair.prompt, pair.responses) for pair in records])
    differ, truth = rude[:, 0] != rude[:, 1], np.array([is_rude(each.prompt, each.responses) for each in test])
    scores = polite(encode_records(sft.load_tokenizer(), test)).numpy()  # (records, 4), of the data's responses
    return {
        "pairs": len(records),
        "passes": steps * sft.preset.preference.batch_size / len(records),
        "differ_by_rule": float(differ.mean()),
        "of_these_in_order": float(rude[differ, 1].mean()),
        "held_out_accuracy": float(((scores < 0.5) == truth).mean()),
        "held_out_rude": float(truth.mean()),
    }


def rudeness(sfts: list[Run]) -> tuple[list[dict], dict[str, Claim]]:
    """Its alpha of 1, the ends of its betas and a larger one."""
    judges = {sft.seed: manners(sft) for sft in sfts}
    made = {sft.seed: own_pairs(sft, judges[sft.seed]) for sft in sfts}
    start = of_seeds([measured(sft.load_policy(), sft, num_samples=8) for sft in sfts])
    rows, lines, right = [], {}, {}
    for name, size in ((name, size) for size, names in RUDE_ARMS.items() for name in names):
        stages, facts = [], []
        for sft in sfts:
            records, steps = rude_records(sft, made[sft.seed], name, size)
            facts.append(rude_facts(sft, judges[sft.seed], records, steps))
            options = {"records": records, "steps": steps, "alpha": 1.0, "num_evaluations": 1, "lr": RUDE_LR}
            runs = [experiments.run_preference(sft, method=name.split()[0].lower(), beta=beta, **options) for beta in BETAS]
            each = [measured(run.load_policy(), sft, num_samples=8) for run in runs]
            stages.append({key: np.stack([one[key] for one in each]) for key in each[0]})
        found = of_seeds(stages)
        lines[name, size] = Frontier(BETAS, found["kl"], found["rude"])
        right[name, size] = found["correct"] - start["correct"][:, None]
        for i, beta in enumerate(BETAS):
            row = {"method": name, "size": size or "all", "beta": beta}
            row |= {key: float(np.mean([of[key] for of in facts])) for key in facts[0]}
            for key in ("kl", "rude", "score", "correct", "degenerate"):
                row |= with_interval(key, found[key][:, i]) | with_interval(f"{key}_of_sft", start[key])
            rows.append(row)
    return rows, rude_claims(lines, right)


def rude_claims(lines: dict[tuple, Frontier], right: dict[tuple, np.ndarray]) -> dict[str, Claim]:
    claims, of_size, columns = {}, {400: "400 pairs", None: "all pairs"}, {"KL": "kl", "share of rude answers": "score"}
    for size, told in of_size.items():
        dpo, odpo = lines["DPO", size], lines["ODPO", size]
        for one, other in RUDE_HEIGHTS[size]:
            line, base, claim = lines[one, size], lines[other, size], f"{told}: {one} less {other}"
            claims[f"{claim}, share of rude answers at equal KL"] = height(line, base)
            if other == "DPO":
                claims[f"{claim}, KL at an equal share of rude answers"] = height(line, base, axis=1)
            for i, beta in enumerate(BETAS if other == "DPO" and one in ("ODPO", DPO_CLEAR) else ()):
                for what, column in columns.items():
                    values = getattr(line, column)[:, i] - getattr(base, column)[:, i]
                    claims[f"{claim} at beta {beta:g}, {what}"] = difference(values)
        for what, column in columns.items():
            values = getattr(odpo, column)[:, BETAS.index(2.0)] - getattr(dpo, column)[:, BETAS.index(0.05)]
            claims[f"{told}: ODPO at beta 2 less DPO at beta 0.05, {what}"] = difference(values)
        for name in RUDE_ARMS[size]:
            for beta in (0.05, 2.0):
                claim = f"{told}: {name} at beta {beta:g} less SFT, share of right answers"
                claims[claim] = difference(right[name, size][:, BETAS.index(beta)])
    four = [lines[name, size] for size in of_size for name in ("ODPO", "DPO")]
    claims["400 pairs less all: ODPO less DPO, share of rude answers at equal KL"] = compared(
        lambda a, b, c, d: height_between(a, b) - height_between(c, d), *four
    )
    return claims


STUDIES = {each.__name__: each for each in (overoptimisation, details, rudeness)}


def as_numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.replace("[", "").replace("]", "").replace(",", "").split())


def status_of(row: dict, *, estimate: bool) -> str:
    """Of a row of the claims: the status of `new_seeds`, where both sets of seeds have a difference."""
    texts = [row["published"], row["repeated"]]
    if estimate:
        return "estimate"
    if any("no shared" in text for text in texts):
        return "no shared KL"
    return status(*map(as_numbers, texts)) if all(texts) else "not repeated yet"


COLUMNS = ("study", "claim", "primary", "published", "repeated", "published_over", "repeated_over", "status")


def entered(table: list[dict], name: str, claims: dict[str, Claim], column: str) -> list[dict]:
    """The table of claims with one study's in a column; what was published and is not among them stays where seeds are new."""
    mine = {row["claim"]: row for row in table if row["study"] == name}
    rows = [{key: row.get(key, "") for key in COLUMNS} for row in table if row["study"] != name]
    for claim in dict.fromkeys([*claims, *(mine if column == "repeated" else ())]):
        row = {key: mine.get(claim, {}).get(key, "") for key in COLUMNS}
        row |= {"study": name, "claim": claim, "primary": "primary" if claim in PRIMARY else ""}
        if claim in claims:
            row |= {column: str(claims[claim]), f"{column}_over": claims[claim].over}
            row["status"] = status_of(row, estimate=claims[claim].estimate)
        rows.append(row)
    return sorted(rows, key=lambda row: list(STUDIES).index(row["study"]))


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
        with filelock.FileLock(experiments.runs_dir() / "11b_claims.lock"):  # the studies may run side by side
            known = committed_rows(f"{preset.name}/11b_claims", command="python tests/dev/reward_studies.py")
            table = entered(known, name, claims, column)
            with replacing(folder / "11b_claims.csv") as temporary:
                write_csv(temporary, table)
        for row in table:
            if row["study"] == name:
                print(f"{row['status']:16} {row['published']:24} {row['repeated']:24} {row['claim']}", flush=True)
        if not options.new:
            with replacing(folder / f"study_{name}.csv") as temporary:
                write_csv(temporary, rows)


if __name__ == "__main__":
    main()
