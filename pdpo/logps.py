r"""Log-probabilities of responses under a language model: where the off-by-one, the mask and the sum are decided, once."""

import torch
from torch import Tensor


def token_logps(logits: Tensor, input_ids: Tensor) -> Tensor:
    r"""Log-probability of each token given the tokens before it.

    .. math:: \ell_t = \log \pi(x_{t+1} \mid x_{\le t}), \quad t = 1, \dots, T-1
    Args: logits, input_ids: (B, T, V) float and (B, T) int64; logits[:, t] predicts token t + 1 and carries the gradient.
    Returns: (B, T-1) float32 nats; column t belongs to token t + 1. The first token has no prediction."""
    if logits.ndim != 3 or input_ids.shape != logits.shape[:2]:
        got = f"{tuple(logits.shape)} and {tuple(input_ids.shape)}"
        raise ValueError(f"token_logps: expected logits (B, T, V) and input_ids (B, T), got {got}. Pass both unshifted.")
    if (num := input_ids.shape[1]) < 2:
        raise ValueError(f"token_logps: expected at least 2 tokens a row, got {num}. The first token is never predicted.")
    # float32 whatever the autocast: bf16 keeps 8 bits, too few for a difference of sums of log-probabilities
    log_probs = logits[:, :-1].float().log_softmax(-1)  # (B, T-1, V)
    return log_probs.gather(2, input_ids[:, 1:, None]).squeeze(2)  # (B, T-1)


def sequence_logps(logits: Tensor, input_ids: Tensor, response_mask: Tensor) -> Tensor:
    r"""Log-probability of each whole response: the SUM over its tokens, EOS included.

    .. math:: \log \pi(y \mid x) = \sum_{t \in \text{response}} \log \pi(y_t \mid x, y_{<t})

    A sum, not a mean: the DPO derivation needs the probability of the response, and a mean is that of another model
    in which long answers are free.
    Args: response_mask: (B, T) bool; True at the tokens to score. Never derived from the pad id: GPT-2 pads with its EOS.
    Returns: (B,) float32 nats, <= 0.
    Source: Rafailov 2023, arXiv:2305.18290, Appendix B."""
    check_response_mask(input_ids, response_mask)
    scored = response_mask[:, 1:]  # (B, T-1), aligned with token_logps
    return token_logps(logits, input_ids).masked_fill(~scored, 0.0).sum(1)


def check_response_mask(input_ids: Tensor, response_mask: Tensor) -> None:
    """Raises ValueError unless response_mask is a (B, T) bool mask with a scored token, after the first, in every row."""
    if input_ids.ndim != 2:
        raise ValueError(f"sequence_logps: expected input_ids (B, T), got {tuple(input_ids.shape)}. Add the batch dimension.")
    if response_mask.dtype != torch.bool or response_mask.shape != input_ids.shape:
        wanted, got = tuple(input_ids.shape), f"{response_mask.dtype} {tuple(response_mask.shape)}"
        way_out = "Pass True at the tokens of the response, its EOS included."
        raise ValueError(f"sequence_logps: expected response_mask bool of shape {wanted}, got {got}. {way_out}")
    if first := response_mask[:, 0].nonzero().flatten().tolist():
        way_out = "Put a prompt token before the response."
        raise ValueError(f"sequence_logps: rows {first} score their first token, which nothing predicts. {way_out}")
    if empty := (~response_mask.any(1)).nonzero().flatten().tolist():
        raise ValueError(f"sequence_logps: rows {empty} have no response token to score. Cut the prompt or raise max_length.")
