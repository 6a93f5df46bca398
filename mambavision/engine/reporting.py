"""The training figures of an interval, as they go to the console, metrics.jsonl and W&B; scores are logged where they arise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambavision.telemetry.meters import peak_memory_gib

if TYPE_CHECKING:
    from mambavision.engine.trainer import Trainer


def log_training(trainer: Trainer) -> float:
    """Logs what the meters have summed since the last call; returns its mean cross-entropy. Collective."""
    measured, progress = trainer.meters.flush(), trainer.progress
    remaining = (trainer.last_step - progress.step) * measured["speed/step_seconds"]
    trainer.telemetry.log(
        "train",
        epoch=(progress.step - 1) // trainer.train_loader.steps_per_epoch,
        step=progress.step,
        total_steps=trainer.last_step,
        samples_seen=progress.samples_seen,
        **{"optimizer.lr": trainer.lr(progress.step - 1)},
        **measured,
        **{"speed/memory_gib": peak_memory_gib(trainer.world.device), "eta_seconds": remaining},
    )
    if trainer.world.world_size > 1:
        trainer.telemetry.log("ranks", step=progress.step, **trainer.meters.by_rank)
    return measured["train/loss"] - measured.get("train/mesa_loss", 0.0)
