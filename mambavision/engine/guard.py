"""What a run does about steps that are not finite, and about a model that has collapsed.

The optimizer refuses a step with a gradient norm of inf or nan on the device; nobody waits for the verdict. The guard
keeps count on the device, reads the count where the ranks agree anyway, and asks for a rollback when they do not end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambavision.config import GuardConfig
from mambavision.engine.losses import blind_guess

_COLLAPSED_LOGS = 3  # so many log intervals at the loss of a blind guess count as collapse
_LEARNED = 10.0  # a loss below a blind guess's by this many margins counts as having learned something
_FP16_GRACE = 16  # fp16 starts by halving its loss scale, up to log2(65536) times, refusing a step each time


class TrainingFailed(RuntimeError):
    """Training cannot go on in a way that a restart would mend."""


@dataclass(frozen=True)
class Refused:
    """Steps that were refused since the last reading."""

    steps: list[int]
    mine: list[int]  # those of them in which this rank's own loss was not finite
    in_a_row: int  # refusals in a row at the time of the reading, those before this reading included


class Guard:
    """Counts per rank; gradients are averaged over ranks, so every rank counts the same refusals."""

    def __init__(
        self,
        cfg: GuardConfig,
        *,
        num_classes: int,
        device: torch.device,
        capacity: int,
        fp16: bool = False,
        loss: str = "cross_entropy",
    ):
        """capacity: the most steps between two readings; loss: trainer.loss, whose values `collapsed` is given."""
        self.cfg, self.device = cfg, device
        self.blind_loss = blind_guess(loss, num_classes)
        # The setting is of an image; bce is a mean over its classes as well.
        self.margin = cfg.collapse_loss_margin / (num_classes if loss == "bce" else 1)
        self.limit = cfg.max_skipped_steps + (_FP16_GRACE if fp16 else 0)
        self.refused_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        # One row a step since the last reading: refusals in a row, own loss not finite.
        self.rows = torch.zeros(capacity, 2, dtype=torch.int64, device=device)
        self.filled = 0
        self.first_row_step = 0
        self.unread: tuple[Tensor, int, Callable[[], None]] | None = None
        self.rollbacks = 0
        self.lowest_loss = math.inf
        self.collapsed_logs = 0
        self.collapse_began = 0  # the step of the first log interval that looked collapsed

    def observe(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Once a step, after the backward: loss is this rank's, grad_norm everybody's. No host sync."""
        if self.filled == 0:
            self.first_row_step = step
        refused = torch.isfinite(grad_norm).logical_not()
        self.refused_in_a_row = (self.refused_in_a_row + 1) * refused
        self.rows[self.filled, 0] = self.refused_in_a_row
        self.rows[self.filled, 1] = torch.isfinite(loss).logical_not()
        self.filled += 1

    @property
    def full(self) -> bool:
        return self.filled == len(self.rows)

    def read(self) -> Refused:
        """What has been refused up to this reading; on a GPU up to the last one, whose copy has arrived by now.

        So nothing waits for the GPU's queue; all ranks read at the same steps and see the same.
        """
        current = self._start_reading()
        if self.device.type == "cuda":
            current, self.unread = self.unread, current
        if current is None:
            return Refused([], [], 0)
        rows, first_step, arrived = current
        arrived()
        values = rows.tolist()
        steps = [first_step + i for i, (run, _) in enumerate(values) if run]
        mine = [first_step + i for i, (run, own) in enumerate(values) if run and own]
        return Refused(steps, mine, values[-1][0] if values else 0)

    def _start_reading(self) -> tuple[Tensor, int, Callable[[], None]]:
        rows, first_step = self.rows[: self.filled], self.first_row_step
        self.filled = 0
        if self.device.type != "cuda":
            return rows.clone(), first_step, lambda: None
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return host, first_step, arrived.synchronize

    def wants_rollback(self, refused: Refused) -> bool:
        return refused.in_a_row >= self.limit

    def roll_back(self, cause: str) -> None:
        """Count a rollback. Raises TrainingFailed when there have been enough of them."""
        if self.rollbacks >= self.cfg.max_rollbacks:
            raise TrainingFailed(
                f"{cause}, after {self.rollbacks} rollback(s) (guard.max_rollbacks={self.cfg.max_rollbacks}). The "
                "good checkpoints are kept; look at the samples in nonfinite/, lower optimizer.lr, or find the place "
                "with debug=nan"
            )
        self.rollbacks += 1
        self.refused_in_a_row.zero_()
        self.filled, self.unread = 0, None
        self.collapsed_logs = 0

    def collapsed(self, mean_loss: float, step: int) -> bool:
        """The loss of each log interval, ending at `step`: whether the model is back at a blind guess for good."""
        margin = self.margin
        if margin == 0 or not math.isfinite(mean_loss):
            return False
        had_learned = self.lowest_loss < self.blind_loss - _LEARNED * margin
        self.lowest_loss = min(self.lowest_loss, mean_loss)
        self.collapsed_logs = self.collapsed_logs + 1 if had_learned and mean_loss > self.blind_loss - margin else 0
        if self.collapsed_logs == 1:
            self.collapse_began = step
        return self.collapsed_logs >= _COLLAPSED_LOGS

    def state_dict(self) -> dict[str, Any]:
        return {"refused_in_a_row": self.refused_in_a_row, "rollbacks": self.rollbacks, "lowest_loss": self.lowest_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refused_in_a_row = state["refused_in_a_row"].to(self.device, copy=True)
        self.rollbacks, self.lowest_loss = int(state["rollbacks"]), float(state["lowest_loss"])
