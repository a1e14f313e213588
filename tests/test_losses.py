"""SFT, DPO, ODPO and Plackett-Luce losses against hand-worked numbers, slow loops, the papers' gradients and limits."""

import inspect
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from pdpo.losses import dpo_loss, plackett_luce_loss, score_offset, sft_loss, slic_loss

LOG2, LOG3 = math.log(2), math.log(3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def four_logps(b: int = 6) -> list[torch.Tensor]:
    """Policy chosen, policy rejected, reference chosen, reference rejected: each (b,), of the size of real responses."""
    return [3 * normal(b, seed=seed) - 20 for seed in range(4)]


def pair_with_margin(log_ratio_margin: float) -> list[torch.Tensor]:
    """Four (1,) log-probabilities whose chosen log-ratio exceeds the rejected one by this much."""
    return [torch.tensor([x], dtype=torch.float64) for x in (log_ratio_margin - 12.0, -15.0, -12.0, -15.0)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# SFT


def test_sft_loss_is_the_negative_log_probability_with_gradient_minus_one():
    logps = torch.tensor([0.5, 0.125]).log().requires_grad_()
    losses = sft_loss(logps)
    torch.testing.assert_close(losses, torch.tensor([LOG2, 3 * LOG2]))
    losses.sum().backward()
    assert logps.grad.tolist() == [-1, -1]


# DPO: values


@pytest.mark.parametrize("beta", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_loss_is_log_two_where_policy_equals_reference(beta, label_smoothing):
    chosen, rejected = four_logps()[:2]
    result = dpo_loss(chosen, rejected, chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    torch.testing.assert_close(result.losses, torch.full_like(chosen, LOG2))
    assert not result.margins.any() and not result.chosen_rewards.any() and not result.rejected_rewards.any()


@pytest.mark.parametrize(
    "margin, beta, offset, label_smoothing, loss",
    [
        # the policy gave the chosen response `margin` nats more than the reference did, the rejected one as much:
        # p = sigma(beta * margin - offset), loss = -(1 - smoothing) log p - smoothing log(1 - p)
        (2 * LOG3, 0.5, 0.0, 0.0, math.log(4 / 3)),  # p = 3/4
        (-2 * LOG3, 0.5, 0.0, 0.0, math.log(4)),  # p = 1/4
        (2 * LOG3, 1.0, 0.0, 0.0, math.log(10 / 9)),  # p = 9/10
        (2 * LOG3, 0.5, LOG3, 0.0, LOG2),  # it leads by exactly the offset: p = 1/2
        (2 * LOG3, 0.5, -LOG3, 0.0, math.log(10 / 9)),  # a negative offset asks for less: p = 9/10
        (2 * LOG3, 0.5, 0.0, 0.1, 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        (2 * LOG3, 0.5, 2 * LOG3, 0.25, 0.75 * math.log(4) + 0.25 * math.log(4 / 3)),  # p = 1/4
    ],
)
def test_dpo_loss_equals_hand_worked_numbers(margin, beta, offset, label_smoothing, loss):
    result = dpo_loss(*pair_with_margin(margin), beta=beta, offset=offset, label_smoothing=label_smoothing)
    assert result.losses.item() == pytest.approx(loss, rel=1e-12)


def test_rewards_are_beta_times_log_ratios_and_the_margin_is_their_difference_without_the_offset():
    # beta 0.5: chosen 0.5 * (-10 + 13) = 1.5, rejected 0.5 * (-9 + 5) = -2, margin 3.5
    logps = [torch.tensor([x]) for x in (-10.0, -9.0, -13.0, -5.0)]
    result = dpo_loss(*logps, beta=0.5, offset=7.0, label_smoothing=0.1)
    assert (result.chosen_rewards.item(), result.rejected_rewards.item(), result.margins.item()) == (1.5, -2.0, 3.5)


def test_dpo_loss_equals_a_slow_loop_with_one_offset_per_pair():
    logps, offset, beta, smoothing = four_logps(), normal(6, seed=9), 0.3, 0.15
    slow = []
    for pc, pr, rc, rr, delta in zip(*(x.tolist() for x in (*logps, offset)), strict=True):
        p = sigmoid(beta * ((pc - rc) - (pr - rr)) - delta)
        slow.append(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p))
    result = dpo_loss(*logps, beta=beta, offset=offset, label_smoothing=smoothing)
    torch.testing.assert_close(result.losses, torch.tensor(slow).double())


def test_dpo_losses_come_back_unreduced_one_for_each_pair():
    logps, offset = four_logps(), normal(6, seed=9)
    together = dpo_loss(*logps, beta=0.3, offset=offset)
    for i in range(6):
        alone = dpo_loss(*(x[i : i + 1] for x in logps), beta=0.3, offset=offset[i])
        for all_rows, row in zip((*together, together.margins), (*alone, alone.margins), strict=True):
            torch.testing.assert_close(all_rows[i], row[0])


@pytest.mark.parametrize("constant", [-40.0, 3.0])
@pytest.mark.parametrize("which", [(0, 1), (2, 3), (0, 2), (1, 3)])
def test_per_prompt_constants_cancel_in_the_dpo_loss(which, constant):
    # (0, 1) and (2, 3): a prompt's log Z in policy or reference; (0, 2) and (1, 3): any factor common to both models
    logps = four_logps()
    shifted = [x + constant if i in which else x for i, x in enumerate(logps)]
    arguments = dict(beta=0.3, offset=0.4, label_smoothing=0.1)
    torch.testing.assert_close(dpo_loss(*shifted, **arguments).losses, dpo_loss(*logps, **arguments).losses)


def test_swapping_chosen_and_rejected_raises_the_dpo_loss_by_the_margin():
    # -log sigma(-m) = -log sigma(m) + m
    pc, pr, rc, rr = four_logps()
    result, swapped = dpo_loss(pc, pr, rc, rr, beta=0.3), dpo_loss(pr, pc, rr, rc, beta=0.3)
    torch.testing.assert_close(swapped.losses, result.losses + result.margins)
    torch.testing.assert_close(swapped.margins, -result.margins)


@pytest.mark.parametrize("offset", [0.0, 0.8])
def test_label_smoothing_mixes_the_loss_of_the_pair_and_of_the_flipped_pair(offset):
    pc, pr, rc, rr = four_logps()
    smoothed = dpo_loss(pc, pr, rc, rr, beta=0.3, offset=offset, label_smoothing=0.2).losses
    as_labelled = dpo_loss(pc, pr, rc, rr, beta=0.3, offset=offset).losses
    flipped = dpo_loss(pr, pc, rr, rc, beta=0.3, offset=-offset).losses
    torch.testing.assert_close(smoothed, 0.8 * as_labelled + 0.2 * flipped)


def test_dpo_by_default_has_no_offset_and_no_label_smoothing_and_beta_has_no_default():
    logps = four_logps()
    torch.testing.assert_close(
        dpo_loss(*logps, beta=0.3).losses, dpo_loss(*logps, beta=0.3, offset=0.0, label_smoothing=0.0).losses
    )
    for loss in (dpo_loss, plackett_luce_loss):
        beta = inspect.signature(loss).parameters["beta"]
        assert beta.kind is beta.KEYWORD_ONLY and beta.default is beta.empty


# DPO: directions


@pytest.mark.parametrize("argument, sign", list(zip(range(4), (-1, 1, 1, -1), strict=True)))
def test_the_dpo_loss_moves_the_right_way_with_each_log_probability(argument, sign):
    logps = four_logps()
    raised = [x + 1 if i == argument else x for i, x in enumerate(logps)]
    change = dpo_loss(*raised, beta=0.3, offset=0.2).losses - dpo_loss(*logps, beta=0.3, offset=0.2).losses
    assert (sign * change > 0).all()


def test_a_larger_offset_raises_the_loss_and_the_pull_on_the_pair():
    losses, pulls = [], []
    for offset in (-2.0, 0.0, 1.0, 3.0):
        chosen, *rest = pair_with_margin(1.0)
        loss = dpo_loss(chosen.requires_grad_(), *rest, beta=0.3, offset=offset).losses.sum()
        losses.append(loss.item())
        pulls.append(-torch.autograd.grad(loss, chosen)[0].item())
    assert losses == sorted(set(losses)) and pulls == sorted(set(pulls)) and min(pulls) > 0


def test_a_larger_beta_lowers_the_loss_of_a_right_pair_and_raises_that_of_a_wrong_one():
    right, wrong = ([dpo_loss(*pair_with_margin(m), beta=b).losses.item() for b in (0.1, 0.5, 2.0)] for m in (1.0, -1.0))
    assert right == sorted(right, reverse=True) and wrong == sorted(wrong) and len({*right, *wrong}) == 6


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("label_smoothing", [0.1, 0.3])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_optimal_log_ratio_is_inversely_proportional_to_beta_and_shrinks_with_label_smoothing(
    beta, label_smoothing, offset
):
    # the gradient vanishes where sigma(beta * h - offset) = 1 - label_smoothing: h = (offset + log((1 - e) / e)) / beta.
    # So a larger beta keeps the policy closer to the reference, and so does more smoothing; an offset pushes it away.
    optimum = (offset + math.log((1 - label_smoothing) / label_smoothing)) / beta
    for step, sign in ((0.0, 0), (0.01, 1), (-0.01, -1)):
        chosen, *rest = pair_with_margin(optimum + step)
        loss = dpo_loss(chosen.requires_grad_(), *rest, beta=beta, offset=offset, label_smoothing=label_smoothing).losses
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert gradient.item() == pytest.approx(0, abs=1e-12) if sign == 0 else sign * gradient.item() > 0


# DPO: gradients


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("offset", [0.0, 0.7, -0.7])
def test_dpo_gradient_is_the_papers_formula(beta, offset):
    # Rafailov 2023, section 4: -beta * sigma(r_l - r_w) * (grad log pi(y_w) - grad log pi(y_l)), for a policy that is a
    # softmax over 5 responses; ODPO adds the offset inside: sigma(r_l - r_w + Delta)
    theta, reference, w, l = normal(5).requires_grad_(), normal(5, seed=1).log_softmax(0), 3, 1
    policy = theta.log_softmax(0)
    result = dpo_loss(
        policy[w : w + 1], policy[l : l + 1], reference[w : w + 1], reference[l : l + 1], beta=beta, offset=offset
    )
    (gradient,) = torch.autograd.grad(result.losses.sum(), theta, retain_graph=True)
    (grad_w,), (grad_l,) = (torch.autograd.grad(policy[y], theta, retain_graph=True) for y in (w, l))
    weight = beta * sigmoid(result.rejected_rewards.item() - result.chosen_rewards.item() + offset)
    torch.testing.assert_close(gradient, -weight * (grad_w - grad_l))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_passes_float64_finite_differences(label_smoothing):
    inputs = [x.requires_grad_() for x in (*four_logps(4), normal(4, seed=8))]
    assert gradcheck(lambda *x: dpo_loss(*x[:4], beta=0.7, offset=x[4], label_smoothing=label_smoothing).losses, inputs)


def test_only_the_losses_carry_a_gradient():
    logps = [x.requires_grad_() for x in four_logps()]
    result = dpo_loss(*logps, beta=0.3)
    assert result.losses.requires_grad
    assert not any(x.requires_grad for x in (result.chosen_rewards, result.rejected_rewards, result.margins))


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("argument", range(4))
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_dpo_losses_and_gradients_are_finite_and_right_at_ten_thousand(size, argument, label_smoothing, offset):
    logps = [torch.tensor([size if i == argument else 0.0], requires_grad=True) for i in range(4)]
    loss = dpo_loss(*logps, beta=1.0, offset=offset, label_smoothing=label_smoothing).losses
    gradients = torch.autograd.grad(loss.sum(), logps)
    # at this size -log sigma(z) is max(-z, 0), and log 2 at z = 0
    z = size * (1, -1, -1, 1)[argument] - offset
    expected = LOG2 if z == 0 else (1 - label_smoothing) * max(-z, 0) + label_smoothing * max(z, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert all(g.isfinite() and g.abs() <= 1 for g in gradients)


# ODPO's offset


@pytest.mark.parametrize(
    "scale, chosen, rejected, f",
    [
        ("log", 5.0, 2.0, LOG3),
        ("identity", 5.0, 2.0, 3.0),
        ("log_ratio", 6.0, 2.0, LOG3),
        ("log", 2.5, 2.0, -LOG2),  # a difference below 1: less than a right order is demanded
        ("log", 3.0, 2.0, 0.0),
        ("log", 2.0, 2.0, 0.0),  # a tie
        ("identity", 2.0, 2.0, 0.0),
        ("log_ratio", 2.0, 2.0, 0.0),
        ("log", 2.0, 5.0, 0.0),  # labelled against its scores
        ("identity", 2.0, 5.0, -3.0),
        ("log_ratio", 2.0, 6.0, -LOG3),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_score_offset_equals_hand_worked_numbers(scale, chosen, rejected, f, alpha):
    offset = score_offset(torch.tensor([chosen]).double(), torch.tensor([rejected]).double(), alpha=alpha, scale=scale)
    assert offset.shape == (1,) and offset.item() == pytest.approx(alpha * f, abs=1e-12)


def test_score_offset_by_default_is_the_log_of_the_difference_with_alpha_one():
    chosen, rejected = torch.tensor([9.0, 4.0, 1.5]), torch.tensor([1.0, 3.0, 1.0])
    assert torch.equal(score_offset(chosen, rejected), score_offset(chosen, rejected, alpha=1.0, scale="log"))
    torch.testing.assert_close(score_offset(chosen, rejected), torch.tensor([3 * LOG2, 0, -LOG2]))


@pytest.mark.parametrize("scale", ["log", "identity", "log_ratio"])
def test_a_better_chosen_score_and_a_larger_alpha_demand_a_larger_offset(scale):
    chosen, rejected = torch.tensor([3.5, 5.0, 9.0]), torch.tensor([2.0, 2.0, 2.0])
    weak, strong = (score_offset(chosen, rejected, alpha=alpha, scale=scale) for alpha in (0.5, 2.0))
    assert (weak.diff() > 0).all() and (strong > weak).all() and (weak > 0).all()
    torch.testing.assert_close(strong, 4 * weak)


@pytest.mark.parametrize("scale", ["log", "identity", "log_ratio"])
def test_odpo_with_alpha_zero_is_dpo(scale):
    logps = four_logps()
    offset = score_offset(normal(6).abs() + 1, normal(6, seed=1).abs() + 1, alpha=0.0, scale=scale)
    torch.testing.assert_close(
        dpo_loss(*logps, beta=0.3, offset=offset).losses, dpo_loss(*logps, beta=0.3).losses, rtol=0, atol=0
    )


def test_odpo_equals_equation_7c_with_a_log_offset_in_a_slow_loop():
    logps, chosen, rejected = four_logps(), normal(6).abs() + 2, normal(6, seed=1).abs()
    chosen[0] = rejected[0] - 1  # a flipped pair: plain DPO
    slow = []
    for pc, pr, rc, rr, s_w, s_l in zip(*(x.tolist() for x in (*logps, chosen, rejected)), strict=True):
        delta = 0.5 * math.log(s_w - s_l) if s_w > s_l else 0.0
        slow.append(-math.log(sigmoid(0.3 * ((pc - rc) - (pr - rr)) - delta)))
    result = dpo_loss(*logps, beta=0.3, offset=score_offset(chosen, rejected, alpha=0.5))
    torch.testing.assert_close(result.losses, torch.tensor(slow).double())


def test_score_offset_carries_no_gradient_and_takes_integer_scores():
    chosen, rejected = torch.tensor([9.0, 4.0], requires_grad=True), torch.tensor([1.0, 4.0], requires_grad=True)
    for scale in ("log", "identity", "log_ratio"):
        offset = score_offset(chosen, rejected, scale=scale)
        assert not offset.requires_grad
        torch.testing.assert_close(score_offset(chosen.long(), rejected.long(), scale=scale), offset.detach())


@pytest.mark.parametrize("scale", ["log", "identity", "log_ratio"])
def test_score_offset_is_finite_at_ten_thousand_and_at_the_smallest_difference(scale):
    chosen = torch.tensor([1e4, 1e-4, 1.0, 1.0 + 2**-23])
    rejected = torch.tensor([1e-4, 1e4, 1.0, 1.0])
    assert score_offset(chosen, rejected, scale=scale).isfinite().all()


# Plackett-Luce


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_plackett_luce_loss_is_log_k_factorial_where_policy_equals_reference(k):
    logps = normal(3, k) - 20
    losses = plackett_luce_loss(logps, logps, beta=0.3)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(math.factorial(k))))


def test_plackett_luce_loss_equals_a_hand_worked_number():
    # beta 0.5 and log-ratios 2 log 4, 2 log 2, 0: exp(rewards) are 4, 2, 1, so P = 4/7 * 2/3 = 8/21; worst first 1/7 * 2/6
    log_ratios = 2 * torch.tensor([[4.0, 2.0, 1.0], [1.0, 2.0, 4.0]], dtype=torch.float64).log()
    reference = normal(2, 3) - 20
    losses = plackett_luce_loss(reference + log_ratios, reference, beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([21 / 8, 21.0]).double().log())


def test_plackett_luce_loss_equals_a_slow_loop():
    policy, reference, slow = normal(3, 4) - 20, normal(3, 4, seed=1) - 20, []
    for p, r in zip(policy.tolist(), reference.tolist(), strict=True):
        rewards = [0.7 * (x - y) for x, y in zip(p, r, strict=True)]
        slow.append(-sum(rewards[k] - math.log(sum(math.exp(x) for x in rewards[k:])) for k in range(4)))
    torch.testing.assert_close(plackett_luce_loss(policy, reference, beta=0.7), torch.tensor(slow).double())


def test_plackett_luce_with_two_responses_is_dpo_in_value_and_gradient():
    policy, reference = normal(8, 2).requires_grad_(), normal(8, 2, seed=1)
    ranking = plackett_luce_loss(policy, reference, beta=0.3)
    pair = dpo_loss(*policy.T, *reference.T, beta=0.3).losses
    torch.testing.assert_close(ranking, pair)
    torch.testing.assert_close(*(torch.autograd.grad(losses.sum(), policy)[0] for losses in (ranking, pair)))


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_exp_of_minus_the_plackett_luce_loss_sums_to_one_over_all_rankings(k):
    every = torch.tensor(list(itertools.permutations(range(k))))
    losses = plackett_luce_loss(5 * normal(k)[every], 5 * normal(k, seed=1)[every], beta=0.4)
    assert losses.std() > 0.1 and (-losses).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_per_prompt_constants_cancel_in_the_plackett_luce_loss():
    policy, reference, constants = normal(3, 4), normal(3, 4, seed=1), 40 * normal(3, 1, seed=2)
    losses = plackett_luce_loss(policy, reference, beta=0.5)
    torch.testing.assert_close(plackett_luce_loss(policy + constants, reference, beta=0.5), losses)
    torch.testing.assert_close(plackett_luce_loss(policy, reference + constants, beta=0.5), losses)


def test_a_larger_beta_lowers_the_plackett_luce_loss_of_a_right_ranking_and_raises_that_of_a_wrong_one():
    policy, reference = torch.tensor([[2.0, 1, 0], [0, 1, 2]]), torch.zeros(2, 3)
    right, wrong = torch.stack([plackett_luce_loss(policy, reference, beta=b) for b in (0.1, 0.5, 2.0)], dim=1)
    assert (right.diff() < 0).all() and (wrong.diff() > 0).all()


def test_plackett_luce_gradient_pushes_each_response_by_choice_probabilities_times_beta():
    # d loss / d log pi(y_i) = beta * (sum_{k<=i} softmax(r_k..r_K)_i - 1); the constants of a prompt get no push
    policy, reference, beta = normal(1, 4).requires_grad_(), normal(1, 4, seed=1), 0.3
    (gradient,) = torch.autograd.grad(plackett_luce_loss(policy, reference, beta=beta).sum(), policy)
    rewards, expected = beta * (policy - reference).detach()[0], -torch.ones(4, dtype=torch.float64)
    for k in range(4):
        expected[k:] += rewards[k:].softmax(0)
    torch.testing.assert_close(gradient[0], beta * expected)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


def test_plackett_luce_loss_passes_float64_finite_differences():
    inputs = normal(2, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    assert gradcheck(lambda policy, reference: plackett_luce_loss(policy, reference, beta=0.7), inputs)


@pytest.mark.parametrize("logps, loss", [((1e4, 0.0, -1e4), 0), ((-1e4, 0.0, 1e4), 3e4), ((1e4, 1e4, 1e4), math.log(6))])
def test_plackett_luce_losses_and_gradients_are_finite_and_right_at_ten_thousand(logps, loss):
    policy = torch.tensor([logps], requires_grad=True)
    losses = plackett_luce_loss(policy, torch.zeros(1, 3), beta=1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.item() == pytest.approx(loss, abs=0.01)  # float32 has 3 decimals left at 1e4
    assert gradient.isfinite().all() and gradient.abs().max() <= 2.01


# SLiC-HF


@pytest.mark.parametrize(
    "chosen, rejected, beta, regularization, loss",
    [
        (-10, -10, 0.5, 0.0, 2),
        (-10, -13, 0.5, 0.0, 0),
        (-10, -11, 0.5, 0.0, 1),
        (-12, -10, 1.0, 0.0, 3),
        (-10, -11, 0.5, 0.1, 2),
    ],
)
def test_slic_loss_equals_hand_worked_numbers_and_reports_rewards_against_the_reference(
    chosen, rejected, beta, regularization, loss
):
    logps = [torch.tensor([float(value)]) for value in (chosen, rejected, -11, -12)]
    losses, chosen_rewards, rejected_rewards = slic_loss(*logps, beta=beta, regularization=regularization)
    assert losses.item() == pytest.approx(loss)
    assert (chosen_rewards.item(), rejected_rewards.item()) == pytest.approx((beta * (chosen + 11), beta * (rejected + 12)))


def test_slic_pulls_only_on_pairs_below_its_margin_and_on_chosen_responses_by_the_regularization():
    chosen, rejected = torch.tensor([-10.0, -10.0], requires_grad=True), torch.tensor([-11.0, -13.0], requires_grad=True)
    losses = slic_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.5, regularization=0.25).losses
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert [slope.tolist() for slope in slopes] == [[-1.25, -0.25], [1.0, 0.0]]


# Errors


def dpo(*shapes, beta=0.1, **arguments):
    return dpo_loss(*(torch.zeros(shape) for shape in shapes or [(3,)] * 4), beta=beta, **arguments)


def plackett_luce(policy=(2, 3), reference=(2, 3), beta=0.1):
    return plackett_luce_loss(torch.zeros(policy), torch.zeros(reference), beta=beta)


def slic(*shapes, beta=0.1, regularization=0.0):
    return slic_loss(*(torch.zeros(shape) for shape in shapes or [(3,)] * 4), beta=beta, regularization=regularization)


def offset_of(chosen, rejected, **arguments):
    return score_offset(torch.tensor(chosen), torch.tensor(rejected), **arguments)


@pytest.mark.parametrize(
    "call, words",
    [
        *[
            (lambda i=i: dpo(*((2,) if j == i else (3,) for j in range(4))), r"dpo_loss: expected four \(B,\).*\(2,\)")
            for i in range(4)
        ],
        (lambda: dpo((), (), (), ()), r"four \(B,\) tensors, got \[\(\), "),
        (lambda: dpo(*[(3, 5)] * 4), r"got \[\(3, 5\).*Sum the token log-probabilities"),
        (lambda: dpo(beta=0.0), "dpo_loss: expected .*beta > 0, got 0.0"),
        (lambda: dpo(beta=-0.1), "beta > 0, got -0.1"),
        (lambda: dpo(beta=math.nan), "beta > 0, got nan"),
        (lambda: dpo(beta=math.inf), "finite beta > 0, got inf"),
        (lambda: dpo(offset=torch.zeros(2)), r"offset .* shape \(3,\), got \(2,\)"),
        (lambda: dpo(offset=torch.zeros(3, 1)), r"offset .* shape \(3,\), got \(3, 1\)"),
        (lambda: dpo(offset=torch.zeros(1)), r"offset .* shape \(3,\), got \(1,\)"),
        (lambda: dpo(label_smoothing=0.5), r"label_smoothing in \[0, 0.5\), got 0.5"),
        (lambda: dpo(label_smoothing=-0.1), "label_smoothing .* got -0.1"),
        (lambda: dpo(label_smoothing=math.nan), "label_smoothing .* got nan"),
        (lambda: offset_of([1.0, 2.0], [1.0]), r"score_offset: expected two score tensors of one shape, got \(2,\) and \(1,\)"),
        (lambda: offset_of([2.0], [1.0], alpha=-0.5), "alpha >= 0, got -0.5"),
        (lambda: offset_of([2.0], [1.0], alpha=math.nan), "alpha >= 0, got nan"),
        (lambda: offset_of([2.0], [1.0], alpha=math.inf), "finite alpha >= 0, got inf"),
        (lambda: offset_of([2.0, math.nan, 3.0, math.inf], [1.0] * 4), r"rows \[1, 3\] .* not finite"),
        (lambda: offset_of([2.0, 2.0], [1.0, -math.inf]), r"rows \[1\] .* not finite"),
        (lambda: offset_of([2.0], [1.0], scale="sqrt"), "'log', 'identity' or 'log_ratio', got 'sqrt'"),
        (lambda: offset_of([2.0, 0.0, 1.0], [1.0, 1.0, -1.0], scale="log_ratio"), r"scores > 0, got rows \[1, 2\]"),
        (lambda: plackett_luce((3,), (3,)), r"plackett_luce_loss: expected two \(B, K\) tensors, got \(3,\)"),
        (lambda: plackett_luce((2, 3), (2, 4)), r"got \(2, 3\) and \(2, 4\)"),
        (lambda: plackett_luce((2, 3), (3,)), r"got \(2, 3\) and \(3,\)"),
        (lambda: plackett_luce((2, 1), (2, 1)), r"K >= 2, got \(2, 1\)"),
        (lambda: plackett_luce(beta=0.0), "plackett_luce_loss: expected .*beta > 0, got 0.0"),
        (lambda: plackett_luce(beta=-1.0), "beta > 0, got -1.0"),
        (lambda: slic((3,), (3,), (2,), (3,)), r"slic_loss: expected four \(B,\).*\(2,\)"),
        (lambda: slic(beta=0.0), "slic_loss: expected finite beta > 0, got 0.0"),
        (lambda: slic(regularization=-0.1), "regularization >= 0, got -0.1"),
        (lambda: slic(regularization=math.nan), "regularization >= 0, got nan"),
    ],
)
def test_each_misuse_raises_a_value_error_that_says_what_came(call, words):
    with pytest.raises(ValueError, match=words):
        call()
