"""One start of a run, from configuration to status.json: joins the ranks, resumes, trains, and says how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data.batch import workers_per_rank
from mambavision import distributed, provenance
from mambavision.batch_plan import batch_plan
from mambavision.config import TrainConfig
from mambavision.engine import checkpoint
from mambavision.engine.admission import (
    check_before_start,
    failures_in_status,
    locked,
    log_changes,
    on_main_in_directory,
    refusal,
)
from mambavision.engine.advice import instead_of_tracebacks
from mambavision.engine.allocator import keep_freed_memory
from mambavision.engine.build import build_trainer
from mambavision.engine.failure import first_cause, leave_note
from mambavision.engine.precision import resolve_precision
from mambavision.engine.reporting import log_start
from mambavision.engine.stop import StopNotice
from mambavision.engine.trainer import Trainer
from mambavision.engine.watchdog import DEAD_AFTER_BEATS
from mambavision.run_dir import RunDirectory, belongs_to, run_directory, settings_hash
from mambavision.run_history import no_progress_message, starts_without_progress
from mambavision.run_lock import RunLock

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
    torch.set_num_threads(workers_per_rank(cfg.trainer.threads, "trainer.threads"))
    if world.device.type == "cpu":
        keep_freed_memory()
    choose_kernels(cfg.trainer.deterministic)
    precision = resolve_precision(cfg.trainer.precision, world)
    with contextlib.ExitStack() as parts:  # closed in reverse, however the run ends
        stop = parts.enter_context(StopNotice(world, run_dir.stop_file))
        lock = parts.enter_context(locked(run_dir, cfg, world, stop))
        parts.enter_context(failures_in_status(run_dir, world, lock))
        on_main_in_directory(world, run_dir, lambda: check_before_start(run_dir, cfg, stop))
        trainer, weights = build_trainer(
            cfg, run_dir, parts, world=world, plan=plan, precision=precision, stop=stop, lock=lock
        )
        return train(trainer, run_dir, lock, weights, since)


def train(trainer: Trainer, run_dir: RunDirectory, lock: RunLock, weights: str | None, since: float) -> dict[str, Any]:
    """From the newest checkpoint to the end of this start. Returns its status record.

    weights: the file that a new run begins from; since: when this start began, seconds since 1970.
    """
    world = trainer.world
    try:
        resumed_from = resume(trainer, run_dir)
        log_start(trainer, resumed_from, weights)
        with instead_of_tracebacks(trainer):
            status = trainer.fit()
    except BaseException as error:
        refused = bool(refusal(error))
        leave_note(run_dir.path, world, error, trainer.progress.step, refused=refused)
        silent = DEAD_AFTER_BEATS * trainer.cfg.watchdog.heartbeat_seconds
        cause, refused = first_cause(run_dir.path, world, error, since, refused=refused, silent_seconds=silent)
        end(trainer, run_dir, "failed", cause=cause, may_write=lock.held, refused=refused)
        raise
    cause = trainer.stop.cause if status == "preempted" else None
    return end(trainer, run_dir, status, cause=cause, may_write=lock.held)


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


def choose_kernels(deterministic: bool) -> None:
    """On CUDA: those that repeat every bit, or the fastest. An earlier point of a sweep may have chosen the others."""
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler: seconds
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:  # without it cuBLAS may add in another order each time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def resume(trainer: Trainer, run_dir: RunDirectory) -> str | None:
    """Order of initialisation: the run's own newest valid checkpoint, else model.checkpoint, else the seed."""
    cfg, world = trainer.cfg, trainer.world

    def choose() -> tuple[Path | None, list[checkpoint.Refusal]]:
        checkpoint.clean_up(run_dir.checkpoints)
        try:
            return checkpoint.newest_valid(run_dir.checkpoints)
        except checkpoint.CheckpointError as problem:
            raise ValueError(str(problem)) from problem

    path, refused = on_main_in_directory(world, run_dir, choose)
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
            raise ValueError(no_progress_message(counted, step, trainer.steps_per_epoch))
        log_changes(run_dir, cfg, world, step, trainer.telemetry)
        for change in provenance.differences(earlier, trainer.origin["provenance"]) if earlier else []:
            trainer.telemetry.log("notice", message=f"changed since the checkpoint: {change}")
        checkpoint.set_aside(refused)
        run_dir.write_config(cfg)
        run_dir.write_status("running", step=step)
        if path is not None:
            trainer.checkpointer.on_disk_step = trainer.progress.step

    on_main_in_directory(world, run_dir, accept)
    return None if path is None else path.name


def end(
    trainer: Trainer,
    run_dir: RunDirectory,
    status: str,
    *,
    cause: str | None,
    may_write: bool,
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
    if trainer.checkpointer is not None:
        trainer.checkpointer.close()
    if trainer.world.is_main and may_write:
        trainer.telemetry.log("stop", status=status, step=step, cause=cause, run_directory=str(run_dir.path))
    trainer.telemetry.close(in_a_hurry=status == "failed")
    return {"status": status, "step": step, "cause": cause, "run_directory": str(run_dir.path), **scores}
