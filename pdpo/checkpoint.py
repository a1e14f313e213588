"""Saving so that nothing is ever half-written, and loading so that nothing is ever silently mixed."""

import json
import os
from pathlib import Path

import torch


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` (policy, optimizer, step, rng, history, config) to a temporary file and renames it to `path`.

    A process killed at any moment leaves either the old checkpoint or the new one. (One process at a time writes to a path;
    with one temporary name for all of them, no half-written file stays behind after a resumed run's next save.)
    """
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, config: dict) -> dict | None:
    """The state saved at `path`, or None where there is none.

    Args:
        path: as given to `save_checkpoint`.
        config: of the run that wants to go on; compared with the saved one.
    Raises:
        ValueError: the configs differ (each differing field is named with its saved value and its value now), or the file
            is not a checkpoint.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["config"]
    except Exception as error:  # torch.load raises many types for a file that is not its own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"{path}: expected a checkpoint, got a file that cannot be read ({reason}). Remove it.") from None
    now = json.loads(json.dumps(config))
    differences = [
        f"{field} (saved {saved.get(field)!r}, now {now.get(field)!r})"
        for field in sorted(saved.keys() | now.keys())
        if saved.get(field) != now.get(field)
    ]
    if differences:
        raise ValueError(
            f"{path}: this checkpoint is of another run; these fields differ: {', '.join(differences)}. "
            "Go on with the saved values, or remove the file to start afresh."
        )
    return state


def write_json(path: Path, value) -> None:
    """Writes value as JSON to a temporary file and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
