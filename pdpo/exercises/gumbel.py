"""ex_01: Gumbel noise by inversion, the ranking it draws, and the probability of a win by more than an offset."""

import math

import torch
from torch import tensor
from torch.nn.functional import logsigmoid

from pdpo.exercises.core import task

LOG3 = math.log(3)


def _noise_cases(generator):
    yield "F(0) = 1/e, so u = 1/e gives g = 0", tensor([math.exp(-1)])
    yield "the median of a standard Gumbel is -log(log 2)", tensor([0.5])
    yield "a short left tail, a long right one", tensor([0.001, 0.01, 0.99, 0.999])
    yield "F(g) = u for every u", 0.01 + 0.98 * torch.rand(3, 4, generator=generator)


def _ranking_cases(generator):
    yield "without noise the higher score comes first", tensor([[0.0, 1.0]]), torch.zeros(1, 2)
    yield "column k says who came k-th", tensor([[0.0, -4.0, 4.0]]), torch.zeros(1, 3)
    yield "equal scores are ranked by their noise", torch.zeros(2, 3), tensor([[0.5, -1.0, 2.0], [0.1, 0.3, -0.2]])
    yield "each row is ranked by itself", tensor([[9.0, 8.0], [1.0, 2.0]]), torch.zeros(2, 2)
    yield "score plus noise decides", *torch.randn(2, 6, 5, generator=generator)


def _pair_cases(generator):
    yield "equal scores win half of the time", tensor([0.0]), tensor([0.0]), 0.0
    yield "a lead of log 3 wins three times in four", tensor([2 + LOG3]), tensor([2.0]), 0.0
    yield "an offset as large as the lead makes it even", tensor([LOG3]), tensor([0.0]), LOG3
    yield "a negative offset asks for less", tensor([0.5]), tensor([2.0]), -1.0
    yield "far behind, the log-probability is about the lead itself", tensor([-500.0]), tensor([500.0]), 0.0
    yield "a batch, with one offset a pair", *torch.randn(3, 5, generator=generator)


# fmt: off
TASKS = (
    task("gumbel_noise", "ex_01", "def gumbel_noise(uniform):", (
        "Draw F by hand: on which axis does the uniform number lie, and on which the noise?",
        "Set F(g) = exp(-exp(-g)) equal to u and take the logarithm of both sides, twice. Mind the sign each time.",
        "log u = -exp(-g), so exp(-g) = -log u: one more logarithm and a minus.",
    ), lambda u: -(-u.log()).log(), _noise_cases, (
        ("-log(u) is exponential noise: one more logarithm is to be taken", lambda u: -u.log()),
        ("a minus is missing in front: log(-log u) has its long tail on the left", lambda u: (-u.log()).log()),
        ("1 - u in place of u: the same distribution, but it falls where F rises", lambda u: -(-(1 - u).log()).log()),
        ("log u - log(1 - u) is logistic: the difference of two Gumbel draws, not one", torch.logit),
        ("this is F itself; its inverse is asked", lambda u: torch.exp(-torch.exp(-u))),
    )),
    task("gumbel_ranking", "ex_01", "def gumbel_ranking(scores, noise):", (
        "What does a reader with a noisy impression of each response sort by?",
        "Who is first is an index: you need the argument of the sort, not the sorted values.",
        "argsort sorts ascending unless told otherwise, and it is the last dimension that you want.",
    ), lambda s, n: (s + n).argsort(-1, descending=True), _ranking_cases, (
        ("ascending: argsort puts the smallest first unless descending=True", lambda s, n: (s + n).argsort(-1)),
        ("ranks (where a response landed), not indices (who landed there): one argsort too many",
         lambda s, n: (s + n).argsort(-1, descending=True).argsort(-1)),
        ("the noise is left out: the same ranking every time", lambda s, n: s.argsort(-1, descending=True)),
        ("the noise is subtracted: a Gumbel is not symmetric", lambda s, n: (s - n).argsort(-1, descending=True)),
        ("the noisy scores are returned; whose they are is asked", lambda s, n: (s + n).sort(-1, descending=True).values),
        ("only the winner; the whole ranking is asked", lambda s, n: (s + n).argmax(-1)),
        ("sorted down the batch, not along each row (dim=-1)", lambda s, n: (s + n).argsort(0, descending=True)),
    )),
    task("bradley_terry", "ex_01", "def bradley_terry(chosen_scores, rejected_scores, offset):", (
        "The difference of two Gumbel draws is logistic. Where does the difference of the scores put it?",
        "P(lead + logistic noise > offset) is the sigmoid of one number. Which?",
        "log sigmoid(chosen - rejected - offset); torch.nn.functional.logsigmoid does not underflow.",
    ), lambda c, r, o: logsigmoid(c - r - o), _pair_cases, (
        ("the offset is added: to win by more must be harder, not easier", lambda c, r, o: logsigmoid(c - r + o)),
        ("the offset is left out", lambda c, r, o: logsigmoid(c - r)),
        ("the offset is outside the sigmoid: it belongs to the lead", lambda c, r, o: logsigmoid(c - r) - o),
        ("chosen and rejected are swapped", lambda c, r, o: logsigmoid(r - c - o)),
        ("log(sigmoid(x)) underflows to log(0): use logsigmoid", lambda c, r, o: torch.sigmoid(c - r - o).log()),
        ("the sigmoid is left out: this is the logit", lambda c, r, o: c - r - o),
    ), gradient=(0, 1)),
)
