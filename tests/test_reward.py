"""The reward model: its features, a head whose truth is known, and calibration on predictions made by hand."""

import numpy as np
import pytest
import torch
from pdpo.reward import calibration, fit_reward_head, last_hidden

from pdpo import toy
from pdpo.encoding import encode_records
from pdpo.models import load_policy, train_tokenizer
from pdpo.presets import Preset


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


def test_calibration_by_hand():
    # confidences .55 (right), .45 -> .55 (wrong), .95 (right), 1 (right)
    rows, error = calibration([0.55, 0.45, 0.95, 1.0], num_bins=5)
    assert [(row["right"], row["pairs"]) for row in rows] == [(0.5, 2), (1.0, 2)]
    assert [row["confidence"] for row in rows] == pytest.approx([0.55, 0.975])
    assert error == pytest.approx((2 * 0.05 + 2 * 0.025) / 4)


def test_calibration_of_true_probabilities_is_good_and_of_exaggerated_ones_is_not():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    of_truth = np.where(right, logits, -logits)  # the log-odds given to what turned out to be true
    assert calibration(1 / (1 + np.exp(-of_truth)))[1] < 0.01
    assert calibration(1 / (1 + np.exp(-3 * of_truth)))[1] > 0.1
