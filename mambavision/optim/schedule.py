"""The learning rate as a pure function of the step. Owns no state: on resume there is nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mambavision.config import ScheduleConfig


@dataclass(frozen=True)
class LearningRate:
    """lr(step) of one run. Steps count optimizer steps from 0; units of lr are the optimizer's."""

    schedule: ScheduleConfig
    peak: float
    epochs: int
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, cooldown included."""
        return (self.epochs + self._prefix_epochs + self.schedule.cooldown_epochs) * self.steps_per_epoch

    @property
    def _prefix_epochs(self) -> int:
        return math.ceil(self.schedule.warmup_epochs) if self.schedule.warmup_prefix else 0

    def __call__(self, step: int) -> float:
        s = self.schedule
        warmup_steps = int(s.warmup_epochs * self.steps_per_epoch)
        if step < warmup_steps:
            return s.warmup_lr + step * (self.peak - s.warmup_lr) / warmup_steps
        if s.name == "constant":
            return self.peak
        # As published the warm-up is not a prefix: the cosine has been running meanwhile, and the rate drops onto it.
        # A prefix that ends within an epoch leaves the rest of it at the peak.
        step = max(step - self._prefix_epochs * self.steps_per_epoch, 0) if s.warmup_prefix else step
        cosine_steps = self.epochs * self.steps_per_epoch
        if step >= cosine_steps:
            return s.min_lr
        return s.min_lr + 0.5 * (self.peak - s.min_lr) * (1 + math.cos(math.pi * step / cosine_steps))
