"""ex_05: the DPO loss, its gradient by hand, and the rewards that hide in it."""

import torch
from torch.nn.functional import logsigmoid

from pdpo.exercises.core import task

_LOGPS = "policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps"


def _margins(pc, pr, rc, rr, beta):
    return beta * ((pc - rc) - (pr - rr))


def _pairs(generator):
    """From one pair with beta 1, where nearly everything is right, to a batch with margins of thousands."""
    yield "one pair, beta = 1", *torch.tensor([[-1.0], [-2.0], [-1.5], [-1.0]]), 1.0
    yield "one pair, beta = 0.5", *torch.tensor([[-1.0], [-2.0], [-1.5], [-1.0]]), 0.5
    yield (
        "where the policy is the reference, every reward is 0",
        *torch.tensor([[-3.0, -4.0, -5.0], [-2.0, -7.0, -9.0]] * 2),
        0.3,
    )
    several = [[-1.0, -2.0, -9.0], [-0.5, -2.5, -4.0], [-3.0, -1.0, -5.0], [-1.0, -0.5, -3.0]]
    yield "several pairs, right and wrong ones", *torch.tensor(several), 2.0
    yield "a batch of pairs", *(-10 * torch.rand(4, 6, generator=generator)), 0.05 + torch.rand(1, generator=generator).item()
    yield (
        "it is finite where a pair is very right or very wrong",
        *torch.tensor([[-9.0, -9e4], [-9e4, -9.0]] + [[-9.0, -9.0]] * 2),
        0.5,
    )


def _loss(pc, pr, rc, rr, beta):
    return -logsigmoid(_margins(pc, pr, rc, rr, beta))


def _gradient(pc, pr, rc, rr, beta):
    pull = beta * torch.sigmoid(-_margins(pc, pr, rc, rr, beta))
    return -pull, pull


def _rewards(pc, pr, rc, rr, beta):
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    return chosen, rejected, (chosen > rejected).float().mean().item()


def _scaled(gradients, factor):
    return tuple(factor * each for each in gradients)


# fmt: off
TASKS = (
    task("dpo_loss", "ex_05", f"def dpo_loss({_LOGPS}, beta):", (
        "How much likelier has the policy made each response than the reference had it? Only that counts.",
        "beta times that log-ratio is a response's reward. The loss is minus the log-probability that the chosen one wins.",
        "-logsigmoid(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))), one value a pair.",
    ), _loss, _pairs, (
        ("right only when beta = 1: beta multiplies the rewards, not the loss",
         lambda pc, pr, rc, rr, beta: beta * _loss(pc, pr, rc, rr, 1.0)),
        ("right only when beta = 1: beta is not used", lambda pc, pr, rc, rr, beta: _loss(pc, pr, rc, rr, 1.0)),
        ("right only when beta = 1: the rewards are multiplied by beta, not divided by it", lambda *x: _loss(*x[:4], 1 / x[4])),
        ("the reference is not used: a reward is a log-ratio", lambda *x: _loss(x[0], x[1], 0.0, 0.0, x[4])),
        ("chosen and rejected, or policy and reference, are swapped", lambda pc, pr, rc, rr, beta: _loss(pr, pc, rr, rc, beta)),
        ("the reference is added, not subtracted", lambda pc, pr, rc, rr, beta: _loss(pc, pr, -rc, -rr, beta)),
        ("that is the probability of a wrong order; the loss is minus a logarithm", lambda *x: torch.sigmoid(-_margins(*x))),
        ("that is the margin; minus the log-sigmoid of it is the loss", lambda *x: -_margins(*x)),
        ("log(sigmoid(x)) underflows to log(0) where a pair is very wrong: use logsigmoid(x), or -softplus(-x)",
         lambda *x: -torch.sigmoid(_margins(*x)).log()),
        ("that is the loss of SFT: what is rejected does not count in it", lambda *x: -x[0]),
        ("right only when beta = 1: beta multiplies the reference, too", lambda *x: _loss(*x[:2], x[2] / x[4], x[3] / x[4], x[4])),
        ("the pairs were averaged: return one loss a pair", lambda *x: _loss(*x).mean()),
        ("only the chosen response is in the loss", lambda pc, pr, rc, rr, beta: -logsigmoid(beta * (pc - rc))),
    ), gradient=(0, 1)),
    task("dpo_gradient", "ex_05", f"def dpo_gradient({_LOGPS}, beta):", (
        "The chain rule, in two steps: the derivative of -log sigmoid(m) in the margin m, and that of m in each log-probability.",
        "-log sigmoid(m) has the derivative -sigmoid(-m): the weight, large while the pair is wrong. And m grows by beta per nat.",
        "pull = beta * sigmoid(-margin): the chosen log-probability's derivative is -pull and the rejected one's +pull.",
    ), _gradient, _pairs, (
        ("right only when beta = 1: the margin contains beta, so the chain rule gives a factor beta",
         lambda *x: _scaled(_gradient(*x), 1 / x[4])),
        ("both signs are turned round: this is the gradient of the loss, which falls as the chosen response rises",
         lambda *x: _scaled(_gradient(*x), -1)),
        ("the weight is turned round: sigmoid(-margin), not sigmoid(margin); a pair that is wrong must pull more",
         lambda pc, pr, rc, rr, beta: _gradient(pr, pc, rr, rc, beta)),
        ("right only when beta = 1: beta belongs into the weight's margin, too",
         lambda *x: _scaled(_gradient(*x[:4], 1.0), x[4])),
        ("the weight is 1/2 only at the start, where every margin is 0",
         lambda *x: (torch.full_like(x[0], -x[4] / 2), torch.full_like(x[0], x[4] / 2))),
        ("the rejected log-probability has a gradient, too", lambda *x: (_gradient(*x)[0], torch.zeros_like(x[0]))),
        ("the weight sigmoid(-margin) is missing", lambda *x: (-x[4] * torch.ones_like(x[0]), x[4] * torch.ones_like(x[0]))),
        ("the rejected response is pushed down: its sign is the other one", lambda *x: (_gradient(*x)[0], _gradient(*x)[0])),
        ("that is the derivative of the sigmoid; the loss is minus its logarithm",
         lambda *x: _scaled(_gradient(*x), torch.sigmoid(_margins(*x)))),
        ("divided by the number of pairs: that would be the gradient of the mean",
         lambda *x: _scaled(_gradient(*x), 1 / len(x[0]))),
    )),
    task("implicit_rewards", "ex_05", f"def implicit_rewards({_LOGPS}, beta):", (
        "DPO trains no reward model, but a policy and a reference define one. Notebook 03 has the formula.",
        "reward = beta * (policy - reference), for each response. A pair is ranked right where the chosen one's is larger.",
        "chosen, rejected = beta * (...), beta * (...); accuracy = (chosen > rejected).float().mean().item(); return all three.",
    ), _rewards, _pairs, (
        ("right only when beta = 1: a reward is beta times the log-ratio", lambda *x: _rewards(*x[:4], 1.0)),
        ("a tie is not ranked right: an untrained policy would have accuracy 1; use >, not >=",
         lambda *x: (*_rewards(*x)[:2], 1 - _rewards(x[1], x[0], x[3], x[2], x[4])[2])),
        ("a tie counts as nothing, not as one half",
         lambda *x: (*_rewards(*x)[:2], (_margins(*x).sign() / 2 + 0.5).mean().item())),
        ("the accuracy compares the chosen reward with 0; it is about the rejected one's",
         lambda *x: (*_rewards(*x)[:2], (x[0] > x[2]).float().mean().item())),
        ("the accuracy compares the policy's log-probabilities; it is about the rewards",
         lambda *x: (*_rewards(*x)[:2], (x[0] > x[1]).float().mean().item())),
        ("the rewards have no reference in them", lambda *x: (*_rewards(x[0], x[1], 0.0, 0.0, x[4])[:2], _rewards(*x)[2])),
        ("the accuracy is a share, not a number of pairs", lambda *x: (*_rewards(*x)[:2], _rewards(*x)[2] * len(x[0]))),
        ("chosen and rejected are swapped", lambda *x: _rewards(x[1], x[0], x[3], x[2], x[4])),
    )),
)
