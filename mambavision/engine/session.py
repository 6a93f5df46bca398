"""One start of a run, from configuration to status.json: builds the parts, resumes, trains, and says how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
from data.batch_transform import BatchTransform
from mambavision import create_model, distributed, provenance
from mambavision.batch_plan import batch_plan
from mambavision.config import TrainConfig
from mambavision.distributed import World
from mambavision.engine import checkpoint
from mambavision.engine.admission import check_before_start, failures_in_status, locked, log_changes, on_main, refusal
from mambavision.engine.advice import instead_of_tracebacks
from mambavision.engine.allocator import keep_freed_memory
from mambavision.engine.checkpointer import Checkpointer
from mambavision.engine.failure import first_cause, leave_note
from mambavision.engine.precision import resolve_precision
from mambavision.engine.profile import StepProfile
from mambavision.engine.reporting import log_start
from mambavision.engine.stop import StopNotice
from mambavision.engine.trainer import Trainer
from mambavision.engine.watchdog import Watchdog
from mambavision.models.pretrained import find_file
from mambavision.run_dir import RunDirectory, belongs_to, plain, run_directory, settings_hash
from mambavision.run_history import no_progress_message, starts_without_progress
from mambavision.telemetry.console import ConsoleSink
from mambavision.telemetry.sinks import JsonlSink, LogForwarder, Telemetry, read_events
from mambavision.telemetry.wandb_mode import wandb_mode
from mambavision.telemetry.wandb_sink import WandbSink

# Settings in which nodes may differ: where things lie there, and what the node has.
_OF_A_NODE = ("output_dir", "data.path", "data.num_workers", "data.os_cache", "trainer.threads", "logger", "debug")


def run(cfg: TrainConfig) -> dict[str, Any]:
    """Train what `cfg` describes, or continue it. Returns the run's status record, the same on every rank.

    Raises:
        ValueError: something the user can mend; the message says what to type instead.
    """
    since = time.time()
    faulthandler.enable()
    world = distributed.init_world(
        cfg.trainer.device, cfg.watchdog.init_timeout_seconds, cfg.watchdog.start_timeout_seconds
    )
    distributed.check_same_devices(world)
    distributed.set_timeout(cfg.watchdog.init_timeout_seconds)  # an earlier job of a sweep has left the shorter one
    run_dir = RunDirectory(Path(agreed_run_directory(cfg)))
    plan = batch_plan(cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size, world.world_size)
    set_threads(cfg.trainer.threads, world)
    if world.device.type == "cpu":
        keep_freed_memory()
    precision = resolve_precision(cfg.trainer.precision, world)
    with contextlib.ExitStack() as parts:
        stop = parts.enter_context(StopNotice(world, run_dir.stop_file))
        lock = parts.enter_context(locked(run_dir, cfg, world, stop))
        parts.enter_context(failures_in_status(run_dir, world, lock))
        on_main(world, run_dir, lambda: check_before_start(run_dir, cfg, stop))

        telemetry = build_telemetry(cfg, run_dir, world)
        parts.enter_context(LogForwarder(telemetry))
        batches = dict(rank=world.rank, world_size=world.world_size)
        sizes = dict(global_batch_size=plan.global_batch_size, micro_batch_size=plan.micro_batch_size)
        train_loader = data.build_train_loader(cfg.data, cfg.augment, seed=cfg.seed, **sizes, **batches)
        parts.callback(train_loader.close)
        eval_loader = data.build_eval_loader(cfg.data, batch_size=cfg.trainer.eval_batch_size, **batches)
        parts.callback(eval_loader.close)
        num_classes = cfg.model.num_classes or train_loader.num_classes
        if num_classes < train_loader.num_classes:
            raise ValueError(
                f"model.num_classes={num_classes}, but the data set has {train_loader.num_classes} classes; leave "
                "model.num_classes out"
            )
        # One file on every rank, and the one that is told: a run directory's best may change at any time.
        weights = distributed.on_main(world, lambda: initial_weights(cfg))
        on_main(world, run_dir, lambda: run_dir.check_data(describe_data(train_loader), cfg.resume.allow))

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
        try:
            resumed_from = resume(trainer, run_dir)
            log_start(trainer, num_classes, resumed_from, weights)
            with instead_of_tracebacks(trainer):
                status = trainer.fit()
        except BaseException as error:
            refused = bool(refusal(error))
            leave_note(run_dir.path, world, error, trainer.progress.step, refused=refused)
            silent = 3 * cfg.watchdog.heartbeat_seconds
            cause, refused = first_cause(run_dir.path, world, error, since, refused=refused, silent_seconds=silent)
            end(trainer, run_dir, "failed", cause=cause, may_write=lock.held, refused=refused)
            raise
        return end(trainer, run_dir, status, cause=stop.cause if status == "preempted" else None, may_write=lock.held)


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


def describe_data(loader: Any) -> dict[str, Any]:
    names = getattr(loader, "class_names", None)
    return {
        "samples": loader.num_samples,
        "classes": loader.num_classes,
        "fingerprint": getattr(loader, "fingerprint", None),
        **({"class_names": names} if names else {}),
    }


def origin(cfg: TrainConfig, run_dir: RunDirectory, loader: Any, world: World) -> dict[str, Any]:
    """What a checkpoint holds besides state, so that the file alone says what it is."""
    classes = {"num_classes": loader.num_classes, "class_names": getattr(loader, "class_names", None)}
    return {
        "config": plain(asdict(cfg)) | classes,
        "provenance": provenance.record(run_dir.path) if world.is_main else {},
    }


def agreed_run_directory(cfg: TrainConfig) -> str:
    """Rank 0's run directory, on every rank. Each rank composes its configuration alone, so that is compared here."""
    hashes = distributed.gather_objects(settings_hash(cfg, lambda key: not belongs_to(key, _OF_A_NODE)))
    if len(set(hashes)) > 1:
        raise ValueError(
            f"the ranks have composed different configurations (hashes by rank: {', '.join(hashes)}): give every "
            "node the same command and the same conf/, and a sweeper that draws its points a seed, e.g. "
            "hydra.sweeper.sampler.seed=0"
        )
    return distributed.broadcast_object(run_directory(cfg))


def set_threads(threads: int | None, world: World) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // world.local_world_size))


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
    choose_kernels(cfg.trainer.deterministic)
    return model


def choose_kernels(deterministic: bool) -> None:
    """For CUDA: those that repeat every bit, or those that are fastest. An earlier point of a sweep may have chosen others."""
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler: seconds
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:  # without it cuBLAS may add in another order each time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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


def resume(trainer: Trainer, run_dir: RunDirectory) -> str | None:
    """Order of initialisation: the run's own newest valid checkpoint, else model.checkpoint, else the seed."""
    cfg, world = trainer.cfg, trainer.world

    def choose() -> tuple[Path | None, list[checkpoint.Refusal]]:
        checkpoint.clean_up(run_dir.checkpoints)
        try:
            return checkpoint.newest_valid(run_dir.checkpoints)
        except checkpoint.CheckpointError as problem:
            raise ValueError(str(problem)) from problem

    path, refused = on_main(world, run_dir, choose)
    for damaged in refused:
        trainer.telemetry.log("warning", message=f"{damaged.path.name} is passed over: {damaged.reason}")
    earlier: dict[str, Any] = {}
    if path is not None:
        state = checkpoint.load(path)
        trainer.load_state_dict(state)
        earlier = state.get("provenance", {})  # not in checkpoints of earlier versions

    def accept() -> None:
        """The checkpoint fits: only now is anything of the earlier starts changed."""
        step = trainer.progress.step
        counted = starts_without_progress(run_dir.path, step)
        if len(counted) >= cfg.max_restarts_without_progress:
            raise ValueError(no_progress_message(counted, step, trainer.train_loader.steps_per_epoch))
        log_changes(run_dir, cfg, world, step, trainer.telemetry)
        for change in provenance.differences(earlier, trainer.origin["provenance"]) if earlier else []:
            trainer.telemetry.log("notice", message=f"changed since the checkpoint: {change}")
        checkpoint.set_aside(refused)
        run_dir.write_config(cfg)
        run_dir.write_status("running", step=step)
        if path is not None:
            trainer.checkpointer.on_disk_step = trainer.progress.step

    on_main(world, run_dir, accept)
    return None if path is None else path.name


def end(
    trainer: Trainer,
    run_dir: RunDirectory,
    status: str,
    *,
    cause: str | None = None,
    may_write: bool = True,
    refused: bool = False,
) -> dict[str, Any]:
    """Say how it ended, in status.json and everywhere else. may_write: whether the directory is still ours (rank 0)."""
    step = trainer.progress.step
    scores = {k: v for k, v in trainer.last_eval.items() if k.startswith("eval/")}
    if trainer.world.is_main and may_write:
        try:
            run_dir.write_status(status, step=step, cause=cause, **({"refused": True} if refused else {}), **scores)
        except OSError as error:
            print(f"warning   {run_dir.status_file} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        trainer.telemetry.log("stop", status=status, step=step, cause=cause, run_directory=str(run_dir.path))
    trainer.telemetry.close(in_a_hurry=status == "failed")
    return {"status": status, "step": step, "cause": cause, "run_directory": str(run_dir.path), **scores}
