"""Sums that stay on the device until somebody reads them, so that the step never waits for the GPU."""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from mambavision.distributed import gather_objects, gather_rows


class StepMeters:
    """Loss, gradient norm and time since the last flush. `flush` is the only place that reads device values."""

    def __init__(self, device: torch.device):
        """Collective: the ranks tell each other their hosts."""
        self.device = device
        self.hosts: list[str] = gather_objects(socket.gethostname())
        self.by_rank: dict[str, Any] = {}
        self.step_loss = torch.zeros((), device=device)
        self.reset()

    def reset(self) -> None:
        self.loss_sum = torch.zeros((), device=self.device)
        self.mesa_sum: Tensor | None = None  # of MESA's part of the loss, once there was one
        self.grad_norm_sum = torch.zeros((), device=self.device)
        self.steps = 0
        self.images = 0
        self.data_seconds = 0.0
        # Of each step: its begin, its last micro-batch's backward (until there no rank waits for another), its end.
        self.step_moments: list[tuple[Any, Any, Any]] = []
        self.start = time.perf_counter()

    def begin_step(self) -> None:
        self.step_loss = torch.zeros((), device=self.device)
        self.step_start, self.own_end = self._now(), None

    def add_loss(self, loss: Tensor, mesa: Tensor | None = None) -> None:
        """A micro-batch's share of the step's loss (divided by the accumulation steps); called before its backward.

        mesa: MESA's part of it, told apart because a blind guess is known by its cross-entropy.
        """
        self.step_loss += loss.detach()
        if mesa is not None:
            self.mesa_sum = mesa.detach() if self.mesa_sum is None else self.mesa_sum + mesa.detach()
        self.own_end = self._now()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add_step(self, grad_norm: Tensor, images: int) -> None:
        self.loss_sum += self.step_loss
        self.grad_norm_sum += grad_norm
        self.steps += 1
        self.images += images
        self.step_moments.append((self.step_start, self.own_end, self._now()))

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start

    def flush(self) -> dict[str, float]:
        """Means over the steps since the last flush and over ranks; images and speed are the whole job's. Collective.

        step_seconds is the interval's time over its steps. The median step and the slowest one, of any rank, tell steps
        that are slow from an interval with a stop in it: a checkpoint's copy, a log line, a hiccup of the storage.

        by_rank then tells for each rank, per step, the seconds of its own work (waiting for data included, waiting for
        other ranks not) and of waiting for data.
        """
        steps = max(self.steps, 1)
        mesa_sum = torch.zeros_like(self.loss_sum) if self.mesa_sum is None else self.mesa_sum
        values = torch.stack([self.loss_sum, self.grad_norm_sum, mesa_sum]).double().cpu()
        own_seconds = sum(self._seconds(start, own_end) for start, own_end, _ in self.step_moments)
        each_step = [self._seconds(start, end) for start, _, end in self.step_moments] or [0.0]
        times = [self.data_seconds / steps, own_seconds / steps, statistics.median(each_step), max(each_step)]
        rows = gather_rows(torch.cat([values / steps, torch.tensor(times, dtype=torch.float64)]))
        loss, grad_norm, mesa, data_seconds, _, median_step, _ = rows.mean(0).tolist()
        seconds = (time.perf_counter() - self.start) / steps
        own = rows[:, 4].tolist()
        self.by_rank = {"hosts": self.hosts, "own_seconds": own, "data_seconds": rows[:, 3].tolist()}
        result = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "speed/img_per_sec": self.images / (seconds * steps),
            "speed/step_seconds": seconds,
            "speed/step_seconds_median": median_step,
            "speed/step_seconds_max": rows[:, 6].max().item(),
            "speed/data_wait_fraction": data_seconds / seconds,
            "speed/slowest_rank": own.index(max(own)),
            "speed/slowest_rank_ratio": max(own) / max(statistics.median_low(own), 1e-9),
        }
        if self.mesa_sum is not None:
            result["train/mesa_loss"] = mesa  # part of train/loss
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
