"""The one path from text to tokens, for SFT, preference training, sampling and evaluation."""

from typing import NamedTuple

import torch
from torch import Tensor

TEMPLATE = "Instruction: {prompt}\nResponse:\n"


class Encoded(NamedTuple):
    """One sequence: input_ids[:num_prompt] is the templated prompt, the rest the response with its EOS."""

    input_ids: list[int]
    num_prompt: int


class Batch(NamedTuple):
    """B sequences, right-padded to T. `response_mask`: True = scored. `attention_mask`: True = a real token. (B, T) each."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor


def encode_prompt(tokenizer, prompt: str, *, max_length: int | None = None) -> list[int]:
    """Token ids of the templated prompt; where there are more than max_length, the leftmost are dropped."""
    ids = tokenizer(TEMPLATE.format(prompt=prompt.strip()), add_special_tokens=False, split_special_tokens=True).input_ids
    return ids if max_length is None else ids[-max_length:]


def encode(tokenizer, prompt: str, response: str, *, max_length: int | None = None) -> Encoded:
    """Prompt and response, tokenised jointly, with one EOS at the end.

    Args:
        tokenizer: a fast tokenizer of transformers.
        prompt, response: texts; white space around them is dropped. Special tokens spelled out in a text stay text.
        max_length: tokens in all; None is the tokenizer's own limit. What is too much is cut from the left of the prompt.
    Returns: Encoded. A token across the junction counts as the response's; this template's newline prevents that for GPT-2's.
    Raises: ValueError: the response, its EOS and one prompt token do not fit into max_length.
    """
    return _cut(tokenizer, _tokenized(tokenizer, [(prompt, response)])[0], response, max_length)


def _tokenized(tokenizer, texts: list[tuple[str, str]]) -> list[Encoded]:
    """Prompts and responses as `encode` joins them, of any length; a list of them is tokenised much faster than one by one."""
    templated = [TEMPLATE.format(prompt=prompt.strip()) for prompt, _ in texts]
    joint = tokenizer(
        [before + response.strip() for before, (_, response) in zip(templated, texts, strict=True)],
        add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    return [
        Encoded(ids + [tokenizer.eos_token_id], sum(end <= len(before) for _, end in offsets))
        for ids, offsets, before in zip(joint.input_ids, joint.offset_mapping, templated, strict=True)
    ]


def _cut(tokenizer, encoded: Encoded, response: str, max_length: int | None) -> Encoded:
    limit = max_length or tokenizer.model_max_length
    if not response_fits(encoded, limit):
        raise ValueError(
            f"encode: expected a response of at most {limit - 1} tokens with its EOS, got "
            f"{len(encoded.input_ids) - encoded.num_prompt} for {response[:60]!r}. Responses are never cut: shorten it, drop the "
            "row or raise max_length."
        )
    surplus = max(len(encoded.input_ids) - limit, 0)
    return Encoded(encoded.input_ids[surplus:], encoded.num_prompt - surplus)


def response_fits(encoded: Encoded, max_length: int) -> bool:
    """Whether the whole response and at least one prompt token fit into max_length."""
    return len(encoded.input_ids) - encoded.num_prompt + 1 <= max_length


def encode_records(tokenizer, records, *, max_length: int | None = None) -> list[list[Encoded]]:
    """Each record's K responses encoded; ValueError naming the rows (from 1) of responses that are too long."""
    texts = list(dict.fromkeys((record.prompt, text) for record in records for text in record.responses))
    tokenized = dict(zip(texts, _tokenized(tokenizer, texts), strict=True)) if texts else {}
    rows, too_long = [], []
    for number, record in enumerate(records, 1):
        try:
            rows.append([_cut(tokenizer, tokenized[record.prompt, text], text, max_length) for text in record.responses])
        except ValueError as error:
            too_long.append((number, error))
    if too_long:
        numbers = [number for number, _ in too_long]
        shown = f"{numbers[:10]}{' and more' if len(numbers) > 10 else ''}"
        raise ValueError(f"rows {shown} ({len(numbers)} in all) do not fit. The first: {too_long[0][1]}")
    return rows


def collate(sequences: list[Encoded], *, pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Right-pads sequences into one Batch. pad_id fills input_ids only: both masks come from the lengths."""
    longest = max(len(each.input_ids) for each in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    for row, each in enumerate(sequences):
        input_ids[row, : len(each.input_ids)] = torch.tensor(each.input_ids)
    position = torch.arange(longest)
    lengths = torch.tensor([len(each.input_ids) for each in sequences])[:, None]
    num_prompt = torch.tensor([each.num_prompt for each in sequences])[:, None]
    real = position < lengths  # (B, T)
    batch = Batch(input_ids, real, real & (position >= num_prompt))
    return Batch(*(each.to(device, non_blocking=True) for each in batch))


def in_batches(lengths: list[int], size: int) -> list[list[int]]:
    """The indices of sequences of these lengths, `size` a batch, equal lengths side by side: little padding."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]
