"""Sampling responses: batched, left-padded, with a key-value cache; rows that have ended are dropped. Every policy meets the same
noise, so that two policies' samples of a prompt differ only where the policies do."""

from typing import NamedTuple

import torch

from pdpo.device import autocast
from pdpo.encoding import Encoded, encode_prompt, in_batches
from pdpo.progress import progress


class Sample(NamedTuple):
    """One sampled response; prompt and text are without template and special tokens."""

    prompt: str
    text: str
    encoded: Encoded  # with EOS where the policy gave one
    finished: bool  # False where max_new_tokens came before EOS


@torch.no_grad()
def sample(
    policy,
    tokenizer,
    prompts: list[str],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    num_samples: int = 1,
    top_p: float = 1.0,
    batch_size: int = 512,
    precision: str = "float32",
) -> list[Sample]:
    """Responses to prompts (without template), num_samples of each: all of the first prompt, then all of the second, ...

    Drawn by the Gumbel argument of notebook 01: the argmax of logits / temperature + Gumbel noise follows their softmax. The noise
    of a prompt, sample and position depends on the arguments below alone, never on the policy: paired differences of two policies
    with one vocabulary are far less noisy than with independent samples (notebook 08).

    Args: temperature: 0 is greedy (then num_samples copies would be equal: only num_samples=1 is allowed).
          top_p: in (0, 1]; 1 leaves no token out, see `within_top_p`, which comes after the temperature.
          max_new_tokens: tokens at most, EOS included; prompts are cut from the left to leave room for them.
          seed: the same seed, prompts, num_samples and batch_size (sequences sampled at a time) give the same noise."""
    if not prompts:
        raise ValueError("sample: expected at least one prompt, got none.")
    if not temperature >= 0 or num_samples < 1 or (temperature == 0 and num_samples != 1):
        raise ValueError(
            f"sample: expected temperature > 0, or 0 (greedy) with num_samples=1, got temperature {temperature}, num_samples {num_samples}."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"sample: expected 0 < top_p <= 1, got {top_p}. 1 samples from all tokens.")
    room = tokenizer.model_max_length - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise ValueError(
            f"sample: expected max_new_tokens from 1 to {tokenizer.model_max_length - 1}, got {max_new_tokens}. The prompt needs room, too."
        )
    policy.eval()
    device, eos = next(policy.parameters()).device, tokenizer.eos_token_id
    seeds, generator = torch.Generator().manual_seed(seed), torch.Generator(device)
    encoded = [encode_prompt(tokenizer, prompt, max_length=room) for prompt in prompts]
    new_ids: list[list[list[int]]] = [[[] for _ in range(num_samples)] for _ in prompts]
    for rows in progress(in_batches([len(ids) for ids in encoded], max(batch_size // num_samples, 1)), "sampling"):
        generator.manual_seed(torch.randint(2**31, (), generator=seeds).item())
        with autocast(device, precision):
            _extend(policy, [encoded[i] for i in rows], [each for i in rows for each in new_ids[i]], eos, temperature,
                    top_p, max_new_tokens, generator, device)  # fmt: skip
    samples = []
    for prompt, prompt_ids, responses in zip(prompts, encoded, new_ids, strict=True):
        for response_ids in responses:
            finished = response_ids[-1] == eos
            text = tokenizer.decode(response_ids[:-1] if finished else response_ids).strip()
            samples.append(Sample(prompt, text, Encoded(prompt_ids + response_ids, len(prompt_ids)), finished))
    return samples


def within_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """(..., V) the logits, -inf for all but the nucleus: the fewest tokens, most likely first, that have top_p together.

    Source: Holtzman 2020, arXiv:1904.09751, Section 3.1."""
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p  # where more likely tokens have enough already
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def _extend(policy, prompt_ids, new_ids, eos, temperature, top_p, max_new_tokens, generator, device) -> None:
    """Appends sampled tokens to each list in new_ids, the same number for each prompt, until its EOS or max_new_tokens."""
    longest, num_samples = max(map(len, prompt_ids)), len(new_ids) // len(prompt_ids)
    input_ids = torch.full((len(prompt_ids), longest), eos)
    attention_mask = torch.zeros(len(prompt_ids), longest, dtype=torch.long)
    for row, ids in enumerate(prompt_ids):  # left padding: the last prompt token of every row is in the last column
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # a row's first real token has position 0
    live, cache = torch.arange(len(new_ids), device=device), None
    for step in progress(range(max_new_tokens), "sampling, tokens at most"):
        output = policy(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache, logits = output.past_key_values, output.logits[:, -1].float()  # (P or B, V)
        if step == 0 and num_samples > 1:  # the samples of a prompt share one pass over it
            cache.batch_repeat_interleave(num_samples)
            logits, attention_mask, position_ids = (
                each.repeat_interleave(num_samples, 0) for each in (logits, attention_mask, position_ids)
            )  # (B, ...), B = P * num_samples
        if temperature > 0:  # noise for ended rows, too: what the others meet must not depend on who has ended
            uniform = torch.rand(len(new_ids), logits.shape[1], generator=generator, device=device)
            # Gumbel, by inverting its distribution function exp(-exp(-g)); `gumbel_sample`'s exponential_ is much slower on a CPU
            noise = -uniform.log_().neg_().log_()
            logits = logits / temperature
            logits = (logits if top_p == 1 else within_top_p(logits, top_p)) + noise[live]
        tokens = logits.argmax(-1)  # (B,)
        for row, token in zip(live.tolist(), tokens.tolist(), strict=True):
            new_ids[row].append(token)
        going_on = (tokens != eos).nonzero().flatten()
        if len(going_on) == 0:
            return
        if len(going_on) < len(live):
            cache.batch_select_indices(going_on)
            live, tokens, attention_mask, position_ids = (
                each[going_on] for each in (live, tokens, attention_mask, position_ids)
            )
        input_ids = tokens[:, None]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(live), 1)], 1)
        position_ids = position_ids[:, -1:] + 1
