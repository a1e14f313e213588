r"""A reward model: a linear head on the frozen SFT policy, fitted to pairs, for data whose responses carry no scores."""

import numpy as np
import torch

from pdpo.encoding import Encoded
from pdpo.losses import reward_model_loss
from pdpo.presets import device
from pdpo.training import autocast


@torch.no_grad()
def last_hidden(policy, responses: list[list[Encoded]], *, batch_size: int = 64, precision: str = "float32") -> torch.Tensor:
    """(B, K, D) float32, on the CPU: the policy's last hidden state at the end (EOS) of each of K responses of B records."""
    sequences = [each.input_ids for record in responses for each in record]
    features = torch.zeros(len(sequences), policy.config.hidden_size)
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(sequences), batch_size):
        part = by_length[start : start + batch_size]
        lengths = torch.tensor([len(sequences[i]) for i in part])
        input_ids = torch.zeros(len(part), int(lengths.max()), dtype=torch.long)  # right padding: a causal model ignores it
        for line, i in enumerate(part):
            input_ids[line, : lengths[line]] = torch.tensor(sequences[i])
        with autocast(device(), precision):
            hidden = policy.base_model(input_ids=input_ids.to(device())).last_hidden_state.float().cpu()
        features[part] = hidden[torch.arange(len(part)), lengths - 1]
    return features.view(len(responses), -1, features.shape[1])


def fit_reward_head(features: torch.Tensor, *, weight_decay: float = 1e-3, steps: int = 50) -> torch.Tensor:
    """A linear reward model on the frozen SFT policy, fitted to pairs by the Bradley-Terry loss.

    Args:
        features: (B, 2, D), chosen first (`last_hidden`).
        weight_decay: of the squared weights of standardised features; keeps separable pairs from infinite scores.
        steps: of L-BFGS.
    Returns:
        (D,) weights: scores are features @ weights. There is no bias: a difference of scores has none.
    """
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
    policy, responses: list[list[Encoded]], weights: torch.Tensor, *, batch_size: int = 64, precision: str = "float32"
) -> list[tuple[float, ...]]:
    """The linear head's score of each response of each record, in nats; records may have different numbers of them."""
    scores: list[tuple[float, ...]] = [()] * len(responses)
    for size in {len(record) for record in responses}:  # records of one K at a time
        chosen = [i for i, record in enumerate(responses) if len(record) == size]
        features = last_hidden(policy, [responses[i] for i in chosen], batch_size=batch_size, precision=precision)
        for i, values in zip(chosen, (features @ weights).tolist(), strict=True):
            scores[i] = tuple(values)
    return scores


def calibration(probabilities, *, num_bins: int = 5) -> tuple[list[dict], float]:
    """How often a predicted order is right, against how sure the prediction was.

    Args:
        probabilities: (P,) that were given to the true order of P pairs; the predicted order is right where above 1/2.
        num_bins: of equal width, over confidences from 1/2 to 1.
    Returns:
        One dict for each bin with a pair in it: confidence (mean), right (share), pairs; and the expected calibration error,
        the mean of abs(right - confidence), weighted by pairs.
    Source:
        Guo 2017, "On calibration of modern neural networks", arXiv:1706.04599.
    """
    probabilities = np.asarray(probabilities)
    confidence, right = np.maximum(probabilities, 1 - probabilities), probabilities > 0.5
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    rows = [
        {"confidence": confidence[inside].mean(), "right": right[inside].mean(), "pairs": int(inside.sum())}
        for inside in (bins == i for i in range(num_bins))
        if inside.any()
    ]
    error = sum(row["pairs"] * abs(row["right"] - row["confidence"]) for row in rows) / len(probabilities)
    return [{key: float(value) if key != "pairs" else value for key, value in row.items()} for row in rows], float(error)
