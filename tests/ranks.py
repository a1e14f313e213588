"""One of several processes that work together, for tests; `test_distributed.py` or torchrun starts one for each rank.

`ranks.py killed FOLDER`: three steps and a half of CASES["dpo"], then the last process kills itself.
`ranks.py cases FOLDER`: every case, the killed one from its checkpoint; FOLDER/RANK.pt holds what came of each.
`ranks.py sweep FOLDER ARGUMENTS`: `python -m pdpo sweep` on a preset that trains in a second, without SBERT; FOLDER/log has a
line for each training and judging. No first training begins before all processes have come to theirs.
"""

import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import filelock
import stages
import torch
import worker

from pdpo import experiments, training
from pdpo.__main__ import main
from pdpo.distributed import gather, is_leader, launch_rank, launch_size, on_leader, process_group, rank
from pdpo.presets import PRESETS
from pdpo.stages import Busy, run_stage
from pdpo.training import evaluate_rows, policy_logps, train

STEPS = 6
CASES = {  # method, changes of its config
    "sft": ("sft", {}),
    "sft, 3 and 2 rows in 3 and 2 micro batches": ("sft", {"batch_size": 5, "micro_batch_size": 1}),
    "dpo": ("dpo", {}),
    "dpo, 2 and 1 rows": ("dpo", {"batch_size": 3}),
    "dpo, 4 and 3 rows in 4 and 3 micro batches": ("dpo", {"batch_size": 7, "micro_batch_size": 2}),
    "dpo on padded batches, not on trees": ("dpo", {"micro_batch_size": 4}),
    "plackett_luce": ("plackett_luce", {}),
    "plackett_luce by sgd": ("plackett_luce", {"optimizer": "sgd", "lr": 0.1}),
}


def prepared(name: str):
    """A case's policy, rows and config."""
    method, changes = CASES[name]
    policy, rows, config = worker.parts(method)
    policy.register_buffer("constant", torch.ones(3), persistent=False)  # such as models with rotary positions have
    # where a gradient is near 0, Adam makes steps of rounding errors: at ten times this rate they reach 1e-5 in one process, too
    return policy, rows, replace(config, **{"steps": STEPS, "lr": 3e-4, **changes})


def run_case(name: str, checkpoint: Path | None = None) -> dict:
    """History, weights, steps taken, the reference's numbers, and what is measured on fewer rows than there are processes."""
    policy, rows, config = prepared(name)
    fastest, train_step, steps = training.fastest_logps, training.train_step, []
    if "padded" in name:
        training.fastest_logps = lambda policy, rows: policy_logps
    training.train_step = lambda *arguments, **options: steps.append(1) or train_step(*arguments, **options)
    try:
        history = train(
            policy, rows, config, held_out=rows[:5], evaluate_every=2, show_progress=False,
            measure=lambda policy: {"eval_measured_by": rank()}, checkpoint=checkpoint, checkpoint_seconds=0.0,
        )  # fmt: skip
    finally:
        training.fastest_logps, training.train_step = fastest, train_step
    return {
        "history": history,
        "weights": policy.state_dict(),
        "reference": [list(row.reference_logps) for row in rows if row.reference_logps],
        "one_row": evaluate_rows(policy, rows[5:6], config),
        "steps": len(steps),
    }


def refused(config_changes: dict) -> str:
    """The error that train ends in."""
    policy, rows, config = prepared("dpo")
    try:
        train(policy, rows, replace(config, **config_changes), show_progress=False)
    except ValueError as error:
        return str(error)
    return ""


def out_of_memory() -> str:
    row_losses = training.row_losses

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    training.row_losses = too_large
    try:
        return refused({})
    finally:
        training.row_losses = row_losses


def stage_steps() -> list[str]:
    """What one process sees of a stage that is built, found, and then locked by someone else."""
    seen = []

    def stage() -> Path:
        run_stage("group", "of the leader", {}, (), lambda folder: seen.append("built alone"), wait=False)
        build = lambda folder: seen.append("built together")  # noqa: E731
        return run_stage("group", "of all", {}, (), build, wait=False, together=True)[0]

    for _ in range(2):
        seen.append(f"holds {[each.name for each in stage().iterdir()]}")
    path = stage()
    gather(None)  # nobody is in it any more
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    if is_leader():
        shutil.rmtree(path)
        lock.acquire()
    try:
        stage()
    except Busy:
        seen.append("busy")
    on_leader(lock.release)
    return seen


def die_after(steps: int) -> None:
    """The last process kills itself in the middle of the step after so many; the others are left with half of it."""
    row_losses, seen = training.row_losses, []

    def counted(policy, *arguments, **options):
        seen.append(policy.training)
        if sum(seen) > steps and rank() == launch_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return row_losses(policy, *arguments, **options)

    training.row_losses = counted


def log_work(log: Path) -> None:
    """Stands in for SBERT and says what was done by whom."""
    train = experiments.train

    def say(text: str) -> None:
        with open(log, "a") as file:
            file.write(f"{launch_rank()} {text}\n")

    def logged(policy, rows, config, **options):
        say(f"{config.method} {config.beta} {config.seed}")
        end = time.monotonic() + 120
        while len({line[0] for line in log.read_text().splitlines()}) < launch_size():
            assert time.monotonic() < end
            time.sleep(0.01)
        return train(policy, rows, config, **options)

    def judge(*_, **__):
        say("judged")
        return Judge()

    experiments.train, experiments.load_judge = logged, judge


class Judge:
    """A vector made of the text's letters."""

    def embed(self, texts):
        vectors = torch.tensor([[text.count(letter) + 0.1 for letter in "aeinrst."] for text in texts])
        return vectors / vectors.norm(dim=1, keepdim=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "sweep":
        PRESETS["tiny"] = stages.preset(folder)
        log_work(folder / "log")
        sys.exit(main(["sweep", "--preset", "tiny", *sys.argv[3:]]))
    with process_group():
        if task == "killed":
            die_after(3)
            run_case("dpo", folder / "checkpoint.pt")
        results = {name: run_case(name) for name in CASES}
        results["resumed"] = run_case("dpo", folder / "checkpoint.pt")
        results["stage"] = stage_steps()
        results["batch of one row"] = refused({"batch_size": 1})
        results["out of memory"] = out_of_memory()
        torch.save(results, folder / f"{launch_rank()}.pt")
