"""Small stages for tests, also in processes of their own (through the fixture `forked`)."""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from pdpo import __main__, commands, experiments, making, toy, training
from pdpo.presets import Preset, TrainConfig
from pdpo.stages import Missing, _only_looking, claim_one


def preset(folder: Path, **changes) -> Preset:
    """A preset that trains in a second, on 60 of the toy's prompts, which it writes into folder as a file."""
    file = folder / "data.json"
    rows = [{"prompt": record.prompt, "responses": record.responses, "scores": record.scores} for record in toy.load()[::17]]
    if not file.exists():  # else another process may be reading it
        file.write_text(json.dumps(rows))
    small = {"micro_batch_size": 16, "num_evaluations": 2}
    settings = {
        "data": str(file), "vocab_size": 400, "embedding": 32, "layers": 1, "heads": 2, "context": 80,
        "sft": TrainConfig("sft", 12, 8, 6e-3, **small), "preference": TrainConfig("dpo", 6, 8, 2e-4, beta=0.1, **small),
        "num_kl_prompts": 3, "max_new_tokens": 6, "num_samples": 2, "num_judged": 2, "checkpoint_seconds": 0.0,
    }  # fmt: skip
    return Preset("quick", **(settings | changes))


class Judge:
    """Stands in for SBERT, which takes seconds to load: a vector made of the text's letters."""

    def embed(self, texts):
        vectors = torch.tensor([[text.count(letter) + 0.1 for letter in "aeinrst."] for text in texts])
        return vectors / vectors.norm(dim=1, keepdim=True)


def run_win_rate(*, stage=experiments.run_win_rate, **setting):
    """The stage with that judge, in whatever process it is made."""
    with mock.patch.object(experiments, "load_judge", lambda *_, **__: Judge()):
        return stage(**setting)


def run_sft(*, log: str, killed_once: bool = False, **setting):
    """The stage, which tells the log when its training begins and ends.

    Args:
        log: a file; its lines are "begins PID" and "ends PID".
        killed_once: the first process that has taken five steps is killed there.
    """

    def tell(word: str) -> None:
        with open(log, "a") as file:
            file.write(f"{word} {os.getpid()}\n")

    def logged(*arguments, **options):
        tell("begins")
        history = train(*arguments, **options)
        tell("ends")
        return history

    def step(*arguments, **options):
        steps.append(1)
        if killed_once and len(steps) == 5 and not Path(f"{log}.killed").exists():
            Path(f"{log}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(*arguments, **options)

    train, train_step, steps = making.train, training.train_step, []
    with mock.patch.object(making, "train", logged), mock.patch.object(training, "train_step", step):
        return experiments.run_sft(**setting)


def beat(*, file: str):
    """A stage without end, which shows that it is alive."""
    if _only_looking:
        raise Missing("beat")
    while True:
        with open(file, "a") as beats:
            beats.write(".")
        time.sleep(0.02)


def train_after(barrier: Path, preset: Preset) -> None:
    """Makes the SFT stage and prints its path; when training begins, appends a line to `barrier` and waits for `barrier.go`."""
    train = making.train

    def waiting(*arguments, **options):
        with open(barrier, "a") as file:
            file.write("training\n")
        while not barrier.with_suffix(".go").exists():
            time.sleep(0.01)
        return train(*arguments, **options)

    making.train = waiting
    print(experiments.run_sft(preset).path, flush=True)


def command(*arguments: str) -> None:
    sys.exit(__main__.main(list(arguments)))


def command_without_end() -> None:
    """`python -m pdpo runs`, which has begun and does not end."""
    commands.runs = lambda options: (print("begun", flush=True), time.sleep(600))
    command("runs")


def claim() -> None:
    print(claim_one(2), claim_one(2), flush=True)
    input()


def become(function, arguments, options: dict, environment: dict[str, str], pipes) -> None:
    """A forked process's first function: takes its environment and its standard streams, then does the work."""
    os.environ.clear()
    os.environ.update(environment)
    for number, pipe in enumerate(pipes):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    tempfile.tempdir = None  # $TMPDIR may be another one here
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    torch.set_num_threads(1)
    function(*arguments, **options)
    sys.stdout.flush()
