"""A short training run, for tests that kill it; `main` announces its steps."""

import copy
import functools
import os
import signal
import sys
from pathlib import Path

import torch

from pdpo import toy
from pdpo.data import pairs
from pdpo.encoding import encode_records
from pdpo.models import load_policy, train_tokenizer, with_reward_head
from pdpo.presets import ONLINE, WITH_HEAD, WITHOUT_REFERENCE, OnlineConfig, Preset, TrainConfig
from pdpo.rl import train_online
from pdpo.training import Row, train, with_reference_logps

STEPS = 20
PRESET = Preset("worker", vocab_size=400, embedding=32, layers=2, heads=2, context=80)


def parts(method: str):
    """A random policy, rows and a config for one method; a run measures after each step."""
    policy, rows = _parts(method)
    if method in ONLINE:
        config = OnlineConfig(method, STEPS, 4, 3e-3, beta=0.1, num_samples=2, num_evaluations=STEPS, seed=3)
        return copy.deepcopy(policy), rows, config
    beta = None if method in WITHOUT_REFERENCE else 0.1
    config = TrainConfig(method, STEPS, 8, 3e-3, beta=beta, micro_batch_size=8, num_evaluations=STEPS, seed=3)
    return copy.deepcopy(policy), list(rows), config


@functools.cache
def _parts(method: str):
    records = toy.load()[::40]
    tokenizer = train_tokenizer(records, vocab_size=400)
    policy = load_policy(PRESET, tokenizer=tokenizer, seed=1)
    if method in ONLINE:  # not rows, but what the loop takes in their place

        def score(samples):
            return torch.tensor([len(each.text) / 10 for each in samples])

        return policy, (tokenizer, [record.prompt for record in records], score)
    if method not in ("sft", "plackett_luce"):
        records = pairs(records, num_per_prompt=2)
    offsets = [record.scores[0] - record.scores[1] if method in ("edpo", "drdo") else 0.0 for record in records]
    encoded = encode_records(tokenizer, records, max_length=80)
    rows = [Row(tuple(each), offset) for each, offset in zip(encoded, offsets, strict=True)]
    if method == "sft":
        return policy, [Row((each,)) for row in rows for each in row.sequences]
    if method in WITH_HEAD:
        return with_reward_head(policy, seed=2), rows
    return policy, with_reference_logps(policy, rows, micro_batch_size=16)


def run(method: str, checkpoint: Path | None, *, announce: bool = False) -> dict:
    """The final weights, history and generator; with `announce`, each step is printed when it is done."""
    policy, rows, config = parts(method)
    torch.manual_seed(1 if checkpoint is not None and checkpoint.exists() else 0)

    def measure(policy) -> dict:
        if announce:
            print("step", flush=True)
            sys.stdin.readline()  # whoever kills this process lets it take one step at a time
        return {"eval_norm": float(sum(weight.detach().norm() for weight in policy.parameters()))}

    saving = {"measure": measure, "checkpoint": checkpoint, "checkpoint_seconds": 0.0, "show_progress": False}
    if method in ONLINE:
        history = train_online(policy, copy.deepcopy(policy), *rows, config, max_new_tokens=6, **saving)
    else:
        history = train(policy, rows, config, held_out=rows[:8], **saving)
    return {"weights": policy.state_dict(), "history": history, "rng": torch.get_rng_state()}


def die_while_saving(step: int) -> None:
    """Makes torch.save write half of the step's checkpoint and then kill this process."""
    save = torch.save

    def half(state, path):
        save(state, path)
        if state["history"][-1]["step"] == step:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def main(method: str, checkpoint: Path, last: int | None = None) -> None:
    if last:
        die_while_saving(last)
    run(method, checkpoint, announce=True)
