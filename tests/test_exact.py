"""The exact lab against slow sums and scipy, and what losses minimised in it end at."""

import math
import re
from itertools import product

import pytest
import scipy.stats
import torch

from pdpo.exact import (
    SharedWeightPolicy,
    TabularPolicy,
    all_responses,
    best_of_n_bound,
    best_of_n_logps,
    implicit_scores,
    kl_divergence,
    log_partition,
    make_lab,
    minimise,
    optimal_policy_logps,
    rlhf_objective,
)
from pdpo.losses import dpo_loss, ipo_loss

torch.set_num_threads(1)


def test_optimum_partition_kl_and_objective_equal_slow_python_sums():
    lab, beta = make_lab(2, 3), 0.4
    reference, scores = lab.reference_logps.exp().tolist(), lab.scores.tolist()
    weights = [p * math.exp(s / beta) for p, s in zip(reference, scores, strict=True)]
    z = sum(weights)
    optimum = optimal_policy_logps(lab.reference_logps, lab.scores, beta=beta)
    assert optimum.exp().tolist() == pytest.approx([w / z for w in weights], rel=1e-12)
    assert log_partition(lab.reference_logps, lab.scores, beta=beta).item() == pytest.approx(math.log(z), rel=1e-12)
    kl = scipy.stats.entropy(optimum.exp().numpy(), reference)
    assert kl_divergence(optimum, lab.reference_logps).item() == pytest.approx(kl, rel=1e-12)
    reward = sum(w / z * s for w, s in zip(weights, scores, strict=True))
    objective = rlhf_objective(optimum, lab.reference_logps, lab.scores, beta=beta)
    assert objective.item() == pytest.approx(reward - beta * kl, rel=1e-12)


def test_implicit_scores_of_the_optimum_are_the_scores_less_beta_log_z_and_share_their_optimum():
    lab, beta = make_lab(seed=2), 0.3
    optimum = optimal_policy_logps(lab.reference_logps, lab.scores, beta=beta)
    recovered = implicit_scores(optimum, lab.reference_logps, beta=beta)
    log_z = log_partition(lab.reference_logps, lab.scores, beta=beta)
    assert torch.allclose(recovered + beta * log_z, lab.scores, rtol=0, atol=1e-12)
    shifted = optimal_policy_logps(lab.reference_logps, recovered + 700.0, beta=beta)
    assert torch.allclose(shifted, optimum, rtol=0, atol=1e-10)


def test_kl_of_a_point_mass_is_finite_with_a_finite_gradient_and_missing_support_is_infinite():
    point = torch.tensor([0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    kl = kl_divergence(point, half)
    assert kl.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(kl, point)[0].isfinite().all()
    assert kl_divergence(half, point.detach()) == torch.inf


def test_all_responses_counts_in_order_and_a_lab_is_a_function_of_its_seed():
    assert all_responses(3, 2).tolist() == [list(each) for each in product(range(3), repeat=2)]
    assert torch.equal(make_lab(seed=3).scores, make_lab(seed=3).scores)
    assert not torch.equal(make_lab(seed=3).scores, make_lab(seed=4).scores)


def test_shared_weight_policy_is_autoregressive_and_normalised():
    lab = make_lab(3, 3)
    policy = SharedWeightPolicy(lab.responses, width=5, seed=1)
    logps = policy().detach()
    assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    for index in (0, 7, 26):  # slow loop: one prefix at a time, by hand
        total = 0.0
        for t in range(3):
            prefix = torch.zeros(3, 3, dtype=torch.float64)
            for position in range(t):
                prefix[position, lab.responses[index, position]] = 1.0
            logits = torch.tanh(prefix.flatten() @ policy.hidden + policy.bias) @ policy.output
            total += logits.log_softmax(-1)[lab.responses[index, t]].item()
        assert logps[index].item() == pytest.approx(total, abs=1e-12)


def minimum_on_pairs(lab, loss) -> torch.Tensor:
    """Where loss(policy chosen, policy rejected, reference chosen, reference rejected, difference of scores) ends."""
    policy, reference = TabularPolicy(lab.reference_logps), lab.reference_logps
    i, j = torch.combinations(torch.arange(len(lab.scores))).T
    difference = lab.scores[i] - lab.scores[j]
    p = difference.sigmoid()

    def population():
        logps = policy()
        forward = loss(logps[i], logps[j], reference[i], reference[j], difference)
        backward = loss(logps[j], logps[i], reference[j], reference[i], -difference)
        return (p * forward + (1 - p) * backward).mean()

    minimise(population, policy.parameters())
    return policy().detach()


@pytest.mark.parametrize(("beta", "alpha"), [(0.3, 0.0), (0.5, 3.0)])
def test_population_odpo_with_signed_offset_is_the_optimum_at_beta_over_one_plus_alpha(beta, alpha):
    lab = make_lab(seed=6)
    found = minimum_on_pairs(lab, lambda *pair: dpo_loss(*pair[:4], beta=beta, offset=alpha * pair[4]).losses)
    predicted = optimal_policy_logps(lab.reference_logps, lab.scores, beta=beta / (1 + alpha))
    assert kl_divergence(found, predicted) < 1e-8


def test_population_ipo_regresses_the_log_ratio_on_the_win_probability():
    lab, beta = make_lab(2, 3), 0.5
    found = minimum_on_pairs(lab, lambda *pair: ipo_loss(*pair[:4], beta=beta).losses)
    # least squares on all pairs: the log-ratio is the mean win probability over beta, up to a constant (Azar 2023, Section 5)
    wins = torch.sigmoid(lab.scores[:, None] - lab.scores[None]).mean(1)
    assert kl_divergence(found, optimal_policy_logps(lab.reference_logps, wins, beta=beta)) < 1e-8


def test_the_best_of_n_has_the_probabilities_of_a_slow_sum_with_ties_in_the_reference_s_proportion():
    reference, scores = torch.tensor([0.4, 0.1, 0.3, 0.2]).double().log(), torch.tensor([1.0, 2.0, 1.0, 0.0]).double()
    slow = torch.zeros(4).double()
    for draws in product(range(4), repeat=3):
        best = max(draws, key=lambda y: scores[y])  # the first of equals
        slow[best] += math.prod(reference[y].exp().item() for y in draws)
    torch.testing.assert_close(best_of_n_logps(reference, scores, n=3).exp(), slow)


def test_the_kl_of_the_best_of_n_lies_under_its_bound_and_reaches_it_where_no_response_has_much_probability():
    lab = make_lab(seed=3)
    for n in (1, 2, 7, 64):
        kl = kl_divergence(best_of_n_logps(lab.reference_logps, lab.scores, n=n), lab.reference_logps).item()
        assert -1e-9 < kl < best_of_n_bound(n) + 1e-9
    flat = torch.full((5000,), 2e-4).double().log()
    kl = kl_divergence(best_of_n_logps(flat, torch.arange(5000).double(), n=4), flat).item()
    assert kl == pytest.approx(best_of_n_bound(4), abs=2e-3) and best_of_n_bound(4) == pytest.approx(math.log(4) - 0.75)


# errors

GOOD, PAIR = torch.tensor([0.5, 0.5]).log(), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_policy_logps(GOOD, PAIR, beta=0.0), "optimal_policy_logps: expected finite beta > 0, got 0.0"),
        (lambda: optimal_policy_logps(GOOD, torch.zeros(3), beta=1.0), "over the same N responses"),
        (lambda: optimal_policy_logps(PAIR, PAIR, beta=1.0), "sum to 1, got a log-sum of 0.6931"),
        (lambda: kl_divergence(GOOD, GOOD * math.nan), "sum to 1"),
        (lambda: kl_divergence(torch.tensor(0.0), torch.tensor(0.0)), "last dimension"),
        (lambda: best_of_n_logps(GOOD, PAIR, n=0), "best_of_n_logps: expected (N,) tensors and n >= 1"),
        (lambda: all_responses(1, 4), "all_responses: expected num_symbols >= 2"),
        (lambda: make_lab(10, 5), "at most 10,000"),
        (lambda: minimise(lambda: PAIR.sum(), [PAIR], num_steps=0), "minimise: expected num_steps >= 1"),
    ],
)
def test_every_value_error_says_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
