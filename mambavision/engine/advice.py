"""What to type when a run's first step does not fit into memory or does not compile, as at each further start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mambavision.telemetry.meters import peak_memory_gib

if TYPE_CHECKING:
    from mambavision.engine.trainer import Trainer


@contextlib.contextmanager
def instead_of_tracebacks(trainer: Trainer) -> Iterator[None]:
    """Around `fit`: a full memory or a failed compilation that would come again becomes a ValueError with advice.

    A ValueError is not started again. So it is raised at a run's first step (memory: or first evaluation) only. A run
    that is continued had enough memory before, and perhaps a process that an earlier job left behind holds some of it
    now: there PyTorch's error keeps its type, and the run is started again.
    """
    run_had_stepped, run_had_evaluated = trainer.progress.step > 0, bool(trainer.last_eval)
    try:
        yield
    except torch.OutOfMemoryError as error:
        evaluating = trainer.watchdog.phase == "evaluate"
        if trainer.has_stepped and not (evaluating and trainer.evaluation_seconds is None):
            raise
        message = _memory_is_full(trainer, evaluating)
        if run_had_evaluated if evaluating else run_had_stepped:
            raise torch.OutOfMemoryError(f"{message}; does another process hold some of it (nvidia-smi)?") from error
        raise ValueError(message) from error
    except RuntimeError as error:
        if (
            trainer.has_stepped
            or run_had_stepped
            or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        ):
            raise
        reason = getattr(error, "inner_exception", error)
        said = str(reason).strip().partition("\n")[0]
        raise ValueError(
            f"torch.compile failed ({type(reason).__name__}: {said}); type trainer.compile=false to train without "
            "it, or TORCH_LOGS=+dynamo before the command to see more"
        ) from error


def _memory_is_full(trainer: Trainer, evaluating: bool) -> str:
    settings = trainer.cfg.trainer
    images = settings.eval_batch_size if evaluating else trainer.plan.micro_batch_size
    half = max(images // 2, 1)
    ways = [f"trainer.eval_batch_size={half}"]
    if not evaluating:
        ways = [
            f"trainer.micro_batch_size={half} (the same global batch by accumulation; BatchNorm sees {half} images)"
        ]
        ways += [] if settings.grad_checkpointing else ["trainer.grad_checkpointing=true (the same results, slower)"]
    return (
        f"the memory of {trainer.world.device} is full, at {peak_memory_gib(trainer.world.device):.1f} GiB for "
        f"{'evaluating' if evaluating else 'training on'} {images} images at once; type {', or '.join(ways)}"
    )
