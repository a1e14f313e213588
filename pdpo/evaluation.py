"""What is measured of a policy: KL from its own samples, SBERT wins, gold grades, and the scores of a reward model on it."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdpo import toy
from pdpo.device import autocast
from pdpo.encoding import Encoded, collate, in_batches
from pdpo.losses import reward_model_loss
from pdpo.progress import progress
from pdpo.sampling import Sample

TIE = 1e-6  # cosines closer than this count as equal: float32 embeddings repeat to about 1e-7


class KLEstimates(NamedTuple):
    """Estimates of the sequence KL(policy || reference) in nats, one a sample, (N,) float32 each; average them.

    exact: sum over response positions of the exact KL between the two next-token distributions there. Unbiased, and with
        the smallest variance of the three: only the path is sampled, not the token.
    k1: log policy - log reference of the sampled response. Unbiased; single values can be negative.
    k3: sum over positions of ratio - 1 - log ratio, ratio = reference / policy at the sampled token. Unbiased, never negative."""

    exact: Tensor
    k1: Tensor
    k3: Tensor
    num_tokens: Tensor  # of the response, EOS included


@torch.no_grad()
def sequence_kl(policy, reference, samples: list[Sample], *, batch_size: int = 64, precision: str = "float32") -> KLEstimates:
    """Three estimates of KL(policy || reference), models with one vocabulary, from the policy's own samples, in their order.

    Args: samples: drawn from `policy` at temperature 1; at another temperature this is not the KL of the policy.
    Source: k1 and k3: Schulman 2020, "Approximating KL divergence"; exact: the chain rule of relative entropy."""
    policy.eval(), reference.eval()
    device = next(policy.parameters()).device
    results = torch.zeros(4, len(samples))
    for rows in progress(in_batches([len(each.encoded.input_ids) for each in samples], batch_size), "KL"):
        batch = collate([samples[i].encoded for i in rows], device=device)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "use_cache": False}
        with autocast(device, precision):
            p, q = (model(**inputs).logits[:, :-1] for model in (policy, reference))
        scored = batch.response_mask[:, 1:]  # (B, T-1)
        p, q = p[scored].float().log_softmax(-1), q[scored].float().log_softmax(-1)  # (S, V): scored positions only
        tokens = batch.input_ids[:, 1:][scored][:, None]  # (S, 1)
        log_ratio = (q.gather(1, tokens) - p.gather(1, tokens)).squeeze(1)  # (S,)
        exact = (p.exp() * (p - q)).sum(-1)  # (S,)
        row = scored.nonzero()[:, 0].cpu()  # (S,): whose position it is
        values = torch.stack([exact, -log_ratio, log_ratio.expm1() - log_ratio, torch.ones_like(exact)]).cpu()
        results[:, rows] = torch.zeros(4, len(rows)).index_add_(1, row, values)
    return KLEstimates(*results[:3], results[3].long())


def win_values(judge, texts: list[str], chosen: list[str], rejected: list[str]) -> np.ndarray:
    """(N,) 1 where a text's SBERT embedding is closer (cosine) to the chosen response than to the rejected one, 0 where it is
    farther, 0.5 where they tie (within 1e-6). The mean is the win rate as the report defines it."""
    embedded, better, worse = (judge.embed(each) for each in (texts, chosen, rejected))
    difference = ((embedded * better).sum(-1) - (embedded * worse).sum(-1)).numpy()  # (N,)
    return np.where(np.abs(difference) < TIE, 0.5, (difference > 0).astype(float))


def toy_grades(samples: list[Sample]) -> dict[str, np.ndarray]:
    """(N,) arrays score (1 to 10), correct, degenerate and one 0/1 array a tone, for samples of the toy's prompts."""
    grades = [toy.grade(each.prompt, each.text, finished=each.finished) for each in samples]
    columns = {key: [getattr(grade, key) for grade in grades] for key in ("score", "correct", "degenerate")}
    columns |= {tone: [grade.tone == tone and not grade.degenerate for grade in grades] for tone in toy.TONE_SCORES}
    return {key: np.array(values, dtype=float) for key, values in columns.items()}


@torch.no_grad()
def last_hidden(policy, responses: list[list[Encoded]], *, batch_size: int = 64, precision: str = "float32") -> Tensor:
    """(B, K, D) float32, on the CPU: the policy's last hidden state at the end (EOS) of each of K responses of B records."""
    sequences = [each for record in responses for each in record]
    features = torch.zeros(len(sequences), policy.config.hidden_size)
    device = next(policy.parameters()).device
    for part in progress(in_batches([len(each.input_ids) for each in sequences], batch_size), "features of the reward model"):
        batch = collate([sequences[i] for i in part], device=device)  # right padding: a causal model ignores it
        lengths = batch.attention_mask.sum(1).cpu()
        with autocast(device, precision):
            hidden = policy.base_model(input_ids=batch.input_ids).last_hidden_state.float().cpu()
        features[part] = hidden[torch.arange(len(part)), lengths - 1]
    return features.view(len(responses), -1, features.shape[1])


def fit_reward_head(features: Tensor, *, weight_decay: float = 1e-3, steps: int = 50) -> Tensor:
    """A linear reward model on the frozen SFT policy, fitted to pairs by the Bradley-Terry loss with L-BFGS.

    Args: features: (B, 2, D), chosen first (`last_hidden`).
          weight_decay: of the squared weights of standardised features; keeps separable pairs from infinite scores.
    Returns: (D,) weights: scores are features @ weights. There is no bias: a difference of scores has none."""
    scale = features.flatten(0, 1).std(0).clamp(min=1e-6)
    weights = torch.zeros(features.shape[-1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scores = features / scale @ weights  # (B, 2)
        loss = reward_model_loss(scores[:, 0], scores[:, 1]).mean() + weight_decay * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weights / scale).detach()


def response_scores(
    policy, responses: list[list[Encoded]], weights: Tensor, *, batch_size: int = 64, precision: str = "float32"
) -> list[tuple[float, ...]]:
    """The linear head's score of each response of each record, in nats; records may have different numbers of them."""
    scores: list[tuple[float, ...]] = [()] * len(responses)
    for size in {len(record) for record in responses}:  # records of one K at a time
        chosen = [i for i, record in enumerate(responses) if len(record) == size]
        features = last_hidden(policy, [responses[i] for i in chosen], batch_size=batch_size, precision=precision)
        for i, values in zip(chosen, (features @ weights).tolist(), strict=True):
            scores[i] = tuple(values)
    return scores
