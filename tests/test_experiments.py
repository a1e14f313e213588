"""The experiments: trained once and found again, keyed by all that determines them, from their parent's policy."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same_weights

import pdpo
from pdpo import experiments, making
from pdpo.encoding import encode_records
from pdpo.evaluation import last_hidden
from pdpo.experiments import run_oracle, run_preference, run_reward_model, run_sft, run_win_rate, runs_dir
from pdpo.presets import TrainConfig
from pdpo.training import preference_rows


def run_dpo(preset, **changes):
    """Its SFT run and DPO from there."""
    return run_preference(run_sft(preset), **{"method": "dpo", "beta": 0.1} | changes)


# once


def test_a_second_call_trains_nothing_and_returns_the_same_and_dpo_starts_from_the_sft_policy(quick, trained):
    first = run_dpo(quick)
    assert run_dpo(quick) == first and trained == ["sft", "dpo"]
    assert first.path.parent == runs_dir() / "quick" and first.path.name.startswith("dpo-beta0.1-seed0-")
    assert len(first.history) == 7 and first.history[-1]["eval_kl"] >= 0 and first.history[0]["eval_kl"] == 0
    assert first.history[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert sorted(path.name for path in first.path.iterdir()) == ["history.json", "policy", "stage.json"]
    record = json.loads((first.path / "stage.json").read_text())
    assert record["config"]["train"] == asdict(first.train) and record["environment"]["torch"] == torch.__version__
    assert record["config"]["sft"] == first.sft.path.name and not same_weights(first.sft, first)
    elsewhere = run_dpo(replace(quick, name="elsewhere"))
    assert trained == ["sft", "dpo"] * 2 and elsewhere.history == first.history and same_weights(elsewhere, first)


ALL, TRAINED = {"sft", "dpo", "win_rate", "reward_model"}, {"dpo", "win_rate"}
CHANGES = [  # of the preset, of the seed, of the preference run or of its measurement, and what is another stage then
    ({"data": "other.json"}, ALL), ({"sft": {"steps": 13}}, ALL), ({"seed": 1}, ALL), ({"embedding": 64}, ALL),
    ({"sft_all_responses": False}, ALL), ({"beta": 0.3}, TRAINED), ({"alpha": 0.3}, TRAINED), ({"max_new_tokens": 5}, TRAINED),
    ({"preference": {"precision": "bfloat16"}}, ALL - {"sft"}), ({"pairs_per_prompt": 1}, ALL - {"sft"}),
    ({"temperature": 0.5}, {"win_rate"}), ({"num_samples": 3}, {"win_rate"}), ({"num_judged": 1}, {"win_rate"}),
    ({"judge": "another"}, {"win_rate"}), ({"checkpoint_seconds": 9.0}, set()),
]  # fmt: skip


def test_whatever_changes_a_stage_makes_another_one_and_nothing_else_does(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text(Path(quick.data).read_text().replace("Certainly!", "Sure!"))
    found, stored = {}, {"weights": [], "held_out": []}

    def note(group, name, determinants, build, **_):
        found[name.split("-")[0]] = repr(determinants)
        return tmp_path / f"{name}-{hash(repr(determinants))}"

    monkeypatch.setattr(experiments, "run_stage", note)
    for module in (experiments, making):
        monkeypatch.setattr(module, "read_json", lambda path: stored)

    def keys(preset, *, seed=0, temperature=1.0, **changes) -> dict[str, str]:
        found.clear()
        sft = run_sft(preset, seed=seed)
        run_win_rate(run_preference(sft, **{"method": "dpo", "beta": 0.1} | changes), temperature=temperature)
        run_reward_model(sft)
        return dict(found)

    before = keys(quick)
    for change, redone in CHANGES:
        ((key, value),) = change.items()
        if hasattr(quick, key):
            value = replace(getattr(quick, key), **value) if isinstance(value, dict) else value
            after = keys(replace(quick, **{key: value}))
        else:
            after = keys(quick, **change)
        assert {kind for kind in ALL if before[kind] != after[kind]} == redone, change


# preference training


def test_odpo_rows_carry_the_offset_that_their_scores_demand_the_control_its_mean_and_e_dpo_the_difference(tiny_tokenizer):
    records = pdpo.pairs(pdpo.load_preferences("toy")[:5])
    config = TrainConfig("odpo", 1, 1, 1e-3, beta=0.1, alpha=0.5)
    log, mean, dpo, difference = (
        [row.offset for row in preference_rows(tiny_tokenizer, records, replace(config, **change))]
        for change in ({}, {"offset_scale": "mean"}, {"method": "dpo"}, {"method": "edpo", "offset_scale": "mean"})
    )
    assert difference == [record.scores[0] - record.scores[1] for record in records]
    with pytest.raises(ValueError, match="edpo expected scores for all .* got 1. Score the others"):
        preference_rows(tiny_tokenizer, [records[0], replace(records[1], scores=None)], replace(config, method="edpo"))
    assert log == pytest.approx([0.5 * np.log(record.scores[0] - record.scores[1]) for record in records])
    assert len(set(log)) > 2 and set(dpo) == {0.0}
    assert set(mean) == {mean[0]} and mean[0] == pytest.approx(np.mean(log))


def test_odpo_with_alpha_zero_is_dpo_bit_for_bit(quick):
    dpo, odpo = run_dpo(quick), run_dpo(quick, method="odpo", alpha=0.0)
    assert same_weights(dpo, odpo) and dpo.history == odpo.history


def test_run_preference_trains_on_the_records_and_with_the_hyperparameters_that_it_is_given(quick):
    sft = run_sft(quick, seed=1)
    made = pdpo.pairs(pdpo.load_split(quick.data)[0], num_per_prompt=quick.pairs_per_prompt, seed=1)
    default, same = (run_preference(sft, method="dpo", beta=0.1, **records) for records in ({}, {"records": made}))
    assert same.path == default.path
    changes = {"steps": 3, "optimizer": "sgd", "max_grad_norm": 2.0}
    for records in (made[:9], made[9:18]):
        fewer = run_preference(sft, method="dpo", beta=0.1, records=records, **changes)
        assert fewer.path != default.path and fewer.history[-1]["epoch"] == 3 * 8 / 9 and len(fewer.history) == 4
        assert fewer.history[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # with the reference's numbers of these rows
    assert fewer.train == replace(quick.preference, seed=1, **changes)


# the reward model


@pytest.fixture
def unscored(quick):
    rows = json.loads(Path(quick.data).read_text())
    Path(quick.data).write_text(json.dumps([row | {"scores": None} for row in rows]))
    return quick


@pytest.mark.parametrize("method", ["odpo", "edpo"])
def test_without_scores_those_of_the_reward_model_are_taken_which_is_said(unscored, capsys, monkeypatch, method):
    seen, train = [], making.train
    monkeypatch.setattr(making, "train", lambda policy, rows, *a, **o: seen.append(rows) or train(policy, rows, *a, **o))
    run = run_dpo(unscored, method=method)
    said = capsys.readouterr().out
    assert f"{method}: " in said and "no scores" in said and "held-out pairs right" in said
    reward_model = run_reward_model(run.sft)
    assert json.loads((run.path / "stage.json").read_text())["config"]["reward_model"] == reward_model.path.name
    made = reward_model.scored(pdpo.pairs(pdpo.load_split(unscored.data)[0], num_per_prompt=unscored.pairs_per_prompt))
    differences = np.array([record.scores[0] - record.scores[1] for record in made])
    odpo = np.where(differences > 0, run.train.alpha * np.log(np.abs(differences)), 0)  # flipped pairs get 0
    expected = odpo if method == "odpo" else differences
    assert [row.offset for row in seen[-1]] == pytest.approx(expected.tolist(), abs=1e-4) and (differences > 0).mean() > 0.6


def test_dpo_needs_no_scores_and_log_ratio_offsets_do(unscored, capsys):
    run_dpo(unscored)
    assert "no scores" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected offset_scale 'log', 'identity' or 'mean' for data without scores"):
        run_dpo(unscored, method="odpo", offset_scale="log_ratio")


def test_e_dpo_takes_the_reward_models_scores_for_all_pairs_where_one_has_none(quick, capsys):
    made = pdpo.pairs(pdpo.load_split(quick.data)[0], num_per_prompt=quick.pairs_per_prompt)[:20]
    for records, said in ((made, False), ([replace(made[0], scores=None), *made[1:]], True)):
        run_dpo(quick, method="edpo", records=records, steps=1)
        assert ("edpo: 1 of the pairs have no scores; all take those of a reward model" in capsys.readouterr().out) is said


def test_the_reward_model_never_sees_scores(unscored, tmp_path, monkeypatch):
    rows = json.loads(Path(unscored.data).read_text())  # two files of one order, with and without scores
    scored = tmp_path / "scored.json"
    scored.write_text(json.dumps([row | {"scores": [9 - k for k in range(len(row["responses"]))]} for row in rows]))
    heads = []
    monkeypatch.setattr(experiments, "fit_reward_head", lambda features: heads.append(features) or features[0, 0])
    with_scores, without = (run_reward_model(run_sft(preset)) for preset in (replace(unscored, data=str(scored)), unscored))
    assert with_scores.path != without.path and len(heads) == 2 and torch.equal(*heads)


def test_the_reward_model_is_a_stage_that_is_tried_on_the_test_split(quick, trained):
    sft = run_sft(quick)
    reward_model = run_reward_model(sft)
    test_pairs = pdpo.pairs(pdpo.load_split(quick.data)[2])
    assert reward_model.held_out.shape == (len(test_pairs),) and trained == ["sft"]
    scores = torch.tensor([record.scores for record in reward_model.scored(test_pairs)])
    assert (scores[:, 0] - scores[:, 1]).sigmoid().tolist() == pytest.approx(reward_model.held_out.tolist(), abs=1e-5)
    assert f"{np.mean(reward_model.held_out > 0.5):.3f} of {len(test_pairs)} held-out pairs right" in str(reward_model)
    ranking = pdpo.load_split(quick.data)[2][:3] + test_pairs[:2]  # K = 4 and K = 2 side by side
    for record, scored in zip(ranking, reward_model.scored(ranking), strict=True):
        hidden = last_hidden(sft.load_policy(), encode_records(sft.load_tokenizer(), [record]))
        assert scored.scores == pytest.approx((hidden[0] @ reward_model.weights).tolist(), abs=1e-4)


# DRDO


def test_drdo_learns_from_an_oracle_trained_first_and_its_head_loads_beside_a_plain_policy(quick, trained, capsys):
    sft = run_sft(quick)
    run = run_preference(sft, method="drdo", steps=12, lr=3e-3)
    oracle = run_oracle(sft)
    assert trained == ["sft", "oracle", "drdo"] and run_preference(sft, method="drdo", steps=12, lr=3e-3) == run
    assert json.loads((run.path / "stage.json").read_text())["config"]["reward_model"] == oracle.path.name
    assert f"drdo: the oracle is a reward model fitted to {oracle.num_pairs} training pairs" in capsys.readouterr().out
    assert not same_weights(oracle.sft, sft) and oracle.sft.parent == sft and oracle.sft.train.lr == quick.sft.lr
    assert not torch.equal(run_oracle(sft, seed=1).weights, oracle.weights)
    assert run_oracle(sft, records=pdpo.pairs(pdpo.load_split(quick.data)[0])).path != oracle.path
    # what the history measured at the end is what the saved policy and its head give
    policy, tokenizer, head = run.load_policy(), run.load_tokenizer(), run.load_reward_head()
    held_out = pdpo.pairs(pdpo.load_split(quick.data)[1])
    scores = last_hidden(policy, encode_records(tokenizer, held_out)) @ head
    assert (scores[:, 0] - scores[:, 1]).mean().item() == pytest.approx(run.history[-1]["eval_margin"], abs=1e-4)
    assert run.history[-1]["eval_loss"] < run.history[0]["eval_loss"] and not torch.equal(head, oracle.weights)
    assert "reward_head" not in policy.state_dict()
    with pytest.raises(ValueError, match="expected a run of drdo, got one of sft"):
        sft.load_reward_head()


# win rates


def test_a_win_rate_has_a_row_for_each_sample_and_a_second_call_samples_nothing(quick, monkeypatch):
    test = pdpo.load_split(quick.data)[2]
    dpo = run_dpo(quick)
    found = run_win_rate(dpo)
    assert found.num_samples == 2 and [row["prompt"] for row in found.rows[::2]] == [record.prompt for record in test]
    keys = {"prompt", "text", "finished", "chosen", "rejected", "win", "kl", "kl_k1", "kl_k3", "num_tokens"}
    assert set(found.rows[0]) == keys
    assert [row["chosen"] for row in found.rows[::2]] == [record.responses[0] for record in test]
    assert [row["rejected"] for row in found.rows[1::2]] == [record.responses[-1] for record in test]
    assert found.column("win").shape == (len(test),) and set(row["win"] for row in found.rows) <= {0.0, 0.5, 1.0}
    assert found.column("kl")[1] == np.mean([row["kl"] for row in found.rows if row["prompt"] == test[1].prompt])
    with pytest.raises(ValueError, match="Evaluation: expected one of .*'kl_k1'.*got 'score'"):
        found.column("score")
    greedy = run_win_rate(dpo, temperature=0.0)
    assert greedy.num_samples == 1 and len(greedy.rows) == len(test) and "kl" not in greedy.rows[0]
    monkeypatch.setattr(experiments, "sample", None)
    assert run_win_rate(dpo).rows == found.rows


def test_the_judge_sees_the_first_samples_of_a_prompt_and_the_kl_can_be_taken_from_another_run(quick):
    sft, best = (run_sft(replace(quick, num_samples=3, num_judged=2, sft_all_responses=all)) for all in (True, False))
    found = run_win_rate(best)
    assert found.samples("win").shape == (len(found.rows) // 3, 2) and found.samples("kl").shape == (len(found.rows) // 3, 2)
    assert ["win" in row for row in found.rows[:6]] == [True, True, False] * 2
    other = run_win_rate(best, reference=sft)
    assert [row["text"] for row in other.rows] == [row["text"] for row in found.rows]
    assert (found.column("kl") == 0).all() and (other.column("kl") > 0).all()
    assert other.column("kl_k1").mean() > 0  # of the samples' own policy from the reference, not the other way round
