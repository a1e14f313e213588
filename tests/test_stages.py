"""Stages: resumed after a kill, shared by processes, made by workers of this machine or of a cluster, on so many threads."""

import csv
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import stages
import torch
from conftest import refusal, same_weights, wait_until

import pdpo.stages
from pdpo import __main__, experiments, making, presets, training
from pdpo.experiments import run_sft, start
from pdpo.stages import num_runs_at_a_time, run_all, runs_dir

SEEDS = range(4)


@pytest.fixture
def threads():
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sweep(preset, log: Path, **options) -> tuple[list, list[list[str]]]:
    """Four SFT runs, which must be those that this process makes by itself, and the log's lines: [word, process]."""
    runs = run_all(stages.run_sft, [{"preset": preset, "seed": seed, "log": str(log), **options} for seed in SEEDS])
    serial = [run_sft(replace(preset, name="serial"), seed=seed) for seed in SEEDS]
    assert [run.seed for run in runs] == list(SEEDS) and all(map(same_weights, runs, serial))
    assert [run.history for run in runs] == [run.history for run in serial]
    return runs, [line.split() for line in log.read_text().splitlines()]


# killed and shared


def test_a_stage_killed_on_its_way_resumes_where_it_stopped_and_ends_with_the_same_bits(quick, forked, tmp_path, monkeypatch):
    process = forked(stages.run_sft, preset=quick, log=str(tmp_path / "log"), killed_once=True)
    assert process.wait() == -signal.SIGKILL
    (partial,) = (runs_dir() / "quick").glob("*.partial")
    (partial / ".checkpoint.pt.1").write_bytes(b"half")  # as if it had been killed while saving, too
    steps, step = [], training.train_step
    monkeypatch.setattr(training, "train_step", lambda *arguments, **options: steps.append(1) or step(*arguments, **options))
    resumed = run_sft(quick)
    assert len(steps) == quick.sft.steps - 4 and not partial.exists()
    assert sorted(path.name for path in resumed.path.iterdir()) == ["history.json", "policy", "stage.json"]
    unbroken = run_sft(replace(quick, name="unbroken"))
    assert resumed.history == unbroken.history and same_weights(resumed, unbroken)


def test_two_processes_that_need_one_stage_train_it_once_and_the_other_says_what_it_waits_for(quick, forked, tmp_path):
    barrier = tmp_path / "barrier"
    first = forked(stages.train_after, barrier, quick)
    wait_until(barrier.exists)
    second = forked(stages.train_after, barrier, quick)
    assert second.stdout.readline().startswith("waiting for sft-seed0, which another process is at")
    barrier.with_suffix(".go").touch()
    paths = [process.communicate()[0].strip() for process in (first, second)]
    assert paths == [str(run_sft(quick).path)] * 2
    assert barrier.read_text() == "training\n"  # one training


# many runs


def test_a_sweep_on_two_processes_trains_each_run_once_and_what_is_kept_starts_no_process(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("PDPO_WORKERS", "2")
    runs, told = sweep(quick, tmp_path / "log")
    assert [word for word, _ in told].count("begins") == len(SEEDS) and len({process for _, process in told}) == 2
    monkeypatch.setattr(joblib, "Parallel", None)
    assert run_all(run_sft, [{"preset": quick, "seed": seed} for seed in (3, 1)]) == [runs[3], runs[1]]


@pytest.mark.parametrize("workers, expected", [(None, 8), ("2", 4)])
def test_a_model_gets_all_cores_divided_by_the_runs_at_a_time(quick, monkeypatch, capsys, threads, workers, expected):
    for module in (experiments, pdpo.device, pdpo.stages):
        monkeypatch.setattr(module, "num_cores", lambda: 8)
    monkeypatch.setenv("PDPO_WORKERS", workers) if workers else monkeypatch.delenv("PDPO_WORKERS")
    start(replace(quick, model="a model"))
    assert f"CPU, {expected} of 8 cores a run" in capsys.readouterr().out
    for run in run_all(run_sft, [{"preset": quick, "seed": seed} for seed in (0, 1)]):
        assert f"CPU, {expected} threads" in json.loads((run.path / "stage.json").read_text())["environment"]["device"]


def test_an_error_in_a_worker_arrives_as_it_is(quick, monkeypatch):  # and ends the workers, which the tests above share
    monkeypatch.setenv("PDPO_WORKERS", "2")
    wrong = replace(quick, model="/no/such/folder")
    with pytest.raises(ValueError, match="/no/such/folder"):
        run_all(run_sft, [{"preset": wrong, "seed": seed} for seed in (0, 1)])


def test_threads_of_one_process_make_one_run_after_the_other(quick, tmp_path):
    with joblib.parallel_config(backend="threading", n_jobs=2):
        _, told = sweep(quick, tmp_path / "log")
    assert [word for word, _ in told] == ["begins", "ends"] * len(SEEDS)


def test_workers_end_when_their_parent_is_killed(forked, monkeypatch, tmp_path):
    monkeypatch.setenv("PDPO_WORKERS", "2")
    files = [str(tmp_path / name) for name in "ab"]
    process = forked(run_all, stages.beat, [{"file": file} for file in files])
    wait_until(lambda: all(Path(file).exists() for file in files))
    process.kill()

    def quiet() -> bool:
        sizes = [Path(file).stat().st_size for file in files]
        time.sleep(0.5)
        return sizes == [Path(file).stat().st_size for file in files]

    wait_until(quiet)


@pytest.mark.parametrize("value", ["0", "1.5", "²"])
def test_a_senseless_number_of_workers_is_refused(monkeypatch, value):
    monkeypatch.setenv("PDPO_WORKERS", value)
    with pytest.raises(ValueError, match=f"PDPO_WORKERS: expected a number of processes, at least 1, got '{value}'"):
        num_runs_at_a_time()


def test_each_worker_claims_a_gpu_of_its_own_until_it_ends(forked, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def worker():
        process = forked(stages.claim)
        return process, process.stdout.readline().split()

    (first, of_first), (_, of_second), (_, of_third) = worker(), worker(), worker()
    assert of_first == ["0", "0"] and of_second == ["1", "1"] and of_third[0] in "01"
    first.kill()
    first.wait()
    assert worker()[1] == ["0", "0"]


# a cluster


@pytest.fixture(scope="module")
def cluster():
    """Two Dask workers of one thread each, in processes of their own."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as local:
        yield local


@pytest.mark.slow
def test_a_sweep_on_a_cluster_survives_the_death_of_a_worker(quick, cluster, tmp_path):
    with cluster.get_client(), joblib.parallel_config(backend="dask"):
        _, told = sweep(quick, tmp_path / "log", killed_once=True)
    words = [word for word, _ in told]
    assert words.count("begins") == len(SEEDS) + 1 and words.count("ends") == len(SEEDS)  # one began twice
    assert len({process for _, process in told}) >= 2 and (tmp_path / "log.killed").exists()


@pytest.mark.slow
def test_the_command_line_sweeps_on_a_cluster_also_of_one_worker(quick, cluster, tmp_path, monkeypatch):
    cluster.scale(1)
    wait_until(lambda: len(cluster.scheduler_info["workers"]) == 1)
    monkeypatch.setitem(presets.PRESETS, "tiny", quick)
    monkeypatch.setattr(experiments, "run_win_rate", stages.run_win_rate)
    arguments = ["sweep", "--preset", "tiny", "--method", "sft", "dpo", "--beta", "0.1", "0.5", "--out"]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(making, "train", None)  # this process makes nothing
        assert __main__.main([*arguments, str(tmp_path / "cluster.csv"), "--scheduler", cluster.scheduler_address]) == 0
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "serial"))
    assert __main__.main([*arguments, str(tmp_path / "serial.csv")]) == 0
    with open(tmp_path / "cluster.csv") as file:
        assert [(row["method"], row["beta"]) for row in csv.DictReader(file)] == [("sft", ""), ("dpo", "0.1"), ("dpo", "0.5")]
    assert (tmp_path / "cluster.csv").read_text() == (tmp_path / "serial.csv").read_text()


def test_a_scheduler_that_is_not_there_is_an_error_of_the_input(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(presets.PRESETS, "tiny", quick)
    refused = refusal(capsys, "sweep", "--preset", "tiny", "--scheduler", "carrier-pigeon://coop")
    assert "no Dask scheduler answers at 'carrier-pigeon://coop'" in refused


# threads


def test_tiny_runs_on_one_thread_and_says_so(quick, capsys, threads):
    torch.set_num_threads(2)
    assert start("tiny") == presets.get_preset("tiny") and torch.get_num_threads() == 1
    said = capsys.readouterr().out
    for word in ("preset tiny", "CPU, 1 of ", "float32", "toy", str(runs_dir() / "tiny")):
        assert word in said
    assert "CPU, 1 threads" in json.loads((run_sft(quick).path / "stage.json").read_text())["environment"]["device"]
