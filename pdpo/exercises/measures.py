"""ex_08: KL from samples and exactly, wins, paired intervals, and how many prompts are enough."""

import math

import torch
from torch import tensor

from pdpo.exercises.core import task


def _estimators(policy, reference):
    log_ratio = reference - policy
    return -log_ratio, log_ratio.square() / 2, log_ratio.exp() - 1 - log_ratio


def _estimator_cases(generator):
    yield "where both agree, all three are 0", tensor([-1.0]), tensor([-1.0])
    yield "one sample that the policy likes better", tensor([-1.0]), tensor([-1.5])
    yield "one sample that the reference likes better: k1 is negative there, k2 and k3 never", tensor([-2.0]), tensor([-1.0])
    yield "samples", *(-3 * torch.rand(2, 6, generator=generator))


def _turned(k, which, by):
    return tuple(by(each) if i == which else each for i, each in enumerate(k))


def _token_kl(policy_logits, reference_logits, scored):
    p, q = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).masked_fill(~scored, 0.0).sum(1)


def _token_cases(generator):
    p, q = 2 * torch.randn(2, 2, 4, 5, generator=generator)
    mask = tensor([[False, True, True, False], [False, True, True, True]])
    yield "no difference, no KL", *tensor([[[[0.5, -1.0]]], [[[0.5, -1.0]]]]), tensor([[True]])
    yield "one position, two tokens", tensor([[[9.0, 9.0]]]).log(), tensor([[[1.0, 3.0]]]).log(), tensor([[True]])
    yield "a sum over the positions", tensor([[[1.0, 2.0], [4.0, 1.0]]]).log(), torch.zeros(1, 2, 2), tensor([[True, True]])
    yield "prompt and padding do not count", p, q, mask
    yield "certain tokens: no nan, and no smallest probability", 400 * p, 400 * q, mask


def _unit(*embeddings):
    return (each / each.norm(dim=-1, keepdim=True) for each in embeddings)


def _nearer(difference, tie=0.5, within=1e-6):
    return torch.where(difference.abs() < within, tie, (difference > 0).to(difference.dtype))


def _wins(texts, chosen, rejected, **options):
    e, w, l = _unit(texts, chosen, rejected)
    return _nearer((e * w).sum(-1) - (e * l).sum(-1), **options)


def _win_cases(generator):
    x, y, up = tensor([[1.0, 0.0]]), tensor([[0.0, 1.0]]), tensor([[2.0, 1.0]])
    texts, chosen, rejected = torch.randn(3, 40, 3, generator=generator)
    yield "closer to the chosen response", up, x, y
    yield "closer to the rejected response", up, y, x
    yield "only the direction counts, not the length", up, x, 5 * y
    yield "close is not a tie", tensor([[1.0, 0.0]] * 2), tensor([[1.0, 0.01], [1.0, 0.03]]), tensor([[1.0, 0.02], [1.0, 0.02]])
    yield "a tie is half a win", up, x, x
    yield "a batch", texts, chosen, rejected
    yield "rounding is not a win: cosines within 1e-6 are a tie", texts, chosen, chosen * (0.1 + rejected.abs())[:, :1]


def _interval(a, b, resamples):
    means = (a.mean(1) - b.mean(1))[resamples].mean(1)
    return tuple(means.quantile(tensor([0.025, 0.975])).tolist())


def _interval_cases(generator):
    hard = torch.rand(
        40, 1, generator=generator
    )  # prompts differ far more than policies do; 40: of fewer, 90 and 95 % can fall on one value
    a, b = (torch.bernoulli((hard + shift).clamp(0, 1).expand(40, 4), generator=generator) for shift in (0.2, 0.0))
    draws = torch.randint(40, (400, 40), generator=generator)
    yield (
        "two prompts that gain the same: the interval is a point",
        tensor([[1.0], [0.5]]),
        tensor([[0.5], [0.0]]),
        draws[:9, :2] % 2,
    )
    yield "a gain on one prompt of two", tensor([[1.0, 1.0], [0.0, 0.0]]), tensor([[1.0, 0.0], [0.0, 0.0]]), draws[:, :2] % 2
    yield "the same prompts for both policies, all samples of a prompt together", a, b, draws


def _quantiles(means, low=0.025, high=0.975):
    return tuple(means.quantile(tensor([low, high])).tolist())


def _needed(differences, half_width):
    return float(math.ceil(1.96**2 * differences.var().item() / half_width**2))


def _needed_cases(generator):
    pilot = torch.randn(40, generator=generator)
    pilot = 0.3 * (pilot - pilot.mean()) / pilot.std() + 0.1
    yield "a pilot of two", tensor([0.0, 1.0]), 0.5
    yield "half of the width, four times the prompts", pilot, 0.05
    yield "half of the width, four times the prompts", pilot, 0.025
    yield "in whole prompts, and rather one too many", pilot, 0.031


def _needed_as(count):
    return lambda d, h: count(d.std().item(), h, len(d))


# fmt: off
TASKS = (
    task("kl_estimators", "ex_08", "def kl_estimators(policy_logps, reference_logps):", (
        "The samples come from the policy. KL(policy || reference) is the mean of which logarithm over them?",
        "With r = reference / policy: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r. One value a sample, no mean.",
        "log_ratio = reference_logps - policy_logps; return -log_ratio, log_ratio ** 2 / 2, log_ratio.exp() - 1 - log_ratio.",
    ), _estimators, _estimator_cases, (
        ("the ratio is turned round: that is KL(reference || policy), and its samples would be the reference's",
         lambda p, q: _estimators(q, p)),
        ("k1 has an abs(): single values may be negative, and the mean is wrong without them",
         lambda *x: _turned(_estimators(*x), 0, torch.abs)),
        ("k2 has no factor 1/2", lambda *x: _turned(_estimators(*x), 1, lambda k: 2 * k)),
        ("k3 has r = policy / reference: right in sign, but its mean is not the KL",
         lambda p, q: (*_estimators(p, q)[:2], _estimators(q, p)[2])),
        ("k3 is r - 1 here: its mean is 0 whatever the KL; - log r is missing",
         lambda p, q: (*_estimators(p, q)[:2], (q - p).expm1())),
        ("averaged: return one value a sample", lambda *x: tuple(k.mean() for k in _estimators(*x))),
        ("k1 is weighted by the policy's probability: samples from it are that already",
         lambda p, q: _turned(_estimators(p, q), 0, lambda k: p.exp() * k)),
    )),
    task("token_kl", "ex_08", "def token_kl(policy_logits, reference_logits, scored):", (
        "At each scored position two distributions over the vocabulary are known completely. Nothing is left to chance there.",
        "sum over the vocabulary of p * (log p - log q), with log_softmax of both; then the sum over scored positions.",
        "kl = (p.exp() * (p - q)).sum(-1); return kl.masked_fill(~scored, 0.0).sum(1).",
    ), _token_kl, _token_cases, (
        ("the direction: the policy's probabilities weight the logarithms, not the reference's",
         lambda p, q, m: _token_kl(q, p, m)),
        ("prompt and padding count, too: mask with `scored`", lambda p, q, m: _token_kl(p, q, torch.ones_like(m))),
        ("a mean over positions: the KL of a sequence is the sum", lambda p, q, m: _token_kl(p, q, m) / m.sum(1)),
        ("logits are no log-probabilities: log_softmax first",
         lambda p, q, m: (p.softmax(-1) * (p - q)).sum(-1).masked_fill(~m, 0.0).sum(1)),
        ("log of softmax: -inf or nan where a token is certain (log_softmax)",
         lambda p, q, m: ((p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1).masked_fill(~m, 0.0).sum(1))),
        ("that is the cross-entropy; the policy's entropy is to be subtracted",
         lambda p, q, m: -(p.softmax(-1) * q.log_softmax(-1)).sum(-1).masked_fill(~m, 0.0).sum(1)),
        ("a mean over the vocabulary: it is a sum, weighted by probabilities",
         lambda p, q, m: _token_kl(p, q, m) / p.shape[-1]),
    )),
    task("win_values", "ex_08", "def win_values(texts, chosen, rejected):", (
        "Embeddings (N, D) are compared by direction alone. And what is the honest value where neither is closer?",
        "Divide each row by its norm, take the two sums of products, compare: 1, 0, or 0.5 where they are within 1e-6.",
        "torch.where(difference.abs() < 1e-6, 0.5, (difference > 0).float()) with difference = cosine to chosen - cosine to rejected.",
    ), _wins, _win_cases, (
        ("a dot product, not a cosine: a long embedding wins by its length", lambda e, w, l: _nearer((e * (w - l)).sum(-1))),
        ("a tie counts as a loss: a policy that copies both would seem bad", lambda *x: _wins(*x, tie=0.0)),
        ("a tie counts as a win: a policy that copies both would seem good", lambda *x: _wins(*x, tie=1.0)),
        ("a tie is within 1e-6: a wider one takes wins for ties", lambda *x: _wins(*x, within=1e-2)),
        ("cosines must be equal to the last bit here: float32 rounds, so a tie is within 1e-6",
         lambda *x: _wins(*x, within=1e-30)),
        ("chosen and rejected are swapped", lambda e, w, l: _wins(e, l, w)),
        ("the cosine itself; a win is 1, 0 or 0.5",
         lambda e, w, l: torch.cosine_similarity(e, w) - torch.cosine_similarity(e, l)),
        ("averaged: return one value a text", lambda *x: _wins(*x).mean()),
        ("the nearer one by distance: lengths count there, too",
         lambda e, w, l: _nearer((e - l).norm(dim=1) - (e - w).norm(dim=1))),
    )),
    task("paired_interval", "ex_08", "def paired_interval(wins_a, wins_b, resamples):", (
        "Both policies answered the same N prompts, S times each. Which number does a prompt contribute to the comparison?",
        "Average a prompt's samples, take the difference a - b, then draw prompts: row r of resamples (R, N) is one draw of N prompts.",
        "means = (wins_a.mean(1) - wins_b.mean(1))[resamples].mean(1); their quantiles 0.025 and 0.975, as two floats.",
    ), _interval, _interval_cases, (
        ("two intervals subtracted: far too wide, since hard prompts are hard for both; bootstrap the difference",
         lambda a, b, r: (_quantiles(a.mean(1)[r].mean(1))[0] - _quantiles(b.mean(1)[r].mean(1))[1],
                          _quantiles(a.mean(1)[r].mean(1))[1] - _quantiles(b.mean(1)[r].mean(1))[0])),
        ("the lower ends are subtracted, and the upper ends: bootstrap the difference itself",
         lambda a, b, r: tuple(x - y for x, y in zip(_quantiles(a.mean(1)[r].mean(1)), _quantiles(b.mean(1)[r].mean(1)), strict=True))),
        ("unpaired: the two policies are given different prompts in one draw",
         lambda a, b, r: _quantiles(a.mean(1)[r].mean(1) - b.mean(1)[r.flip(0)].mean(1))),
        ("samples of one prompt are not independent: average them first, then draw prompts",
         lambda a, b, r: _quantiles((a - b).flatten()[r].mean(1))),
        ("the quantiles of the differences themselves: how prompts differ, not how sure the mean is",
         lambda a, b, r: _quantiles(a.mean(1) - b.mean(1))),
        ("90 %, not 95 %: the two tails share 5 %, 2.5 % each",
         lambda a, b, r: _quantiles((a.mean(1) - b.mean(1))[r].mean(1), 0.05, 0.95)),
        ("b - a: the gain of a over b is asked", lambda a, b, r: _interval(b, a, r)),
        ("only a is in it: a difference was asked", lambda a, b, r: _interval(a, 0 * b, r)),
        ("the spread of the draws without the factor 1.96",
         lambda a, b, r: ((m := (a.mean(1) - b.mean(1))[r].mean(1)).mean().item() - m.std().item(), m.mean().item() + m.std().item())),
    )),
    task("prompts_needed", "ex_08", "def prompts_needed(differences, half_width):", (
        "How does the width of an interval of a mean shrink when the number of prompts grows?",
        "The half-width of a 95 % interval of n prompts is 1.96 * std / sqrt(n). Solve for n; std is the pilot's, over n - 1.",
        "math.ceil((1.96 * differences.std().item() / half_width) ** 2).",
    ), _needed, _needed_cases, (
        ("the square is missing: half of the width takes four times the prompts",
         _needed_as(lambda s, h, n: math.ceil(1.96 * s / h))),
        ("without 1.96 the interval covers 68 %, not 95 %", _needed_as(lambda s, h, n: math.ceil((s / h) ** 2))),
        ("the pilot's standard error is used, as if it had been one prompt: use its standard deviation",
         _needed_as(lambda s, h, n: math.ceil((1.96 * s / n**0.5 / h) ** 2))),
        ("half_width is taken for the whole width", _needed_as(lambda s, h, n: math.ceil((2 * 1.96 * s / h) ** 2))),
        ("the pilot is a sample: its standard deviation divides by n - 1, as std() does",
         lambda d, h: math.ceil((1.96 * d.std(correction=0).item() / h) ** 2)),
        ("the spread is measured around 0; it is that around the mean",
         lambda d, h: math.ceil((1.96 * d.square().mean().sqrt().item() / h) ** 2)),
        ("rounded down: one prompt too few", _needed_as(lambda s, h, n: math.floor((1.96 * s / h) ** 2))),
        ("the worst case of a single proportion, whatever the pilot says",
         _needed_as(lambda s, h, n: math.ceil((0.98 / h) ** 2))),
    )),
)
