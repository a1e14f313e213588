"""Wrong answers to exercises 05 to 09 that look right, as a student would write them, and a second right answer to each task.

LOOKALIKES: task -> {words that the message must hold: wrong function}; SECOND: task -> right function of another form.
What else a check knows by name (`Task.mistakes`) plays the student in test_exercises.py and is not written out here.
"""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# ex_05


def margin(pc, pr, rc, rr):
    return (pc - rc) - (pr - rr)


def in_place(pc, pr, rc, rr, beta):
    pc -= rc
    pr -= rr
    return -F.logsigmoid(beta * (pc - pr))


def by_autograd(pc, pr, rc, rr, beta):
    pc, pr = pc.clone().requires_grad_(), pr.clone().requires_grad_()
    loss = -F.logsigmoid(beta * ((pc - rc) - (pr - rr))).sum()
    return torch.autograd.grad(loss, (pc, pr))


def pull(pc, pr, rc, rr, beta):
    return beta * torch.sigmoid(-beta * margin(pc, pr, rc, rr))


def sorted_out_by_a_loop(pc, pr, rc, rr, beta):
    chosen, rejected = beta * pc - beta * rc, beta * pr - beta * rr
    return chosen, rejected, sum(float(a > b) for a, b in zip(pc - rc, pr - rr, strict=True)) / len(pc)


def rewards(pc, pr, rc, rr, beta, right=torch.gt):
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    return chosen, rejected, right(chosen, rejected).float().mean().item()


# ex_06


def freeze_one_by_one(policy):
    reference = copy.deepcopy(policy)
    for parameter in reference.parameters():
        parameter.requires_grad = False
    reference.eval()
    return reference


def micro_batches(policy, losses_of, rows, size, *, weight=lambda part, rows: len(part) / len(rows), clear="once"):
    """weight: of a part's mean loss; clear: when .grad is cleared."""
    for i, part in enumerate(rows.split(size)):
        if clear == "each time" or (clear == "once" and i == 0):
            policy.zero_grad()
        (losses_of(policy, part).mean() * weight(part, rows)).backward()


def new_gradients(parameters, max_norm):
    norm = math.sqrt(sum(each.grad.square().sum().item() for each in parameters if each.grad is not None))
    for each in parameters:
        if each.grad is not None and norm > max_norm:
            each.grad = each.grad * (max_norm / norm)
    return norm


def clamped(parameters, max_norm):
    norm = nn.utils.clip_grad_norm_(parameters, float("inf"))
    nn.utils.clip_grad_value_(parameters, max_norm)
    return norm


def step(policy, reference, chosen, rejected, beta, optimizer, *, order="loss backward step clear"):
    """The parts of a step in this order; the loss that is returned is the last one computed."""
    for part in order.split():
        if part == "loss":
            log_ratios = policy() - reference
            loss = F.softplus(-beta * (log_ratios[chosen] - log_ratios[rejected])).sum() / len(chosen)
        elif part == "backward":
            loss.backward()
        else:
            {"clear": optimizer.zero_grad, "step": optimizer.step}[part]()
    return loss.item()


# ex_07


def odpo_by_logaddexp(pc, pr, rc, rr, offset, beta):
    m = beta * (pc - rc) - beta * (pr - rr)
    return torch.logaddexp(torch.zeros_like(m), offset - m)


def by_masked_assignment(chosen_scores, rejected_scores, alpha, scale):
    if scale == "identity":
        return alpha * chosen_scores - alpha * rejected_scores
    if scale == "log_ratio":
        return alpha * (chosen_scores / rejected_scores).log()
    offset, gap = torch.zeros_like(chosen_scores), chosen_scores - rejected_scores
    offset[gap > 0] = alpha * gap[gap > 0].log()
    return offset


def with_log(f):
    """The right answer, but for the scale "log": there alpha * f(difference)."""
    return lambda s, t, alpha, scale: alpha * f(s - t) if scale == "log" else by_masked_assignment(s, t, alpha, scale)


# ex_08


def k123(policy, reference, k1=lambda x: -x, k2=lambda x: x**2 / 2, k3=lambda x: x.exp() - 1 - x):
    return tuple(k(reference - policy) for k in (k1, k2, k3))


def with_the_ratio(policy_logps, reference_logps):
    ratio = torch.exp(reference_logps) / torch.exp(policy_logps)
    return -ratio.log(), 0.5 * ratio.log() ** 2, (ratio - 1) - ratio.log()


def by_kl_div(policy_logits, reference_logits, scored):
    p, q = F.log_softmax(policy_logits, -1), F.log_softmax(reference_logits, -1)
    return torch.where(scored, F.kl_div(q, p, reduction="none", log_target=True).sum(-1), 0.0).sum(1)


def of_softmaxes(f):
    """(B,) sum over scored tokens of f(probabilities, the reference's)."""
    return lambda x, y, scored: f(x.softmax(-1), y.softmax(-1)).sum(-1).masked_fill(~scored, 0.0).sum(1)


def nearer(nearness=F.cosine_similarity, tie=1e-6):
    """1 where a text is nearer to the chosen response, 1/2 where within `tie`."""

    def values(texts, chosen, rejected):
        difference = nearness(texts, chosen) - nearness(texts, rejected)
        return torch.where(difference.abs() < tie, 0.5, (difference > 0).float())

    return values


def by_counting(wins_a, wins_b, resamples):
    difference = (wins_a - wins_b).double().numpy()
    means = np.array([difference[rows].mean() for rows in resamples.numpy()])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def ends(values, low=0.025):
    return values.quantile(low).item(), values.quantile(1 - low).item()


def two_intervals(wins_a, wins_b, resamples):
    (low, high), (other_low, other_high) = (ends(each.mean(1)[resamples].mean(1)) for each in (wins_a, wins_b))
    return low - other_high, high - other_low


def by_counting_up(differences, half_width):
    needed = 1
    while 1.96 * np.std(differences.numpy(), ddof=1) / math.sqrt(needed) > half_width:
        needed += 1
    return needed


# ex_09


def by_newton(features, weight_decay, steps=30):
    gap = (features[:, 0] - features[:, 1]).double()
    weights = torch.zeros(gap.shape[1], dtype=torch.float64)
    for _ in range(steps):
        p = torch.sigmoid(gap @ weights)
        slope = -((1 - p)[:, None] * gap).mean(0) + 2 * weight_decay * weights
        curvature = (gap.T * (p * (1 - p))) @ gap / len(gap) + 2 * weight_decay * torch.eye(len(weights)).double()
        weights = weights - torch.linalg.solve(curvature, slope)
    return weights.to(features.dtype)


def by_loop(probabilities, num_bins, *, lowest=0.5, error=lambda bins: sum(abs(sum(b)) for b in bins) / sum(map(len, bins))):
    """error: of the bins, which are lists of 1 or 0 (right or wrong) minus the confidence."""
    bins = {}
    for p in probabilities.tolist():
        confidence = max(p, 1 - p)
        index = min(int((confidence - lowest) / (1 - lowest) * num_bins), num_bins - 1)
        bins.setdefault(index, []).append((p > 0.5) - confidence)
    return error(bins.values())


def with_numpy(train, betas=(1, 0.1), first=0):
    run, loose = ({key: values.numpy() for key, values in train(beta=beta).items()} for beta in betas)
    loss, least = run["loss"], np.sort(run["loss"])[0]
    ratio = np.exp(np.log(run["kl"][60]) - np.log(loose["kl"][60]))
    return tuple(map(float, (loss[first], loss[0] - least, loss[60] - least, np.diff(run["score"]).sum(), ratio)))


def by_direct_questions(train):
    run, loose = train(beta=1.0), train(beta=0.1)
    loss, score = run["loss"], run["score"]
    if abs(loss[0] - math.log(2)) > 0.01:
        return "other reference"
    if loss.std() < 1e-3:
        return "moving reference"
    if loss[-1] > loss.min() + 0.02:
        return "gradients kept"
    if score[-1] < score[0]:
        return "swapped labels"
    return "inverted beta" if run["kl"][-1] > loose["kl"][-1] else "none"


def never(*names):
    """The right answer, but for bugs of these names, which it does not look for."""
    return lambda train: "none" if (found := by_direct_questions(train)) in names else found


def ratio_first(train):
    inverted = train(beta=1.0)["kl"][-1] > 1.1 * train(beta=0.1)["kl"][-1]
    return "inverted beta" if inverted else by_direct_questions(train)


USUAL = "none of the usual mistakes"
LOOKALIKES = {
    "dpo_loss": {
        "the reference is not used": lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr)),
        "beta is not used": lambda *x: -F.logsigmoid(margin(*x[:4])),
        "beta multiplies the rewards, not the loss": lambda *x: -x[4] * F.logsigmoid(margin(*x[:4])),
        "beta multiplies the reference, too": lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr) - (rc - rr)),
        "that is the loss of SFT": lambda *x: -x[0],
        "underflows to log(0) where a pair is very wrong": lambda *x: -torch.log(1 / (1 + torch.exp(-x[4] * margin(*x[:4])))),
        "part of the graph is cut": lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * ((pc - rc) - (pr - rr).detach())),
        "the pairs were averaged": lambda *x: -F.logsigmoid(x[4] * margin(*x[:4])).mean(),
        "whatever comes in": lambda *x: torch.full_like(x[0], math.log(2)),
        "policy_chosen_logps is changed in place": in_place,
    },
    "dpo_gradient": {
        "the chain rule gives a factor beta": lambda *x: (-pull(*x) / x[4], pull(*x) / x[4]),
        "the weight is turned round": lambda pc, pr, rc, rr, beta: (-(w := pull(pr, pc, rr, rc, beta)), w),
        "both signs are turned round": lambda *x: (pull(*x), -pull(*x)),
        "divided by the number of pairs": lambda *x: (-pull(*x) / len(x[0]), pull(*x) / len(x[0])),
    },
    "implicit_rewards": {
        "use >, not >=": lambda *x: rewards(*x, torch.ge),
        "the accuracy compares the policy's log-probabilities": lambda *x: rewards(*x, lambda *_: x[0] > x[1]),
        "a reward is beta times the log-ratio": lambda *x: rewards(*x[:4], 1.0),
        USUAL: lambda *x: rewards(*x, lambda c, r: c.mean() > r.mean()),
    },
    "frozen_reference": {
        "that is the policy itself": lambda policy: policy.eval(),
        "copy.copy is shallow": lambda policy: copy.copy(policy).eval(),
        "the copy is in training mode": lambda policy: copy.deepcopy(policy).requires_grad_(False),
        "the policy is frozen": lambda policy: copy.deepcopy(policy.requires_grad_(False)).eval(),
    },
    "micro_batched_gradient": {
        "a mean of the parts' means": lambda *x: micro_batches(*x, weight=lambda *_: 1 / len(x[2].split(x[3]))),
        "what was in .grad before is still in it": lambda *x: micro_batches(*x, clear="never"),
        "zero_grad in the loop": lambda *x: micro_batches(*x, clear="each time"),
        "all rows at once": lambda policy, losses_of, rows, _: micro_batches(policy, losses_of, rows, len(rows)),
    },
    "clip_gradients": {
        "each number is clipped by itself": clamped,
        "each parameter is clipped by itself": lambda parameters, top: math.hypot(
            *(new_gradients([each], top) for each in parameters if each.grad is not None)
        ),
        "the norm after clipping is returned": lambda *x: new_gradients(*x) and new_gradients(*x),
        "it raised TypeError": lambda *x: torch.cat([each.grad for each in x[0]]).norm() and new_gradients(*x),
        "the gradients are as long as before": lambda parameters, _: nn.utils.clip_grad_norm_(parameters, float("inf")),
    },
    "dpo_step": {
        "old gradients are not cleared": lambda *x: step(*x, order="loss backward step"),
        "nothing moves": lambda *x: step(*x, order="loss backward clear step"),
        "step() comes before backward()": lambda *x: step(*x, order="step clear loss backward"),
        "the loss is reported after the step": lambda *x: step(*x, order="clear loss backward step loss"),
        "the reference is taken from the policy as it is now": lambda *x: step(x[0], x[0]().detach(), *x[2:]),
    },
    "odpo_loss": {
        "the sign of the offset": lambda *x: -F.logsigmoid(x[5] * margin(*x[:4]) + x[4]),
        "beta multiplies the offset": lambda *x: -F.logsigmoid(x[5] * (margin(*x[:4]) - x[4])),
        "that is the softmax margin": lambda *x: -F.logsigmoid(x[5] * margin(*x[:4]) - x[4].clamp(min=0)),
        "underflows to log(0)": lambda *x: torch.log(1 + torch.exp(x[4] - x[5] * margin(*x[:4]))),
        USUAL: lambda *x: -F.logsigmoid(x[5] * margin(*x[:4]) - torch.where(x[4] > 0, x[4], 1.0).log()),
    },
    "score_offset": {
        "a clamp": with_log(lambda gap: gap.clamp(min=1e-6).log()),
        "nan_to_num makes -3e38 of log 0": with_log(lambda gap: gap.log().nan_to_num(0.0)),
        "abs": with_log(lambda gap: (gap.abs() + (gap == 0)).log()),
        "signed scales keep them": lambda *x: by_masked_assignment(*x).clamp(min=0),
        USUAL: lambda *x: by_masked_assignment(*x[:3], "log_ratio" if x[3] == "log" else x[3]),
    },
    "tilted_reference": {
        "not normalised": lambda r, s, beta, alpha: r + alpha * s / beta,
        "the tilt is alpha / beta": lambda r, s, beta, alpha: (r + alpha * beta * s).log_softmax(-1),
        USUAL: lambda r, s, beta, alpha: (r + s / (alpha * beta)).log_softmax(-1) if alpha else r,
        "exp overflows": lambda r, s, beta, alpha: ((w := r.exp() * torch.exp(alpha * s / beta)) / w.sum()).log(),
    },
    "kl_estimators": {
        "k3 has r = policy / reference": lambda *x: k123(*x, k3=lambda r: (-r).exp() - 1 + r),
        "the ratio is turned round": lambda *x: k123(*x[::-1]),
        "k1 has an abs": lambda *x: k123(*x, k1=torch.abs),
        USUAL: lambda *x: k123(*x, k1=lambda r: (-r).clamp(min=0)),
    },
    "token_kl": {
        "the direction": lambda x, y, scored: by_kl_div(y, x, scored),
        "a mean over positions": lambda x, y, scored: by_kl_div(x, y, scored) / scored.sum(1),
        "prompt and padding count": lambda x, y, scored: by_kl_div(x, y, torch.ones_like(scored)),
        "log of softmax": of_softmaxes(lambda p, q: p * (p / q).log()),
        USUAL: of_softmaxes(lambda p, q: p * ((p + 1e-8) / (q + 1e-8)).log()),
    },
    "win_values": {
        "a dot product": nearer(lambda a, b: (a * b).sum(1)),
        "a tie counts as a win": lambda *x: (nearer()(*x) >= 0.5).float(),
        "cosines must be equal to the last bit here": nearer(tie=1e-30),
        "the nearer one by distance": nearer(lambda a, b: -(a - b).norm(dim=1)),
        USUAL: lambda *x: nearer()(*(F.normalize(each, dim=0) for each in x)),
    },
    "paired_interval": {
        "two intervals subtracted": two_intervals,
        "samples of one prompt are not independent": lambda a, b, resamples: ends((a - b).flatten()[resamples].mean(1)),
        "90 %": lambda a, b, resamples: ends((a.mean(1) - b.mean(1))[resamples].mean(1), 0.05),
        "the quantiles of the differences themselves": lambda a, b, resamples: ends(a.mean(1) - b.mean(1)),
        "unpaired": lambda a, b, resamples: ends(a.mean(1)[resamples].mean(1) - b.mean(1)[resamples.flip(0)].mean(1)),
        USUAL: lambda a, b, resamples: by_counting(a[:, :1], b[:, :1], resamples),
    },
    "prompts_needed": {
        "the square is missing": lambda d, half: math.ceil(1.96 * d.std().item() / half),
        "without 1.96 the interval covers 68 %": lambda d, half: math.ceil((d.std().item() / half) ** 2),
        "the pilot is a sample": lambda d, half: math.ceil((1.96 * d.std(correction=0).item() / half) ** 2),
        USUAL: lambda d, half: round((1.96 * d.std().item() / half) ** 2),
    },
    "reward_head": {
        "weight_decay is not used": lambda features, decay: by_newton(features, 0.0),
        "the squares are halved": lambda features, decay: by_newton(features, decay / 2),
        "chosen and rejected are swapped": lambda features, decay: by_newton(features.flip(1), decay),
        USUAL: lambda features, decay: by_newton(features, decay, steps=1),
    },
    "calibration_error": {
        "bins count alike": lambda *x: by_loop(*x, error=lambda bins: np.mean([abs(np.mean(b)) for b in bins])),
        "bins from 0 to 1": lambda *x: by_loop(*x, lowest=0.0),
        "one gap over all pairs": lambda p, num_bins: by_loop(p, 1),
        "the largest gap": lambda *x: by_loop(*x, error=lambda bins: max(abs(np.mean(b)) for b in bins)),
    },
    "symptoms": {
        "the two runs are mixed up": lambda train: with_numpy(train, betas=(0.1, 1)),
        "the KL ratio is turned round": lambda train: (*(found := with_numpy(train))[:4], 1 / found[4]),
        "the first loss is that before the first step": lambda train: with_numpy(train, first=1),
        "the fall is measured to the last loss": lambda train: ((s := with_numpy(train))[0], s[1] - s[2], *s[2:]),
    },
    "planted_bug": {
        USUAL: lambda train: "moving reference",
        "only the trainer's own loss is read": never("swapped labels", "inverted beta"),
        "only one beta was tried": never("inverted beta"),
        "a loss that rises again was not noticed": ratio_first,
    },
}

SECOND = {
    "dpo_loss": lambda pc, pr, rc, rr, beta: F.softplus(beta * (pr - pc + rc - rr)),
    "dpo_gradient": by_autograd,
    "implicit_rewards": sorted_out_by_a_loop,
    "frozen_reference": freeze_one_by_one,
    "micro_batched_gradient": micro_batches,
    "clip_gradients": new_gradients,
    "dpo_step": step,
    "odpo_loss": odpo_by_logaddexp,
    "score_offset": by_masked_assignment,
    "tilted_reference": lambda r, s, beta, alpha: (x := r + s * (alpha / beta)) - torch.logsumexp(x, 0),
    "kl_estimators": with_the_ratio,
    "token_kl": by_kl_div,
    "win_values": nearer(),
    "paired_interval": by_counting,
    "prompts_needed": by_counting_up,
    "reward_head": by_newton,
    "calibration_error": by_loop,
    "symptoms": with_numpy,
    "planted_bug": by_direct_questions,
}
