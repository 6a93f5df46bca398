"""The process group and agreement between ranks. One code path: one process, torchrun on CPUs (gloo), on GPUs (nccl).

The group stays open for the whole process, also over the jobs of a Hydra multirun: closing and reopening it under one
torchrun agent reuses the agent's store keys, and ranks then read each other's stale addresses.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mambavision.rendezvous import fresh_store

T = TypeVar("T")


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


def init_world(device: str = "auto", timeout_seconds: float = 1800.0, start_timeout_seconds: float = 600.0) -> World:
    """Join the process group that torchrun prepared, or stand alone without one.

    Args:
        device: cpu, cuda, or auto (CUDA where there is one).
        timeout_seconds: How long a collective may wait.
        start_timeout_seconds: How long the ranks may wait for each other before the first one.

    Raises:
        ValueError: `device` is cuda and there is none, or the environment holds only a part of what torchrun sets.
        TimeoutError: Not all ranks came.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise ValueError(
            "trainer.device is cuda, but torch sees no CUDA device here; type trainer=cpu (eval.py: device=cpu)"
        )
    # On every rank, as the first is the one that is heard.
    if use_cuda and local_world_size > torch.cuda.device_count():
        raise ValueError(
            f"{local_world_size} processes on this node, but only {torch.cuda.device_count()} CUDA devices; "
            f"type --nproc_per_node={torch.cuda.device_count()}"
        )
    if use_cuda:
        torch.cuda.set_device(local_rank)
    if not is_initialized():
        _check_launch(world_size)
    if "RANK" in os.environ and not is_initialized():
        # Control decisions travel over gloo on CPU tensors, so that agreeing never waits for the GPU's queue.
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        store = fresh_store(rank, world_size, start_timeout_seconds)
        join_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds))
    return World(
        rank,
        world_size,
        local_rank,
        local_world_size,
        torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"),
    )


def _check_launch(world_size: int) -> None:
    """Some clusters set WORLD_SIZE for every program. Alone it would have this process train on its share of the images,
    and nobody on the others."""
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and ("RANK" in os.environ or world_size > 1):
        given = " ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
        raise ValueError(
            f"{given} is set, but not {', '.join(missing)}: type torchrun --standalone --nproc_per_node=N before the script, "
            "which sets all of them, or for a single process: env -u RANK -u WORLD_SIZE python ..."
        )


def ranks_by_device(world: World, host: str) -> dict[str, Counter[str]]:
    """Collective. cuda, cpu -> how many ranks of each host compute there.

    With `auto` each rank decides for itself, and one node may have lost its GPUs. Ranks on different devices would wait
    for each other for ever.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for device, theirs in gather_objects((world.device.type, host)):
        found[device][theirs] += 1
    return dict(found)


def check_same_devices(world: World) -> None:
    """Collective. Raises ValueError on every rank, with the hosts, if some compute on CUDA and some on the CPU."""
    by_device = ranks_by_device(world, socket.gethostname())
    if len(by_device) > 1:
        raise ValueError(
            f"ranks on {', '.join(sorted(by_device['cpu']))} have no CUDA device, other ranks of the job have one: "
            "look at nvidia-smi there, keep these hosts out (sbatch --exclude=...), or type trainer.device=cpu "
            "(eval.py: device=cpu)"
        )


def join_group(backend: str, **arguments: Any) -> None:
    """torch's init_process_group, for a group that `close_world` can take down."""
    # DDP imports this when it is made. Its functions have the group of that moment as a default argument and would hold
    # it for good; imported before there is a group, they hold None.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend, **arguments)


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_distributed() -> bool:
    return is_initialized() and dist.get_world_size() > 1


def set_timeout(seconds: float) -> None:
    """How long a collective may wait from now on, for every backend of the default group."""
    if is_distributed():
        # torch 2.14 has a public name for it.
        set_pg_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


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


def on_main(world: World, work: Callable[[], T]) -> T:
    """Rank 0 does `work`; every rank gets its result, or its ValueError, so that all of them give up together."""
    result, error = None, None
    if world.is_main:
        try:
            result = work()
        except ValueError as problem:
            error = problem
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Every rank's `values` (n,) on the CPU as rows (world_size, n), on every rank."""
    if not is_distributed():
        return values[None]
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def barrier() -> None:
    agree(0)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place; float64 for exact counts up to 2^53."""
    if is_distributed():
        dist.all_reduce(values)
    return values


# torch 2.13 renamed the argument.
_SYNC = "forward_sync_buffers"
_NO_BUFFER_SYNC = {
    _SYNC if _SYNC in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}


def data_parallel(model: nn.Module, world: World) -> nn.Module:
    """The model under DistributedDataParallel; the model itself where there is only one rank."""
    return as_ddp(model, world.device) if is_distributed() else model


def as_ddp(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    device_ids = [device.index] if device.type == "cuda" else None
    # Buffers: BatchNormAverager keeps them equal. Bucket views: gradients are kept in the buckets alone, not twice.
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)


class BatchNormAverager:
    """Keeps BatchNorm's running statistics equal on all ranks, and independent of how many ranks there are.

    A step's statistics are the mean over all micro-batches of the global batch, moved in with BatchNorm's momentum
    once a step. Over one micro-batch a rank this equals the published averaging before evaluation (the recurrence is
    linear in its input), yet every checkpoint holds the one true state and the world size may change on resume.

    Micro-batches are averaged as ranks are: each starts from the step's first statistics and moves its own into them.
    The layers' momentum stays as it is, a number that torch.compile has in its graphs.
    """

    def __init__(self, model: nn.Module):
        layers = [
            m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        ]
        self.buffers = [b for m in layers for b in (m.running_mean, m.running_var)]  # each (C,)
        self.counters = [m.num_batches_tracked for m in layers]
        self.sizes = [b.numel() for b in self.buffers]
        self.before: torch.Tensor | None = None  # the statistics when the step began, all in one
        self.earlier: torch.Tensor | None = None  # their sum over the micro-batches that another has followed

    def begin_step(self) -> None:
        """Remember the statistics, for each micro-batch to start from, and for the case that the step is refused."""
        if self.buffers:
            self.before, self.earlier = torch.cat(self.buffers), None

    def begin_micro_batch(self, index: int) -> None:
        """Put aside what the micro-batch before `index` has made of the statistics."""
        if index == 0 or not self.buffers:
            return
        self.earlier = self._total()
        self._set(self.before)

    def finish_step(self, count: int, grad_norm: torch.Tensor) -> None:
        """Average over this rank's `count` micro-batches and over ranks, and count the step once.

        One small all-reduce, 15 kB for MambaVision-T. Where grad_norm is inf or nan the optimizer refuses the step, and
        the statistics, which have seen the same activations, go back to what they were. No host sync.
        """
        if not self.buffers:
            return
        refused = torch.isfinite(grad_norm).logical_not()
        mean = self._total()
        if is_distributed():
            dist.all_reduce(mean)
        mean /= count * (dist.get_world_size() if is_distributed() else 1)
        self._set(torch.where(refused, self.before, mean))
        # alpha chooses the overload that takes a tensor: without it torch would read the value, and wait for the step.
        torch._foreach_add_(self.counters, (1 - count) - refused.to(torch.int64), alpha=1)

    def _total(self) -> torch.Tensor:
        flat = torch.cat(self.buffers)
        return flat if self.earlier is None else flat.add_(self.earlier)

    def _set(self, flat: torch.Tensor) -> None:
        torch._foreach_copy_(self.buffers, list(flat.split(self.sizes)))


def close_world() -> None:
    """Leave the process group once all went well: the model and all else that used it must be gone.

    Returns when gloo's threads have ended; why that matters, and what happens after a failure: world_end.py.
    """
    if not is_initialized():
        return
    group = dist.group.WORLD
    dist.destroy_process_group()
    # DDP's reducers, which hold the group too, may wait in reference cycles. Were one of them its last holder, the
    # threads would be waited for with the interpreter's lock held, which they may want; given up here, it is not held.
    gc.collect()
    del group
