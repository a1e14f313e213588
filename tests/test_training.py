"""Training: gradients that do not depend on micro batches, runs that survive being killed, limits that coincide."""

import copy
import json
import math
import random
import signal
import time
from dataclasses import asdict, replace

import pytest
import torch
import worker

from pdpo import toy
from pdpo.checkpoint import load_checkpoint, save_checkpoint
from pdpo.data import pairs
from pdpo.encoding import collate, encode
from pdpo.evaluation import last_hidden
from pdpo.losses import drdo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from pdpo.models import train_tokenizer, with_reward_head
from pdpo.presets import TrainConfig
from pdpo.training import (
    Row,
    batch_indices,
    drawn_rows,
    evaluate_rows,
    learning_rate,
    micro_batches,
    policy_logps,
    preference_rows,
    row_losses,
    shared_policy_logps,
    train,
    train_step,
    with_reference_logps,
)

DPO = TrainConfig("dpo", 5, 8, 1e-3, beta=0.1)


def gradient(policy) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


def same(one, other) -> bool:
    """Whether two (nested) results are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def step_without_update(policy, rows, config) -> tuple[dict, torch.Tensor]:
    """What train_step reports and the gradient it leaves; clipping is out of the way."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    return train_step(policy, optimizer, rows, replace(config, max_grad_norm=1e9)), gradient(policy)


# one step


@pytest.mark.parametrize("method, micro_batch_size", [("sft", 1), ("dpo", 4), ("drdo", 4), ("plackett_luce", 10)])
def test_micro_batches_give_the_gradient_of_one_batch(method, micro_batch_size):
    policy, rows, config = worker.parts(method)
    rows = rows[:13]
    whole, expected = step_without_update(policy, rows, replace(config, micro_batch_size=1000))
    parts, found = step_without_update(policy, rows, replace(config, micro_batch_size=micro_batch_size))
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-5)


def test_micro_batches_hold_every_row_once_and_no_more_sequences_than_allowed():
    _, rows, _ = worker.parts("plackett_luce")
    for limit, logps_of in ((1, policy_logps), (9, policy_logps), (9, shared_policy_logps), (100, shared_policy_logps)):
        parts = micro_batches(range(len(rows)), rows, limit, logps_of)
        assert sorted(i for part in parts for i in part) == list(range(len(rows)))
        assert all(sum(len(rows[i].sequences) for i in part) <= max(limit, 4) for part in parts)
        ordered = [rows[i] for part in parts for i in part]
        keys = [row.num_tokens if logps_of is policy_logps else row.sequences[0].input_ids for row in ordered]
        assert keys == sorted(keys)


def test_the_sft_loss_is_transformers_own_loss_with_its_gradient():
    policy, rows, config = worker.parts("sft")
    rows = rows[:16]
    record, found = step_without_update(policy, rows, config)
    batch = collate([row.sequences[0] for row in rows], pad_id=0)
    labels = batch.input_ids.masked_fill(~batch.response_mask, -100)
    policy.zero_grad()
    loss = policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=labels).loss
    loss.backward()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert (found - gradient(policy)).norm() < 1e-5 * found.norm()


@pytest.mark.parametrize(
    "method, expected", [("dpo", math.log(2)), ("plackett_luce", math.log(24)), ("ipo", 25.0), ("edpo", None)]
)
def test_the_loss_starts_at_the_logarithm_of_the_number_of_rankings_or_at_the_squared_target(method, expected):
    policy, rows, config = worker.parts(method)
    expected = expected or sum(row.offset**2 for row in rows) / len(rows)
    record, _ = step_without_update(policy, rows, config)
    evaluated = evaluate_rows(policy, rows, config)
    for found in (record, {key.removeprefix("eval_"): value for key, value in evaluated.items()}):
        assert found["loss"] == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert found["accuracy"] == pytest.approx(0.5)  # not the sign of rounding errors
        for key in ("margin", "chosen_reward", "rejected_reward"):
            assert found[key] == pytest.approx(0, abs=1e-5)


def test_methods_on_means_and_kto_take_each_rows_own_lengths_and_another_rows_response():
    policy, _, config = worker.parts("dpo")
    tokenizer, records = train_tokenizer(toy.load()[::40], vocab_size=400), pairs(toy.load()[::40])[::20]
    moved = {}
    for method, beta in (("simpo", None), ("orpo", None), ("drdo", None), ("ipo", 0.3), ("kto", 0.3)):
        changed = replace(config, method=method, beta=beta, mean_logps=method in ("drdo", "ipo"))
        rows = preference_rows(tokenizer, records, changed)
        if method in ("ipo", "kto"):
            rows = with_reference_logps(policy, rows, micro_batch_size=9)
        learner = with_reward_head(copy.deepcopy(policy), seed=0) if method == "drdo" else copy.deepcopy(policy)
        with torch.no_grad():
            for weight in learner.transformer.parameters():
                weight.mul_(0.9)
            moved[method] = rows, learner, row_losses(learner, rows, changed)
    tokens = torch.tensor([[len(encode(tokenizer, each.prompt, text).input_ids) - rows[i].sequences[0].num_prompt
                            for text in each.responses] for i, each in enumerate(records)])  # fmt: skip
    rows, learner, (losses, measured) = moved["kto"]
    logps, reference = policy_logps(learner, rows).detach(), torch.tensor([row.reference_logps for row in rows])
    mean, reference_mean = logps[:, :2] / tokens, reference[:, :2] / tokens
    torch.testing.assert_close(moved["simpo"][2][0], simpo_loss(*mean.unbind(1), scale=2.0, offset=1.0).losses)
    torch.testing.assert_close(moved["orpo"][2][0], orpo_loss(*mean.unbind(1), weight=0.1).losses)
    expected = ipo_loss(*mean.unbind(1), *reference_mean.unbind(1), beta=0.3).losses
    torch.testing.assert_close(moved["ipo"][2][0], expected)
    # KTO's third response is the next record's chosen one behind this record's prompt
    for i, record in enumerate(records):
        other = records[(i + 1) % len(records)].responses[0]
        assert rows[i].sequences[2] == encode(tokenizer, record.prompt, other)
    kl = (logps - reference)[:, 2].mean().clamp(min=0)
    expected = kto_loss(*logps[:, :2].unbind(1), *reference[:, :2].unbind(1), kl, beta=0.3).losses
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.stack([measured["chosen_logp"], measured["rejected_logp"]], 1), logps[:, :2])
    drdo_rows, learner, (losses, measured) = moved["drdo"]
    scores = torch.stack([measured["chosen_reward"], measured["rejected_reward"]])
    differences = torch.tensor([row.offset for row in drdo_rows])
    expected = drdo_loss(*mean.unbind(1), *scores, differences, torch.zeros_like(differences)).losses
    torch.testing.assert_close(losses.detach(), expected)
    with pytest.raises(ValueError, match="expected mean_logps False for dpo, got True"):
        replace(config, mean_logps=True)


def test_reference_logps_equal_recomputation_one_by_one_and_keep_the_order():
    policy, rows, _ = worker.parts("plackett_luce")
    again = with_reference_logps(policy, [Row(row.sequences, 0.25) for row in rows], micro_batch_size=9)
    for row, stored in zip(rows, again, strict=True):
        alone = policy_logps(policy, [row])[0]
        torch.testing.assert_close(torch.tensor(stored.reference_logps), alone, rtol=1e-6, atol=1e-5)
        assert stored.sequences == row.sequences and stored.offset == 0.25


def test_two_ranked_responses_under_plackett_luce_are_dpo():
    policy, rows, config = worker.parts("dpo")
    train(policy, rows, replace(config, steps=5), show_progress=False)  # away from the reference
    (losses, measured), (ranked_losses, ranked) = (
        row_losses(policy, rows, replace(config, method=method)) for method in ("dpo", "plackett_luce")
    )
    assert losses.std() > 0.01
    torch.testing.assert_close(losses, ranked_losses, rtol=1e-5, atol=1e-6)
    assert same(measured, ranked)


def test_an_offset_and_label_smoothing_reach_the_loss():
    policy, rows, config = worker.parts("odpo")
    offsets = [0.0, 1.0, -2.0, 0.5]
    rows = [replace(row, offset=offset) for row, offset in zip(rows, offsets, strict=False)]
    for smoothing in (0.0, 0.25):
        losses, _ = row_losses(policy, rows, replace(config, label_smoothing=smoothing))
        expected = [math.log1p(math.exp(each)) - smoothing * each for each in offsets]  # at margin 0, -log sigmoid(-offset)
        torch.testing.assert_close(losses.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method, formula",
    [
        ("slic", lambda w, l, margin, offset: (2 - w + l).clamp(min=0) - 0.5 * w),
        ("ipo", lambda w, l, margin, offset: (margin / 0.5 - 1) ** 2),
        ("edpo", lambda w, l, margin, offset: (offset - margin) ** 2),
        ("unlikelihood", lambda w, l, margin, offset: -w + 0.25 * l),
        ("preferred-ft", lambda w, l, margin, offset: -w),
    ],
)
def test_a_method_trains_on_its_papers_formula(method, formula):
    policy, rows, config = worker.parts(method)
    policy.lm_head.weight.data *= 3  # away from the reference
    logps, reference = policy_logps(policy, rows).detach(), torch.tensor([row.reference_logps for row in rows])
    if config.beta is None:
        reference = 0.0 * logps
    weights = {"unlikelihood_weight": 0.25, "slic_weight": 0.5}
    losses, measured = row_losses(policy, rows, replace(config, beta=config.beta and 0.5, **weights))
    margins = (0.5 if config.beta else 1.0) * (logps - reference)
    margins = margins[:, 0] - margins[:, 1]
    expected = formula(logps[:, 0], logps[:, 1], margins, torch.tensor([row.offset for row in rows]))
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured["margin"], margins, rtol=1e-4, atol=1e-4)
    assert margins.std() > 0.1


@pytest.mark.parametrize("method", ["oracle", "drdo"])
def test_drdo_and_its_oracle_train_on_scores_of_the_last_hidden_state_by_the_papers_formulas(method):
    policy, rows, config = worker.parts(method)
    losses, measured = row_losses(policy, rows, replace(config, drdo_alpha=0.7, drdo_gamma=1.0))
    logps = policy_logps(policy, rows)
    chosen, rejected = (last_hidden(policy, [row.sequences for row in rows]) @ policy.reward_head).unbind(1)
    if method == "oracle":  # Eq. 5
        expected = -0.99 * (chosen - rejected).sigmoid().log() - 0.01 * logps[:, 0]
    else:  # Eq. 6
        weight = (logps[:, 1] - logps[:, 0]).sigmoid()
        contrast = logps[:, 0] - (1 - logps[:, 1].exp()).log()
        expected = (torch.tensor([row.offset for row in rows]) - (chosen - rejected)) ** 2 - 0.7 * weight * contrast
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured["margin"], (chosen - rejected).detach(), rtol=1e-4, atol=1e-5)
    policy.zero_grad()
    losses.sum().backward()  # the scores train the whole network, not the head alone
    assert policy.reward_head.grad.norm() > 0 and all(each.grad.norm() > 0 for each in policy.transformer.h.parameters())


@pytest.mark.parametrize("reference_logp, scaler", [(math.nan, torch.amp.GradScaler("cpu")), (math.inf, None)])
def test_a_loss_that_is_not_finite_is_refused_and_the_policy_stays_as_it_was(reference_logp, scaler):
    policy, rows, config = worker.parts("dpo")
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    rows[3] = replace(rows[3], reference_logps=(reference_logp, 0.0))
    with pytest.raises(ValueError, match="train_step: expected a finite loss.*Lower the learning rate"):
        train_step(policy, torch.optim.AdamW(policy.parameters(), lr=1.0), rows[:8], config, scaler=scaler)
    assert same(before, dict(policy.state_dict()))


# the schedule


@pytest.mark.parametrize("num_rows, batch_size", [(10, 4), (3, 8), (64, 32)])
def test_batches_are_pure_and_every_epoch_holds_every_row_once(num_rows, batch_size):
    steps = 3 * num_rows
    batches = [batch_indices(num_rows, batch_size, seed=1, step=step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    torch.manual_seed(0)
    assert batches[::-1] == [batch_indices(num_rows, batch_size, seed=1, step=step) for step in reversed(range(steps))]
    flat = [i for batch in batches for i in batch]
    epochs = [flat[start : start + num_rows] for start in range(0, len(flat), num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    if num_rows > 3:
        assert epochs[0] != epochs[1] and batches[0] != batch_indices(num_rows, batch_size, seed=2, step=0)
    for num in (1, 2, steps):
        config = replace(DPO, steps=num, batch_size=batch_size, seed=1)
        assert drawn_rows(num_rows, config) == sorted({i for batch in batches[:num] for i in batch})


def test_the_learning_rate_warms_up_to_its_peak_and_falls_to_a_tenth():
    config = TrainConfig("sft", 100, 1, 2.0, warmup=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert (rates[10], rates[55], rates[100]) == pytest.approx((2.0, 1.1, 0.2))  # 55 is half way down the cosine
    assert learning_rate(replace(config, steps=1), 0) == 2.0


@pytest.mark.parametrize("method", ["sft", "plackett_luce", "edpo", "drdo"])
def test_training_lowers_the_loss_and_its_history_has_a_dict_a_step_with_measurements_where_asked(method):
    policy, rows, config = worker.parts(method)
    config, seen = replace(config, steps=11, num_evaluations=2), []
    history = train(
        policy, rows, config, held_out=rows, show_progress=False,
        measure=lambda policy: seen.append(policy.training) or {"eval_kl": 0.5},
    )  # fmt: skip
    assert [record["step"] for record in history] == list(range(12))
    measured = [record for record in history if "eval_loss" in record]
    assert [record["step"] for record in measured] == [0, 5, 10, 11]
    assert measured == [record for record in history if record.get("eval_kl") == 0.5] and len(seen) == 4
    assert measured[-1]["eval_loss"] < measured[0]["eval_loss"] - (0.5 if method == "sft" else 0.05)
    assert not policy.training  # ready to sample from
    assert [record["lr"] for record in history[1:]] == [learning_rate(config, step) for step in range(11)]
    assert history[-1]["epoch"] == pytest.approx(11 * 8 / len(rows))
    of_pairs = {"margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"}
    assert set(history[1]) == {"loss", "grad_norm", "lr", "epoch", "step"} | (set() if method == "sft" else of_pairs)
    json.dumps(history)
    unmeasured = train(
        policy, rows, replace(config, num_evaluations=0), held_out=rows, measure=seen.append, show_progress=False
    )
    assert not any("eval_loss" in record for record in unmeasured) and len(seen) == 4


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sgd_moves_against_the_clipped_gradient_and_adam_by_the_learning_rate(optimizer):
    policy, rows, config = worker.parts("dpo")
    _, slope = step_without_update(policy, rows, config)
    before = torch.cat([weight.detach().flatten() for weight in policy.parameters()])
    config = replace(config, optimizer=optimizer, steps=1, batch_size=len(rows), max_grad_norm=0.01)
    (_, record) = train(policy, rows, config, show_progress=False)
    moved = before - torch.cat([weight.detach().flatten() for weight in policy.parameters()])
    assert record["grad_norm"] > 0.1  # before clipping
    if optimizer == "sgd":  # as far as the gradient after clipping, whatever its own norm
        assert moved.norm().item() == pytest.approx(config.lr * 0.01, rel=1e-3)
        assert torch.nn.functional.cosine_similarity(moved, slope, dim=0) > 0.999
    else:  # each weight that has a gradient by the learning rate, whatever the gradient's norm
        assert moved.abs().max().item() == pytest.approx(config.lr, rel=1e-2)


# refusals


@pytest.mark.parametrize(
    "change, words",
    [
        ({"method": "ppo"}, "method in .*'plackett_luce'.*got 'ppo'"),
        ({"beta": None}, "beta > 0 for dpo, got None.*a larger beta keeps the policy closer to the reference"),
        ({"beta": 0.0}, "beta > 0"),
        ({"beta": math.nan}, "beta > 0"),
        ({"beta": math.inf}, "finite beta > 0"),
        ({"method": "sft"}, "beta None for sft"),
        ({"alpha": -0.1}, "alpha >= 0 .* got -0.1"),
        ({"alpha": math.nan}, "finite alpha >= 0"),
        ({"offset_scale": "cubic"}, "offset_scale .* 'cubic'"),
        ({"method": "slic", "label_smoothing": 0.1}, "label_smoothing 0 for slic"),
        ({"method": "edpo", "beta": None}, "beta > 0 for edpo"),
        ({"method": "drdo"}, "beta None for drdo"),
        ({"drdo_alpha": math.inf}, "drdo_alpha and drdo_gamma >= 0, got inf and 2.0"),
        ({"drdo_gamma": -1.0}, "drdo_gamma >= 0, got 0.1 and -1.0"),
        ({"optimizer": "lion"}, "'adam' or 'sgd', got 'lion'"),
        ({"precision": "float64"}, "precision in .*got 'float64'"),
        ({"steps": 0}, "got steps 0"),
        ({"steps": 2**70}, r"micro_batch_size from 1, num_evaluations from 0 to 2\*\*31 - 1"),
        ({"batch_size": 0}, "got batch_size 0"),
        ({"micro_batch_size": 0}, "got micro_batch_size 0"),
        ({"num_evaluations": -1}, "got num_evaluations -1"),
        ({"lr": 0.0}, "lr > 0"),
        ({"lr": math.nan}, "lr > 0"),
        ({"lr": math.inf}, "finite lr > 0"),
        ({"seed": -1}, "a seed from 0"),
        ({"seed": 2**63}, "a seed from 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, words):
    with pytest.raises(ValueError, match=f"TrainConfig: expected .*{words}"):
        replace(DPO, **change)


@pytest.mark.parametrize(
    "method, rows, words",
    [
        ("sft", lambda rows: [], "at least one row"),
        ("drdo", None, "drdo expected a policy with a reward head"),
        ("dpo", lambda rows: [replace(row, reference_logps=None) for row in rows], r"rows \[0, 1.*with_reference_logps"),
        ("dpo", lambda rows: [replace(rows[0], sequences=rows[0].sequences * 2)], r"K = 2 responses, got K in \[4\].*data.pairs"),
        ("plackett_luce", lambda rows: [*rows, replace(rows[0], sequences=rows[0].sequences[:3])], r"one K >= 2.*\[3, 4\]"),
    ],
)  # fmt: skip
def test_rows_that_do_not_suit_the_method_are_refused(method, rows, words):
    policy, good, config = worker.parts(method)
    if rows is None:  # another method's policy
        policy, rows = worker.parts("dpo")[0], list
    with pytest.raises(ValueError, match=f"train: .*{words}"):
        train(policy, rows(good), config, show_progress=False)


# checkpoints


def test_a_checkpoint_of_another_config_is_refused_by_the_fields_that_differ(tmp_path):
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, {"config": asdict(DPO), "history": [1]})
    assert load_checkpoint(file, asdict(DPO))["history"] == [1]
    with pytest.raises(ValueError) as caught:
        load_checkpoint(file, asdict(replace(DPO, beta=0.3, steps=9)))
    assert "beta (saved 0.1, now 0.3), steps (saved 5, now 9)." in str(caught.value) and "lr" not in str(caught.value)
    policy, rows, config = worker.parts("dpo")
    with pytest.raises(ValueError, match="these fields differ: .*seed"):
        train(policy, rows, config, checkpoint=file, show_progress=False)


@pytest.mark.parametrize("method", ["dpo", "drdo", "ppo", "rloo"])
def test_a_run_killed_at_a_random_step_and_again_while_saving_ends_with_the_bits_of_an_unbroken_one(forked, tmp_path, method):
    checkpoint = tmp_path / "checkpoint.pt"

    def saved_step() -> int:
        return torch.load(checkpoint, weights_only=True)["history"][-1]["step"]

    process = forked(worker.main, method, checkpoint)
    last = random.randrange(2, 12)
    print("killed after step", last)
    for _ in range(last + 1):  # one announcement comes before the first step
        assert process.stdout.readline() == "step\n"
        process.stdin.write("go on\n")
        process.stdin.flush()
    time.sleep(0.02 * random.random())  # anywhere in saving step `last` or in computing the next
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = saved_step()
    assert first in (last - 1, last)

    process = forked(worker.main, method, checkpoint, 17)
    announced, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert announced.count("step") == 17 - first  # it did go on, not start afresh
    assert saved_step() == 16

    assert same(worker.run(method, checkpoint), worker.run(method, None))
