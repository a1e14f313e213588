"""ex_02: who wins, whole rankings and the first few places of a ranking under Plackett-Luce, in log space."""

import math

import torch
from torch import tensor
from torch.nn.functional import logsigmoid

from pdpo.exercises.core import task


def _ranking(scores):
    return (scores - scores.flip(-1).logcumsumexp(-1).flip(-1)).sum(-1)


def _winner_cases(generator):
    yield "two equal scores: log(1/2) each", tensor([[0.0, 0.0]])
    yield "odds of 3 to 1", tensor([[math.log(3), 0.0]])
    yield "only differences count: exp(1000) is not needed", tensor([[1000.0, 1001.0, 999.0]])
    yield "a response that hardly ever wins has a finite log-probability", tensor([[0.0, 900.0]])
    yield "each row has a largest score of its own", tensor([[900.0, 901.0, 899.0], [-900.0, -901.0, -902.0]])
    yield "probabilities of a row sum to one", *torch.randn(1, 4, 5, generator=generator)


def _ranking_cases(generator):
    yield "two responses are Bradley-Terry: odds of 3 to 1", tensor([[math.log(3), 0.0]])
    yield "three equal scores: one of 3! = 6 rankings", tensor([[1.0, 1.0, 1.0]])
    yield "odds 4 : 2 : 1, the best first: 4/7 times 2/3", tensor([[4.0, 2.0, 1.0]]).log()
    yield "the same three, the worst first: 1/7 times 2/6", tensor([[1.0, 2.0, 4.0]]).log()
    yield "only differences count, however large the scores", tensor([[800.0, 801.0, -800.0]])
    yield "a batch of rankings", *torch.randn(1, 4, 5, generator=generator)


def _first_cases(generator):
    yield "first of three equal scores: 1/3", tensor([[1.0, 1.0, 1.0]]), 1
    yield "the first two of four equal scores: 1/4 times 1/3", torch.zeros(1, 4), 2
    yield "odds 4 : 2 : 1 : 1, the first two known: 4/8 times 2/4", tensor([[4.0, 2.0, 1.0, 1.0]]).log(), 2
    yield "all places known: a whole ranking", tensor([[4.0, 2.0, 1.0]]).log(), 3
    yield "only differences count, however large the scores", tensor([[800.0, 801.0, -800.0]]), 1
    yield "the order of the rest does not matter", torch.randn(3, 6, generator=generator), 3


# fmt: off
TASKS = (
    task("winner_logps", "ex_02", "def winner_logps(scores):", (
        "Add the same number to every score of a row: what happens to the softmax? So which number may you choose?",
        "With the largest score subtracted, the largest exponential is 1 and nothing overflows.",
        "shifted = scores - scores.max(-1, keepdim=True).values; then shifted minus the log of the sum of its exponentials.",
    ), lambda s: s.log_softmax(-1), _winner_cases, (
        ("exp of large scores overflows: subtract each row's largest score first", lambda s: s - s.exp().sum(-1, True).log()),
        ("exp of large scores overflows: subtract each row's largest score first", lambda s: (s.exp() / s.exp().sum(-1, True)).log()),
        ("log(softmax(x)): the softmax underflows to 0 before the logarithm is taken", lambda s: s.softmax(-1).log()),
        ("the largest of the batch was subtracted: rows far below it underflow; each row needs its own",
         lambda s: s - s.max() - (s - s.max()).exp().sum(-1, True).log()),
        ("the largest score was subtracted inside the sum only: the two must be shifted alike",
         lambda s: s - (s - s.max(-1, True).values).exp().sum(-1, True).log()),
        ("normalised down the batch: the probabilities of each row must sum to one", lambda s: s.log_softmax(0)),
        ("a clamp or a small constant hides the underflow: very small probabilities come out wrong",
         lambda s: (s.softmax(-1) + 1e-10).log()),
    ), gradient=(0,)),
    task("plackett_luce", "ex_02", "def plackett_luce(scores):", (
        "Tell it as a story: the first is chosen among all K, and then?",
        "The k-th choice is a softmax over columns k, k+1, ..., K-1: those still to be ranked.",
        "scores minus the log of the sum of exp over j >= k (a logcumsumexp of the flipped scores, flipped back), summed over k.",
    ), _ranking, _ranking_cases, (
        ("every choice is made among all K: who is ranked already must be taken out", lambda s: s.log_softmax(-1).sum(-1)),
        ("the worst is chosen first (a sum over j <= k): column 0 holds the best, and those still to rank are j >= k",
         lambda s: _ranking(s.flip(-1))),
        ("a mean over the K places; the sum is the ranking's log-probability", lambda s: _ranking(s) / s.shape[-1]),
        ("only who wins is counted, not the places after", lambda s: s.log_softmax(-1)[:, 0]),
        ("neighbours are compared in pairs: each place is won against all that are left",
         lambda s: logsigmoid(s[:, :-1] - s[:, 1:]).sum(-1)),
        ("exp overflows or underflows before the logarithm: use logsumexp or logcumsumexp",
         lambda s: (s - s.exp().flip(-1).cumsum(-1).flip(-1).log()).sum(-1)),
        ("the best is left out of the sum (j > k): the sum begins at k itself",
         lambda s: (s - s.flip(-1).logcumsumexp(-1).flip(-1).roll(-1, -1))[:, :-1].sum(-1)),
    ), gradient=(0,)),
    task("first_places", "ex_02", "def first_places(scores, m):", (
        "Only the first m columns are in order; the rest were never ranked. Which of the K choices were made?",
        "The m choices are those of the whole ranking; the rest still stand in every denominator.",
        "Compute the K terms of plackett_luce, and sum the first m of them only.",
    ), lambda s, m: (s - s.flip(-1).logcumsumexp(-1).flip(-1))[:, :m].sum(-1), _first_cases, (
        ("the rest is thrown away: it lost against the first m, and belongs into every sum", lambda s, m: _ranking(s[:, :m])),
        ("the rest is taken as ranked, too: an order nobody gave", lambda s, m: _ranking(s)),
        ("each of the m places is chosen among all K: who is placed must be taken out",
         lambda s, m: s.log_softmax(-1)[:, :m].sum(-1)),
        ("the first m as a set: their order was given and counts", lambda s, m: s[:, :m].logsumexp(-1) - s.logsumexp(-1)),
        ("only place m is counted; all the first m are asked", lambda s, m: s[:, m - 1] - s[:, m - 1:].logsumexp(-1)),
        ("one place too few", lambda s, m: (s - s.flip(-1).logcumsumexp(-1).flip(-1))[:, :m - 1].sum(-1)),
    ), gradient=(0,)),
)
