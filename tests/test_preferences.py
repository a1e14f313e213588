"""Bradley-Terry, Plackett-Luce and Gumbel against slow loops, scipy, the edges, and draws.

Draws have fixed seeds, so a test either always passes or always fails. Each asks for p > 0.001 of a test that would
reject a wrong sampler (a flipped sign, ascending order, ranks for indices) with p below 1e-9.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pdpo.preferences import bradley_terry_logps, gumbel_ranking, gumbel_sample, plackett_luce_logps


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def test_bradley_terry_equals_a_slow_loop_with_one_offset_per_pair():
    chosen, rejected, offset = normal(8, seed=1), normal(8, seed=2), normal(8, seed=3)
    slow = [-math.log(1 + math.exp(-(c - r - o))) for c, r, o in zip(chosen, rejected, offset, strict=True)]
    torch.testing.assert_close(bradley_terry_logps(chosen, rejected, offset=offset), torch.tensor(slow).double())


def test_plackett_luce_equals_a_slow_loop():
    scores = normal(2, 3, 5)
    slow = torch.zeros(2, 3, dtype=torch.float64)
    for a, b in itertools.product(range(2), range(3)):
        row = scores[a, b].tolist()
        for k in range(5):
            slow[a, b] += row[k] - math.log(sum(math.exp(r) for r in row[k:]))
    torch.testing.assert_close(plackett_luce_logps(scores), slow)


@pytest.mark.parametrize("scores", [(1e4, -1e4), (-1e4, 0.0, 1e4), (-1e4,) * 3])
def test_logps_and_gradients_are_finite_and_right_at_ten_thousand(scores):
    scores = torch.tensor(scores, requires_grad=True)
    functions = [plackett_luce_logps, lambda s: bradley_terry_logps(s[0], s[1], offset=1e4)]
    for logps in (function(scores) for function in functions):
        (gradient,) = torch.autograd.grad(logps, scores)
        assert logps.isfinite() and logps <= 0 and gradient.isfinite().all()
        assert gradient.sum().abs() < 0.01  # a common constant cancels; float32 has 3 decimals left at 1e4
        assert gradient.abs().max() < len(scores)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: bradley_terry_logps(torch.zeros(3, 1), torch.zeros(3)), r"one shape, got \(3, 1\) and \(3,\)"),
        (lambda: bradley_terry_logps(*torch.zeros(2, 3), offset=torch.zeros(3, 1)), r"offset .* shape \(3,\), got \(3, 1\)"),
        (lambda: plackett_luce_logps(torch.zeros(3, 1)), r"K >= 2, got \(3, 1\)"),
        (lambda: gumbel_ranking(torch.tensor(1.0)), "got a scalar"),
    ],
)
def test_each_misuse_raises_a_value_error_that_says_what_came(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_gumbel_draws_pass_kolmogorov_smirnov_against_scipy():
    draws = gumbel_sample(torch.full((50_000,), 1.5), generator=seeded(1)).double().numpy()
    assert stats.kstest(draws, stats.gumbel_r(loc=1.5).cdf).pvalue > 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gumbel_draws_are_finite_with_their_locations_shape_and_dtype_and_no_graph(dtype):
    location = torch.zeros(3, 5_000, dtype=dtype, requires_grad=True)
    draws = gumbel_sample(location, generator=seeded())
    assert (draws.shape, draws.dtype, draws.requires_grad) == (location.shape, dtype, False)
    assert draws.isfinite().all() and (location == 0).all()


@pytest.mark.parametrize("draw", [gumbel_sample, gumbel_ranking])
def test_a_seed_gives_its_draws_and_only_without_a_generator_is_torchs_global_one_used(draw):
    generator, scores = seeded(3), torch.zeros(4, 6)
    state = torch.get_rng_state()
    first, second = draw(scores, generator=generator), draw(scores, generator=generator)
    assert torch.equal(first, draw(scores, generator=seeded(3))) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(first, draw(scores))


def test_bradley_terry_is_how_often_one_gumbel_beats_another_by_more_than_the_offset():
    chosen, rejected, offset, generator, n = torch.tensor(0.8), torch.tensor(0.3), 1.0, seeded(), 100_000
    lead = gumbel_sample(chosen.expand(n), generator=generator) - gumbel_sample(rejected.expand(n), generator=generator)
    p = bradley_terry_logps(chosen, rejected, offset=offset).exp().item()
    assert stats.binomtest(int((lead > offset).sum()), n, p).pvalue > 0.001


def test_gumbel_rankings_follow_plackett_luce_over_all_24_rankings():
    scores, n = torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64), 50_000
    drawn = gumbel_ranking(scores.expand(n, 4), generator=seeded()).tolist()
    rankings = list(itertools.permutations(range(4)))
    observed = np.zeros(24)
    for ranking in drawn:
        observed[rankings.index(tuple(ranking))] += 1
    expected = n * plackett_luce_logps(scores[torch.tensor(rankings)]).exp().numpy()
    assert expected.min() > 5 and stats.chisquare(observed, expected).pvalue > 0.001
