"""What `train` says at its end, the page and the card that it leaves: each warning where it is due; whole, escaped, in the hub's format."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pdpo import report, saved
from pdpo.encoding import TEMPLATE
from pdpo.experiments import run_preference, run_sft, run_win_rate
from pdpo.presets import PRESETS, TrainConfig
from pdpo.results import Evaluation, Run
from pdpo.summary import summary, warnings


def test_the_page_needs_nothing_else_and_shows_a_files_text_as_text(quick, tmp_path):
    evil, file = "<script>alert('x')</script> & more", tmp_path / "evil.json"
    rows = json.loads(Path(quick.data).read_text())
    texts = [
        {"prompt": f"{evil} {row['prompt']}", "responses": [f"{evil} {text}" for text in row["responses"]]} for row in rows
    ]
    file.write_text(json.dumps([row | text for row, text in zip(rows, texts, strict=True)]))
    sft = run_sft(replace(quick, data=str(file), context=200))
    runs = [sft, run_preference(sft, method="dpo", beta=0.1, steps=2), run_preference(sft, method="drdo", steps=2)]
    page = report.report([run_win_rate(run) for run in runs], {"rows": 60, evil: 1}, 7)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 7 and "http" not in page
    sources = re.findall(r"(?:src|href)=.(.{22})", page)
    assert sources == ["data:image/png;base64,"] * 3
    for text in ("DPO, beta 0.1 and DRDO", "7 held-out prompts", "began at random weights", "batch_size", str(sft.train.lr)):
        assert text in page
    assert "<td>60</td>" in page and json.loads((sft.path / "stage.json").read_text())["config"]["data"] in page


def test_the_card_is_one_that_the_hub_reads_and_a_copied_run_holds_it(quick, tmp_path):
    sft = run_sft(quick)
    run = run_preference(sft, method="odpo", beta=0.3, steps=2)
    for model, base in ((None, None), ("a/model", "a/model"), (str(tmp_path), None)):
        text = saved.model_card(replace(run, preset=replace(quick, model=model)))
        data = ModelCard(text).data
        assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", base)
        assert data.tags == ["pdpo", "sft", "odpo"] and str(tmp_path) not in text
        assert ("random weights" in text) == (model is None) and "- beta: 0.3" in text and TEMPLATE in text
        assert re.search("sha256 .*`[0-9a-f]{64}`", text)
    assert (saved.copy_run(sft, tmp_path / "out") / "README.md").read_text() == saved.model_card(sft)


# what it says beside the numbers


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


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"losses": (2.0, 1.0, 1.5)}, "lowest at step 5 (1.000, at the end 1.500): it overfits; try --sft-steps 5"),
        ({"num_prompts": 40}, "40 test prompts: sft's win rate is anything from 0."),
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
    assert warnings([evaluation(), evaluation("dpo")]) == []  # a result without trouble


def test_the_table_has_a_line_a_policy_and_three_prompts_side_by_side():
    lines = summary([evaluation(), evaluation("dpo")], num_held_out=50).splitlines()
    assert lines[0].split() == "policy held-out loss ranked right KL SBERT win rate [95 %] tokens an answer n".split()
    assert lines[2].split()[:5] == ["dpo", "2.000", "->", "1.000", "0.700"]
    assert [line.split()[-1] for line in lines[1:3]] == ["200", "200"] and "50 held-out prompts" in lines[3]
    assert lines[5:9] == ["'prompt 0'", "  chosen   'good'", "  sft      'sft 0'", "  dpo      'dpo 0'"]
