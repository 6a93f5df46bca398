"""What a run does about steps that are not finite, and about a model that has collapsed.

The optimizer refuses a step with a gradient norm of inf or nan on the device; nobody waits for the verdict. The guard
keeps count on the device, reads the count where the ranks agree anyway, and asks for a rollback when they do not end.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import TrainLoader
from data.order import EpochPlan
from mambavision.batch_plan import BatchPlan
from mambavision.config import GuardConfig, TrainConfig
from mambavision.engine.losses import blind_guess
from mambavision.run_dir import write_atomically

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


def write_refused_samples(
    directory: Path, step: int, plan: BatchPlan, loader: TrainLoader, cfg: TrainConfig, ranks: list[int]
) -> None:
    """nonfinite/step_<n>.json: the sample numbers of a refused step; of `ranks` alone, where those are known."""
    epoch, first_step = divmod(step, loader.steps_per_epoch)
    samples = {}
    for rank in ranks or range(plan.world_size):
        order = EpochPlan(
            loader.num_samples,
            plan.global_batch_size,
            plan.micro_batch_size,
            rank=rank,
            world_size=plan.world_size,
            repeats=cfg.data.repeated_augmentation,
        ).rank_order(cfg.seed, epoch, first_step)
        samples[rank] = order[: plan.global_batch_size // plan.world_size].tolist()
    with contextlib.suppress(OSError):  # the log has the step, from which the samples follow
        (directory / "nonfinite").mkdir(exist_ok=True)
        record = {"step": step, "epoch": epoch, "ranks": ranks, "samples_by_rank": samples}
        write_atomically(directory / "nonfinite" / f"step_{step:08d}.json", json.dumps(record) + "\n")


def name_first_not_finite(model: nn.Module) -> None:
    """debug=nan: the innermost module that makes a value or a gradient that is not finite ends the run with its name.

    A layer with hooks is called by itself, where a fused operator would take its weights otherwise; a module around it is
    named where none of those that it called was to blame. Looks at every tensor on the host, so steps take many times as
    long, and sums are rounded otherwise than without.
    """
    # Of the modules that get images, whose gradient nobody asks for; what goes wrong there shows in their parameters'.
    warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed with respect to module")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        module.register_forward_hook(_check_forward(name))
        module.register_full_backward_pre_hook(_check_gradient_before(_caller(name, modules), model))
        module.register_full_backward_hook(_check_backward(name))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(_check_parameter_gradient(name))


def _check_forward(name: str) -> Callable:
    def check(module: nn.Module, inputs: tuple, output: Any) -> None:
        # What came in spoiled was spoiled by the code around this module. Around the outermost one is the data.
        if _finite(output) or (name and not _finite(inputs)):
            return
        weights = [n for n, p in module.named_parameters() if not torch.isfinite(p).all()]
        because = f"its {', '.join(weights)} is not finite" if weights else _range_of(inputs)
        raise TrainingFailed(f"debug=nan: {_called(name, module)} gave a value that is not finite; {because}")

    return check


def _check_backward(name: str) -> Callable:
    def check(module: nn.Module, gradients_in: tuple, gradients_out: tuple) -> None:
        if _finite(gradients_out) and not _finite(gradients_in):
            raise TrainingFailed(f"debug=nan: the gradient through {_called(name, module)} is not finite")

    return check


def _check_gradient_before(caller: str | None, model: nn.Module) -> Callable:
    """Of a gradient that reaches a module from its caller's own code; None: from the loss."""

    def check(module: nn.Module, gradients_out: tuple) -> None:
        if _finite(gradients_out):
            return
        if caller is None:
            raise TrainingFailed("debug=nan: the gradient of the loss by the model's output is not finite")
        called = _called(caller, model.get_submodule(caller))
        raise TrainingFailed(f"debug=nan: the gradient through {called} is not finite")

    return check


def _check_parameter_gradient(name: str) -> Callable:
    def check(gradient: Tensor) -> None:
        if not _finite(gradient):
            raise TrainingFailed(f"debug=nan: the gradient of {name} is not finite")

    return check


def _caller(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The module around `name` that calls it: lists of modules are not called."""
    if not name:
        return None
    around = name.rpartition(".")[0]
    return _caller(around, modules) if isinstance(modules[around], nn.ModuleList) else around


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _finite(value: Any) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _range_of(inputs: tuple) -> str:
    return "its input: " + ", ".join(f"{tuple(t.shape)} from {t.min():.3g} to {t.max():.3g}" for t in _tensors(inputs))
