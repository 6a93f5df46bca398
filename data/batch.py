"""What every loader hands out, and what every loader offers. No loading happens here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from data.variants import EvalSet


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Its buffers may be reused as soon as the next one is asked for."""

    images: Tensor  # (B, 3, H, W) uint8, channels_last in memory
    targets: Tensor  # (B,) int64 class numbers
    # (B,) int64 sample numbers, on the host always; repetition r of image i (repeated augmentation) is i + r * num_samples
    indices: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Images and targets on `device`; the copy from pinned memory does not wait."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.images, self.targets)), self.indices)

    def __len__(self) -> int:
        return len(self.targets)


class TrainLoader(Protocol):
    """Micro-batches of one rank, in an order that depends on (seed, epoch) alone."""

    num_samples: int
    num_classes: int
    class_names: list[str] | None = None  # in the order of their numbers; None where they have none
    steps_per_epoch: int

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]: ...

    def close(self) -> None: ...


class EvalLoader(Protocol):
    """This rank's share of an evaluation set, each sample once; `num_samples` counts all ranks together."""

    num_samples: int
    num_classes: int
    class_names: list[str] | None = None
    eval_set: EvalSet | None = None  # how answers are counted where it is not by the target (data.variants)

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


def workers_per_rank(num_workers: int | None, setting: str = "data.num_workers") -> int:
    """data.num_workers, by default the cores this process may use, divided among the ranks of this machine."""
    if num_workers is not None:
        if num_workers < 1:
            raise ValueError(f"{setting}={num_workers} has to be at least 1; without it all cores work")
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
