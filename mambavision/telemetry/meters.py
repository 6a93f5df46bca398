"""Sums that stay on the device until somebody reads them, so that the step never waits for the GPU."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mambavision.distributed import is_distributed, sum_over_ranks


class StepMeters:
    """Loss, gradient norm and time since the last flush. `flush` is the only place that reads device values."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.loss_sum = torch.zeros((), device=self.device)
        self.grad_norm_sum = torch.zeros((), device=self.device)
        self.steps = 0
        self.images = 0
        self.data_seconds = 0.0
        self.start = time.perf_counter()

    def add_loss(self, loss: Tensor) -> None:
        """A micro-batch's share of the step's loss (already divided by the accumulation steps)."""
        self.loss_sum += loss.detach()

    def add_step(self, grad_norm: Tensor, images: int) -> None:
        self.grad_norm_sum += grad_norm
        self.steps += 1
        self.images += images

    def flush(self, world_size: int) -> dict[str, float]:
        """Means over the steps since the last flush and over ranks; images and speed are the whole job's. Collective."""
        steps = max(self.steps, 1)
        mine = torch.stack([self.loss_sum, self.grad_norm_sum]).double().cpu()
        mine = torch.cat([mine, torch.tensor([self.data_seconds], dtype=torch.float64)])
        loss, grad_norm, data_seconds = (sum_over_ranks(mine) / (world_size if is_distributed() else 1)).tolist()
        seconds = time.perf_counter() - self.start
        result = {
            "train/loss": loss / steps,
            "train/grad_norm": grad_norm / steps,
            "speed/img_per_sec": self.images / seconds,
            "speed/step_seconds": seconds / steps,
            "speed/data_wait_fraction": data_seconds / seconds,
        }
        self.reset()
        return result


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory held so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
