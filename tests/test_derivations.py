"""Breaks each derivation in notebooks 01 to 05 (with 04b) and sees the notebook's own assertion fail.

A case takes the notebook's cells from the .ipynb as they are, changes one expression in one of them, and runs the cells up to and
including that of the assertion, in a fork of a process that has run the cells before the broken one. The unchanged cells pass; the
changed ones must raise AssertionError.
"""

import contextlib
import io
import json
import os
import re
import traceback
from pathlib import Path

import pytest
from conftest import Forked

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"

# fmt: off
# (notebook, text in the cell whose assertion must fail, text of the derivation, what to put in its place, what that breaks);
# the first text is in one cell of the notebook, the second once in the cells up to that one
CASES = [
    # 01
    ("01", "for k in range(4):\n    values", "torch.exp(-g) * torch.exp(-Z", "torch.exp(-Z", "step (c) loses exp(-g)"),
    ("01", "for k in range(4):\n    values", "scores[k].exp() * torch.exp(-Z * u)", "scores[k] * torch.exp(-Z * u)", "step (d) no exp"),
    ("01", "logistic_variance = ", "math.pi**2 / 3) < 1e-8", "1.0) < 1e-8", "the variance that the paper's proof states"),
    ("01", "def win_probability", "-(r_w - r_l - offset)", "-(r_w - r_l)", "the offset does not shift the argument"),
    ("01", "def reward_loss", "torch.exp(r_w) / (torch", "r_w / (torch", "the reward model's likelihood without an exp"),
    ("01", "def game(num_drawn)", "(scores + game_noise", "(game_noise", "a game in which the scores do not count"),
    ("01", "def reflected_density", '(name == "pair" or noise_name', "(noise_name", "the claim that any other noise gives another curve"),
    ("01", "def bin_shares", "edges / scale", "2 * edges / scale", "a logistic of another scale"),
    ("01", '"logsigmoid": ', "-torch.nn.functional.logsigmoid(r_w - r_l)", "-torch.sigmoid(r_w - r_l).log()", "the log of a sigmoid"),
    # 02
    ("02", "def ranking_probability", "stage = math.exp(left[0])", "stage = left[0]", "no exp in the numerator"),
    ("02", "for K in range(2, 7):\n    some_scores", "(some_scores[orders]).exp()", "(some_scores[orders]).neg()", "no exp"),
    ("02", "first, second = ", "torch.sigmoid(first - second)", "torch.sigmoid(second - first)", "K = 2 with the pair reversed"),
    ("02", "noisy = {", "gumbel_ranking(scores.", "gumbel_ranking(2 * scores.", "other scores than the tested ones"),
    ("02", "assert all(verdict", '"correct": (torch.exp, torch.exp)', '"correct": (identity, identity)', "Eq. 39 as printed, without exp"),
    ("02", "equation_10 = ", "scores[j].exp() / scores[j:]", "scores[j] / scores[j:]", "Eq. 10 without the exp of Eq. 9"),
    ("02", "rest = scores[1:]", "torch.stack(joint) / below[-1].prod()", "torch.stack(joint)", "Yellott's step without the division"),
    ("02", "reflected = ", "(three - gumbel_sample", "(three + gumbel_sample", "worst first with noise that is not reflected"),
    ("02", "assert odds_rows[-1]", "many[:size] + noise", "1.1 * many[:size] + noise", "other odds than the axiom's"),
    ("02", "shared = torch.stack", "noise[:, 1], noise[:, 1]]", "noise[:, 1], another]", "two buses with a noise of their own"),
    ("02", "rest = scores[1:]", "runner_up(cut, normal_density, normal_cdf)", "runner_up(cut, *gumbel)", "any noise forgets the winner"),
    ("02", "excess = ", "squared.mean() / (traces[1] / n)", "1.0", "4.63 winners at every n: the formula for large n is exact"),
    # 03
    ("03", 'print("policy      reward', "return reward - beta * kl", "return reward - kl", "the objective loses beta"),
    ("03", "Z = unnormalised.sum()", "(scores / beta).exp()", "scores.exp()", "the optimum loses beta"),
    ("03", "gap = beta * Z.log()", "distance = beta * (", "distance = (", "the identity loses beta"),
    ("03", "recovered = ", "+ b * log_partition", "+ log_partition", "the implicit reward's log Z loses beta"),
    ("03", "projected = ", "rewards - 2.0 * log_z", "rewards - log_z", "the projection of Theorem 1 loses beta"),
    ("03", "def project(reward)", "(reward):\n    return reward -", "(reward):\n    return reward +", "Proposition 1 with a wrong sign"),
    ("03", "minus_kl, bound = ", "(p_said * (t - 1))", "(p_said * (1 - t))", "Gibbs' inequality with the tangent turned round"),
    ("03", "def optimum_at(beta)", "(small_scores / beta)", "(small_scores * beta)", "bars with beta the wrong way round"),
    ("03", "growth = ", ".logsumexp(1)", ".exp().sum(1)", "Lemma 1's denominator without its logarithm"),
    ("03", "read_off = ", "torch.logit(against_first)", "against_first.log()", "the converse of Lemma 1 with a log for the logit"),
    ("03", "as_printed = ", "shift, f[:, 0] / beta", "shift, f[:, 0]", "Lemma 2 with the report's exponent, r / beta + f"),
    ("03", "with_scores = ", "beta * (found[[w, l]] - reference", "(found[[w, l]] - reference", "a preference read off without beta"),
    # 04
    ("04", "def plain_dpo", "reward_w = beta * (", "reward_w = (", "DPO loses a beta"),
    ("04", "def plain_dpo", "policy_l - reference_l", "policy_l", "DPO loses the reference of the rejected response"),
    ("04", "def plain_plackett_luce", "rewards[:, k:]", "rewards[:, k + 1 :]", "the chosen response missing from its own choice"),
    ("04", "errors = (formula", "-beta * weight * (", "-weight * (", "the gradient loses beta"),
    ("04", "def population_dpo", "reference_logps[j], BETA)\n    backward", "reference_logps[j], 1.0)\n    backward", "one beta of two"),
    ("04", "for beta in (0.1, 0.3", "torch.full((5,), math.log(2))", "torch.full((5,), (1 + beta) * math.log(2))", "6.2: starts higher"),
    ("04", "step_errors = ", "loss_of_pair(i, j).item()) / (2 * step)", "loss_of_pair(i, j).item()) / step", "half the step forgotten"),
    ("04", "pull = {", "b * torch.sigmoid(-b", "torch.sigmoid(-b", "the gradient's prefactor without its beta"),
    ("04", "pull[beta](200.0)", "torch.sigmoid(-b * torch.as_tensor(u))", "torch.relu(1 - torch.as_tensor(u) * b)", "where pulling stops"),
    ("04", "before = kl_divergence", "(p * forward + (1 - p) * backward)", "(p * forward)", "labels that all follow one order"),
    ("04", "descents = {", "* softplus(-margin) + (1 -", "* beta * softplus(-margin) + beta * (1 -", "the smallest loss rises with beta"),
    ("04", "descents = {", "> few.scores[b]).double()", "> few.scores[b]).double() * 0.9 + 0.05", "score labels, one in twenty flipped"),
    # 04b
    ("04b", "best_b = ", "torch.eye(256) - probabilities", "torch.eye(256)", "the gradient of log pi without its normaliser"),
    ("04b", "best_b = ", "2 * average", "1.1 * average", "the report's: subtracting any B reduces variance"),
    ("04b", "relative_P = ", "target / pi - b)", "target - b)", "the energy-based reward without its policy"),
    ("04b", "variances = {}", "torch.tensor([1.0, 0.0])", "torch.tensor([0.9, 0.1])", "the report's: subtracting its B reduces variance"),
    ("04b", "def L_H", "return -H", "return H", "the report's entropy sign"),
    ("04b", "climbed = {}", "reward - others", "reward", "climbers without a baseline"),
    ("04b", "shifted_losses = ", "moved[torch.cat([w, l])] -= shift", "moved[w] -= shift", "only the chosen are pushed down"),
    # 05
    ("05", "def plain_odpo", "(margin - offset)", "margin", "the offset does not shift the argument"),
    ("05", "def under_the_sigmoid", "torch.sigmoid(margins - offset)", "torch.sigmoid(margins + offset)", "shifted the wrong way"),
    ("05", "def softmax_margin", "torch.exp(reward_l + cost)", "torch.exp(reward_l)", "the cost is not added"),
    ("05", "def softmax_margin", "bonus=max(-offset", "bonus=-max(-offset", "a negative offset that charges the chosen"),
    ("05", "same_verdict = ", "1 + p_positive, 1 - (1 - p_positive)", "2 * p_positive, 2 * p_positive", "scores spread over all of (0, 2)"),
    ("05", "predicted = optimal", "beta=beta / (1 + alpha)", "beta=beta * (1 + alpha)", "the prediction the wrong way round"),
    ("05", "predicted = optimal", "a * (s_w - s_l)", "a * (s_w - s_l).abs()", "an offset that is not signed"),
    ("05", "dpo_tilted = ", "beta=0.5 / 2.0)", "beta=0.5)", "the tilted reference loses alpha"),
    ("05", "path[1000, 0] > path[300", "torch.ones(len(i))", "torch.full((len(i),), 0.9)", "score labels, one in ten flipped: a minimiser"),
    ("05", "gains = {}", "difference[:, shuffle]", "difference", "a control that is not shuffled"),
    ("05", "gains = {}", "endless[:, 0], endless[:, 1]", "frontier_kl, frontier_reward", "DPO's endless path is the frontier"),
    ("05", "clean = {", "if noisy\n        else scores[a] > scores[b]", "if True\n        else None", "labels that are noisy after all"),
]
# fmt: on
NUMBERS = sorted({case[0] for case in CASES})
# cells that take seconds and that nothing but each other needs (a reader stands after what it reads): run only where they assert,
# or are what is broken
SLOW = [
    "policy = TabularPolicy(reference_logps)\nbefore = ",
    "entropy = -(p * p.log()",
    "sets = torch.stack",
    "predicted = optimal",
    "labs = [make_lab",
    "climbed = {}",
    "recovery = []",
    "theory = [",
    "five_policies = ",
]


def all_cells(number: str) -> list[dict]:
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(number: str) -> list[str]:
    cells = [cell for cell in all_cells(number) if cell["cell_type"] == "code"]
    compared = ["".join(cell["source"]) for cell in cells if "nbval-ignore-output" not in cell["metadata"].get("tags", ())]
    return [source for source in compared if "google.colab" not in source]


def place_of(cells: list[str], assertion: str) -> int:
    (last,) = [number for number, cell in enumerate(cells) if assertion in cell]
    assert re.search(r"^\s*assert ", cells[last], re.MULTILINE), "the cell asserts nothing"
    return last


def execute(number: str) -> None:
    """Prints a line of JSON for each of a notebook's cases, and one for the unbroken cells: what came of them."""
    cells, cases = code_cells(number), [case for case in CASES if case[0] == number]
    ends = [place_of(cells, case[1]) for case in cases]
    namespace = {"__name__": "notebook"}

    def run(place: int, source: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, f"<cell {place}>", "exec"), namespace)

    def say(what: str, said: str) -> None:
        os.write(1, json.dumps([what, said]).encode() + b"\n")

    def broken(start: int, end: int, text: str, replacement: str) -> str:
        try:
            run(start, cells[start].replace(text, replacement))
            for place in range(start + 1, end + 1):
                if place == end or not any(slow in cells[place] for slow in SLOW):
                    run(place, cells[place])
        except AssertionError as error:
            return f"assertion of {traceback.extract_tb(error.__traceback__)[-1].filename}"
        except Exception as error:
            return repr(error)
        return "nothing failed"

    for place in range(max(ends) + 1):
        for (_, _, text, replacement, what), end in zip(cases, ends, strict=True):
            if place <= end and text in cells[place]:
                child = os.fork()
                if not child:
                    say(what, broken(place, end, text, replacement))
                    os._exit(0)
                os.waitpid(child, 0)
        run(place, cells[place])
    say("unbroken", "passed")


@pytest.mark.parametrize("number", NUMBERS)
def test_broken_derivations_fail_the_notebooks_own_assertions_and_unbroken_ones_pass(fork_server, number):
    cells, expected = code_cells(number), {"unbroken": "passed"}
    for _, assertion, text, _, what in [case for case in CASES if case[0] == number]:
        last = place_of(cells, assertion)
        assert sum(cell.count(text) for cell in cells[: last + 1]) == 1, f"{text!r}: say which one is meant"
        expected[what] = f"assertion of <cell {last}>"
    said, errors = Forked(fork_server, execute, (number,), {}).communicate()
    assert dict(map(json.loads, said.splitlines())) == expected, errors


@pytest.mark.parametrize("number", ["00", *NUMBERS])
def test_predictions_offer_a_choice_and_fold_their_answers(number):
    """From notebook's start to end: every question has options, and its answer stands folded below them, in the same cell."""
    asked = 0
    for cell in all_cells(number)[1:]:
        if cell["cell_type"] == "markdown" and "*Predict" in "".join(cell["source"]):
            question, *answers = re.split(r"<details><summary>Answer</summary>\n\n", "".join(cell["source"]))
            assert len(answers) == 1 and answers[0].startswith("**(") and "\n\n</details>" in answers[0], question
            assert question.count("*Predict") == 1 and all(
                option in question.split("*Predict")[1] for option in ("(a)", "(b)")
            ), question
            asked += 1
    assert asked >= 1
