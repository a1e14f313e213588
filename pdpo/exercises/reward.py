"""ex_09: a reward model and its calibration; and a free project: one planted bug of five, found by measuring."""

import math
import zlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import tensor
from torch.nn.functional import logsigmoid

from pdpo.exercises.core import Task, adapted, compare, fresh, task

BUGS = ("moving reference", "other reference", "swapped labels", "inverted beta", "gradients kept")


@dataclass(frozen=True, repr=False)
class Experiment:
    """DPO on 24 responses with endless labels; call it to train. Perhaps with a bug: what is not to be read, but measured."""

    _bug: str
    seed: int

    def __repr__(self):
        return f"experiment {self.seed}"

    def __call__(self, *, beta):
        """Trains anew, 60 steps of Adam; three (61,) tensors, before the first step and after each: the trainer's own "loss",
        the exact "kl" from the policy at the start, and the expected true "score"."""
        return dict(zip(("loss", "kl", "score"), _trained(self._bug, self.seed, float(beta)).clone(), strict=True))


@cache
def _trained(bug, seed, beta):
    """(3, 61): loss, KL and score along the way; the gradient is written out, since it is 61 times that of 24 numbers."""
    generator = torch.Generator().manual_seed(seed)
    start, scores = torch.randn(2, 24, generator=generator)
    start = (start / 2).log_softmax(-1)
    labels = torch.sigmoid(scores[:, None] - scores) * (1 - torch.eye(24))  # how often the row's response is the chosen one
    labels = (labels.T if bug == "swapped labels" else labels) / labels.sum()
    strength, trained = 1 / beta if bug == "inverted beta" else beta, (start + scores / 2).log_softmax(-1)
    logits, rows, gradient, mean, square = start.clone(), [], *torch.zeros(3, 24)
    for step in range(1, 62):
        logps = logits.log_softmax(-1)
        reference = {"moving reference": logps, "other reference": trained}.get(bug, start)
        margins = strength * ((logps - reference)[:, None] - (logps - reference))
        loss = -(labels * logsigmoid(margins)).sum()
        rows.append(torch.stack([loss, (logps.exp() * (logps - start)).sum(), (logps.exp() * scores).sum()]))
        pull = strength * labels * torch.sigmoid(-margins)
        gradient = pull.sum(0) - pull.sum(1) + (gradient if bug == "gradients kept" else 0)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2  # Adam
        logits = logits - 0.1 * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return torch.stack(rows).T


def planted(name: str) -> Experiment:
    """The experiment with the bug that is yours: your name decides which of the five."""
    number = zlib.crc32(name.strip().lower().encode())
    return Experiment(BUGS[number % len(BUGS)], number)


def _objective(features, weights, weight_decay):
    return -logsigmoid((features[:, 0] - features[:, 1]) @ weights).mean() + weight_decay * weights.square().sum()


def _head(features, weight_decay, objective=_objective):
    weights = torch.zeros(features.shape[-1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(features, weights, weight_decay)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _weights(function):
    def run(features, weight_decay):
        weights = function(features, weight_decay)
        return weights.detach() if isinstance(weights, torch.Tensor) else weights

    return run


def _head_cases(generator):
    yield "pairs that disagree", tensor([[[1.0], [0.0]], [[2.0], [0.0]], [[0.0], [1.0]]]), 0.05
    quality, features = torch.randn(4, generator=generator), torch.randn(80, 2, 4, generator=generator) + 1
    wins = torch.bernoulli(torch.sigmoid((features[:, 0] - features[:, 1]) @ quality), generator=generator).bool()
    yield "80 noisy pairs", torch.where(wins[:, None, None], features, features.flip(1)) * tensor([1.0, 1.0, 2.0, 0.5]), 0.05


def _binned(probabilities, num_bins, lowest=0.5):
    """Of each bin with a pair in it: its share of the pairs, mean confidence, share of right orders."""
    confidence, right = torch.maximum(probabilities, 1 - probabilities), (probabilities > 0.5).to(probabilities.dtype)
    bins = ((confidence - lowest) / (1 - lowest) * num_bins).long().clamp(max=num_bins - 1)
    inside = torch.stack([bins == i for i in bins.unique()]).to(probabilities.dtype)
    return inside.mean(1), inside @ confidence / inside.sum(1), inside @ right / inside.sum(1)


def _calibration(probabilities, num_bins, lowest=0.5):
    share, confidence, right = _binned(probabilities, num_bins, lowest)
    return (share * (right - confidence).abs()).sum().item()


def _calibration_cases(generator):
    yield "sure and right, sure and wrong", tensor([0.9, 0.2]), 1
    yield "one bin: half of the orders are right, said with 0.85", tensor([0.85, 0.15, 0.85, 0.15]), 5
    yield "neighbouring bins stay apart", tensor([0.65, 0.25, 0.85, 0.42]), 5
    yield "bins count by their pairs", tensor([0.95, 0.95, 0.95, 0.55]), 2
    yield "complete certainty belongs to the last bin", tensor([1.0, 0.0, 0.6]), 4
    yield "errors of opposite sign do not cancel", tensor([0.55, 0.55, 0.55, 0.05, 0.05, 0.95]), 5
    yield "many pairs", torch.rand(60, generator=generator), 5


def _symptoms(train, first=0, last=-1, high=1.0, low=0.1, least=min):
    run, loose = train(beta=high), train(beta=low)
    loss, score = run["loss"].tolist(), run["score"].tolist()
    ratio = (run["kl"][-1] / loose["kl"][-1]).item()
    return loss[first], loss[0] - least(loss), loss[last] - least(loss), score[last] - score[0], ratio


def _clear(bug, ratio):
    """Kept gradients look like an inverted beta, too; a sound run does not."""
    return ratio > 1.2 if bug == "gradients kept" else ratio < 0.8 or bug not in ("none", "swapped labels")


def _experiments(generator):
    for bug in ("none", *BUGS):
        train = Experiment(bug, torch.randint(10**6, (1,), generator=generator).item())
        while not _clear(bug, _symptoms(train)[4]):
            train = Experiment(bug, train.seed + 1)
        yield "the numbers of this experiment", train


def _diagnosis(
    train, symptoms=_symptoms, use="other reference, moving reference, gradients kept, swapped labels, inverted beta"
):
    first, fall, rebound, gain, ratio = symptoms(train)
    found = {
        "other reference": abs(first - math.log(2)) > 1e-3,
        "moving reference": fall < 1e-3,
        "gradients kept": rebound > 0.05,
        "swapped labels": gain < 0,
        "inverted beta": ratio > 1.1,
    }
    return next((bug for bug in use.split(", ") if found[bug]), "none")


def _named(function):
    def run(train):
        name = function(train)
        if not isinstance(name, str):
            raise TypeError(f"expected the name of a bug, got {type(name).__name__}")
        return name

    return run


def _bug_check(function):
    allowed = ("_named.<locals>.run", "Experiment.__call__", "Experiment.__repr__", "_trained")
    compare(adapted(_named, function), _diagnosis, _experiments(fresh()), _BUG_MISTAKES, names=("train",), allowed=allowed)


def _head_check(function):
    options = {"names": ("features", "weight_decay"), "allowed": ("_weights.<locals>.run",)}
    compare(  # tolerance: minimisers stop at different distances from the minimum; the nearest mistake is .03 away
        adapted(_weights, function), _head, _head_cases(fresh()), _HEAD_MISTAKES, tolerance=0.01, **options
    )


# fmt: off
_HEAD_MISTAKES = (
    ("weight_decay is not used: where all pairs can be ranked right, the weights would grow for ever", lambda x, d: _head(x, 0.0)),
    ("chosen and rejected are swapped: it prefers the rejected response", lambda x, d: -_head(x, d)),
    ("the sum of the losses, not their mean: the decay then counts for nothing", lambda x, d: _head(x, d / len(x))),
    ("the squares are halved: weight_decay * weights.square().sum()", lambda x, d: _head(x, d / 2)),
    ("a regression on the labels: the sigmoid is missing",
     lambda x, d: _head(x, d, lambda x, w, d: (1 - (x[:, 0] - x[:, 1]) @ w).square().mean() + d * w.square().sum())),
    ("each response is classified by itself; Bradley-Terry knows only the difference of a pair",
     lambda x, d: _head(x, d, lambda x, w, d: -(logsigmoid(x[:, 0] @ w) + logsigmoid(-x[:, 1] @ w)).mean() + d * w.square().sum())),
    ("that is the mean difference of the features: one step, no fit", lambda x, d: (x[:, 0] - x[:, 1]).mean(0)),
    ("untrained: all weights are 0", lambda x, d: 0 * x[0, 0]),
)
# fmt: on


# fmt: off
_BUG_MISTAKES = (
    ("a loss that rises again was not noticed, or asked too late: kept gradients spoil the KL ratio, too",
     lambda t: _diagnosis(t, use="inverted beta, other reference, moving reference, gradients kept, swapped labels")),
    ("\"none\" is no answer to all: some of these experiments have a bug", lambda t: "none"),
    ("only the trainer's own loss is read: neither swapped labels nor an inverted beta show in it",
     lambda t: _diagnosis(t, use="other reference, moving reference, gradients kept")),
    ("swapped labels were not noticed: they look perfect to the loss; look at the true score",
     lambda t: _diagnosis(t, use="other reference, moving reference, gradients kept, inverted beta")),
    ("only one beta was tried: an inverted beta shows in the comparison of two",
     lambda t: _diagnosis(t, use="other reference, moving reference, gradients kept, swapped labels")),
    ("the first loss is not looked at: it must be log 2",
     lambda t: _diagnosis(t, use="moving reference, gradients kept, swapped labels, inverted beta")),
    ("a loss that stays at log 2 was not noticed",
     lambda t: _diagnosis(t, use="other reference, gradients kept, swapped labels, inverted beta")),
    ("a bug is named where there is none: what would a sound run look like?",
     lambda t: BUGS[0] if _diagnosis(t) == "none" else _diagnosis(t)),
)

TASKS = (
    Task("reward_head", "ex_09", "def reward_head(features, weight_decay):", (
        "Features (B, 2, D), chosen first. A score is features @ weights; which (D,) weights make the labels likeliest?",
        "Minimise the mean of -logsigmoid(chosen score - rejected score) plus weight_decay * weights.square().sum().",
        "weights = zeros with a gradient; torch.optim.LBFGS([weights], max_iter=200, line_search_fn='strong_wolfe').step(closure).",
    ), _head_check, _HEAD_MISTAKES),
    task("calibration_error", "ex_09", "def calibration_error(probabilities, num_bins):", (
        "Each probability is that of the true order. When is the predicted order right, and how sure was the prediction?",
        "confidence = max(p, 1 - p), right where p > 1/2; num_bins of equal width from 1/2 to 1, an empty one counts nothing.",
        "Of each bin abs(mean of right - mean of confidence), weighted by its share of the pairs; the sum, as a float.",
    ), _calibration, _calibration_cases, (
        ("bins count alike: weight each by its pairs", lambda *x: (_binned(*x)[2] - _binned(*x)[1]).abs().mean().item()),
        ("the largest gap; the mean, weighted by pairs, is asked",
         lambda *x: (_binned(*x)[2] - _binned(*x)[1]).abs().max().item()),
        ("one gap over all pairs: errors of opposite sign cancel; bins first", lambda p, n: _calibration(p, 1)),
        ("without abs() the errors of two bins cancel",
         lambda *x: (_binned(*x)[0] * (_binned(*x)[2] - _binned(*x)[1])).sum().item()),
        ("each pair by itself: in a bin the mean comes first, then abs()",
         lambda p, n: (torch.maximum(p, 1 - p) - (p > 0.5).to(p.dtype)).abs().mean().item()),
        ("squared gaps: abs() is asked", lambda *x: (_binned(*x)[0] * (_binned(*x)[2] - _binned(*x)[1]) ** 2).sum().item()),
        ("p itself is taken for the confidence: of a pair with p = 0.1 the other order was predicted, with 0.9",
         lambda p, n: _calibration(p.clamp(min=0.5), n)),
        ("confidence 1 is in no bin: it belongs to the last",
         lambda p, n: _calibration(q, n) * len(q) / len(p) if len(q := p[(p > 0) & (p < 1)]) else 0.0),
        ("bins from 0 to 1: a confidence is at least 1/2, so half of them stay empty",
         lambda p, n: _calibration(p, n, lowest=0.0)),
    )),
    task("symptoms", "ex_09", "def symptoms(train):", (
        "Train twice, with beta 1 and 0.1. Five numbers: first loss, fall, rebound, gain, KL ratio; which needs the second run?",
        "Of beta 1: loss[0]; loss[0] - smallest loss; last loss - smallest loss; last score - first score. And last KLs, 1 over 0.1.",
        "loss[0], loss[0] - loss.min(), loss[-1] - loss.min(), score[-1] - score[0], kl[-1] / loose_kl[-1]: each with .item().",
    ), _symptoms, _experiments, (
        ("the KL ratio is turned round: beta 1 over beta 0.1", lambda t: (*_symptoms(t)[:4], 1 / _symptoms(t)[4])),
        ("all five from beta 0.1: the first four are those of beta 1", lambda t: (*_symptoms(t, high=0.1)[:4], _symptoms(t)[4])),
        ("the two runs are mixed up: the first four numbers, and what the ratio counts from, are beta 1",
         lambda t: _symptoms(t, high=0.1, low=1.0)),
        ("the rebound is measured from the largest loss; it is the rise of the last one above the smallest",
         lambda t: (*_symptoms(t)[:2], (t(beta=1.0)["loss"].max() - t(beta=1.0)["loss"].min()).item(), *_symptoms(t)[3:])),
        ("the fall is measured to the last loss; it is to the smallest one",
         lambda t: (_symptoms(t)[0], _symptoms(t)[1] - _symptoms(t)[2], *_symptoms(t)[2:])),
        ("the first loss is that before the first step, entry 0", lambda t: (_symptoms(t, first=1)[0], *_symptoms(t)[1:])),
        ("the last entry is [-1]; one step is missing",
         lambda t: (*_symptoms(t)[:2], *_symptoms(t, last=-2)[2:4], _symptoms(t)[4])),
        ("the gain has its sign turned round: last score minus first score",
         lambda t: (*_symptoms(t)[:3], -_symptoms(t)[3], _symptoms(t)[4])),
    ), allowed=("Experiment.__call__", "Experiment.__repr__", "_trained")),
    Task("planted_bug", "ex_09", "def planted_bug(train):", (
        f"One of {', '.join(BUGS)}; or none. For each: which of the five symptoms would look how?",
        "A first loss other than log 2; no fall; a rebound; a score that falls; a KL that grows with beta. Which order of questions?",
        "Ask about the losses first: a run whose gradients are kept, or with another reference, can have any KL ratio.",
    ), _bug_check, _BUG_MISTAKES),
)
