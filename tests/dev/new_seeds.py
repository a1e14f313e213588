"""Repeats the verdicts of notebooks 08 to 09c, or of 11, on seeds that chose nothing, and writes figures/<preset>/09_claims.csv.

    python tests/dev/new_seeds.py [--seeds 20 21 22 23 24] [--published 0 1 2]
    python tests/dev/new_seeds.py --chapter 11 [--seeds 21 22 23]    # 11_claims.csv; 20 chose its rates

Half an hour on two cores with the preset tiny, from nothing; what was trained is kept. A claim's value is a paired difference
with its 95 % bootstrap interval over seeds and prompts. "repeated": clear of 0 on both sets of seeds, on the same side;
"resolved now": clear on the new seeds alone; "not repeated": clear on the old ones alone; "contradicted": clear on opposite sides;
"not told apart": on neither.
"""

import argparse
from dataclasses import replace
from functools import partial

import numpy as np

from pdpo import experiments, toy
from pdpo.data import Preference, load_split, pairs
from pdpo.encoding import encode
from pdpo.exact import best_of_n_bound
from pdpo.files import replacing, write_csv
from pdpo.plots import committed_figures_dir
from pdpo.sampling import Sample
from pdpo.statistics import Frontier, best_of, bootstrap_interval, height_between, height_with_interval, with_interval

FEW = {"betas": (0.1, 0.3, 1.0), "num_evaluations": 0}
STRONG = {"method": "odpo", "alpha": 1.0, **FEW}
HEIGHTS = [  # at equal KL, all that notebook 09c lists
    ("ODPO", "DPO"),
    ("control", "DPO"),
    ("ODPO", "control"),
    ("SLiC-HF", "DPO"),
    ("SLiC-HF", "ODPO"),
    ("SLiC-HF, rate 4e-4", "DPO"),
    ("identity", "ODPO"),
    ("log_ratio", "ODPO"),
    ("log_ratio", "DPO"),
    ("alpha 1", "ODPO"),
    ("alpha 1", "DPO"),
    ("alpha 1", "alpha 1, mean margin"),
    ("SGD", "DPO"),
    ("Plackett-Luce", "all pairs"),
    ("Plackett-Luce", "best against worst"),
    ("all pairs", "best against worst"),
]
PARTS = {"a KL of 0.2 to 0.7": (0.2, 0.7), "a KL of 0.7 to 1.8": (0.7, 1.8)}


def methods(preset, seeds: list[int]) -> dict[str, dict]:
    """The runs of notebooks 09 to 09c."""
    betas = (*preset.betas, 2.0, 5.0)
    records = load_split(preset.data)[0]
    best_worst = [Preference(each.prompt, (each.responses[0], each.responses[-1])) for each in records]
    return {
        "SFT": {"method": "sft"},
        "SFT on the best": {"method": "sft", "best_only": True},
        "DPO": {"method": "dpo", "betas": betas},
        "ODPO": {"method": "odpo", "betas": betas},
        "control": {"method": "odpo", "offset_scale": "mean", **FEW},
        "SLiC-HF": {"method": "slic", **FEW},
        "SLiC-HF, rate 4e-4": {"method": "slic", "lr": 4e-4, **FEW},
        "identity": {"method": "odpo", "offset_scale": "identity", **FEW},
        "log_ratio": {"method": "odpo", "offset_scale": "log_ratio", **FEW},
        "alpha 1": STRONG,
        "alpha 1, mean margin": STRONG | {"offset_scale": "mean"},
        "SGD": {"method": "dpo", "optimizer": "sgd", "lr": 0.03, "num_evaluations": 1, "betas": (0.05, 0.3, 1.0)},
        "Plackett-Luce": {"method": "plackett_luce", "batch_size": preset.preference.batch_size // 2, **FEW},
        "all pairs": {"method": "dpo", "records": dict.fromkeys(seeds, pairs(records)), **FEW},
        "best against worst": {"method": "dpo", "batch_size": 27, "records": dict.fromkeys(seeds, best_worst), **FEW},
    }


def after_imitation(preset, trained: list) -> dict:
    """DPO from the policies that imitated the best responses, on graded pairs and on pairs of their own samples."""
    own = {}
    for run in trained:
        rankings, _ = experiments.bootstrapped_rankings(run, num_samples=4)
        own[run.seed] = pairs(rankings, num_per_prompt=preset.pairs_per_prompt, seed=run.seed)
    options = {"method": "dpo", "betas": (0.3, 1.0, 5.0), "num_evaluations": 0}
    return experiments.run_frontiers(trained, {"graded pairs": options, "own samples": options | {"records": own}})


def measured(preset, seeds: list[int]) -> dict[str, tuple[float, float, float]]:
    """claim -> (value, low, high) over these seeds."""
    sfts = experiments.run_all(experiments.run_sft, [{"preset": preset, "seed": seed} for seed in seeds])
    frontiers = experiments.run_frontiers(sfts, methods(preset, seeds))
    found = {}

    def height(claim: str, one: str, other: str, **measure) -> None:
        values = height_with_interval(frontiers[one], frontiers[other], **measure)
        found[claim] = values["height"], values["low"], values["high"]

    for one, other in HEIGHTS:
        height(f"{one} over {other}, score at equal KL", one, other)
    for name, ends in PARTS.items():
        height(f"ODPO over DPO, within {name}", "ODPO", "DPO", measure=partial(height_between, within=ends))
    stages = {("best", None): list(frontiers["SFT on the best"].stages)}
    for name in ("SFT", "DPO", "ODPO"):
        for each in frontiers[name].stages:
            stages.setdefault((name, each.run.beta), []).append(each)
    for name, frontier in after_imitation(preset, [each.run for each in stages["best", None]]).items():
        for each in frontier.stages:
            stages.setdefault((name, each.run.beta), []).append(each)

    def difference(claim: str, key: str, one: tuple, other: tuple) -> None:
        values = np.stack([a.column(key) - b.column(key) for a, b in zip(stages[one], stages[other], strict=True)])
        found[claim] = float(values.mean()), *bootstrap_interval(values)

    sft, best = ("SFT", None), ("best", None)
    difference("SFT on the best over DPO at beta 0.3, score", "score", best, ("DPO", 0.3))
    for beta in (0.1, 0.3, 1.0):
        difference(f"DPO at beta {beta:g} over SFT, score", "score", ("DPO", beta), sft)
        difference(f"DPO at beta {beta:g} over SFT, SBERT win rate", "win", ("DPO", beta), sft)
    for beta in (0.05, 1.0):
        difference(f"DPO at beta {beta:g} over SFT, share of correct answers", "correct", ("DPO", beta), sft)
    difference("DPO at beta 0.05 over beta 1, KL", "kl", ("DPO", 0.05), ("DPO", 1.0))
    for method in ("DPO", "ODPO"):
        for low, high, key in ((0.05, 0.3, "score"), (0.05, 0.3, "win"), (0.3, 2.0, "correct"), (0.3, 2.0, "score")):
            name = {"win": "SBERT win rate", "correct": "share of correct answers"}.get(key, key)
            difference(f"{method} at beta {low:g} over beta {high:g}, {name}", key, (method, low), (method, high))
    for name in ("graded pairs", "own samples"):
        for beta in (0.3, 1.0, 5.0):
            for key in ("score", "correct", "courteous"):
                claim = f"after imitation, DPO on {name} at beta {beta:g} over imitation, {key}"
                difference(claim, key, (name, beta), best)
    for name in ("alpha 1", "SGD"):
        stages[name, 0.3] = list(frontiers[name].at(0.3).stages)
    for key in ("score", "kl"):
        difference(f"alpha 1 over alpha 0 at beta 0.3, {key}", key, ("alpha 1", 0.3), ("DPO", 0.3))
    for key in ("kl", "score", "correct", "courteous", "rude"):
        difference(f"SGD over Adam at beta 0.3, {key}", key, ("SGD", 0.3), ("DPO", 0.3))
    return found | by_temperature(preset, stages) | by_size(preset, sfts) | borrowed_scores(preset, sfts, stages)


def by_temperature(preset, stages: dict) -> dict[str, tuple[float, float, float]]:
    """ODPO's answers against DPO's at beta 0.3: how often the higher gold score, a tie as a half, less a half."""
    asked = [(method, temperature) for method in ("ODPO", "DPO") for temperature in preset.temperatures]
    runs = {method: [each.run for each in stages[method, 0.3]] for method in ("ODPO", "DPO")}
    settings = [{"run": run, "temperature": temperature} for method, temperature in asked for run in runs[method]]
    measured = iter(experiments.run_all(experiments.run_win_rate, settings))
    scores = {key: np.stack([next(measured).samples("score") for _ in runs[key[0]]]) for key in asked}  # (seeds, prompts, K)
    found = {}
    for temperature in preset.temperatures:
        ours, theirs = scores["ODPO", temperature], scores["DPO", temperature]
        beats = ((ours > theirs) + 0.5 * (ours == theirs)).mean(2) - 0.5
        found[f"ODPO against DPO at temperature {temperature:g}, wins less a half"] = tuple(with_interval("", beats).values())
    return found


def by_size(preset, sfts: list) -> dict[str, tuple[float, float, float]]:
    """ODPO above DPO at equal KL on few graded pairs, with as many steps as on all, as in `studies.py sizes`."""
    train, wanted = load_split(preset.data)[0], {}
    for size in (100, 400):
        records = {sft.seed: pairs(train, num_per_prompt=preset.pairs_per_prompt, seed=sft.seed)[:size] for sft in sfts}
        options = {"records": records, "steps": preset.preference.steps, **FEW}
        wanted |= {(size, method): {"method": method, **options} for method in ("dpo", "odpo")}
    frontiers, found = experiments.run_frontiers(sfts, wanted), {}
    for size in (100, 400):
        values = height_with_interval(frontiers[size, "odpo"], frontiers[size, "dpo"])
        found[f"ODPO over DPO, score at equal KL, {size} pairs"] = values["height"], values["low"], values["high"]
    return found


def borrowed_scores(preset, sfts: list, stages: dict) -> dict[str, tuple[float, float, float]]:
    """ODPO at beta 0.3 with a reward model's scores instead of the true ones."""
    train = load_split(preset.data)[0]
    models = experiments.run_all(experiments.run_reward_model, [{"sft": sft} for sft in sfts])
    supplied = {
        sft.seed: model.scored(pairs(train, num_per_prompt=preset.pairs_per_prompt, seed=sft.seed))
        for sft, model in zip(sfts, models, strict=True)
    }
    options = {"method": "odpo", "betas": (0.3,), "records": supplied, "num_evaluations": 0}
    ours, found = experiments.run_frontiers(sfts, {"": options})[""].stages, {}
    for name in ("ODPO", "DPO"):
        for key in ("score", "kl"):
            values = np.stack([a.column(key) - b.column(key) for a, b in zip(ours, stages[name, 0.3], strict=True)])
            claim = f"ODPO at beta 0.3 with a reward model's scores over {name}, {key}"
            found[claim] = tuple(with_interval("", values).values())
    return found


PIPELINE = [  # at equal KL, all that notebook 11 lists
    ("RLOO, learned", "DPO"),
    ("RLOO, gold", "RLOO, learned"),
    ("PPO, gold", "RLOO, gold"),
    ("PPO, learned", "DPO"),
    ("PPO, learned", "RLOO, learned"),
    ("PPO, gold", "PPO, learned"),
    ("RLOO, gold", "ODPO"),
    ("PPO, gold", "ODPO"),
    ("best-of-N, learned", "RLOO, learned"),
    ("best-of-N, learned", "DPO"),
    ("best-of-N, gold", "RLOO, gold"),
]
SIZES = (1, 2, 4, 8, 16, 32, 64)


def pipeline(preset, seeds: list[int]) -> dict[str, tuple[float, float, float]]:
    """claim -> (value, low, high) of notebook 11 over these seeds."""
    sfts = experiments.run_all(experiments.run_sft, [{"preset": preset, "seed": seed} for seed in seeds])
    train, _, test = load_split(preset.data)
    found = {}

    def add(claim: str, values) -> None:
        found[claim] = tuple(with_interval("", values).values())

    held_out = pairs(test)

    def odds(records):  # of an annotator who prefers the better response
        return 1 / (1 + np.exp(-np.array([each.scores[0] - each.scores[1] for each in records]) / 3))

    def labelled(seed: int, p) -> list[Preference]:
        drawn = pairs(train, num_per_prompt=preset.pairs_per_prompt, seed=seed)
        right = np.random.default_rng(seed).random(len(drawn)) < p(drawn)
        return [Preference(each.prompt, each.responses[:: 1 if ok else -1]) for each, ok in zip(drawn, right, strict=True)]

    labels = {"noisy": odds, "shuffled": lambda records: np.full(len(records), 0.5)}
    settings = [{"sft": sft} for sft in sfts]
    settings += [{"sft": sft, "records": labelled(sft.seed, p), "num_evaluations": 1} for p in labels.values() for sft in sfts]
    trained = iter(experiments.run_all(experiments.run_oracle, settings))
    models = {name: [next(trained) for _ in sfts] for name in ("true", *labels)}
    given = {name: np.clip([each.held_out for each in of], 1e-6, 1 - 1e-6) for name, of in models.items()}  # (seeds, pairs)
    graded = [[toy.grade(each.prompt, text) for text in each.responses] for each in held_out]
    tones = np.array([[toy.TONE_SCORES[grade.tone] for grade in each] for each in graded])
    worse = np.array([each[0].correct > each[1].correct for each in graded]) & (tones[:, 0] < tones[:, 1])
    right = {name: (q > 0.5).astype(float) for name, q in given.items()}
    p = odds(held_out)
    loss = {name: -p * np.log(q) - (1 - p) * np.log(1 - q) for name, q in given.items()}
    accuracy = {name: np.where(q > 0.5, p, 1 - p) for name, q in given.items()}
    per_prompt = {"right": right, "log loss": loss, "accuracy": accuracy}
    per_prompt = {key: {name: v.reshape(len(seeds), -1, 6).mean(2) for name, v in of.items()} for key, of in per_prompt.items()}
    add(
        "reward model, share in the right order where the right answer has the worse tone, less 1/2",
        right["true"][:, worse] - 0.5,
    )
    add("fitted to noisy over shuffled labels, right order", per_prompt["right"]["noisy"] - per_prompt["right"]["shuffled"])
    for key in ("accuracy", "log loss"):
        add(
            f"fitted to true orders over noisy labels, {key} on noisy labels",
            per_prompt[key]["true"] - per_prompt[key]["noisy"],
        )

    few = [replace(sft, preset=replace(preset, num_samples=16)) for sft in sfts]
    three = {"betas": (0.1, 0.3, 1.0)}
    frontiers = experiments.run_frontiers(
        sfts, {"SFT": {"method": "sft"}, "DPO": {"method": "dpo", **three}, "ODPO": {"method": "odpo", **three}}
    )
    online = {
        f"{method.upper()}, {name}": {"method": method, "betas": (0.05, 0.3, 1.0), "num_evaluations": 1, **reward}
        for method in ("ppo", "rloo")
        for name, reward in (("learned", {}), ("gold", {"reward": "toy-gold"}))
    }
    frontiers |= experiments.run_frontiers(few, online)
    many = [replace(sft, preset=replace(preset, num_samples=64)) for sft in sfts]
    many = experiments.run_all(experiments.run_win_rate, [{"run": sft} for sft in many])
    gold = np.stack([each.samples("score") for each in many])  # (seeds, prompts, 64)
    proxy = []
    for stage, model in zip(many, models["true"], strict=True):
        tokenizer, said = stage.run.load_tokenizer(), [(row["prompt"], row["text"]) for row in stage.rows]
        each = list(dict.fromkeys(said))
        samples = [Sample(*pair, encode(tokenizer, *pair), True) for pair in each]
        known = dict(zip(each, model.scorer()(samples).tolist(), strict=True))
        proxy.append(np.reshape([known[pair] for pair in said], gold.shape[1:]))
    for name, by in (("best-of-N, learned", np.stack(proxy)), ("best-of-N, gold", gold)):
        score = np.stack([best_of(gold, n, by=by) for n in SIZES], axis=1)
        bound = np.array([best_of_n_bound(n) for n in SIZES])[None, :, None]
        frontiers[name] = Frontier(SIZES, np.broadcast_to(bound, score.shape), score)
    for one, other in PIPELINE:
        values = height_with_interval(frontiers[one], frontiers[other])
        found[f"{one} over {other}, score at equal KL"] = values["height"], values["low"], values["high"]
    for name in online:
        for key in ("score", "correct"):
            pairs_of = zip(frontiers[name].at(0.05).stages, frontiers["SFT"].stages, strict=True)
            claim = f"{name} at beta 0.05 over SFT, {'share of right answers' if key == 'correct' else key}"
            add(claim, np.stack([one.column(key) - sft.column(key) for one, sft in pairs_of]))
    for name in ("best-of-N, learned", "best-of-N, gold"):
        of = frontiers[name]
        add(f"{name}, from N = 16 to 64, score", (of.at(64).score - of.at(16).score)[:, 0])
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
    parser.add_argument("--chapter", choices=("09", "11"), default="09")
    parser.add_argument("--published", nargs="+", type=int, default=[0, 1, 2], help="the notebooks' seeds")
    parser.add_argument("--seeds", nargs="+", type=int, help="the new ones; default 20 to 24, or 21 to 23")
    options = parser.parse_args()
    preset = experiments.start(options.preset)
    claims_of = pipeline if options.chapter == "11" else measured
    options.seeds = options.seeds or ([21, 22, 23] if options.chapter == "11" else [20, 21, 22, 23, 24])
    old, new = (claims_of(preset, seeds) for seeds in (options.published, options.seeds))
    rows = []
    for claim in old:
        shown = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*values[claim]) for values in (old, new)]
        rows.append({"claim": claim, "published": shown[0], "repeated": shown[1], "status": status(old[claim], new[claim])})
        print(f"{rows[-1]['status']:14} {claim:60} {shown[0]}   {shown[1]}")
    target = committed_figures_dir() / preset.name / f"{options.chapter}_claims.csv"
    with replacing(target) as temporary:
        write_csv(temporary, rows)
    print(f"seeds {options.published} and {options.seeds}; {target}")


if __name__ == "__main__":
    main()
