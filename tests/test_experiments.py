"""Stages: trained once, found again, resumed after a kill, shared by processes, keyed by all that determines them."""

import ast
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stages
import torch
from pdpo.reward import last_hidden

import pdpo
from pdpo import experiments, models, training
from pdpo.experiments import (
    TRAINING_CODE,
    copy_run,
    preference_rows,
    run_all,
    run_preference,
    run_reward_model,
    run_sft,
    run_win_rate,
    runs_dir,
)
from pdpo.presets import get_preset
from pdpo.stages import Busy, code_version


class Judge:
    """Stands in for SBERT, which takes seconds to load: a vector made of the text's letters."""

    def embed(self, texts):
        vectors = torch.tensor([[text.count(letter) + 0.1 for letter in "aeinrst."] for text in texts])
        return vectors / vectors.norm(dim=1, keepdim=True)


@pytest.fixture(autouse=True, scope="module")
def fresh_versions():
    yield
    code_version.cache_clear()


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Every test has its own runs/, and no SBERT."""
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(experiments, "load_judge", lambda *_, **__: Judge())
    code_version.cache_clear()


@pytest.fixture
def quick(tmp_path):
    return stages.preset(tmp_path)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The methods of the trainings that begin, in their order."""
    begun, train = [], experiments.train

    def counted(policy, rows, config, **options):
        begun.append(config.method)
        return train(policy, rows, config, **options)

    monkeypatch.setattr(experiments, "train", counted)
    return begun


def weights(run) -> dict:
    return run.load_policy().state_dict()


def same_weights(one, other) -> bool:
    return all(torch.equal(value, weights(other)[key]) for key, value in weights(one).items())


# once


def test_a_second_call_trains_nothing_and_returns_the_same(quick, trained):
    first = run_preference(quick, method="dpo", beta=0.1)
    assert trained == ["sft", "dpo"]
    again = run_preference(quick, method="dpo", beta=0.1)
    assert trained == ["sft", "dpo"] and again == first
    assert first.path.parent == runs_dir() / "quick" and first.path.name.startswith("dpo-beta0.1-seed0-")
    assert len(first.history) == 7 and first.history[-1]["eval_kl"] >= 0 and first.history[0]["eval_kl"] == 0
    files = sorted(path.name for path in first.path.iterdir())
    assert files == ["history.json", "policy", "stage.json"]  # no checkpoint and no temporary file
    record = json.loads((first.path / "stage.json").read_text())
    assert record["config"] == first.config and record["environment"]["torch"] == torch.__version__
    assert not list(first.path.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.3},
        {"seed": 1},
        {"method": "odpo"},
        {"method": "plackett_luce"},
        {"label_smoothing": 0.1},
        {"preference_lr": 1e-3},
        {"preference_steps": 7},
        {"num_evaluations": 3},
        {"max_new_tokens": 5},
        {"pairs_per_prompt": 1},
        {"sft_steps": 13},
        {"embedding": 64},
        {"data": "another file"},
    ],
    ids=str,
)
def test_whatever_changes_a_run_makes_another_stage(quick, tmp_path, monkeypatch, change):
    keys = []
    monkeypatch.setattr(
        experiments,
        "run_stage",
        lambda group, name, determinants, code, build, **_: keys.append(determinants) or (Path(name), {}),
    )
    monkeypatch.setattr(experiments, "_load_run", lambda preset, path, config: type("Run", (), {"path": Path(repr(keys[-1]))}))
    if "data" in change:
        file = tmp_path / "other.json"
        file.write_text(Path(quick.data).read_text().replace("Certainly!", "Sure!"))
        change = {"data": str(file)}
    arguments = {"method": "dpo", "beta": 0.1, "seed": 0}
    run_preference(quick, **arguments)
    options = {key: value for key, value in change.items() if key in ("method", "beta", "seed", "label_smoothing")}
    run_preference(replace(quick, **{key: change[key] for key in change.keys() - options.keys()}), **(arguments | options))
    assert len(keys) == 4 and keys[1] != keys[3]


@pytest.mark.parametrize(
    "change", [{"checkpoint_seconds": 9.0}, {"betas": (0.5,)}, {"alpha": 2.0}, {"judge": "another"}], ids=str
)
def test_what_does_not_change_a_dpo_run_finds_it_again(quick, trained, change):
    first = run_preference(quick, method="dpo", beta=0.1)
    assert run_preference(replace(quick, **change), method="dpo", beta=0.1).path == first.path and len(trained) == 2


def test_preference_runs_start_from_the_sft_stage_of_their_seed_and_end_with_the_same_bits_again(
    quick, trained, monkeypatch, tmp_path
):
    sft, run = run_sft(quick), run_preference(quick, method="dpo", beta=0.1)
    assert run.config["sft"] == sft.path.name and not same_weights(sft, run)
    assert run.history[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "elsewhere"))
    again = run_preference(quick, method="dpo", beta=0.1)
    assert trained == ["sft", "dpo"] * 2 and again.path != run.path
    assert again.history == run.history and same_weights(again, run)


def test_odpo_rows_carry_the_offset_that_their_scores_demand(quick):
    records = pdpo.pairs(pdpo.load_preferences(quick.data)[:5])
    tokenizer = models.train_tokenizer(pdpo.load_preferences(quick.data), vocab_size=400)
    tokenizer.model_max_length = 80
    rows = preference_rows(tokenizer, records, method="odpo", alpha=0.5, scale="log")
    expected = [0.5 * np.log(record.scores[0] - record.scores[1]) for record in records]
    assert [row.offset for row in rows] == pytest.approx(expected) and len(set(expected)) > 2
    assert {row.offset for row in preference_rows(tokenizer, records, method="dpo", alpha=0.5, scale="log")} == {0.0}


@pytest.fixture
def unscored(quick):
    rows = json.loads(Path(quick.data).read_text())
    Path(quick.data).write_text(json.dumps([row | {"scores": None} for row in rows]))
    return quick


def test_odpo_without_scores_takes_those_of_the_reward_model_and_says_so(unscored, capsys, monkeypatch):
    seen, train = [], experiments.train
    monkeypatch.setattr(experiments, "train", lambda policy, rows, *a, **o: seen.append(rows) or train(policy, rows, *a, **o))
    run = run_preference(unscored, method="odpo", beta=0.1)
    said = capsys.readouterr().out
    assert "no scores" in said and "held-out pairs right" in said
    reward_model = run_reward_model(unscored)
    assert run.config["reward_model"] == reward_model.path.name
    made = reward_model.scored(pdpo.pairs(pdpo.load_split(unscored.data)[0], num_per_prompt=unscored.pairs_per_prompt))
    differences = np.array([record.scores[0] - record.scores[1] for record in made])
    expected = np.where(differences > 0, unscored.alpha * np.log(np.abs(differences)), 0)  # flipped pairs get 0
    assert [row.offset for row in seen[-1]] == pytest.approx(expected.tolist(), abs=1e-4) and (differences > 0).mean() > 0.6
    run_preference(unscored, method="dpo", beta=0.1)
    assert {row.offset for row in seen[-1]} == {0.0} and "no scores" not in capsys.readouterr().out


def test_the_number_of_measurements_changes_neither_sft_nor_the_reward_model(unscored, trained):
    runs = [run_preference(unscored, method="odpo", beta=0.1, num_evaluations=number) for number in (None, 1)]
    assert trained == ["sft", "odpo", "odpo"]
    assert runs[0].config["reward_model"] == runs[1].config["reward_model"]


def test_log_ratio_needs_scores_of_its_own(unscored, trained):
    with pytest.raises(ValueError, match="expected offset_scale 'log', 'identity' or 'mean' for data without scores"):
        run_preference(unscored, method="odpo", beta=0.1, offset_scale="log_ratio")


def test_the_reward_model_never_sees_scores(unscored, tmp_path, monkeypatch):
    rows = json.loads(Path(unscored.data).read_text())  # two files of one order, with and without scores
    scored = tmp_path / "scored.json"
    scored.write_text(json.dumps([row | {"scores": [9 - k for k in range(len(row["responses"]))]} for row in rows]))
    heads = []
    monkeypatch.setattr(experiments, "fit_reward_head", lambda features: heads.append(features) or features[0, 0])
    with_scores, without = run_reward_model(replace(unscored, data=str(scored))), run_reward_model(unscored)
    assert with_scores.path != without.path and len(heads) == 2 and torch.equal(*heads)


def test_the_reward_model_is_a_stage_that_is_tried_on_the_test_split(quick, trained, monkeypatch):
    reward_model = run_reward_model(quick)
    test_pairs = pdpo.pairs(pdpo.load_split(quick.data)[2])
    assert reward_model.held_out.shape == (len(test_pairs),) and trained == ["sft"]
    scores = torch.tensor([record.scores for record in reward_model.scored(test_pairs)])
    assert torch.allclose(
        (scores[:, 0] - scores[:, 1]).sigmoid(), torch.tensor(reward_model.held_out, dtype=torch.float32), atol=1e-5
    )
    assert f"{np.mean(reward_model.held_out > 0.5):.3f} of {len(test_pairs)} held-out pairs right" in str(reward_model)

    ranking = pdpo.load_split(quick.data)[2][:3] + test_pairs[:2]  # K = 4 and K = 2 side by side
    by_hand = [
        last_hidden(reward_model.sft.load_policy(), pdpo.encoding.encode_records(reward_model.sft.load_tokenizer(), [record]))[
            0
        ]
        @ reward_model.weights
        for record in ranking
    ]
    for record, expected in zip(reward_model.scored(ranking), by_hand, strict=True):
        assert record.scores == pytest.approx(expected.tolist(), abs=1e-4)

    monkeypatch.setattr(experiments, "fit_reward_head", None)
    assert (run_reward_model(quick).held_out == reward_model.held_out).all()  # found again


def test_odpo_with_alpha_zero_is_dpo_bit_for_bit(quick):
    runs = [run_preference(quick, method="dpo", beta=0.1), run_preference(quick, method="odpo", beta=0.1, alpha=0.0)]
    assert same_weights(*runs) and runs[0].history == runs[1].history


def test_the_control_has_one_offset_for_all_pairs_the_mean_of_odpos(tiny_tokenizer):
    records = pdpo.pairs(pdpo.load_preferences("toy")[:5])
    log, mean = (
        [row.offset for row in preference_rows(tiny_tokenizer, records, method="odpo", alpha=0.5, scale=scale)]
        for scale in ("log", "mean")
    )
    assert set(mean) == {mean[0]} and mean[0] == pytest.approx(np.mean(log)) and len(set(log)) > 2


def test_run_preference_trains_on_the_records_that_it_is_given(quick, trained):
    train_records = pdpo.load_split(quick.data)[0]
    made = pdpo.pairs(train_records, num_per_prompt=quick.pairs_per_prompt)
    default = run_preference(quick, method="dpo", beta=0.1)
    assert run_preference(quick, method="dpo", beta=0.1, records=made).path == default.path
    fewer = run_preference(quick, method="dpo", beta=0.1, records=made[:9])
    assert fewer.path != default.path and fewer.history[-1]["epoch"] == 6 * 8 / 9


def test_options_reach_the_training_config(quick):
    run = run_preference(quick, method="dpo", beta=0.1, steps=3, optimizer="sgd", max_grad_norm=2.0)
    assert [run.config["train"][key] for key in ("steps", "optimizer", "max_grad_norm")] == [3, "sgd", 2.0]
    assert len(run.history) == 4


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_run_preference_refuses_what_is_no_preference_method(quick, method):
    with pytest.raises(ValueError, match="TrainConfig: expected"):
        run_preference(quick, method=method, beta=0.1)


# evaluation


def test_a_win_rate_has_a_row_for_each_sample_and_a_second_call_samples_nothing(quick, trained, monkeypatch):
    test = pdpo.load_split(quick.data)[2]
    found = run_win_rate(quick, method="dpo", beta=0.1)
    assert found.num_samples == 2 and [row["prompt"] for row in found.rows[::2]] == [record.prompt for record in test]
    assert set(found.rows[0]) == {
        "prompt",
        "text",
        "finished",
        "chosen",
        "rejected",
        "win",
        "kl",
        "kl_k1",
        "kl_k3",
        "num_tokens",
    }
    assert [row["chosen"] for row in found.rows[::2]] == [record.responses[0] for record in test]
    assert [row["rejected"] for row in found.rows[1::2]] == [record.responses[-1] for record in test]
    assert found.column("win").shape == (len(test),) and set(row["win"] for row in found.rows) <= {0.0, 0.5, 1.0}
    with pytest.raises(ValueError, match="Evaluation.column: expected one of .*'kl_k1'.*got 'score'"):
        found.column("score")
    monkeypatch.setattr(experiments, "sample", None)
    assert run_win_rate(quick, method="dpo", beta=0.1).rows == found.rows and trained == ["sft", "dpo"]


def test_greedy_win_rates_have_one_sample_a_prompt_and_no_kl(quick):
    found = run_win_rate(quick, method="sft", temperature=0.0)
    assert found.num_samples == 1 and len(found.rows) == len(pdpo.load_split(quick.data)[2]) and "kl" not in found.rows[0]


def test_on_the_toy_win_rates_come_with_grades(quick, monkeypatch):
    parts = pdpo.load_split("toy")
    monkeypatch.setattr(experiments, "load_split", lambda name: tuple(part[::12] for part in parts))
    found = run_win_rate(replace(quick, data="toy"), method="sft", temperature=0.5)
    assert {"score", "correct", "degenerate", "courteous", "rude", "win"} <= set(found.rows[0]) and "kl" not in found.rows[0]
    assert (found.column("score") >= 1).all()


# what a stage's key makes of its code


def package_copy(folder: Path, monkeypatch) -> Path:
    for module in Path(pdpo.__file__).parent.glob("*.py"):
        (folder / module.name).write_text(module.read_text())
    monkeypatch.setattr(pdpo.stages, "__file__", str(folder / "stages.py"))
    return folder / "losses.py"


def version_now() -> str:
    """As in a new process: code_version reads the files once in each."""
    code_version.cache_clear()
    return code_version(TRAINING_CODE)


def test_comments_docstrings_and_layout_do_not_change_the_code_version_but_code_does(tmp_path, monkeypatch):
    original = version_now()
    file = package_copy(tmp_path, monkeypatch)
    source = file.read_text()
    assert version_now() == original
    file.write_text(source.replace("-> Tensor:\n", "-> Tensor:  # a comment\n\n") + "\n\n# the end\n")
    assert version_now() == original
    file.write_text(source.replace('r"""Negative log-likelihood', 'r"""The negative log-likelihood'))
    assert file.read_text() != source and version_now() == original
    file.write_text(ast.unparse(ast.parse(source)))
    assert version_now() == original
    file.write_text(source.replace("return -policy_logps", "return -2 * policy_logps"))
    assert version_now() != original
    file.write_text(source)
    (tmp_path / "plots.py").write_text("x = 1\n")
    assert version_now() == original  # not among the modules that matter


@pytest.mark.parametrize("module", ["losses", "logps", "encoding", "training", "models", "sampling", "evaluation"])
def test_a_preference_runs_key_covers_every_module_that_its_numbers_pass_through(quick, trained, tmp_path, monkeypatch, module):
    first = run_preference(quick, method="dpo", beta=0.1)
    (tmp_path / "package").mkdir()
    package_copy(tmp_path / "package", monkeypatch)
    assert run_preference(quick, method="dpo", beta=0.1).path == first.path
    with open(tmp_path / "package" / f"{module}.py", "a") as file:
        file.write("\nCHANGED = True\n")
    code_version.cache_clear()
    monkeypatch.setattr(experiments, "_train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_preference(quick, method="dpo", beta=0.1)


# killed and shared


def test_a_stage_killed_on_its_way_resumes_where_it_stopped_and_ends_with_the_same_bits(quick, python, tmp_path, monkeypatch):
    process = python(stages.__file__, "run_sft", json.dumps({"folder": str(tmp_path)}), ANNOUNCE="1")
    for step in range(5):
        assert process.stdout.readline() == "step\n"
        if step < 4:
            process.stdin.write("go on\n")
            process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (partial,) = (runs_dir() / "quick").glob("*.partial")
    (partial / ".checkpoint.pt.partial").write_bytes(b"half")  # as if it had been killed while saving, too
    steps, step = [], training.train_step
    monkeypatch.setattr(training, "train_step", lambda *arguments, **options: steps.append(1) or step(*arguments, **options))
    resumed = run_sft(quick)
    assert len(steps) == quick.sft_steps - 4
    assert not partial.exists() and sorted(path.name for path in resumed.path.iterdir()) == [
        "history.json",
        "policy",
        "stage.json",
    ]
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "unbroken"))
    unbroken = run_sft(quick)
    assert resumed.history == unbroken.history and same_weights(resumed, unbroken)


def wait_until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_that_need_one_stage_train_it_once_and_the_other_says_what_it_waits_for(quick, python, tmp_path):
    barrier = tmp_path / "barrier"
    arguments = (stages.__file__, "run_sft", json.dumps({"folder": str(tmp_path)}))
    first = python(*arguments, BARRIER=str(barrier))
    wait_until(barrier.exists)
    with pytest.raises(Busy, match="sft-seed0"):  # this process does not want to wait
        run_sft(quick, wait=False)
    second = python(*arguments, BARRIER=str(barrier))
    said = second.stdout.readline()
    assert said.startswith("waiting for sft-seed0, which another process is at")
    barrier.with_suffix(".go").touch()
    paths = [process.communicate(timeout=120)[0].strip() for process in (first, second)]
    assert paths == [str(run_sft(quick).path)] * 2
    assert barrier.read_text() == "training\n"  # one training


def test_a_stage_that_fails_leaves_its_lock_free(quick, monkeypatch, trained):
    with monkeypatch.context() as broken:
        broken.setattr(experiments, "_train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_sft(quick)
    assert run_sft(quick, wait=False).path.is_dir() and trained == ["sft"]


def test_run_all_returns_in_order_and_comes_back_last_to_what_is_busy():
    calls, busy = [], {"b": 2}

    def stage(*, name, wait):
        calls.append((name, wait))
        if busy.get(name, 0) and not wait:
            busy[name] -= 1
            raise Busy(name)
        return name.upper()

    assert run_all(stage, [{"name": name} for name in "abc"]) == ["A", "B", "C"]
    assert calls == [("a", False), ("b", False), ("c", False), ("b", False), ("b", True)]


def test_run_all_waits_for_one_stage_only_before_it_looks_again():
    calls, finished = [], set()

    def stage(*, name, wait):
        calls.append((name, wait))
        if wait:
            finished.update("abc")  # by the time that the wait is over, the others have done the rest
        if name not in finished:
            raise Busy(name)
        return name

    assert run_all(stage, [{"name": name} for name in "abc"]) == ["a", "b", "c"]
    assert calls[3:] == [("a", True), ("b", False), ("c", False)]


def test_run_all_is_helped_by_a_second_process_and_every_stage_is_trained_once(quick, trained, monkeypatch):
    monkeypatch.setenv("PDPO_WORKERS", "2")
    monkeypatch.setattr(pdpo.stages, "HELP_AFTER_SECONDS", 0.0)
    train = experiments.train

    def wait_for_help(*arguments, **options):
        if len(trained) == 1:  # our second stage: by then, somebody is to have finished another one
            wait_until(lambda: len(list((runs_dir() / "quick").glob("sft-seed?-??????????"))) > 1)
        return train(*arguments, **options)

    monkeypatch.setattr(experiments, "train", wait_for_help)
    runs = run_all(run_sft, [{"preset": quick, "seed": seed} for seed in range(5)])
    assert [run.seed for run in runs] == list(range(5)) and 2 <= len(trained) < 5
    assert len(list((runs_dir() / "quick").glob("sft-seed*"))) - len(list((runs_dir() / "quick").glob("*.lock"))) == 5
    alone = run_sft(replace(quick, name="alone"), seed=4)  # which the helper began with
    assert same_weights(runs[4], alone)


def test_a_helper_ends_when_its_parent_is_killed(python, tmp_path):
    beats = tmp_path / "beats"
    process = python(
        "-c",
        f"import time, pdpo.stages, stages\npdpo.stages._ask_helpers(stages.beat, [{{'file': {str(beats)!r}}}])\n"
        "time.sleep(600)",
        PDPO_WORKERS="2",
    )  # fmt: skip
    wait_until(beats.exists)
    process.kill()
    process.wait()
    time.sleep(0.5)
    size = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == size


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_senseless_number_of_workers_is_refused(monkeypatch, value):
    monkeypatch.setenv("PDPO_WORKERS", value)
    with pytest.raises(ValueError, match=f"PDPO_WORKERS: expected a number of processes, at least 1, got '{value}'"):
        pdpo.stages._num_workers()


# copies


def test_copy_run_gives_a_folder_that_loads_and_refuses_one_that_holds_something(quick, tmp_path, monkeypatch):
    run = run_sft(quick)
    target = copy_run(run, tmp_path / "deep" / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json", "history.json", "stage.json"} <= {
        p.name for p in target.iterdir()
    }
    policy = models.load_policy(replace(quick, model=str(target)))
    assert all(torch.equal(value, weights(run)[key]) for key, value in policy.state_dict().items())
    with pytest.raises(ValueError, match=f"{target}: expected an empty or a new folder"):
        copy_run(run, target)
    (tmp_path / "empty").mkdir()
    assert copy_run(run, tmp_path / "empty").is_dir() and (tmp_path / "empty" / "config.json").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty or a new folder"):
        copy_run(run, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="got the current one"):
        copy_run(run, Path("."))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_start_says_preset_hardware_precision_data_and_place(capsys):
    assert experiments.start("tiny") == get_preset("tiny") and torch.get_num_threads() == 1
    line = capsys.readouterr().out
    for word in ("preset tiny", "CPU", "float32", "toy", str(runs_dir() / "tiny")):
        assert word in line


def test_an_unknown_preset_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("PDPO_PRESET", "huge")
    with pytest.raises(ValueError, match="get_preset: expected one of tiny, .*got 'huge'"):
        get_preset()
