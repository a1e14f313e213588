"""Precision, memory and the cached reference: what makes training fit and fast without changing what is computed."""

import functools
import gc
import math
from dataclasses import replace

import pytest
import stages
import torch
import worker
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from pdpo import experiments, making, training
from pdpo.checkpoint import fitting_micro_batch
from pdpo.device import choose_precision
from pdpo.encoding import Encoded
from pdpo.models import load_policy, with_float32_head
from pdpo.presets import get_preset
from pdpo.training import Row, train, train_step


def parts():
    """A policy, 8 rows, and a config of 3 steps with all of them at a time."""
    policy, rows, config = worker.parts("dpo")
    return policy, rows[:8], replace(config, steps=3, lr=1e-3, micro_batch_size=16)


def test_the_fused_gelu_is_gpt2s_gelu(tmp_path):
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    plain.save_pretrained(tmp_path)  # as GPT-2 comes: "gelu_new"
    fused = load_policy(replace(get_preset("tiny"), model=str(tmp_path), context=16)).eval()
    assert fused.config.activation_function == "gelu_pytorch_tanh"
    assert type(fused.transformer.h[1].mlp.act) is type(ACT2FN["gelu_pytorch_tanh"])
    ids = torch.arange(12)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


def test_precision_follows_the_gpu_and_is_float32_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = [choose_precision(capability) for capability in ((9, 0), (8, 0), (7, 5), None)]
    assert found == ["bfloat16", "bfloat16", "float16", "float32"]


def test_large_logits_stay_exact_under_bfloat16():
    policy, rows, _ = parts()
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone() * 400)  # logits of about 100
    policy.lm_head.__class__ = torch.nn.Linear
    exact = training.policy_logps(policy, rows).detach()
    in_bfloat16 = (training.policy_logps(policy, rows, precision="bfloat16") - exact).abs().mean()
    with_float32_head(policy)
    better = (training.policy_logps(policy, rows, precision="bfloat16") - exact).abs().mean()
    # what the layers below lose is left; the head's own rounding is gone
    assert better < 0.7 * in_bfloat16
    torch.testing.assert_close(training.policy_logps(policy, rows).detach(), exact)


def test_the_loss_scaler_changes_nothing_but_the_rounding_and_leaves_out_a_step_that_overflows():
    weights, norms, before = [], [], parts()[0].state_dict()
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12), torch.amp.GradScaler("cpu", init_scale=2.0**127)):
        policy, rows, config = parts()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
        record = train_step(policy, optimizer, [replace(row, offset=9.0) for row in rows], config, scaler=scaler)
        weights.append(dict(policy.state_dict()))
        norms.append(record["grad_norm"])  # measured after unscaling
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(weights[2], dict(before), rtol=0, atol=0)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and not math.isfinite(norms[2])
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_float32_weights(precision, tmp_path):
    resumed, rows, exact_config = parts()
    exact = train(resumed, rows, exact_config, show_progress=False)
    config, options = replace(exact_config, precision=precision), {"show_progress": False, "checkpoint": tmp_path / "c.pt"}
    policy = parts()[0]
    history = train(policy, rows, config, checkpoint_seconds=0, **options)
    assert policy.dtype == torch.float32
    assert [each["loss"] for each in history[1:]] == pytest.approx([each["loss"] for each in exact[1:]], abs=0.05)
    assert train(resumed, rows, config, **options) == history
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), policy.parameters(), strict=True))


def test_out_of_memory_once_halves_the_micro_batch_and_keeps_the_gradient_and_twice_is_one_clear_error(monkeypatch, capsys):
    policy, rows, config = parts()
    expected = train(policy, rows, config, show_progress=False)
    real, room, tries = training.row_losses, 8, []

    def row_losses(policy, rows, config, **arguments):
        tries.append(2 * len(rows))
        if 2 * len(rows) > room and policy.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
        return real(policy, rows, config, **arguments)

    monkeypatch.setattr(training, "row_losses", row_losses)
    history = train(parts()[0], rows, config, show_progress=False)
    assert tries == [16] + [8] * 6  # the first step failed once; later ones know
    assert "going on with 8" in capsys.readouterr().out
    for mine, plain in zip(history, expected, strict=True):
        assert mine == pytest.approx(plain, rel=1e-4, abs=1e-6)
    room = 4
    with pytest.raises(ValueError, match=r"out of memory twice, .* micro batches of 8 .*Tried to allocate 2.00"):
        train(parts()[0], rows, config, show_progress=False)


def test_the_micro_batch_follows_free_memory():
    with torch.device("meta"):
        medium = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    rows = [Row((Encoded([1] * 150, 60),) * 2)]
    t4, l4, h100 = (fitting_micro_batch(medium, rows, free * 2**30) for free in (13, 21, 76))
    assert 8 <= t4 < l4 < h100
    assert fitting_micro_batch(medium, rows, 2**30) == 1  # too little for anything: let it try, and say so


def test_preference_training_holds_one_model_and_all_runs_share_one_reference_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    alive, passes = [], []
    real_step, real_pass = training.train_step, making.with_reference_logps

    def num_models() -> int:
        gc.collect()
        return sum(type(each) is GPT2LMHeadModel for each in gc.get_objects())

    @functools.wraps(real_pass)  # whose code the reference's file is known by
    def counting_pass(policy, rows, **more):
        passes.append(len(rows))
        return real_pass(policy, rows, **more)

    preset = stages.preset(tmp_path, checkpoint_seconds=1e9)
    preset = replace(preset, sft=replace(preset.sft, steps=2, num_evaluations=1))
    sft = experiments.run_sft(preset)
    others = num_models()
    monkeypatch.setattr(training, "train_step", lambda *args, **more: alive.append(num_models()) or real_step(*args, **more))
    monkeypatch.setattr(making, "with_reference_logps", counting_pass)
    for method, beta in (("dpo", 0.1), ("dpo", 0.3), ("odpo", 0.3)):
        experiments.run_preference(sft, method=method, beta=beta, steps=1, num_evaluations=1)
    # training and held-out rows, once; of the former those that the one step draws
    assert len(passes) == 2 and passes[0] == preset.preference.batch_size
    assert set(alive) == {others + 1}
