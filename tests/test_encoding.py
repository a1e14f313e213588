"""Text to tokens: one EOS, joint tokenisation, truncation of prompts alone, masks from lengths."""

import pytest
import torch

from pdpo.data import Preference
from pdpo.encoding import TEMPLATE, Encoded, chat_template, collate, encode, encode_prompt, encode_records
from pdpo.parsing import _without_messages

TEXTS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("a", "b"),
    ("  spaces around \n", "\n and around this \t"),
    ("two\nlines\n\nand more", "also\n\ntwo"),
    ("日本語 😀 é", "ñandú 🏳️‍🌈"),
    ("12345", "67890, 3.14"),
    ("ends in a colon:", ": starts with one"),
    ("Response:\n", "Instruction: x\nResponse:\n"),
    ("What is <|endoftext|>?", "<|endoftext|> is a token. <|endoftext|>"),  # a special token spelled out stays text
]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_joint_tokenisation_is_prompt_then_response_then_one_eos(any_tokenizer):
    for prompt, response in TEXTS:
        encoded = encode(any_tokenizer, prompt, response, max_length=1000)
        templated = ids(any_tokenizer, TEMPLATE.format(prompt=prompt.strip()))
        assert encoded.input_ids == templated + ids(any_tokenizer, response.strip()) + [any_tokenizer.eos_token_id]
        assert encoded.num_prompt == len(templated)
        assert encode_prompt(any_tokenizer, prompt) == templated
        assert encoded.input_ids.count(any_tokenizer.eos_token_id) == 1
        assert any_tokenizer.decode(encoded.input_ids[encoded.num_prompt : -1]) == response.strip()


def test_the_saved_chat_template_gives_the_tokens_of_training(any_tokenizer):
    def chat(*messages):
        roles = [{"role": role, "content": content} for role, content in messages]
        return any_tokenizer.apply_chat_template(roles, chat_template=chat_template(any_tokenizer), return_dict=False)

    for prompt, response in TEXTS[:-1]:
        assert chat(("user", prompt)) == encode_prompt(any_tokenizer, prompt)
        whole = encode(any_tokenizer, prompt, response, max_length=1000).input_ids
        assert chat(("user", prompt), ("assistant", response)) == whole
    several = [("system", "Be brief."), ("user", "Hello "), ("assistant", "Yes?"), ("user", "Who?")]
    row = {"prompt": [{"role": role, "content": text} for role, text in several], "chosen": "a", "rejected": "b"}
    assert chat(*several) == encode_prompt(any_tokenizer, _without_messages(row)["prompt"])


def test_truncation_takes_from_the_left_of_the_prompt_and_never_from_the_response(any_tokenizer):
    prompt, response = "one two three four five six seven", "eight nine ten."
    whole = encode(any_tokenizer, prompt, response, max_length=1000)
    num_response = len(whole.input_ids) - whole.num_prompt
    for limit in range(num_response + 1, len(whole.input_ids) + 3):
        cut = encode(any_tokenizer, prompt, response, max_length=limit)
        assert cut.input_ids == whole.input_ids[-limit:] and cut.num_prompt >= 1
        assert cut.input_ids[cut.num_prompt :] == whole.input_ids[whole.num_prompt :]
    assert encode_prompt(any_tokenizer, prompt, max_length=3) == encode_prompt(any_tokenizer, prompt)[-3:]


def test_a_response_that_does_not_fit_is_refused_not_cut_and_without_max_length_the_tokenizers_limit_holds(tiny_tokenizer):
    whole = encode(tiny_tokenizer, "one two", "three four five.", max_length=1000)
    num_response = len(whole.input_ids) - whole.num_prompt
    with pytest.raises(ValueError, match=f"at most {num_response - 1} tokens with its EOS, got {num_response} for 'three"):
        encode(tiny_tokenizer, "one two", "three four five.", max_length=num_response)
    assert len(encode(tiny_tokenizer, "apple " * 100, "Paris.").input_ids) == tiny_tokenizer.model_max_length == 64
    with pytest.raises(ValueError, match="at most 63 tokens"):
        encode(tiny_tokenizer, "a", "apple " * 100)


def test_encode_records_names_every_row_that_does_not_fit(tiny_tokenizer):
    good, bad = Preference("a", ("Paris.", "Rome.")), Preference("a", ("Paris.", "apple " * 99))
    rows = encode_records(tiny_tokenizer, [good, Preference("b", ("x", "y", "z"))])
    assert [len(row) for row in rows] == [2, 3] and rows[0][1] == encode(tiny_tokenizer, "a", "Rome.")
    with pytest.raises(ValueError, match=r"rows \[2, 4\] \(2 in all\) do not fit.*'apple"):
        encode_records(tiny_tokenizer, [good, bad, good, bad])
    with pytest.raises(ValueError, match=r"and more \(12 in all\)"):
        encode_records(tiny_tokenizer, [bad] * 12)


def test_collate_pads_on_the_right_and_masks_by_length_also_where_the_padding_is_a_token_of_the_response():
    batch = collate([Encoded([5, 6, 7, 8], 1), Encoded([5, 9], 1), Encoded([5, 6, 7], 2)], pad_id=8)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 8, 8], [5, 6, 7, 8]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.response_mask.int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert batch.attention_mask.dtype == batch.response_mask.dtype == torch.bool and batch.input_ids.dtype == torch.int64
