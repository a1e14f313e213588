"""KL estimators against the enumerated KL, win values and grades against hand-made cases, a reward head whose truth is known."""

import pytest
import torch
from digits import DigitTokenizer, random_policy, response_logps, responses

from pdpo import toy
from pdpo.encoding import Encoded, encode_records
from pdpo.evaluation import fit_reward_head, last_hidden, response_scores, sequence_kl, toy_grades, win_values
from pdpo.models import load_policy, train_tokenizer
from pdpo.presets import Preset
from pdpo.sampling import Sample, sample

TOKENIZER = DigitTokenizer()


def test_all_three_estimators_agree_with_the_enumerated_kl_and_the_exact_one_varies_least():
    policy, reference = (random_policy(seed, scale=0.25) for seed in (0, 1))
    every, ids = responses(5, 4), TOKENIZER("1 2").input_ids
    p, q = (response_logps(model, ids, every) for model in (policy, reference))
    expected = (p.exp() * (p - q)).sum().item()
    samples = sample(policy, TOKENIZER, ["1 2"], temperature=1.0, max_new_tokens=4, seed=0, num_samples=6000, batch_size=2000)
    assert len({each.finished for each in samples}) == 2  # responses that end, and responses that do not
    estimates = sequence_kl(policy, reference, samples, batch_size=1500)
    for values in (estimates.exact, estimates.k1, estimates.k3):
        values = values.double()
        assert values.shape == (6000,)
        error = (values.std() / 6000**0.5).item()
        assert abs(values.mean().item() - expected) < 4 * error and error < 0.1 * expected
    assert estimates.exact.var() < estimates.k1.var() and estimates.exact.var() < estimates.k3.var()
    assert (estimates.exact >= 0).all() and (estimates.k3 >= -1e-6).all() and (estimates.k1 < 0).any()


def test_kl_of_each_sample_is_its_own_sum_in_the_order_of_the_samples():
    policy, reference = random_policy(0), random_policy(1)
    samples = sample(policy, TOKENIZER, ["1", "12 34", "3 1 2"], temperature=1.0, max_new_tokens=6, seed=0, num_samples=5)
    estimates = sequence_kl(policy, reference, samples, batch_size=4)
    for i, each in enumerate(samples):
        prompt, response = each.encoded.input_ids[: each.encoded.num_prompt], each.encoded.input_ids[each.encoded.num_prompt :]
        assert estimates.num_tokens[i] == len(response)
        p, q = (response_logps(model, prompt, [tuple(response)]).item() for model in (policy, reference))
        assert estimates.k1[i].item() == pytest.approx(p - q, abs=1e-4)


class Judge:
    """Embeds "x y" as the unit vector of direction (x, y)."""

    def embed(self, texts):
        vectors = torch.tensor([[float(number) for number in text.split()] for text in texts])
        return vectors / vectors.norm(dim=1, keepdim=True)


def test_a_text_wins_where_it_is_nearer_to_the_chosen_response_and_ties_count_half():
    cases = [
        ("1 0", "1 0", "0 1", 1.0),
        ("1 0", "0 1", "1 0", 0.0),
        ("1 0", "1 1", "1 -1", 0.5),  # as near to the one as to the other
        ("-1 0", "0 1", "1 0", 1.0),  # cosine 0 against -1
    ]
    texts, chosen, rejected, values = (list(column) for column in zip(*cases, strict=True))
    assert win_values(Judge(), texts, chosen, rejected).tolist() == values


def test_toy_grades_are_the_columns_of_grade():
    texts = ["Certainly! The capital of France is Paris. Ask me anytime.", "Ugh. Paris.", "The capital of France is Paris."]
    samples = [Sample("What is the capital of France?", text, Encoded([], 0), text[0] != "T") for text in texts]
    columns = toy_grades(samples)
    assert columns.pop("score").tolist() == [10, 6, 1] and columns.pop("correct").tolist() == [1, 1, 0]
    assert columns.pop("degenerate").tolist() == [0, 0, 1]  # not finished, and so of no tone
    assert {tone: values.tolist() for tone, values in columns.items()} == {
        "courteous": [1, 0, 0], "neutral": [0, 0, 0], "curt": [0, 0, 0], "rude": [0, 1, 0],
    }  # fmt: skip


def test_last_hidden_is_the_state_at_the_end_of_each_response_whatever_is_padded():
    records = toy.load()[:5]
    tokenizer = train_tokenizer(records, vocab_size=300)
    policy = load_policy(Preset("t", vocab_size=300, embedding=16, layers=1, heads=2, context=128), tokenizer=tokenizer)
    encoded = encode_records(tokenizer, records, max_length=128)
    found = last_hidden(policy, encoded, batch_size=7)
    assert found.shape == (5, 4, 16)
    for i, record in enumerate(encoded):
        for k, each in enumerate(record):
            with torch.no_grad():
                alone = policy.base_model(input_ids=torch.tensor([each.input_ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(found[i, k], alone, rtol=1e-4, atol=1e-5)
    encoded[1] = encoded[1][:2]  # a record of another K
    weights = torch.randn(16, generator=torch.Generator().manual_seed(0))
    scores = response_scores(policy, encoded, weights, batch_size=7)
    assert [len(each) for each in scores] == [4, 2, 4, 4, 4]
    for i, each in enumerate(scores):
        torch.testing.assert_close(torch.tensor(each), found[i, : len(each)] @ weights, rtol=1e-4, atol=1e-5)


def test_the_reward_head_recovers_the_direction_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([2.0, -1.0, 0.0, 0.5])
    features = torch.randn(4000, 2, 4, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0])  # in units of their own
    margin = (features[:, 0] - features[:, 1]) @ truth
    swap = torch.rand(4000, generator=generator) > margin.sigmoid()
    features[swap] = features[swap].flip(1)
    weights = fit_reward_head(features, weight_decay=1e-5)
    assert torch.nn.functional.cosine_similarity(weights[[0, 1, 3]], truth[[0, 1, 3]], dim=0) > 0.98
    assert weights.norm() == pytest.approx(truth.norm().item(), rel=0.15)
