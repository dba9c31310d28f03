"""Ranks of a training run: torchrun's, or just this process. One place that knows torch.distributed's set-up.

Called by `train` once, and by whoever needs numbers of all ranks. Without torchrun nothing is initialised and every
function is the identity.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=60)
"""Ranks wait for rank 0's rollouts this long."""


def start() -> torch.device:
    """Join the other ranks, if torchrun started this process; the device to train on, a CPU's with half its cores."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Servers share these cores. With more threads than cores, all wait for one that does not run, by spinning: on
        # two cores a step of tiny-cpu took 6 s instead of 1.3.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # gloo beside NCCL: plans of batches travel between hosts' memories.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Of this process; 0 decides."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes that train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: T | None) -> T:
    """Rank 0's value on every rank."""
    box: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
