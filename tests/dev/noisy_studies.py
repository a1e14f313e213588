"""The studies of notebook 10 that take too long to be made whenever it runs; it draws and prints what this writes.

    python tests/dev/noisy_studies.py claims wins steps      # figures/PRESET/10_claims.csv, study_wins.csv, study_steps.csv

claims: the notebook's verdicts on its own seeds and on five that chose nothing. wins: DRDO's meetings with the others, for splits of
the pairs (the paper's Table 1), and for three sizes of student at four temperatures (Table 2). steps: what DPO, e-DPO and DRDO gain
over SFT in runs of 15 to 60 steps (Fig. 4b). About a quarter of an hour in all on two cores after the notebook; what was trained is kept.
"""

import argparse
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cache

import numpy as np
from new_seeds import status

from pdpo import experiments, toy
from pdpo.data import Preference, load_split, pairs
from pdpo.evaluation import sequence_kl
from pdpo.files import replacing, write_csv
from pdpo.plots import committed_figures_dir
from pdpo.sampling import sample
from pdpo.statistics import bootstrap_interval, with_interval

TEMPERATURE, LEFT_OUT = 3.0, ("past", "alphabet")  # notebook 10, section 6, and so in what follows
PUBLISHED, NEW = (0, 1, 2), (10, 11, 12, 13, 14)
DRDO = {"method": "drdo", "drdo_alpha": 0.1, "drdo_gamma": 2.0, "num_evaluations": 3, "lr": 2e-4, "steps": 60}
CHOSEN = {  # by notebook 10, section 8, with seed 0 on validation prompts
    "DPO": {"method": "dpo", "beta": 0.1, "num_evaluations": 3, "lr": 1e-3, "steps": 60},
    "e-DPO": {"method": "edpo", "beta": 0.1, "num_evaluations": 3, "lr": 1e-3, "steps": 60},
    "DRDO": DRDO,
    "IPO, means": {"method": "ipo", "beta": 0.1, "mean_logps": True, "num_evaluations": 1, "lr": 2e-4, "steps": 60},
    "imitation": {"method": "orpo", "orpo_weight": 0.0, "num_evaluations": 1, "lr": 2e-4, "steps": 60},
    "DRDO, gamma 0": DRDO | {"drdo_gamma": 0.0, "num_evaluations": 1},
    "DRDO, gamma 5": DRDO | {"drdo_gamma": 5.0, "num_evaluations": 1},
    "DRDO, alpha 0": DRDO | {"drdo_alpha": 0.0, "num_evaluations": 1},
}
SIZES = {"half as wide": 32, "as in the notebook": 64, "twice as wide": 128}

family = {item.prompt: item.family for item in toy.items()}
train_records, validation, test = load_split("toy")
learnt = [record for record in train_records if family[record.prompt] not in LEFT_OUT]
asked = [record for record in test if family[record.prompt] not in LEFT_OUT]
asked += [record for record in validation + test if family[record.prompt] in LEFT_OUT]
is_out = np.array([family[record.prompt] in LEFT_OUT for record in asked])


@cache
def annotated(seed: int) -> tuple[list[Preference], np.ndarray]:
    """All pairs with the first annotator's label, and how many of the nine agree with the majority."""
    all_pairs = pairs(learnt)
    gaps = np.array([pair.scores[0] - pair.scores[1] for pair in all_pairs])
    votes = np.random.default_rng(seed).random((len(gaps), 9)) < (1 / (1 + np.exp(-gaps / TEMPERATURE)))[:, None]
    labelled = [
        Preference(pair.prompt, pair.responses[:: 1 if right else -1])
        for pair, right in zip(all_pairs, votes[:, 0], strict=True)
    ]
    return labelled, np.maximum(votes.sum(1), 9 - votes.sum(1))


def scores_of(oracle, records) -> np.ndarray:
    return np.array([record.scores for record in oracle.scored(records)])


def with_scores(records, scores) -> list[Preference]:
    """The pairs with the scores, (prompts, 4), of the learnt records' responses."""
    known = {
        (record.prompt, text): float(s)
        for record, row in zip(learnt, scores, strict=True)
        for text, s in zip(record.responses, row, strict=True)
    }
    return [replace(pair, scores=tuple(known[pair.prompt, text] for text in pair.responses)) for pair in records]


class World:
    """SFT runs of some seeds, their noisy pairs, and three oracles a seed with the scores that they give to what is learnt from."""

    def __init__(self, preset, seeds):
        self.sfts = experiments.run_all(experiments.run_sft, [{"preset": preset, "seed": seed} for seed in seeds])
        settings = [{"sft": sft, "records": annotated(sft.seed)[0]} for sft in self.sfts]
        for k in (1, 2):
            settings += [each | {"seed": each["sft"].seed + 10 * k, "num_evaluations": 1} for each in settings[: len(seeds)]]
        made = experiments.run_all(experiments.run_oracle, settings)
        self.oracles = [[made[i + k * len(seeds)] for k in range(3)] for i in range(len(seeds))]
        self.scores = [np.array([scores_of(each, learnt) for each in three]) for three in self.oracles]  # (3, prompts, 4)

    def trained(self, options: dict, *, sfts=None, keep=None, only: int | None = None, **changes):
        """A run for each seed.

        Args: sfts: students of another size. keep: for each seed which pairs. only: e-DPO's one oracle; None: the mean of three."""
        settings = []
        for i, sft in enumerate(self.sfts):
            records = annotated(sft.seed)[0]
            if options["method"] == "edpo":
                records = with_scores(records, self.scores[i].mean(0) if only is None else self.scores[i][only])
            elif options["method"] == "drdo" and (sfts or keep):
                records = with_scores(records, self.scores[i][0])  # else `run_preference` takes this very oracle
            if keep:
                records = [record for record, kept in zip(records, keep[i], strict=True) if kept]
            settings.append({"sft": (sfts or self.sfts)[i], "records": records, "num_evaluations": 1} | options | changes)
        return experiments.run_all(experiments.run_preference, settings)

    def judged(self, runs, *, num_samples=32, **options) -> dict[str, np.ndarray]:
        """ "gold": (seeds, prompts, samples) the scores of each run's answers; "oracle": (seeds, prompts, 8) those of its oracle,
        less what it gives to the best response of the data."""
        runs = [replace(run, preset=replace(run.preset, num_samples=num_samples, num_judged=0)) for run in runs]
        found = experiments.run_all(experiments.run_win_rate, [{"run": run, "records": asked} | options for run in runs])
        by_oracle = []
        for each, (oracle, *_) in zip(found, self.oracles, strict=True):
            texts = np.array([row["text"] or "." for row in each.rows], dtype=object).reshape(len(asked), -1)[:, :8]
            again = [Preference(record.prompt, (*some, record.responses[0])) for record, some in zip(asked, texts, strict=True)]
            scores = scores_of(oracle, again)
            by_oracle.append(scores[:, :-1] - scores[:, -1:])
        return {"gold": np.array([each.samples("score") for each in found]), "oracle": np.array(by_oracle)}


def pessimistic(world: World):
    """Of three students, each distilled from one oracle alone, the one that lies nearest to SFT by KL(SFT || student): Fisch 2024's
    pessimistic optimum, if each student fits its oracle exactly."""
    each = [world.trained(CHOSEN["e-DPO"], only=k) for k in range(3)]
    nearest = []
    for i, sft in enumerate(world.sfts):
        policy, tokenizer = sft.load_policy(), sft.load_tokenizer()
        prompts = [record.prompt for record in learnt[::4]]
        samples = sample(policy, tokenizer, prompts, temperature=1.0, max_new_tokens=sft.preset.max_new_tokens, seed=sft.seed)
        kl = [float(sequence_kl(policy, of_one[i].load_policy(), samples).exact.mean()) for of_one in each]
        nearest.append(each[int(np.argmin(kl))][i])
    return nearest


def claims(preset) -> list[dict]:
    """One row a verdict: the paired difference over the notebook's seeds and over new ones, and what became of it."""
    found = [_verdicts(World(preset, seeds)) for seeds in (PUBLISHED, NEW)]
    rows = []
    for claim in found[0]:
        shown = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*values[claim]) for values in found]
        rows.append({"claim": claim, "published": shown[0], "repeated": shown[1], "status": status(*(v[claim] for v in found))})
        print(f"{rows[-1]['status']:14} {claim:50} {shown[0]}   {shown[1]}", flush=True)
    return rows


def _verdicts(world: World) -> dict[str, tuple]:
    runs = {name: world.trained(options) for name, options in CHOSEN.items()}
    runs |= {"SFT": world.sfts, "e-DPO, pessimistic": pessimistic(world)}
    warm = {name: world.judged(of_name) for name, of_name in runs.items()}
    cold = {
        name: world.judged(runs[name], num_samples=8, temperature=0.2, top_p=0.8) for name in ("SFT", "DPO", "e-DPO", "DRDO")
    }
    found = {}
    for one, other in (("DRDO", "DPO"), ("DRDO", "e-DPO"), ("DRDO", "SFT"), ("DRDO", "imitation"), ("e-DPO", "DPO")):
        for where, some in (("", ~is_out), (", out of distribution", is_out)):
            for judge in ("gold", "oracle"):
                found[f"{one} over {other} by {judge}{where}"] = _difference(warm[one][judge], warm[other][judge], some)
    for other in ("SFT", "DPO", "e-DPO"):
        for judge in ("gold", "oracle"):
            name = f"DRDO over {other} by {judge}, temperature .2"
            found[name] = _difference(cold["DRDO"][judge], cold[other][judge], ~is_out)
    for one, other in (
        ("DRDO", "DRDO, gamma 0"),
        ("DRDO", "DRDO, gamma 5"),
        ("DRDO", "DRDO, alpha 0"),
        ("DRDO, alpha 0", "SFT"),
        ("IPO, means", "DRDO"),
        ("e-DPO, pessimistic", "e-DPO"),
    ):
        found[f"{one} over {other} by gold"] = _difference(warm[one]["gold"], warm[other]["gold"], ~is_out)
    return found


def _difference(one, other, some) -> tuple[float, float, float]:
    values = (one.mean(2) - other.mean(2))[:, some]
    return float(values.mean()), *bootstrap_interval(values)


def _wins(ours: dict, theirs: dict, some=~is_out) -> dict:
    """Columns gold, oracle: how often ours scores higher on the same noise; a tie counts a half."""
    row = {}
    for judge in ours:
        a, b = ours[judge][:, some], theirs[judge][:, some]
        row |= with_interval(judge, ((a > b) + 0.5 * (a == b)).mean(2))
    return row


def wins(preset) -> list[dict]:
    """One row a meeting of DRDO: with whom, trained on which pairs, how large the student, at which temperature."""
    world, rows = World(preset, PUBLISHED), []
    for split, keep in {"all": None, "easy": halves(world, easy=True), "hard": halves(world, easy=False)}.items():
        of = {name: world.judged(world.trained(CHOSEN[name], keep=keep)) for name in ("DPO", "e-DPO", "DRDO")}
        num_pairs = len(pairs(learnt)) if keep is None else int(np.mean([each.sum() for each in keep]))
        for other in ("DPO", "e-DPO"):
            for where, some in (("twelve families", ~is_out), ("two left out", is_out)):
                about = {"pairs": split, "num_pairs": num_pairs, "student": "as in the notebook", "temperature": 1.0}
                rows.append(about | {"prompts": where, "other": other} | _wins(of["DRDO"], of[other], some))
    for student, width in SIZES.items():
        sized = replace(preset, embedding=width)
        sfts = experiments.run_all(experiments.run_sft, [{"preset": sized, "seed": seed} for seed in PUBLISHED])
        sfts = None if width == preset.embedding else sfts
        runs = {name: world.trained(CHOSEN[name], sfts=sfts) for name in ("DPO", "e-DPO", "DRDO")}
        runs["SFT"] = sfts or world.sfts
        for temperature in (0.2, 0.5, 0.7, 0.9):
            of = {name: world.judged(each, num_samples=8, temperature=temperature, top_p=0.8) for name, each in runs.items()}
            for other in ("SFT", "DPO", "e-DPO"):
                about = {"pairs": "all", "num_pairs": len(pairs(learnt)), "student": student, "temperature": temperature}
                rows.append(about | {"prompts": "twelve families", "other": other} | _wins(of["DRDO"], of[other]))
    return rows


def halves(world: World, *, easy: bool) -> list[np.ndarray]:
    """For each seed, (pairs,) whether confidence and edit distance both lie above (easy), or both at or below, their medians."""
    words = [[text.split() for text in pair.responses] for pair in pairs(learnt)]
    distance = np.array([1 - SequenceMatcher(None, *both, autojunk=False).ratio() for both in words])
    far = distance > np.median(distance)
    kept = []
    for sft in world.sfts:
        confidence = annotated(sft.seed)[1]
        sure = confidence > np.median(confidence)
        kept.append(sure & far if easy else ~sure & ~far)
    return kept


def steps(preset) -> list[dict]:
    """One row a method and length of training (each a run of its own, with its own schedule): gain over SFT by both judges."""
    world, rows = World(preset, PUBLISHED), []
    base = world.judged(world.sfts)
    for name in ("DPO", "e-DPO", "DRDO"):
        for num_steps in (15, 30, 60):
            changes = {} if num_steps == CHOSEN[name]["steps"] else {"steps": num_steps, "num_evaluations": 1}
            of = world.judged(world.trained(CHOSEN[name], **changes))
            row = {"method": name, "steps": num_steps}
            for judge in of:
                row |= with_interval(judge, (of[judge].mean(2) - base[judge].mean(2))[:, ~is_out])
            rows.append(row)
    return rows


STUDIES = {"claims": (claims, "10_claims"), "wins": (wins, "study_wins"), "steps": (steps, "study_steps")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    options = parser.parse_args()
    preset = experiments.start("tiny")  # the labels are drawn from the toy's gold scores
    for name in options.studies:
        study, file = STUDIES[name]
        rows = study(preset)
        with replacing(committed_figures_dir() / preset.name / f"{file}.csv") as temporary:
            write_csv(temporary, rows)
        print(f"{file}.csv: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
