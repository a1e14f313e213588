"""One of several processes that work together, for tests; `test_distributed.py` starts one for each rank."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import worker
from stages import command as pdpo_command

from pdpo import stages, training
from pdpo.distributed import launch_rank, launch_size, process_group, rank
from pdpo.training import evaluate_rows, policy_logps, train

STEPS = 6
CASES = {  # method, changes of its config
    "sft, 3 and 2 rows in 3 and 2 micro batches": ("sft", {"batch_size": 5, "micro_batch_size": 1}),
    "dpo": ("dpo", {}),
    "dpo, 2 and 1 rows, on padded batches, not on trees": ("dpo", {"batch_size": 3, "micro_batch_size": 4}),
    "plackett_luce by sgd": ("plackett_luce", {"optimizer": "sgd", "lr": 0.1}),
}


def prepared(name: str):
    """A case's policy, rows and config; each process begins with weights of its own, of which the leader's count."""
    method, changes = CASES[name]
    policy, rows, config = worker.parts(method)
    if rank():
        policy.load_state_dict({key: value + 0.1 for key, value in policy.state_dict().items()})
    # where a gradient is near 0, Adam makes steps of rounding errors: at ten times this rate they reach 1e-5 in one process, too
    return policy, rows, replace(config, **{"steps": STEPS, "lr": 3e-4, "num_evaluations": 3, **changes})


def run_case(name: str, checkpoint: Path | None = None) -> dict:
    """History, weights, steps taken, the reference's numbers, and what is measured on fewer rows than there are processes."""
    policy, rows, config = prepared(name)
    fastest = (lambda policy, rows: policy_logps) if "padded" in name else training.fastest_logps
    counted = mock.patch.object(training, "train_step", side_effect=training.train_step)
    with mock.patch.object(training, "fastest_logps", fastest), counted as train_step:
        history = train(
            policy, rows, config, held_out=rows[:5], show_progress=False,
            measure=lambda policy: {"eval_measured_by": rank()}, checkpoint=checkpoint, checkpoint_seconds=0.0,
        )  # fmt: skip
    return {
        "history": history,
        "weights": policy.state_dict(),
        "reference": [list(row.reference_logps) for row in rows if row.reference_logps],
        "one_row": evaluate_rows(policy, rows[5:6], config),
        "steps": train_step.call_count,
    }


def refused(**changes) -> str:
    """The error that train ends in with these changes of its config."""
    policy, rows, config = prepared("dpo")
    try:
        train(policy, rows, replace(config, **changes), show_progress=False)
    except ValueError as error:
        return str(error)


def stage_steps() -> list[str]:
    """What one process sees of a stage that the leader builds and of one that all build, twice."""
    stages.code_version = lambda build: ""  # it knows the package's functions alone
    seen = []
    for _ in range(2):
        stages.run_stage("group", "of the leader", {}, lambda folder: seen.append("built alone"))
        folder = stages.run_stage("group", "of all", {}, lambda folder: seen.append("built together"), together=True)
        seen.append(f"holds {[each.name for each in folder.iterdir()]}")
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


def command(environment: dict[str, str], *arguments: str) -> None:
    os.environ.update(environment)
    pdpo_command(*arguments)


def main(environment: dict[str, str], task: str, folder: Path) -> None:
    """Works as torchrun's process of that environment.

    Args:
        task: "killed": three steps and a half of CASES["dpo"], then the last process kills itself. "cases": every case, the
            killed one from its checkpoint; folder/RANK.pt holds what came of each.
    """
    os.environ.update(environment)
    with process_group():
        if task == "killed":
            die_after(3)
            run_case("dpo", folder / "checkpoint.pt")
        results = {name: run_case(name) for name in CASES}
        results["resumed"] = run_case("dpo", folder / "checkpoint.pt")
        results["stage"] = stage_steps()
        results["batch of one row"] = refused(batch_size=1)
        with mock.patch.object(training, "row_losses", side_effect=torch.OutOfMemoryError("CUDA out of memory")):
            results["out of memory"] = refused()
        torch.save(results, folder / f"{launch_rank()}.pt")
