"""The parts of a trainer, each made from the configuration. When they are made and closed is session.py's to say."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import data
from data.batch import EvalLoader, TrainLoader
from data.batch_transform import BatchTransform
from mambavision import create_model, distributed, provenance
from mambavision.batch_plan import BatchPlan
from mambavision.config import TrainConfig
from mambavision.distributed import World
from mambavision.engine import checkpoint
from mambavision.engine.admission import on_main_in_directory
from mambavision.engine.checkpointer import Checkpointer
from mambavision.engine.profile import StepProfile
from mambavision.engine.stop import StopNotice
from mambavision.engine.trainer import Trainer
from mambavision.engine.watchdog import Watchdog
from mambavision.models.pretrained import find_file
from mambavision.run_dir import RunDirectory, plain
from mambavision.run_lock import RunLock
from mambavision.telemetry.console import ConsoleSink
from mambavision.telemetry.sinks import JsonlSink, LogForwarder, Telemetry, read_events
from mambavision.telemetry.wandb_mode import wandb_mode
from mambavision.telemetry.wandb_sink import WandbSink


def build_trainer(
    cfg: TrainConfig,
    run_dir: RunDirectory,
    parts: contextlib.ExitStack,
    *,
    world: World,
    plan: BatchPlan,
    precision: str,
    stop: StopNotice,
    lock: RunLock,
) -> tuple[Trainer, str | None]:
    """The trainer at step 0, and the file its weights came from. Collective. parts: gets what has to be closed.

    Raises:
        ValueError: the data, the checkpoint or the model cannot be used as configured.
    """
    telemetry = build_telemetry(cfg, run_dir, world)
    parts.enter_context(LogForwarder(telemetry))
    train_loader, eval_loader = build_loaders(cfg, plan, parts, world)
    num_classes = cfg.model.num_classes or train_loader.num_classes
    if num_classes < train_loader.num_classes:
        raise ValueError(
            f"model.num_classes={num_classes}, but the data set has {train_loader.num_classes} classes; leave "
            "model.num_classes out"
        )
    # One file on every rank, and the one that is told: a run directory's best may change at any time.
    weights = distributed.on_main(world, lambda: initial_weights(cfg))
    on_main_in_directory(world, run_dir, lambda: run_dir.check_data(describe_data(train_loader), cfg.resume.allow))
    trainer = Trainer(
        cfg,
        world=world,
        plan=plan,
        precision=precision,
        model=build_model(cfg, num_classes, weights, world),
        train_loader=train_loader,
        eval_loader=eval_loader,
        transform=BatchTransform(cfg.augment, cfg.data.mean, cfg.data.std, num_classes, seed=cfg.seed),
        telemetry=telemetry,
        checkpointer=Checkpointer(run_dir.checkpoints, cfg.checkpoint, telemetry.log, may_write=lock.check)
        if world.is_main
        else None,
        stop=stop,
        watchdog=parts.enter_context(build_watchdog(cfg, world, run_dir, telemetry, stop)),
        directory=run_dir.path,
        origin=origin(cfg, run_dir, train_loader, world),
        profile=parts.enter_context(StepProfile(run_dir.path, world.device, telemetry))
        if cfg.debug == "profile" and world.is_main
        else None,
    )
    return trainer, weights


def build_telemetry(cfg: TrainConfig, run_dir: RunDirectory, world: World) -> Telemetry:
    if not world.is_main:
        return Telemetry([])
    telemetry = Telemetry([JsonlSink(run_dir.metrics)])
    # Before anything else of this launch: what it has to say before its `start` is not the last start's any more.
    telemetry.log("launch", host=socket.gethostname(), pid=os.getpid())
    if cfg.logger.console != "off":
        telemetry.sinks.append(ConsoleSink(cfg.logger.console))
    if wandb_mode(cfg.logger) != "off":
        history = read_events(run_dir.metrics)
        warn = lambda message: telemetry.log("warning", message=message)  # noqa: E731
        telemetry.sinks.append(WandbSink(cfg.logger, run_dir.path, run_dir.path.name, asdict(cfg), history, warn))
    return telemetry


def build_loaders(
    cfg: TrainConfig, plan: BatchPlan, parts: contextlib.ExitStack, world: World
) -> tuple[TrainLoader, EvalLoader]:
    train_loader = data.build_train_loader(
        cfg.data,
        cfg.augment,
        seed=cfg.seed,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
    )
    parts.callback(train_loader.close)
    eval_loader = data.build_eval_loader(
        cfg.data, batch_size=cfg.trainer.eval_batch_size, rank=world.rank, world_size=world.world_size
    )
    parts.callback(eval_loader.close)
    return train_loader, eval_loader


def describe_data(loader: TrainLoader) -> dict[str, Any]:
    """What tells one data set from another: kept in data.json, and compared at the next start."""
    names = getattr(loader, "class_names", None)
    return {
        "samples": loader.num_samples,
        "classes": loader.num_classes,
        "fingerprint": getattr(loader, "fingerprint", None),
        **({"class_names": names} if names else {}),
    }


def initial_weights(cfg: TrainConfig) -> str | None:
    """The file of model.checkpoint, which may be a run directory. Raises ValueError where it is damaged."""
    if cfg.model.checkpoint is None:
        return None
    path = find_file(cfg.model.checkpoint)
    checkpoint.refuse_damaged(path)
    return str(path)


def build_model(cfg: TrainConfig, num_classes: int, weights: str | None, world: World) -> nn.Module:
    """On the rank's device, the same initial weights on every rank; weights: a checkpoint file."""
    m = cfg.model
    torch.manual_seed(cfg.seed)
    optional = {} if m.drop_path is None else {"drop_path": m.drop_path}
    model = create_model(
        m.name,
        num_classes=num_classes,
        checkpoint=weights,
        weights=m.checkpoint_weights,
        replace_head=m.replace_head,
        init=m.init,
        window_padding=m.window_padding,
        scan_backend=m.scan_backend,
        **optional,
        **m.architecture,
    ).to(world.device)
    model.set_grad_checkpointing(cfg.trainer.grad_checkpointing)
    if m.freeze == "backbone":
        model.freeze_backbone()
    if cfg.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def build_watchdog(
    cfg: TrainConfig, world: World, run_dir: RunDirectory, telemetry: Telemetry, stop: StopNotice
) -> Watchdog:
    return Watchdog(
        world,
        run_dir.path,
        cfg.watchdog,
        log=telemetry.log,
        notice=stop.give,
        data_warning_seconds=cfg.data.stall_warning_seconds,
    )


def origin(cfg: TrainConfig, run_dir: RunDirectory, loader: TrainLoader, world: World) -> dict[str, Any]:
    """What a checkpoint holds besides state, so that the file alone says what it is."""
    classes = {"num_classes": loader.num_classes, "class_names": getattr(loader, "class_names", None)}
    return {
        "config": plain(asdict(cfg)) | classes,
        "provenance": provenance.record(run_dir.path) if world.is_main else {},
    }
