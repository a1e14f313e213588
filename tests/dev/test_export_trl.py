"""`python -m pdpo export-trl`, then `trl dpo` on the folder, against `run_preference`: step by step. Written for trl 1.16.0.

How to run it: as tests/dev/test_against_trl.py, with filelock and tqdm installed as well.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed; the first lines of this file say how to run it")

from trl import DPOTrainer
from trl.scripts import dpo

from pdpo import experiments, making, training
from pdpo.__main__ import main
from pdpo.presets import PRESETS

STEPS, WARMUP, LR, BETA = 60, 3, 2e-3, 0.3
NAMES = {  # TRL's name -> ours
    "loss": "loss",
    "grad_norm": "grad_norm",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "learning_rate": "lr",
}
TRL = [str(Path(sys.executable).with_name("trl")), "dpo"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "trl.scripts.dpo"]


@pytest.fixture(scope="module")
def preset():
    tiny = PRESETS["tiny"]
    preference = replace(tiny.preference, steps=STEPS, lr=LR, num_evaluations=1)
    return replace(tiny, sft=replace(tiny.sft, steps=40, num_evaluations=1), preference=preference)


@pytest.fixture(scope="module")
def exported(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "trl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", preset)
        assert main(["export-trl", str(folder), "--preset", "tiny", "--beta", str(BETA)]) == 0
    return folder


@pytest.fixture(scope="module")
def ours(preset):
    """Our history, one dict a step from the first one on."""
    return experiments.run_preference(experiments.run_sft(preset), method="dpo", beta=BETA).history[1:]


def trl_history(folder: Path, *options: str, command=TRL, steps: int = STEPS) -> list[dict]:
    """What TRL logs, at full precision: its own command, in a process of its own, with a checkpoint after the last step."""
    save = f"--config dpo.yaml --max_steps {steps} --save_strategy steps --save_steps {steps}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *save, *options], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((folder / "trained" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def test_every_pair_that_trl_tokenises_is_ours(exported, preset, monkeypatch):
    trainers, rows = [], []
    monkeypatch.setattr(DPOTrainer, "train", lambda self, **_: trainers.append(self))
    monkeypatch.setattr(DPOTrainer, "save_model", lambda *_: None)
    monkeypatch.chdir(exported)
    dpo.main(*dpo.make_parser().parse_args_and_config(["--config", "dpo.yaml"]))

    class Stop(Exception):
        pass

    def stop(policy, encoded, config, **_):
        rows.extend(encoded)
        raise Stop

    sft = experiments.run_sft(preset)
    monkeypatch.setattr(making, "train", stop)
    with pytest.raises(Stop):
        experiments.run_preference(sft, method="dpo", beta=BETA / 2)  # another beta: not there yet; the same pairs
    theirs, size = trainers[0].train_dataset, preset.preference.batch_size
    order = [i for step in range(STEPS) for i in training.batch_indices(len(rows), size, seed=0, step=step)]
    assert len(theirs) == len(order) == STEPS * size
    for i, row in zip(order, theirs, strict=True):
        for key, sequence in zip(("chosen_ids", "rejected_ids"), rows[i].sequences, strict=True):
            assert row["prompt_ids"] + row[key] == sequence.input_ids
            assert len(row["prompt_ids"]) == sequence.num_prompt


def test_trl_takes_our_steps(exported, ours):
    theirs = trl_history(exported)
    compared = WARMUP + 1  # the loss of step n is of the weights that the rates of the n - 1 steps before it made
    for name, mine in NAMES.items():
        for one, other in list(zip(theirs, ours, strict=True))[: WARMUP if name == "learning_rate" else compared]:
            assert one[name] == pytest.approx(other[mine], rel=1e-4, abs=1e-6), (name, other["step"])
    assert abs(theirs[1]["loss"] - theirs[0]["loss"]) > 0.01  # log 2 alone would say nothing about the data
    assert theirs[-1]["loss"] == pytest.approx(ours[-1]["loss"], abs=0.02)  # the cosine's one step hardly matters


def test_accelerate_takes_the_same_steps_with_the_batch_in_parts(exported, ours):
    theirs = trl_history(
        exported, "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4", command=ACCELERATE, steps=3
    )
    for one, other in zip(theirs, ours, strict=False):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), (name, other["step"])
