"""Precision, memory and the cached reference: what makes training fit and fast without changing what is computed."""

import copy
import functools
import gc
from dataclasses import replace

import pytest
import stages
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from pdpo import experiments, making, training
from pdpo.checkpoint import fitting_micro_batch
from pdpo.device import choose_precision
from pdpo.encoding import Encoded
from pdpo.models import Float32Head, load_policy, with_float32_head, with_fused_gelu
from pdpo.presets import TrainConfig, get_preset
from pdpo.training import Row, train, train_step

CONFIG = TrainConfig("dpo", 3, 8, 1e-3, beta=0.3, micro_batch_size=16)


def small_policy(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "eos_token_id": 0, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def some_rows(num=8):
    tokens = torch.randint(1, 40, (num, 2, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        Row(tuple(Encoded([1, 2, 3 + i % 3] + each + [0], 3) for each in pair), 0.1, (-20.0, -21.0))
        for i, pair in enumerate(tokens)
    ]


def adamw(policy):
    return torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)


def test_the_fused_gelu_is_gpt2s_gelu(tmp_path):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    torch.testing.assert_close(ACT2FN["gelu_pytorch_tanh"](x), ACT2FN["gelu_new"](x), rtol=0, atol=1e-12)
    plain = small_policy().eval()
    fused = with_fused_gelu(copy.deepcopy(plain))
    assert type(fused.transformer.h[1].mlp.act) is type(ACT2FN["gelu_pytorch_tanh"])
    ids = torch.arange(12)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path)  # as GPT-2 comes: "gelu_new"
    loaded = load_policy(replace(get_preset("tiny"), model=str(tmp_path), context=16))
    assert loaded.config.activation_function == "gelu_pytorch_tanh"
    assert type(loaded.transformer.h[0].mlp.act) is type(ACT2FN["gelu_pytorch_tanh"])


def test_precision_follows_the_gpu_and_is_float32_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = [choose_precision(capability) for capability in ((9, 0), (8, 0), (7, 5), None)]
    assert found == ["bfloat16", "bfloat16", "float16", "float32"]


def test_large_logits_stay_exact_under_bfloat16():
    def large():
        policy = small_policy().eval()
        policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone() * 400)  # logits of about 100
        return policy

    rows = some_rows()
    exact = training.policy_logps(large(), rows).detach()
    in_bfloat16 = (training.policy_logps(large(), rows, precision="bfloat16") - exact).abs().mean()
    policy = with_float32_head(large())
    assert type(policy.lm_head) is Float32Head
    better = (training.policy_logps(policy, rows, precision="bfloat16") - exact).abs().mean()
    # what the layers below lose is left; the head's own rounding is gone
    assert better < 0.7 * in_bfloat16
    torch.testing.assert_close(training.policy_logps(policy, rows).detach(), exact)
    other = copy.deepcopy(policy)
    other.lm_head.weight.data.zero_()
    assert not torch.equal(training.policy_logps(other, rows), exact)  # a copy has its own head


def test_the_loss_scaler_changes_nothing_but_the_rounding():
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        policy = small_policy()
        record = train_step(policy, adamw(policy), some_rows(), CONFIG, scaler=scaler)
        weights.append(policy.state_dict())
        assert record["grad_norm"] < 100  # measured after unscaling
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=2e-5)


def test_a_step_that_overflows_is_left_out_and_the_scale_halved():
    policy, scaler = small_policy(), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before, optimizer = copy.deepcopy(policy.state_dict()), adamw(policy)
    record = train_step(policy, optimizer, [replace(row, offset=9.0) for row in some_rows()], CONFIG, scaler=scaler)
    assert record["grad_norm"] == float("inf") or record["grad_norm"] != record["grad_norm"]
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_float32_weights(precision, tmp_path):
    policy, config = small_policy(), replace(CONFIG, precision=precision)
    history = train(policy, some_rows(), config, show_progress=False, checkpoint=tmp_path / "c.pt", checkpoint_seconds=0)
    exact = train(small_policy(), some_rows(), CONFIG, show_progress=False)
    assert policy.dtype == torch.float32
    assert [each["loss"] for each in history[1:]] == pytest.approx([each["loss"] for each in exact[1:]], abs=0.05)
    resumed = small_policy(1)
    assert train(resumed, some_rows(), config, show_progress=False, checkpoint=tmp_path / "c.pt") == history
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), policy.parameters(), strict=True))


def test_out_of_memory_once_halves_the_micro_batch_and_keeps_the_gradient_and_twice_is_one_clear_error(monkeypatch, capsys):
    expected = train(small_policy(), some_rows(), CONFIG, show_progress=False)
    real, room, tries = training.row_losses, 8, []

    def row_losses(policy, rows, config, **arguments):
        tries.append(2 * len(rows))
        if 2 * len(rows) > room and policy.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
        return real(policy, rows, config, **arguments)

    monkeypatch.setattr(training, "row_losses", row_losses)
    history = train(small_policy(), some_rows(), CONFIG, show_progress=False)
    assert tries == [16] + [8] * 6  # the first step failed once; later ones know
    assert "going on with 8" in capsys.readouterr().out
    for mine, plain in zip(history, expected, strict=True):
        assert mine == pytest.approx(plain, rel=1e-4, abs=1e-6)
    room = 4
    with pytest.raises(ValueError, match=r"out of memory twice, .* micro batches of 8 .*Tried to allocate 2.00"):
        train(small_policy(), some_rows(), CONFIG, show_progress=False)


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

    def counting_step(*arguments, **more):
        alive.append(num_models())
        return real_step(*arguments, **more)

    @functools.wraps(real_pass)  # whose code the reference's file is known by
    def counting_pass(policy, rows, **more):
        passes.append(len(rows))
        return real_pass(policy, rows, **more)

    preset = stages.preset(tmp_path, checkpoint_seconds=1e9)
    preset = replace(preset, sft=replace(preset.sft, steps=2, num_evaluations=1))
    sft = experiments.run_sft(preset)
    others = num_models()
    monkeypatch.setattr(training, "train_step", counting_step)
    monkeypatch.setattr(making, "with_reference_logps", counting_pass)
    runs = [
        experiments.run_preference(sft, method=method, beta=beta, steps=1, num_evaluations=1)
        for method, beta in (("dpo", 0.1), ("dpo", 0.3), ("odpo", 0.3))
    ]
    assert len(passes) == 2  # training and held-out rows, once
    assert passes[0] == preset.preference.batch_size  # of the former those that the one step draws
    assert set(alive) == {others + 1}
    for run in runs:  # the policy begins as the reference, through the file's numbers, too
        assert run.history[1]["loss"] > 0 and run.history[0]["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert runs[0].history[1]["loss"] == pytest.approx(0.6931, abs=1e-3)
    other = experiments.run_sft(preset, seed=1)
    experiments.run_preference(other, method="dpo", beta=0.1, steps=1, num_evaluations=1)
    assert len(passes) == 4  # another SFT policy, another reference
