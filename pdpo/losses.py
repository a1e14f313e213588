r"""The losses, one formula each. Tensors in, (B,) unreduced losses out; the caller writes `.mean()`.

beta: KL strength; a larger beta keeps the policy closer to the reference.

Where a loss takes the four log-probabilities of pairs, each is (B,) nats, the sum over a response; the policy's carry the
gradient, the reference's are constants. Shapes that differ and a beta that is not finite and > 0 are a ValueError."""

from typing import NamedTuple

import torch
from torch import Tensor

from pdpo.preferences import bradley_terry_logps, plackett_luce_logps


class PairLoss(NamedTuple):
    """What a pairwise loss returns, (B,) each; the rewards are implicit, beta * (policy_logps - reference_logps), detached; of DRDO,
    which has no reference, they are the scores that the policy's own head gives."""

    losses: Tensor  # nats, unreduced; carries the gradient
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """(B,) measured margin chosen_rewards - rejected_rewards; the pair is ranked correctly where it is > 0."""
        return self.chosen_rewards - self.rejected_rewards


def sft_loss(policy_logps: Tensor) -> Tensor:
    r"""Negative log-likelihood of each demonstrated response.

    .. math:: \mathcal{L}_\text{SFT} = -\log \pi_\theta(y \mid x)
    Args: policy_logps: (B,) nats, the sum over response tokens (`sequence_logps`); carries the gradient.
    Returns: (B,) nats a response. Divide a batch's sum by its number of response tokens for the usual mean per token."""
    return -policy_logps


def dpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
    *, beta: float, offset: float | Tensor = 0.0, label_smoothing: float = 0.0,
) -> PairLoss:  # fmt: skip
    r"""DPO, and with an offset ODPO: the pair should be ranked right, by more than the offset.

    .. math:: \mathcal{L} = -(1 - \epsilon) \log \sigma(m - \Delta) - \epsilon \log \sigma(\Delta - m), \qquad
              m = \beta \Big( \log \tfrac{\pi_\theta(y_w|x)}{\pi_\text{ref}(y_w|x)}
                            - \log \tfrac{\pi_\theta(y_l|x)}{\pi_\text{ref}(y_l|x)} \Big)
    Args: beta: KL strength; a larger beta keeps the policy closer to the reference.
          offset: scalar or (B,); the margin demanded, Delta, in units of the implicit reward. 0 is DPO. See `score_offset`.
          label_smoothing: assumed probability that a label is flipped, in [0, 0.5); 0 in the paper.
    Returns: PairLoss. With policy == reference and no offset every loss is log 2. On means, without a reference: `simpo_loss`.
    Source: Rafailov 2023, arXiv:2305.18290, Eq. 7; offset: Amini 2024, arXiv:2402.10571, Eq. 7c;
        label_smoothing: Mitchell 2023, "A note on DPO with noisy preferences"."""
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen_rewards, rejected_rewards = _rewards("dpo_loss", *logps, beta=beta)  # (B,), (B,)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo_loss: expected label_smoothing in [0, 0.5), got {label_smoothing}. At 0.5 labels say nothing.")
    losses = -(1 - label_smoothing) * bradley_terry_logps(chosen_rewards, rejected_rewards, offset=offset)
    if label_smoothing:
        losses = losses - label_smoothing * bradley_terry_logps(rejected_rewards, chosen_rewards, offset=-offset)
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def score_offset(chosen_scores: Tensor, rejected_scores: Tensor, *, alpha: float = 1.0, scale: str = "log") -> Tensor:
    r"""The margin that ODPO demands of a pair, from how much better the chosen response scored.

    .. math:: \Delta = \alpha \, f(s_w, s_l), \quad f = \log(s_w - s_l) \;|\; s_w - s_l \;|\; \log s_w - \log s_l

    Where the logarithm of the difference does not exist, a tie or a pair labelled against its scores, scale "log" gives
    offset 0, plain DPO. (A clamp such as log(1e-6) = -13.8 would silence exactly the mislabelled pairs, a leak of the clean
    scores into the training.) The other scales are signed and defined there. A difference below 1 has a negative log offset:
    less than a correct order is demanded.
    Args: chosen_scores, rejected_scores: (B,) float; external scores, higher is better. "log_ratio" needs them > 0.
          alpha: strength >= 0; 0 is DPO. scale: "log" (the paper's choice), "identity" or "log_ratio".
    Returns: (B,) in units of the implicit reward; finite; no gradient.
    Source: Amini 2024, arXiv:2402.10571, Eq. 15; the log: Section 6.1; the others: Section 7.1. Differs: Eq. 15's f sees only the
        difference, "log_ratio" each score by itself; the rule for ties and flipped pairs is ours."""
    if chosen_scores.shape != rejected_scores.shape:
        got = f"{tuple(chosen_scores.shape)} and {tuple(rejected_scores.shape)}"
        raise ValueError(f"score_offset: expected two score tensors of one shape, got {got}. Pass one of each per pair.")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"score_offset: expected finite alpha >= 0, got {alpha}. 0 is DPO; a negative one rewards errors.")
    chosen, rejected = chosen_scores.detach(), rejected_scores.detach()
    difference = chosen - rejected  # (B,)
    if bad := (~difference.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"score_offset: rows {bad} have scores that are not finite, or too large. Drop or mend these pairs.")
    if scale == "identity":
        return alpha * difference
    if scale == "log":
        return alpha * torch.where(difference > 0, difference, 1.0).log()
    if scale == "log_ratio":
        if negative := ((chosen <= 0) | (rejected <= 0)).nonzero().flatten().tolist():
            raise ValueError(f"score_offset: 'log_ratio' expected scores > 0, got rows {negative} with less. Shift the scores.")
        return alpha * (chosen.log() - rejected.log())
    raise ValueError(f"score_offset: expected scale 'log', 'identity' or 'log_ratio', got {scale!r}. Pass one of the three.")


def plackett_luce_loss(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    r"""DPO for a whole ranking of K responses.

    .. math:: \mathcal{L} = -\sum_{k=1}^{K} \log \frac{\exp \hat r_k}{\sum_{j \ge k} \exp \hat r_j}, \qquad
              \hat r_k = \beta \log \frac{\pi_\theta(y_k|x)}{\pi_\text{ref}(y_k|x)}
    Args: policy_logps, reference_logps: (B, K) nats, best first; sums over each response; the policy's carry the gradient.
          beta: KL strength; a larger beta keeps the policy closer to the reference.
    Returns: (B,) nats. With policy == reference it is log K!; with K = 2 it is `dpo_loss`.
    Source: Rafailov 2023, arXiv:2305.18290, Eq. 20."""
    if policy_logps.ndim != 2 or policy_logps.shape != reference_logps.shape:
        got = f"{tuple(policy_logps.shape)} and {tuple(reference_logps.shape)}"
        raise ValueError(f"plackett_luce_loss: expected two (B, K) tensors, got {got}. Put K responses in a row, best first.")
    _check_beta("plackett_luce_loss", beta)
    return -plackett_luce_logps(beta * (policy_logps - reference_logps))


def reward_model_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    r"""Negative log-likelihood of the labels under Bradley-Terry, for training a reward model.

    .. math:: \mathcal{L}_R = -\log \sigma\big( r_\phi(x, y_w) - r_\phi(x, y_l) \big)
    Args: chosen_scores, rejected_scores: (B,) float; the reward model's outputs; carry the gradient.
    Returns: (B,) nats. Equal scores give log 2; a constant added to both scores of a pair changes nothing.
    Source: Rafailov 2023, arXiv:2305.18290, Eq. 2."""
    return -bradley_terry_logps(chosen_scores, rejected_scores)


def ipo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor, reference_rejected_logps: Tensor, *, beta: float,
) -> PairLoss:  # fmt: skip
    r"""IPO: the difference of log-ratios is regressed on 1 / (2 beta), so that a pair can be ranked too well.

    .. math:: \mathcal{L}_\text{IPO} = \Big( \log \tfrac{\pi_\theta(y_w|x)}{\pi_\text{ref}(y_w|x)}
              - \log \tfrac{\pi_\theta(y_l|x)}{\pi_\text{ref}(y_l|x)} - \frac{1}{2 \beta} \Big)^2

    Sums are what the formula says: one target for a pair, however long its responses. TRL averages over the tokens of each, which
    the paper's authors confirmed to be their practice. For that, pass mean log-probabilities: two responses of T tokens each are
    then to differ by T / (2 beta) nats.
    Args: beta: KL strength; a larger beta keeps the policy closer to the reference. The paper's tau.
    Returns: PairLoss; losses in squared nats, 1 / (4 beta^2) where policy == reference.
    Source: Azar 2023, arXiv:2310.12036, Eq. 17."""
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen_rewards, rejected_rewards = _rewards("ipo_loss", *logps, beta=beta)  # (B,), (B,)
    losses = ((chosen_rewards - rejected_rewards) / beta - 1 / (2 * beta)) ** 2
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def reward_distillation_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor, reference_rejected_logps: Tensor, score_difference: Tensor, *, beta: float,
) -> PairLoss:  # fmt: skip
    r"""e-DPO: the margin is regressed on the difference of two external scores, not on a label.

    .. math:: \mathcal{L} = \Big( r(x, y_w) - r(x, y_l) - \beta \log
              \frac{\pi_\theta(y_w|x) \, \pi_\text{ref}(y_l|x)}{\pi_\theta(y_l|x) \, \pi_\text{ref}(y_w|x)} \Big)^2
    Args: score_difference: (B,) chosen minus rejected score, of a reward model (or the mean of several); a constant.
          beta: KL strength; a larger beta keeps the policy closer to the reference. Scores ten times as large want ten times it.
    Returns: PairLoss; losses in squared units of the scores, 0 where the margin is the difference of scores.
    Source: Fisch 2024, arXiv:2405.19316; Nath 2024, arXiv:2410.08458, Eq. 4."""
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen_rewards, rejected_rewards = _rewards("reward_distillation_loss", *logps, score_difference, beta=beta)  # (B,), (B,)
    losses = (score_difference.detach() - (chosen_rewards - rejected_rewards)) ** 2
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def drdo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, student_chosen_scores: Tensor, student_rejected_scores: Tensor,
    oracle_chosen_scores: Tensor, oracle_rejected_scores: Tensor, *, alpha: float = 0.1, gamma: float = 2.0,
) -> PairLoss:  # fmt: skip
    r"""DRDO: the policy's own head learns the oracle's difference of scores, while the policy learns the label; no reference.

    .. math:: \mathcal{L} = \big( (r^*_w - r^*_l) - (\hat r_w - \hat r_l) \big)^2
              - \alpha (1 - p_w)^\gamma \log \frac{\pi_\theta(y_w|x)}{1 - \pi_\theta(y_l|x)}, \qquad
              p_w = \sigma\big( \log \pi_\theta(y_w|x) - \log \pi_\theta(y_l|x) \big)

    The gradient goes through the focal weight (1 - p_w)^gamma, too. That is what lowers pi(y_l): with the weight held constant, as
    in the paper's Eq. 34, descent raises it, and at pi(y_l) -> 1 the loss as printed has no lower bound. p_w compares sums, so that
    of two equally fluent responses the longer one looks worse.
    Args: policy_chosen_logps, policy_rejected_logps: (B,) nats, <= 0; sums over each response; carry the gradient.
          student_chosen_scores, student_rejected_scores: (B,) of the policy's own head; carry the gradient. oracle_...: constants.
          alpha: >= 0, how much the label counts beside the oracle; 0 is distillation alone.
          gamma: >= 0; a larger one leaves pairs that are ranked right more alone. At 0 all pairs count alike.
    Returns: PairLoss whose rewards are the student's scores.
    Source: Nath 2024, arXiv:2410.08458, Eq. 6. Differs: 1 - pi(y_l) is at least the dtype's eps, so that a certain y_l is finite."""
    scores = (student_chosen_scores, student_rejected_scores, oracle_chosen_scores, oracle_rejected_scores)
    _check_pairs("drdo_loss", policy_chosen_logps, policy_rejected_logps, *scores)
    if not (0 <= alpha < float("inf") and 0 <= gamma < float("inf")):
        raise ValueError(f"drdo_loss: expected finite alpha >= 0 and gamma >= 0, got {alpha} and {gamma}. The paper: 0.1, 2.")
    oracle_difference = (oracle_chosen_scores - oracle_rejected_scores).detach()  # (B,)
    distillation = (oracle_difference - (student_chosen_scores - student_rejected_scores)) ** 2
    focal_weight = (gamma * bradley_terry_logps(policy_rejected_logps, policy_chosen_logps)).exp()  # (1 - p_w)^gamma
    log_ratio = policy_chosen_logps - _log_one_minus_exp(policy_rejected_logps)  # (B,)
    losses = distillation - alpha * focal_weight * log_ratio
    return PairLoss(losses, student_chosen_scores.detach(), student_rejected_scores.detach())


def simpo_loss(
    policy_chosen_mean_logps: Tensor, policy_rejected_mean_logps: Tensor, *, scale: float, offset: float = 0.0
) -> PairLoss:
    r"""SimPO: DPO without a reference, on log-probabilities per token, with one offset for all pairs.

    .. math:: \mathcal{L} = -\log \sigma\Big( \frac{\beta}{|y_w|} \log \pi_\theta(y_w|x)
              - \frac{\beta}{|y_l|} \log \pi_\theta(y_l|x) - \gamma \Big)
    Args: policy_chosen_mean_logps, policy_rejected_mean_logps: (B,) nats a token; carry the gradient.
          scale: > 0; the paper's beta, which is no KL strength: nothing here keeps the policy close to anything.
          offset: the paper's gamma, in units of the rewards, scale * mean_logps; at 0 equal means give log 2.
    Returns: PairLoss; losses in nats.
    Source: Meng 2024, arXiv:2405.14734, Eq. 6."""
    zeros = torch.zeros_like(policy_chosen_mean_logps)
    return dpo_loss(policy_chosen_mean_logps, policy_rejected_mean_logps, zeros, zeros, beta=scale, offset=offset)


def orpo_loss(policy_chosen_mean_logps: Tensor, policy_rejected_mean_logps: Tensor, *, weight: float) -> PairLoss:
    r"""ORPO: imitation of the chosen response, and a little of the odds ratio; no reference.

    .. math:: \mathcal{L} = -\log P_w - \lambda \log \sigma\Big( \log \frac{P_w}{1 - P_w} - \log \frac{P_l}{1 - P_l} \Big), \qquad
              P = \pi_\theta(y|x)^{1/|y|}
    Args: policy_chosen_mean_logps, policy_rejected_mean_logps: (B,) nats a token, <= 0; carry the gradient.
          weight: lambda >= 0; 0 is SFT on the chosen responses.
    Returns: PairLoss; losses in nats; the rewards are weight * mean_logps.
    Source: Hong 2024, arXiv:2403.07691, Eq. 6 and 7. Differs: 1 - P is at least the dtype's eps."""
    _check_pairs("orpo_loss", policy_chosen_mean_logps, policy_rejected_mean_logps)
    if not 0 <= weight < float("inf"):
        raise ValueError(f"orpo_loss: expected finite weight >= 0, got {weight}. The paper uses 0.1.")
    pair = policy_chosen_mean_logps, policy_rejected_mean_logps
    chosen_odds, rejected_odds = (each - _log_one_minus_exp(each) for each in pair)  # their logarithms
    losses = -policy_chosen_mean_logps - weight * bradley_terry_logps(chosen_odds, rejected_odds)
    return PairLoss(losses, *(weight * each.detach() for each in pair))


def kto_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor, reference_rejected_logps: Tensor, kl: Tensor, *, beta: float,
) -> PairLoss:  # fmt: skip
    r"""KTO: each response by itself is to lie above, or below, what the policy has drifted from the reference on average.

    .. math:: \mathcal{L} = 1 - \sigma(\hat r_w - \beta z) + 1 - \sigma(\beta z - \hat r_l), \qquad
              \hat r = \beta \log \frac{\pi_\theta(y|x)}{\pi_\text{ref}(y|x)}
    Args: kl: () or (B,) nats, z; a constant: the KL from the reference, at least 0, estimated from mismatched prompts and responses.
          beta: KL strength; a larger beta keeps the policy closer to the reference.
    Returns: PairLoss; losses in [0, 2], 1 where policy == reference. The mean over responses, not pairs, is half of theirs.
    Source: Ethayarajh 2024, arXiv:2402.01306, L_KTO with both its weights 1."""
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen_rewards, rejected_rewards = _rewards("kto_loss", *logps, beta=beta)  # (B,), (B,)
    zero_point = beta * kl.detach()
    losses = (zero_point - chosen_rewards).sigmoid() + (rejected_rewards - zero_point).sigmoid()
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def slic_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor, reference_rejected_logps: Tensor, *, beta: float, regularization: float,
) -> PairLoss:  # fmt: skip
    r"""SLiC-HF: a hinge on the pair's own log-probabilities and a pull on a good response; the reference enters only the rewards.

    .. math:: \mathcal{L} = \max\Big( 0, \; \tfrac{1}{\beta} - \log \pi_\theta(y_w|x) + \log \pi_\theta(y_l|x) \Big)
              - \lambda \log \pi_\theta(y_w|x)
    Args: beta: KL strength; a larger beta keeps the policy closer to the reference. The paper's margin is delta = 1 / beta.
          regularization: lambda >= 0, how much the likelihood of the chosen response counts.
    Returns: PairLoss; losses in nats. Pairs ranked right by more than 1 / beta nats have no gradient but that of lambda's term.
    Source: Zhao 2023, arXiv:2305.10425, Eq. 1. Differs: delta is written 1 / beta, and y_ref is the chosen response."""
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen_rewards, rejected_rewards = _rewards("slic_loss", *logps, beta=beta)  # (B,), (B,)
    if not regularization >= 0:
        raise ValueError(f"slic_loss: expected regularization >= 0, got {regularization}. Below 0 it unlearns good responses.")
    losses = (1 / beta - policy_chosen_logps + policy_rejected_logps).clamp(min=0) - regularization * policy_chosen_logps
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def unlikelihood_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, *, weight: float) -> PairLoss:
    r"""Two of DPO's baselines: raise the chosen response, and lower the rejected one by a weight; at weight 0 it is preferred-FT.

    .. math:: \mathcal{L} = -\log \pi_\theta(y_w|x) + \alpha \log \pi_\theta(y_l|x)
    Args: policy_chosen_logps, policy_rejected_logps: (B,) nats; sums over each response; carry the gradient.
          weight: alpha, in [0, 1]; with any above 0 the loss has no lower bound: it is trained for so long and no longer.
    Returns: PairLoss whose rewards are the log-probabilities: there is no reference.
    Source: Rafailov 2023, arXiv:2305.18290, Section 6. Differs from Welleck 2019, arXiv:1908.04319, which it cites: there it is
        -log(1 - pi) of single tokens, which is bounded."""
    _check_pairs("unlikelihood_loss", policy_chosen_logps, policy_rejected_logps)
    if not 0 <= weight <= 1:
        raise ValueError(f"unlikelihood_loss: expected weight in [0, 1], got {weight}. 0 is SFT on the chosen responses.")
    losses = -policy_chosen_logps + weight * policy_rejected_logps
    return PairLoss(losses, policy_chosen_logps.detach(), policy_rejected_logps.detach())


def ppo_loss(policy_logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    r"""PPO's clipped surrogate, negated: no gain from moving a probability further than the clip in the good direction.

    .. math:: \mathcal{L} = -\min\big( \rho A, \; \text{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A \big), \qquad
              \rho = \frac{\pi_\theta(y|x)}{\pi_\text{old}(y|x)}
    Args: policy_logps, old_logps: (...) nats, of tokens or whole responses; the old ones, of the policy that drew them, are constants.
          advantages: (...) how much better than expected each sample was; constants. clip: epsilon, > 0; 0.2 in the paper.
    Returns: (...) unreduced. Where policy == old it is -advantages, and its gradient is REINFORCE's.
    Source: Schulman 2017, arXiv:1707.06347, Eq. 7. Differs: past 60 nats the ratio goes on along its tangent, which is finite."""
    if not policy_logps.shape == old_logps.shape == advantages.shape:
        got = ", ".join(str(tuple(each.shape)) for each in (policy_logps, old_logps, advantages))
        raise ValueError(f"ppo_loss: expected three tensors of one shape, got {got}. Pass one of each per sample.")
    if not clip > 0:
        raise ValueError(f"ppo_loss: expected clip > 0, got {clip}. At 0 nothing may move; the paper uses 0.2.")
    log_ratio, advantages = policy_logps - old_logps.detach(), advantages.detach()
    # exp(89) is inf in float32, and inf * 0 a gradient of nan: from 60 on the tangent
    ratio = log_ratio.clamp(max=60).exp() * (1 + (log_ratio - 60).clamp(min=0))
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def gae(rewards: Tensor, values: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    r"""Generalised advantage estimates for responses that end: the value after the last token is 0.

    .. math:: \hat A_t = \sum_{l \ge 0} (\gamma \lambda)^l \delta_{t+l}, \quad \delta_t = r_t + \gamma V_{t+1} - V_t
    Args: rewards, values: (B, T) reward of each token, and what was expected from before it on; zeros after the end; constants.
          gamma, lam: in [0, 1]. A discount of 1 is usual for text; lam 0 trusts the values (biased), 1 the samples (variance).
    Returns: (B, T); no gradient. With gamma = lam = 1 it is the reward still to come minus the value.
    Source: Schulman 2017, arXiv:1707.06347, Eq. 11 and 12. Differs: nothing is bootstrapped at the end."""
    if rewards.ndim != 2 or rewards.shape != values.shape:
        got = f"{tuple(rewards.shape)} and {tuple(values.shape)}"
        raise ValueError(f"gae: expected rewards and values of one shape (B, T), got {got}. Pass one of each per token.")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: expected gamma and lam in [0, 1], got {gamma} and {lam}. gamma=1, lam=0.95 is usual.")
    rewards, values = rewards.detach(), values.detach()
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # (B, T)
    deltas = rewards + gamma * next_values - values
    running, advantages = torch.zeros_like(deltas[:, 0]), torch.empty_like(deltas)
    for step in reversed(range(deltas.shape[1])):
        running = deltas[:, step] + gamma * lam * running
        advantages[:, step] = running
    return advantages


def _check_beta(function: str, beta: float) -> None:
    if not 0 < beta < float("inf"):
        sentence = "beta: KL strength; a larger beta keeps the policy closer to the reference."
        raise ValueError(f"{function}: expected finite beta > 0, got {beta}. {sentence}")


def _check_pairs(function: str, *tensors: Tensor) -> None:
    if tensors[0].ndim != 1 or any(each.shape != tensors[0].shape for each in tensors):
        count, got = ("two", "three", "four", "five", "six")[len(tensors) - 2], [tuple(each.shape) for each in tensors]
        raise ValueError(f"{function}: expected {count} (B,) tensors, got {got}. Sum the token log-probabilities first.")


def _rewards(function: str, *tensors: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(B,) and (B,): beta * (policy_logps - reference_logps) of chosen and rejected responses, after one check of all arguments."""
    _check_pairs(function, *tensors)
    _check_beta(function, beta)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = tensors[:4]
    return beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)


def _log_one_minus_exp(logps: Tensor) -> Tensor:
    """log(1 - exp(logps)) without cancellation on either side of log(1/2); the difference is taken to be at least eps."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return torch.where(logps > -0.6931, (-logps.expm1()).log(), (-logps.exp()).log1p())
