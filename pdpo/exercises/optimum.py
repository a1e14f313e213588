"""ex_03: the partition function, the optimal policy, the KL divergence between two policies, and the scores of a policy."""

import math

import torch
from torch import tensor

from pdpo.exercises.core import task

LOG3 = math.log(3)


def _kl(p, q):
    return (p.exp() * (p - q).masked_fill(p == -torch.inf, 0.0)).sum(-1)


def _pairs():
    """Log-probabilities 1/2, 1/2 and 1/4, 3/4, made when they are needed: in the default precision of that moment."""
    return tensor([[0.5, 0.5], [0.25, 0.75]]).log()


def _draw(generator, count):
    return torch.randn(8, generator=generator).log_softmax(-1), *torch.randn(count, 8, generator=generator)


def _tilted_cases(generator):
    even, uneven = _pairs()
    yield "equal scores leave the reference as it is", uneven, tensor([0.0, 0.0]), 0.5
    yield "a score of log 3 more makes a response three times as likely", even, tensor([LOG3, 0.0]), 1.0
    yield "beta divides: at beta = 1/2 the same score counts twice, 9 to 1", even, tensor([LOG3, 0.0]), 0.5
    yield "the reference counts", uneven, tensor([LOG3, 0.0]), 1.0
    yield "a constant in the scores: c / beta in log Z, nothing in the policy", uneven, tensor([3.0, 3.0]), 2.0
    yield "scores of a thousand times beta do not overflow", uneven, tensor([10.0, 9.99]), 0.01
    reference, scores = _draw(generator, 1)
    yield "many responses, small beta", reference, scores, 0.3
    yield "many responses, large beta", reference, scores, 3.0


def _kl_cases(generator):
    even, uneven = _pairs()
    yield "a policy is at distance 0 from itself", uneven, uneven.clone()
    yield "p = (1/2, 1/2) from q = (1/4, 3/4): log(2 / sqrt 3)", even, uneven
    yield "the two directions differ", uneven, even
    yield "what p never says adds nothing, though its log is -inf", tensor([0.0, -torch.inf]), even
    p, q = _draw(generator, 1)
    yield "eight responses", p, q.log_softmax(-1)


def _score_cases(generator):
    even, _ = _pairs()
    yield "the reference has the score beta log Z everywhere", even, even.clone(), 1.5, 0.5
    yield "three times as likely: beta log 3, less what it costs the other", tensor([0.75, 0.25]).log(), even, 0.0, 1.0
    yield "beta multiplies", tensor([0.75, 0.25]).log(), even, 0.0, 3.0
    policy, reference = _draw(generator, 1)
    yield "back from the optimum to the scores", policy, reference.log_softmax(-1), -0.7, 0.4


# fmt: off
TASKS = (
    task("log_partition", "ex_03", "def log_partition(reference_logps, scores, beta):", (
        "Z is an expectation under the reference: of what?",
        "Each term is a product; its logarithm is reference_logps + scores / beta. Now the log of a sum of exponentials.",
        "(reference_logps + scores / beta).logsumexp(-1): the largest term is taken out before exp, so nothing overflows.",
    ), lambda p, s, b: (p + s / b).logsumexp(-1), _tilted_cases, (
        ("the reference is left out: Z weighs each response by it", lambda p, s, b: (s / b).logsumexp(-1)),
        ("beta multiplies the scores; it divides them", lambda p, s, b: (p + s * b).logsumexp(-1)),
        ("divided by N as well: the reference's probabilities are the weights already",
         lambda p, s, b: (p + s / b).logsumexp(-1) - math.log(len(p))),
        ("the mean score over beta: the logarithm of a mean is not the mean of the logarithms",
         lambda p, s, b: (p.exp() * s).sum() / b),
        ("beta log Z, the value of the optimum; log Z is asked", lambda p, s, b: b * (p + s / b).logsumexp(-1)),
        ("exp(score / beta) overflows: use logsumexp", lambda p, s, b: (p.exp() * (s / b).exp()).sum().log()),
    )),
    task("optimal_policy", "ex_03", "def optimal_policy(reference_logps, scores, beta):", (
        "Which responses does the optimum prefer: those that score high, those the reference says, or both?",
        "log pi* = reference_logps + scores / beta - log Z.",
        "Subtract the logsumexp of the first two terms; (reference_logps + scores / beta).log_softmax(-1) does both.",
    ), lambda p, s, b: (p + s / b).log_softmax(-1), _tilted_cases, (
        ("beta multiplies the scores: a larger beta must stay closer to the reference, so it divides",
         lambda p, s, b: (p + s * b).log_softmax(-1)),
        ("not normalised: log Z is to be subtracted", lambda p, s, b: p + s / b),
        ("the reference is left out: this is the optimum for a uniform one", lambda p, s, b: (s / b).log_softmax(-1)),
        ("the reference is divided by beta, too; only the score is", lambda p, s, b: ((p + s) / b).log_softmax(-1)),
        ("beta is left out: right only when beta = 1", lambda p, s, b: (p + s).log_softmax(-1)),
        ("beta log Z is subtracted; log Z normalises", lambda p, s, b: p + s / b - b * (p + s / b).logsumexp(-1)),
        ("exp(score / beta) overflows: stay in log space",
         lambda p, s, b: (p.exp() * (s / b).exp() / (p.exp() * (s / b).exp()).sum()).log()),
    )),
    task("kl_divergence", "ex_03", "def kl_divergence(p_logps, q_logps):", (
        "An expectation: under which of the two, p or q?",
        "The sum over responses of p times (log p - log q). What is 0 * (-inf)?",
        "(p.exp() * (p - q)).sum(), with the terms where p is -inf masked to 0 before they are multiplied.",
    ), _kl, _kl_cases, (
        ("the other direction, KL(q || p): the expectation is under p", lambda p, q: _kl(q, p)),
        ("the expectation is under q, of log p - log q", lambda p, q: (q.exp() * (p - q)).sum(-1)),
        ("not weighted: each log-ratio counts by the probability of its response", lambda p, q: (p - q).sum(-1)),
        ("0 * (-inf) is nan: mask what p never says before multiplying", lambda p, q: (p.exp() * (p - q)).sum(-1)),
        ("the cross-entropy of p and q: the entropy of p is to be subtracted", lambda p, q: -(p.exp() * q).sum(-1)),
        ("divided by the number of responses: an expectation is a weighted sum", lambda p, q: _kl(p, q) / len(p)),
    )),
    task("scores_of_policy", "ex_03", "def scores_of_policy(policy_logps, reference_logps, log_partition, beta):", (
        "Solve log pi* = reference_logps + scores / beta - log Z for the scores.",
        "scores / beta stands alone on one side; what is multiplied by beta on the other?",
        "beta * (policy_logps - reference_logps + log_partition).",
    ), lambda p, q, z, b: b * (p - q + z), _score_cases, (
        ("log Z is left out: these are the implicit rewards, off by a constant", lambda p, q, z, b: b * (p - q)),
        ("log Z is not multiplied by beta", lambda p, q, z, b: b * (p - q) + z),
        ("the sign of log Z is turned round", lambda p, q, z, b: b * (p - q - z)),
        ("divided by beta; it multiplies", lambda p, q, z, b: (p - q + z) / b),
        ("policy and reference are swapped", lambda p, q, z, b: b * (q - p + z)),
        ("the reference is left out", lambda p, q, z, b: b * (p + z)),
    )),
)
