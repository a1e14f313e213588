"""Several processes that train one policy together, started by `torchrun`. A process alone finds nothing to do here.

Each takes its share of every batch's rows; gradients and logged numbers are added up, so that the result is that of one
process but for rounding. What is decided, written or measured once is the leader's work: that of process 0."""

import contextlib
import datetime
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from pdpo.device import device

TIMEOUT = datetime.timedelta(hours=12)  # while the leader samples, judges or waits for a lock, the others wait for it


def launched() -> bool:
    """Whether torchrun started this process; it may have a group with the others or not."""
    return "LOCAL_RANK" in os.environ


def launch_rank() -> int:
    """torchrun's number of this process among all that it started; 0 without torchrun."""
    return int(os.environ["RANK"]) if launched() else 0


def launch_size() -> int:
    """How many processes torchrun started, on all machines; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def claim_gpu() -> None:
    """Makes the GPU that `device.device` names under torchrun what "cuda" means; without torchrun or GPU, nothing."""
    index = device().index
    if index is None:
        return
    if index >= (count := torch.cuda.device_count()):
        got = f"one for each of its GPUs, got LOCAL_RANK {index}"
        raise ValueError(f"torchrun: expected at most {count} processes on this machine, {got}. Lower --nproc-per-node.")
    torch.cuda.set_device(index)


@contextlib.contextmanager
def process_group():
    """Joins the processes that torchrun started into one group (nccl on GPUs, else gloo) for as long as the context lasts."""
    claim_gpu()
    if launch_size() == 1:
        yield
        return
    dist.init_process_group("nccl" if device().type == "cuda" else "gloo", timeout=TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: the others may be at work in the group, until torchrun ends them


def world_size() -> int:
    """How many processes work together; 1 without a group, also under torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if world_size() > 1 else 0


def is_leader() -> bool:
    """Whether this process is the one that writes; without a group it is."""
    return rank() == 0


def share(num_rows: int) -> range:
    """Which of a batch's rows are this process's: every row is one process's, in turn."""
    return range(rank(), num_rows, world_size())


def gather(value) -> list:
    """The values of all processes, in their order, on each of them; small ones, of any type that pickle takes."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_leader(function: Callable):
    """function(), called by the leader alone while the others wait, and given to all."""
    return gather(function() if is_leader() else None)[0]


def summed(numbers: dict[str, float]) -> dict[str, float]:
    """Each key's sum over the processes; one that had no row may lack it."""
    if world_size() == 1:
        return numbers
    parts = gather(numbers)
    return {key: sum(part.get(key, 0.0) for part in parts) for key in dict.fromkeys(key for part in parts for key in part)}


@torch.no_grad()
def broadcast_weights(policy) -> None:
    """Makes every process's weights the leader's."""
    for each in policy.parameters() if world_size() > 1 else ():
        dist.broadcast(each, 0)


@torch.no_grad()
def sum_gradients(policy) -> None:
    """Adds up all processes' gradients, each over its share of the rows, in one message; every process then has their sum."""
    if world_size() == 1:
        return
    trained = [each for each in policy.parameters() if each.requires_grad]
    flat = torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in trained])
    dist.all_reduce(flat)
    for each, part in zip(trained, flat.split([each.numel() for each in trained]), strict=True):
        each.grad = part.view_as(each)
