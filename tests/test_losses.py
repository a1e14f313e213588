"""The losses against hand-worked numbers, slow loops, finite differences and limits; what they mean for a policy: test_exact.py."""

import math

import pytest
import torch

from pdpo.losses import (
    dpo_loss,
    drdo_loss,
    gae,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_loss,
    ppo_loss,
    reward_distillation_loss,
    reward_model_loss,
    score_offset,
    simpo_loss,
    slic_loss,
    unlikelihood_loss,
)

LOG2, LOG3 = math.log(2), math.log(3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# pairs and rankings


@pytest.mark.parametrize(
    "loss, chosen, rejected, arguments, expected",
    [
        # of a reference that gives -12 to the chosen response and -15 to the rejected one; DPO at p = sigma(beta * margin - offset)
        (dpo_loss, -12 + 2 * LOG3, -15, {"beta": 0.5}, math.log(4 / 3)),  # p = 3/4
        (dpo_loss, -12 + 2 * LOG3, -15, {"beta": 0.5, "offset": LOG3}, LOG2),  # it leads by exactly the offset
        (ipo_loss, -12, -15, {"beta": 0.5}, 1.0),  # 1 / (2 beta)^2
        (ipo_loss, -9, -15, {"beta": 0.5}, 4.0),  # past its target it costs again, unlike DPO
        (reward_distillation_loss, -8, -15, {"beta": 0.5, "score_difference": 2.0}, 0.0),  # (difference - beta * margin)^2
        (reward_distillation_loss, -8, -15, {"beta": 0.5, "score_difference": -1.0}, 9.0),
        (slic_loss, -10, -13, {"beta": 0.5, "regularization": 0.0}, 0.0),  # 1 / beta is 2, and it leads by 3
        (slic_loss, -10, -11, {"beta": 0.5, "regularization": 0.1}, 2.0),
        (kto_loss, -10, -17, {"beta": 0.5, "kl": 1.0}, 2 - sigmoid(1 - 0.5) - sigmoid(0.5 + 1)),
    ],
)
def test_losses_of_pairs_and_their_rewards_equal_hand_worked_numbers(loss, chosen, rejected, arguments, expected):
    given = {key: rows(value)[0] if key in ("score_difference", "kl") else value for key, value in arguments.items()}
    result = loss(*rows(chosen, rejected, -12, -15), **given)
    assert result.losses.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    rewards = [arguments["beta"] * (chosen + 12), arguments["beta"] * (rejected + 15)]
    assert [result.chosen_rewards.item(), result.rejected_rewards.item()] == pytest.approx(rewards)
    assert result.margins.item() == pytest.approx(rewards[0] - rewards[1])  # without the offset


def test_losses_without_a_reference_equal_hand_worked_numbers():
    # scale 2: rewards -1 and -3, an offset of 1 leaves a margin of 1
    simpo = simpo_loss(*rows(-0.5, -1.5), scale=2.0, offset=1.0)
    assert simpo.losses.item() == pytest.approx(-math.log(sigmoid(1.0))) and simpo.margins.item() == pytest.approx(2.0)
    # P = 1/2 and 1/5: odds 1 and 1/4, ratio 4, sigma(log 4) = 4/5
    orpo = orpo_loss(*rows(math.log(0.5), math.log(0.2)), weight=0.3)
    assert orpo.losses.item() == pytest.approx(LOG2 - 0.3 * math.log(0.8))
    unlikelihood = unlikelihood_loss(*rows(-10.0, -12.0), weight=0.25)
    assert unlikelihood.losses.item() == 7 and unlikelihood.margins.item() == 2
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 1e4]), torch.tensor([1.0, 1.0, -1.0, -1e4])
    expected = [LOG2, math.log(1 + math.e), math.log(1 + math.exp(-3)), 0.0]
    assert reward_model_loss(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-6)


def test_dpo_loss_equals_a_slow_loop_with_one_offset_per_pair():
    logps, offset, beta, smoothing = [3 * normal(6, seed=seed) - 20 for seed in range(4)], normal(6, seed=9), 0.3, 0.15
    slow = []
    for pc, pr, rc, rr, delta in zip(*(x.tolist() for x in (*logps, offset)), strict=True):
        p = sigmoid(beta * ((pc - rc) - (pr - rr)) - delta)
        slow.append(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p))
    result = dpo_loss(*logps, beta=beta, offset=offset, label_smoothing=smoothing)
    torch.testing.assert_close(result.losses, torch.tensor(slow).double())


def test_plackett_luce_loss_equals_hand_worked_numbers():
    # beta 0.5 and log-ratios 2 log 4, 2 log 2, 0: exp(rewards) are 4, 2, 1, so P = 4/7 * 2/3 = 8/21; worst first 1/7 * 2/6
    log_ratios = 2 * torch.tensor([[4.0, 2.0, 1.0], [1.0, 2.0, 4.0]], dtype=torch.float64).log()
    reference = normal(2, 3) - 20
    losses = plackett_luce_loss(reference + log_ratios, reference, beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([21 / 8, 21.0]).double().log())


def slow_drdo(z_w, z_l, student, oracle, alpha, gamma):
    """Eq. 6 of one pair, in ordinary numbers."""
    weight = (1 - sigmoid(z_w - z_l)) ** gamma
    return (oracle - student) ** 2 - alpha * weight * math.log(math.exp(z_w) / (1 - math.exp(z_l)))


def test_drdo_loss_equals_a_hand_worked_number_with_the_papers_alpha_and_gamma():
    # pi 1/2 and 1/4: p_w = 2/3, its weight (1/3)^2; the log-unlikelihood ratio is log(2/3); differences of 1/2 and 2
    (loss,) = drdo_loss(*rows(-LOG2, -2 * LOG2, 0.5, 0.0, 3.0, 1.0)).losses.tolist()
    assert loss == pytest.approx(1.5**2 - 0.1 / 9 * math.log(2 / 3))


def test_drdo_loss_equals_a_slow_loop_and_reports_the_students_scores():
    z_w, z_l, *scores = -normal(6).abs(), -normal(6, seed=1).abs(), *(normal(6, seed=seed) for seed in range(2, 6))
    result = drdo_loss(z_w, z_l, *scores, alpha=0.7, gamma=1.5)
    pairs = zip(*(each.tolist() for each in (z_w, z_l, scores[0] - scores[1], scores[2] - scores[3])), strict=True)
    torch.testing.assert_close(result.losses, torch.tensor([slow_drdo(*pair, 0.7, 1.5) for pair in pairs]).double())
    assert torch.equal(result.chosen_rewards, scores[0]) and torch.equal(result.rejected_rewards, scores[1])


# gradients


def test_all_gradients_are_those_of_finite_differences():
    logps, scores = [-normal(6, seed=seed).abs() for seed in range(4)], [normal(6, seed=seed) for seed in range(4, 8)]
    for inputs, loss in (
        (logps, lambda *each: dpo_loss(*each, beta=0.3, offset=0.5, label_smoothing=0.1).losses),
        (logps, lambda *each: ipo_loss(*each, beta=0.3).losses),
        (logps, lambda *each: reward_distillation_loss(*each, scores[0], beta=0.3).losses),
        (logps[:2] + scores[:2], lambda *each: drdo_loss(*each, *scores[2:], alpha=0.7, gamma=1.5).losses),
        (logps[:2], lambda *each: orpo_loss(*each, weight=0.7).losses),
        (logps[:2], lambda *each: simpo_loss(*each, scale=2.0, offset=0.5).losses),
        (logps, lambda *each: kto_loss(*each, torch.tensor(0.4).double(), beta=0.3).losses),
    ):
        assert torch.autograd.gradcheck(loss, [each.requires_grad_() for each in inputs])


def test_only_the_losses_carry_a_gradient_and_only_to_what_learns():
    tensors = [-normal(3, seed=seed).abs().requires_grad_() for seed in range(6)]
    result = dpo_loss(*tensors[:4], beta=0.3)
    assert not any(x.requires_grad for x in (result.chosen_rewards, result.rejected_rewards, result.margins))
    distilled = reward_distillation_loss(*tensors[:5], beta=0.1).losses.sum()
    assert torch.autograd.grad(distilled, tensors[4], allow_unused=True) == (None,)
    slopes = torch.autograd.grad(drdo_loss(*tensors).losses.sum(), tensors, allow_unused=True)
    assert all(each.all() for each in slopes[:4]) and slopes[4:] == (None, None)


# numbers of any size


def test_losses_and_gradients_are_finite_and_right_at_ten_thousand():
    policy, zero = torch.tensor([1e4, -1e4], requires_grad=True), torch.zeros(2)
    losses = dpo_loss(policy, zero, zero, zero, beta=1.0, label_smoothing=0.1).losses
    assert losses.tolist() == pytest.approx([1e3, 9e3], rel=1e-6)
    assert torch.autograd.grad(losses.sum(), policy)[0].abs().max() <= 1
    assert orpo_loss(zero, torch.tensor([0.0, -1e4]), weight=1.0).losses.tolist() == pytest.approx([LOG2, 0])  # certain ones
    scores = torch.tensor([1e4, 1e-4, 1.0, 1.0 + 2**-23]), torch.tensor([1e-4, 1e4, 1.0, 1.0])
    assert all(score_offset(*scores, scale=scale).isfinite().all() for scale in ("log", "identity", "log_ratio"))


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_drdo_is_finite_in_float32_with_certain_responses_of_one_token_and_at_ten_thousand(gamma):
    chosen, rejected = [0.0, -1e-7, -1.0, -20.0, -1e4], [0.0, 1e-7, -1e-8, -1e-7, -1e-3, -0.7, -30.0, -1e4]
    z_w, z_l = torch.cartesian_prod(torch.tensor(chosen), torch.tensor(rejected)).unbind(1)
    tensors = [each.clone().requires_grad_() for each in (z_w, z_l, torch.zeros(40), torch.zeros(40))]
    losses = drdo_loss(*tensors, torch.zeros(40), torch.zeros(40), gamma=gamma).losses
    assert losses.isfinite().all() and all(each.isfinite().all() for each in torch.autograd.grad(losses.sum(), tensors))
    ordinary = (z_w > -1e3) & (z_l > -1e3) & (z_l <= -1e-3)
    slow = [slow_drdo(*each, 0.0, 0.0, 0.1, gamma) for each in zip(z_w[ordinary].tolist(), z_l[ordinary].tolist(), strict=True)]
    assert losses[ordinary].tolist() == pytest.approx(slow, rel=1e-4, abs=1e-9)


# ODPO's offset


@pytest.mark.parametrize(
    "scale, chosen, rejected, f",
    [
        ("log", 5.0, 2.0, LOG3),
        ("log", 2.5, 2.0, -LOG2),  # a difference below 1: less than a right order is demanded
        ("log", 2.0, 2.0, 0.0),
        ("log", 2.0, 5.0, 0.0),  # labelled against its scores
        ("identity", 2.0, 5.0, -3.0),
        ("log_ratio", 6.0, 2.0, LOG3),
    ],
)
def test_score_offset_equals_hand_worked_numbers_without_a_gradient_and_takes_integers(scale, chosen, rejected, f):
    scores = [each.requires_grad_() for each in rows(chosen, rejected)]
    offset = score_offset(*scores, alpha=0.5, scale=scale)
    assert offset.shape == (1,) and offset.item() == pytest.approx(0.5 * f, abs=1e-12) and not offset.requires_grad
    if scale == "log":  # which is the default, with alpha 1
        torch.testing.assert_close(score_offset(*scores), 2 * offset)
    if chosen != 2.5:
        whole = score_offset(*(each.long() for each in scores), alpha=0.5, scale=scale)
        torch.testing.assert_close(whole, offset, check_dtype=False)


# PPO's


def test_ppo_loss_equals_a_slow_loop_and_is_flat_past_the_clip():
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
    expected = [0, 0, math.exp(60), 0, 0, math.exp(59)]  # it still falls back where A < 0
    assert losses.isfinite().all() and slope.tolist() == pytest.approx(expected, rel=1e-5)


def test_gae_is_the_papers_sum():
    (rewards, values), gamma, lam = normal(2, 3, 5), 0.9, 0.8
    advantages = gae(rewards, values, gamma=gamma, lam=lam)
    for row in range(3):
        after = values[row].tolist()[1:] + [0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(rewards[row].tolist(), after, values[row].tolist(), strict=True)]
        slow = [sum((gamma * lam) ** k * deltas[t + k] for k in range(5 - t)) for t in range(5)]
        assert advantages[row].tolist() == pytest.approx(slow, rel=1e-12)


# errors


@pytest.mark.parametrize(
    "loss, tensors, arguments, words",
    [
        (dpo_loss, [(3,), (3,), (3,), (2,)], {"beta": 0.1}, r"dpo_loss: expected four \(B,\).*\(2,\).*Sum the token"),
        (dpo_loss, [(3, 5)] * 4, {"beta": 0.1}, r"got \[\(3, 5\)"),
        (dpo_loss, [(3,)] * 4, {"beta": 0.0}, "dpo_loss: expected .*beta > 0, got 0.0"),
        (dpo_loss, [(3,)] * 4, {"beta": math.inf}, "finite beta > 0, got inf"),
        (dpo_loss, [(3,)] * 4, {"beta": 0.1, "label_smoothing": 0.5}, r"label_smoothing in \[0, 0.5\), got 0.5"),
        (score_offset, [(2,), (1,)], {}, r"score_offset: expected two score tensors of one shape, got \(2,\) and \(1,\)"),
        (score_offset, [(1,), (1,)], {"alpha": -0.5}, "alpha >= 0, got -0.5"),
        (score_offset, [(1,), (1,)], {"scale": "sqrt"}, "'log', 'identity' or 'log_ratio', got 'sqrt'"),
        (score_offset, [[2.0, math.nan, 3.0, math.inf], [1.0] * 4], {}, r"rows \[1, 3\] .* not finite"),
        (score_offset, [[2.0, 0.0, 1.0], [1.0, 1.0, -1.0]], {"scale": "log_ratio"}, r"scores > 0, got rows \[1, 2\]"),
        (
            plackett_luce_loss,
            [(2, 3), (2, 4)],
            {"beta": 0.1},
            r"plackett_luce_loss: expected two \(B, K\) tensors, got \(2, 3\)",
        ),
        (plackett_luce_loss, [(2, 3), (2, 3)], {"beta": 0.0}, "plackett_luce_loss: expected .*beta > 0, got 0.0"),
        (slic_loss, [(3,)] * 4, {"beta": 0.1, "regularization": -0.1}, "regularization >= 0, got -0.1"),
        (drdo_loss, [(3,)] * 6, {"alpha": -1.0}, "drdo_loss: expected finite alpha >= 0 and gamma >= 0, got -1.0 and 2.0"),
        (orpo_loss, [(3,)] * 2, {"weight": -0.1}, "orpo_loss: expected finite weight >= 0"),
        (unlikelihood_loss, [(3,)] * 2, {"weight": 1.1}, "unlikelihood_loss: expected weight in"),
        (reward_model_loss, [(2,), (3,)], {}, "one shape"),
        (ppo_loss, [(2,), (2,), (3,)], {}, "ppo_loss: expected three tensors"),
        (ppo_loss, [(2,)] * 3, {"clip": 0.0}, "clip > 0"),
        (gae, [(2,)] * 2, {}, "gae: expected rewards and values"),
        (gae, [(2, 3)] * 2, {"gamma": 1.5}, "gamma and lam in"),
    ],
)
def test_each_misuse_raises_a_value_error_that_says_what_came(loss, tensors, arguments, words):
    given = [torch.tensor(each) if isinstance(each, list) else torch.zeros(each) for each in tensors]
    with pytest.raises(ValueError, match=words):
        loss(*given, **arguments)
