"""What `train` says at its end: each warning where it is due, none where it is not."""

from dataclasses import replace
from pathlib import Path

import pytest

from pdpo.presets import PRESETS, TrainConfig
from pdpo.results import Evaluation, Run
from pdpo.summary import summary, warnings


def evaluation(method="sft", *, losses=(2.0, 1.0), num_prompts=200, num_tokens=10, model="a/model", win=None):
    history = [
        {"step": 5 * i, "eval_loss": loss} | ({} if method == "sft" else {"eval_accuracy": 0.7})
        for i, loss in enumerate(losses)
    ]
    config = TrainConfig(method, 10, 4, 1e-3, beta=None if method == "sft" else 0.1)
    run = Run(Path("runs"), replace(PRESETS["small"], model=model), config, history)
    shared = {"finished": True, "chosen": "good", "rejected": "bad", "kl": 0.5, "num_tokens": num_tokens}
    rows = [
        shared | {"prompt": f"prompt {i}", "text": f"{method} {i}", "win": float(i % 2) if win is None else win}
        for i in range(num_prompts)
    ]
    return Evaluation(Path("runs"), run, rows, 1)


def test_a_result_without_trouble_has_no_warning():
    assert warnings([evaluation(), evaluation("dpo")]) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"losses": (2.0, 1.0, 1.5)}, "lowest at step 5 (1.000, at the end 1.500): it overfits; try --sft-steps 5"),
        ({"num_prompts": 6}, "6 test prompts: sft's win rate is anything from 0."),
        ({"num_prompts": 24, "win": 1.0}, "24 test prompts: sft's win rate is anything from 1.00 to 1.00"),
        ({"model": None}, "began at random weights"),
    ],
)
def test_what_the_numbers_cannot_bear_is_said(changes, words):
    (found,) = warnings([evaluation(**changes), evaluation("dpo")])
    assert words in found


def test_a_gap_in_length_and_losses_of_several_methods_are_said():
    assert "ipo's answers have 20 tokens, SFT's 10" in warnings([evaluation(), evaluation("ipo", num_tokens=20)])[0]
    assert "different units" in warnings([evaluation(), evaluation("dpo"), evaluation("ipo")])[0]


def test_the_table_has_a_line_a_policy_and_three_prompts_side_by_side():
    lines = summary([evaluation(), evaluation("dpo")], num_held_out=50).splitlines()
    assert lines[0].split() == "policy held-out loss ranked right KL SBERT win rate [95 %] tokens an answer n".split()
    assert lines[2].split()[:5] == ["dpo", "2.000", "->", "1.000", "0.700"]
    assert [line.split()[-1] for line in lines[1:3]] == ["200", "200"] and "50 held-out prompts" in lines[3]
    assert lines[5:9] == ["'prompt 0'", "  chosen   'good'", "  sft      'sft 0'", "  dpo      'dpo 0'"]
