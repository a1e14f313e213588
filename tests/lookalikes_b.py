"""Wrong answers to exercises 05 to 09 that look right, as a student would write them, and a second right answer to each task.

LOOKALIKES: task -> {words that the message must hold: wrong function}; SECOND: task -> right function of another form.
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


def opposite(x):
    return -x, x


def pull(pc, pr, rc, rr, beta):
    return beta * torch.sigmoid(-beta * margin(pc, pr, rc, rr))


def derivative_of_sigmoid(pc, pr, rc, rr, beta):
    p = torch.sigmoid(beta * margin(pc, pr, rc, rr))
    return -beta * p * (1 - p), beta * p * (1 - p)


def sorted_out_by_a_loop(pc, pr, rc, rr, beta):
    chosen, rejected = beta * pc - beta * rc, beta * pr - beta * rr
    return chosen, rejected, sum(float(a > b) for a, b in zip(pc - rc, pr - rr, strict=True)) / len(pc)


def rewards(pc, pr, rc, rr, beta, accuracy=lambda chosen, rejected: (chosen > rejected).float().mean()):
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    return chosen, rejected, float(accuracy(chosen, rejected))


def share(right):
    return right.float().mean().item()


# ex_06


def freeze_one_by_one(policy):
    reference = copy.deepcopy(policy)
    for parameter in reference.parameters():
        parameter.requires_grad = False
    reference.eval()
    return reference


def frozen_before_the_copy(policy):
    policy.requires_grad_(False)
    return copy.deepcopy(policy).eval()


def eval_before_the_copy(policy):
    policy.eval()
    return copy.deepcopy(policy).requires_grad_(False)


def state_dict_by_reference(policy):
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
        mine.data = theirs.data
    return reference


def by_weights_of_parts(policy, losses_of, rows, micro_batch_size):
    for parameter in policy.parameters():
        parameter.grad = None
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        (losses_of(policy, part).mean() * len(part) / len(rows)).backward()


def micro_batches(policy, losses_of, rows, size, *, of_part=None, clear="before", parts=None):
    """of_part: what of a part's losses goes backward; clear: when .grad is cleared."""
    of_part = of_part or (lambda losses: losses.sum() / len(rows))
    if clear in ("before", "before and after"):
        policy.zero_grad()
    for part in rows.split(size) if parts is None else parts:
        if clear == "each time":
            policy.zero_grad()
        of_part(losses_of(policy, part)).backward()
    if clear == "before and after":
        policy.zero_grad()


def backward_at_the_end(policy, losses_of, rows, micro_batch_size):
    policy.zero_grad()
    total = sum(losses_of(policy, part).sum() for part in rows.split(micro_batch_size))
    (total / len(rows)).backward()


def new_gradients(parameters, max_norm):
    norm = math.sqrt(sum(each.grad.square().sum().item() for each in parameters if each.grad is not None))
    for each in parameters:
        if each.grad is not None and norm > max_norm:
            each.grad = each.grad * (max_norm / norm)
    return norm


def clipped(parameters, max_norm, norm_of=None, scale=lambda norm, max_norm: min(1.0, max_norm / norm), missing=False):
    gradients = [each.grad for each in parameters if missing or each.grad is not None]
    norm = norm_of(gradients) if norm_of else torch.cat([each.flatten() for each in gradients]).norm()
    for each in gradients:
        each.mul_(scale(norm, max_norm))
    return norm


def clamped(parameters, max_norm):
    norm = nn.utils.clip_grad_norm_(parameters, float("inf"))
    nn.utils.clip_grad_value_(parameters, max_norm)
    return norm


def not_in_place(parameters, max_norm):
    gradients = [each.grad for each in parameters if each.grad is not None]
    norm = torch.cat(gradients).norm()
    gradients = [each * min(1.0, max_norm / norm) for each in gradients]
    return norm


def in_another_order(policy, reference_logps, chosen, rejected, beta, optimizer):
    log_ratios = policy() - reference_logps
    loss = F.softplus(-beta * (log_ratios[chosen] - log_ratios[rejected])).sum() / len(chosen)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def step(policy, reference, chosen, rejected, beta, optimizer, *, order="clear loss backward step", times=1):
    """The parts of a step in this order; the loss that is returned is the last one computed."""

    def loss():
        logps = policy()
        h = logps[chosen] - reference[chosen] - logps[rejected] + reference[rejected]
        return times * -F.logsigmoid(beta * h).mean()

    for part in order.split():
        if part == "loss":
            value = loss()
        elif part == "backward":
            value.backward()
        else:
            {"clear": optimizer.zero_grad, "step": optimizer.step}[part]()
    return value.item()


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


def alpha_inside(s, t, alpha, scale):
    return by_masked_assignment(*((alpha * s, alpha * t, 1.0) if scale == "log" else (s, t, alpha)), scale)


def with_a_partition_function(reference_logps, scores, beta, alpha):
    unnormalised = reference_logps + scores * (alpha / beta)
    return unnormalised - torch.logsumexp(unnormalised, 0)


# ex_08


def k123(policy, reference, k1=lambda x: -x, k2=lambda x: x**2 / 2, k3=lambda x: x.exp() - 1 - x):
    return tuple(k(reference - policy) for k in (k1, k2, k3))


def with_the_ratio(policy_logps, reference_logps):
    ratio = torch.exp(reference_logps) / torch.exp(policy_logps)
    return -ratio.log(), 0.5 * ratio.log() ** 2, (ratio - 1) - ratio.log()


def by_kl_div(policy_logits, reference_logits, scored):
    p, q = F.log_softmax(policy_logits, -1), F.log_softmax(reference_logits, -1)
    return torch.where(scored, F.kl_div(q, p, reduction="none", log_target=True).sum(-1), 0.0).sum(1)


def over_tokens(f):
    """(B,) sum over scored tokens of f(logits, reference logits)."""
    return lambda x, y, scored: f(x, y).sum(-1).masked_fill(~scored, 0.0).sum(1)


def of_softmaxes(f):
    return over_tokens(lambda x, y: f(x.softmax(-1), y.softmax(-1)))


def by_cosine_similarity(texts, chosen, rejected):
    difference = F.cosine_similarity(texts, chosen) - F.cosine_similarity(texts, rejected)
    return torch.tensor([0.5 if abs(each) < 1e-6 else float(each > 0) for each in difference.tolist()])


def nearer(nearness=F.cosine_similarity, tie=1e-6):
    """1 where a text is nearer to the chosen response, 1/2 where within `tie`."""

    def values(texts, chosen, rejected):
        difference = nearness(texts, chosen) - nearness(texts, rejected)
        return torch.where(difference.abs() < tie, 0.5, (difference > 0).float())

    return values


def every_text_with_every_other(*embedded):
    return nearer(lambda a, b: (a * b).sum(1))(*(F.normalize(each, dim=0) for each in embedded))


def by_counting(wins_a, wins_b, resamples):
    difference = (wins_a - wins_b).double().numpy()
    means = np.array([difference[rows].mean() for rows in resamples.numpy()])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def ends(values, low=0.025):
    return values.quantile(low).item(), values.quantile(1 - low).item()


def of_ends(combine):
    return lambda a, b, resamples: combine(*(ends(each.mean(1)[resamples].mean(1)) for each in (a, b)))


def normal_without_196(wins_a, wins_b, resamples):
    means = (wins_a.mean(1) - wins_b.mean(1))[resamples].mean(1)
    return (means.mean() - means.std()).item(), (means.mean() + means.std()).item()


def by_counting_up(differences, half_width):
    needed = 1
    while 1.96 * np.std(differences.numpy(), ddof=1) / math.sqrt(needed) > half_width:
        needed += 1
    return needed


# ex_09


def by_newton(features, weight_decay):
    gap = (features[:, 0] - features[:, 1]).double()
    weights = torch.zeros(gap.shape[1], dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(gap @ weights)
        slope = -((1 - p)[:, None] * gap).mean(0) + 2 * weight_decay * weights
        curvature = (gap.T * (p * (1 - p))) @ gap / len(gap) + 2 * weight_decay * torch.eye(len(weights)).double()
        weights = weights - torch.linalg.solve(curvature, slope)
    return weights.to(features.dtype)


def fitted(loss, decay=1.0, steps=200):
    """A reward head that minimises loss(chosen, rejected) + decay * weight_decay * squares."""

    def fit(features, weight_decay):
        weights = torch.zeros(features.shape[2], requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(features[:, 0] @ weights, features[:, 1] @ weights) + decay * weight_decay * weights.square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        return weights.detach()

    return fit


def right_loss(chosen, rejected):
    return F.softplus(rejected - chosen).mean()


def by_loop(probabilities, num_bins):
    bins = {}
    for p in probabilities.tolist():
        confidence = max(p, 1 - p)
        index = min(int((2 * confidence - 1) * num_bins), num_bins - 1)
        bins.setdefault(index, []).append((confidence, p > 0.5))
    gaps = [abs(sum(right - confidence for confidence, right in rows)) for rows in bins.values()]
    return sum(gaps) / len(probabilities)


def confidence_and_right(probabilities):
    return probabilities.maximum(1 - probabilities), (probabilities > 0.5).double()


def bins_alike(probabilities, num_bins):
    edges = 0.5 + 0.5 * torch.arange(num_bins + 1) / num_bins
    confidence, right = confidence_and_right(probabilities)
    inside = [(confidence >= a) & (confidence <= b) for a, b in zip(edges, edges[1:], strict=False)]
    return np.mean([(right[i].mean() - confidence[i].mean()).abs().item() for i in inside if i.any()])


def half_open_last_bin(probabilities, num_bins):
    edges = 0.5 + 0.5 * torch.arange(num_bins + 1) / num_bins
    confidence, right = confidence_and_right(probabilities)
    inside = [(confidence >= a) & (confidence < b) for a, b in zip(edges, edges[1:], strict=False)]
    gaps = [i.sum() * (right[i].mean() - confidence[i].mean()).abs() for i in inside if i.any()]
    return float(sum(gaps)) / len(probabilities)


def bins_from_zero(probabilities, num_bins):
    confidence, right = confidence_and_right(probabilities)
    index = (confidence * num_bins).long().clamp(max=num_bins - 1)
    gaps = [(index == i).sum() * abs(right[index == i].mean() - confidence[index == i].mean()) for i in index.unique()]
    return float(sum(gaps)) / len(probabilities)


def largest_gap(probabilities, num_bins):
    index = ((2 * probabilities.maximum(1 - probabilities) - 1) * num_bins).long().clamp(max=num_bins - 1)
    return max(by_loop(probabilities[index == i], num_bins) for i in index.unique())


def with_numpy(train):
    run, loose = ({key: values.numpy() for key, values in train(beta=beta).items()} for beta in (1, 0.1))
    least = np.sort(run["loss"])[0]
    ratio = np.exp(np.log(run["kl"][60]) - np.log(loose["kl"][60]))
    found = (run["loss"][0], run["loss"][0] - least, run["loss"][60] - least, np.diff(run["score"]).sum(), ratio)
    return tuple(map(float, found))


def five(run, loose, first=0):
    loss, score = run["loss"].tolist(), run["score"].tolist()
    ratio = (run["kl"][-1] / loose["kl"][-1]).item()
    return loss[first], loss[0] - min(loss), loss[-1] - min(loss), score[-1] - score[0], ratio


def symptoms(change=lambda found, run, loose: found, first=0, betas=(1.0, 0.1)):
    """The five symptoms, but for a change of them."""

    def function(train):
        run, loose = (train(beta=beta) for beta in betas)
        return change(five(run, loose, first), run, loose)

    return function


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


def by_loss_alone(train):
    loss = train(beta=1.0)["loss"]
    if abs(loss[0] - math.log(2)) > 1e-3:
        return "other reference"
    if loss[0] - loss.min() < 1e-3:
        return "moving reference"
    return "gradients kept" if loss[-1] > loss.min() + 0.05 else "none"


def ratio_first(train):
    inverted = train(beta=1.0)["kl"][-1] > 1.1 * train(beta=0.1)["kl"][-1]
    return "inverted beta" if inverted else by_direct_questions(train)


def one_beta(train):
    found = by_direct_questions(train)
    return "none" if found == "inverted beta" else found


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
        "the chain rule gives a factor beta": lambda *x: opposite(torch.sigmoid(-x[4] * margin(*x[:4]))),
        "beta belongs into the weight's margin": lambda *x: opposite(x[4] * torch.sigmoid(-margin(*x[:4]))),
        "the weight is turned round": lambda *x: opposite(x[4] * torch.sigmoid(x[4] * margin(*x[:4]))),
        "the weight is 1/2 only at the start": lambda *x: opposite(torch.full_like(x[0], x[4] / 2)),
        "both signs are turned round": lambda *x: opposite(-pull(*x)),
        "that is the derivative of the sigmoid": derivative_of_sigmoid,
        "divided by the number of pairs": lambda *x: opposite(pull(*x) / len(x[0])),
        "the rejected log-probability has a gradient": lambda *x: (-pull(*x), torch.zeros_like(x[0])),
    },
    "implicit_rewards": {
        "use >, not >=": lambda *x: rewards(*x, lambda c, r: share(c >= r)),
        "a tie counts as nothing": lambda *x: rewards(*x, lambda c, r: ((c - r).sign() / 2 + 0.5).mean()),
        "the accuracy compares the policy's log-probabilities": lambda *x: rewards(*x, lambda *_: share(x[0] > x[1])),
        "the accuracy compares the chosen reward with 0": lambda *x: rewards(*x, lambda *_: share(x[0] > x[2])),
        "a reward is beta times the log-ratio": lambda *x: rewards(*x[:4], 1.0),
        USUAL: lambda *x: rewards(*x, lambda c, r: c.mean() > r.mean()),
    },
    "frozen_reference": {
        "that is the policy itself": lambda policy: policy.eval(),
        "copy.copy is shallow": lambda policy: copy.copy(policy).eval(),
        "the copy still learns": lambda policy: copy.deepcopy(policy).eval(),
        "the copy is in training mode": lambda policy: copy.deepcopy(policy).requires_grad_(False),
        "the policy is frozen": frozen_before_the_copy,
        "the policy is in eval mode now": eval_before_the_copy,
        USUAL: state_dict_by_reference,
    },
    "micro_batched_gradient": {
        "a mean of the parts' means": lambda p, f, rows, size: micro_batches(
            p, f, rows, size, of_part=lambda losses: losses.mean() / len(rows.split(size))
        ),
        "a sum of the parts' means": lambda *x: micro_batches(*x, of_part=torch.mean),
        "what was in .grad before is still in it": lambda *x: micro_batches(*x, clear="never"),
        "zero_grad in the loop": lambda *x: micro_batches(*x, clear="each time"),
        "the last": lambda *x: micro_batches(*x, parts=[part for part in x[2].split(x[3]) if len(part) == x[3]]),
        "all rows at once": lambda *x: micro_batches(*x, parts=[x[2]]),
        "backward comes after the loop": backward_at_the_end,
        "nothing is left in .grad": lambda *x: micro_batches(*x, clear="before and after"),
    },
    "clip_gradients": {
        "each parameter is clipped by itself": lambda parameters, max_norm: torch.stack(
            [nn.utils.clip_grad_norm_([each], max_norm) for each in parameters if each.grad is not None]
        ).norm(),
        "each number is clipped by itself": clamped,
        "a short gradient is made longer": lambda *x: clipped(*x, scale=lambda norm, max_norm: max_norm / norm),
        "the norm after clipping is returned": lambda *x: clipped(*x) and nn.utils.clip_grad_norm_(x[0], float("inf")),
        "the square root of the sum of squares is missing": lambda *x: clipped(
            *x, norm_of=lambda gradients: sum(each.square().sum() for each in gradients)
        ),
        "the gradients are as long as before": not_in_place,
        "it raised TypeError": lambda *x: clipped(*x, norm_of=lambda gradients: torch.cat(gradients).norm(), missing=True),
    },
    "dpo_step": {
        "old gradients are not cleared": lambda *x: step(*x, order="loss backward step"),
        "nothing moves": lambda *x: step(*x, order="loss backward clear step"),
        "step": lambda *x: step(*x, order="step clear loss backward"),
        "the loss is reported after the step": lambda *x: step(*x, order="clear loss backward step loss"),
        "the reference is taken from the policy as it is now": lambda *x: step(x[0], x[0]().detach(), *x[2:]),
        "the sum over the pairs": lambda *x: step(*x, times=len(x[2])),
        "two steps on one gradient": lambda *x: step(*x, order="clear loss backward step step"),
        "the loss has no reference in it": lambda *x: step(x[0], 0 * x[1], *x[2:]),
    },
    "odpo_loss": {
        "the sign of the offset": lambda *x: -F.logsigmoid(x[5] * margin(*x[:4]) + x[4]),
        "beta multiplies the offset": lambda *x: -F.logsigmoid(x[5] * (margin(*x[:4]) - x[4])),
        "the offset is added to the loss": lambda *x: -F.logsigmoid(x[5] * margin(*x[:4])) + x[4],
        "that is the softmax margin": lambda *x: -F.logsigmoid(x[5] * margin(*x[:4]) - x[4].clamp(min=0)),
        "pairs whose margin exceeds the offset cost nothing here": lambda *x: F.relu(x[4] - x[5] * margin(*x[:4])),
        "log": lambda *x: torch.log(1 + torch.exp(x[4] - x[5] * margin(*x[:4]))),
        USUAL: lambda *x: -F.logsigmoid(x[5] * margin(*x[:4]) - torch.where(x[4] > 0, x[4], 1.0).log()),
    },
    "score_offset": {
        "a clamp": with_log(lambda gap: gap.clamp(min=1e-6).log()),
        "nan_to_num makes -3e38 of log 0": with_log(lambda gap: gap.log().nan_to_num(0.0)),
        "abs": with_log(lambda gap: (gap.abs() + (gap == 0)).log()),
        "log": with_log(lambda gap: gap.clamp(min=0).log1p()),
        "signed scales keep them": lambda *x: by_masked_assignment(*x).clamp(min=0),
        "alpha stands inside the logarithm": alpha_inside,
        "only the log scale needs a rule": lambda *x: torch.where(x[0] > x[1], by_masked_assignment(*x), 0.0),
        USUAL: lambda *x: by_masked_assignment(*x[:3], "log_ratio" if x[3] == "log" else x[3]),
    },
    "tilted_reference": {
        "not normalised": lambda r, s, beta, alpha: r + alpha * s / beta,
        "the tilt is alpha / beta": lambda r, s, beta, alpha: (r + alpha * beta * s).log_softmax(-1),
        "1 + alpha is where ODPO ends with endless data": lambda r, s, beta, alpha: (r + (1 + alpha) * s / beta).log_softmax(
            -1
        ),
        USUAL: lambda r, s, beta, alpha: (r + s / (alpha * beta)).log_softmax(-1) if alpha else r,
        "the sign": lambda r, s, beta, alpha: (r - alpha * s / beta).log_softmax(-1),
        "exp overflows": lambda r, s, beta, alpha: ((w := r.exp() * torch.exp(alpha * s / beta)) / w.sum()).log(),
        "the logarithm is missing": lambda r, s, beta, alpha: (r + alpha * s / beta).softmax(-1),
    },
    "kl_estimators": {
        "k3 has r = policy / reference": lambda *x: k123(*x, k3=lambda r: (-r).exp() - 1 + r),
        "the ratio is turned round": lambda *x: k123(*x[::-1]),
        "k1 has an abs": lambda *x: k123(*x, k1=torch.abs),
        USUAL: lambda *x: k123(*x, k1=lambda r: (-r).clamp(min=0)),
        "k2 has no factor 1/2": lambda *x: k123(*x, k2=lambda r: r**2),
        "averaged": lambda *x: tuple(each.mean() for each in k123(*x)),
    },
    "token_kl": {
        "the direction": lambda x, y, scored: by_kl_div(y, x, scored),
        "a mean over positions": lambda x, y, scored: by_kl_div(x, y, scored) / scored.sum(1),
        "prompt and padding count": lambda x, y, scored: by_kl_div(x, y, torch.ones_like(scored)),
        "logits are no log-probabilities": over_tokens(lambda x, y: x.softmax(-1) * (x - y)),
        "log of softmax": of_softmaxes(lambda p, q: p * (p / q).log()),
        USUAL: of_softmaxes(lambda p, q: p * ((p + 1e-8) / (q + 1e-8)).log()),
        "that is the cross-entropy": over_tokens(lambda x, y: -x.softmax(-1) * y.log_softmax(-1)),
    },
    "win_values": {
        "a dot product": nearer(lambda a, b: (a * b).sum(1)),
        "a tie counts as a loss": lambda *x: (by_cosine_similarity(*x) > 0.5).float(),
        "a tie counts as a win": lambda *x: (by_cosine_similarity(*x) >= 0.5).float(),
        "cosines must be equal to the last bit here": nearer(tie=1e-30),
        "a tie is within 1e-6": nearer(tie=1e-2),
        "the nearer one by distance": nearer(lambda a, b: -(a - b).norm(dim=1)),
        USUAL: every_text_with_every_other,
    },
    "paired_interval": {
        "two intervals subtracted": of_ends(lambda a, b: (a[0] - b[1], a[1] - b[0])),
        "the lower ends are subtracted": of_ends(lambda a, b: (a[0] - b[0], a[1] - b[1])),
        USUAL: lambda a, b, resamples: by_counting(a[:, :1], b[:, :1], resamples),
        "samples of one prompt are not independent": lambda a, b, resamples: by_counting(
            (a - b).view(-1, 1), torch.zeros(a.numel(), 1), resamples
        ),
        "the spread of the draws without the factor 1.96": normal_without_196,
        "90 %": lambda a, b, resamples: ends((a.mean(1) - b.mean(1))[resamples].mean(1), 0.05),
        "the quantiles of the differences themselves": lambda a, b, resamples: ends(a.mean(1) - b.mean(1)),
        "unpaired": lambda a, b, resamples: ends(a.mean(1)[resamples].mean(1) - b.mean(1)[resamples.flip(0)].mean(1)),
    },
    "prompts_needed": {
        "the square is missing": lambda d, half: math.ceil(1.96 * d.std().item() / half),
        "without 1.96 the interval covers 68 %": lambda d, half: math.ceil((d.std().item() / half) ** 2),
        USUAL: lambda d, half: round((1.96 * d.std().item() / half) ** 2),
        "half_width is taken for the whole width": lambda d, half: math.ceil((1.96 * d.std().item() / (half / 2)) ** 2),
        "the pilot is a sample": lambda d, half: math.ceil((1.96 * d.std(correction=0).item() / half) ** 2),
        "the spread is measured around 0": lambda d, half: math.ceil((1.96 * d.square().mean().sqrt().item() / half) ** 2),
        "the pilot's standard error is used": lambda d, half: math.ceil((1.96 * d.std().item() / len(d) ** 0.5 / half) ** 2),
    },
    "reward_head": {
        "weight_decay is not used": fitted(right_loss, decay=0.0),
        "the squares are halved": fitted(right_loss, decay=0.5),
        "the sum of the losses": fitted(lambda c, r: F.softplus(r - c).sum()),
        "a regression on the labels": fitted(lambda c, r: (c - r - 1).square().mean()),
        "each response is classified by itself": fitted(lambda c, r: (F.softplus(-c) + F.softplus(r)).mean()),
        "chosen and rejected are swapped": fitted(lambda c, r: right_loss(r, c)),
        USUAL: fitted(right_loss, steps=1),
    },
    "calibration_error": {
        "bins count alike": bins_alike,
        "confidence 1 is in no bin": half_open_last_bin,
        "bins from 0 to 1": bins_from_zero,
        "one gap over all pairs": lambda p, num_bins: abs((p > 0.5).double().mean() - p.maximum(1 - p).mean()).item(),
        "each pair by itself": lambda p, num_bins: ((p > 0.5).double() - p.maximum(1 - p)).abs().mean().item(),
        "the largest gap": largest_gap,
    },
    "symptoms": {
        "the two runs are mixed up": symptoms(betas=(0.1, 1.0)),
        "the KL ratio is turned round": symptoms(lambda found, *_: (*found[:4], 1 / found[4])),
        "the fall is measured to the last loss": symptoms(lambda found, *_: (found[0], found[1] - found[2], *found[2:])),
        "the first loss is that before the first step": symptoms(first=1),
        "the rebound is measured from the largest loss": symptoms(
            lambda found, run, _: (*found[:2], (run["loss"].max() - run["loss"].min()).item(), *found[3:])
        ),
        USUAL: symptoms(lambda found, run, loose: (*found[:4], (run["kl"].mean() / loose["kl"].mean()).item())),
    },
    "planted_bug": {
        USUAL: lambda train: "moving reference",
        "is no answer to all": lambda train: "none",
        "only the trainer's own loss is read": by_loss_alone,
        "a loss that rises again was not noticed": ratio_first,
        "only one beta was tried": one_beta,
    },
}

SECOND = {
    "dpo_loss": lambda pc, pr, rc, rr, beta: F.softplus(beta * (pr - pc + rc - rr)),
    "dpo_gradient": by_autograd,
    "implicit_rewards": sorted_out_by_a_loop,
    "frozen_reference": freeze_one_by_one,
    "micro_batched_gradient": by_weights_of_parts,
    "clip_gradients": new_gradients,
    "dpo_step": in_another_order,
    "odpo_loss": odpo_by_logaddexp,
    "score_offset": by_masked_assignment,
    "tilted_reference": with_a_partition_function,
    "kl_estimators": with_the_ratio,
    "token_kl": by_kl_div,
    "win_values": by_cosine_similarity,
    "paired_interval": by_counting,
    "prompts_needed": by_counting_up,
    "reward_head": by_newton,
    "calibration_error": by_loop,
    "symptoms": with_numpy,
    "planted_bug": by_direct_questions,
}
