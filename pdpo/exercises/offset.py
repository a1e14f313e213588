"""ex_07: ODPO's offset: where it stands in the loss, what it is for ties and flipped pairs, and the reference that hides in it."""

import torch
from torch import tensor
from torch.nn.functional import logsigmoid

from pdpo.exercises.core import task

_LOGPS = "policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps"


def _odpo(pc, pr, rc, rr, offset, beta):
    return -logsigmoid(beta * ((pc - rc) - (pr - rr)) - offset)


def _odpo_cases(generator):
    pair = tensor([[-1.0], [-2.0], [-1.5], [-1.0]])
    yield "with offset 0 it is DPO", *pair, tensor([0.0]), 0.5
    yield "a margin as large as the offset costs log 2", *pair, tensor([1.5]), 1.0
    yield "a negative offset asks for less than a win", *pair, tensor([-1.0]), 0.5
    yield "the loss starts at log(1 + exp(offset))", *torch.zeros(4, 3), tensor([-2.0, 1.0, 3.0]), 0.1
    yield "it stays finite", *torch.zeros(4, 2), tensor([-2e3, 2e3]), 0.1
    yield "a batch", *(-9 * torch.rand(4, 5, generator=generator)), torch.randn(5, generator=generator), 0.3


def _offset(chosen, rejected, alpha, scale, mend=lambda d: torch.where(d > 0, d, 1.0)):
    difference = chosen - rejected
    if scale == "log":
        return alpha * mend(difference).log()
    return alpha * (difference if scale == "identity" else chosen.log() - rejected.log())


def _offset_cases(generator):
    chosen, rejected = 0.5 + 9 * torch.rand(2, 6, generator=generator)
    yield "a difference of 1 has the log offset 0", tensor([5.0]), tensor([4.0]), 1.0, "log"
    yield "alpha multiplies", tensor([10.0]), tensor([1.0]), 0.5, "log"
    yield "a difference below 1 has a negative log offset", tensor([1.2]), tensor([0.9]), 1.0, "log"
    yield "a tie has the log offset 0, which is DPO", tensor([3.0]), tensor([3.0]), 1.0, "log"
    yield "a pair labelled against its scores has the log offset 0", tensor([2.0]), tensor([7.0]), 1.0, "log"
    yield "the identity is signed: negative for a flipped pair", tensor([5.0, 2.0]), tensor([4.0, 7.0]), 2.0, "identity"
    yield "the log ratio is signed and knows no units", tensor([5.0, 20.0, 2.0]), tensor([4.0, 16.0, 7.0]), 2.0, "log_ratio"
    for scale in ("log", "identity", "log_ratio"):
        yield "a batch in any order", chosen, rejected, 0.7, scale


def _tilted(reference, scores, beta, alpha):
    return (reference + alpha * scores / beta).log_softmax(-1)


def _tilt_cases(generator):
    logps, scores = torch.randn(6, generator=generator).log_softmax(-1), torch.randn(6, generator=generator)
    half = tensor([0.5, 0.5]).log()
    yield "without strength the reference stays", half, tensor([0.0, 1.0]), 0.5, 0.0
    yield "a point of score is alpha / beta nats", half, tensor([0.0, 1.0]), 1.0, 2.0
    yield "a point of score is alpha / beta nats", half, tensor([0.0, 1.0]), 0.5, 1.0
    yield "a constant added to all scores changes nothing", half, tensor([7.0, 8.0]), 0.5, 1.0
    yield "large scores stay finite", half, tensor([0.0, 900.0]), 0.5, 1.0
    yield "any reference, any scores", logps, scores, 0.3, 0.6


# fmt: off
TASKS = (
    task("odpo_loss", "ex_07",
         f"def odpo_loss({_LOGPS}, offset, beta):", (
        "DPO asks for a win. ODPO asks for a win by more than the offset. Where in the sigmoid is the demand?",
        "P(win by more than D) = sigmoid(margin - D). The offset is in units of the reward: is there a beta in front of it?",
        "-logsigmoid(margin - offset) with margin = beta * ((pc - rc) - (pr - rr)).",
    ), _odpo, _odpo_cases, (
        ("the sign of the offset: a demand makes the loss larger", lambda *x: _odpo(*x[:4], -x[4], x[5])),
        ("beta multiplies the offset, too: it is in units of the reward already", lambda *x: _odpo(*x[:4], x[5] * x[4], x[5])),
        ("the offset is added to the loss: it has no effect on the gradient there", lambda *x: _odpo(*x[:4], 0.0, x[5]) + x[4]),
        ("the offset is not used: that is DPO", lambda *x: _odpo(*x[:4], 0.0, x[5])),
        ("negative offsets are cut off at 0: that is the softmax margin, not ODPO",
         lambda *x: _odpo(*x[:4], x[4].clamp(min=0), x[5])),
        ("the offset multiplies the loss: that weights pairs, and demands nothing", lambda *x: x[4] * _odpo(*x[:4], 0.0, x[5])),
        ("pairs whose margin exceeds the offset cost nothing here: that is a hinge",
         lambda *x: torch.relu(x[4] - x[5] * ((x[0] - x[2]) - (x[1] - x[3])))),
        ("log(sigmoid(x)) underflows to log(0) where x is very negative: use logsigmoid(x)", lambda *x: -(-_odpo(*x)).exp().log()),
    ), gradient=(0, 1)),
    task("score_offset", "ex_07", "def score_offset(chosen_scores, rejected_scores, alpha, scale):", (
        'Three scales: "log", log(chosen - rejected); "identity", chosen - rejected; "log_ratio", log chosen - log rejected.',
        "Only one of them is not defined everywhere. The rule there: a tie or a flipped pair is given plain DPO's offset.",
        "torch.where(difference > 0, difference, 1.0).log(): the log of 1 is 0, and no nan is ever computed.",
    ), _offset, _offset_cases, (
        ("nan_to_num makes -3e38 of log 0: choose the difference before the logarithm, not the result after it",
         lambda *x: _offset(*x, lambda d: d).nan_to_num(0.0)),
        ("negative offsets are cut off: signed scales keep them, and a difference below 1 asks for less than a win",
         lambda *x: _offset(*x).clamp(min=0)),
        ("log of 0 or of a negative difference: ties and flipped pairs get 0", lambda *x: _offset(*x, lambda d: d)),
        ("a clamp: log(1e-6) = -13.8 silences the very pairs whose label is wrong; the rule is 0",
         lambda *x: _offset(*x, lambda d: d.clamp(min=1e-6))),
        ("abs() demands a large margin of a pair whose label is wrong",
         lambda *x: _offset(*x, lambda d: torch.where(d == 0, 1.0, d.abs()))),
        ("log(1 + difference) is never negative: another offset", lambda *x: _offset(*x, lambda d: 1 + d.clamp(min=0))),
        ("negative log offsets are cut off: a difference below 1 asks for less than a win",
         lambda *x: _offset(*x, lambda d: d.clamp(min=1))),
        ("the signed scales are cut off at 0: only the log scale needs a rule",
         lambda *x: _offset(*x) if x[3] == "log" else _offset(*x).clamp(min=0)),
        ("alpha stands inside the logarithm: it must be a factor",
         lambda c, r, a, s: _offset(c, r, 1.0, s, lambda d: torch.where(d > 0, a * d, 1.0)) * (1 if s == "log" else a)),
        ("the scale is not used", lambda *x: _offset(*x[:3], "log")),
    )),
    task("tilted_reference", "ex_07", "def tilted_reference(reference_logps, scores, beta, alpha):", (
        "Write beta * log(policy / reference') and look for the alpha * score that has gone into reference'.",
        "beta * log reference' = beta * log reference + alpha * score + a constant. The constant makes it sum to one.",
        "(reference_logps + alpha * scores / beta).log_softmax(-1).",
    ), _tilted, _tilt_cases, (
        ("not normalised: its probabilities do not sum to 1 (log_softmax)", lambda r, s, b, a: r + a * s / b),
        ("the tilt is alpha / beta, not alpha * beta", lambda r, s, b, a: _tilted(r, s, 1.0, a * b)),
        ("beta is missing: a reward of one is 1 / beta nats", lambda r, s, b, a: _tilted(r, s, 1.0, a)),
        ("the sign: the reference that knows the scores prefers the better response", lambda r, s, b, a: _tilted(r, -s, b, a)),
        ("1 + alpha is where ODPO ends with endless data; the reference has only alpha in it",
         lambda r, s, b, a: _tilted(r, s, b, 1 + a)),
        ("the reference itself is missing", lambda r, s, b, a: _tilted(0 * r, s, b, a)),
        ("exp overflows: stay in log space (log_softmax, or subtract a logsumexp)",
         lambda r, s, b, a: (r.exp() * (a * s / b).exp() / (r.exp() * (a * s / b).exp()).sum()).log()),
    )),
)
