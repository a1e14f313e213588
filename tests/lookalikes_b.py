"""Wrong answers to exercises 05 to 09 that look right, as a student would write them, and a second right answer to each task.

LOOKALIKES: task -> {words that the message must hold: wrong function}; SECOND: task -> right function of another form.
"""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SECOND, LOOKALIKES = {}, {}


def second(task):
    """Decorator: a right answer of another form."""
    return lambda function: SECOND.setdefault(task, function)


def wrong(task, words):
    """Decorator: a wrong answer, and words that the message must hold."""
    return lambda function: LOOKALIKES.setdefault(task, {}).setdefault(words, function)


# ex_05 --------------------------------------------------------------------------------------------------------------------


@second("dpo_loss")
def softplus_of_the_reverse(pc, pr, rc, rr, beta):
    return F.softplus(beta * (pr - pc + rc - rr))


@wrong("dpo_loss", "the reference is not used")
def no_reference(pc, pr, rc, rr, beta):
    return -F.logsigmoid(beta * (pc - pr))


@wrong("dpo_loss", "beta is not used")
def no_beta(pc, pr, rc, rr, beta):
    return -F.logsigmoid((pc - rc) - (pr - rr))


@wrong("dpo_loss", "beta multiplies the rewards, not the loss")
def beta_outside(pc, pr, rc, rr, beta):
    return -beta * F.logsigmoid((pc - rc) - (pr - rr))


@wrong("dpo_loss", "beta multiplies the reference, too")
def beta_on_policy_only(pc, pr, rc, rr, beta):
    return -F.logsigmoid(beta * (pc - pr) - (rc - rr))


@wrong("dpo_loss", "that is the loss of SFT")
def sft_only(pc, pr, rc, rr, beta):
    return -pc


@wrong("dpo_loss", "underflows to log(0) where a pair is very wrong")
def naive_sigmoid(pc, pr, rc, rr, beta):
    return -torch.log(1 / (1 + torch.exp(-beta * ((pc - rc) - (pr - rr)))))


@wrong("dpo_loss", "part of the graph is cut")
def detached_rejected(pc, pr, rc, rr, beta):
    return -F.logsigmoid(beta * ((pc - rc) - (pr - rr).detach()))


@wrong("dpo_loss", "the pairs were averaged")
def mean_of_the_batch(pc, pr, rc, rr, beta):
    return -F.logsigmoid(beta * ((pc - rc) - (pr - rr))).mean()


@wrong("dpo_loss", "whatever comes in")
def log2_always(pc, pr, rc, rr, beta):
    return torch.full_like(pc, math.log(2))


@wrong("dpo_loss", "policy_chosen_logps is changed in place")
def in_place(pc, pr, rc, rr, beta):
    pc -= rc
    pr -= rr
    return -F.logsigmoid(beta * (pc - pr))


@second("dpo_gradient")
def by_autograd(pc, pr, rc, rr, beta):
    pc, pr = pc.clone().requires_grad_(), pr.clone().requires_grad_()
    loss = -F.logsigmoid(beta * ((pc - rc) - (pr - rr))).sum()
    return torch.autograd.grad(loss, (pc, pr))


@wrong("dpo_gradient", "the chain rule gives a factor beta")
def no_inner_beta(pc, pr, rc, rr, beta):
    weight = torch.sigmoid(-beta * ((pc - rc) - (pr - rr)))
    return -weight, weight


@wrong("dpo_gradient", "beta belongs into the weight's margin")
def beta_only_in_front(pc, pr, rc, rr, beta):
    weight = torch.sigmoid(-((pc - rc) - (pr - rr)))
    return -beta * weight, beta * weight


@wrong("dpo_gradient", "the weight is turned round")
def weight_of_right_pairs(pc, pr, rc, rr, beta):
    weight = torch.sigmoid(beta * ((pc - rc) - (pr - rr)))
    return -beta * weight, beta * weight


@wrong("dpo_gradient", "the weight is 1/2 only at the start")
def always_a_half(pc, pr, rc, rr, beta):
    return torch.full_like(pc, -beta / 2), torch.full_like(pc, beta / 2)


@wrong("dpo_gradient", "both signs are turned round")
def ascent(pc, pr, rc, rr, beta):
    pull = beta * torch.sigmoid(-beta * ((pc - rc) - (pr - rr)))
    return pull, -pull


@wrong("dpo_gradient", "that is the derivative of the sigmoid")
def derivative_of_sigmoid(pc, pr, rc, rr, beta):
    p = torch.sigmoid(beta * ((pc - rc) - (pr - rr)))
    return -beta * p * (1 - p), beta * p * (1 - p)


@wrong("dpo_gradient", "divided by the number of pairs")
def of_the_mean(pc, pr, rc, rr, beta):
    pull = beta * torch.sigmoid(-beta * ((pc - rc) - (pr - rr))) / len(pc)
    return -pull, pull


@wrong("dpo_gradient", "the rejected log-probability has a gradient")
def rejected_left_alone(pc, pr, rc, rr, beta):
    pull = beta * torch.sigmoid(-beta * ((pc - rc) - (pr - rr)))
    return -pull, torch.zeros_like(pull)


@second("implicit_rewards")
def sorted_out_by_a_loop(pc, pr, rc, rr, beta):
    chosen, rejected = beta * pc - beta * rc, beta * pr - beta * rr
    return chosen, rejected, sum(float(a > b) for a, b in zip(pc - rc, pr - rr, strict=True)) / len(pc)


@wrong("implicit_rewards", "use >, not >=")
def ties_are_right(pc, pr, rc, rr, beta):
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    return chosen, rejected, (chosen >= rejected).float().mean().item()


@wrong("implicit_rewards", "a tie counts as nothing")
def ties_are_half(pc, pr, rc, rr, beta):
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    return chosen, rejected, ((chosen - rejected).sign() / 2 + 0.5).mean().item()


@wrong("implicit_rewards", "the accuracy compares the policy's log-probabilities")
def accuracy_of_logps(pc, pr, rc, rr, beta):
    return beta * (pc - rc), beta * (pr - rr), (pc > pr).float().mean().item()


@wrong("implicit_rewards", "the accuracy compares the chosen reward with 0")
def accuracy_of_chosen_sign(pc, pr, rc, rr, beta):
    return beta * (pc - rc), beta * (pr - rr), (pc > rc).float().mean().item()


@wrong("implicit_rewards", "a reward is beta times the log-ratio")
def log_ratios(pc, pr, rc, rr, beta):
    return pc - rc, pr - rr, (pc - rc > pr - rr).float().mean().item()


@wrong("implicit_rewards", "none of the usual mistakes")
def accuracy_of_means(pc, pr, rc, rr, beta):
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    return chosen, rejected, float(chosen.mean() > rejected.mean())


# ex_06 --------------------------------------------------------------------------------------------------------------------


@second("frozen_reference")
def freeze_one_by_one(policy):
    reference = copy.deepcopy(policy)
    for parameter in reference.parameters():
        parameter.requires_grad = False
    reference.eval()
    return reference


@wrong("frozen_reference", "that is the policy itself")
def itself_in_eval_mode(policy):
    return policy.eval()


@wrong("frozen_reference", "copy.copy is shallow")
def shallow(policy):
    reference = copy.copy(policy)
    reference.eval()
    return reference


@wrong("frozen_reference", "the copy still learns")
def still_learning(policy):
    return copy.deepcopy(policy).eval()


@wrong("frozen_reference", "the copy is in training mode")
def still_training(policy):
    return copy.deepcopy(policy).requires_grad_(False)


@wrong("frozen_reference", "the policy is frozen")
def frozen_before_the_copy(policy):
    policy.requires_grad_(False)
    return copy.deepcopy(policy).eval()


@wrong("frozen_reference", "the policy is in eval mode now")
def eval_before_the_copy(policy):
    policy.eval()
    return copy.deepcopy(policy).requires_grad_(False)


@wrong("frozen_reference", "none of the usual mistakes")
def state_dict_by_reference(policy):
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
        mine.data = theirs.data
    return reference


@second("micro_batched_gradient")
def by_weights_of_parts(policy, losses_of, rows, micro_batch_size):
    for parameter in policy.parameters():
        parameter.grad = None
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        (losses_of(policy, part).mean() * len(part) / len(rows)).backward()


@wrong("micro_batched_gradient", "a mean of the parts' means")
def mean_of_means(policy, losses_of, rows, micro_batch_size):
    policy.zero_grad()
    parts = rows.split(micro_batch_size)
    for part in parts:
        (losses_of(policy, part).mean() / len(parts)).backward()


@wrong("micro_batched_gradient", "a sum of the parts' means")
def sum_of_means(policy, losses_of, rows, micro_batch_size):
    policy.zero_grad()
    for part in rows.split(micro_batch_size):
        losses_of(policy, part).mean().backward()


@wrong("micro_batched_gradient", "what was in .grad before is still in it")
def never_cleared(policy, losses_of, rows, micro_batch_size):
    for part in rows.split(micro_batch_size):
        (losses_of(policy, part).sum() / len(rows)).backward()


@wrong("micro_batched_gradient", "zero_grad in the loop")
def cleared_each_time(policy, losses_of, rows, micro_batch_size):
    for part in rows.split(micro_batch_size):
        policy.zero_grad()
        (losses_of(policy, part).sum() / len(rows)).backward()


@wrong("micro_batched_gradient", "the last")
def last_part_dropped(policy, losses_of, rows, micro_batch_size):
    policy.zero_grad()
    for start in range(0, len(rows) - micro_batch_size + 1, micro_batch_size):
        (losses_of(policy, rows[start : start + micro_batch_size]).sum() / len(rows)).backward()


@wrong("micro_batched_gradient", "all rows at once")
def one_large_batch(policy, losses_of, rows, micro_batch_size):
    policy.zero_grad()
    losses_of(policy, rows).mean().backward()


@wrong("micro_batched_gradient", "backward comes after the loop")
def backward_at_the_end(policy, losses_of, rows, micro_batch_size):
    policy.zero_grad()
    total = sum(losses_of(policy, part).sum() for part in rows.split(micro_batch_size))
    (total / len(rows)).backward()


@wrong("micro_batched_gradient", "nothing is left in .grad")
def cleared_afterwards(policy, losses_of, rows, micro_batch_size):
    policy.zero_grad()
    for part in rows.split(micro_batch_size):
        (losses_of(policy, part).sum() / len(rows)).backward()
    policy.zero_grad()


@second("clip_gradients")
def new_gradients(parameters, max_norm):
    norm = math.sqrt(sum(each.grad.square().sum().item() for each in parameters if each.grad is not None))
    for each in parameters:
        if each.grad is not None and norm > max_norm:
            each.grad = each.grad * (max_norm / norm)
    return norm


@wrong("clip_gradients", "each parameter is clipped by itself")
def each_by_itself(parameters, max_norm):
    norms = [nn.utils.clip_grad_norm_([each], max_norm) for each in parameters if each.grad is not None]
    return torch.stack(norms).norm()


@wrong("clip_gradients", "each number is clipped by itself")
def clamped(parameters, max_norm):
    norm = nn.utils.clip_grad_norm_(parameters, float("inf"))
    nn.utils.clip_grad_value_(parameters, max_norm)
    return norm


@wrong("clip_gradients", "a short gradient is made longer")
def normalised(parameters, max_norm):
    norm = nn.utils.clip_grad_norm_(parameters, float("inf"))
    for each in parameters:
        if each.grad is not None:
            each.grad *= max_norm / norm
    return norm


@wrong("clip_gradients", "the norm after clipping is returned")
def norm_afterwards(parameters, max_norm):
    nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.clip_grad_norm_(parameters, float("inf"))


@wrong("clip_gradients", "the square root of the sum of squares is missing")
def no_root(parameters, max_norm):
    norm = sum(each.grad.square().sum() for each in parameters if each.grad is not None)
    for each in parameters:
        if each.grad is not None:
            each.grad.mul_(min(1.0, max_norm / norm))
    return norm


@wrong("clip_gradients", "the gradients are as long as before")
def not_in_place(parameters, max_norm):
    gradients = [each.grad for each in parameters if each.grad is not None]
    norm = torch.cat(gradients).norm()
    gradients = [each * min(1.0, max_norm / norm) for each in gradients]
    return norm


@wrong("clip_gradients", "it raised TypeError")
def forgets_missing_gradients(parameters, max_norm):
    norm = torch.cat([each.grad for each in parameters]).norm()
    for each in parameters:
        each.grad.mul_(min(1.0, max_norm / norm))
    return norm


@second("dpo_step")
def in_another_order(policy, reference_logps, chosen, rejected, beta, optimizer):
    log_ratios = policy() - reference_logps
    loss = F.softplus(-beta * (log_ratios[chosen] - log_ratios[rejected])).sum() / len(chosen)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _step_loss(policy, reference_logps, chosen, rejected, beta):
    logps = policy()
    return -F.logsigmoid(beta * (logps[chosen] - reference_logps[chosen] - logps[rejected] + reference_logps[rejected])).mean()


@wrong("dpo_step", "old gradients are not cleared")
def never_clears(policy, reference_logps, chosen, rejected, beta, optimizer):
    loss = _step_loss(policy, reference_logps, chosen, rejected, beta)
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("dpo_step", "nothing moves")
def clears_too_late(policy, reference_logps, chosen, rejected, beta, optimizer):
    loss = _step_loss(policy, reference_logps, chosen, rejected, beta)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


@wrong("dpo_step", "step")
def steps_before_backward(policy, reference_logps, chosen, rejected, beta, optimizer):
    optimizer.step()
    optimizer.zero_grad()
    loss = _step_loss(policy, reference_logps, chosen, rejected, beta)
    loss.backward()
    return loss.item()


@wrong("dpo_step", "the loss is reported after the step")
def loss_afterwards(policy, reference_logps, chosen, rejected, beta, optimizer):
    optimizer.zero_grad()
    _step_loss(policy, reference_logps, chosen, rejected, beta).backward()
    optimizer.step()
    return _step_loss(policy, reference_logps, chosen, rejected, beta).item()


@wrong("dpo_step", "the reference is taken from the policy as it is now")
def reference_of_today(policy, reference_logps, chosen, rejected, beta, optimizer):
    optimizer.zero_grad()
    loss = _step_loss(policy, policy().detach(), chosen, rejected, beta)
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("dpo_step", "the sum over the pairs")
def sum_over_pairs(policy, reference_logps, chosen, rejected, beta, optimizer):
    optimizer.zero_grad()
    loss = len(chosen) * _step_loss(policy, reference_logps, chosen, rejected, beta)
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("dpo_step", "two steps on one gradient")
def two_steps_in_one(policy, reference_logps, chosen, rejected, beta, optimizer):
    optimizer.zero_grad()
    loss = _step_loss(policy, reference_logps, chosen, rejected, beta)
    loss.backward()
    optimizer.step()
    optimizer.step()
    return loss.item()


@wrong("dpo_step", "the loss has no reference in it")
def no_reference_in_the_step(policy, reference_logps, chosen, rejected, beta, optimizer):
    optimizer.zero_grad()
    loss = _step_loss(policy, 0 * reference_logps, chosen, rejected, beta)
    loss.backward()
    optimizer.step()
    return loss.item()


# ex_07 --------------------------------------------------------------------------------------------------------------------


@second("odpo_loss")
def odpo_by_logaddexp(pc, pr, rc, rr, offset, beta):
    margin = beta * (pc - rc) - beta * (pr - rr)
    return torch.logaddexp(torch.zeros_like(margin), offset - margin)


@wrong("odpo_loss", "the sign of the offset")
def offset_added(pc, pr, rc, rr, offset, beta):
    return -F.logsigmoid(beta * ((pc - rc) - (pr - rr)) + offset)


@wrong("odpo_loss", "beta multiplies the offset")
def offset_times_beta(pc, pr, rc, rr, offset, beta):
    return -F.logsigmoid(beta * ((pc - rc) - (pr - rr) - offset))


@wrong("odpo_loss", "the offset is added to the loss")
def offset_outside(pc, pr, rc, rr, offset, beta):
    return -F.logsigmoid(beta * ((pc - rc) - (pr - rr))) + offset


@wrong("odpo_loss", "that is the softmax margin")
def softmax_margin(pc, pr, rc, rr, offset, beta):
    return -F.logsigmoid(beta * ((pc - rc) - (pr - rr)) - offset.clamp(min=0))


@wrong("odpo_loss", "pairs whose margin exceeds the offset cost nothing here")
def hinge(pc, pr, rc, rr, offset, beta):
    return F.relu(offset - beta * ((pc - rc) - (pr - rr)))


@wrong("odpo_loss", "log")
def naive_odpo(pc, pr, rc, rr, offset, beta):
    return torch.log(1 + torch.exp(offset - beta * ((pc - rc) - (pr - rr))))


@wrong("odpo_loss", "none of the usual mistakes")
def logarithm_of_the_offset(pc, pr, rc, rr, offset, beta):
    return -F.logsigmoid(beta * ((pc - rc) - (pr - rr)) - torch.where(offset > 0, offset, 1.0).log())


@second("score_offset")
def by_masked_assignment(chosen_scores, rejected_scores, alpha, scale):
    if scale == "identity":
        return alpha * chosen_scores - alpha * rejected_scores
    if scale == "log_ratio":
        return alpha * (chosen_scores / rejected_scores).log()
    offset, gap = torch.zeros_like(chosen_scores), chosen_scores - rejected_scores
    offset[gap > 0] = alpha * gap[gap > 0].log()
    return offset


@wrong("score_offset", "a clamp")
def clamp_tiny(chosen_scores, rejected_scores, alpha, scale):
    if scale == "log":
        return alpha * (chosen_scores - rejected_scores).clamp(min=1e-6).log()
    return by_masked_assignment(chosen_scores, rejected_scores, alpha, scale)


@wrong("score_offset", "nan_to_num makes -3e38 of log 0")
def nan_to_zero(chosen_scores, rejected_scores, alpha, scale):
    if scale == "log":
        return alpha * (chosen_scores - rejected_scores).log().nan_to_num(0.0)
    return by_masked_assignment(chosen_scores, rejected_scores, alpha, scale)


@wrong("score_offset", "abs")
def log_of_abs(chosen_scores, rejected_scores, alpha, scale):
    if scale == "log":
        return alpha * ((chosen_scores - rejected_scores).abs() + (chosen_scores == rejected_scores)).log()
    return by_masked_assignment(chosen_scores, rejected_scores, alpha, scale)


@wrong("score_offset", "log")
def log1p(chosen_scores, rejected_scores, alpha, scale):
    if scale == "log":
        return alpha * (chosen_scores - rejected_scores).clamp(min=0).log1p()
    return by_masked_assignment(chosen_scores, rejected_scores, alpha, scale)


@wrong("score_offset", "signed scales keep them")
def never_negative(chosen_scores, rejected_scores, alpha, scale):
    return by_masked_assignment(chosen_scores, rejected_scores, alpha, scale).clamp(min=0)


@wrong("score_offset", "alpha stands inside the logarithm")
def alpha_inside(chosen_scores, rejected_scores, alpha, scale):
    if scale == "log":
        return by_masked_assignment(alpha * chosen_scores, alpha * rejected_scores, 1.0, scale)
    return by_masked_assignment(chosen_scores, rejected_scores, alpha, scale)


@wrong("score_offset", "only the log scale needs a rule")
def flipped_pairs_lose_every_scale(chosen_scores, rejected_scores, alpha, scale):
    offset = by_masked_assignment(chosen_scores, rejected_scores, alpha, scale)
    return torch.where(chosen_scores > rejected_scores, offset, 0.0)


@wrong("score_offset", "none of the usual mistakes")
def ratio_for_log(chosen_scores, rejected_scores, alpha, scale):
    return by_masked_assignment(chosen_scores, rejected_scores, alpha, "log_ratio" if scale == "log" else scale)


@second("tilted_reference")
def with_a_partition_function(reference_logps, scores, beta, alpha):
    unnormalised = reference_logps + scores * (alpha / beta)
    return unnormalised - torch.logsumexp(unnormalised, 0)


@wrong("tilted_reference", "not normalised")
def not_normalised(reference_logps, scores, beta, alpha):
    return reference_logps + alpha * scores / beta


@wrong("tilted_reference", "the tilt is alpha / beta")
def tilt_by_beta(reference_logps, scores, beta, alpha):
    return (reference_logps + alpha * beta * scores).log_softmax(-1)


@wrong("tilted_reference", "1 + alpha is where ODPO ends with endless data")
def the_optimum(reference_logps, scores, beta, alpha):
    return (reference_logps + (1 + alpha) * scores / beta).log_softmax(-1)


@wrong("tilted_reference", "none of the usual mistakes")
def alpha_below(reference_logps, scores, beta, alpha):
    return (reference_logps + scores / (alpha * beta)).log_softmax(-1) if alpha else reference_logps


@wrong("tilted_reference", "the sign")
def against_the_scores(reference_logps, scores, beta, alpha):
    return (reference_logps - alpha * scores / beta).log_softmax(-1)


@wrong("tilted_reference", "exp overflows")
def through_probabilities(reference_logps, scores, beta, alpha):
    weights = reference_logps.exp() * torch.exp(alpha * scores / beta)
    return (weights / weights.sum()).log()


@wrong("tilted_reference", "the logarithm is missing")
def probabilities_returned(reference_logps, scores, beta, alpha):
    return (reference_logps + alpha * scores / beta).softmax(-1)


# ex_08 --------------------------------------------------------------------------------------------------------------------


@second("kl_estimators")
def with_the_ratio(policy_logps, reference_logps):
    ratio = torch.exp(reference_logps) / torch.exp(policy_logps)
    return -ratio.log(), 0.5 * ratio.log() ** 2, (ratio - 1) - ratio.log()


@wrong("kl_estimators", "k3 has r = policy / reference")
def ratio_turned_round(policy_logps, reference_logps):
    log_ratio = policy_logps - reference_logps
    return log_ratio, log_ratio**2 / 2, log_ratio.exp() - 1 - log_ratio


@wrong("kl_estimators", "the ratio is turned round")
def other_direction(policy_logps, reference_logps):
    log_ratio = policy_logps - reference_logps
    return -log_ratio, log_ratio**2 / 2, log_ratio.exp() - 1 - log_ratio


@wrong("kl_estimators", "k1 has an abs")
def k1_never_negative(policy_logps, reference_logps):
    log_ratio = reference_logps - policy_logps
    return log_ratio.abs(), log_ratio**2 / 2, log_ratio.exp() - 1 - log_ratio


@wrong("kl_estimators", "none of the usual mistakes")
def k1_clamped(policy_logps, reference_logps):
    log_ratio = reference_logps - policy_logps
    return (-log_ratio).clamp(min=0), log_ratio**2 / 2, log_ratio.exp() - 1 - log_ratio


@wrong("kl_estimators", "k2 has no factor 1/2")
def k2_without_half(policy_logps, reference_logps):
    log_ratio = reference_logps - policy_logps
    return -log_ratio, log_ratio**2, log_ratio.exp() - 1 - log_ratio


@wrong("kl_estimators", "averaged")
def means(policy_logps, reference_logps):
    log_ratio = reference_logps - policy_logps
    return -log_ratio.mean(), (log_ratio**2 / 2).mean(), (log_ratio.exp() - 1 - log_ratio).mean()


@second("token_kl")
def by_kl_div(policy_logits, reference_logits, scored):
    p, q = F.log_softmax(policy_logits, -1), F.log_softmax(reference_logits, -1)
    return torch.where(scored, F.kl_div(q, p, reduction="none", log_target=True).sum(-1), 0.0).sum(1)


@wrong("token_kl", "the direction")
def kl_div_in_reading_order(policy_logits, reference_logits, scored):
    p, q = F.log_softmax(policy_logits, -1), F.log_softmax(reference_logits, -1)
    return (F.kl_div(p, q, reduction="none", log_target=True).sum(-1) * scored).sum(1)


@wrong("token_kl", "a mean over positions")
def mean_per_token(policy_logits, reference_logits, scored):
    return by_kl_div(policy_logits, reference_logits, scored) / scored.sum(1)


@wrong("token_kl", "prompt and padding count")
def unmasked(policy_logits, reference_logits, scored):
    return by_kl_div(policy_logits, reference_logits, torch.ones_like(scored))


@wrong("token_kl", "logits are no log-probabilities")
def without_log_softmax(policy_logits, reference_logits, scored):
    each = (policy_logits.softmax(-1) * (policy_logits - reference_logits)).sum(-1)
    return each.masked_fill(~scored, 0.0).sum(1)


@wrong("token_kl", "log of softmax")
def log_of_softmax(policy_logits, reference_logits, scored):
    p, q = policy_logits.softmax(-1), reference_logits.softmax(-1)
    return (p * (p / q).log()).sum(-1).masked_fill(~scored, 0.0).sum(1)


@wrong("token_kl", "none of the usual mistakes")
def epsilon_inside(policy_logits, reference_logits, scored):
    p, q = policy_logits.softmax(-1), reference_logits.softmax(-1)
    return (p * ((p + 1e-8) / (q + 1e-8)).log()).sum(-1).masked_fill(~scored, 0.0).sum(1)


@wrong("token_kl", "that is the cross-entropy")
def cross_entropy(policy_logits, reference_logits, scored):
    each = -(policy_logits.softmax(-1) * reference_logits.log_softmax(-1)).sum(-1)
    return each.masked_fill(~scored, 0.0).sum(1)


@second("win_values")
def by_cosine_similarity(texts, chosen, rejected):
    difference = F.cosine_similarity(texts, chosen) - F.cosine_similarity(texts, rejected)
    return torch.tensor([0.5 if abs(each) < 1e-6 else float(each > 0) for each in difference.tolist()])


@wrong("win_values", "a dot product")
def dot_products(texts, chosen, rejected):
    difference = (texts * chosen).sum(1) - (texts * rejected).sum(1)
    return torch.where(difference.abs() < 1e-6, 0.5, (difference > 0).float())


@wrong("win_values", "a tie counts as a loss")
def ties_lose(texts, chosen, rejected):
    return (by_cosine_similarity(texts, chosen, rejected) > 0.5).float()


@wrong("win_values", "a tie counts as a win")
def ties_win(texts, chosen, rejected):
    return (by_cosine_similarity(texts, chosen, rejected) >= 0.5).float()


@wrong("win_values", "cosines must be equal to the last bit here")
def ties_to_the_bit(texts, chosen, rejected):
    difference = F.cosine_similarity(texts, chosen) - F.cosine_similarity(texts, rejected)
    return (difference.sign() + 1) / 2


@wrong("win_values", "a tie is within 1e-6")
def coarse_ties(texts, chosen, rejected):
    difference = F.cosine_similarity(texts, chosen) - F.cosine_similarity(texts, rejected)
    return torch.where(difference.abs() < 1e-2, 0.5, (difference > 0).float())


@wrong("win_values", "the nearer one by distance")
def distances(texts, chosen, rejected):
    difference = (texts - rejected).norm(dim=1) - (texts - chosen).norm(dim=1)
    return torch.where(difference.abs() < 1e-6, 0.5, (difference > 0).float())


@wrong("win_values", "none of the usual mistakes")
def every_text_with_every_other(texts, chosen, rejected):
    texts, chosen, rejected = (F.normalize(each, dim=0) for each in (texts, chosen, rejected))
    difference = (texts * chosen).sum(1) - (texts * rejected).sum(1)
    return torch.where(difference.abs() < 1e-6, 0.5, (difference > 0).float())


@second("paired_interval")
def by_counting(wins_a, wins_b, resamples):
    difference = (wins_a - wins_b).double().numpy()
    means = np.array([difference[rows].mean() for rows in resamples.numpy()])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@wrong("paired_interval", "two intervals subtracted")
def two_intervals(wins_a, wins_b, resamples):
    def ends(wins):
        return np.percentile(wins.mean(1)[resamples].mean(1).numpy(), [2.5, 97.5])

    (low_a, high_a), (low_b, high_b) = ends(wins_a), ends(wins_b)
    return float(low_a - high_b), float(high_a - low_b)


@wrong("paired_interval", "the lower ends are subtracted")
def ends_subtracted(wins_a, wins_b, resamples):
    low_a, high_a = np.percentile(wins_a.mean(1)[resamples].mean(1).numpy(), [2.5, 97.5])
    low_b, high_b = np.percentile(wins_b.mean(1)[resamples].mean(1).numpy(), [2.5, 97.5])
    return float(low_a - low_b), float(high_a - high_b)


@wrong("paired_interval", "none of the usual mistakes")
def first_sample_only(wins_a, wins_b, resamples):
    return by_counting(wins_a[:, :1], wins_b[:, :1], resamples)


@wrong("paired_interval", "samples of one prompt are not independent")
def samples_as_prompts(wins_a, wins_b, resamples):
    return by_counting((wins_a - wins_b).view(-1, 1), torch.zeros(wins_a.numel(), 1), resamples)


@wrong("paired_interval", "the spread of the draws without the factor 1.96")
def normal_without_196(wins_a, wins_b, resamples):
    means = (wins_a.mean(1) - wins_b.mean(1))[resamples].mean(1)
    return (means.mean() - means.std()).item(), (means.mean() + means.std()).item()


@wrong("paired_interval", "90 %")
def ninety_percent(wins_a, wins_b, resamples):
    means = (wins_a.mean(1) - wins_b.mean(1))[resamples].mean(1)
    return means.quantile(0.05).item(), means.quantile(0.95).item()


@wrong("paired_interval", "the quantiles of the differences themselves")
def spread_of_prompts(wins_a, wins_b, resamples):
    difference = wins_a.mean(1) - wins_b.mean(1)
    return difference.quantile(0.025).item(), difference.quantile(0.975).item()


@wrong("paired_interval", "unpaired")
def shuffled_partner(wins_a, wins_b, resamples):
    means = wins_a.mean(1)[resamples].mean(1) - wins_b.mean(1)[resamples.flip(0)].mean(1)
    return means.quantile(0.025).item(), means.quantile(0.975).item()


@second("prompts_needed")
def by_counting_up(differences, half_width):
    needed = 1
    while 1.96 * np.std(differences.numpy(), ddof=1) / math.sqrt(needed) > half_width:
        needed += 1
    return needed


@wrong("prompts_needed", "the square is missing")
def not_squared(differences, half_width):
    return math.ceil(1.96 * differences.std().item() / half_width)


@wrong("prompts_needed", "without 1.96 the interval covers 68 %")
def one_sigma(differences, half_width):
    return math.ceil((differences.std().item() / half_width) ** 2)


@wrong("prompts_needed", "none of the usual mistakes")
def rounded_to_nearest(differences, half_width):
    return round((1.96 * differences.std().item() / half_width) ** 2)


@wrong("prompts_needed", "half_width is taken for the whole width")
def whole_width(differences, half_width):
    return math.ceil((1.96 * differences.std().item() / (half_width / 2)) ** 2)


@wrong("prompts_needed", "the pilot is a sample")
def population_deviation(differences, half_width):
    return math.ceil((1.96 * differences.std(correction=0).item() / half_width) ** 2)


@wrong("prompts_needed", "the spread is measured around 0")
def root_mean_square(differences, half_width):
    return math.ceil((1.96 * differences.square().mean().sqrt().item() / half_width) ** 2)


@wrong("prompts_needed", "the pilot's standard error is used")
def standard_error_for_deviation(differences, half_width):
    return math.ceil((1.96 * differences.std().item() / len(differences) ** 0.5 / half_width) ** 2)


# ex_09 --------------------------------------------------------------------------------------------------------------------


@second("reward_head")
def by_newton(features, weight_decay):
    gap = (features[:, 0] - features[:, 1]).double()
    weights = torch.zeros(gap.shape[1], dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(gap @ weights)
        slope = -((1 - p)[:, None] * gap).mean(0) + 2 * weight_decay * weights
        curvature = (gap.T * (p * (1 - p))) @ gap / len(gap) + 2 * weight_decay * torch.eye(len(weights)).double()
        weights = weights - torch.linalg.solve(curvature, slope)
    return weights.to(features.dtype)


def _fit(loss_of, features, steps=200):
    weights = torch.zeros(features.shape[2], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(features[:, 0] @ weights, features[:, 1] @ weights, weights.square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


@wrong("reward_head", "weight_decay is not used")
def no_decay(features, weight_decay):
    return _fit(lambda chosen, rejected, squares: -F.logsigmoid(chosen - rejected).mean(), features)


@wrong("reward_head", "the squares are halved")
def decay_halved(features, weight_decay):
    return _fit(lambda chosen, rejected, squares: F.softplus(rejected - chosen).mean() + weight_decay / 2 * squares, features)


@wrong("reward_head", "the sum of the losses")
def summed_losses(features, weight_decay):
    return _fit(lambda chosen, rejected, squares: F.softplus(rejected - chosen).sum() + weight_decay * squares, features)


@wrong("reward_head", "a regression on the labels")
def least_squares(features, weight_decay):
    return _fit(lambda c, r, squares: (c - r - 1).square().mean() + weight_decay * squares, features)


@wrong("reward_head", "each response is classified by itself")
def classifier(features, weight_decay):
    return _fit(lambda c, r, squares: (F.softplus(-c) + F.softplus(r)).mean() + weight_decay * squares, features)


@wrong("reward_head", "chosen and rejected are swapped")
def rejected_first(features, weight_decay):
    return _fit(lambda c, r, squares: F.softplus(c - r).mean() + weight_decay * squares, features)


@wrong("reward_head", "none of the usual mistakes")
def one_step(features, weight_decay):
    return _fit(lambda c, r, squares: F.softplus(r - c).mean() + weight_decay * squares, features, steps=1)


@second("calibration_error")
def by_loop(probabilities, num_bins):
    bins = {}
    for p in probabilities.tolist():
        confidence = max(p, 1 - p)
        index = min(int((2 * confidence - 1) * num_bins), num_bins - 1)
        bins.setdefault(index, []).append((confidence, p > 0.5))
    gaps = [abs(sum(right - confidence for confidence, right in rows)) for rows in bins.values()]
    return sum(gaps) / len(probabilities)


@wrong("calibration_error", "bins count alike")
def bins_alike(probabilities, num_bins):
    edges = 0.5 + 0.5 * torch.arange(num_bins + 1) / num_bins
    confidence, right = probabilities.maximum(1 - probabilities), (probabilities > 0.5).double()
    inside = [(confidence >= a) & (confidence <= b) for a, b in zip(edges, edges[1:], strict=False)]
    return np.mean([(right[i].mean() - confidence[i].mean()).abs().item() for i in inside if i.any()])


@wrong("calibration_error", "confidence 1 is in no bin")
def half_open_last_bin(probabilities, num_bins):
    edges = 0.5 + 0.5 * torch.arange(num_bins + 1) / num_bins
    confidence, right = probabilities.maximum(1 - probabilities), (probabilities > 0.5).double()
    inside = [(confidence >= a) & (confidence < b) for a, b in zip(edges, edges[1:], strict=False)]
    gaps = [i.sum() * (right[i].mean() - confidence[i].mean()).abs() for i in inside if i.any()]
    return float(sum(gaps)) / len(probabilities)


@wrong("calibration_error", "bins from 0 to 1")
def bins_from_zero(probabilities, num_bins):
    confidence, right = probabilities.maximum(1 - probabilities), (probabilities > 0.5).double()
    index = (confidence * num_bins).long().clamp(max=num_bins - 1)
    gaps = [(index == i).sum() * abs(right[index == i].mean() - confidence[index == i].mean()) for i in index.unique()]
    return float(sum(gaps)) / len(probabilities)


@wrong("calibration_error", "one gap over all pairs")
def overall_gap(probabilities, num_bins):
    return abs((probabilities > 0.5).double().mean() - probabilities.maximum(1 - probabilities).mean()).item()


@wrong("calibration_error", "each pair by itself")
def gaps_of_single_pairs(probabilities, num_bins):
    return ((probabilities > 0.5).double() - probabilities.maximum(1 - probabilities)).abs().mean().item()


@wrong("calibration_error", "the largest gap")
def largest_gap(probabilities, num_bins):
    index = ((2 * probabilities.maximum(1 - probabilities) - 1) * num_bins).long().clamp(max=num_bins - 1)
    return max(by_loop(probabilities[index == i], num_bins) for i in index.unique())


@second("symptoms")
def with_numpy(train):
    run, loose = ({key: values.numpy() for key, values in train(beta=beta).items()} for beta in (1, 0.1))
    least = np.sort(run["loss"])[0]
    return tuple(
        float(each)
        for each in (
            run["loss"][0],
            run["loss"][0] - least,
            run["loss"][60] - least,
            np.diff(run["score"]).sum(),
            np.exp(np.log(run["kl"][60]) - np.log(loose["kl"][60])),
        )
    )


def _five(run, loose, first=0, last=-1):
    loss, score = run["loss"].tolist(), run["score"].tolist()
    ratio = (run["kl"][-1] / loose["kl"][-1]).item()
    return [loss[first], loss[0] - min(loss), loss[last] - min(loss), score[last] - score[0], ratio]


@wrong("symptoms", "the two runs are mixed up")
def betas_swapped(train):
    return tuple(_five(train(beta=0.1), train(beta=1.0)))


@wrong("symptoms", "the KL ratio is turned round")
def only_the_ratio_swapped(train):
    five = _five(train(beta=1.0), train(beta=0.1))
    return (*five[:4], 1 / five[4])


@wrong("symptoms", "the fall is measured to the last loss")
def fall_to_the_end(train):
    five = _five(train(beta=1.0), train(beta=0.1))
    return (five[0], five[1] - five[2], *five[2:])


@wrong("symptoms", "the first loss is that before the first step")
def after_the_first_step(train):
    return tuple(_five(train(beta=1.0), train(beta=0.1), first=1))


@wrong("symptoms", "the rebound is measured from the largest loss")
def largest_minus_least(train):
    run = train(beta=1.0)
    five = _five(run, train(beta=0.1))
    return (five[0], five[1], (run["loss"].max() - run["loss"].min()).item(), *five[3:])


@wrong("symptoms", "none of the usual mistakes")
def mean_kl(train):
    run, loose = train(beta=1.0), train(beta=0.1)
    return (*_five(run, loose)[:4], (run["kl"].mean() / loose["kl"].mean()).item())


@second("planted_bug")
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


@wrong("planted_bug", "none of the usual mistakes")
def a_guess(train):
    return "moving reference"


@wrong("planted_bug", "is no answer to all")
def all_is_well(train):
    return "none"


@wrong("planted_bug", "only the trainer's own loss is read")
def by_loss_alone(train):
    loss = train(beta=1.0)["loss"]
    if abs(loss[0] - math.log(2)) > 1e-3:
        return "other reference"
    if loss[0] - loss.min() < 1e-3:
        return "moving reference"
    return "gradients kept" if loss[-1] > loss.min() + 0.05 else "none"


@wrong("planted_bug", "a loss that rises again was not noticed")
def ratio_first(train):
    run = train(beta=1.0)
    if run["kl"][-1] > 1.1 * train(beta=0.1)["kl"][-1]:
        return "inverted beta"
    return by_direct_questions(train)


@wrong("planted_bug", "only one beta was tried")
def one_beta(train):
    found = by_direct_questions(train)
    return "none" if found == "inverted beta" else found
