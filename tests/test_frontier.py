"""The frontier: Pareto set, area and intervals on hand-made points; pairs from samples."""

import math

import numpy as np
import pytest
import stages
import torch
from pdpo.frontier import (
    bootstrapped_rankings,
    frontier_rows,
    height_between,
    height_with_interval,
    pareto_set,
    resampled,
)

import pdpo
from pdpo import experiments, frontier, toy
from pdpo.data import pairs
from pdpo.experiments import Frontier, run_frontier, run_frontiers
from pdpo.presets import Preset
from pdpo.sampling import Sample


def flat(heights, *, num_seeds=3, num_prompts=20, noise=0.0) -> Frontier:
    """A frontier with KL 1, 2, ... and these scores for every seed and prompt, plus noise that seeds and prompts share."""
    rng = np.random.default_rng(0)
    shape = (num_seeds, len(heights), num_prompts)
    kl = np.broadcast_to(np.arange(1.0, len(heights) + 1)[:, None], shape)
    score = np.broadcast_to(np.array(heights, dtype=float)[:, None], shape)
    return Frontier(tuple(1 / kl[0, :, 0]), kl, score + noise * rng.standard_normal((num_seeds, 1, num_prompts)))


@pytest.mark.parametrize(
    "kl, score, expected",
    [
        ([1, 2, 3], [1, 2, 3], [True, True, True]),
        ([1, 2, 3], [3, 2, 1], [True, False, False]),
        ([1, 2, 3], [1, 3, 2], [True, True, False]),
        ([2, 1, 2], [2, 2, 3], [False, True, True]),  # same score at a larger KL; same KL with a lower score
        ([1, 1], [1, 1], [True, True]),  # equal points do not beat each other
        ([5], [0], [True]),
    ],
)
def test_the_pareto_set_on_hand_made_points(kl, score, expected):
    assert pareto_set(kl, score).tolist() == expected


def test_the_pareto_set_equals_a_slow_loop():
    rng = np.random.default_rng(1)
    kl, score = rng.integers(8, size=(2, 40))
    slow = [
        not any((kl[j] <= kl[i] and score[j] >= score[i]) and (kl[j] < kl[i] or score[j] > score[i]) for j in range(40))
        for i in range(40)
    ]
    assert pareto_set(kl, score).tolist() == slow and 0 < sum(slow) < 40


@pytest.mark.parametrize(
    "one, other, height",
    [
        (([0, 2], [1, 1]), ([0, 2], [0, 0]), 1),
        (([0, 2], [0, 2]), ([0, 2], [0, 0]), 1),  # a triangle
        (([2, 0], [2, 0]), ([2, 0], [0, 0]), 1),  # the order of points does not matter
        (([0, 4], [1, 1]), ([1, 3, 9], [0, 0, 50]), 1 - (50 / 6 * 1) / 2 / 3),  # over [1, 4], where the other rises from 3 on
        (([0, 1, 2], [0, 1, 0]), ([0, 2], [0, 0]), 0.5),
        (([0, 2], [1, -1]), ([0, 2], [-1, 1]), 0),  # they cross
        (([0, 1], [9, 9]), ([2, 3], [0, 0]), math.nan),
        (([1], [9]), ([0, 3], [0, 0]), math.nan),
    ],
)
def test_the_height_between_frontiers_on_hand_made_points(one, other, height):
    assert height_between(one, other) == pytest.approx(height, nan_ok=True)
    assert height_between(other, one) == pytest.approx(-height, nan_ok=True)


def test_noise_that_two_frontiers_share_cancels_in_the_interval_of_their_height():
    low, high = flat([1, 2, 2], noise=2.0), flat([1.5, 2.5, 2.5], noise=2.0)
    found = height_with_interval(high, low)
    assert (found["height"], found["low"], found["high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert found["seeds"] == pytest.approx([0.5] * 3)
    scores = resampled(lambda points: points[0][1][0], [low], num_resamples=200)
    assert scores.std() > 0.2  # while a single point moves


def test_resamples_draw_seeds_and_prompts_and_are_reproducible():
    kl = np.zeros((2, 1, 2))
    score = np.array([[[0.0, 1.0]], [[10.0, 11.0]]])
    values = resampled(lambda points: points[0][1][0], [Frontier((1.0,), kl, score)], num_resamples=400)
    assert {0.0, 5.5, 11.0} <= set(values) <= {0, 0.5, 1, 5, 5.5, 6, 10, 10.5, 11}
    assert np.array_equal(values, resampled(lambda points: points[0][1][0], [Frontier((1.0,), kl, score)], num_resamples=400))


def test_frontier_rows_hold_every_point_with_its_interval():
    rows = frontier_rows({"one": flat([1, 2], noise=1.0), "two": flat([3])})
    assert [(row["method"], row["beta"], row["kl"]) for row in rows] == [("one", 1.0, 1), ("one", 0.5, 2), ("two", 1.0, 1)]
    for row in rows:
        assert row["score_low"] <= row["score"] <= row["score_high"] and row["kl_low"] == row["kl_high"] == row["kl"]
    assert rows[0]["score_high"] - rows[0]["score_low"] > 0.3 and rows[2]["score_low"] == 3


class Judge:
    """Stands in for SBERT."""

    def embed(self, texts):
        return torch.ones(len(texts), 1)


def test_run_frontier_has_a_value_for_each_seed_beta_and_prompt_and_takes_records_by_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(experiments, "load_judge", lambda *_, **__: Judge())
    preset = stages.preset(tmp_path, seeds=(0, 1), betas=(0.1, 0.5))
    found = run_frontier(preset, method="dpo")
    num_prompts = len(pdpo.load_split(preset.data)[2])
    assert found.betas == (0.1, 0.5) and found.kl.shape == found.score.shape == (2, 2, num_prompts)
    assert (found.score == 0.5).all()  # this judge sees ties alone
    one = experiments.run_win_rate(preset, method="dpo", beta=0.5, seed=1)
    assert np.array_equal(found.kl[1, 1], one.column("kl"))
    made = {seed: pairs(pdpo.load_split(preset.data)[0], num_per_prompt=1, seed=seed) for seed in preset.seeds}
    fewer = run_frontier(preset, betas=(0.5,), method="dpo", records=made)
    run = experiments.run_preference(preset, method="dpo", beta=0.5, seed=1, records=made[1])
    assert fewer.kl.shape == (2, 1, num_prompts) and run.history[-1]["epoch"] == 6 * 8 / len(made[1])
    both = run_frontiers(preset, {"SFT": {"method": "sft"}, "fewer": {"method": "dpo", "betas": (0.5,), "records": made}})
    assert both["SFT"].betas == (None,) and both["SFT"].kl.shape == (2, 1, num_prompts) and np.abs(both["SFT"].kl).max() < 1e-6
    assert np.array_equal(both["fewer"].kl, fewer.kl) and both["fewer"].stages == fewer.stages
    assert run_frontiers(preset, {}) == {}


def test_rankings_from_samples_are_sorted_by_score_without_ties_and_count_what_is_left_out(monkeypatch):
    item, other = toy.items()[0], toy.items()[3]
    sentence = item.sentence
    texts = [sentence, f"Certainly! {sentence}", f"Of course! {sentence}", f"Ugh. {sentence}", ""]
    monkeypatch.setattr(
        frontier, "load_split", lambda _: ([pdpo.Preference(each.prompt, ("a", "b")) for each in (item, other)],)
    )
    given = [Sample(item.prompt, text, None, True) for text in texts]
    given += [Sample(other.prompt, other.sentence, None, True)] * 5
    monkeypatch.setattr(frontier, "sample", lambda *_, **__: given)

    class Run:
        preset, seed = Preset("none", data="toy"), 0
        load_policy = load_tokenizer = staticmethod(lambda: None)

    records, counts = bootstrapped_rankings(Run(), num_samples=5)
    assert records == [pdpo.Preference(item.prompt, (texts[1], texts[0], texts[3]), (10.0, 8.0, 6.0))]
    assert counts == {"samples": 10, "empty": 1, "tied": 5, "prompts_left_out": 1}
