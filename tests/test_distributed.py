"""Several processes: the numbers of one; each stage once; one clear error; resumed after a kill."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import stages
import torch

from pdpo import experiments, toy
from pdpo.__main__ import main
from pdpo.distributed import claim_gpu, gather, is_leader, launch_rank, on_leader, process_group, replicated, share, summed
from pdpo.presets import PRESETS, device, get_preset
from pdpo.stages import _num_workers

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


def run_ranks(task: str, folder: Path) -> list[tuple[int, str]]:
    """Exit status and errors of two processes that work together, as torchrun starts them, but without a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = os.environ | {"PYTHONPATH": str(ROOT), "PDPO_RUNS_DIR": str(folder / "runs"), **LOOPBACK}
    shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, ranks.__file__, task, str(folder)]
    processes = [
        subprocess.Popen(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, text=True, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each of two processes saw; before them, two others were killed and left a checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    (left, _), (killed, _) = run_ranks("killed", folder)
    assert killed == -signal.SIGKILL and left > 0  # the other one fails by itself, instead of waiting for ever
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3
    for status, errors in run_ranks("cases", folder):
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
    assert together["steps"] == ranks.STEPS
    assert len(together["history"]) == ranks.STEPS + 1
    found = differences(together["history"], alone["history"])
    print({key: f"{value:.1e}" for key, value in found.items()})
    assert {"loss", "grad_norm", "eval_loss"} <= found.keys() and max(found.values()) < 1e-5
    assert max(differences([together["one_row"]], [alone["one_row"]]).values()) < 1e-5
    torch.testing.assert_close(torch.tensor(together["reference"]), torch.tensor(alone["reference"]), rtol=1e-6, atol=1e-5)
    change = torch.cat([(weight - together["weights"][key]).flatten() for key, weight in alone["weights"].items()])
    start = ranks.prepared(name)[0].state_dict()
    way = torch.cat([(weight - start[key]).flatten() for key, weight in alone["weights"].items()])
    print(f"weights: {change.norm() / way.norm():.1e} of the way that they went")
    assert change.norm() < 1e-3 * way.norm()


def test_both_processes_have_the_same_history_and_weights_bit_for_bit(results):
    for name in [*ranks.CASES, "resumed"]:
        first, second = (result[name] for result in results)
        assert first["history"] == second["history"] and first["one_row"] == second["one_row"]
        assert first["reference"] == second["reference"] and same(first["weights"], second["weights"])


def test_what_is_measured_once_is_measured_by_the_leader_for_all(results):
    for result in results:
        measured = [row["eval_measured_by"] for row in result["dpo"]["history"] if "eval_measured_by" in row]
        assert measured == [0] * 4


def test_a_killed_run_of_two_processes_resumes_and_ends_with_the_same_bits(results):
    for result in results:
        assert result["resumed"]["steps"] == ranks.STEPS - 3
        assert result["resumed"]["history"] == result["dpo"]["history"]
        assert same(result["resumed"]["weights"], result["dpo"]["weights"])


# one of them decides


def test_a_stage_is_built_by_the_leader_or_together_then_found_by_all_and_busy_for_all(results):
    after = ["built together", "holds ['stage.json']", "holds ['stage.json']", "busy"]
    assert [result["stage"] for result in results] == [["built alone", *after], after]


def test_fewer_rows_than_processes_and_too_little_memory_are_refused(results):
    for result in results:
        assert "expected a batch_size of at least 2, the number of processes, got 1" in result["batch of one row"]
        assert result["out of memory"].startswith("train: out of memory with micro batches of 8 sequences")


def test_a_process_alone_shares_nothing_and_leads(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # some clusters set it for processes that torchrun did not start
    with process_group():
        assert launch_rank() == 0 and is_leader() and share(4) == range(4)
        assert gather("x") == ["x"] and on_leader(lambda: 5) == 5
        numbers, policy = {"x": -0.0}, torch.nn.Linear(1, 1)
        assert summed(numbers) is numbers and replicated(policy) is policy


def test_each_process_has_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device() == torch.device("cuda")
    claim_gpu()
    assert not chosen
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device() == torch.device("cuda:1")
    claim_gpu()
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="expected at most 2 processes .* got LOCAL_RANK 2. Lower --nproc-per-node"):
        claim_gpu()


def test_under_torchrun_a_process_starts_no_helpers(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("PDPO_WORKERS", "8")
    assert _num_workers() == 1


# the commands


@pytest.fixture
def file(tmp_path) -> Path:
    """A small preference file with scores."""
    path = tmp_path / "preferences.jsonl"
    rows = [
        {"prompt": each.prompt, "chosen": each.responses[0], "rejected": each.responses[-1]}
        | {"chosen_score": each.scores[0], "rejected_score": each.scores[-1]}
        for each in toy.load()[::17]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_torchrun_trains_the_stages_of_one_process_and_saves_once(python, tmp_path, file, monkeypatch):
    options = ["--preset", "tiny", "--data", str(file), "--beta", "0.3", "--sft-steps", "5", "--steps", "3"]
    together = tmp_path / "together"
    command = (*TORCHRUN, "-m", "pdpo", "train", *options, "--out", str(tmp_path / "out"))
    process = python(*command, PDPO_RUNS_DIR=str(together), **LOOPBACK)
    preset = replace(get_preset("tiny"), data=str(file), sft_steps=5, preference_steps=3)
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "alone"))
    alone = [experiments.run_sft(preset), experiments.run_preference(preset, method="dpo", beta=0.3)]
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "preset tiny: 2 processes, CPU" in printed and printed.count("dpo: SBERT win rate") == 1
    for run in alone:
        folder = together / "tiny" / run.path.name  # the number of processes is not in the key
        found = differences(json.loads((folder / "history.json").read_text()), run.history)
        print(run.method, {key: f"{value:.1e}" for key, value in found.items()})
        assert all(found[key] < 1e-5 for key in ("loss", "eval_loss", "grad_norm"))
        assert max(found.values()) < 1e-4  # rewards are differences of large numbers
        assert json.loads((folder / "stage.json").read_text())["environment"]["processes"] == 2
        assert "processes" not in json.loads((run.path / "stage.json").read_text())["environment"]
    assert not [path for path in (together / "tiny").iterdir() if ".partial" in path.name]
    assert {"config.json", "model.safetensors", "history.json"} <= set(os.listdir(tmp_path / "out"))


def test_bad_input_under_torchrun_ends_in_one_line_and_a_failure(python, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b"}\n', encoding="utf-8")
    process = python(*TORCHRUN, "-m", "pdpo", "train", "--data", str(path), **LOOPBACK)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    (line,) = (line for line in (printed + errors).splitlines() if line.startswith("error"))
    assert line.startswith(f"error: {path}, line 1: key 'rejected'")


def test_a_sweep_under_torchrun_does_every_stage_once_and_prints_one_table(python, tmp_path, monkeypatch, capsys):
    preset = stages.preset(tmp_path)
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    options = ["--method", "sft", "dpo", "--beta", "0.1", "0.3", "--seeds", "0", "1"]
    process = python(*TORCHRUN, ranks.__file__, "sweep", str(tmp_path), *options, "--out", str(tmp_path / "new" / "table.csv"))
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    done = [line.split(maxsplit=1) for line in (tmp_path / "log").read_text().splitlines()]
    trained = [what for _, what in done if what != "judged"]
    expected = [f"sft None {seed}" for seed in (0, 1)] + [f"dpo {beta} {seed}" for beta in (0.1, 0.3) for seed in (0, 1)]
    assert sorted(trained) == sorted(expected) and len(done) - len(trained) == 6  # six win rates
    assert {who for who, _ in done} == {"0", "1"}
    names = [path.name for path in (tmp_path / "runs" / "quick").iterdir() if path.is_dir()]
    assert len(names) == 12 and not any(name.endswith(".partial") for name in names)

    with open(tmp_path / "new" / "table.csv", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["method"], row["beta"], row["seed"]) for row in rows] == [
        ("sft", "", "0"), ("dpo", "0.1", "0"), ("dpo", "0.3", "0"), ("sft", "", "1"), ("dpo", "0.1", "1"), ("dpo", "0.3", "1"),
    ]  # fmt: skip
    run = experiments.run_preference(preset, method="dpo", beta=0.3, seed=1)
    assert float(rows[-1]["eval_loss"]) == run.history[-1]["eval_loss"]
    for row in rows:
        assert float(row["win_low"]) <= float(row["win"]) <= float(row["win_high"])
        assert (float(row["kl"]) < 1e-6) == (row["method"] == "sft")

    # alone, on the finished stages: the same table, and nothing trained again
    monkeypatch.setitem(PRESETS, "tiny", preset)
    monkeypatch.setattr(experiments, "train", None)
    assert main(["sweep", "--preset", "tiny", *options]) == 0
    table = capsys.readouterr().out.splitlines()[-7:]
    assert table[0].split() == list(rows[0]) and "\n".join(table) in printed


@pytest.mark.parametrize(
    "options, word", [(["--beta", "0.1", "0"], "beta > 0"), (["--out", "OUT"], "expected a new file, got one that exists")]
)
def test_a_sweep_that_cannot_work_is_refused_before_anything_is_trained(monkeypatch, capsys, tmp_path, options, word):
    monkeypatch.setattr(experiments, "run_sft", lambda *_, **__: pytest.fail("training began"))
    (tmp_path / "OUT").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--preset", "tiny", *options]) == 2
    assert word in capsys.readouterr().err and (tmp_path / "OUT").read_text() == "mine"


def test_on_the_toy_the_table_has_the_gold_score(monkeypatch, capsys, tmp_path):
    from pdpo.data import load_split

    parts = load_split("toy")
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(experiments, "load_split", lambda name: tuple(part[::12] for part in parts))
    monkeypatch.setattr(experiments, "load_judge", lambda *_, **__: ranks.Judge())
    monkeypatch.setitem(PRESETS, "tiny", replace(stages.preset(tmp_path), data="toy"))
    assert main(["sweep", "--preset", "tiny", "--method", "sft"]) == 0
    header, row = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert header == ["method", "beta", "seed", "eval_loss", "kl", "win", "win_low", "win_high", "score"]
    assert row[0] == "sft" and 1 <= float(row[-1]) <= 10
