"""What a training run survives: being killed (its checkpoint) and running out of memory (smaller micro batches)."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pdpo.distributed import is_leader, world_size
from pdpo.files import is_whole, replacing, seal, set_aside
from pdpo.presets import TrainConfig


class Checkpoint:
    """The file from which a killed run goes on.

    Args: path: of the file; None keeps none. config: of the run; `load` compares it with the saved one.
          seconds: between two saves; 0 saves each time. parts: what has a state_dict: policy, optimizer, scaler."""

    def __init__(self, path: Path | None, config: dict, seconds: float, **parts):
        self.path, self.config, self.seconds, self.parts = path, config, seconds, parts
        self.saved_at = time.monotonic()

    def load(self) -> list[dict]:
        """Puts the parts and the generator back to where the run stopped; its history so far, [] where there is no file."""
        state = load_checkpoint(self.path, self.config) if self.path is not None else None
        if state is None:
            return []
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        return state["history"]

    def save_when_due(self, history: list[dict]) -> None:
        """Saves all parts, the generator and the history, where the last save lies far enough back."""
        if self.path is None or time.monotonic() - self.saved_at < self.seconds or not is_leader():
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.path, states | {"rng": torch.get_rng_state(), "history": history, "config": self.config})
        self.saved_at = time.monotonic()


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` to `path`: a process killed at any moment leaves either the old checkpoint or the new one."""
    with replacing(path) as temporary:
        torch.save(state, temporary)
        seal(temporary)


def load_checkpoint(path: Path, config: dict) -> dict | None:
    """The state saved at `path`; None where there is none, or where it is damaged and has been set aside.

    config: of the run that wants to go on; ValueError, naming each field that differs, where it is not the saved one."""
    if not path.exists():
        return None
    if not is_whole(path):
        return set_aside(path, "this checkpoint is not what was written")
    state = torch.load(path, map_location="cpu", weights_only=True)
    saved, now = state["config"], json.loads(json.dumps(config))
    differ = [field for field in sorted(saved.keys() | now.keys()) if saved.get(field) != now.get(field)]
    if differ:
        fields = ", ".join(f"{field} (saved {saved.get(field)!r}, now {now.get(field)!r})" for field in differ)
        way_out = "Go on with the saved values, or remove the file to start afresh."
        raise ValueError(f"{path}: this checkpoint is of another run; these fields differ: {fields}. {way_out}")
    return state


class Memory:
    """How many sequences a step takes at a time: at first what free memory is estimated to hold, half of that once it did not.

    `config` is the run's, with the micro batch that fits; its gradients add up to the same."""

    def __init__(self, policy, rows: list, config: TrainConfig):
        self.device = next(policy.parameters()).device
        self.limit = config.micro_batch_size
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            self.limit = min(self.limit, fitting_micro_batch(policy, rows, free))
        self.config = replace(config, micro_batch_size=self.limit)

    def fit(self, step: Callable[[TrainConfig], dict]) -> dict:
        """step(config), and again with half the micro batch where memory runs out; ValueError the second time.

        Of several processes none tries again: the others would wait for a gradient that this one does not have."""
        while True:
            try:
                return step(self.config)
            except torch.OutOfMemoryError as error:
                size, reason = self.config.micro_batch_size, str(error).splitlines()[0]
            if size < self.limit or size == 1 or world_size() > 1:
                times = "" if world_size() > 1 else " twice, the last time"
                way_out = "Close other programs on this device, lower micro_batch_size or context, or use a smaller model."
                raise ValueError(f"train: out of memory{times} with micro batches of {size} sequences ({reason}). {way_out}")
            print(f"train: out of memory with micro batches of {size} sequences; going on with {size // 2}")
            self.config = replace(self.config, micro_batch_size=size // 2)


def fitting_micro_batch(policy, rows: list, free_bytes: int) -> int:
    """How many sequences, each as long as the longest, train in memory at a time; a cautious estimate, at least 1.

    Args: policy: on its device, before its first gradient. rows: to train on. free_bytes: of that device."""
    config, longest = policy.config, max(len(each.input_ids) for row in rows for each in row.sequences)
    gradients_and_adam = 12 * sum(each.numel() for each in policy.parameters())
    # float32: 18 vectors of the width a layer are kept for the backward pass; of the vocabulary 4 are alive at the peak
    a_token = 4 * (18 * config.hidden_size * config.num_hidden_layers + 4 * config.vocab_size)
    return max(int(0.8 * (free_bytes - gradients_and_adam) / (longest * a_token)), 1)
