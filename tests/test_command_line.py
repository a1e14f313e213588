"""`python -m pdpo`: bad input ends in one clear line, real input in a policy that transformers loads, a sweep in a table."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import transformers
from conftest import refusal
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdpo import commands, experiments, runner
from pdpo.__main__ import main
from pdpo.data import load_preferences, load_split
from pdpo.experiments import run_preference, run_sft
from pdpo.presets import PRESETS
from pdpo.saved import copy_run


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_nothing_that_takes_seconds(arguments, output):
    code = "import sys; from pdpo.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: print(*sys.modules)"
    help_text, _, modules = output("-c", code, *arguments).rstrip().rpartition("\n")
    assert "usage: python -m pdpo" in help_text
    assert {"torch", "transformers", "sklearn", "scipy", "matplotlib", "numpy", "joblib"} & set(modules.split()) == set()


# bad input


def test_a_malformed_file_gives_one_line_no_traceback_no_folder_and_exit_status_2(tmp_path):
    path, out = tmp_path / "broken.jsonl", tmp_path / "out"
    path.write_text('{"prompt": "a", "chosen": "b"}\n', encoding="utf-8")
    command = [sys.executable, "-m", "pdpo", "train", "--data", str(path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.startswith(f"error: {path}, line 1: key 'rejected'") and done.stderr.count("\n") == 1


def test_what_cannot_be_done_is_refused_before_anything_is_trained(monkeypatch, capsys, tmp_path):
    """And results never overwrite what is there; `train`: test_trust.py."""
    monkeypatch.setattr(experiments, "run_sft", lambda *_, **__: pytest.fail("training began"))
    (tmp_path / "few.json").write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}]')
    assert "expected enough prompts" in refusal(capsys, "sweep", "--data", str(tmp_path / "few.json"))
    assert "beta > 0" in refusal(capsys, "sweep", "--data", "toy", "--beta", "nan")
    (tmp_path / "kept_frontier.png").write_text("mine")
    refused = refusal(capsys, "sweep", "--data", "toy", "--out", str(tmp_path / "kept.csv"))
    assert "kept_frontier.png: expected a new file, got one" in refused
    assert "expected --data toy" in refusal(capsys, "train", "--data", "x.json", "--method", "ppo", "--reward", "toy-gold")
    assert "expected a folder that `train --out` wrote" in refusal(capsys, "sample", str(tmp_path), "Hello")
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    assert "pip install tensorboard" in refusal(capsys, "train", "--data", "toy", "--log", "tensorboard")


# run


def test_run_names_the_notebooks_there_are_and_tells_one_from_its_continuation(tmp_path, capsys):
    assert "00_start_here" in refusal(capsys, "run", "--preset", "tiny", "--notebooks", "77")
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


# train and sweep


def test_train_takes_a_users_file_without_scores_by_every_method_and_leaves_policies_that_load(
    quick, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(PRESETS, "tiny", quick)
    records = load_preferences("toy")[::16][:60]
    rows = [{"prompt": each.prompt, "chosen": each.responses[0], "rejected": each.responses[-1]} for each in records]
    file, out, methods = tmp_path / "mine.jsonl", tmp_path / "out", ["ipo", "edpo", "drdo", "simpo", "orpo", "kto"]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--preset", "tiny", "--data", str(file), "--steps", "3", "--out", str(out)]
    assert main(["train", *options, "--method", *methods]) == 0
    printed = capsys.readouterr().out
    assert trained == ["sft", "ipo", "edpo", "oracle", "drdo", "simpo", "orpo", "kto"]
    assert "edpo: " in printed and "drdo: the oracle is" in printed
    for method in methods:
        assert f"{method}: held out, before -> after: loss " in printed and f"\n{method} " in printed
        policy, saved = AutoModelForCausalLM.from_pretrained(out / method), AutoTokenizer.from_pretrained(out / method)
        assert policy.config.vocab_size == len(saved) and (out / method / "reward_head.json").exists() == (method == "drdo")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(methods) + 1 and f"{out / 'report.html'}" in printed
    assert all(f"<th>{name}</th>" in page for name in ("chosen", "sft", *methods))


def test_on_the_toy_what_dpo_replaces_learns_from_a_reward_model_or_from_the_gold_score_which_stands_in_the_table(
    quick, trained, tmp_path, monkeypatch, capsys
):
    parts = load_split("toy")
    monkeypatch.setattr(experiments, "load_split", lambda name: tuple(part[::12] for part in parts))
    monkeypatch.setattr("pdpo.data.load_split", experiments.load_split)
    monkeypatch.setitem(PRESETS, "tiny", replace(quick, data="toy"))
    methods = ["ppo", "rloo", "unlikelihood", "preferred-ft"]
    options = ["train", "--preset", "tiny", "--method", *methods, "--steps", "2"]
    assert main([*options, "--reward", "toy-gold", "--out", str(tmp_path / "gold")]) == 0
    assert trained == ["sft", "unlikelihood", "preferred-ft"]
    printed, page = capsys.readouterr().out, (tmp_path / "gold" / "report.html").read_text(encoding="utf-8")
    for method in methods:
        assert f"{method}: held out, before -> after: " in printed and f"\n{method} " in printed
        AutoModelForCausalLM.from_pretrained(tmp_path / "gold" / method)
    assert "<td>num_samples</td><td></td><td>4</td>" in page and ", gold " in printed
    assert main(options[:4] + ["ppo", "--steps", "2"]) == 0
    assert trained[3:] == ["oracle"]  # the same SFT policy; its score is another one, and so another stage is made
    capsys.readouterr()
    assert main(["sweep", "--preset", "tiny", "--method", "sft"]) == 0
    header, row = (line.split() for line in capsys.readouterr().out.splitlines()[-3:-1])
    assert header == ["method", "beta", "seed", "n", "eval_loss", "kl", "win", "win_low", "win_high", "score"]
    assert row[0] == "sft" and 1 <= float(row[-1]) <= 10


def test_a_sweep_makes_every_stage_once_and_prints_and_saves_one_table(quick, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", quick)
    options = ["sweep", "--preset", "tiny", "--method", "sft", "dpo", "drdo", "--beta", "0.1", "0.3", "--seeds", "0", "1"]
    assert main([*options, "--steps", "3", "--lr", "1e-3", "--out", str(tmp_path / "new" / "table.csv")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sorted(trained) == ["dpo"] * 4 + ["drdo"] * 2 + ["oracle"] * 2 + ["sft"] * 2
    with open(tmp_path / "new" / "table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["beta"], row["seed"]) for row in rows] == [
        ("sft", "", "0"), ("sft", "", "1"), ("dpo", "0.1", "0"), ("dpo", "0.3", "0"), ("dpo", "0.1", "1"), ("dpo", "0.3", "1"),
        ("drdo", "", "0"), ("drdo", "", "1"),
    ]  # fmt: skip
    run = experiments.run_preference(experiments.run_sft(quick, seed=1), method="dpo", beta=0.3, steps=3, lr=1e-3)
    assert float(rows[5]["eval_loss"]) == run.history[-1]["eval_loss"]
    with open(tmp_path / "new" / "table_frontier.csv", encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    assert [(row["method"], row["beta"]) for row in points] == [("SFT", ""), ("DPO", "0.1"), ("DPO", "0.3"), ("DRDO", "")]
    assert float(points[2]["kl"]) == pytest.approx((float(rows[3]["kl"]) + float(rows[5]["kl"])) / 2)
    assert (tmp_path / "new" / "table_frontier.png").read_bytes()[1:4] == b"PNG"
    for row in rows:
        assert float(row["win_low"]) <= float(row["win"]) <= float(row["win_high"])
        assert (float(row["kl"]) < 1e-6) == (row["method"] == "sft")
    # on the finished stages: the same table, nothing trained again
    assert main([*options, "--steps", "3", "--lr", "1e-3"]) == 0
    table = capsys.readouterr().out.splitlines()[-12:]
    assert len(trained) == 10 and table == printed[-13:-1] and table[0].split() == list(rows[0])
    assert table[3] == table[8] == "" and "each method's in a unit of its own" in table[-1]
    num = len({each.prompt for each in load_split(quick.data)[2]})
    assert {line.split()[-6] for line in table[1:-1] if line} == {str(num)}  # n


def test_a_saved_policy_answers_as_it_was_trained_here_and_through_transformers(quick, tmp_path, monkeypatch, capsys):
    """`sample`, and `pipeline("text-generation")` with the chat template that lies in the folder, give the same greedy answer."""
    long = replace(quick, sft=replace(quick.sft, steps=150))
    sft = run_sft(long)
    folders = [str(copy_run(each, tmp_path / each.method)) for each in (sft, run_preference(sft, method="dpo", beta=0.1))]
    prompt = load_split(quick.data)[2][0].prompt
    assert main(["sample", folders[0], prompt, "--compare", folders[1], "--max-new-tokens", "12"]) == 0
    first, answer, other = capsys.readouterr().out.splitlines()
    assert first == prompt and answer.startswith("  sft: ") and other.startswith("  dpo: ")
    generate = transformers.pipeline("text-generation", model=folders[0], device="cpu")
    (found,) = generate([{"role": "user", "content": prompt}], do_sample=False, max_new_tokens=12)
    reply = found["generated_text"][-1]["content"]
    assert reply.strip() and answer.removeprefix("  sft: ").removesuffix(" ...") == reply.strip()

    lines = iter([prompt, ""])
    monkeypatch.setattr("builtins.input", lambda question: next(lines, None) or (_ for _ in ()).throw(EOFError))
    assert main(["sample", folders[0], "--chat", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.splitlines() == [answer.replace("sft: ", "")]


def test_the_log_for_tensorboard_holds_every_number_and_is_written_once(quick, monkeypatch, capsys):
    writer, run = mock.MagicMock(), run_sft(quick)  # for torch.utils.tensorboard's, which needs a package that few have
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    commands._tensorboard(run)
    (folder,) = writer.call_args.args
    rows = [call.args for call in writer.return_value.__enter__.return_value.add_scalar.call_args_list]
    assert folder.endswith(f"tensorboard/{run.path.name}") and len(rows) == sum(map(len, run.history))
    assert ("train/loss", run.history[3]["loss"], 3) in rows and ("held_out/loss", run.history[0]["eval_loss"], 0) in rows
    os.makedirs(folder)
    commands._tensorboard(run)
    assert writer.call_count == 1 and "tensorboard --logdir" in capsys.readouterr().out
