"""A vocabulary of a few digits with 0 as EOS, and random policies over it: small enough to enumerate every response."""

import itertools
from types import SimpleNamespace

import torch
from transformers import GPT2Config, GPT2LMHeadModel


class DigitTokenizer:
    """Every digit of a text is one token, everything else (the template, spaces) none."""

    bos_token_id = eos_token_id = pad_token_id = 0
    model_max_length = 32

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[int(character) for character in text if character.isdigit()])

    def decode(self, ids) -> str:
        return "".join(map(str, ids))


def random_policy(seed: int, *, vocab_size: int = 5, scale: float = 0.5) -> GPT2LMHeadModel:
    """GPT-2's architecture with random weights that are large enough for next-token distributions to differ by position."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=scale,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def responses(vocab_size: int, max_new_tokens: int) -> list[tuple[int, ...]]:
    """Every response: digits that end in the first 0, or max_new_tokens digits without one."""
    found = set()
    for digits in itertools.product(range(vocab_size), repeat=max_new_tokens):
        found.add(digits[: digits.index(0) + 1] if 0 in digits else digits)
    return sorted(found)


@torch.no_grad()
def response_logps(policy, prompt: list[int], found: list[tuple[int, ...]], *, temperature: float = 1.0) -> torch.Tensor:
    """(N,) float64 log-probabilities of responses to one prompt, one by one, with no padding, mask or cache."""
    values = []
    for response in found:
        logits = policy(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
        values.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(values)
