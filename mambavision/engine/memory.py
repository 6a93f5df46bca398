"""What to type where the GPU's memory does not suffice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mambavision.telemetry.meters import peak_memory_gib

if TYPE_CHECKING:
    from mambavision.engine.trainer import Trainer


@contextlib.contextmanager
def advice_where_it_is_full(trainer: Trainer) -> Iterator[None]:
    """Raises ValueError instead of PyTorch's error where starting again would end alike: at the first step or evaluation."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        evaluating = trainer.watchdog.phase == "evaluate"
        if trainer.warm and not (evaluating and trainer.evaluation_seconds is None):
            raise
        settings = trainer.cfg.trainer
        images = settings.eval_batch_size if evaluating else trainer.plan.micro_batch_size
        half = max(images // 2, 1)
        ways = [f"trainer.eval_batch_size={half}"]
        if not evaluating:
            ways = [
                f"trainer.micro_batch_size={half} (the same global batch by accumulation; BatchNorm sees {half} images)"
            ]
            ways += (
                [] if settings.grad_checkpointing else ["trainer.grad_checkpointing=true (the same results, slower)"]
            )
        raise ValueError(
            f"the memory of {trainer.world.device} is full, at {peak_memory_gib(trainer.world.device):.1f} GiB for "
            f"{'evaluating' if evaluating else 'training on'} {images} images at once; type {', or '.join(ways)}"
        ) from error
