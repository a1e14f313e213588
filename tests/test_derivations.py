"""Breaks each derivation in notebooks 01 to 05 and sees the notebook's own assertion fail.

A case takes the notebook's cells from the .ipynb as they are, changes one expression in one of them, and runs the cells up to and
including that of the assertion in a fresh namespace. The unchanged cells pass; the changed ones must raise AssertionError.
"""

import json
import re
from pathlib import Path

import pytest
import torch

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"

# fmt: off
# (notebook, text in the cell whose assertion must fail, text of the derivation, what to put in its place, what that breaks);
# the first text is in one cell of the notebook, the second once in the cells up to that one
CASES = [
    # 01
    ("01", "for k in range(4):\n    values", "-(g[:, None] - scores)", "-(g[:, None])", "step (b) without the shift"),
    ("01", "for k in range(4):\n    values", "torch.exp(-g) * torch.exp(-Z", "torch.exp(-Z", "step (c) loses exp(-g)"),
    ("01", "for k in range(4):\n    values", "scores[k].exp() * torch.exp(-Z * u)", "scores[k] * torch.exp(-Z * u)", "step (d) no exp"),
    ("01", "logistic_variance = ", "math.pi**2 / 3) < 1e-8", "1.0) < 1e-8", "the variance that the paper's proof states"),
    ("01", "def win_probability", "-(r_w - r_l - offset)", "-(r_w - r_l)", "the offset does not shift the argument"),
    ("01", "def win_probability", "-(r_w - r_l - offset)", "-(r_w - r_l + offset)", "the offset shifts the wrong way"),
    ("01", "def reward_loss", "torch.exp(r_w) / (torch", "r_w / (torch", "the reward model's likelihood without an exp"),
    ("01", "def reward_loss", "(r_w + 100, r_l + 100), reward", "(r_w + 100, r_l), reward", "a shift of one score only"),
    # 02
    ("02", "def ranking_probability", "stage = math.exp(left[0])", "stage = left[0]", "no exp in the numerator"),
    ("02", "def ranking_probability", "left.pop(0)", "left.pop()", "the chosen response stays in the race"),
    ("02", "for K in range(2, 7):\n    some_scores", "(some_scores[orders]).exp()", "(some_scores[orders]).neg()", "no exp"),
    ("02", "first, second = ", "torch.sigmoid(first - second)", "torch.sigmoid(second - first)", "K = 2 with the pair reversed"),
    ("02", "noisy = {", "gumbel_ranking(scores.", "gumbel_ranking(2 * scores.", "other scores than the tested ones"),
    ("02", "assert all(verdict", '"correct": (torch.exp, torch.exp)', '"correct": (identity, identity)', "Eq. 39 as printed, without exp"),
    # 03
    ("03", 'print("policy      reward', "return reward - beta * kl", "return reward - kl", "the objective loses beta"),
    ("03", "Z = unnormalised.sum()", "(scores / beta).exp()", "scores.exp()", "the optimum loses beta"),
    ("03", "Z = unnormalised.sum()", "(scores / beta).exp()", "(scores / beta)", "the optimum loses its exp"),
    ("03", "Z = unnormalised.sum()", "(scores / beta).exp()", "(scores * beta).exp()", "beta the wrong way round"),
    ("03", "gap = beta * Z.log()", "distance = beta * (", "distance = (", "the identity loses beta"),
    ("03", "gap = beta * Z.log()", "policy_logps - optimum.log()", "policy_logps - reference_logps", "KL to the reference"),
    ("03", "recovered = ", "+ b * log_partition", "+ log_partition", "the implicit reward's log Z loses beta"),
    ("03", "projected = ", "rewards - beta * log_partition", "rewards - log_partition", "the projection of Theorem 1 loses beta"),
    ("03", "def project(reward)", "(reward):\n    return reward -", "(reward):\n    return reward +", "Proposition 1 with a wrong sign"),
    # 04
    ("04", "def plain_dpo", "reward_w = beta * (", "reward_w = (", "DPO loses a beta"),
    ("04", "def plain_dpo", "policy_l - reference_l", "policy_l", "DPO loses the reference of the rejected response"),
    ("04", "def plain_dpo", "-(reward_w - reward_l)", "-(reward_l - reward_w)", "chosen and rejected swapped"),
    ("04", "def plain_plackett_luce", "rewards[:, k:]", "rewards[:, k + 1 :]", "the chosen response missing from its own choice"),
    ("04", "def plain_plackett_luce", "torch.exp(rewards[:, k:])", "rewards[:, k:].abs()", "Plackett-Luce without the exp"),
    ("04", "errors = (formula", "return -beta * weight", "return -weight", "the gradient loses beta"),
    ("04", "errors = (formula", "torch.sigmoid(-margin)", "torch.sigmoid(margin)", "the gradient's weight of the wrong sign"),
    ("04", "def population_dpo", "reference_logps[j], BETA)\n    backward", "reference_logps[j], 1.0)\n    backward", "one beta of two"),
    ("04", "best_b = ", "reward = scores - BETA * (", "reward = scores - (", "the policy gradient's KL price loses beta"),
    ("04", "best_b = ", "torch.eye(256) - probabilities", "torch.eye(256)", "the gradient of log pi without its normaliser"),
    # 05
    ("05", "def plain_odpo", "(margin - offset)", "margin", "the offset does not shift the argument"),
    ("05", "def plain_odpo", "torch.log(score_w - score_l)", "(score_w - score_l)", "the offset loses its log"),
    ("05", "def plain_odpo", "margin = beta * (policy_w", "margin = (policy_w", "the margin loses a beta"),
    ("05", "def softmax_margin", "torch.exp(reward_l + cost)", "torch.exp(reward_l)", "the cost is not added"),
    ("05", "found = population_minimiser", "beta=beta / (1 + alpha)", "beta=beta * (1 + alpha)", "the prediction the wrong way round"),
    ("05", "found = population_minimiser", "a * (s_w - s_l)", "a * (s_w - s_l).abs()", "an offset that is not signed"),
    ("05", "dpo_tilted = ", "beta=0.5 / 2.0)", "beta=0.5)", "the tilted reference loses alpha"),
]
# fmt: on


def code_cells(number: str) -> list[str]:
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [source for source in sources if "google.colab" not in source and not source.startswith("# NBVAL_IGNORE_OUTPUT")]


def up_to(cells: list[str], assertion: str) -> list[str]:
    (last,) = [number for number, cell in enumerate(cells) if assertion in cell]
    assert re.search(r"^\s*assert ", cells[last], re.MULTILINE), "the cell asserts nothing"
    return cells[: last + 1]


@pytest.fixture(autouse=True)
def restore_torch():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def run(cells: list[str]) -> None:
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"<cell {number}>", "exec"), namespace)


@pytest.mark.parametrize(
    ("number", "assertion", "text", "broken", "what"), CASES, ids=[f"{case[0]}: {case[4]}" for case in CASES]
)
def test_broken_derivation_fails_the_notebooks_own_assertion(number, assertion, text, broken, what):
    cells = up_to(code_cells(number), assertion)
    found = [k for k, cell in enumerate(cells) if text in cell]
    assert len(found) == 1 and cells[found[0]].count(text) == 1, f"{text!r} is in cells {found}; say which one is meant"
    cells[found[0]] = cells[found[0]].replace(text, broken)
    with pytest.raises(AssertionError) as failure:
        run(cells)
    assert str(failure.traceback[-1].frame.code.raw.co_filename) == f"<cell {len(cells) - 1}>", "another cell failed first"


@pytest.mark.parametrize("number", sorted({case[0] for case in CASES}))
def test_unbroken_derivations_pass(number):
    cells = code_cells(number)
    last = max(len(up_to(cells, case[1])) for case in CASES if case[0] == number)
    run(cells[:last])
