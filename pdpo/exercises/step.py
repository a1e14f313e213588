"""ex_06: a training step of your own: the frozen reference, micro batches, clipping, and the order of its lines."""

import copy

import torch
from torch import tensor
from torch.nn.functional import logsigmoid

from pdpo.exact import TabularPolicy
from pdpo.exercises.core import Task, adapted, compare, fresh


class _Policy(TabularPolicy):
    """A TabularPolicy whose training mode halves its logits, as dropout would change them."""

    def forward(self):
        return (self.logits * (0.5 if self.training else 1.0)).log_softmax(-1)


def _asked(function):
    """Answers one question about the reference that `function` makes of a policy."""

    def run(logits, question):
        policy = _Policy(logits)
        reference = function(policy)
        if not isinstance(reference, torch.nn.Module):
            raise TypeError(f"expected a policy, got {type(reference).__name__} (no return?)")
        if question == "does it learn?":
            return any(each.requires_grad for each in reference.parameters())
        if question == "does the policy still learn?":
            return all(each.requires_grad for each in policy.parameters())
        if question == "is the policy still in training mode?":
            return policy.training
        if question == "its log-probabilities after the policy has moved":
            policy.logits.data.add_(torch.arange(len(logits)))
        return reference().detach()

    return run


def _reference_cases(generator):
    logits = torch.randn(3, generator=generator)
    yield "the reference says what the policy says in eval mode", logits, "its log-probabilities"
    yield "the reference stays where it is", logits, "its log-probabilities after the policy has moved"
    yield "the reference is never trained", logits, "does it learn?"
    yield "the policy itself is left alone", logits, "does the policy still learn?"
    yield "the policy itself is left alone", logits, "is the policy still in training mode?"


def _reference(policy, grad=False, train=False):
    return copy.deepcopy(policy).requires_grad_(grad).train(train)


def _micro(function):
    """What `function` leaves in .grad, or how much it held in memory at once."""

    def run(logits, rows, micro_batch_size, question):
        policy, sizes, graphs = TabularPolicy(logits), [], [0]
        policy.logits.grad = torch.ones_like(logits)  # of some step before

        def losses_of(policy, rows):
            losses = policy()[rows].square()
            sizes.append(len(rows))
            graphs.append(graphs[-1] + 1)
            losses.register_hook(lambda _: graphs.append(graphs[-1] - 1))
            return losses

        function(policy, losses_of, rows, micro_batch_size)
        if not sizes:
            raise TypeError("losses_of was never called: nothing is done, and got NoneType")
        if question == "the gradient":
            return torch.zeros_like(logits) if policy.logits.grad is None else policy.logits.grad
        return max(sizes) if question == "the largest batch" else max(graphs)

    return run


def _micro_cases(generator):
    logits, rows = torch.randn(4, generator=generator), torch.randint(4, (7,), generator=generator)
    yield "one batch is the plain gradient, without what an earlier step left", logits, rows[:2], 2, "the gradient"
    yield "equal parts add up to the gradient of the mean", logits, tensor([0, 1, 2, 3]), 2, "the gradient"
    yield "unequal parts, too", logits, tensor([0, 1, 2]), 2, "the gradient"
    yield "unequal parts, too", logits, rows, 3, "the gradient"
    yield "no batch is larger than allowed", logits, rows, 3, "the largest batch"
    yield "one graph at a time is in memory", logits, rows, 3, "graphs kept at once"


def _accumulate(policy, losses_of, rows, size, scale=lambda losses, rows, size: losses.sum() / len(rows), clear=0, keep=None):
    """`clear`: how many of the batches begin with zero_grad, after the first; None: not even that one."""
    parts = rows[:keep].split(size)
    for i, part in enumerate(parts):
        if clear is not None and i <= clear:
            policy.zero_grad()
        scale(losses_of(policy, part), rows, size).backward()


def _clipped(function):
    """The norm that `function` returns and the gradients that it leaves."""

    def run(gradients, max_norm):
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else gradient.clone()
        norm = function(parameters, max_norm)
        return norm if norm is None else float(norm), *(each.grad for each in parameters if each.grad is not None)

    return run


def _clipping_cases(generator):
    yield "a short gradient is left alone", [tensor([0.3, 0.4])], 1.0
    yield "a long gradient is cut to max_norm", [tensor([3.0, 4.0])], 1.0
    yield "the norm is that of all parameters together", [tensor([0.0, 3.0]), tensor([4.0, 0.0])], 2.0
    yield "a parameter without a gradient does not count", [tensor([3.0, 4.0]), None], 1.0
    yield "the direction stays", [*(5 * torch.randn(3, 2, generator=generator))], 0.5


def _clip(
    parameters, max_norm, norm_of=lambda g: g.norm(), factor=lambda norm, top: min(1.0, top / norm), returned=lambda n, top: n
):
    gradients = [each.grad for each in parameters if each.grad is not None]
    norm = norm_of(torch.cat(gradients)).item()
    for each in gradients:
        each.mul_(factor(norm, max_norm))
    return returned(norm, max_norm)


def _clip_each(parameters, max_norm):
    return sum(_clip([each], max_norm) ** 2 for each in parameters if each.grad is not None) ** 0.5


def _clip_values(parameters, max_norm):
    norm = _clip(parameters, float("inf"))
    for each in parameters:
        each.grad = None if each.grad is None else each.grad.clamp(-max_norm, max_norm)
    return norm


def _steps(function):
    """The losses that some steps of `function` report, and the policy that they leave."""

    def run(reference_logps, chosen, rejected, beta):
        policy = TabularPolicy(reference_logps)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        losses = [function(policy, reference_logps, w, l, beta, optimizer) for w, l in zip(chosen, rejected, strict=True)]
        return None if None in losses else tensor([float(each) for each in losses]), policy().detach()

    return run


def _step_cases(generator):
    logps, draw = torch.randn(5, generator=generator).log_softmax(-1), torch.rand(3, 4, 5, generator=generator).argsort(-1)
    yield "one step on one pair", tensor([0.5, 0.3, 0.2]).log(), tensor([[0]]), tensor([[2]]), 1.0
    yield "one step on one pair", tensor([0.5, 0.3, 0.2]).log(), tensor([[0]]), tensor([[2]]), 0.5
    yield (
        "two steps: the second knows what the first has done",
        tensor([0.5, 0.3, 0.2]).log(),
        tensor([[0], [0]]),
        tensor([[2], [2]]),
        0.5,
    )
    yield "steps on batches", logps, draw[..., 0], draw[..., 1], 0.3


def _losses(policy, reference, w, l, beta, outside=1.0):
    logps = policy()
    return -outside * logsigmoid(beta * ((logps[w] - reference[w]) - (logps[l] - reference[l])))


def _step(p, r, w, l, beta, optimizer, losses=_losses, order="zero_grad, backward, step", sign=1, reduce=torch.mean):
    loss = reduce(losses(p, r, w, l, beta))
    for each in order.split(", "):
        (sign * loss).backward() if each == "backward" else getattr(optimizer, each)()
    return loss.item()


def _task(adapter, names, name, signature, hints, solution, cases, mistakes):
    inner = ("", *(f".<locals>.{each}" for each in ("<listcomp>", "<genexpr>", "losses_of", "losses_of.<locals>.<lambda>")))
    allowed = [f"{adapter.__name__}.<locals>.run{each}" for each in inner]
    allowed += ["_Policy.forward", "TabularPolicy.forward", "TabularPolicy.__init__"]
    wrong = [(why, adapter(each)) for why, each in mistakes]

    def check(function):
        compare(adapted(adapter, function), adapter(solution), cases(fresh()), wrong, names=names, allowed=allowed)

    return Task(name, "ex_06", signature, hints, check, mistakes)


# fmt: off
TASKS = (
    _task(_asked, ("the policy's logits", "question"), "frozen_reference", "def frozen_reference(policy):", (
        "If the policy moves, who else moves? What does an optimizer change, and what does train() change?",
        "Three things: its own weights (copy.deepcopy), no gradient in any of them, and eval mode, so that dropout is off.",
        "reference = copy.deepcopy(policy), then .requires_grad_(False) and .eval() on the copy, never on the policy.",
    ), _reference, _reference_cases, (
        ("that is the policy itself: it moves with every step, and the loss stays at log 2", lambda policy: policy.eval()),
        ("copy.copy is shallow: the copy shares its weights with the policy (copy.deepcopy)",
         lambda policy: copy.copy(policy).eval()),
        ("the copy still learns: its parameters need requires_grad_(False)", lambda policy: _reference(policy, grad=True)),
        ("the copy is in training mode: with dropout on, the first loss is not log 2 (eval)",
         lambda policy: _reference(policy, train=True)),
        ("the policy is frozen, too: copy first, then freeze the copy",
         lambda policy: _reference(policy.requires_grad_(False))),
        ("the policy is in eval mode now: call eval() on the copy", lambda policy: _reference(policy.eval())),
        ("a new policy with weights of its own: the reference is a copy of this one",
         lambda policy: _Policy(torch.zeros_like(policy.logits)).requires_grad_(False).eval()),
    )),
    _task(_micro, ("the policy's logits", "rows", "micro_batch_size", "question"), "micro_batched_gradient",
          "def micro_batched_gradient(policy, losses_of, rows, micro_batch_size):", (
        "backward() adds to what is in .grad already. Which number does each part have to add?",
        "The gradient of a mean over N rows is the sum over all rows, divided by N: not by the size of the part.",
        "policy.zero_grad() once; for part in rows.split(micro_batch_size): (losses_of(policy, part).sum() / len(rows)).backward().",
    ), _accumulate, _micro_cases, (
        ("what was in .grad before is still in it: policy.zero_grad() before the first part",
         lambda *x: _accumulate(*x, clear=None)),
        ("zero_grad in the loop: only the last part's gradient is left", lambda *x: _accumulate(*x, clear=len(x[2]))),
        ("nothing is left in .grad: zero_grad() comes before the first part, not after the last",
         lambda p, *x: (_accumulate(p, *x), p.zero_grad())),
        ("a sum of the parts' means: too large by the number of parts", lambda *x: _accumulate(*x, lambda a, *_: a.mean())),
        ("a mean of the parts' means: right only where all parts are equally long; divide sums by len(rows)",
         lambda *x: _accumulate(*x, lambda a, rows, size: a.mean() / -(-len(rows) // size))),
        ("divided by micro_batch_size, also where the last part is shorter",
         lambda *x: _accumulate(*x, lambda a, rows, size: a.sum() / size / -(-len(rows) // size))),
        ("the sum, not the mean: it grows with the batch", lambda *x: _accumulate(*x, lambda a, *_: a.sum())),
        ("the last, shorter part is left out", lambda *x: _accumulate(*x, keep=len(x[2]) // x[3] * x[3])),
        ("all rows at once: right, and out of memory on a real model",
         lambda p, f, rows, _: _accumulate(p, f, rows, len(rows))),
        ("backward comes after the loop, so all graphs are in memory until then: call it on each part",
         lambda p, f, rows, n: _accumulate(p, lambda p, _: torch.cat([f(p, part) for part in rows.split(n)]), rows, len(rows))),
    )),
    _task(_clipped, ("gradients", "max_norm"), "clip_gradients", "def clip_gradients(parameters, max_norm):", (
        "Think of all gradients as one long arrow. Clipping shortens it and never turns it.",
        "The length is the root of the sum of all squares. One factor for all: max_norm / norm, and never more than 1.",
        "norm = sum of squares ** 0.5; factor = min(1, max_norm / norm); each.grad.mul_(factor); return norm, that before clipping.",
    ), _clip, _clipping_cases, (
        ("each parameter is clipped by itself, which turns the arrow: one norm of all of them", _clip_each),
        ("each number is clipped by itself, which turns the arrow: scale, do not clamp", _clip_values),
        ("a short gradient is made longer: the factor is at most 1", lambda *x: _clip(*x, factor=lambda norm, top: top / norm)),
        ("the norm after clipping is returned; that before it says when training goes wrong",
         lambda *x: _clip(*x, returned=min)),
        ("the square root of the sum of squares is missing", lambda *x: _clip(*x, norm_of=lambda g: g.square().sum())),
        ("the norms of the parameters are added; their squares add up",
         lambda *x: _clip(*x, norm_of=lambda g: g.view(-1, 2).norm(dim=1).sum())),
        ("the largest entry is not the length of the arrow", lambda *x: _clip(*x, norm_of=lambda g: g.abs().max())),
        ("the gradients are as long as before: scale .grad itself, in place", lambda *x: _clip(*x, factor=lambda *_: 1.0)),
    )),
    _task(_steps, ("reference_logps", "chosen of each step", "rejected of each step", "beta"), "dpo_step",
          "def dpo_step(policy, reference_logps, chosen, rejected, beta, optimizer):", (
        "Five lines, in an order that matters: clear, forward, backward, step, and what you report.",
        "policy() gives the log-probability of every response; logps[chosen] are those of this batch. One mean over the pairs.",
        "optimizer.zero_grad(); loss = -logsigmoid(beta * (...)).mean(); loss.backward(); optimizer.step(); return loss.item().",
    ), _step, _step_cases, (
        ("step() comes before backward(): it uses the gradient of the step before, or none",
         lambda *x: (x[5].step(), _step(*x, order="zero_grad, backward"))[1]),
        ("nothing moves: step() is missing, or zero_grad() comes between backward() and it",
         lambda *x: _step(*x, order="backward, zero_grad, step")),
        ("old gradients are not cleared: the second step goes in the sum of both directions",
         lambda *x: _step(*x, order="backward, step")),
        ("two steps on one gradient: step() is called once", lambda *x: _step(*x, order="zero_grad, backward, step, step")),
        ("the loss has no reference in it", lambda p, r, *x: _step(p, 0 * r, *x)),
        ("uphill: the loss is what becomes smaller", lambda *x: _step(*x, sign=-1)),
        ("the reference is taken from the policy as it is now: the loss is log 2 for ever",
         lambda p, r, *x: _step(p, p().detach(), *x)),
        ("right only when beta = 1: beta multiplies the rewards, not the loss",
         lambda *x: _step(*x, losses=lambda p, r, w, l, beta: _losses(p, r, w, l, 1.0, beta))),
        ("the sum over the pairs: the step grows with the batch; .mean()", lambda *x: _step(*x, reduce=torch.sum)),
        ("chosen and rejected are swapped", lambda p, r, w, l, *x: _step(p, r, l, w, *x)),
        ("the loss is reported after the step; report the one whose gradient was used",
         lambda *x: (_step(*x), _losses(*x[:5]).mean().item())[1]),
    )),
)
