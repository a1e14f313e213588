"""What this process computes on: its device, the precision and the number of threads that suit it."""

import contextlib
import os

import psutil
import torch


def device() -> torch.device:
    """cuda where present, else cpu; of the processes that torchrun starts on one machine, each has its own GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")


def choose_precision(capability: tuple[int, int] | None = None) -> str:
    """bfloat16 on Ampere and later, float16 (with a loss scaler) on older GPUs such as the T4, float32 on the CPU.

    Args: capability: CUDA's (major, minor), (7, 5) for a T4; None asks this machine."""
    if capability is None:
        if not torch.cuda.is_available():
            return "float32"
        capability = torch.cuda.get_device_capability()
    return "bfloat16" if capability >= (8, 0) else "float16"


def autocast(device: torch.device, precision: str):
    """Runs matrix products in `precision`; float32 is no autocast at all."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_children() -> None:
    """Kills all processes that this one has started, and theirs: kernels and workers that would outlive it."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
