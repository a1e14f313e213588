"""What is measured of a policy: KL from its own samples, SBERT win rate, gold score; each with its uncertainty."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdpo import toy
from pdpo.encoding import collate
from pdpo.sampling import Sample
from pdpo.training import autocast

TIE = 1e-6  # cosines closer than this count as equal: float32 embeddings repeat to about 1e-7


class KLEstimates(NamedTuple):
    """Estimates of the sequence KL(policy || reference) in nats, one a sample, (N,) float32 each; average them.

    exact: sum over response positions of the exact KL between the two next-token distributions there. Unbiased, and with
        the smallest variance of the three: only the path is sampled, not the token.
    k1: log policy - log reference of the sampled response. Unbiased; single values can be negative.
    k3: sum over positions of ratio - 1 - log ratio, ratio = reference / policy at the sampled token. Unbiased, never negative.
    num_tokens: response tokens of the sample, EOS included.
    """

    exact: Tensor
    k1: Tensor
    k3: Tensor
    num_tokens: Tensor


@torch.no_grad()
def sequence_kl(policy, reference, samples: list[Sample], *, batch_size: int = 64, precision: str = "float32") -> KLEstimates:
    """Three estimates of KL(policy || reference) from the policy's own samples.

    Args:
        policy, reference: causal language models with one vocabulary.
        samples: drawn from `policy` at temperature 1; at another temperature this is not the KL of the policy.
        batch_size: sequences in memory at a time, twice (both models).
    Returns:
        KLEstimates, in the order of `samples`.
    Source:
        k1 and k3: Schulman 2020, "Approximating KL divergence"; exact: the chain rule of relative entropy.
    """
    policy.eval(), reference.eval()
    device = next(policy.parameters()).device
    results = torch.zeros(4, len(samples))
    by_length = sorted(range(len(samples)), key=lambda i: len(samples[i].encoded.input_ids))
    for start in range(0, len(samples), batch_size):
        rows = by_length[start : start + batch_size]
        batch = collate([samples[i].encoded for i in rows], pad_id=policy.config.eos_token_id, device=device)
        with autocast(device, precision):
            p, q = (
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits[:, :-1]
                for model in (policy, reference)
            )
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
    columns = {
        "score": [grade.score for grade in grades],
        "correct": [grade.correct for grade in grades],
        "degenerate": [grade.degenerate for grade in grades],
    } | {tone: [grade.tone == tone and not grade.degenerate for grade in grades] for tone in toy.TONE_SCORES}
    return {key: np.array(values, dtype=float) for key, values in columns.items()}


def by_prompt(values, num_samples: int) -> np.ndarray:
    """(N * num_samples,) -> (N,): the mean over each prompt's samples, which are not independent of each other."""
    return np.asarray(values, dtype=float).reshape(-1, num_samples).mean(1)


def bootstrap_interval(values, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        values: (N,) one number an independent unit, which here is a prompt; for a paired comparison, the differences. With
            (S, N), a row for each seed, both seeds and prompts are drawn again.
        level: of confidence.
        num_resamples: bootstrap samples.
        seed: of the resampling.
    Returns:
        (low, high), in the unit of the values.
    Raises:
        ValueError: fewer than two units, or a value that is not finite.
    Source:
        Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    values = np.asarray(values, dtype=float)
    if values.ndim not in (1, 2) or values.shape[-1] < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"bootstrap_interval: expected at least 2 finite values, (N,) or (S, N), got shape {values.shape}. "
            "Average the samples of each prompt first (by_prompt)."
        )
    of_seed = np.atleast_2d(values)  # (S, N)
    rng = np.random.default_rng(seed)
    prompts = rng.integers(of_seed.shape[1], size=(num_resamples, of_seed.shape[1]))
    seeds = rng.integers(len(of_seed), size=(num_resamples, len(of_seed)))
    means = np.take_along_axis(of_seed[seeds].mean(1), prompts, axis=1).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def with_interval(key: str, values) -> dict[str, float]:
    """{key: mean, key_low, key_high}: a figure's row entries of values as `bootstrap_interval` takes them, with its 95 % interval."""
    low, high = bootstrap_interval(values)
    return {key: float(np.mean(values)), f"{key}_low": low, f"{key}_high": high}
