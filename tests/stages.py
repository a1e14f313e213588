"""One stage in a process of its own, for tests of locks and of killed stages: `python stages.py FUNCTION KEYWORDS-AS-JSON`.

$BARRIER: a file to append a line to when training begins, and then to wait for `$BARRIER.go`.
$ANNOUNCE: print a line after each step and wait for one on standard input before the next.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from pdpo import experiments, toy, training
from pdpo.presets import Preset


def preset(folder: Path, **changes) -> Preset:
    """A preset that trains in a second, on 60 of the toy's prompts, which it writes into folder as a file."""
    file = folder / "data.json"
    rows = [{"prompt": record.prompt, "responses": record.responses, "scores": record.scores} for record in toy.load()[::17]]
    if not file.exists():  # else another process may be reading it
        file.write_text(json.dumps(rows))
    settings = {
        "data": str(file), "vocab_size": 400, "embedding": 32, "layers": 1, "heads": 2, "context": 80,
        "sft_steps": 12, "sft_batch_size": 8, "preference_steps": 6, "preference_batch_size": 8, "micro_batch_size": 16,
        "num_evaluations": 2, "num_kl_prompts": 3, "max_new_tokens": 6, "checkpoint_seconds": 0.0,
    }  # fmt: skip
    return Preset("quick", **(settings | changes))


def announce_steps() -> None:
    step = training.train_step

    def announced(*arguments, **options):
        record = step(*arguments, **options)
        print("step", flush=True)
        sys.stdin.readline()
        return record

    training.train_step = announced


def wait_at(barrier: Path) -> None:
    train = experiments.train

    def waiting(*arguments, **options):
        with open(barrier, "a") as file:
            file.write("training\n")
        while not barrier.with_suffix(".go").exists():
            time.sleep(0.01)
        return train(*arguments, **options)

    experiments.train = waiting


def beat(*, file: str, wait: bool) -> None:
    """A stage without end, which shows that it is alive."""
    while True:
        with open(file, "a") as beats:
            beats.write(".")
        time.sleep(0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ANNOUNCE"):
        announce_steps()
    if os.environ.get("BARRIER"):
        wait_at(Path(os.environ["BARRIER"]))
    options = json.loads(sys.argv[2])
    chosen = preset(Path(options.pop("folder")))
    print(getattr(experiments, sys.argv[1])(chosen, **options).path, flush=True)
