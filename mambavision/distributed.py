"""The process group and agreement between ranks. One code path: one process, torchrun on CPUs (gloo), on GPUs (nccl).

The group stays open for the whole process, also over the jobs of a Hydra multirun: closing and reopening it under one
torchrun agent reuses the agent's store keys, and ranks then read each other's stale addresses.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """Where this process stands among its peers."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world(device: str = "auto", timeout_seconds: float = 1800.0) -> World:
    """Join the process group that torchrun prepared, or stand alone without one.

    Raises:
        ValueError: `device` is cuda and there is none.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise ValueError("trainer.device=cuda, but torch sees no CUDA device here; type trainer=cpu (or trainer.device=auto)")
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"{local_world_size} processes on this node, but only {torch.cuda.device_count()} CUDA devices; "
            f"type --nproc_per_node={torch.cuda.device_count()}"
        )
    if use_cuda:
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and not dist.is_initialized():
        # Control decisions travel over gloo on CPU tensors, so that agreeing never waits for the GPU's queue.
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return World(rank, world_size, local_rank, local_world_size, torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"))


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def set_timeout(seconds: float) -> None:
    """How long a collective may wait from now on, for every backend of the default group."""
    if is_distributed():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def agree(value: int) -> int:
    """The largest `value` any rank gives; the way every decision that changes control flow is taken."""
    if not is_distributed():
        return value
    flag = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def barrier() -> None:
    if is_distributed():
        agree(0)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place; float64 for exact counts up to 2^53."""
    if is_distributed():
        dist.all_reduce(values)
    return values


class BatchNormAverager:
    """Keeps BatchNorm's running statistics equal on all ranks, and independent of how many ranks there are.

    A step's statistics are the mean over all micro-batches of the global batch, moved in with BatchNorm's momentum once a
    step. Over one micro-batch a rank this equals the published averaging before evaluation (the recurrence is linear in
    its input), yet every checkpoint holds the one true state and the world size may change on resume.
    """

    def __init__(self, model: nn.Module):
        self.layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
        self.momenta = [m.momentum for m in self.layers]
        self.buffers = [b for m in self.layers for b in (m.running_mean, m.running_var)]
        self.counters = [m.num_batches_tracked for m in self.layers]
        self.sizes = [b.numel() for b in self.buffers]

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Weigh micro-batch `index` of this rank's `count` so that after the last one each has had weight momentum/count."""
        if count == 1:
            return
        for layer, momentum in zip(self.layers, self.momenta):
            layer.momentum = (momentum / count) / (1 - momentum * (count - 1 - index) / count)

    def finish_step(self, count: int) -> None:
        """Average over ranks, one small all-reduce (20 kB for MambaVision-T), and count the step once."""
        if count > 1 and self.counters:
            torch._foreach_sub_(self.counters, count - 1)
        self._average_over_ranks()

    def _average_over_ranks(self) -> None:
        if not is_distributed() or not self.buffers:
            return
        flat = torch.cat([b.reshape(-1) for b in self.buffers])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_([b.view(-1) for b in self.buffers], list(flat.split(self.sizes)))


def close_world() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
