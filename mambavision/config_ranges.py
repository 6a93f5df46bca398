"""What a single setting may be: one of some words, or a number in an interval. config_checks.py does the checking."""

from __future__ import annotations

import math
import re

CHOICES = {
    "debug": ("nan", "profile"),
    "data.source": ("ffcv", "folder", "synthetic"),
    "data.crop_mode": ("center", "squash"),
    "data.eval_interpolation": ("bicubic", "bilinear"),
    "data.decoder": ("native", "stock"),
    "data.corrupt_images": ("skip", "stop"),
    "augment.interpolation": ("random", "bilinear", "bicubic"),
    "optimizer.name": ("lamb", "lamb_torch_optimizer", "adamw", "sgd"),
    "optimizer.decay_rule": ("published", "mamba"),
    "schedule.name": ("cosine", "constant"),
    "trainer.device": ("auto", "cuda", "cpu"),
    "trainer.loss": ("cross_entropy", "bce"),
    "trainer.precision": ("auto", "bf16", "fp16", "fp32"),
    "trainer.compile_mode": ("auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "model.init": ("published", "mamba"),
    "model.checkpoint_weights": ("model", "ema"),
    "model.freeze": ("backbone",),
    "model.window_padding": ("published", "tight"),
    "model.scan_backend": ("auto", "cpu", "triton", "mamba_ssm", "reference"),
    "logger.wandb": ("auto", "online", "offline", "off"),
    "logger.console": ("auto", "lines", "off"),
    "resume.mode": ("auto", "never"),
    "guard.collapse_policy": ("stop", "rollback", "warn"),
    "device": ("auto", "cuda", "cpu"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
}


# As mathematics writes intervals: [ or ] where the bound itself is allowed. Of lists, every number.
RANGES = {
    "seed": "[0, 9223372036854775807]",
    "max_restarts_without_progress": "[1, inf)",
    "batch_size": "[1, inf)",
    "model.drop_path": "[0, 1)",
    "model.num_classes": "[1, inf)",
    "data.image_size": "[8, inf)",
    "data.num_workers": "[1, inf)",
    "data.crop_pct": "(0, 1]",
    "data.repeated_augmentation": "[1, inf)",
    "data.max_corrupt_fraction": "[0, 1]",
    "data.num_classes": "[1, inf)",
    "data.std": "(0, inf)",
    "data.synthetic_train_samples": "[1, inf)",
    "data.synthetic_eval_samples": "[1, inf)",
    "data.progressive_resolution": "[0, inf)",
    "data.stall_warning_seconds": "(0, inf)",
    "data.timeout_seconds": "(0, inf)",
    "augment.hflip": "[0, 1]",
    "augment.erasing_prob": "[0, 1]",
    "augment.mixup": "[0, inf)",
    "augment.cutmix": "[0, inf)",
    "augment.mixup_switch_prob": "[0, 1]",
    "augment.label_smoothing": "[0, 1]",
    "augment.crop_scale": "(0, 1]",
    "augment.crop_ratio": "(0, inf)",
    "augment.pad_crop": "[0, inf)",
    "augment.color_jitter": "[0, inf)",
    "augment.mixup_off_epoch": "[0, inf)",
    "optimizer.lr": "(0, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.layer_decay": "(0, 1]",
    "optimizer.clip_grad": "(0, inf)",
    "optimizer.betas": "[0, 1)",
    "optimizer.eps": "(0, inf)",
    "optimizer.momentum": "[0, 1)",
    "optimizer.lamb_max_grad_norm": "(0, inf)",
    "schedule.warmup_epochs": "[0, inf)",
    "schedule.cooldown_epochs": "[0, inf)",
    "schedule.warmup_lr": "[0, inf)",
    "schedule.min_lr": "[0, inf)",
    "trainer.epochs": "[1, inf)",
    "trainer.global_batch_size": "[1, inf)",
    "trainer.micro_batch_size": "[1, inf)",
    "trainer.eval_batch_size": "[1, inf)",
    "trainer.max_steps": "[1, inf)",
    "trainer.ema_decay": "[0, 1)",
    "trainer.bce_threshold": "(0, 1)",
    "trainer.mesa.weight": "[0, inf)",
    "trainer.mesa.start_fraction": "[0, 1]",
    "trainer.eval_every_epochs": "[1, inf)",
    "trainer.log_every_steps": "[1, inf)",
    "trainer.agree_every_steps": "[1, inf)",
    "trainer.threads": "[1, inf)",
    "trainer.mesa.temperature": "(0, inf)",
    "trainer.expected_gpus": "[1, inf)",
    "checkpoint.every_steps": "[1, inf)",
    "checkpoint.every_minutes": "[0, inf)",
    "checkpoint.keep_last": "[1, inf)",
    "checkpoint.keep_every_epochs": "[0, inf)",
    "checkpoint.max_write_failures": "[1, inf)",
    "guard.max_skipped_steps": "[1, inf)",
    "guard.max_rollbacks": "[0, inf)",
    "guard.collapse_loss_margin": "[0, inf)",
    "watchdog.heartbeat_seconds": "(0, inf)",
    "watchdog.stall_seconds": "(0, inf)",
    "watchdog.start_timeout_seconds": "(0, inf)",
    "watchdog.init_timeout_seconds": "(0, inf)",
    "watchdog.step_timeout_seconds": "(0, inf)",
    "logger.init_timeout_seconds": "(0, inf)",
}


def out_of_range(value: float, interval: str) -> str | None:
    """What a value outside an interval such as "(0, 1]" must be, in words; None where it lies inside."""
    opening, low, high, closing = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", interval).groups()
    above = value >= float(low) if opening == "[" else value > float(low)
    below = value <= float(high) if closing == "]" else value < float(high)
    if above and below:
        return None
    limits = [f"{'at least' if opening == '[' else 'more than'} {low}"]
    if math.isfinite(float(high)):
        limits.append(f"{'at most' if closing == ']' else 'less than'} {high}")
    return " and ".join(limits if math.isfinite(value) else ["a finite number", *limits])
