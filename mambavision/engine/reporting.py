"""What a run tells its sinks: its start and the figures of each log interval. Other events are logged on the spot."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from data.order import resolution_at
from mambavision.distributed import World
from mambavision.engine.compilation import compile_mode
from mambavision.ops.selective_scan import choose_backend
from mambavision.telemetry.flops import peak_flops, training_flops
from mambavision.telemetry.meters import peak_memory_gib

if TYPE_CHECKING:
    from mambavision.engine.trainer import Trainer


_MOSTLY_START = 0.2  # share of the initial weights in the moving average at the end, above which it scores badly


def log_start(trainer: Trainer, resumed_from: str | None, weights: str | None) -> None:
    """What begins or goes on here.

    resumed_from: the name of this run's checkpoint, if it goes on; weights: the file it began from otherwise.
    """
    cfg, world = trainer.cfg, trainer.world
    began_from = None
    if weights is not None and resumed_from is None:
        kind = "EMA" if cfg.model.checkpoint_weights == "ema" else "raw"
        began_from = f"{weights} ({kind} weights{', fresh head' if cfg.model.replace_head else ''})"
    trainer.telemetry.log(
        "start",
        hosts=sorted(set(trainer.meters.hosts)),
        pid=os.getpid(),
        run_directory=str(trainer.directory),
        step=trainer.progress.step,
        resumed_from=resumed_from,
        began_from=began_from,
        model=cfg.model.name,
        parameters=sum(p.numel() for p in trainer.raw_model.parameters()),
        num_classes=trainer.transform.num_classes,
        scan_backend=choose_backend(world.device.type, torch.float32, cfg.model.scan_backend),
        train_images=trainer.train_loader.num_samples,
        eval_images=trainer.eval_loader.num_samples,
        batch_plan=str(trainer.plan),
        world_size=world.world_size,
        steps_per_epoch=trainer.steps_per_epoch,
        total_steps=trainer.last_step,
        precision=trainer.precision,
        compile_mode=compile_mode(cfg, world),
        device=str(world.device),
        provenance=trainer.origin["provenance"],
    )
    log_surprises(trainer)


def log_surprises(trainer: Trainer) -> None:
    """What the settings imply and a user may not expect."""
    cfg, world = trainer.cfg, trainer.world
    start_share = cfg.trainer.ema_decay**trainer.last_step
    if trainer.ema is not None and not cfg.trainer.ema_warmup and start_share > _MOSTLY_START:
        trainer.telemetry.log(
            "notice",
            message=(
                f"{start_share:.0%} of the moving average, which is scored as the best, will still be the start after "
                f"{trainer.last_step} steps; type trainer.ema_warmup=true, or a smaller trainer.ema_decay"
            ),
        )
    expected = cfg.trainer.expected_gpus
    if expected is not None and expected != world.world_size:
        trainer.telemetry.log(
            "notice",
            message=(
                f"the preset is planned for {expected} GPUs; {world.world_size} rank(s) keep its batch by accumulation"
            ),
        )


class Utilization:
    """Model FLOPs utilisation (telemetry/flops.py), where the processor's peak is known; the figures go by rank 0."""

    def __init__(self, model: nn.Module, world: World, precision: str, image_size: int):
        """model: before hooks and compilation; image_size: px of a training image at the end of a progressive ramp."""
        self.peak = None
        self.image_size = image_size
        if world.is_main and world.device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(world.device), precision)
        if self.peak is not None:
            self.flops_per_image = training_flops(model, image_size)

    def __call__(self, images_per_second: float, image_size: int) -> dict[str, float]:
        """images_per_second: of one GPU."""
        if self.peak is None:
            return {}
        flops = self.flops_per_image * (image_size / self.image_size) ** 2
        return {"speed/mfu": images_per_second * flops / self.peak}


def log_training(trainer: Trainer) -> float:
    """Logs what the meters have summed since the last call; returns its mean cross-entropy. Collective."""
    measured, progress = trainer.meters.flush(), trainer.progress
    size = resolution_at(trainer.epoch_done, trainer.cfg.data.image_size, trainer.cfg.data.progressive_resolution)
    measured |= trainer.utilization(measured["speed/img_per_sec"] / trainer.world.world_size, size)
    trainer.telemetry.log(
        "train",
        epoch=trainer.epoch_done,
        step=progress.step,
        total_steps=trainer.last_step,
        samples_seen=progress.samples_seen,
        **{"optimizer.lr": trainer.lr(progress.step - 1)},
        **measured,
        **{"speed/memory_gib": peak_memory_gib(trainer.world.device), "eta_seconds": remaining(trainer, measured)},
    )
    if trainer.world.world_size > 1:
        trainer.telemetry.log("ranks", step=progress.step, **trainer.meters.by_rank)
    return measured["train/loss"] - measured.get("train/mesa_loss", 0.0)


def remaining(trainer: Trainer, measured: dict[str, float]) -> float:
    """Seconds to the end of the run at the measured speed: its steps, and its evaluations with their checkpoints."""
    # Until one is measured: about as long as training on those images takes.
    assumed = trainer.eval_loader.num_samples / measured["speed/img_per_sec"]
    evaluation_seconds = assumed if trainer.evaluation_seconds is None else trainer.evaluation_seconds
    every_steps = trainer.cfg.trainer.eval_every_epochs * trainer.steps_per_epoch
    evaluations = evaluations_ahead(trainer.progress.step, trainer.last_step, every_steps)
    training_seconds = (trainer.last_step - trainer.progress.step) * measured["speed/step_seconds"]
    return training_seconds + evaluations * evaluation_seconds


def evaluations_ahead(step: int, last_step: int, every_steps: int) -> int:
    """After `step` steps (1 or more), whose own evaluation is still to come: every so many, and after the last."""
    return last_step // every_steps - (step - 1) // every_steps + (last_step % every_steps > 0)
