"""Several processes: the numbers of one; each stage once; one clear error; resumed after a kill."""

import json
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import stages
import torch
from conftest import Forked, refusal

from pdpo import distributed, experiments
from pdpo.device import device
from pdpo.presets import get_preset
from pdpo.stages import num_runs_at_a_time

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


def environments(folder: Path) -> list[dict[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"PDPO_RUNS_DIR": str(folder / "runs"), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | LOOPBACK | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def run_ranks(fork_server, task: str, folder: Path) -> list[tuple[int, str]]:
    """Exit status and errors of two processes that work together, as torchrun starts them, but without a process of its own."""
    processes = [Forked(fork_server, ranks.main, (each, task, folder), {}) for each in environments(folder)]
    errors = [process.communicate()[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def results(fork_server, tmp_path_factory) -> list[dict]:
    """What each of two processes saw; before them, two others were killed and left a checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    (left, _), (killed, _) = run_ranks(fork_server, "killed", folder)
    assert killed == -signal.SIGKILL and left > 0  # the other one fails by itself, instead of waiting for ever
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["history"][-1]["step"] == 3
    for status, errors in run_ranks(fork_server, "cases", folder):
        assert status == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def differences(one: list[dict], other: list[dict]) -> dict[str, float]:
    """The largest difference of each number, relative where it is above 1."""
    assert [row.keys() for row in one] == [row.keys() for row in other]
    found: dict[str, float] = {}
    for a, b in zip(one, other, strict=True):
        for key in a:
            found[key] = max(found.get(key, 0.0), abs(a[key] - b[key]) / max(abs(b[key]), 1.0))
    return found


def same(one, other) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


# the same numbers


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_processes_give_the_numbers_of_one(results, name):
    alone, together = ranks.run_case(name), results[0][name]
    assert together["steps"] == ranks.STEPS == len(together["history"]) - 1
    found = differences(together["history"], alone["history"])
    assert {"loss", "grad_norm", "eval_loss"} <= found.keys() and max(found.values()) < 1e-5
    assert max(differences([together["one_row"]], [alone["one_row"]]).values()) < 1e-5
    torch.testing.assert_close(torch.tensor(together["reference"]), torch.tensor(alone["reference"]), rtol=1e-6, atol=1e-5)
    change = torch.cat([(weight - together["weights"][key]).flatten() for key, weight in alone["weights"].items()])
    start = ranks.prepared(name)[0].state_dict()
    way = torch.cat([(weight - start[key]).flatten() for key, weight in alone["weights"].items()])
    assert change.norm() < 1e-3 * way.norm()


def test_both_processes_have_the_same_history_and_weights_bit_for_bit_also_where_they_resume_a_killed_run(results):
    for name in [*ranks.CASES, "resumed"]:
        first, second = (result[name] for result in results)
        assert first["history"] == second["history"] and first["one_row"] == second["one_row"]
        assert first["reference"] == second["reference"] and same(first["weights"], second["weights"])
        measured = [row["eval_measured_by"] for row in first["history"] if "eval_measured_by" in row]
        assert measured == [0] * 4  # by the leader, for all
    resumed, unbroken = results[0]["resumed"], results[0]["dpo"]
    assert resumed["steps"] == ranks.STEPS - 3 and resumed["history"] == unbroken["history"]
    assert same(resumed["weights"], unbroken["weights"])


# one of them decides


def test_a_stage_is_built_once_by_the_leader_or_by_all_together_and_then_found(results):
    after = ["built together", "holds ['stage.json']", "holds ['stage.json']"]
    assert [result["stage"] for result in results] == [["built alone", *after], after]


def test_fewer_rows_than_processes_and_too_little_memory_are_refused(results):
    for result in results:
        assert "expected a batch_size of at least 2, the number of processes, got 1" in result["batch of one row"]
        assert result["out of memory"].startswith("train: out of memory with micro batches of 8 sequences")


def test_a_process_alone_shares_nothing_and_leads(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # some clusters set it for processes that torchrun did not start
    with distributed.process_group():
        assert distributed.launch_rank() == 0 and distributed.is_leader() and distributed.share(4) == range(4)


def test_each_process_has_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device() == torch.device("cuda")
    distributed.claim_gpu()
    assert not chosen
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device() == torch.device("cuda:1")
    distributed.claim_gpu()
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="expected at most 2 processes .* got LOCAL_RANK 2. Lower --nproc-per-node"):
        distributed.claim_gpu()


def test_under_torchrun_a_process_makes_one_run_at_a_time_and_no_sweep(monkeypatch, capsys):
    for key, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "PDPO_WORKERS": "8"}.items():
        monkeypatch.setenv(key, value)
    assert num_runs_at_a_time() == 1
    assert "expected to be started without torchrun" in refusal(capsys, "sweep", "--preset", "tiny")


# the commands


def test_torchrun_trains_the_stages_of_one_process_and_saves_once(python, tmp_path, monkeypatch):
    file = stages.preset(tmp_path).data
    options = ["--preset", "tiny", "--data", file, "--beta", "0.3", "--sft-steps", "5", "--steps", "3"]
    together = tmp_path / "together"
    command = (*TORCHRUN, "-m", "pdpo", "train", *options, "--out", str(tmp_path / "out"))
    process = python(*command, PDPO_RUNS_DIR=str(together), **LOOPBACK)
    preset = replace(get_preset("tiny"), data=file)
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "alone"))
    sft = experiments.run_sft(replace(preset, sft=replace(preset.sft, steps=5)))
    alone = [sft, experiments.run_preference(sft, method="dpo", beta=0.3, steps=3)]
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "preset tiny: 2 processes, CPU" in printed and printed.count("SBERT win rate") == 1
    for run in alone:
        folder = together / "tiny" / run.path.name  # the number of processes is not in the key
        found = differences(json.loads((folder / "history.json").read_text()), run.history)
        assert all(found[key] < 1e-5 for key in ("loss", "eval_loss", "grad_norm"))
        assert max(found.values()) < 1e-4  # rewards are differences of large numbers
        assert json.loads((folder / "stage.json").read_text())["environment"]["processes"] == 2
        assert "processes" not in json.loads((run.path / "stage.json").read_text())["environment"]
    assert not [path for path in (together / "tiny").iterdir() if ".partial" in path.name]
    assert {"config.json", "model.safetensors", "history.json"} <= set(os.listdir(tmp_path / "out"))


def test_bad_input_under_torchrun_ends_in_one_line_and_a_failure(forked, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b"}\n', encoding="utf-8")
    leader, other = (forked(ranks.command, each, "train", "--data", str(path)) for each in environments(tmp_path))
    error = leader.communicate()[1]
    assert leader.returncode == 2 and [line for line in error.splitlines() if line.startswith("error")] == [
        error.splitlines()[-1]
    ]
    assert error.splitlines()[-1].startswith(f"error: {path}, line 1: key 'rejected'")
    assert other.returncode is None  # torchrun ends it before it says the same
