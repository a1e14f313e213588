"""PPO and RLOO: a step against a slow loop, the loop against an optimum that is known, and the stages made of it."""

import copy
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import worker
from digits import DigitTokenizer, random_policy

from pdpo import experiments, toy
from pdpo.__main__ import main
from pdpo.data import load_split
from pdpo.encoding import encode
from pdpo.exact import kl_divergence, optimal_policy_logps
from pdpo.models import load_policy, train_tokenizer
from pdpo.presets import OnlineConfig
from pdpo.rl import (
    Tokens,
    online_losses,
    online_step,
    response_tokens,
    rloo_advantages,
    rollouts_of,
    token_rewards,
    train_online,
    value_loss,
)
from pdpo.sampling import Sample, sample
from pdpo.training import Row, policy_logps

CONFIG = OnlineConfig("ppo", 5, 4, 1e-3, beta=0.1)


def test_value_loss_by_hand_is_the_larger_square_and_flat_past_the_clip_towards_the_return():
    values, old, returns = torch.tensor([0.1, 0.5, 0.5, -0.5]), torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 1.0])
    values.requires_grad_()
    losses = value_loss(values, old, returns, clip=0.2)
    assert losses.tolist() == pytest.approx([0.405, 0.32, 1.125, 1.125])
    (slope,) = torch.autograd.grad(losses.sum(), values)
    assert slope.tolist() == pytest.approx([-0.9, 0.0, 1.5, -1.5])  # it may always be put right
    plain = value_loss(values, old, returns, clip=None)
    torch.testing.assert_close(plain, (values - returns) ** 2 / 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rloo_advantages(torch.zeros(3, 1)), "rloo_advantages: expected (P, K) rewards with K >= 2, got (3, 1)"),
        (lambda: value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(3), clip=0.2), "value_loss: expected three tensors"),
        (lambda: token_rewards(torch.zeros(2), torch.zeros(3, 2), torch.ones(3, 2).bool(), beta=0.1), "One row a response"),
        (lambda: replace(CONFIG, method="dpo"), "OnlineConfig: expected method in ('ppo', 'rloo')"),
        (lambda: replace(CONFIG, kl_in="nowhere"), "kl_in 'reward' or 'loss'"),
        (lambda: replace(CONFIG, method="rloo", num_samples=1), "num_samples >= 2 for rloo"),
        (lambda: replace(CONFIG, num_parts=5), "num_parts from 1 to batch_size"),
        (lambda: replace(CONFIG, value_weight=-0.1), "value_weight, entropy_weight and no_eos_penalty >= 0"),
        (lambda: replace(CONFIG, value_clip=0.0), "value_clip > 0 or None"),
    ],
)
def test_every_value_error_says_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# numbers of single tokens


def test_the_tokens_of_responses_are_the_same_by_trees_and_by_the_plain_path_with_their_gradient():
    records = toy.load()[::150]
    tokenizer = train_tokenizer(records, vocab_size=400)
    policy = load_policy(worker.PRESET, tokenizer=tokenizer, seed=1)
    policy.value_head = torch.nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(2)))
    rows = [encode(tokenizer, each.prompt, text) for each in records for text in each.responses]
    results = []
    for on_trees in (False, True):
        found = response_tokens(policy, rows, on_trees=on_trees)
        policy.zero_grad()
        sum(each.square().sum() for each in found).backward()
        results.append((*found, *(weight.grad.clone() for weight in policy.parameters())))
    for plain, trees in zip(*results, strict=True):
        torch.testing.assert_close(plain, trees, rtol=1e-4, atol=1e-5 * max(1.0, float(plain.detach().abs().max())))
    lengths = [len(ids) - num_prompt for ids, num_prompt in rows]
    logps, values, entropies = results[0][:3]
    assert ((logps != 0).sum(1).tolist()) == lengths and ((entropies > 0).sum(1).tolist()) == lengths
    torch.testing.assert_close(policy_logps(policy, [Row((each,)) for each in rows])[:, 0], logps.sum(1))
    # the value before the first token, and the entropy there, are read where the prompt ends
    ids, num_prompt = rows[0]
    output = policy(input_ids=torch.tensor([ids[:num_prompt]]), output_hidden_states=True)
    assert values[0, 0].item() == pytest.approx((output.hidden_states[-1][0, -1] @ policy.value_head).item(), abs=1e-4)
    assert entropies[0, 0].item() == pytest.approx(
        torch.distributions.Categorical(logits=output.logits[0, -1]).entropy().item(), abs=1e-4
    )


# one step


@pytest.mark.parametrize(
    "method, whiten, kl_in",
    [("ppo", False, "reward"), ("ppo", True, "loss"), ("rloo", True, "reward"), ("rloo", False, "loss")],
)
def test_rollouts_and_losses_are_those_of_a_slow_loop(method, whiten, kl_in):
    config = replace(CONFIG, method=method, whiten=whiten, kl_in=kl_in, beta=0.3, entropy_weight=0.01, lam=0.9, gamma=0.8)
    generator, lengths = torch.Generator().manual_seed(0), [1 + i % 5 for i in range(16)]  # 4 prompts, 4 responses to each
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    numbers = [torch.randn(16, 5, generator=generator).masked_fill(~mask, 0.0) for _ in range(7)]
    old, reference, now = Tokens(*numbers[:3]), Tokens(*numbers[3:4] * 3), Tokens(*numbers[4:])  # now: what they are given next
    scores, sequences = torch.randn(16, generator=generator), [([1] * (length + 1), 1) for length in lengths]
    rollouts = rollouts_of(lambda model, part: model, old, reference, sequences, scores, config)
    advantages, returns = {}, {}
    beta = 0.3 if kl_in == "reward" else 0.0
    totals = []
    for i, length in enumerate(lengths):
        rewards = [-beta * (rollouts.old.logps[i, t] - rollouts.reference_logps[i, t]).item() for t in range(length)]
        rewards[-1] += scores[i].item()
        totals.append(sum(rewards))
        running, after = 0.0, 0.0
        for t in reversed(range(length)):
            value = rollouts.old.values[i, t].item()
            running = rewards[t] + 0.8 * after - value + 0.8 * 0.9 * running
            advantages[i, t], after = running, value
            returns[i, t] = running + value
    if method == "rloo":
        mine = [totals[i // 4 * 4 : i // 4 * 4 + 4] for i in range(len(totals))]
        advantages = {(i, 0): totals[i] - (sum(mine[i]) - totals[i]) / 3 for i in range(len(totals))}
    if whiten:
        every = torch.tensor(list(advantages.values()))
        advantages = {key: (value - every.mean().item()) / every.std().item() for key, value in advantages.items()}
    assert rollouts.advantages.count_nonzero() == len(advantages)
    for (i, t), value in advantages.items():
        assert rollouts.advantages[i, t].item() == pytest.approx(value, abs=1e-5)
        assert method == "rloo" or rollouts.returns[i, t].item() == pytest.approx(returns[i, t], abs=1e-5)

    rows, expected = torch.tensor([3, 4, 9]), 0.0
    for i in rows.tolist():
        ratios = (now.logps[i] - rollouts.old.logps[i]).exp().tolist()
        if method == "rloo":
            ratio = (now.logps[i].sum() - rollouts.old.logps[i].sum()).exp().item()
            expected -= min(ratio * advantages[i, 0], min(max(ratio, 0.8), 1.2) * advantages[i, 0])
        for t in range(lengths[i]):
            if method == "ppo":
                expected -= min(ratios[t] * advantages[i, t], min(max(ratios[t], 0.8), 1.2) * advantages[i, t])
                one = [each[i : i + 1, t] for each in (now.values, rollouts.old.values, rollouts.returns)]
                expected += 0.1 * value_loss(*one, clip=0.2).item()
            expected -= 0.01 * now.entropies[i, t].item()
            if kl_in == "loss":
                log_ratio = (rollouts.reference_logps[i, t] - now.logps[i, t]).item()
                expected += 0.3 * (torch.tensor(log_ratio).exp().item() - 1 - log_ratio)
    sums = online_losses(Tokens(*(each[rows] for each in now)), rollouts, rows, config)
    assert sums["loss"].item() == pytest.approx(expected, rel=1e-4)


# the loop


@pytest.mark.parametrize("change", [{}, {"kl_in": "loss"}, {"method": "rloo"}])
def test_on_two_arms_the_loop_reaches_the_optimal_policy(change):
    policy, tokenizer, beta = random_policy(0, vocab_size=2, scale=0.1), DigitTokenizer(), 0.7  # "1" or nothing: of one token

    def arm_logps():
        return policy(input_ids=torch.tensor([[1]])).logits[0, -1].detach().double().log_softmax(-1)

    before, reference = arm_logps(), copy.deepcopy(policy)
    config = OnlineConfig(
        "ppo", 60, 8, 2e-2, beta=beta, num_samples=64, num_epochs=1, num_parts=1, no_eos_penalty=0.0, micro_batch_size=512,
        whiten=False, num_evaluations=1,
    )  # fmt: skip
    config = replace(config, **change)

    def score(samples):
        return torch.tensor([0.0 if each.finished else 1.0 for each in samples])

    def run(policy, config):
        return train_online(policy, reference, tokenizer, ["1"] * 8, score, config, max_new_tokens=1, show_progress=False)

    run(policy, config)
    optimum = optimal_policy_logps(before, torch.tensor([0.0, 1.0]).double(), beta=beta)
    assert kl_divergence(before, optimum) > 0.1 and kl_divergence(arm_logps(), optimum) < 0.01
    still = run(copy.deepcopy(reference), replace(config, steps=2, lr=1e-30))
    assert still[1]["score"] != still[2]["score"]  # each step has noise of its own


def test_each_switch_reaches_the_training_and_the_history_says_what_was_sampled():
    policy, (tokenizer, prompts, score), config = worker.parts("ppo")
    config = replace(config, steps=2, num_evaluations=1)

    def ends(**change):
        trained = copy.deepcopy(policy)
        options = {"max_new_tokens": 6, "show_progress": False}
        history = train_online(trained, policy, tokenizer, prompts, score, replace(config, **change), **options)
        return history, torch.cat([each.flatten() for each in trained.state_dict().values()])

    history, weights = ends()
    assert [row["step"] for row in history] == [0, 1, 2] and history[1]["num_tokens"] <= 4 * 2 * 6
    assert history[1]["kl"] == pytest.approx(0, abs=1e-4) and history[1]["epoch"] == 4 / len(prompts)
    assert torch.equal(weights, ends()[1])
    torch.testing.assert_close(weights, ends(micro_batch_size=3)[1], rtol=1e-3, atol=1e-4)
    changes = {"num_samples": 3, "num_epochs": 1, "num_parts": 1, "clip": 1e-4, "value_clip": 1e-4, "value_weight": 1.0}
    changes |= {"entropy_weight": 0.1, "gamma": 0.5, "lam": 0.5, "whiten": False, "kl_in": "loss", "no_eos_penalty": 5.0}
    changes |= {"method": "rloo", "beta": 1.0, "seed": 4}
    for key, value in changes.items():
        assert not torch.equal(weights, ends(**{key: value})[1]), key
    with pytest.raises(ValueError, match="train_online: expected at least one prompt"):
        train_online(policy, policy, tokenizer, [], score, config, max_new_tokens=6)


def test_float16s_scaler_changes_nothing_where_gradients_are_finite_and_leaves_steps_out_where_not():
    begun, (tokenizer, prompts, score), config = worker.parts("ppo")
    begun.value_head = torch.nn.Parameter(torch.zeros(32))
    samples = sample(begun, tokenizer, prompts[:4], temperature=1.0, max_new_tokens=6, seed=0, num_samples=2)
    tokens_of = partial(response_tokens, on_trees=True)
    rollouts = rollouts_of(tokens_of, begun, begun, [each.encoded for each in samples], score(samples), config)

    def ends(scaler, *, times=1.0):
        policy = copy.deepcopy(begun)
        policy.value_head.register_hook(lambda gradient: gradient * times)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        record = online_step(policy, optimizer, rollouts, config, tokens_of=tokens_of, seed=0, scaler=scaler)
        return record["grad_norm"], torch.cat([each.flatten() for each in policy.state_dict().values()])

    scaled, plain = (ends(torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)) for enabled in (True, False))
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    norm, weights = ends(scaler, times=math.inf)
    assert norm == math.inf and scaler.get_scale() == 2.0**6  # four steps, each left out and the scale halved
    assert torch.equal(weights, torch.cat([each.flatten() for each in begun.state_dict().values()]))
    for scaler in (torch.amp.GradScaler("cpu", init_scale=1.0), torch.amp.GradScaler("cpu", enabled=False)):
        with pytest.raises(ValueError, match="online_step: expected a finite loss and gradient.*inf. Lower lr"):
            ends(scaler, times=math.inf)


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("pdpo.commands.world_size", lambda: 2)
    assert main(["train", "--preset", "tiny", "--method", "rloo"]) != 0
    assert "train: expected one process for ppo and rloo, got 2" in capsys.readouterr().err


# stages


@pytest.fixture
def toy_preset(quick, monkeypatch):
    parts = load_split("toy")
    monkeypatch.setattr(experiments, "load_split", lambda name: tuple(part[::12] for part in parts))
    online = OnlineConfig("ppo", 3, 4, 1e-3, beta=0.1, num_samples=2, num_evaluations=1)
    return replace(quick, data="toy", online=online)


def test_ppo_is_a_stage_on_the_gold_score_a_learned_one_or_the_smallest_of_several(toy_preset, trained):
    sft = experiments.run_sft(toy_preset)
    gold = experiments.run_preference(sft, method="ppo", beta=0.2, reward="toy-gold")
    assert trained == ["sft"] and gold.method == "ppo" and gold.sft == sft and gold.path.name.startswith("ppo-beta0.2-seed0-")
    last = gold.history[-1]
    assert last["eval_loss"] == pytest.approx(0.2 * last["eval_kl"] - last["eval_score"]) and 1 <= last["eval_gold"] <= 10
    assert "eval_kl" in gold.history[0] and "eval_kl" not in gold.history[1] and gold.history[0]["eval_kl"] == 0
    assert sorted(each.name for each in gold.path.iterdir()) == ["history.json", "policy", "stage.json"]
    assert "value_head" not in gold.load_policy().state_dict()
    learned = experiments.run_preference(sft, method="rloo", beta=0.2)
    assert trained == ["sft", "oracle"] and "score" in learned.history[1]
    models = [experiments.run_oracle(sft), experiments.run_oracle(sft, seed=5)]
    several = experiments.run_online(sft, method="rloo", beta=0.2, reward=models)
    assert learned.path == experiments.run_online(sft, method="rloo", beta=0.2, reward=models[:1]).path != several.path
    for wrong in ({"reward": "mine"}, {"records": []}):
        with pytest.raises(ValueError, match="run_online: expected reward|run_preference: expected records None"):
            experiments.run_preference(sft, method="ppo", beta=0.2, **wrong)
    with pytest.raises(ValueError, match="on the toy 'toy-gold', got 'toy-gold' on "):
        experiments.run_online(replace(sft, preset=replace(toy_preset, data="mine")), method="ppo", beta=0.2, reward="toy-gold")


def test_scores_have_mean_0_and_deviation_1_on_the_training_responses_and_of_several_models_the_smallest_counts(toy_preset):
    sft = experiments.run_sft(toy_preset)
    records, tokenizer = experiments.load_split("toy")[0], sft.load_tokenizer()
    responses = [
        Sample(each.prompt, text, encode(tokenizer, each.prompt, text), True) for each in records for text in each.responses
    ]
    models = [experiments.run_oracle(sft), experiments.run_oracle(sft, seed=5)]
    each = [experiments.score_of(part, records)(responses) for part in ((), models[:1], models[1:])]
    for scores in each:
        assert abs(scores.mean()) < 1e-4 and scores.std() == pytest.approx(1, abs=1e-4)
    assert torch.corrcoef(torch.stack([each[0], torch.tensor([s for r in records for s in r.scores])]))[0, 1] > 0.9999
    torch.testing.assert_close(experiments.score_of(models, records)(responses), torch.minimum(*each[1:]))
