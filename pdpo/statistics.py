r"""Means, intervals and frontiers of what was measured; numpy only.

beta: KL strength; a larger beta keeps the policy closer to the reference."""

import math
from dataclasses import dataclass

import numpy as np


def bootstrap_interval(values, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args: values: (N,) one number an independent unit, which here is a prompt; for a paired comparison, the differences. With
        (S, N), a row for each seed, both seeds and prompts are drawn again: S - 1 of the seeds, since S of them would vary by
        (S - 1) / S of what a mean over seeds does, two thirds of it for three.
    Returns: (low, high), in the unit of the values. Of three seeds any interval is rough: repeat on others what you want to believe.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; one fewer: Rao & Wu 1988, "Resampling inference with
        complex survey data"."""
    values = np.asarray(values, dtype=float)
    if values.ndim not in (1, 2) or values.shape[-1] < 2 or not np.isfinite(values).all():
        wanted = f"at least 2 finite values, (N,) or (S, N), got {values.shape}"
        raise ValueError(f"bootstrap_interval: expected {wanted}. Average samples first.")
    of_seed = np.atleast_2d(values)  # (S, N)
    rng = np.random.default_rng(seed)
    prompts = rng.integers(of_seed.shape[1], size=(num_resamples, of_seed.shape[1]))
    seeds = rng.integers(len(of_seed), size=(num_resamples, max(len(of_seed) - 1, 1)))
    means = np.take_along_axis(of_seed[seeds].mean(1), prompts, axis=1).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def with_interval(key: str, values) -> dict[str, float]:
    """{key: mean, key_low, key_high}: a figure's row entries of values as `bootstrap_interval` takes them, with its 95 % interval."""
    low, high = bootstrap_interval(values)
    return {key: float(np.mean(values)), f"{key}_low": low, f"{key}_high": high}


def variance_components(values) -> dict[str, float]:
    """What a measurement varies with: variances of seed, prompt, seed x prompt and sample, in squared units of the values.

    The mean over S seeds, N prompts and K samples of each has variance seed / S + prompt / N + both / (S N) + sample / (S N K).
    Args: values: (S, N, K), K independent samples of each prompt from each seed's policy, or paired differences of two policies.
    Returns: seed, prompt, both, sample: unbiased estimates, of which one can come out below 0, and is then near 0.
    Source: two-way random effects with replication, by expected mean squares; Searle 1992, "Variance components", section 4.3."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 3 or min(values.shape) < 2:
        raise ValueError(f"variance_components: expected (S, N, K) values, each at least 2, got {values.shape}.")
    num_seeds, num_prompts, num_samples = values.shape
    cells, of_seed, of_prompt, mean = values.mean(2), values.mean((1, 2)), values.mean((0, 2)), values.mean()
    within = values.var(2, ddof=1).mean()
    rest = cells - of_seed[:, None] - of_prompt + mean
    crossed = num_samples * (rest**2).sum() / ((num_seeds - 1) * (num_prompts - 1))
    seeds, prompts = num_prompts * num_samples * of_seed.var(ddof=1), num_seeds * num_samples * of_prompt.var(ddof=1)
    return {
        "seed": (seeds - crossed) / (num_prompts * num_samples),
        "prompt": (prompts - crossed) / (num_seeds * num_samples),
        "both": (crossed - within) / num_samples,
        "sample": within,
    }


def best_of(scores, n: int, *, by=None) -> np.ndarray:
    """(..., K) scores of K samples -> (...): the expected score of the best of n of them, drawn without replacement, by the scores
    themselves or, where `by` (..., K) is given, by those of another judge. Unbiased for best-of-n."""
    scores = np.asarray(scores, dtype=float)
    scores = np.take_along_axis(scores, np.argsort(scores if by is None else by, axis=-1), axis=-1)
    num_samples = scores.shape[-1]
    if not 1 <= n <= num_samples:
        raise ValueError(f"best_of: expected n from 1 to the {num_samples} samples, got {n}. Draw more samples.")
    ways = [math.comb(rank, n - 1) for rank in range(num_samples)]  # to choose the other n - 1 among those below
    return scores @ (np.array(ways) / math.comb(num_samples, n))


def tilted(scores, beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best policy for these scores, pi* = reference * exp(scores / beta) / Z, from samples of the reference.

    beta: KL strength; a larger beta keeps the policy closer to the reference.
    Args: scores: (..., K), of K samples of a prompt.
    Returns: (...) each: its expected score, its KL from the reference in nats, and the number of samples that its weights amount
        to, (sum w)^2 / sum w^2. Where that is small, both are too low: no reweighting finds what was not sampled.
    Source: Rafailov 2023, arXiv:2305.18290, Eq. 4; self-normalised importance sampling."""
    scores = np.asarray(scores, dtype=float)
    weights = np.exp((scores - scores.max(-1, keepdims=True)) / beta)
    weights /= weights.sum(-1, keepdims=True)
    logs = np.log(np.maximum(weights, 1e-300) * scores.shape[-1])
    return (weights * scores).sum(-1), (weights * logs).sum(-1), 1 / (weights**2).sum(-1)


def p_value(estimate: float, draws) -> float:
    """Of "no difference", two sides: normal, with the standard deviation of the bootstrap's draws (M,) as standard error."""
    error = float(np.nanstd(draws))
    return math.erfc(abs(estimate) / error / math.sqrt(2)) if error else float(estimate == 0)


def holm(p_values) -> np.ndarray:
    """(M,) p-values -> (M,) adjusted for their number: where nothing differs, any of them is below 0.05 once in twenty families at most.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure"."""
    p_values = np.asarray(p_values, dtype=float)
    order, adjusted = np.argsort(p_values), np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate((len(p_values) - np.arange(len(p_values))) * p_values[order]), 1)
    return adjusted


def calibration(probabilities, *, num_bins: int = 5) -> tuple[list[dict], float]:
    """How often a predicted order is right, against how sure the prediction was.

    Args: probabilities: (P,) that were given to the true order of P pairs; the predicted order is right where above 1/2.
    Returns: One dict for each bin with a pair in it (equal widths, confidences from 1/2 to 1): confidence (mean), right (share),
        pairs; and the expected calibration error, the mean of abs(right - confidence), weighted by pairs.
    Source: Guo 2017, "On calibration of modern neural networks", arXiv:1706.04599."""
    probabilities = np.asarray(probabilities)
    confidence, right = np.maximum(probabilities, 1 - probabilities), probabilities > 0.5
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    rows = [
        {"confidence": float(confidence[inside].mean()), "right": float(right[inside].mean()), "pairs": int(inside.sum())}
        for inside in (bins == i for i in range(num_bins))
        if inside.any()
    ]
    return rows, sum(row["pairs"] * abs(row["right"] - row["confidence"]) for row in rows) / len(probabilities)


@dataclass(frozen=True)
class Frontier:
    """One method measured at several betas. S seeds, B betas, N test prompts."""

    betas: tuple[float, ...]
    kl: np.ndarray  # (S, B, N) nats a response, each a mean over the prompt's samples
    score: np.ndarray  # (S, B, N), gold on `toy`, else the SBERT win
    stages: tuple = ()  # the evaluations it was read from, for `experiments.run_info`

    def __repr__(self) -> str:
        kl, score = self.points()
        ends = f"KL {kl[0]:.3g} to {kl[-1]:.3g} nats, score {score[0]:.3g} to {score[-1]:.3g}"
        return f"<Frontier: {len(self.kl)} seeds, betas {self.betas}, {self.kl.shape[-1]} prompts: {ends}>"

    def points(self, seeds=slice(None), prompts=slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(B,) KL and (B,) score, means over seeds and prompts, or over a resample of them."""
        return tuple(values[seeds][:, :, prompts].mean((0, 2)) for values in (self.kl, self.score))

    def at(self, beta: float | None) -> "Frontier":
        """Its policies of one beta alone."""
        if beta not in self.betas:
            raise ValueError(f"Frontier.at: expected one of the betas {self.betas}, got {beta}.")
        i = self.betas.index(beta)
        stages = self.stages[i :: len(self.betas)]
        return Frontier((beta,), self.kl[:, i : i + 1], self.score[:, i : i + 1], stages)


def pareto_set(kl, score) -> np.ndarray:
    """(P,) bool: True for each of the points (P,) that no other one beats: KL not larger, score not smaller, one strictly."""
    kl, score = np.asarray(kl), np.asarray(score)
    no_worse = (kl[:, None] <= kl) & (score[:, None] >= score)  # (P, P): row against column
    better = (kl[:, None] < kl) | (score[:, None] > score)
    return ~(no_worse & better).any(0)


def height_between(points, other, *, within: tuple[float, float] = (0.0, math.inf)) -> float:
    """Mean height of one frontier above another over the KL range that both cover: their area divided by its width.

    Args: points, other: (kl, score) of each, in any order; linear between points, nothing beyond them.
          within: a part of the KL range, in nats.
    Returns: In units of the score; > 0 where `points` lies higher. nan where the two ranges do not overlap."""
    (kl, score), (other_kl, other_score) = (np.asarray(each)[:, np.argsort(each[0])] for each in (points, other))
    low, high = max(kl[0], other_kl[0], within[0]), min(kl[-1], other_kl[-1], within[1])
    if not low < high:
        return float("nan")
    knots = np.unique(np.clip(np.concatenate([kl, other_kl]), low, high))  # both are linear between two knots
    gap = np.interp(knots, kl, score) - np.interp(knots, other_kl, other_score)
    return float(np.trapezoid(gap, knots) / (high - low))


def resampled(statistic, frontiers: list[Frontier], *, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(num_resamples,) values of statistic([points, ...]) when seeds and prompts are drawn again as `bootstrap_interval` draws them.

    All frontiers get the same draw: they share their seeds' SFT policies and the prompts, so differences are paired."""
    rng = np.random.default_rng(seed)
    num_seeds, _, num_prompts = frontiers[0].kl.shape
    values = []
    for _ in range(num_resamples):
        seeds, prompts = rng.integers(num_seeds, size=max(num_seeds - 1, 1)), rng.integers(num_prompts, size=num_prompts)
        values.append(statistic([frontier.points(seeds, prompts) for frontier in frontiers]))
    return np.array(values)


def frontier_rows(frontiers: dict[str, Frontier]) -> list[dict]:
    """One dict a point: method, beta, and kl and score, each with the ends of its 95 % interval over seeds and prompts."""
    rows = []
    for method, frontier in frontiers.items():
        low, high = np.quantile(resampled(lambda points: np.stack(points[0]), [frontier]), [0.025, 0.975], axis=0)  # (2, B)
        for i, beta in enumerate(frontier.betas):
            row = {"method": method, "beta": beta}
            for j, (key, values) in enumerate(zip(("kl", "score"), frontier.points(), strict=True)):
                row |= {key: float(values[i]), f"{key}_low": float(low[j, i]), f"{key}_high": float(high[j, i])}
            rows.append(row)
    return rows


def score_difference(points, other) -> float:
    """How much higher one policy scores than another, each given as `Frontier.at(beta).points()`, wherever their KLs are."""
    return float(points[1][0] - other[1][0])


def height_with_interval(frontier: Frontier, other: Frontier, *, measure=height_between) -> dict[str, float]:
    """`height_between` two frontiers, or their `score_difference`, with its 95 % bootstrap interval over seeds and prompts, its
    `p_value`, each seed's own value, and the KL range that both cover."""
    values = resampled(lambda points: measure(*points), [frontier, other])
    low, high = np.nanquantile(values, [0.025, 0.975])
    each = [measure(frontier.points([i]), other.points([i])) for i in range(len(frontier.kl))]
    (kl, _), (other_kl, _) = points = frontier.points(), other.points()
    covered = {"kl_low": float(max(kl.min(), other_kl.min())), "kl_high": float(min(kl.max(), other_kl.max()))}
    height = measure(*points)
    return {"height": height, "low": float(low), "high": float(high), "p": p_value(height, values), "seeds": each, **covered}
