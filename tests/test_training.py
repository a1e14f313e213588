"""Training: gradients that do not depend on micro batches, methods on their losses, runs that survive being killed."""

import copy
import math
import random
import signal
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import worker

from pdpo import losses as formulas
from pdpo import toy
from pdpo.checkpoint import save_checkpoint
from pdpo.data import pairs
from pdpo.encoding import collate, encode
from pdpo.evaluation import last_hidden
from pdpo.models import train_tokenizer
from pdpo.presets import WITH_HEAD, WITHOUT_REFERENCE, TrainConfig
from pdpo.training import (
    Row,
    batch_indices,
    drawn_rows,
    evaluate_rows,
    learning_rate,
    policy_logps,
    preference_rows,
    row_losses,
    train,
    train_step,
    with_reference_logps,
)

DPO = TrainConfig("dpo", 5, 8, 1e-3, beta=0.1)


def gradient(policy) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


def step_without_update(policy, rows, config) -> tuple[dict, torch.Tensor]:
    """What train_step reports and the gradient it leaves; clipping is out of the way."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    return train_step(policy, optimizer, rows, replace(config, max_grad_norm=1e9)), gradient(policy)


# one step


@pytest.mark.parametrize("method, micro_batch_size", [("sft", 1), ("drdo", 4), ("plackett_luce", 10)])
def test_micro_batches_give_the_gradient_of_one_batch(method, micro_batch_size):
    policy, rows, config = worker.parts(method)
    rows = rows[:13]
    whole, expected = step_without_update(policy, rows, replace(config, micro_batch_size=1000))
    parts, found = step_without_update(policy, rows, replace(config, micro_batch_size=micro_batch_size))
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-5)


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


@pytest.mark.parametrize("method, expected", [("dpo", math.log(2)), ("plackett_luce", math.log(24)), ("ipo", 25.0)])
def test_the_loss_starts_at_the_logarithm_of_the_number_of_rankings_or_at_the_squared_target(method, expected):
    policy, rows, config = worker.parts(method)
    record, _ = step_without_update(policy, rows, config)
    evaluated = evaluate_rows(policy, rows, config)
    for found in (record, {key.removeprefix("eval_"): value for key, value in evaluated.items()}):
        assert found["loss"] == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert found["accuracy"] == pytest.approx(0.5)  # not the sign of rounding errors
        for key in ("margin", "chosen_reward", "rejected_reward"):
            assert found[key] == pytest.approx(0, abs=1e-5)


def test_reference_logps_equal_recomputation_one_by_one_and_keep_the_order():
    policy, rows, _ = worker.parts("plackett_luce")
    again = with_reference_logps(policy, [Row(row.sequences, 0.25) for row in rows], micro_batch_size=9)
    for row, stored in zip(rows, again, strict=True):
        alone = policy_logps(policy, [row])[0]
        torch.testing.assert_close(torch.tensor(stored.reference_logps), alone, rtol=1e-6, atol=1e-5)
        assert stored.sequences == row.sequences and stored.offset == 0.25


def oracle_loss(x) -> formulas.PairLoss:  # Nath 2024, Eq. 5
    return formulas.PairLoss(0.99 * formulas.reward_model_loss(*x.scores) - 0.01 * x.logps[0], *x.scores)


def drdo_loss(x) -> formulas.PairLoss:
    return formulas.drdo_loss(*x.logps, *x.scores, x.offset, torch.zeros(len(x.offset)), alpha=0.7, gamma=1.0)


@pytest.mark.parametrize(
    "method, change, expected",
    [
        ("odpo", {}, lambda x: formulas.dpo_loss(*x.pair, beta=0.5, offset=x.offset)),
        ("dpo", {"label_smoothing": 0.2}, lambda x: formulas.dpo_loss(*x.pair, beta=0.5, offset=x.offset, label_smoothing=0.2)),
        ("plackett_luce", {}, lambda x: formulas.dpo_loss(*x.pair, beta=0.5)),  # of two responses
        ("ipo", {}, lambda x: formulas.ipo_loss(*x.pair, beta=0.5)),
        ("ipo", {"mean_logps": True}, lambda x: formulas.ipo_loss(*x.pair, beta=0.5)),
        ("edpo", {}, lambda x: formulas.reward_distillation_loss(*x.pair, x.offset, beta=0.5)),
        ("slic", {"slic_weight": 0.5}, lambda x: formulas.slic_loss(*x.pair, beta=0.5, regularization=0.5)),
        ("simpo", {}, lambda x: formulas.simpo_loss(*x.logps, scale=2.0, offset=1.0)),
        ("orpo", {}, lambda x: formulas.orpo_loss(*x.logps, weight=0.1)),
        ("unlikelihood", {"unlikelihood_weight": 0.25}, lambda x: formulas.unlikelihood_loss(*x.logps, weight=0.25)),
        ("preferred-ft", {}, lambda x: formulas.unlikelihood_loss(*x.logps, weight=0.0)),
        ("oracle", {}, oracle_loss),
        ("drdo", {"drdo_alpha": 0.7, "drdo_gamma": 1.0, "mean_logps": True}, drdo_loss),
    ],
)
def test_a_method_trains_on_its_loss_of_sums_or_means_offsets_and_scores(method, change, expected):
    policy, rows, config = worker.parts("drdo" if method in WITH_HEAD else "dpo")
    policy.lm_head.weight.data *= 3  # away from the reference
    rows = [replace(row, offset=0.1 * i) for i, row in enumerate(rows)]
    config = replace(config, method=method, beta=None if method in WITHOUT_REFERENCE else 0.5, **change)
    losses, measured = row_losses(policy, rows, config)
    tokens = [[len(ids) - num_prompt for ids, num_prompt in row.sequences] for row in rows]
    tokens = torch.tensor(tokens) if config.mean_logps or method in ("simpo", "orpo") else 1
    logps = (policy_logps(policy, rows).detach() / tokens).unbind(1)
    x = SimpleNamespace(logps=logps, offset=torch.tensor([row.offset for row in rows]))
    if method in WITH_HEAD:
        x.scores = (last_hidden(policy, [row.sequences for row in rows]) @ policy.reward_head).detach().unbind(1)
        policy.zero_grad()
        losses.sum().backward()  # the scores train the whole network, not the head alone
        assert policy.reward_head.grad.norm() > 0 and all(each.grad.norm() > 0 for each in policy.transformer.h.parameters())
    else:
        x.pair = *logps, *(torch.tensor([row.reference_logps for row in rows]) / tokens).unbind(1)
    found = expected(x)
    torch.testing.assert_close(losses.detach(), found.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured["margin"], found.margins, rtol=1e-4, atol=1e-4)
    assert losses.std() > 0.01


def test_kto_measures_its_kl_on_the_next_rows_chosen_response_behind_a_prompt():
    policy, _, config = worker.parts("dpo")
    tokenizer, records = train_tokenizer(toy.load()[::40], vocab_size=400), pairs(toy.load()[::40])[::20]
    config = replace(config, method="kto")
    rows = preference_rows(tokenizer, records, config)
    for row, record, other in zip(rows, records, records[1:] + records[:1], strict=True):
        assert row.sequences[2] == encode(tokenizer, record.prompt, other.responses[0])
    logps = policy_logps(policy, rows).detach()
    reference = logps - torch.tensor([0.5, -0.5, 2.0])
    rows = [replace(row, reference_logps=tuple(values)) for row, values in zip(rows, reference.tolist(), strict=True)]
    losses, measured = row_losses(policy, rows, config)
    expected = formulas.kto_loss(*logps[:, :2].unbind(1), *reference[:, :2].unbind(1), torch.tensor(2.0), beta=0.1).losses
    torch.testing.assert_close(losses.detach(), expected)
    torch.testing.assert_close(torch.stack([measured["chosen_logp"], measured["rejected_logp"]], 1), logps[:, :2])


@pytest.mark.parametrize("reference_logp, scaler", [(math.nan, torch.amp.GradScaler("cpu")), (math.inf, None)])
def test_a_loss_that_is_not_finite_is_refused_and_the_policy_stays_as_it_was(reference_logp, scaler):
    policy, rows, config = worker.parts("dpo")
    before = copy.deepcopy(policy.state_dict())
    rows[3] = replace(rows[3], reference_logps=(reference_logp, 0.0))
    with pytest.raises(ValueError, match="train_step: expected a finite loss.*Lower the learning rate"):
        train_step(policy, torch.optim.AdamW(policy.parameters(), lr=1.0), rows[:8], config, scaler=scaler)
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


# the schedule


@pytest.mark.parametrize("num_rows, batch_size", [(10, 4), (3, 8)])
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


@pytest.mark.parametrize("method", ["sft", "drdo"])
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
        ({"beta": None}, "beta > 0 for dpo, got None.*a larger beta keeps the policy closer to the reference"),
        ({"beta": math.inf}, "finite beta > 0"),
        ({"method": "drdo"}, "beta None for drdo"),
        ({"alpha": math.nan}, "finite alpha >= 0"),
        ({"offset_scale": "cubic"}, "offset_scale .* 'cubic'"),
        ({"method": "slic", "label_smoothing": 0.1}, "label_smoothing 0 for slic"),
        ({"mean_logps": True}, "mean_logps False for dpo, got True"),
        ({"drdo_gamma": -1.0}, "drdo_gamma >= 0, got 0.1 and -1.0"),
        ({"optimizer": "lion"}, "'adam' or 'sgd', got 'lion'"),
        ({"precision": "float64"}, "precision in .*got 'float64'"),
        ({"steps": 2**70}, r"micro_batch_size from 1, num_evaluations from 0 to 2\*\*31 - 1"),
        ({"lr": math.inf}, "finite lr > 0"),
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
    policy, rows, config = worker.parts("dpo")
    save_checkpoint(tmp_path / "checkpoint.pt", {"config": asdict(replace(config, beta=0.3, steps=9))})
    with pytest.raises(ValueError, match=r"differ: beta \(saved 0.3, now 0.1\), steps \(saved 9, now 20\)\."):
        train(policy, rows, config, checkpoint=tmp_path / "checkpoint.pt", show_progress=False)


@pytest.mark.parametrize("method", ["drdo", "ppo"])
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

    torch.testing.assert_close(worker.run(method, checkpoint), worker.run(method, None), rtol=0, atol=0)
