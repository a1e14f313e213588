"""KL estimators against the enumerated KL, intervals against theory, win values and grades against hand-made cases."""

import numpy as np
import pytest
import scipy.stats
import torch
from digits import DigitTokenizer, random_policy, response_logps, responses

from pdpo import toy
from pdpo.encoding import Encoded
from pdpo.evaluation import bootstrap_interval, by_prompt, sequence_kl, toy_grades, win_values
from pdpo.sampling import Sample, sample

TOKENIZER = DigitTokenizer()


# KL


def exact_kl(policy, reference, prompt: str, max_new_tokens: int) -> float:
    """KL(policy || reference) over every response to one prompt, in nats."""
    every, ids = responses(5, max_new_tokens), TOKENIZER(prompt).input_ids
    p, q = (response_logps(model, ids, every) for model in (policy, reference))
    assert p.exp().sum().item() == pytest.approx(1) == q.exp().sum().item()
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.parametrize("seeds, prompt, max_new_tokens", [((0, 1), "1 2", 4), ((2, 3), "4", 3), ((4, 5), "3 1 2 2 4", 4)])
def test_all_three_estimators_agree_with_the_enumerated_kl_and_the_exact_one_varies_least(seeds, prompt, max_new_tokens):
    policy, reference = (random_policy(seed, scale=0.25) for seed in seeds)
    expected = exact_kl(policy, reference, prompt, max_new_tokens)
    samples = sample(
        policy, TOKENIZER, [prompt], temperature=1.0, max_new_tokens=max_new_tokens, seed=0, num_samples=6000, batch_size=2000
    )
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
        with torch.no_grad():
            p, q = (
                model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] for model in (policy, reference)
            )
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        assert estimates.exact[i].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-4)
        ratio = (q - p).gather(1, torch.tensor(response)[:, None])
        assert estimates.k3[i].item() == pytest.approx((ratio.exp() - 1 - ratio).sum().item(), rel=1e-4, abs=1e-4)


def test_kl_of_equal_policies_is_zero():
    samples = sample(random_policy(0), TOKENIZER, ["1", "2 3"], temperature=1.0, max_new_tokens=6, seed=0, num_samples=10)
    estimates = sequence_kl(random_policy(0), random_policy(0), samples)
    for values in estimates[:3]:
        assert values.abs().max() == 0


# win rate


class Judge:
    """Embeds "x y" as the unit vector of direction (x, y)."""

    def embed(self, texts):
        vectors = torch.tensor([[float(number) for number in text.split()] for text in texts])
        return vectors / vectors.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "text, chosen, rejected, value",
    [
        ("1 0", "1 0", "0 1", 1.0),
        ("1 0", "0 1", "1 0", 0.0),
        ("1 0", "1 1", "1 -1", 0.5),  # as near to the one as to the other
        ("1 0", "1 1", "1 1", 0.5),
        ("1 0.1", "1 0", "0 1", 1.0),
        ("0.1 1", "1 0", "0 1", 0.0),
        ("-1 0", "0 1", "1 0", 1.0),  # cosine 0 against -1
    ],
)
def test_a_text_wins_where_it_is_nearer_to_the_chosen_response(text, chosen, rejected, value):
    assert win_values(Judge(), [text], [chosen], [rejected]).tolist() == [value]


def test_the_win_rate_is_the_mean_of_its_values_and_ties_count_half():
    values = win_values(Judge(), ["1 0"] * 4, ["1 0", "0 1", "1 1", "1 0"], ["0 1", "1 0", "1 1", "0 1"])
    assert values.tolist() == [1, 0, 0.5, 1] and values.mean() == 0.625


# intervals


def test_by_prompt_averages_neighbours():
    assert by_prompt([1, 2, 3, 4, 5, 9], 2).tolist() == [1.5, 3.5, 7] and by_prompt([1, 2], 1).tolist() == [1, 2]


def test_the_interval_is_scipys_percentile_bootstrap_interval():
    values = np.random.default_rng(1).exponential(size=60)
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    found = bootstrap_interval(values, num_resamples=20_000)
    assert found == pytest.approx(tuple(expected), abs=0.01)
    narrow = bootstrap_interval(values, num_resamples=20_000, level=0.5)
    assert found[0] < narrow[0] < values.mean() < narrow[1] < found[1]
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * values.std() / 60**0.5, rel=0.05)  # normal theory


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_covers_the_mean_about_as_often_as_it_says(level):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        low, high = bootstrap_interval(rng.random(80) < 0.6, level=level, num_resamples=400)
        covered += low <= 0.6 <= high
    assert level - 0.05 < covered / 600 < level + 0.04


def test_the_interval_is_reproducible_and_depends_on_its_seed():
    values = np.arange(20.0)
    assert bootstrap_interval(values) == bootstrap_interval(values.tolist()) != bootstrap_interval(values, seed=1)


def test_with_a_row_for_each_seed_the_interval_covers_seeds_too():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 200))
    apart = noise + np.array([[-1.0], [0.0], [1.0]])  # seeds that differ much more than the mean over prompts does
    low, high = bootstrap_interval(apart)
    narrow_low, narrow_high = bootstrap_interval(apart.mean(0))
    assert high - low > 5 * (narrow_high - narrow_low)
    draws = rng.integers(3, size=(4000, 3)), rng.integers(200, size=(4000, 200))  # a slow loop
    means = [apart[seeds][:, prompts].mean() for seeds, prompts in zip(*draws, strict=True)]
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.08)
    assert bootstrap_interval(noise[0]) == bootstrap_interval(noise[:1])  # one seed adds nothing


@pytest.mark.parametrize("values", [[], [1.0], [[[1.0, 2.0]]], [[1.0], [2.0]], [1.0, float("nan")], [1.0, float("inf")]])
def test_values_without_an_interval_are_refused(values):
    with pytest.raises(ValueError, match="bootstrap_interval: expected at least 2 finite values.*by_prompt"):
        bootstrap_interval(values)


# grades


def test_toy_grades_are_the_columns_of_grade():
    prompt = "What is the capital of France?"
    texts = [
        ("Certainly! The capital of France is Paris. Ask me anytime.", True),
        ("Rome.", True),
        ("Ugh. Paris.", True),
        ("The capital of France is Paris.", False),
        ("", True),
    ]
    columns = toy_grades([Sample(prompt, text, Encoded([], 0), finished) for text, finished in texts])
    assert {key: values.tolist() for key, values in columns.items()} == {
        "score": [10, 2, 6, 1, 1],
        "correct": [1, 0, 1, 0, 0],
        "degenerate": [0, 0, 0, 1, 1],
        "courteous": [1, 0, 0, 0, 0],
        "neutral": [0, 0, 0, 0, 0],
        "curt": [0, 1, 0, 0, 0],
        "rude": [0, 0, 1, 0, 0],
    }
    assert all(columns[tone].dtype == float for tone in toy.TONE_SCORES)
