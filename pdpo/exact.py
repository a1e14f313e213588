r"""A lab in which every response is enumerated, so that expectations are sums and nothing is estimated.

With 4 symbols and length 4 there are 4^4 = 256 responses: the partition function, the optimum and the KL divergence, which
a language model can only sample, are exact here. Use float64.

Log-probabilities of policies are (..., N) nats, one for each response, that sum to 1; scores are (..., N), higher is better."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pdpo.losses import _check_beta


def optimal_policy_logps(reference_logps: Tensor, scores: Tensor, *, beta: float) -> Tensor:
    r"""Log-probabilities of the policy that maximises `rlhf_objective`.

    .. math:: \pi^*(y) = \frac{1}{Z} \pi_\text{ref}(y) \exp\Big(\frac{r(y)}{\beta}\Big)
    Args: beta: KL strength; a larger beta keeps the policy closer to the reference.
    Returns: (..., N) nats, normalised. A constant added to a row of scores changes nothing.
    Source: Rafailov 2023, arXiv:2305.18290, Eq. 4."""
    _check("optimal_policy_logps", reference_logps, scores, beta=beta, normalised=[reference_logps])
    return (reference_logps + scores / beta).log_softmax(-1)


def log_partition(reference_logps: Tensor, scores: Tensor, *, beta: float) -> Tensor:
    r"""Log of the constant that normalises the optimum; beta times it is the largest value of `rlhf_objective`.

    .. math:: \log Z = \log \sum_y \pi_\text{ref}(y) \exp\Big(\frac{r(y)}{\beta}\Big)
    Args: beta: KL strength; a larger beta keeps the policy closer to the reference.
    Returns: (...) nats.
    Source: Rafailov 2023, arXiv:2305.18290, Eq. 4 (the Z(x) in it)."""
    _check("log_partition", reference_logps, scores, beta=beta, normalised=[reference_logps])
    return (reference_logps + scores / beta).logsumexp(-1)


def kl_divergence(p_logps: Tensor, q_logps: Tensor) -> Tensor:
    r"""KL divergence of p from q, by summing over every response.

    .. math:: \text{KL}(p \,\|\, q) = \sum_y p(y) \big( \log p(y) - \log q(y) \big)
    Returns: (...) nats, >= 0 up to rounding. p_logps of -inf add nothing; inf where p has mass and q has none."""
    _check("kl_divergence", p_logps, q_logps, normalised=[p_logps, q_logps])
    log_ratio = (p_logps - q_logps).masked_fill(p_logps == -torch.inf, 0.0)  # 0 log 0 is 0, not nan
    return (p_logps.exp() * log_ratio).sum(-1)


def rlhf_objective(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor, *, beta: float) -> Tensor:
    r"""What KL-constrained reward maximisation maximises.

    .. math:: J(\pi) = \mathbb{E}_{y \sim \pi}[r(y)] - \beta \, \text{KL}(\pi \,\|\, \pi_\text{ref})
    Args: beta: KL strength; a larger beta keeps the policy closer to the reference.
    Returns: (...) in units of the scores; to be maximised; at most beta * `log_partition`.
    Source: Rafailov 2023, arXiv:2305.18290, Eq. 3, for one prompt."""
    _check("rlhf_objective", policy_logps, reference_logps, scores, beta=beta, normalised=[policy_logps, reference_logps])
    return (policy_logps.exp() * scores).sum(-1) - beta * kl_divergence(policy_logps, reference_logps)


def implicit_scores(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    r"""The scores for which this policy is the optimum, up to a constant.

    .. math:: \hat r(y) = \beta \log \frac{\pi(y)}{\pi_\text{ref}(y)} = r(y) - \beta \log Z \quad \text{where } \pi = \pi^*
    Args: beta: KL strength; a larger beta keeps the policy closer to the reference.
    Returns: (..., N) in units of the scores. Any subset of the responses will do, so nothing needs to sum to 1.
    Source: Rafailov 2023, arXiv:2305.18290, Eq. 5."""
    _check("implicit_scores", policy_logps, reference_logps, beta=beta)
    return beta * (policy_logps - reference_logps)


def best_of_n_logps(reference_logps: Tensor, scores: Tensor, *, n: int) -> Tensor:
    r"""Log-probabilities of the policy that draws n responses from the reference and keeps the one with the highest score.

    .. math:: \pi_n(y) = \frac{\pi_\text{ref}(y)}{\pi_\text{ref}(r = r(y))}
              \Big( \pi_\text{ref}(r \le r(y))^n - \pi_\text{ref}(r < r(y))^n \Big)
    Args: n: at least 1; 1 is the reference. Of responses with equal scores the first that was drawn is kept.
    Returns: (N,) nats, normalised; -inf where float64 is exhausted. Its KL from the reference is at most `best_of_n_bound`."""
    _check("best_of_n_logps", reference_logps, scores, normalised=[reference_logps])
    if reference_logps.ndim != 1 or n < 1:
        raise ValueError(f"best_of_n_logps: expected (N,) tensors and n >= 1, got {tuple(scores.shape)} and n {n}. One prompt.")
    probabilities = reference_logps.exp()
    orders = (scores < scores[:, None], scores == scores[:, None])
    below, equal = (each.to(probabilities) @ probabilities for each in orders)  # (N,) each
    return reference_logps + (((below + equal) ** n - below**n) / equal).log()


def best_of_n_bound(n: int) -> float:
    """log n - (n - 1) / n nats: what the KL of best-of-n from its reference is at most, whatever the scores.

    Source: Beirami 2024, arXiv:2401.01879. It is near the KL where no single response has much probability, and far above where one has."""
    return math.log(n) - (n - 1) / n


def all_responses(num_symbols: int, length: int) -> Tensor:
    """Every response of `length` symbols: (num_symbols ** length, length) int64, in the order of counting."""
    if num_symbols < 2 or length < 1 or num_symbols**length > 10_000:
        got = f"at most 10,000 responses, got {num_symbols} and {length}. Try 4, 4."
        raise ValueError(f"all_responses: expected num_symbols >= 2, length >= 1, {got}")
    return torch.cartesian_prod(*[torch.arange(num_symbols)] * length).view(-1, length)


class Lab(NamedTuple):
    """One prompt and everything that can be said to it: responses (N, length), reference_logps (N,), scores (N,)."""

    responses: Tensor
    reference_logps: Tensor
    scores: Tensor


def make_lab(num_symbols: int = 4, length: int = 4, *, seed: int = 0) -> Lab:
    """A `Lab` with a random reference (standard normal logits) and random scores (standard normal), float64."""
    responses = all_responses(num_symbols, length)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, len(responses), generator=generator, dtype=torch.float64)
    return Lab(responses, draws[0].log_softmax(-1), draws[1])


class TabularPolicy(nn.Module):
    """A policy with one logit per response: it can represent every distribution, and learns nothing about unseen ones."""

    def __init__(self, initial_logps: Tensor):
        super().__init__()
        self.logits = nn.Parameter(initial_logps.detach().clone())

    def forward(self) -> Tensor:
        """(..., N) nats, normalised."""
        return self.logits.log_softmax(-1)


class SharedWeightPolicy(nn.Module):
    """A tiny autoregressive network: like a language model, it cannot change one response without changing others.

    A two-layer perceptron with `width` hidden units reads the symbols so far and predicts the next one; all positions share
    it. `responses` are all of them (`all_responses`); `seed` draws the weights."""

    def __init__(self, responses: Tensor, *, width: int = 16, seed: int = 0):
        super().__init__()
        num_symbols, (num_responses, length) = int(responses.max()) + 1, responses.shape
        seen = torch.ones(length, length, dtype=torch.bool).tril(-1)  # row t: the symbols before t
        one_hot = nn.functional.one_hot(responses, num_symbols).double()  # (N, length, V)
        prefixes = one_hot[:, None] * seen[None, :, :, None]  # (N, t, length, V)
        self.register_buffer("responses", responses)
        self.register_buffer("prefixes", prefixes.view(num_responses, length, -1))
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.hidden, self.bias = draw(self.prefixes.shape[-1], width), draw(width)
        self.output = nn.Parameter(draw(width, num_symbols).detach() / width**0.5)

    def forward(self) -> Tensor:
        """(N,) nats, normalised: the chain rule over the symbols of each response."""
        logits = torch.tanh(self.prefixes @ self.hidden + self.bias) @ self.output  # (N, length, V)
        return logits.log_softmax(-1).gather(2, self.responses[..., None]).squeeze(2).sum(1)  # (N,)


def minimise(loss: Callable[[], Tensor], parameters: Iterable[Tensor], *, num_steps: int = 500) -> list[float]:
    """Minimises a deterministic scalar loss in place with L-BFGS; returns the loss at every evaluation, first to last.

    The parameters should be float64, or the last digits are lost. It stops early where the gradient vanishes."""
    if num_steps < 1:
        raise ValueError(f"minimise: expected num_steps >= 1, got {num_steps}. 500 is enough for the lab's losses.")
    stop = {"max_iter": num_steps, "max_eval": 2 * num_steps, "tolerance_grad": 1e-13, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS(list(parameters), history_size=50, line_search_fn="strong_wolfe", **stop)
    history: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        history.append(float(value.detach()))
        return value

    optimizer.step(closure)
    return history


def _check(function: str, *tensors: Tensor, beta: float = 1.0, normalised: Iterable[Tensor] = ()) -> None:
    _check_beta(function, beta)
    if any(each.ndim == 0 for each in tensors) or len({each.shape[-1] for each in tensors}) > 1:
        got = [tuple(each.shape) for each in tensors]
        raise ValueError(f"{function}: expected tensors over the same N responses, got {got}. They go in the last dimension.")
    for logps in normalised:
        worst = logps.detach().logsumexp(-1).abs().max().item()
        if not worst < 1e-3:  # loose enough for float32; logits or raw scores are far off
            got = f"a log-sum of {worst:.4g}. Apply log_softmax over all first."
            raise ValueError(f"{function}: expected log-probabilities that sum to 1, got {got}")
