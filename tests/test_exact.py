"""The exact lab against scipy, brute force and finite differences; the losses that only the notebooks' derivations use."""

import math
import re
from itertools import product

import pytest
import scipy.optimize
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
from pdpo.losses import dpo_loss, gae, ipo_loss, plackett_luce_loss, ppo_loss, reward_model_loss
from pdpo.preferences import plackett_luce_logps

torch.set_num_threads(1)


def small_lab(seed=0):
    return make_lab(2, 3, seed=seed)  # 8 responses: small enough for general-purpose optimisers


# the optimum


@pytest.mark.parametrize("beta, symbols", [(0.1, 4), (0.3, 6), (10.0, 4)])
def test_gap_to_the_summit_is_beta_times_kl_to_the_optimum(beta, symbols):
    lab = make_lab(symbols, 4, seed=symbols)
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(50, len(lab.scores), generator=generator, dtype=torch.float64)
    policies = (lab.reference_logps + 2 * noise).log_softmax(-1)
    optimum = optimal_policy_logps(lab.reference_logps, lab.scores, beta=beta)
    summit = beta * log_partition(lab.reference_logps, lab.scores, beta=beta)
    gap = summit - rlhf_objective(policies, lab.reference_logps, lab.scores, beta=beta)
    assert (gap - beta * kl_divergence(policies, optimum)).abs().max() < 1e-12


def test_optimum_partition_and_kl_equal_slow_python_sums():
    lab, beta = small_lab(), 0.4
    reference, scores = lab.reference_logps.exp().tolist(), lab.scores.tolist()
    weights = [p * math.exp(s / beta) for p, s in zip(reference, scores, strict=True)]
    z = sum(weights)
    optimum = optimal_policy_logps(lab.reference_logps, lab.scores, beta=beta)
    assert optimum.exp().tolist() == pytest.approx([w / z for w in weights], rel=1e-12)
    assert log_partition(lab.reference_logps, lab.scores, beta=beta).item() == pytest.approx(math.log(z), rel=1e-12)
    kl = sum(w / z * math.log(w / z / p) for w, p in zip(weights, reference, strict=True))
    assert kl_divergence(optimum, lab.reference_logps).item() == pytest.approx(kl, rel=1e-12)
    assert kl == pytest.approx(scipy.stats.entropy(optimum.exp().numpy(), reference), rel=1e-12)
    reward = sum(w / z * s for w, s in zip(weights, scores, strict=True))
    objective = rlhf_objective(optimum, lab.reference_logps, lab.scores, beta=beta)
    assert objective.item() == pytest.approx(reward - beta * kl, rel=1e-12)


def test_hand_worked_optimum_of_two_responses():
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    scores = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64)
    assert optimal_policy_logps(reference, scores, beta=1.0).exp().tolist() == pytest.approx([0.75, 0.25])
    assert log_partition(reference, scores, beta=1.0).item() == pytest.approx(math.log(2.0))
    assert optimal_policy_logps(reference, scores, beta=0.5).exp().tolist() == pytest.approx([0.9, 0.1])


def test_implicit_scores_of_the_optimum_are_the_scores_less_beta_log_z():
    lab, beta = make_lab(seed=2), 0.3
    optimum = optimal_policy_logps(lab.reference_logps, lab.scores, beta=beta)
    recovered = implicit_scores(optimum, lab.reference_logps, beta=beta)
    log_z = log_partition(lab.reference_logps, lab.scores, beta=beta)
    assert torch.allclose(recovered + beta * log_z, lab.scores, rtol=0, atol=1e-12)
    assert log_partition(lab.reference_logps, recovered, beta=beta).abs() < 1e-12


def test_equivalent_rewards_share_the_optimum_and_batches_are_rows():
    labs = [make_lab(seed=seed) for seed in range(3)]
    reference, scores = (torch.stack([getattr(lab, name) for lab in labs]) for name in ("reference_logps", "scores"))
    shift = torch.tensor([[-40.0], [0.5], [700.0]], dtype=torch.float64)
    together = optimal_policy_logps(reference, scores + shift, beta=0.5)
    for row, lab in zip(together, labs, strict=True):
        assert torch.allclose(row, optimal_policy_logps(lab.reference_logps, lab.scores, beta=0.5), rtol=0, atol=1e-10)


def test_kl_of_a_point_mass_is_finite_with_a_finite_gradient_and_missing_support_is_infinite():
    point = torch.tensor([0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    kl = kl_divergence(point, half)
    assert kl.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(kl, point)[0].isfinite().all()
    assert kl_divergence(half, point.detach()) == torch.inf


# the lab's parts


def test_all_responses_counts_in_order():
    assert all_responses(3, 2).tolist() == [list(each) for each in product(range(3), repeat=2)]
    assert all_responses(2, 1).tolist() == [[0], [1]]
    assert len(all_responses(6, 4)) == 1296


def test_lab_is_a_function_of_its_seed():
    assert torch.equal(make_lab(seed=3).scores, make_lab(seed=3).scores)
    assert not torch.equal(make_lab(seed=3).scores, make_lab(seed=4).scores)
    assert make_lab().reference_logps.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


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


def test_minimise_finds_the_minimum_and_reports_every_evaluation():
    x, target = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    history = minimise(lambda: ((x - target) ** 4 + (x - target) ** 2).sum(), [x])
    assert (x.detach() - target).abs().max() < 1e-6
    assert history[0] == (target**4 + target**2).sum() and history[-1] < 1e-12


# preferences in the lab


def population_pairs(lab):
    i, j = torch.combinations(torch.arange(len(lab.scores))).T
    return i, j, torch.sigmoid(lab.scores[i] - lab.scores[j])


@pytest.mark.parametrize(("beta", "alpha"), [(0.3, 0.0), (0.5, 3.0)])
def test_population_odpo_with_signed_offset_is_the_optimum_at_beta_over_one_plus_alpha(beta, alpha):
    lab = make_lab(seed=6)
    i, j, p = population_pairs(lab)
    offset = alpha * (lab.scores[i] - lab.scores[j])
    policy = TabularPolicy(lab.reference_logps)

    def loss():
        logps, reference = policy(), lab.reference_logps
        forward = dpo_loss(logps[i], logps[j], reference[i], reference[j], beta=beta, offset=offset).losses
        backward = dpo_loss(logps[j], logps[i], reference[j], reference[i], beta=beta, offset=-offset).losses
        return (p * forward + (1 - p) * backward).mean()

    minimise(loss, policy.parameters())
    predicted = optimal_policy_logps(lab.reference_logps, lab.scores, beta=beta / (1 + alpha))
    assert kl_divergence(policy().detach(), predicted) < 1e-8


def test_population_plackett_luce_is_the_optimum():
    lab, beta = small_lab(), 0.5
    orders = torch.tensor([order for order in product(range(8), repeat=3) if len(set(order)) == 3])
    weights = plackett_luce_logps(lab.scores[orders]).exp()
    policy = TabularPolicy(lab.reference_logps)
    reference = lab.reference_logps[orders]
    minimise(lambda: (weights * plackett_luce_loss(policy()[orders], reference, beta=beta)).mean(), policy.parameters())
    assert kl_divergence(policy().detach(), optimal_policy_logps(lab.reference_logps, lab.scores, beta=beta)) < 1e-8


def test_population_ipo_regresses_the_log_ratio_on_the_win_probability():
    lab, beta = small_lab(), 0.5
    i, j, p = population_pairs(lab)
    policy = TabularPolicy(lab.reference_logps)

    def loss():
        logps, reference = policy(), lab.reference_logps
        forward = ipo_loss(logps[i], logps[j], reference[i], reference[j], beta=beta).losses
        backward = ipo_loss(logps[j], logps[i], reference[j], reference[i], beta=beta).losses
        return (p * forward + (1 - p) * backward).mean()

    minimise(loss, policy.parameters())
    # least squares on all pairs: the log-ratio is the mean win probability over beta, up to a constant (Azar 2023, Section 5)
    wins = torch.sigmoid(lab.scores[:, None] - lab.scores[None]).mean(1)
    assert kl_divergence(policy().detach(), optimal_policy_logps(lab.reference_logps, wins, beta=beta)) < 1e-8


# best of n


def test_the_best_of_n_has_the_frequencies_of_the_experiment_and_of_a_slow_sum_with_ties_in_the_reference_s_proportion():
    reference, scores = torch.tensor([0.4, 0.1, 0.3, 0.2]).double().log(), torch.tensor([1.0, 2.0, 1.0, 0.0]).double()
    assert best_of_n_logps(reference, scores, n=1).tolist() == pytest.approx(reference.tolist())
    found = best_of_n_logps(reference, scores, n=3).exp()
    slow = torch.zeros(4).double()
    for draws in product(range(4), repeat=3):
        best = max(draws, key=lambda y: scores[y])  # the first of equals
        slow[best] += math.prod(reference[y].exp().item() for y in draws)
    torch.testing.assert_close(found, slow)
    assert found[0] / found[2] == pytest.approx(4 / 3)


def test_the_kl_of_the_best_of_n_lies_under_its_bound_at_every_n_and_reaches_it_where_no_response_has_much_probability():
    lab = make_lab(seed=3)
    for n in (1, 2, 3, 4, 7, 16, 33, 64):
        kl = kl_divergence(best_of_n_logps(lab.reference_logps, lab.scores, n=n), lab.reference_logps).item()
        assert -1e-9 < kl < best_of_n_bound(n) + 1e-9
    flat = torch.full((5000,), 2e-4).double().log()
    kl = kl_divergence(best_of_n_logps(flat, torch.arange(5000).double(), n=4), flat).item()
    assert kl == pytest.approx(best_of_n_bound(4), abs=2e-3) and best_of_n_bound(4) == pytest.approx(math.log(4) - 0.75)


# reward_model_loss, ipo_loss, ppo_loss, gae


def test_reward_model_loss_is_minus_log_sigmoid_of_the_difference():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 1e4]), torch.tensor([1.0, 1.0, -1.0, -1e4])
    expected = [math.log(2), math.log(1 + math.e), math.log(1 + math.exp(-3)), 0.0]
    assert reward_model_loss(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(reward_model_loss(chosen + 5, rejected + 5), reward_model_loss(chosen, rejected))
    assert reward_model_loss(rejected, chosen).isfinite().all()


def test_ipo_loss_start_and_target():  # its gradient: test_losses.py
    zero = torch.zeros(2, dtype=torch.float64)
    assert ipo_loss(zero, zero, zero, zero, beta=0.5).losses.tolist() == pytest.approx([1.0, 1.0])  # 1 / (4 beta^2)
    at_target = ipo_loss(zero + 5.0, zero, zero, zero, beta=0.1)  # difference of log-ratios = 1 / (2 beta)
    assert at_target.losses.tolist() == pytest.approx([0.0, 0.0]) and at_target.margins.tolist() == pytest.approx([0.5, 0.5])
    over = ipo_loss(zero + 3.0, zero, zero, zero, beta=0.5)  # past the target it costs again, unlike DPO
    assert over.losses.tolist() == pytest.approx([4.0, 4.0])


def test_ppo_loss_slow_loop_and_flat_regions():
    ratios, advantages = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5]).double(), torch.tensor([1.0, -1.0, 2.0, -0.5, 1.0]).double()
    logps = ratios.log().requires_grad_()
    losses = ppo_loss(logps, torch.zeros(5).double(), advantages, clip=0.2)
    slow = [-min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios.tolist(), advantages.tolist(), strict=True)]
    assert losses.tolist() == pytest.approx(slow)
    (slope,) = torch.autograd.grad(losses.sum(), logps)
    assert slope.tolist() == pytest.approx([-0.5, 0.9, -2.0, 0.55, 0.0])


def test_ppo_loss_and_its_gradient_are_finite_whatever_the_ratio():
    log_ratios = torch.tensor([89.0, 1e4, 1e4, 1e4, -1e4, 59.0], requires_grad=True)
    losses = ppo_loss(log_ratios, torch.zeros(6), torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0, -1.0]))
    (slope,) = torch.autograd.grad(losses.sum(), log_ratios)
    assert losses.isfinite().all() and slope.isfinite().all()
    assert slope.tolist() == pytest.approx(
        [0, 0, math.exp(60), 0, 0, math.exp(59)], rel=1e-5
    )  # it still falls back where A < 0


def test_gae_is_the_papers_sum_and_its_limits():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    gamma, lam = 0.9, 0.8
    advantages = gae(rewards, values, gamma=gamma, lam=lam)
    for row in range(3):
        after = values[row].tolist()[1:] + [0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(rewards[row].tolist(), after, values[row].tolist(), strict=True)]
        slow = [sum((gamma * lam) ** k * deltas[t + k] for k in range(5 - t)) for t in range(5)]
        assert advantages[row].tolist() == pytest.approx(slow, rel=1e-12)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(gae(rewards, values, lam=1.0), to_come - values)
    assert torch.allclose(gae(rewards, values, lam=0.0)[:, :-1], (rewards + values.roll(-1, 1) - values)[:, :-1])


# errors

GOOD = torch.tensor([0.5, 0.5]).log()
THREE = torch.tensor([0.2, 0.3, 0.5]).log()
PAIR = torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_policy_logps(GOOD, PAIR, beta=0.0), "optimal_policy_logps: expected finite beta > 0, got 0.0"),
        (lambda: optimal_policy_logps(GOOD, torch.zeros(3), beta=1.0), "over the same N responses"),
        (lambda: optimal_policy_logps(PAIR, PAIR, beta=1.0), "sum to 1, got a log-sum of 0.6931"),
        (lambda: log_partition(GOOD, PAIR, beta=-1.0), "log_partition: expected finite beta > 0"),
        (lambda: kl_divergence(GOOD, THREE), "kl_divergence: expected tensors"),
        (lambda: kl_divergence(PAIR, GOOD), "sum to 1"),
        (lambda: kl_divergence(GOOD, PAIR), "sum to 1"),
        (lambda: kl_divergence(GOOD * float("nan"), GOOD), "sum to 1"),
        (lambda: kl_divergence(torch.tensor(0.0), torch.tensor(0.0)), "last dimension"),
        (lambda: rlhf_objective(GOOD, GOOD, PAIR, beta=float("nan")), "expected finite beta > 0"),
        (lambda: rlhf_objective(PAIR, GOOD, PAIR, beta=1.0), "sum to 1"),
        (lambda: implicit_scores(GOOD, GOOD, beta=0.0), "implicit_scores: expected finite beta > 0"),
        (lambda: best_of_n_logps(GOOD, PAIR, n=0), "best_of_n_logps: expected (N,) tensors and n >= 1"),
        (lambda: best_of_n_logps(PAIR, PAIR, n=2), "sum to 1"),
        (lambda: all_responses(1, 4), "all_responses: expected num_symbols >= 2"),
        (lambda: all_responses(4, 0), "length >= 1"),
        (lambda: make_lab(10, 5), "at most 10,000"),
        (lambda: minimise(lambda: PAIR.sum(), [PAIR], num_steps=0), "minimise: expected num_steps >= 1"),
        (lambda: reward_model_loss(torch.zeros(2), torch.zeros(3)), "one shape"),
        (lambda: ipo_loss(PAIR, PAIR, PAIR, torch.zeros(3), beta=1.0), "ipo_loss: expected four"),
        (lambda: ipo_loss(PAIR, PAIR, PAIR, PAIR, beta=0.0), "ipo_loss: expected finite beta > 0"),
        (lambda: ppo_loss(PAIR, PAIR, torch.zeros(3)), "ppo_loss: expected three tensors"),
        (lambda: ppo_loss(PAIR, PAIR, PAIR, clip=0.0), "clip > 0"),
        (lambda: gae(PAIR, PAIR), "gae: expected rewards and values"),
        (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 3), gamma=1.5), "gamma and lam in"),
        (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 3), lam=-0.1), "gamma and lam in"),
    ],
)
def test_every_value_error_says_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
