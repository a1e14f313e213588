"""The studies of notebook 10 that take too long to be made whenever it runs; it draws and prints what this writes.

    python tests/dev/noisy_studies.py claims primary temperatures steps splits sizes grids lengths variants      # into figures/tiny

claims: the notebook's verdicts on its own seeds and on five that chose nothing (10_claims.csv). primary: DRDO over DPO on twenty
such seeds (10_primary.csv). temperatures: DRDO against the others at four temperatures (the paper's Table 2; study_wins.csv), and
what each gains there (Fig. 3; study_advantage.csv). sizes: Table 2 for students half and twice as wide (study_student_sizes.csv).
On both sets of seeds: steps, what DPO, e-DPO and DRDO gain over SFT in runs of 15 to 60 steps, all at the rate 2e-4 (Fig. 4b;
study_steps.csv); splits, DRDO against the others on easy and on hard pairs (Table 1; study_splits.csv); grids, DPO on the paper's
betas and DRDO on its alphas and gammas (Appendix D; study_noisy_grids.csv); lengths, IPO on sums and on means per token
(study_ipo_lengths.csv); variants, other forms of DRDO's second term (study_drdo_variants.csv). What was trained is kept; a study's
last line names its minutes.
"""

import argparse
import hashlib
import inspect
import itertools
import time
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
from new_seeds import status

from pdpo import experiments, toy, training
from pdpo.data import Preference, load_split, pairs
from pdpo.evaluation import sequence_kl
from pdpo.files import replacing, write_csv
from pdpo.losses import drdo_loss
from pdpo.plots import committed_figures_dir
from pdpo.sampling import sample
from pdpo.statistics import bootstrap_interval, with_interval

TEMPERATURE, LEFT_OUT = 3.0, ("past", "alphabet")  # notebook 10, section 6, and so in what follows
PUBLISHED, NEW = (0, 1, 2), (10, 11, 12, 13, 14)
LOW, HIGH = 2e-4, 1e-3
DPO = {"method": "dpo", "beta": 0.1, "num_evaluations": 3, "lr": LOW, "steps": 60}
EDPO = DPO | {"method": "edpo"}
DRDO = {"method": "drdo", "drdo_alpha": 0.1, "drdo_gamma": 2.0, "num_evaluations": 3, "lr": LOW, "steps": 60}
VARIANT = DRDO | {"num_evaluations": 1}
IPO = {"method": "ipo", "num_evaluations": 1, "steps": 60}
METHODS = {  # the first ten as notebook 10, section 8, chose them with seed 0 on validation prompts
    "DPO": DPO,
    "e-DPO": EDPO,
    "DRDO": DRDO,
    "IPO, means": IPO | {"beta": 0.1, "mean_logps": True, "lr": LOW},
    "IPO": IPO | {"beta": 0.1, "lr": LOW},
    "cDPO": DPO | {"label_smoothing": 0.3, "lr": HIGH, "num_evaluations": 1},
    "SimPO": {"method": "simpo", "simpo_scale": 2.0, "simpo_offset": 1.0, "num_evaluations": 1, "lr": LOW, "steps": 60},
    "ORPO": {"method": "orpo", "orpo_weight": 0.1, "num_evaluations": 1, "lr": LOW, "steps": 60},
    "KTO": {"method": "kto", "beta": 0.1, "num_evaluations": 1, "lr": LOW, "steps": 60},
    "imitation": {"method": "orpo", "orpo_weight": 0.0, "num_evaluations": 1, "lr": LOW, "steps": 60},
    "DPO at 1e-3": DPO | {"lr": HIGH},
    "DPO at 1e-3, all labels": DPO | {"lr": HIGH, "steps": 130, "num_evaluations": 1},
    "e-DPO at 1e-3": EDPO | {"lr": HIGH, "num_evaluations": 1},
    "gamma 0": VARIANT | {"drdo_gamma": 0.0},
    "gamma 5": VARIANT | {"drdo_gamma": 5.0},
    "distillation alone": VARIANT | {"drdo_alpha": 0.0},
    "contrast alone": VARIANT | {"drdo_alpha": 1000.0},  # beside which the distillation's weight is a thousandth
    "imitation on sums": VARIANT | {"drdo_alpha": 1000.0, "drdo_gamma": 0.0},  # but for -log(1 - pi_l), which is small
    "means, alpha 1": VARIANT | {"drdo_alpha": 1.0, "mean_logps": True},
}
SIZES = {"half as wide": 32, "twice as wide": 128}  # the notebook's is 64
LENGTHS = {  # a mean response has ten tokens or so: on means beta 1 asks for as many nats a response as 0.1 does on sums
    "sums, beta 0.1": IPO | {"beta": 0.1},
    "means, beta 0.1": IPO | {"beta": 0.1, "mean_logps": True},
    "means, beta 1": IPO | {"beta": 1.0, "mean_logps": True},
}


def weight_held(policy, reference, gamma):
    """Eq. 34: as printed, but that the focal weight is a constant for the gradient."""
    return -focal(*policy.unbind(1), gamma).detach() * (policy[:, 0] - log_not(policy[:, 1]))


def product(policy, reference, gamma):
    """Both responses by their logarithms: log pi(y_w) + log(1 - pi(y_l))."""
    return -focal(*policy.unbind(1), gamma) * (policy[:, 0] + log_not(policy[:, 1]))


def with_reference(policy, reference, gamma):
    """p_w compares log-ratios to the reference, as DPO's margin does."""
    return -focal(*(policy - reference).unbind(1), gamma) * (policy[:, 0] - log_not(policy[:, 1]))


def focal(chosen, rejected, gamma):
    return torch.sigmoid(rejected - chosen) ** gamma


def log_not(logps):
    """log(1 - pi), which on the toy stays clear of pi = 1."""
    return torch.log1p(-logps.exp().clamp(max=1 - 1e-6))


# forms of DRDO's second term, (B, 2) logps of policy and reference -> (B,), in units of alpha; "alone": alpha 1000
TERMS = {
    "weight held": (weight_held, 0.1),
    "weight held, alone": (weight_held, 1000.0),
    "product": (product, 0.1),
    "with a reference": (with_reference, 0.1),
}
VARIANTS = ("DRDO", *TERMS, "contrast alone")

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
    """SFT runs of some seeds, their noisy pairs, and the oracles of each seed with the scores that they give to what is learnt from.

    Args: keep: of each seed, (pairs,) which to learn from; None: all. num_oracles: a seed; DRDO learns from the first."""

    def __init__(self, preset, seeds, *, keep=None, num_oracles=3):
        self.sfts = experiments.run_all(experiments.run_sft, [{"preset": preset, "seed": seed} for seed in seeds])
        keep = keep or [np.ones(len(pairs(learnt)), bool)] * len(seeds)
        self.records = [[annotated(seed)[0][i] for i in np.flatnonzero(kept)] for seed, kept in zip(seeds, keep, strict=True)]
        settings = [{"sft": sft, "records": records} for sft, records in zip(self.sfts, self.records, strict=True)]
        for k in range(1, num_oracles):
            settings += [each | {"seed": each["sft"].seed + 10 * k, "num_evaluations": 1} for each in settings[: len(seeds)]]
        made = experiments.run_all(experiments.run_oracle, settings)
        self.oracles = [made[i :: len(seeds)] for i in range(len(seeds))]
        self.scores = [np.array([scores_of(each, learnt) for each in of_seed]) for of_seed in self.oracles]  # (K, prompts, 4)

    def trained(self, options: dict, *, only: int | None = None, **changes):
        """A run for each seed.

        Args: only: which oracle e-DPO learns from; None: the mean of all."""
        settings = []
        for sft, records, scores in zip(self.sfts, self.records, self.scores, strict=True):
            if options["method"] == "edpo":
                records = with_scores(records, scores.mean(0) if only is None else scores[only])
            settings.append({"sft": sft, "records": records} | options | changes)
        return experiments.run_all(experiments.run_preference, settings)

    def trained_on(self, term, alpha: float):
        """Runs of DRDO with another second term, in a group of their own, where no stage of the package's loss lies."""
        digest = hashlib.sha256("".join(map(inspect.getsource, (term, focal, log_not, _with_term))).encode()).hexdigest()
        runs = []
        for sft, records, (oracle, *_) in zip(self.sfts, self.records, self.oracles, strict=True):
            own = replace(sft, preset=replace(sft.preset, name=f"{sft.preset.name}-{term.__name__}-{digest[:6]}"))
            losses = _with_term(term, sft.load_policy())
            known = patch.object(experiments, "run_oracle", lambda *_, oracle=oracle, **__: oracle)
            with known, patch.object(training, "row_losses", losses):
                runs.append(experiments.run_preference(own, records=records, **VARIANT | {"drdo_alpha": alpha}))
        return runs

    def judged(self, runs, *, num_samples=32, **options) -> dict[str, np.ndarray]:
        """(seeds, prompts, samples) each: "gold", "correct", "courteous", "tokens" and, warm, "kl" of each run's answers;
        "oracle": its oracle's scores of the first eight, less that of the best response of the data."""
        warm = num_samples == 32  # as in the notebook, which has made some of these
        sizes = {"num_samples": num_samples, "num_judged": int(warm)}
        runs = [replace(run, preset=replace(run.preset, **sizes)) for run in runs]
        made = experiments.run_all(experiments.run_win_rate, [{"run": run, "records": asked} | options for run in runs])
        keys = {"gold": "score", "correct": "correct", "courteous": "courteous"} | ({"kl": "kl"} if warm else {})
        found = {key: np.array([each.samples(column) for each in made]) for key, column in keys.items()}
        by_oracle, tokens = [], []
        for each, (oracle, *_) in zip(made, self.oracles, strict=True):
            ids = each.run.sft.load_tokenizer()([row["text"] for row in each.rows], add_special_tokens=False)["input_ids"]
            ended = [row["finished"] for row in each.rows]  # with one token more
            tokens.append(np.array([len(own) + end for own, end in zip(ids, ended, strict=True)]).reshape(len(asked), -1))
            texts = np.array([row["text"] or "." for row in each.rows], dtype=object).reshape(len(asked), -1)[:, :8]
            again = [Preference(record.prompt, (*some, record.responses[0])) for record, some in zip(asked, texts, strict=True)]
            scores = scores_of(oracle, again)
            by_oracle.append(scores[:, :-1] - scores[:, -1:])
        return found | {"oracle": np.array(by_oracle), "tokens": np.array(tokens)}


def _with_term(term, reference):
    """`training.row_losses` for DRDO with another second term."""

    def row_losses(policy, rows, config, *, logps_of=None):
        logps, scores = training.scored_logps(policy, rows, precision=config.precision)  # (B, 2), (B, 2)
        with torch.no_grad():
            reference_logps = training.policy_logps(reference, rows) if term is with_reference else None
        wanted = torch.tensor([row.offset for row in rows])
        losses = (wanted - scores[:, 0] + scores[:, 1]) ** 2 + config.drdo_alpha * term(
            logps, reference_logps, config.drdo_gamma
        )
        chosen, rejected = scores.detach().unbind(1)
        measured = {"margin": chosen - rejected, "accuracy": (chosen > rejected).float()}
        measured |= {"chosen_logp": logps.detach()[:, 0], "rejected_logp": logps.detach()[:, 1]}
        return losses, measured

    return row_losses


def pessimistic(world: World):
    """Of three students, each distilled from one oracle alone, the one that lies nearest to SFT by KL(SFT || student): Fisch 2024's
    pessimistic optimum, if each student fits its oracle exactly."""
    each = [world.trained(EDPO | {"num_evaluations": 1}, only=k) for k in range(3)]
    nearest = []
    for i, sft in enumerate(world.sfts):
        policy, tokenizer = sft.load_policy(), sft.load_tokenizer()
        prompts = [record.prompt for record in learnt[::4]]
        samples = sample(policy, tokenizer, prompts, temperature=1.0, max_new_tokens=sft.preset.max_new_tokens, seed=sft.seed)
        kl = [float(sequence_kl(policy, of_one[i].load_policy(), samples).exact.mean()) for of_one in each]
        nearest.append(each[int(np.argmin(kl))][i])
    return nearest


JUDGES = ("gold", "oracle")
WARM = [  # at temperature 1; the first two are the paper's and this chapter's question, all else is exploratory
    ("DRDO", "DPO", JUDGES),
    ("DRDO", "e-DPO", JUDGES),
    ("DRDO", "e-DPO at 1e-3", JUDGES),
    ("DRDO", "SFT", (*JUDGES, "correct")),
    ("DRDO", "imitation", JUDGES),
    ("DRDO", "imitation on sums", JUDGES),
    ("IPO, means", "DRDO", (*JUDGES, "kl")),
    ("e-DPO", "DPO", (*JUDGES, "kl")),
    ("cDPO", "DPO", (*JUDGES, "correct", "kl")),
    ("IPO", "DPO", JUDGES),
    ("IPO, means", "DPO", JUDGES),
    ("KTO", "DPO", JUDGES),
    ("SimPO", "DPO", JUDGES),
    ("SimPO", "SFT", JUDGES),
    ("ORPO", "SFT", JUDGES),
    ("imitation", "SFT", JUDGES),
    ("e-DPO at 1e-3", "DPO at 1e-3", (*JUDGES, "kl", "correct")),
    ("e-DPO at 1e-3", "DPO at 1e-3, all labels", JUDGES),
    ("e-DPO", "e-DPO of one oracle", JUDGES),
    ("e-DPO of one oracle", "DPO", JUDGES),
    ("e-DPO, pessimistic", "e-DPO", (*JUDGES, "kl")),
    ("DPO at 1e-3", "DPO", (*JUDGES, "correct")),
    ("DPO", "SFT", ("correct",)),
    ("DPO at 1e-3", "SFT", ("correct",)),
    ("e-DPO", "cDPO", JUDGES),
    ("e-DPO", "SFT", ("correct", "courteous")),
    ("e-DPO at 1e-3", "SFT", ("correct", "courteous")),
    ("DRDO", "gamma 0", ("gold",)),
    ("DRDO", "gamma 5", ("gold",)),
    ("DRDO", "contrast alone", ("gold",)),
    ("contrast alone", "SFT", ("gold",)),
    ("imitation on sums", "SFT", ("gold",)),
    ("distillation alone", "SFT", ("gold",)),
    ("means, alpha 1", "SFT", ("gold",)),
]


def claims(preset) -> dict[str, list[dict]]:
    """One row a verdict: the paired difference over the notebook's seeds and over new ones, and what became of it."""
    old, new = _verdicts(World(preset, PUBLISHED)), _verdicts(World(preset, NEW), repeated=True)
    rows = []
    for claim, values in old.items():
        row = {"claim": claim, "published": _shown(values), "repeated": "", "status": "not run on new seeds"}
        if claim in new:
            row |= {"repeated": _shown(new[claim]), "status": status(values, new[claim])}
        rows.append(row)
        print("  ".join(row.values()), flush=True)
    return {"10_claims": rows}


def primary(preset) -> dict[str, list[dict]]:
    """DRDO over DPO, the paper's first comparison, on twenty seeds that chose nothing: five of `claims`, and fifteen more."""
    world, rows = World(preset, range(10, 30), num_oracles=1), []
    one, other = (world.judged(world.trained(METHODS[name], num_evaluations=1)) for name in ("DRDO", "DPO"))
    for judge in JUDGES:
        for where, some in (("twelve families", ~is_out), ("two left out", is_out)):
            value, low, high = _difference(one[judge], other[judge], some)
            rows.append({"judge": judge, "prompts": where, "difference": value, "low": low, "high": high})
            print(rows[-1], flush=True)
    return {"10_primary": rows}


def _shown(values: tuple) -> str:
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*values)


def _verdicts(world: World, *, repeated: bool = False) -> dict[str, tuple]:
    """claim -> (value, low, high). repeated: without what is watched along the way and without the pessimistic e-DPO, to save time."""
    few = {"num_evaluations": 1} if repeated else {}
    runs = {name: world.trained(options, **few) for name, options in METHODS.items()}
    of_one = world.trained(EDPO | {"num_evaluations": 1}, only=0)
    runs |= {"SFT": world.sfts, "e-DPO of one oracle": of_one}
    if not repeated:
        runs["e-DPO, pessimistic"] = pessimistic(world)
    warm = {name: world.judged(of_name) for name, of_name in runs.items()}
    found = {}
    for one, other, judges in WARM:
        for judge in judges if one in runs else ():
            found[f"{one} over {other}, {judge}"] = _difference(warm[one][judge], warm[other][judge], ~is_out)
            if judge in JUDGES and other in ("DPO", "e-DPO", "SFT"):
                found[f"{one} over {other}, {judge}, left out"] = _difference(warm[one][judge], warm[other][judge], is_out)
    for temperature in (0.2, 0.9):
        options = {"num_samples": 8, "temperature": temperature, "top_p": 0.8}
        cold = {name: world.judged(runs[name], **options) for name in ("SFT", "DPO", "e-DPO", "DRDO")}
        for other in ("SFT", "DPO", "e-DPO"):
            for judge in JUDGES:
                found[f"DRDO over {other}, {judge}, temperature {temperature:g}"] = _difference(
                    cold["DRDO"][judge], cold[other][judge], ~is_out
                )
    return found


def _difference(one, other, some) -> tuple[float, float, float]:
    values = (one.mean(2) - other.mean(2))[:, some]
    return float(values.mean()), *bootstrap_interval(values)


def _wins(ours: dict, theirs: dict, some) -> dict:
    """Columns gold, oracle: how often ours scores higher on the same noise; a tie counts a half."""
    row = {}
    for judge in JUDGES:
        a, b = ours[judge][:, some], theirs[judge][:, some]
        row |= with_interval(judge, ((a > b) + 0.5 * (a == b)).mean(2))
    return row


def splits(preset) -> dict[str, list[dict]]:
    """Table 1: DRDO's wins by what is trained on, easy or hard pairs. e-DPO learns from the one oracle that DRDO learns from, which has
    seen these pairs alone; the judge is the oracle of all."""
    met = []
    for seeds, split in itertools.product((PUBLISHED, NEW), ("easy", "hard")):
        world = World(preset, seeds, num_oracles=1)
        of_split = World(preset, seeds, keep=easy_or_hard(seeds, easy=split == "easy"), num_oracles=1)
        runs = {name: of_split.trained(METHODS[name], num_evaluations=1) for name in ("DPO", "e-DPO", "DRDO")}
        of = {name: world.judged(of_name) for name, of_name in runs.items()}
        for other in ("DPO", "e-DPO"):
            for where, some in (("twelve families", ~is_out), ("two left out", is_out)):
                about = {"seeds": named(seeds), "pairs": split}
                about |= {"num_pairs": round(np.mean([len(each) for each in of_split.records]))}
                met.append(about | {"prompts": where, "other": other} | _wins(of["DRDO"], of[other], some))
                print(met[-1], flush=True)
    return {"study_splits": met}


def temperatures(preset) -> dict[str, list[dict]]:
    """Table 2 and Fig. 3 for students of the notebook's size."""
    met, gained = _by_temperature(World(preset, PUBLISHED), "as in the notebook")
    return {"study_wins": met, "study_advantage": gained}


def sizes(preset) -> dict[str, list[dict]]:
    """Table 2 for other sizes of student, each with one oracle of its size for all, the judge, too."""
    met = []
    for student, width in SIZES.items():
        met += _by_temperature(World(replace(preset, embedding=width), PUBLISHED, num_oracles=1), student)[0]
    return {"study_student_sizes": met}


def _by_temperature(world: World, student: str) -> tuple[list[dict], list[dict]]:
    """A row for each of DRDO's meetings and temperatures; and, for each method, its gain over SFT and over the best given response."""
    best = np.array([record.scores[0] for record in asked])[~is_out]  # gold; the oracle's scores are relative to it already
    runs, met, gained = {"SFT": world.sfts}, [], []
    runs |= {name: world.trained(METHODS[name]) for name in ("DPO", "e-DPO", "DRDO")}
    for temperature in (0.2, 0.5, 0.7, 0.9):
        of = {name: world.judged(each, num_samples=8, temperature=temperature, top_p=0.8) for name, each in runs.items()}
        about = {"student": student, "temperature": temperature}
        for other in ("SFT", "DPO", "e-DPO"):
            met.append(about | {"other": other} | _wins(of["DRDO"], of[other], ~is_out))
            print(met[-1], flush=True)
        for name in ("DPO", "e-DPO", "DRDO"):
            row = about | {"method": name}
            for judge in JUDGES:
                ours, sft = (of[each][judge].mean(2)[:, ~is_out] for each in (name, "SFT"))
                row |= with_interval(f"{judge}, over SFT", ours - sft)
                row |= with_interval(f"{judge}, over best", ours - (best if judge == "gold" else 0))
            gained.append(row)
    return met, gained


def named(seeds: tuple[int, ...]) -> str:
    return f"{seeds[0]} to {seeds[-1]}"


def easy_or_hard(seeds, *, easy: bool) -> list[np.ndarray]:
    """For each seed, (pairs,) whether confidence and edit distance both lie above (easy), or both at or below, their medians."""
    words = [[text.split() for text in pair.responses] for pair in pairs(learnt)]
    distance = np.array([1 - SequenceMatcher(None, *both, autojunk=False).ratio() for both in words])
    far = distance > np.median(distance)
    kept = []
    for seed in seeds:
        confidence = annotated(seed)[1]
        sure = confidence > np.median(confidence)
        kept.append(sure & far if easy else ~sure & ~far)
    return kept


def steps(preset) -> dict[str, list[dict]]:
    """One row a method, all at the rate 2e-4, and length of training (a run of its own, with its own schedule): gain over SFT."""
    rows = []
    for seeds in (PUBLISHED, NEW):
        world = World(preset, seeds)
        base = world.judged(world.sfts)
        for num_steps, name in itertools.product((15, 30, 60), ("DRDO", "DPO", "e-DPO")):
            of = world.judged(world.trained(METHODS[name], steps=num_steps, num_evaluations=1))
            if name == "DRDO":
                drdo = of
            row = {"seeds": named(seeds), "method": name, "steps": num_steps}
            for judge in JUDGES:
                row |= with_interval(judge, (of[judge].mean(2) - base[judge].mean(2))[:, ~is_out])
                row |= with_interval(f"{judge}, over DRDO", (of[judge].mean(2) - drdo[judge].mean(2))[:, ~is_out])
            rows.append(row)
            print(row, flush=True)
    return {"study_steps": rows}


def grids(preset) -> dict[str, list[dict]]:
    """The paper's grids of DPO's beta and of DRDO's alpha and gamma, all at the rate 2e-4."""

    def trained(world):
        for beta in (0.1, 0.5, 1.0, 10.0):
            yield ("DPO", f"beta {beta:g}"), world.trained(DPO | {"beta": beta, "num_evaluations": 1})
        for alpha, gamma in itertools.product((0.1, 1.0), (0.0, 1.0, 2.0, 5.0)):
            strength = {"drdo_alpha": alpha, "drdo_gamma": gamma}
            yield ("DRDO", f"alpha {alpha:g}, gamma {gamma:g}"), world.trained(VARIANT | strength)

    kept = {"DPO": "beta 0.1", "DRDO": "alpha 0.1, gamma 2"}  # by the paper
    against = lambda key: (key[0], kept[key[0]])  # noqa: E731
    return {"study_noisy_grids": _over_sft(preset, trained, ("method", "strength"), against)}


def lengths(preset) -> dict[str, list[dict]]:
    """IPO on sums and on means per token, at two rates."""

    def trained(world):
        for lr, (form, options) in itertools.product((LOW, HIGH), LENGTHS.items()):
            yield (form, lr), world.trained(options | {"lr": lr})

    return {"study_ipo_lengths": _over_sft(preset, trained, ("form", "lr"), lambda key: ("sums, beta 0.1", key[1]))}


def variants(preset) -> dict[str, list[dict]]:
    """Forms of DRDO's second term, at the rate 2e-4."""
    z, zeros = -3 * torch.rand(9, 2).double(), torch.zeros(9, 2).double()
    printed = drdo_loss(*z.unbind(1), *zeros.unbind(1), *zeros.unbind(1), alpha=1.0, gamma=2.0).losses
    assert torch.allclose(weight_held(z, zeros, 2.0), printed) and torch.allclose(with_reference(z, zeros, 2.0), printed)

    def trained(world):
        for name in VARIANTS:
            yield (name,), world.trained_on(*TERMS[name]) if name in TERMS else world.trained(METHODS[name], num_evaluations=1)

    against = {("weight held, alone",): ("contrast alone",)}
    return {"study_drdo_variants": _over_sft(preset, trained, ("variant",), lambda key: against.get(key, ("DRDO",)))}


def _over_sft(preset, trained, keys: tuple[str, ...], against) -> list[dict]:
    """A row for each set of seeds and each (key, runs) that `trained` yields for a World, on the test prompts: gains over SFT (gold,
    oracle, correct, tokens), KL, tokens, how far log pi of the better and of the worse held-out responses moved, and the differences
    to the runs of the key `against(key)`."""
    rows = []
    for seeds in (PUBLISHED, NEW):
        world = World(preset, seeds, num_oracles=1)
        runs = dict(trained(world))
        base, of = world.judged(world.sfts), {key: world.judged(each) for key, each in runs.items()}
        for key, each in runs.items():
            row = {"seeds": named(seeds)} | dict(zip(keys, key, strict=True))
            for measure in ("gold", "oracle", "correct", "tokens"):
                row |= with_interval(measure, (of[key][measure].mean(2) - base[measure].mean(2))[:, ~is_out])
            row |= with_interval("gold, left out", (of[key]["gold"].mean(2) - base["gold"].mean(2))[:, is_out])
            row |= with_interval("kl", of[key]["kl"].mean(2)[:, ~is_out])
            row |= with_interval("num_tokens", of[key]["tokens"].mean(2)[:, ~is_out])
            for name in ("chosen", "rejected"):
                values = [[run.history[i][f"eval_{name}_logp"] for i in (0, -1)] for run in each]
                row[name] = float(np.diff(values).mean())
            for measure in ("gold", "oracle", "correct", "tokens", "kl"):
                ours, theirs = (of[name][measure].mean(2)[:, ~is_out] for name in (key, against(key)))
                row |= with_interval(f"{measure}, over the other", ours - theirs)
            rows.append(row)
            print(row, flush=True)
    return rows


STUDIES = {each.__name__: each for each in (claims, primary, temperatures, steps, splits, sizes, grids, lengths, variants)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    options = parser.parse_args()
    preset = experiments.start("tiny")  # the labels are drawn from the toy's gold scores
    for name in options.studies:
        began = time.monotonic()
        for file, rows in STUDIES[name](preset).items():
            with replacing(committed_figures_dir() / preset.name / f"{file}.csv") as temporary:
                write_csv(temporary, rows)
            print(f"{file}.csv: {len(rows)} rows", flush=True)
        print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
