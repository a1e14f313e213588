"""The hand-over to TRL, without TRL: what the folder holds is what `run_preference` would train on, or there is no folder.

tests/dev/test_export_trl.py runs TRL on it.
"""

import json
import os
from dataclasses import replace

import pytest
import stages
import torch
from conftest import refusal
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from pdpo import experiments, export, making
from pdpo.__main__ import main
from pdpo.encoding import Encoded
from pdpo.export import export_trl
from pdpo.presets import PRESETS, TrainConfig
from pdpo.training import batch_indices, learning_rate


@pytest.fixture(scope="module")
def many_steps(tmp_path_factory):
    """Some 100 pairs, and steps for more than an epoch of them."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PDPO_RUNS_DIR", str(folder / "runs"))
        made = stages.preset(folder)
        preference = replace(made.preference, steps=40, lr=5e-6)
        yield replace(made, sft=replace(made.sft, steps=2, num_evaluations=1), preference=preference)


@pytest.fixture(scope="module")
def exported(many_steps, tmp_path_factory):
    return export_trl(many_steps, tmp_path_factory.mktemp("exports") / "one", beta=0.3, seed=1)


@pytest.fixture
def training(many_steps, monkeypatch):
    """The rows and the config that `run_preference` would train with."""

    class Stop(Exception):
        pass

    def stop(policy, rows, config, **_):
        raise Stop(rows, config)

    sft = experiments.run_sft(many_steps, seed=1)
    monkeypatch.setattr(making, "train", stop)
    with pytest.raises(Stop) as stopped:
        experiments.run_preference(sft, method="dpo", beta=0.3)
    return stopped.value.args


# what is handed over


def test_the_rows_are_those_of_every_step_of_run_preference_token_by_token(exported, training):
    rows, config = training
    lines = [json.loads(line) for line in (exported / "train.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(exported / "policy")
    order = [i for step in range(config.steps) for i in batch_indices(len(rows), config.batch_size, seed=1, step=step)]
    assert len(order) > 2 * len(rows)  # more than two epochs
    for i, line in zip(order, lines, strict=True):
        prompt = tokenizer(line["prompt"]).input_ids
        texts = [line["prompt"] + line[key] + tokenizer.eos_token for key in ("chosen", "rejected")]
        tokens = [Encoded(tokenizer(text).input_ids, len(prompt)) for text in texts]
        assert tuple(tokens) == rows[i].sequences


def test_the_config_is_run_preferences_and_its_paths_are_relative(exported, training):
    yaml = pytest.importorskip("yaml", reason="PyYAML reads dpo.yaml for this test")
    settings, config = yaml.safe_load((exported / "dpo.yaml").read_text()), training[1]
    expected = {
        "beta": config.beta, "max_steps": config.steps, "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.lr, "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm,
        "seed": config.seed, "bf16": False, "fp16": False, "train_sampling_strategy": "sequential",
        "disable_dropout": True, "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected
    assert settings["learning_rate"] == 5e-6  # written 5e-06, YAML 1.1 would take it for text
    assert config.optimizer == "adam" and config.label_smoothing == 0
    for path in (settings["model_name_or_path"], settings["datasets"][0]["data_files"]):  # the folder can be moved
        assert not os.path.isabs(path) and (exported / path).exists()


@pytest.mark.parametrize("steps", [1, 60])
def test_the_schedule_handed_over_warms_up_as_ours_and_then_is_one_step_ahead_and_precision_goes_with_it(steps):
    config = TrainConfig("dpo", steps, 8, 2e-4, beta=0.1)
    written = export._settings(config, max_length=64)
    optimizer, warmup = (
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=written["learning_rate"]),
        written["warmup_steps"],
    )
    theirs = get_scheduler(written["lr_scheduler_type"], optimizer, warmup, steps, written["lr_scheduler_kwargs"])
    for step in range(steps):
        ours = learning_rate(config, step if step < warmup else step + 1)
        assert theirs.get_last_lr() == pytest.approx([ours], rel=1e-5)
        optimizer.step(), theirs.step()
    for precision, bf16, fp16 in [("bfloat16", True, False), ("float16", False, True)]:
        written = export._settings(replace(config, precision=precision), max_length=64)
        assert (written["bf16"], written["fp16"]) == (bf16, fp16)


def test_the_policy_is_the_sft_stages_without_dropout_and_the_folder_says_how_to_go_on(many_steps, exported):
    policy = AutoModelForCausalLM.from_pretrained(exported / "policy")
    sft = experiments.run_sft(many_steps, seed=1).load_policy().state_dict()
    assert all(torch.equal(value, sft[name]) for name, value in policy.state_dict().items())
    assert policy.config.resid_pdrop == policy.config.embd_pdrop == policy.config.attn_pdrop == 0
    text = (exported / "README.md").read_text()
    for words in ("trl dpo --config dpo.yaml", "40 steps of 8", "warm-up (steps 1 to 2)", "steps 1 to 3 "):
        assert words in text
    assert sorted(os.listdir(exported)) == ["README.md", "dpo.yaml", "policy", "train.jsonl"]


# what is refused


def test_what_cannot_be_handed_over_is_refused_in_one_line_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "run_sft", lambda *_, **__: pytest.fail("training began"))
    (tmp_path / "kept.txt").write_text("mine")
    for options, word in [
        ([str(tmp_path / "out"), "--method", "odpo"], "`python -m pdpo train --method odpo`"),
        ([str(tmp_path / "out"), "--beta", "0"], "beta > 0"),
        ([str(tmp_path)], "empty or a new folder"),
    ]:
        assert word in refusal(capsys, "export-trl", "--data", "toy", *options) and os.listdir(tmp_path) == ["kept.txt"]


@pytest.mark.parametrize("prompt", ["".join(map(str, range(99))), "say <|endoftext|> please"], ids=["cut", "a special token"])
def test_pairs_that_trl_would_tokenise_otherwise_are_refused_before_anything_is_trained(
    many_steps, tmp_path, monkeypatch, prompt
):
    monkeypatch.setattr(experiments, "run_sft", lambda *_, **__: pytest.fail("training began"))
    rows = [{"prompt": f"{i} {prompt}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    preset = replace(many_steps, data=str(tmp_path / "data.json"))
    with pytest.raises(ValueError, match=r"got 34 of 34 that it does not, .*Leave such rows out"):
        export_trl(preset, tmp_path / "out", beta=0.1)
    assert not (tmp_path / "out").exists()


def test_the_command_exports_into_an_empty_folder_and_says_what_to_run(many_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "small", many_steps)
    (tmp_path / "out").mkdir()
    assert main(["export-trl", str(tmp_path / "out"), "--preset", "small", "--steps", "3", "--seed", "1"]) == 0
    assert f"cd {tmp_path / 'out'} && trl dpo --config dpo.yaml" in capsys.readouterr().out
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 3 * 8
