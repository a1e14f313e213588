"""All losses but those of test_exact.py against hand-worked numbers, slow loops, the papers' gradients and limits."""

import inspect
import math
from functools import partial

import pytest
import torch

from pdpo.losses import (
    dpo_loss,
    drdo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_loss,
    reward_distillation_loss,
    score_offset,
    sft_loss,
    simpo_loss,
    slic_loss,
    unlikelihood_loss,
)

LOG2, LOG3 = math.log(2), math.log(3)
SCALES = ("log", "identity", "log_ratio")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def four_logps(b: int = 6) -> list[torch.Tensor]:
    """Policy chosen, policy rejected, reference chosen, reference rejected: each (b,), of the size of real responses."""
    return [3 * normal(b, seed=seed) - 20 for seed in range(4)]


def rows(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def pair_with_margin(log_ratio_margin: float) -> list[torch.Tensor]:
    """Four (1,) log-probabilities whose chosen log-ratio exceeds the rejected one by this much."""
    return rows(log_ratio_margin - 12.0, -15.0, -12.0, -15.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# hand-worked numbers


@pytest.mark.parametrize("beta, label_smoothing", [(0.01, 0.0), (5.0, 0.2)])
def test_dpo_loss_is_log_two_where_policy_equals_reference(beta, label_smoothing):
    chosen, rejected = four_logps()[:2]
    result = dpo_loss(chosen, rejected, chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    torch.testing.assert_close(result.losses, torch.full_like(chosen, LOG2))
    assert not result.margins.any() and not result.chosen_rewards.any() and not result.rejected_rewards.any()


DPO_TO_EDPO = [
    # the policy gave the chosen response `margin` nats more than the reference did, the rejected one as much. DPO:
    # p = sigma(beta * margin - offset), loss = -(1 - smoothing) log p - smoothing log(1 - p)
    (dpo_loss, 2 * LOG3, {"beta": 0.5}, math.log(4 / 3)),  # p = 3/4
    (dpo_loss, -2 * LOG3, {"beta": 0.5}, math.log(4)),  # p = 1/4
    (dpo_loss, 2 * LOG3, {"beta": 1.0}, math.log(10 / 9)),  # p = 9/10
    (dpo_loss, 2 * LOG3, {"beta": 0.5, "offset": LOG3}, LOG2),  # it leads by exactly the offset: p = 1/2
    (dpo_loss, 2 * LOG3, {"beta": 0.5, "offset": -LOG3}, math.log(10 / 9)),  # a negative offset asks for less: p = 9/10
    (dpo_loss, 2 * LOG3, {"beta": 0.5, "label_smoothing": 0.1}, 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
    (dpo_loss, 2 * LOG3, {"beta": 0.5, "offset": 2 * LOG3, "label_smoothing": 0.25}, 0.75 * math.log(4) + 0.25 * math.log(4 / 3)),
    # IPO on means: beta 0.1, so the target is 5 nats; over 4 tokens each, responses that differ by 20 nats reach it
    (lambda *logps, **beta: ipo_loss(*(each / 4 for each in logps), **beta), 20.0, {"beta": 0.1}, 0.0),
    # e-DPO: (difference of scores - beta * margin) ** 2
    (reward_distillation_loss, 4.0, {"beta": 0.5, "score_difference": 2.0}, 0.0),
    (reward_distillation_loss, 4.0, {"beta": 0.5, "score_difference": 0.5}, 2.25),
    (reward_distillation_loss, 4.0, {"beta": 0.5, "score_difference": -1.0}, 9.0),  # labelled against its scores: turned round
    (reward_distillation_loss, -10.0, {"beta": 0.1, "score_difference": 0.0}, 1.0),  # equal scores: back to the reference
    (reward_distillation_loss, 10.0, {"beta": 0.1, "score_difference": 0.0}, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("loss, margin, arguments, expected", DPO_TO_EDPO)
def test_losses_of_pairs_equal_hand_worked_numbers(loss, margin, arguments, expected):
    given = {key: rows(value)[0] if key == "score_difference" else value for key, value in arguments.items()}
    assert loss(*pair_with_margin(margin), **given).losses.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_rewards_are_beta_times_log_ratios_and_the_margin_is_their_difference_without_the_offset():
    # beta 0.5: chosen 0.5 * (-10 + 13) = 1.5, rejected 0.5 * (-9 + 5) = -2, margin 3.5
    result = dpo_loss(*rows(-10.0, -9.0, -13.0, -5.0), beta=0.5, offset=7.0, label_smoothing=0.1)
    assert (result.chosen_rewards.item(), result.rejected_rewards.item(), result.margins.item()) == (1.5, -2.0, 3.5)
    for loss in (dpo_loss, plackett_luce_loss):
        beta = inspect.signature(loss).parameters["beta"]
        assert beta.kind is beta.KEYWORD_ONLY and beta.default is beta.empty


def test_dpo_loss_equals_a_slow_loop_with_one_offset_per_pair():
    logps, offset, beta, smoothing = four_logps(), normal(6, seed=9), 0.3, 0.15
    slow = []
    for pc, pr, rc, rr, delta in zip(*(x.tolist() for x in (*logps, offset)), strict=True):
        p = sigmoid(beta * ((pc - rc) - (pr - rr)) - delta)
        slow.append(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p))
    result = dpo_loss(*logps, beta=beta, offset=offset, label_smoothing=smoothing)
    torch.testing.assert_close(result.losses, torch.tensor(slow).double())


@pytest.mark.parametrize(
    "chosen, rejected, beta, regularization, loss",
    [(-10, -10, 0.5, 0.0, 2), (-10, -13, 0.5, 0.0, 0), (-12, -10, 1.0, 0.0, 3), (-10, -11, 0.5, 0.1, 2)],
)
def test_slic_loss_equals_hand_worked_numbers_and_reports_rewards_against_the_reference(
    chosen, rejected, beta, regularization, loss
):
    losses, *rewards = slic_loss(*rows(chosen, rejected, -11, -12), beta=beta, regularization=regularization)
    assert losses.item() == pytest.approx(loss)
    assert [each.item() for each in rewards] == pytest.approx([beta * (chosen + 11), beta * (rejected + 12)])


def test_simpo_orpo_and_kto_equal_hand_worked_numbers():
    # scale 2: rewards -1 and -3, an offset of 1 leaves a margin of 1
    simpo = simpo_loss(*rows(-0.5, -1.5), scale=2.0, offset=1.0)
    assert simpo.losses.item() == pytest.approx(-math.log(sigmoid(1.0))) and simpo.margins.item() == pytest.approx(2.0)
    # P = 1/2 and 1/5: odds 1 and 1/4, ratio 4, sigma(log 4) = 4/5
    orpo = orpo_loss(*rows(math.log(0.5), math.log(0.2)), weight=0.3)
    assert orpo.losses.item() == pytest.approx(math.log(2) - 0.3 * math.log(0.8))
    # rewards 0.5 * 2 = 1 and 0.5 * -4 = -2, zero point 0.5 * 1
    kto = kto_loss(*rows(-8.0, -14.0, -10.0, -10.0), torch.tensor(1.0), beta=0.5)
    assert kto.losses.item() == pytest.approx(2 - sigmoid(1 - 0.5) - sigmoid(0.5 + 2)) and kto.margins.item() == 3.0
    # what a drift of 2 nats makes of the zero point
    drifted = [kto_loss(*rows(2.0, -2.0, 0.0, 0.0), torch.tensor(kl), beta=1.0).losses.item() for kl in (0.0, 2.0)]
    assert drifted == pytest.approx([2 - 2 * sigmoid(2), 2 - sigmoid(0) - sigmoid(4)])


def slow_drdo(z_w, z_l, student, oracle, alpha, gamma):
    """Eq. 6 of one pair, in ordinary numbers."""
    weight = (1 - sigmoid(z_w - z_l)) ** gamma
    return (oracle - student) ** 2 - alpha * weight * math.log(math.exp(z_w) / (1 - math.exp(z_l)))


@pytest.mark.parametrize(
    "chosen, rejected, student, oracle, alpha, gamma, loss",
    [
        # probabilities of the chosen and of the rejected response; the weight is (rejected / (chosen + rejected)) ** gamma
        (1 / 2, 1 / 2, 1.0, 3.0, 0.1, 2.0, 4.0),  # the logarithm is 0: what is left is the square
        (1 / 4, 1 / 4, 0.0, 0.0, 1.0, 1.0, LOG3 / 2),  # a tie: weight 1/2, 1/3 inside the logarithm
        (1 / 4, 1 / 4, 0.0, 0.0, 1.0, 0.0, LOG3),  # gamma 0: weight 1
        (1 / 4, 1 / 4, 0.0, 0.0, 0.1, 2.0, LOG3 / 40),
        (3 / 8, 1 / 8, 2.0, 2.0, 1.0, 2.0, math.log(7 / 3) / 16),  # ranked right: weight (1/4)^2
        (1 / 8, 3 / 8, 2.0, 2.0, 1.0, 2.0, math.log(5) * 9 / 16),  # ranked wrong
        (1 / 4, 9 / 10, 0.0, 0.0, 1.0, 0.0, -math.log(5 / 2)),  # as printed a likely rejected response pays
    ],
)
def test_drdo_loss_equals_hand_worked_numbers(chosen, rejected, student, oracle, alpha, gamma, loss):
    pair = rows(math.log(chosen), math.log(rejected), student, 0.0, oracle, 0.0)
    assert drdo_loss(*pair, alpha=alpha, gamma=gamma).losses.item() == pytest.approx(loss, abs=1e-12)


def test_drdo_loss_equals_a_slow_loop_and_reports_the_students_scores():
    z_w, z_l, *scores = -normal(6).abs(), -normal(6, seed=1).abs(), *(normal(6, seed=seed) for seed in range(2, 6))
    result = drdo_loss(z_w, z_l, *scores, alpha=0.7, gamma=1.5)
    pairs = zip(*(each.tolist() for each in (z_w, z_l, scores[0] - scores[1], scores[2] - scores[3])), strict=True)
    torch.testing.assert_close(result.losses, torch.tensor([slow_drdo(*pair, 0.7, 1.5) for pair in pairs]).double())
    assert torch.equal(result.chosen_rewards, scores[0]) and torch.equal(result.rejected_rewards, scores[1])
    assert torch.equal(drdo_loss(z_w, z_l, *scores).losses, drdo_loss(z_w, z_l, *scores, alpha=0.1, gamma=2.0).losses)


# gradients and directions


def test_sft_loss_is_the_negative_log_probability_with_gradient_minus_one():
    logps = torch.tensor([0.5, 0.125]).log().requires_grad_()
    losses = sft_loss(logps)
    torch.testing.assert_close(losses, torch.tensor([LOG2, 3 * LOG2]))
    losses.sum().backward()
    assert logps.grad.tolist() == [-1, -1]


E_DPO = partial(reward_distillation_loss, score_difference=torch.tensor([2.0]))


@pytest.mark.parametrize(
    "loss, optimum",
    [
        # DPO's gradient vanishes where sigma(beta * h - offset) = 1 - label_smoothing: h = (offset + log((1 - e) / e)) / beta.
        # So a larger beta keeps the policy closer to the reference, and so does more smoothing; an offset pushes it away.
        (partial(dpo_loss, beta=0.1, label_smoothing=0.1), math.log(9) / 0.1),
        (partial(dpo_loss, beta=0.5, label_smoothing=0.3, offset=0.5), (0.5 + math.log(7 / 3)) / 0.5),
        (partial(dpo_loss, beta=2.0, label_smoothing=0.1, offset=0.5), (0.5 + math.log(9)) / 2),
        (partial(E_DPO, beta=0.1), 20.0),
        (partial(E_DPO, beta=1.0), 2.0),  # a larger beta keeps the distilled policy closer,
        (
            partial(reward_distillation_loss, score_difference=torch.tensor([6.0]), beta=1.0),
            6.0,
        ),  # larger scores take it further
    ],
)
def test_the_optimal_log_ratio_is_inversely_proportional_to_beta(loss, optimum):
    for step in (0.0, 0.01, -0.01):
        chosen, *rest = pair_with_margin(optimum + step)
        (gradient,) = torch.autograd.grad(loss(chosen.requires_grad_(), *rest).losses.sum(), chosen)
        assert gradient.item() == pytest.approx(0, abs=1e-12) if step == 0 else step * gradient.item() > 0


@pytest.mark.parametrize("beta, offset", [(0.1, 0.0), (1.0, 0.7), (0.1, -0.7)])
def test_dpo_gradient_is_the_papers_formula(beta, offset):
    # Rafailov 2023, section 4: -beta * sigma(r_l - r_w) * (grad log pi(y_w) - grad log pi(y_l)), for a policy that is a
    # softmax over 5 responses; ODPO adds the offset inside: sigma(r_l - r_w + Delta)
    theta, reference, w, l = normal(5).requires_grad_(), normal(5, seed=1).log_softmax(0), 3, 1
    policy = theta.log_softmax(0)
    logps = policy[w : w + 1], policy[l : l + 1], reference[w : w + 1], reference[l : l + 1]
    result = dpo_loss(*logps, beta=beta, offset=offset)
    (gradient,) = torch.autograd.grad(result.losses.sum(), theta, retain_graph=True)
    (grad_w,), (grad_l,) = (torch.autograd.grad(policy[y], theta, retain_graph=True) for y in (w, l))
    weight = beta * sigmoid(result.rejected_rewards.item() - result.chosen_rewards.item() + offset)
    torch.testing.assert_close(gradient, -weight * (grad_w - grad_l))


def test_all_gradients_are_those_of_finite_differences():
    logps, scores = [-normal(6, seed=seed).abs() for seed in range(4)], [normal(6, seed=seed) for seed in range(4, 8)]
    for inputs, loss in (
        (logps, lambda *each: ipo_loss(*each, beta=0.3).losses),
        (logps, lambda *each: reward_distillation_loss(*each, scores[0], beta=0.3).losses),
        (logps[:2] + scores[:2], lambda *each: drdo_loss(*each, *scores[2:], alpha=0.7, gamma=1.5).losses),
        (logps[:2] + scores[:2], lambda *each: drdo_loss(*each, *scores[2:], gamma=0.0).losses),
        (logps[:2], lambda *each: simpo_loss(*each, scale=2.0, offset=0.5).losses),
        (logps[:2], lambda *each: orpo_loss(*each, weight=0.7).losses),
        (logps, lambda *each: kto_loss(*each, torch.tensor(0.4).double(), beta=0.3).losses),
    ):
        assert torch.autograd.gradcheck(loss, [each.requires_grad_() for each in inputs])


def test_only_the_losses_carry_a_gradient_and_only_to_what_learns():
    result = dpo_loss(*(x.requires_grad_() for x in four_logps()), beta=0.3)
    assert result.losses.requires_grad
    assert not any(x.requires_grad for x in (result.chosen_rewards, result.rejected_rewards, result.margins))
    tensors = [-normal(3, seed=seed).abs().requires_grad_() for seed in range(6)]
    distilled = reward_distillation_loss(*tensors[:5], beta=0.1).losses.sum()
    assert torch.autograd.grad(distilled, tensors[4], allow_unused=True) == (None,)
    # DRDO at alpha 0 is distillation alone, into the student's scores
    slopes = torch.autograd.grad(drdo_loss(*tensors, alpha=0.0).losses.sum(), tensors, allow_unused=True)
    assert not slopes[0].any() and not slopes[1].any() and slopes[2].all() and slopes[3].all() and slopes[4:] == (None, None)


def test_slic_pulls_only_on_pairs_below_its_margin_and_on_chosen_responses_by_the_regularization():
    chosen, rejected = torch.tensor([-10.0, -10.0], requires_grad=True), torch.tensor([-11.0, -13.0], requires_grad=True)
    losses = slic_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.5, regularization=0.25).losses
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert [slope.tolist() for slope in slopes] == [[-1.25, -0.25], [1.0, 0.0]]


@pytest.mark.parametrize("z_w, z_l, constant, full", [(-2.0, -2.5, -0.0013, 0.033), (-12.0, -10.0, -3.5e-6, 0.22)])
def test_what_lowers_the_rejected_response_under_drdo_is_the_gradient_through_the_weight(z_w, z_l, constant, full):
    chosen, rejected, *scores = rows(z_w, z_l, 0.0, 0.0, 0.0, 0.0)
    (slope,) = torch.autograd.grad(drdo_loss(chosen, rejected.requires_grad_(), *scores).losses, rejected)
    # Eq. 34: the weight held constant; d log(1 - exp(z)) / dz = -exp(z) / (1 - exp(z))
    held = -0.1 * (1 - sigmoid(z_w - z_l)) ** 2 * math.exp(z_l) / (1 - math.exp(z_l))
    assert (held, slope.item()) == (pytest.approx(constant, rel=0.03), pytest.approx(full, rel=0.03))


# limits, and numbers of any size


@pytest.mark.parametrize(
    "size, argument, label_smoothing, offset",
    [(1e4, 0, 0.0, 0.0), (1e4, 0, 0.0, 1e4), (-1e4, 1, 0.1, 1e4), (1e4, 2, 0.1, -1e4), (-1e4, 3, 0.0, 1e4)],
)
def test_dpo_losses_and_gradients_are_finite_and_right_at_ten_thousand(size, argument, label_smoothing, offset):
    logps = [torch.tensor([size if i == argument else 0.0], requires_grad=True) for i in range(4)]
    loss = dpo_loss(*logps, beta=1.0, offset=offset, label_smoothing=label_smoothing).losses
    gradients = torch.autograd.grad(loss.sum(), logps)
    # at this size -log sigma(z) is max(-z, 0), and log 2 at z = 0
    z = size * (1, -1, -1, 1)[argument] - offset
    expected = LOG2 if z == 0 else (1 - label_smoothing) * max(-z, 0) + label_smoothing * max(z, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert all(g.isfinite() and g.abs() <= 1 for g in gradients)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 5.0])
def test_drdo_is_finite_in_float32_with_certain_responses_of_one_token_and_at_ten_thousand(gamma):
    chosen, rejected = [0.0, -1e-7, -1.0, -20.0, -1e4], [0.0, 1e-7, -1e-8, -1e-7, -1e-3, -0.7, -30.0, -1e4]
    z_w, z_l = torch.cartesian_prod(torch.tensor(chosen), torch.tensor(rejected)).unbind(1)
    tensors = [each.clone().requires_grad_() for each in (z_w, z_l, torch.zeros(40), torch.zeros(40))]
    losses = drdo_loss(*tensors, torch.zeros(40), torch.zeros(40), gamma=gamma).losses
    assert losses.isfinite().all() and all(each.isfinite().all() for each in torch.autograd.grad(losses.sum(), tensors))
    ordinary = (z_w > -1e3) & (z_l > -1e3) & (z_l <= -1e-3)
    slow = [slow_drdo(*each, 0.0, 0.0, 0.1, gamma) for each in zip(z_w[ordinary].tolist(), z_l[ordinary].tolist(), strict=True)]
    assert losses[ordinary].tolist() == pytest.approx(slow, rel=1e-4, abs=1e-9)


def test_at_a_difference_of_one_half_reward_distillation_is_ipo_in_units_of_the_reward():
    logps = four_logps()
    ipo, distilled = ipo_loss(*logps, beta=0.3), reward_distillation_loss(*logps, torch.full((6,), 0.5), beta=0.3)
    torch.testing.assert_close(distilled.losses, 0.3**2 * ipo.losses)
    torch.testing.assert_close(distilled.margins, ipo.margins)


def test_simpo_orpo_and_kto_at_their_limits():
    equal = -normal(5).abs()
    assert simpo_loss(equal, equal, scale=2.0).losses.tolist() == pytest.approx([LOG2] * 5)
    assert torch.equal(orpo_loss(equal, 2 * equal, weight=0.0).losses, -equal)  # SFT on the chosen response
    at_reference = kto_loss(equal, 2 * equal, equal, 2 * equal, torch.tensor(0.0), beta=0.3)
    assert at_reference.losses.tolist() == pytest.approx([1.0] * 5)
    certain = torch.zeros(2), torch.tensor([-1e4, 0.0])
    assert orpo_loss(*certain, weight=1.0).losses.isfinite().all() and simpo_loss(*certain, scale=10.0).losses.isfinite().all()


def test_unlikelihood_raises_the_chosen_response_lowers_the_rejected_one_by_its_weight_and_at_0_is_sft_on_the_chosen():
    chosen, rejected = (each.requires_grad_() for each in four_logps()[:2])
    result = unlikelihood_loss(chosen, rejected, weight=0.25)
    assert result.losses.tolist() == [-w + 0.25 * l for w, l in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert [each[0].item() for each in torch.autograd.grad(result.losses.sum(), (chosen, rejected))] == [-1, 0.25]
    assert torch.equal(result.margins, (chosen - rejected).detach())
    assert torch.equal(unlikelihood_loss(chosen, rejected, weight=0.0).losses, sft_loss(chosen))


# ODPO's offset


@pytest.mark.parametrize(
    "scale, chosen, rejected, f",
    [
        ("log", 5.0, 2.0, LOG3),
        ("identity", 5.0, 2.0, 3.0),
        ("log_ratio", 6.0, 2.0, LOG3),
        ("log", 2.5, 2.0, -LOG2),  # a difference below 1: less than a right order is demanded
        *((scale, 2.0, 2.0, 0.0) for scale in SCALES),  # a tie
        ("log", 2.0, 5.0, 0.0),  # labelled against its scores
        ("identity", 2.0, 5.0, -3.0),
        ("log_ratio", 2.0, 6.0, -LOG3),
    ],
)
def test_score_offset_equals_hand_worked_numbers_without_a_gradient_and_takes_integers(scale, chosen, rejected, f):
    scores = [each.requires_grad_() for each in rows(chosen, rejected)]
    offset = score_offset(*scores, alpha=0.5, scale=scale)
    assert offset.shape == (1,) and offset.item() == pytest.approx(0.5 * f, abs=1e-12) and not offset.requires_grad
    assert score_offset(*scores, alpha=0.0, scale=scale).item() == 0  # DPO
    if chosen != 2.5:
        whole = score_offset(*(each.long() for each in scores), alpha=0.5, scale=scale)
        torch.testing.assert_close(whole, offset, check_dtype=False)


def test_score_offset_by_default_is_the_log_of_the_difference_with_alpha_one_and_finite_at_any_size():
    chosen, rejected = torch.tensor([9.0, 4.0, 1.5]), torch.tensor([1.0, 3.0, 1.0])
    torch.testing.assert_close(score_offset(chosen, rejected), torch.tensor([3 * LOG2, 0, -LOG2]))
    chosen, rejected = torch.tensor([1e4, 1e-4, 1.0, 1.0 + 2**-23]), torch.tensor([1e-4, 1e4, 1.0, 1.0])
    assert all(score_offset(chosen, rejected, scale=scale).isfinite().all() for scale in SCALES)


# Plackett-Luce


@pytest.mark.parametrize("k", [2, 6])
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


def test_plackett_luce_with_two_responses_is_dpo_in_value_and_gradient():
    policy, reference = normal(8, 2).requires_grad_(), normal(8, 2, seed=1)
    ranking = plackett_luce_loss(policy, reference, beta=0.3)
    pair = dpo_loss(*policy.T, *reference.T, beta=0.3).losses
    torch.testing.assert_close(ranking, pair)
    torch.testing.assert_close(*(torch.autograd.grad(losses.sum(), policy)[0] for losses in (ranking, pair)))


def test_plackett_luce_gradient_pushes_each_response_by_choice_probabilities_times_beta():
    # d loss / d log pi(y_i) = beta * (sum_{k<=i} softmax(r_k..r_K)_i - 1); the constants of a prompt get no push
    policy, reference, beta = normal(1, 4).requires_grad_(), normal(1, 4, seed=1), 0.3
    (gradient,) = torch.autograd.grad(plackett_luce_loss(policy, reference, beta=beta).sum(), policy)
    rewards, expected = beta * (policy - reference).detach()[0], -torch.ones(4, dtype=torch.float64)
    for k in range(4):
        expected[k:] += rewards[k:].softmax(0)
    torch.testing.assert_close(gradient[0], beta * expected)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


# errors

SOUND = {  # each loss's (B,) tensors and the hyperparameters that it cannot do without
    dpo_loss: (4, {"beta": 0.1}), slic_loss: (4, {"beta": 0.1, "regularization": 0.0}), drdo_loss: (6, {}),
    reward_distillation_loss: (5, {"beta": 0.1}), orpo_loss: (2, {"weight": 0.1}), unlikelihood_loss: (2, {"weight": 0.5}),
    plackett_luce_loss: (0, {"beta": 0.1}), score_offset: (0, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    "loss, tensors, arguments, words",
    [
        (dpo_loss, [(3,), (3,), (3,), (2,)], {}, r"dpo_loss: expected four \(B,\).*\(2,\)"),
        (dpo_loss, [(3, 5)] * 4, {}, r"got \[\(3, 5\).*Sum the token log-probabilities"),
        (dpo_loss, [], {"beta": 0.0}, "dpo_loss: expected .*beta > 0, got 0.0"),
        (dpo_loss, [], {"beta": math.nan}, "beta > 0, got nan"),
        (dpo_loss, [], {"beta": math.inf}, "finite beta > 0, got inf"),
        (dpo_loss, [], {"offset": torch.zeros(3, 1)}, r"offset .* shape \(3,\), got \(3, 1\)"),
        (dpo_loss, [], {"offset": torch.zeros(1)}, r"offset .* shape \(3,\), got \(1,\)"),
        (dpo_loss, [], {"label_smoothing": 0.5}, r"label_smoothing in \[0, 0.5\), got 0.5"),
        (dpo_loss, [], {"label_smoothing": -0.1}, "label_smoothing .* got -0.1"),
        (score_offset, [[1.0, 2.0], [1.0]], {}, r"score_offset: expected two score tensors of one shape, got \(2,\) and \(1,\)"),
        (score_offset, [[2.0], [1.0]], {"alpha": -0.5}, "alpha >= 0, got -0.5"),
        (score_offset, [[2.0], [1.0]], {"alpha": math.inf}, "finite alpha >= 0, got inf"),
        (score_offset, [[2.0, math.nan, 3.0, math.inf], [1.0] * 4], {}, r"rows \[1, 3\] .* not finite"),
        (score_offset, [[2.0], [1.0]], {"scale": "sqrt"}, "'log', 'identity' or 'log_ratio', got 'sqrt'"),
        (score_offset, [[2.0, 0.0, 1.0], [1.0, 1.0, -1.0]], {"scale": "log_ratio"}, r"scores > 0, got rows \[1, 2\]"),
        (plackett_luce_loss, [(3,), (3,)], {}, r"plackett_luce_loss: expected two \(B, K\) tensors, got \(3,\)"),
        (plackett_luce_loss, [(2, 3), (2, 4)], {}, r"got \(2, 3\) and \(2, 4\)"),
        (plackett_luce_loss, [(2, 1), (2, 1)], {}, r"K >= 2, got \(2, 1\)"),
        (plackett_luce_loss, [(2, 3), (2, 3)], {"beta": 0.0}, "plackett_luce_loss: expected .*beta > 0, got 0.0"),
        (slic_loss, [(3,), (3,), (2,), (3,)], {}, r"slic_loss: expected four \(B,\).*\(2,\)"),
        (slic_loss, [], {"beta": 0.0}, "slic_loss: expected finite beta > 0, got 0.0"),
        (slic_loss, [], {"regularization": -0.1}, "regularization >= 0, got -0.1"),
        (reward_distillation_loss, [(3,)] * 4 + [()], {}, r"reward_distillation_loss: expected five \(B,\) tensors.*\(\)"),
        (reward_distillation_loss, [], {"beta": 0.0}, "reward_distillation_loss: expected finite beta > 0, got 0.0"),
        (drdo_loss, [(3,)] * 5 + [(2,)], {}, r"drdo_loss: expected six \(B,\) tensors.*\(2,\)"),
        (drdo_loss, [], {"alpha": -1.0}, "drdo_loss: expected finite alpha >= 0 and gamma >= 0, got -1.0 and 2.0"),
        (drdo_loss, [], {"gamma": math.nan}, "got 0.1 and nan"),
        (orpo_loss, [(3,), (2,)], {}, "orpo_loss: expected two"),
        (orpo_loss, [], {"weight": -0.1}, "orpo_loss: expected finite weight >= 0"),
        (orpo_loss, [], {"weight": math.inf}, "orpo_loss: expected finite weight >= 0"),
        (unlikelihood_loss, [(3,), (2,)], {}, "unlikelihood_loss: expected two"),
        (unlikelihood_loss, [], {"weight": 1.1}, "unlikelihood_loss: expected weight in"),
        (unlikelihood_loss, [], {"weight": math.nan}, "unlikelihood_loss: expected weight in"),
    ],
)  # fmt: skip
def test_each_misuse_raises_a_value_error_that_says_what_came(loss, tensors, arguments, words):
    number, sound = SOUND[loss]
    given = [torch.tensor(each) if isinstance(each, list) else torch.zeros(each) for each in tensors or [(3,)] * number]
    with pytest.raises(ValueError, match=words):
        loss(*given, **sound | arguments)
