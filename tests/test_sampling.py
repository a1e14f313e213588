"""Sampling: padding, caching and dropping finished rows change nothing; frequencies are those of the softmax."""

from collections import Counter

import pytest
import torch
from digits import DigitTokenizer, random_policy, response_logps, responses
from scipy.stats import chisquare
from transformers import TopPLogitsWarper

from pdpo.encoding import Encoded
from pdpo.sampling import sample, within_top_p

TOKENIZER = DigitTokenizer()
PROMPTS = ["1", "12", "3 4 1 2 3", "2 2 1", "4321 1234 4321", "3", "4", "21", "33 12", "1 1 1 1 1 1 1 1"]


def tokens(prompt: str) -> list[int]:
    return TOKENIZER(prompt).input_ids


def greedy(policy, **options) -> list:
    return sample(policy, TOKENIZER, PROMPTS, temperature=0, max_new_tokens=12, seed=0, **options)


@pytest.fixture(scope="module")
def policy():
    """A policy whose greedy responses to PROMPTS end at several lengths, so that rows are dropped along the way."""
    for seed in range(100):
        policy = random_policy(seed)
        samples = greedy(policy)
        lengths = {len(each.encoded.input_ids) - each.encoded.num_prompt for each in samples if each.finished}
        if len(lengths) >= 3 and not all(each.finished for each in samples):
            return policy
    raise AssertionError("no such policy")


def test_temperature_zero_of_a_batch_equals_transformers_generate_one_by_one(policy):
    samples = greedy(policy)
    assert samples == greedy(policy, batch_size=3) and [each.prompt for each in samples] == PROMPTS
    for each in samples:
        ids = torch.tensor([tokens(each.prompt)])
        expected = policy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=0, pad_token_id=0
        )
        assert each.encoded == Encoded(expected[0].tolist(), ids.shape[1])
        assert each.finished == (expected[0, -1].item() == 0)
        assert each.text == TOKENIZER.decode([token for token in expected[0, ids.shape[1] :].tolist() if token != 0])


def test_response_frequencies_match_the_softmax_at_temperature(policy):
    """Whole responses of up to 3 tokens, two prompts of different length in one batch, rows ending on the way."""
    prompts, num_samples, every = ["12", "3 4 1 2 3 4"], 6000, responses(5, 3)
    options = {"num_samples": num_samples, "batch_size": 2 * num_samples}
    samples = sample(policy, TOKENIZER, prompts, temperature=0.7, max_new_tokens=3, seed=4, **options)
    assert [each.prompt for each in samples] == [prompt for prompt in prompts for _ in range(num_samples)]
    for prompt in prompts:
        expected = response_logps(policy, tokens(prompt), every, temperature=0.7).exp()
        assert expected.sum().item() == pytest.approx(1)
        expected *= num_samples / expected.sum()
        found = Counter(tuple(each.encoded.input_ids[each.encoded.num_prompt :]) for each in samples if each.prompt == prompt)
        observed = torch.tensor([found[response] for response in every]).double()
        often = expected >= 5  # the others are counted together
        counts, wanted = ([*each[often], each[~often].sum()] for each in (observed, expected))
        assert observed.sum() == num_samples and wanted[-1] > 5 and len(wanted) > 5
        assert chisquare(counts, wanted).pvalue > 1e-4


@pytest.mark.parametrize("top_p", [1e-9, 0.8])
def test_top_p_leaves_what_transformers_leaves(top_p):
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = within_top_p(logits, top_p)
    assert torch.equal(left, TopPLogitsWarper(top_p)(None, logits)) and 1 <= left.isfinite().sum(-1).min() < 40


def test_sampling_is_from_the_nucleus_that_there_is_at_the_temperature(policy):
    options = {"temperature": 2.0, "max_new_tokens": 1, "seed": 3, "num_samples": 3000}
    found = Counter(each.encoded.input_ids[-1] for each in sample(policy, TOKENIZER, ["12"], top_p=0.8, **options))
    with torch.no_grad():
        logits = policy(torch.tensor([tokens("12")])).logits[:, -1].double()
    cold, expected = (TopPLogitsWarper(0.8)(None, logits / temperature).softmax(-1)[0] for temperature in (1, 2))
    inside = expected.nonzero().flatten().tolist()
    assert set(found) == set(inside) and cold.count_nonzero() < len(inside) < len(expected)
    assert chisquare([found[token] for token in inside], 3000 * expected[inside]).pvalue > 1e-4


def test_the_same_seed_gives_the_same_samples_and_another_seed_others_whatever_the_global_generator(policy):
    def draw(seed):
        return sample(policy, TOKENIZER, PROMPTS, temperature=1.0, max_new_tokens=8, seed=seed, num_samples=3)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert draw(0) == first != draw(1)


def test_what_a_prompt_is_answered_does_not_depend_on_when_the_others_end(policy):
    """The noise of a prompt, sample and position is the same for every policy."""

    class EndsOthers(torch.nn.Module):
        config = policy.config

        def forward(self, input_ids, **inputs):
            output = policy(input_ids=input_ids, **inputs)
            if inputs["past_key_values"] is None:
                ended = (input_ids != tokens("12")[-1]).any(1) & (torch.arange(len(input_ids)) % 2 == 0)
                output.logits[ended, :, 0] = 1e4
            return output

    options = {"temperature": 1.0, "max_new_tokens": 12, "seed": 0, "num_samples": 6}
    other = EndsOthers()
    other.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    mine, theirs = sample(policy, TOKENIZER, PROMPTS, **options), sample(other, TOKENIZER, PROMPTS, **options)
    ended = [i for i, each in enumerate(theirs) if each != mine[i]]
    assert 12 < len(ended) < len(mine) and all(theirs[i].text == "" for i in ended)


def test_long_prompts_are_cut_from_the_left_to_leave_room(policy):
    (long,) = sample(policy, TOKENIZER, ["1234" * 20], temperature=0, max_new_tokens=12, seed=0)
    assert long.encoded.input_ids[: long.encoded.num_prompt] == tokens("1234" * 20)[-20:]
    assert len(long.encoded.input_ids) <= 32


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prompts": []}, "at least one prompt"),
        ({"temperature": -0.5}, "temperature > 0"),
        ({"temperature": 0, "num_samples": 2}, "num_samples=1"),
        ({"top_p": 0.0}, "top_p <= 1, got 0.0"),
        ({"max_new_tokens": 32}, "max_new_tokens from 1 to 31, got 32"),
    ],
)
def test_settings_that_cannot_work_are_refused(policy, options, words):
    with pytest.raises(ValueError, match=f"sample: expected .*{words}"):
        sample(policy, TOKENIZER, **({"prompts": ["1"], "temperature": 1.0, "max_new_tokens": 4, "seed": 0} | options))
