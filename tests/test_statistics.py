"""Statistics on hand-made numbers: intervals against theory and scipy, calibration, Pareto set, frontiers and their heights."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from pdpo import exact, experiments, toy
from pdpo.data import Preference, load_split, pairs
from pdpo.presets import Preset
from pdpo.sampling import Sample
from pdpo.statistics import (
    Frontier,
    best_of,
    bootstrap_interval,
    calibration,
    frontier_rows,
    height_between,
    height_with_interval,
    holm,
    p_value,
    pareto_set,
    resampled,
    score_difference,
    tilted,
    variance_components,
    with_interval,
)

# intervals


def test_the_interval_is_scipys_percentile_bootstrap_interval_and_makes_a_figures_row():
    values = np.random.default_rng(1).exponential(size=60)
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert bootstrap_interval(values, num_resamples=20_000) == pytest.approx(tuple(expected), abs=0.01)
    low, high = bootstrap_interval(values.tolist())
    assert with_interval("win", values) == {"win": values.mean(), "win_low": low, "win_high": high}


def test_with_a_row_for_each_seed_the_interval_covers_seeds_too():
    rng = np.random.default_rng(0)
    apart = rng.normal(size=(3, 200)) + np.arange(-1.0, 2.0)[:, None]  # seeds that differ more than the mean over prompts does
    draws = rng.integers(3, size=(2000, 2)), rng.integers(200, size=(2000, 200))  # a slow loop
    means = [apart[seeds][:, prompts].mean() for seeds, prompts in zip(*draws, strict=True)]
    assert bootstrap_interval(apart) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.08)
    assert bootstrap_interval(apart[0]) == bootstrap_interval(apart[:1])  # one seed adds nothing


def test_resamples_of_few_seeds_have_the_variance_of_a_mean_over_seeds():
    """Not (S - 1) / S of it, as where S of S seeds are drawn again."""
    drawn = []
    for of_seed in np.random.default_rng(0).normal(size=(100, 2)):  # no prompt differs from another
        frontier = Frontier((1.0,), np.zeros((2, 1, 2)), np.repeat(of_seed, 2).reshape(2, 1, 2))
        drawn.append(resampled(lambda points: points[0][1][0], [frontier], num_resamples=100).var())
    assert np.mean(drawn) == pytest.approx(1 / 2, rel=0.3)


@pytest.mark.parametrize("values", [[[[1.0, 2.0]]], [[1.0], [2.0]], [1.0, float("nan")]])
def test_values_without_an_interval_are_refused(values):
    with pytest.raises(ValueError, match="bootstrap_interval: expected at least 2 finite values.*Average samples first"):
        bootstrap_interval(values)


# samples


def test_variance_components_are_found_again_where_they_are_known():
    rng = np.random.default_rng(0)
    true = {"seed": 0.5, "prompt": 3.0, "both": 1.0, "sample": 7.0}
    shapes = {"seed": (4, 1, 1), "prompt": (1, 30, 1), "both": (4, 30, 1), "sample": (4, 30, 3)}

    def drawn():
        return sum(true[key] ** 0.5 * rng.normal(size=shape) for key, shape in shapes.items())

    found = [variance_components(drawn()) for _ in range(400)]
    for key, value in true.items():
        values = [each[key] for each in found]
        assert np.mean(values) == pytest.approx(value, abs=4 * np.std(values) / 400**0.5)
    with pytest.raises(ValueError, match="variance_components: expected .S, N, K. values"):
        variance_components(np.ones((3, 4)))


@pytest.mark.parametrize("n", [1, 4])
def test_best_of_n_is_the_mean_over_all_choices_of_n_samples(n):
    scores = np.array([[3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0, 7.0]])
    expected = [np.mean([max(each) for each in itertools.combinations(row, n)]) for row in scores.tolist()]
    assert best_of(scores, n) == pytest.approx(expected)
    judge = np.array([[0.1, 0.9, 0.2, 0.8, 0.3], [5.0, 4.0, 3.0, 2.0, 1.0]])  # another one chooses, these scores are reported
    chosen = [
        [row[max(some, key=of.__getitem__)] for some in itertools.combinations(range(5), n)]
        for row, of in zip(scores, judge, strict=True)
    ]
    assert best_of(scores, n, by=judge) == pytest.approx(np.mean(chosen, axis=1))
    with pytest.raises(ValueError, match="best_of: expected n from 1 to the 5 samples, got 6"):
        best_of(scores, 6)


def test_the_tilt_of_samples_is_the_exact_optimum_where_each_response_was_sampled_as_often_as_it_is_likely():
    scores = np.array([1.0, 3.0, 3.0, 8.0])  # three responses, of probability 1/4, 1/2, 1/4
    mean, kl, size = tilted(scores[None], 2.0)
    reference = torch.tensor([0.25, 0.5, 0.25]).log().double()
    optimum = exact.optimal_policy_logps(reference, torch.tensor([1.0, 3.0, 8.0]).double(), beta=2.0)
    assert mean[0] == pytest.approx((optimum.exp() * torch.tensor([1.0, 3.0, 8.0])).sum().item())
    assert kl[0] == pytest.approx(exact.kl_divergence(optimum, reference).item()) and 1 < size[0] < 4
    assert tilted(scores, 1e9)[1:] == pytest.approx((0, 4), abs=1e-6) and tilted(scores, 1e-9)[0] == 8


def test_an_estimate_of_two_standard_errors_has_the_p_value_that_scipys_normal_gives_both_tails():
    draws = np.random.default_rng(0).normal(3, 0.7, size=5000)
    for estimate in (0.0, 1.4, -1.4):
        assert p_value(estimate, draws) == pytest.approx(2 * scipy.stats.norm.sf(abs(estimate) / draws.std()))


def test_holm_multiplies_the_smallest_p_value_by_the_number_of_comparisons_the_next_by_one_less():
    assert holm([0.01, 0.4, 0.02, 0.3]) == pytest.approx([0.04, 0.6, 0.06, 0.6])
    assert holm([0.9, 0.8]).tolist() == [1, 1]


# calibration


def test_calibration_by_hand():
    # confidences .55 (right), .45 -> .55 (wrong), .85 (right), .95 (right), 1 (right), .96 (right)
    rows, error = calibration([0.55, 0.45, 0.85, 0.95, 1.0, 0.96], num_bins=5)
    assert [(row["right"], row["pairs"]) for row in rows] == [(0.5, 2), (1.0, 1), (1.0, 3)]
    assert [row["confidence"] for row in rows] == pytest.approx([0.55, 0.85, 0.97])
    assert error == pytest.approx((2 * 0.05 + 0.15 + 3 * 0.03) / 6)


# frontiers


def flat(heights, *, num_seeds=3, num_prompts=20, noise=0.0) -> Frontier:
    """A frontier with KL 1, 2, ... and these scores for every seed and prompt, plus noise that seeds and prompts share."""
    rng = np.random.default_rng(0)
    shape = (num_seeds, len(heights), num_prompts)
    kl = np.broadcast_to(np.arange(1.0, len(heights) + 1)[:, None], shape)
    score = np.broadcast_to(np.array(heights, dtype=float)[:, None], shape)
    return Frontier(tuple(1 / kl[0, :, 0]), kl, score + noise * rng.standard_normal((num_seeds, 1, num_prompts)))


def test_the_pareto_set_on_hand_made_points():
    assert pareto_set([1, 2, 3], [1, 3, 2]).tolist() == [True, True, False]
    assert pareto_set([1, 1], [1, 1]).tolist() == [True, True]  # equal points do not beat each other
    assert pareto_set([2, 2], [1, 2]).tolist() == [False, True]  # equal in KL alone


@pytest.mark.parametrize(
    "one, other, within, height",
    [
        (([2, 0], [2, 0]), ([0, 2], [0, 0]), (0, 9), 1),  # a triangle; the order of points does not matter
        (([0, 4], [1, 1]), ([1, 3, 9], [0, 0, 50]), (0, 9), 1 - 50 / 6 / 2 / 3),  # over [1, 4], where the other rises from 3 on
        (([0, 1], [9, 9]), ([2, 3], [0, 0]), (0, 9), math.nan),
        (([0, 4], [0, 4]), ([0, 2, 4], [0, 0, 0]), (1, 2), 1.5),
        (([0, 4], [0, 4]), ([0, 2, 4], [0, 0, 0]), (3, 9), 3.5),
    ],
)
def test_the_height_between_frontiers_on_hand_made_points(one, other, within, height):
    assert height_between(one, other, within=within) == pytest.approx(height, nan_ok=True)


def test_noise_that_two_frontiers_share_cancels_in_the_interval_of_their_height():
    low, high = flat([1, 2, 2], noise=2.0), flat([1.5, 2.5, 2.5], noise=2.0)
    found = height_with_interval(high, low)
    assert (found["height"], found["low"], found["high"]) == pytest.approx((0.5, 0.5, 0.5))
    kl, other_kl = high.points()[0], low.points()[0]
    assert found["kl_low"] == max(kl.min(), other_kl.min()) < found["kl_high"] == min(kl.max(), other_kl.max())
    assert found["seeds"] == pytest.approx([0.5] * 3)
    assert resampled(lambda points: points[0][1][0], [low], num_resamples=200).std() > 0.2  # while a single point moves
    equal = height_with_interval(low, low)
    assert (equal["height"], equal["low"], equal["high"], equal["p"]) == (0, 0, 0, 1)


def test_policies_of_one_beta_are_compared_by_score_wherever_their_kl_is():
    rng = np.random.default_rng(0)
    kl, score = np.broadcast_to([[[1.0], [2.0]]], (3, 2, 50)), rng.normal(size=(3, 2, 50))
    frontier = Frontier((0.1, 0.3), kl, score, stages=tuple("abcdef"))
    one, other = frontier.at(0.1), frontier.at(0.3)
    assert one.betas == (0.1,) and one.stages == ("a", "c", "e") and other.stages == ("b", "d", "f")
    found = height_with_interval(one, other, measure=score_difference)
    paired = score[:, 0] - score[:, 1]
    assert found["height"] == pytest.approx(paired.mean()) and found["seeds"] == pytest.approx(list(paired.mean(1)))
    assert (found["low"], found["high"]) == pytest.approx(bootstrap_interval(paired), abs=0.03)


def test_frontier_rows_hold_every_point_with_its_interval():
    rows = frontier_rows({"one": flat([1, 2], noise=1.0), "two": flat([3])})
    assert [(row["method"], row["beta"], row["kl"]) for row in rows] == [("one", 1.0, 1), ("one", 0.5, 2), ("two", 1.0, 1)]
    assert all(row["score_low"] <= row["score"] <= row["score_high"] for row in rows)
    assert rows[0]["score_high"] - rows[0]["score_low"] > 0.3 and rows[2]["score_low"] == 3


# what experiments make of it


def test_run_frontiers_have_a_value_for_each_seed_beta_and_prompt_and_take_records_by_seed(quick):
    preset = replace(quick, sft=replace(quick.sft, steps=4), checkpoint_seconds=1e9)
    sfts = [experiments.run_sft(preset, seed=seed) for seed in (0, 1)]
    num_prompts = len(load_split(quick.data)[2])
    made = {seed: pairs(load_split(quick.data)[0], num_per_prompt=1, seed=seed) for seed in (0, 1)}
    of_dpo = {"method": "dpo", "betas": (0.1, 0.5), "records": made, "steps": 3, "num_evaluations": 1}
    found = experiments.run_frontiers(sfts, {"SFT": {"method": "sft"}, "DPO": of_dpo})
    assert found["SFT"].betas == (None,) and found["SFT"].kl.shape == (2, 1, num_prompts)
    assert np.abs(found["SFT"].kl).max() < 1e-6 and found["DPO"].betas == (0.1, 0.5)
    for i, sft in enumerate(sfts):
        for j, beta in enumerate((0.1, 0.5)):
            settings = {"method": "dpo", "beta": beta, "records": made[i], "steps": 3, "num_evaluations": 1}
            one = experiments.run_win_rate(experiments.run_preference(sft, **settings))
            assert np.array_equal(found["DPO"].kl[i, j], one.column("kl"))
            assert np.array_equal(found["DPO"].score[i, j], one.column("win"))
    best = experiments.run_frontier(sfts, method="sft", best_only=True)
    k1 = [each.column("kl_k1").mean() for each in best.stages]  # of the policy from the reference, not the reverse
    assert np.mean(k1) == pytest.approx(best.kl.mean(), abs=0.15)
    assert best.kl.mean() > 1e-3 and not any(each.run.preset.sft_all_responses for each in best.stages)


def test_rankings_from_samples_are_sorted_by_score_without_ties_and_count_what_is_left_out(monkeypatch):
    item, other = toy.items()[0], toy.items()[3]
    sentence = item.sentence
    texts = [sentence, f"Certainly! {sentence}", f"Of course! {sentence}", f"Ugh. {sentence}", ""]
    train = [Preference(each.prompt, ("a", "b")) for each in (item, other)]
    monkeypatch.setattr(experiments, "load_split", lambda _: (train,))
    given = [Sample(item.prompt, text, None, True) for text in texts]
    given += [Sample(other.prompt, other.sentence, None, True)] * 5
    monkeypatch.setattr(experiments, "sample", lambda *_, **__: given)

    class Run:
        preset, seed = Preset("none", data="toy"), 0
        load_policy = load_tokenizer = staticmethod(lambda: None)

    records, counts = experiments.bootstrapped_rankings(Run(), num_samples=5)
    assert records == [Preference(item.prompt, (texts[1], texts[0], texts[3]), (10.0, 8.0, 6.0))]
    assert counts == {"samples": 10, "empty": 1, "tied": 5, "prompts_left_out": 1}
