r"""Bradley-Terry, Plackett-Luce and Gumbel: probabilities of choosing and ranking.

Every function takes scores (any real numbers, higher is better) and works on the last dimension. All three names describe
one model: add independent standard Gumbel noise to each score and sort. The best of two is Bradley-Terry, the whole
ranking is Plackett-Luce, and the winner of K follows the softmax."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_logps(chosen_scores: Tensor, rejected_scores: Tensor, *, offset: float | Tensor = 0.0) -> Tensor:
    r"""Log-probability that the chosen response beats the rejected one by more than `offset`.

    .. math:: \log P(R_w - R_l > \Delta) = \log \sigma(r_w - r_l - \Delta), \quad R = r + \text{Gumbel}(0, 1)
    Args: chosen_scores, rejected_scores: (B,) float.
          offset: scalar or (B,); the margin demanded, in units of the scores. 0 is Bradley-Terry.
    Returns: (B,) nats, <= 0.
    Source: Bradley & Terry 1952; with an offset, Amini 2024, arXiv:2402.10571, Theorem 2."""
    if chosen_scores.shape != rejected_scores.shape:
        got = f"{tuple(chosen_scores.shape)} and {tuple(rejected_scores.shape)}"
        raise ValueError(f"bradley_terry_logps: expected two score tensors of one shape, got {got}. Pass one of each per pair.")
    if isinstance(offset, Tensor) and offset.shape not in ((), chosen_scores.shape):
        wanted, got = tuple(chosen_scores.shape), tuple(offset.shape)
        raise ValueError(f"bradley_terry_logps: expected offset a number or of shape {wanted}, got {got}. Pass one per pair.")
    return logsigmoid(chosen_scores - rejected_scores - offset)


def plackett_luce_logps(scores: Tensor) -> Tensor:
    r"""Log-probability of the ranking in which the responses are listed, best first.

    .. math:: \log P(1 \succ 2 \succ \dots \succ K) = \sum_{k=1}^{K} \Big( r_k - \log \sum_{j=k}^{K} \exp r_j \Big)

    The best is chosen by a softmax over all K, the second by a softmax over the K-1 that are left, and so on.
    Args: scores: (..., K) float; in ranked order, best first.
    Returns: (...) nats, <= 0. For K = 2 it is `bradley_terry_logps(scores[..., 0], scores[..., 1])`.
    Source: Plackett 1975; Rafailov 2023, arXiv:2305.18290, Eq. 18 (scores in place of rewards)."""
    if scores.ndim == 0 or scores.shape[-1] < 2:
        why = "A ranking needs at least two responses in the last dimension."
        raise ValueError(f"plackett_luce_logps: expected scores (..., K) with K >= 2, got {tuple(scores.shape)}. {why}")
    still_to_rank = scores.flip(-1).logcumsumexp(-1).flip(-1)  # (..., K): log sum over j >= k
    return (scores - still_to_rank).sum(-1)


def gumbel_sample(location: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""One Gumbel(location, 1) draw for each element.

    .. math:: G = \mu - \log E, \quad E \sim \text{Exponential}(1)
    Args: location: any shape, float; the mode. The mean is location + 0.5772 (Euler's constant), the variance pi^2 / 6.
          generator: source of randomness, on location's device; None is torch's global one.
    Returns: location's shape, dtype and device; detached from its graph.
    Source: Gumbel 1954, by inverting its distribution function exp(-exp(-(g - mu)))."""
    exponential = torch.empty_like(location, requires_grad=False).exponential_(generator=generator)
    return location.detach() - exponential.log()


def gumbel_ranking(scores: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """One ranking drawn from the Plackett-Luce model for each row of scores, by sorting Gumbel-perturbed scores.

    Returns: (..., K) int64 indices into the last dimension of scores (..., K), best first; generator as in `gumbel_sample`.
    Source: Yellott 1977; the top-1 case is Amini 2024, arXiv:2402.10571, Theorem 1."""
    if scores.ndim == 0:
        raise ValueError("gumbel_ranking: expected scores of shape (..., K), got a scalar. Put the responses in a dimension.")
    return gumbel_sample(scores, generator=generator).argsort(dim=-1, descending=True)
