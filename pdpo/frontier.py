r"""The reward-KL frontier: what each method's score costs in KL, compared at equal KL and with its uncertainty.

beta: KL strength; a larger beta keeps the policy closer to the reference.
"""

import numpy as np

from pdpo.data import Preference, load_split
from pdpo.evaluation import toy_grades
from pdpo.experiments import Frontier, Run
from pdpo.sampling import sample


def pareto_set(kl, score) -> np.ndarray:
    """(P,) bool: True for each point that no other one beats, by a KL not larger and a score not smaller, one of them strictly.

    Args:
        kl, score: (P,) coordinates of the points of all methods together.
    """
    kl, score = np.asarray(kl), np.asarray(score)
    no_worse = (kl[:, None] <= kl) & (score[:, None] >= score)  # (P, P): row against column
    better = (kl[:, None] < kl) | (score[:, None] > score)
    return ~(no_worse & better).any(0)


def height_between(points, other) -> float:
    """Mean height of one frontier above another over the KL range that both cover: their area divided by its width.

    Args:
        points, other: (kl, score) of each, in any order; linear between points, nothing beyond them.
    Returns:
        In units of the score; > 0 where `points` lies higher. nan where the two ranges do not overlap.
    """
    (kl, score), (other_kl, other_score) = (
        [np.asarray(axis)[np.argsort(each[0])] for axis in each] for each in (points, other)
    )
    low, high = max(kl[0], other_kl[0]), min(kl[-1], other_kl[-1])
    if not low < high:
        return float("nan")
    knots = np.unique(np.clip(np.concatenate([kl, other_kl]), low, high))  # both are linear between two knots
    gap = np.interp(knots, kl, score) - np.interp(knots, other_kl, other_score)
    return float(np.trapezoid(gap, knots) / (high - low))


def resampled(statistic, frontiers: list[Frontier], *, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(num_resamples,) values of statistic([points, ...]) when seeds and prompts are drawn again, with replacement.

    All frontiers get the same draw: they share their seeds' SFT policies and the prompts, so differences are paired.
    """
    rng = np.random.default_rng(seed)
    num_seeds, _, num_prompts = frontiers[0].kl.shape
    values = []
    for _ in range(num_resamples):
        seeds, prompts = rng.integers(num_seeds, size=num_seeds), rng.integers(num_prompts, size=num_prompts)
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


def height_with_interval(frontier: Frontier, other: Frontier) -> dict[str, float]:
    """`height_between` two frontiers with its 95 % bootstrap interval over seeds and prompts, and each seed's own height."""
    values = resampled(lambda points: height_between(*points), [frontier, other])
    low, high = np.nanquantile(values, [0.025, 0.975])
    each = [height_between(frontier.points([i]), other.points([i])) for i in range(len(frontier.kl))]
    return {"height": height_between(frontier.points(), other.points()), "low": low, "high": high, "seeds": each}


def bootstrapped_rankings(sft: Run, *, num_samples: int) -> tuple[list[Preference], dict[str, int]]:
    """Rankings made of the SFT policy's own samples to the toy's training prompts, graded by the truth.

    Args:
        sft: the policy to sample from, at temperature 1.
        num_samples: M, samples a prompt.
    Returns:
        One record a prompt with at least two different scores, best first, of each score one sample, so that no pair is a
        tie; and counts: samples, empty, tied (left out, as their prompt has another sample of that score), prompts_left_out.
    Source:
        Amini 2024, arXiv:2402.10571, Eq. 17.
    """
    prompts = [record.prompt for record in load_split("toy")[0]]
    samples = sample(
        sft.load_policy(), sft.load_tokenizer(), prompts, temperature=1.0, max_new_tokens=sft.preset.max_new_tokens,
        seed=sft.seed, num_samples=num_samples,
    )  # fmt: skip
    by_score: dict[str, dict[float, str]] = {prompt: {} for prompt in prompts}
    for each, score in zip(samples, toy_grades(samples)["score"].tolist(), strict=True):
        if each.text:
            by_score[each.prompt].setdefault(score, each.text)
    rankings = [(prompt, sorted(found.items(), reverse=True)) for prompt, found in by_score.items() if len(found) > 1]
    records = [
        Preference(prompt, tuple(text for _, text in found), tuple(score for score, _ in found)) for prompt, found in rankings
    ]
    empty = sum(not each.text for each in samples)
    tied = len(samples) - empty - sum(map(len, by_score.values()))
    counts = {"samples": len(samples), "empty": empty, "tied": tied, "prompts_left_out": len(prompts) - len(records)}
    return records, counts
