"""One start of a run, from configuration to status.json: builds the parts, resumes, trains, and says how it ended."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
from data.batch_transform import BatchTransform
from mambavision import create_model, distributed
from mambavision.config import TrainConfig
from mambavision.config_checks import batch_plan
from mambavision.distributed import World
from mambavision.engine import checkpoint
from mambavision.engine.checkpoint import Checkpointer
from mambavision.engine.precision import resolve_precision
from mambavision.engine.stop import StopNotice
from mambavision.engine.trainer import Trainer
from mambavision.run_dir import RunDirectory, check_resume, fingerprint, run_directory
from mambavision.telemetry.console import ConsoleSink
from mambavision.telemetry.sinks import JsonlSink, Telemetry, read_events


def run(cfg: TrainConfig) -> dict[str, Any]:
    """Train what `cfg` describes, or continue it. Returns the run's status record, the same on every rank.

    Raises:
        ValueError: something the user can mend; the message says what to type instead.
    """
    world = distributed.init_world(cfg.trainer.device, cfg.watchdog.init_timeout_seconds)
    run_dir = RunDirectory(Path(agreed_run_directory(cfg)))
    plan = batch_plan(cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size, world.world_size)
    set_threads(cfg.trainer.threads, world)
    precision = resolve_precision(cfg.trainer.precision, world)
    batches = dict(rank=world.rank, world_size=world.world_size)
    train_loader = data.build_train_loader(
        cfg.data, cfg.augment, seed=cfg.seed, global_batch_size=plan.global_batch_size, micro_batch_size=plan.micro_batch_size, **batches
    )
    eval_loader = data.build_eval_loader(cfg.data, batch_size=cfg.trainer.eval_batch_size, **batches)
    num_classes = cfg.model.num_classes or train_loader.num_classes
    if num_classes < train_loader.num_classes:
        raise ValueError(
            f"model.num_classes={num_classes}, but the data set has {train_loader.num_classes} classes; leave model.num_classes out"
        )

    notices = resume_notices(run_dir, cfg) if world.is_main else []
    if world.is_main:
        run_dir.create(cfg)
    telemetry = build_telemetry(cfg, run_dir, world)
    for message in notices:
        telemetry.log("notice", message=message)

    model = build_model(cfg, num_classes, world)
    with StopNotice(world, run_dir.stop_file) as stop:
        trainer = Trainer(
            cfg,
            world=world,
            plan=plan,
            precision=precision,
            model=model,
            train_loader=train_loader,
            eval_loader=eval_loader,
            transform=BatchTransform(cfg.augment, cfg.data.mean, cfg.data.std, num_classes, seed=cfg.seed),
            telemetry=telemetry,
            checkpointer=Checkpointer(run_dir.checkpoints, cfg.checkpoint, telemetry.log) if world.is_main else None,
            stop=stop,
        )
        resumed_from = resume(trainer, run_dir)
        log_start(trainer, run_dir, num_classes, resumed_from)
        try:
            status = trainer.fit()
        except BaseException as error:
            end(trainer, run_dir, "failed", cause=f"{type(error).__name__}: {error}")
            raise
        finally:
            train_loader.close()
            eval_loader.close()
    return end(trainer, run_dir, status, cause=stop.cause if status == "preempted" else None)


def agreed_run_directory(cfg: TrainConfig) -> str:
    """Rank 0's run directory, on every rank. Each rank composes its configuration alone, so that is compared here."""
    hashes = distributed.gather_objects(fingerprint(cfg))
    if len(set(hashes)) > 1:
        raise ValueError(
            f"the ranks have composed different configurations (hashes by rank: {', '.join(hashes)}): give every node the same "
            "command and the same conf/, and a sweeper that draws its points a seed, e.g. hydra.sweeper.sampler.seed=0"
        )
    return distributed.broadcast_object(run_directory(cfg))


def set_threads(threads: int | None, world: World) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // world.local_world_size))


def build_model(cfg: TrainConfig, num_classes: int, world: World) -> nn.Module:
    """On the rank's device, the same initial weights on every rank."""
    m = cfg.model
    torch.manual_seed(cfg.seed)
    optional = {} if m.drop_path is None else {"drop_path": m.drop_path}
    model = create_model(
        m.name,
        num_classes=num_classes,
        checkpoint=m.checkpoint,
        replace_head=m.replace_head,
        init=m.init,
        window_padding=m.window_padding,
        scan_backend=m.scan_backend,
        **optional,
        **m.architecture,
    ).to(world.device)
    if cfg.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if cfg.trainer.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    elif world.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return model


def build_telemetry(cfg: TrainConfig, run_dir: RunDirectory, world: World) -> Telemetry:
    if not world.is_main:
        return Telemetry([])
    last_step = max((e["step"] for e in read_events(run_dir.metrics) if e["event"] == "train"), default=0)
    sinks: list[Any] = [JsonlSink(run_dir.metrics)]
    if cfg.logger.console != "off":
        sinks.append(ConsoleSink(cfg.logger.console))
    if cfg.logger.wandb != "off":
        from mambavision.telemetry.wandb_sink import WandbSink

        sinks.append(WandbSink(cfg.logger, run_dir.path, run_dir.path.name, asdict(cfg), last_step))
    return Telemetry(sinks)


def resume_notices(run_dir: RunDirectory, cfg: TrainConfig) -> list[str]:
    """Before anything is written: refuse to continue a run as something else. Rank 0 only."""
    stored = run_dir.stored_config()
    if stored is None:
        return []
    if cfg.resume.mode == "never" and checkpoint.list_checkpoints(run_dir.checkpoints):
        raise ValueError(f"{run_dir.path} holds a run already and resume.mode=never; give another run_name=NAME")
    return [f"changed since the run was started: {change}" for change in check_resume(stored, cfg)]


def resume(trainer: Trainer, run_dir: RunDirectory) -> str | None:
    """Order of initialisation: the run's own newest valid checkpoint, else model.checkpoint, else the seed."""
    path, error = None, None
    if trainer.world.is_main:
        trainer.checkpointer.clean_up()
        try:
            path, refused = checkpoint.newest_valid(run_dir.checkpoints)
            for refusal in refused:
                trainer.telemetry.log("warning", message=f"{refusal.path.name} is passed over: {refusal.reason}")
        except checkpoint.CheckpointError as problem:
            error = str(problem)
    path, error = distributed.broadcast_object((path, error))
    if error is not None:
        raise ValueError(error)
    if path is None:
        return None
    trainer.load_state_dict(checkpoint.load(path))
    if trainer.checkpointer is not None:
        trainer.checkpointer.last_saved_step = trainer.progress.step
    return path.name


def log_start(trainer: Trainer, run_dir: RunDirectory, num_classes: int, resumed_from: str | None) -> None:
    cfg, world = trainer.cfg, trainer.world
    if world.is_main:
        run_dir.write_status("running", step=trainer.progress.step)
    trainer.telemetry.log(
        "start",
        run_directory=str(run_dir.path),
        step=trainer.progress.step,
        resumed_from=resumed_from,
        model=cfg.model.name,
        parameters=sum(p.numel() for p in trainer.raw_model.parameters()),
        num_classes=num_classes,
        scan_backend=cfg.model.scan_backend,
        train_images=trainer.train_loader.num_samples,
        eval_images=trainer.eval_loader.num_samples,
        batch_plan=str(trainer.plan),
        world_size=world.world_size,
        steps_per_epoch=trainer.train_loader.steps_per_epoch,
        total_steps=trainer.last_step,
        precision=trainer.precision,
        device=str(world.device),
        torch=torch.__version__,
    )
    expected = cfg.trainer.expected_gpus
    if expected is not None and expected != world.world_size:
        trainer.telemetry.log(
            "notice", message=f"the preset is planned for {expected} GPUs; {world.world_size} rank(s) keep its batch by accumulation"
        )


def end(trainer: Trainer, run_dir: RunDirectory, status: str, *, cause: str | None = None) -> dict[str, Any]:
    record = {"status": status, "step": trainer.progress.step, "cause": cause}
    if trainer.world.is_main:
        scores = {k: v for k, v in trainer.last_eval.items() if k.startswith("eval/")}
        run_dir.write_status(status, step=trainer.progress.step, cause=cause, **scores)
        trainer.telemetry.log("stop", status=status, step=trainer.progress.step, cause=cause, run_directory=str(run_dir.path))
    trainer.telemetry.close()
    return {**record, "run_directory": str(run_dir.path), **{k: v for k, v in trainer.last_eval.items() if k.startswith("eval/")}}
