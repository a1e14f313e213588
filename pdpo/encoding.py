"""The one path from text to tokens, for SFT, preference training, sampling and evaluation."""

import json
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def first_ids(tokenizer) -> list[int]:
    """What the tokenizer begins every text with: [its BOS] for such as Llama's and Gemma's, [] for GPT-2's."""
    ids = tokenizer("").input_ids[:1]
    return ids if ids == [tokenizer.bos_token_id] else []


def encode_prompt(tokenizer, prompt: str, *, max_length: int | None = None) -> list[int]:
    """Token ids of the templated prompt; where there are more than max_length, the leftmost, BOS aside, are dropped."""
    ids = tokenizer(TEMPLATE.format(prompt=prompt.strip()), add_special_tokens=False, split_special_tokens=True).input_ids
    first = first_ids(tokenizer)
    surplus = 0 if max_length is None else max(len(first) + len(ids) - max_length, 0)
    return first[:max_length] + ids[surplus:]


def chat_template(tokenizer) -> str:
    """TEMPLATE as the Jinja text that a saved tokenizer carries, so that `apply_chat_template`, pipelines, vLLM and TRL ask a policy
    in the words that it was trained on. Several messages become one prompt as those of a preference file do."""
    before, after = (json.dumps(part) for part in TEMPLATE.split("{prompt}"))
    return (
        ("{{ bos_token }}" if first_ids(tokenizer) else "")
        + "{% set answered = messages[-1]['role'] == 'assistant' %}{% set prompt = messages[:-1] if answered else messages %}"
        + "{{ " + before + " }}{% if prompt | length == 1 %}{{ prompt[0]['content'] | trim }}{% else %}{% for each in prompt %}"
        + "{{ each['role'] + ': ' + each['content'] | trim }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}{% endif %}"
        + "{{ " + after + " }}{% if answered %}{{ messages[-1]['content'] | trim + eos_token }}{% endif %}"
    )  # fmt: skip


def encode(tokenizer, prompt: str, response: str, *, max_length: int | None = None) -> Encoded:
    """Prompt and response, white space around them dropped, tokenised jointly by a fast tokenizer, with one EOS at the end.

    Special tokens spelled out in a text stay text. A token across the junction counts as the response's; this template's
    newline prevents that for GPT-2's. What is beyond max_length (None: the tokenizer's own limit) is cut from the left of the
    prompt; ValueError where the response, its EOS and one prompt token do not fit."""
    limit, num_first = max_length or tokenizer.model_max_length, len(first_ids(tokenizer))
    return _cut(_tokenized(tokenizer, [(prompt, response)]), [response], limit, num_first)[0]


def _tokenized(tokenizer, texts: list[tuple[str, str]]) -> list[Encoded]:
    """Prompts and responses as `encode` joins them, of any length; a list of them is tokenised much faster than one by one."""
    templated = [TEMPLATE.format(prompt=prompt.strip()) for prompt, _ in texts]
    joint = tokenizer(
        [before + response.strip() for before, (_, response) in zip(templated, texts, strict=True)],
        add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    first, end_id = first_ids(tokenizer), tokenizer.eos_token_id  # looked up once: it is a search in the vocabulary
    return [
        Encoded(first + ids + [end_id], len(first) + sum(end <= len(before) for _, end in offsets))
        for ids, offsets, before in zip(joint.input_ids, joint.offset_mapping, templated, strict=True)
    ]


def _cut(sequences: list[Encoded], responses, limit: int, num_first: int) -> list[Encoded]:
    """The responses to one prompt in at most `limit` tokens each: one cut for all, so that the loss compares them given one x."""
    for encoded, response in zip(sequences, responses, strict=True):
        if not response_fits(encoded, limit):
            got = f"{len(encoded.input_ids) - encoded.num_prompt} for {response[:60]!r}"
            way_out = "Responses are never cut: shorten it, drop the row or raise max_length."
            raise ValueError(f"encode: expected a response of at most {limit - 1} tokens with its EOS, got {got}. {way_out}")
    surplus = max(len(each.input_ids) for each in sequences) - limit
    if surplus <= 0:
        return sequences
    num_first = min(num_first, min(each.num_prompt for each in sequences) - surplus)  # BOS stays where there is room for it
    return [Encoded(ids[:num_first] + ids[num_first + surplus :], num_prompt - surplus) for ids, num_prompt in sequences]


def response_fits(encoded: Encoded, max_length: int) -> bool:
    """Whether the whole response and at least one prompt token fit into max_length."""
    return len(encoded.input_ids) - encoded.num_prompt + 1 <= max_length


def encode_records(tokenizer, records, *, max_length: int | None = None) -> list[list[Encoded]]:
    """Each record's K responses encoded; ValueError naming the rows (from 1) of responses that are too long."""
    texts = list(dict.fromkeys((record.prompt, text) for record in records for text in record.responses))
    tokenized = dict(zip(texts, _tokenized(tokenizer, texts), strict=True)) if texts else {}
    limit, num_first, rows, too_long = max_length or tokenizer.model_max_length, len(first_ids(tokenizer)), [], []
    for number, record in enumerate(records, 1):
        try:
            rows.append(_cut([tokenized[record.prompt, text] for text in record.responses], record.responses, limit, num_first))
        except ValueError as error:
            too_long.append((number, error))
    if too_long:
        shown = f"{[number for number, _ in too_long[:10]]}{' and more' if len(too_long) > 10 else ''}"
        raise ValueError(f"rows {shown} ({len(too_long)} in all) do not fit. The first: {too_long[0][1]}")
    return rows


def collate(sequences: list[Encoded], *, pad_id: int = 0, device: torch.device | str = "cpu") -> Batch:
    """Right-pads sequences into one Batch. pad_id fills input_ids only, any will do: both masks come from the lengths."""
    lengths, num_prompt = torch.tensor([(len(ids), num) for ids, num in sequences]).T[..., None]  # (B, 1) each
    input_ids = pad_sequence([torch.tensor(ids) for ids, _ in sequences], batch_first=True, padding_value=pad_id)
    position = torch.arange(input_ids.shape[1])
    real = position < lengths  # (B, T)
    batch = Batch(input_ids, real, real & (position >= num_prompt))
    return Batch(*(each.to(device, non_blocking=True) for each in batch))


def in_batches(lengths: list[int], size: int) -> list[list[int]]:
    """The indices of sequences of these lengths, `size` a batch, equal lengths side by side: little padding."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]
