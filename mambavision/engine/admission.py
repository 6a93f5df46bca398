"""Who may start: one training at a time in a run directory, with the settings and the data the run was started with."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import TypeVar

from mambavision import distributed
from mambavision.config import TrainConfig
from mambavision.distributed import World
from mambavision.engine import checkpoint
from mambavision.engine.guard import TrainingFailed
from mambavision.engine.stop import StopNotice
from mambavision.run_dir import RunDirectory, check_resume
from mambavision.run_history import starts
from mambavision.run_lock import RunLock
from mambavision.telemetry.sinks import Telemetry

T = TypeVar("T")
# What a file system on the network says while it is away.
_MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN)


@contextlib.contextmanager
def locked(run_dir: RunDirectory, cfg: TrainConfig, world: World, stop: StopNotice) -> Iterator[RunLock]:
    """The run directory, made and held by rank 0. Raises ValueError, on every rank, where another training holds it."""
    lock = RunLock(run_dir.path, cfg.watchdog.heartbeat_seconds)

    def acquire() -> None:
        run_dir.create()
        if (taken_from := lock.acquire()) is not None:
            print(f"note      the lock of a dead training is taken over ({taken_from})", flush=True)

    on_main_in_directory(world, run_dir, acquire)
    try:
        with lock.heartbeat(stop.give) if world.is_main else contextlib.nullcontext():
            yield lock
    finally:
        with contextlib.suppress(OSError):  # what stays is recognised as a dead process's
            lock.release()


def on_main_in_directory(world: World, run_dir: RunDirectory, work: Callable[[], T]) -> T:
    """`distributed.on_main` for work that reads or writes the run directory.

    Raises:
        ValueError: on every rank, where the disk is full or forbids it, which the user can mend.
        OSError: on rank 0, where the storage may come back: that start is a fault, and may be repeated.
    """

    def advised() -> T:
        try:
            return work()
        except OSError as error:
            if error.errno in _MAY_PASS:
                raise
            raise ValueError(
                f"cannot use {error.filename or run_dir.path}: {error.strerror}; free space, mend its permissions, or "
                "give another output_dir=DIR"
            ) from error

    return distributed.on_main(world, advised)


@contextlib.contextmanager
def failures_in_status(run_dir: RunDirectory, world: World, lock: RunLock) -> Iterator[None]:
    """A start that comes to nothing must not leave a `preempted` behind, which would have it requeued for ever."""
    try:
        yield
    except Exception as error:
        before = run_dir.status() or {}
        if world.is_main and lock.held and before.get("status") not in ("finished", "failed"):
            cause = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # the disk may be what the error is about
                run_dir.write_status("failed", step=before.get("step", 0), cause=cause, **refusal(error))
        raise


def refusal(error: BaseException) -> dict[str, bool]:
    """{"refused": True} for status.json where starting again would end alike: slurm/train.sbatch then does not."""
    return {"refused": True} if isinstance(error, (ValueError, TrainingFailed)) else {}


def check_before_start(run_dir: RunDirectory, cfg: TrainConfig, stop: StopNotice) -> None:
    """What can be refused before anything is built. Rank 0 only.

    Raises:
        ValueError: the directory holds another run than `cfg`, or one whose restarts lead nowhere.
    """
    stop.remove_old_stop_file()
    kept = checkpoint.list_checkpoints(run_dir.checkpoints)
    if cfg.resume.mode == "never" and kept:
        raise ValueError(f"{run_dir.path} holds a run already and resume.mode=never; give another run_name=NAME")
    if cfg.resume.allow and not cfg.run_name and not kept:
        refuse_to_start_over(run_dir, cfg)
    stored = run_dir.stored_config()
    if stored is not None and kept:
        check_resume(stored, cfg)
    run_dir.write_status("running", step=checkpoint.step_of(kept[-1]) if kept else 0)


def refuse_to_start_over(run_dir: RunDirectory, cfg: TrainConfig) -> None:
    """resume.allow says that a run is to go on; without its name it would begin anew under another, silently."""
    family = run_dir.path.name.rpartition("-")[0]
    others = sorted(p.name for p in run_dir.path.parent.glob(f"{family}-*") if p != run_dir.path and p.is_dir())
    if others:
        raise ValueError(
            f"resume.allow={list(cfg.resume.allow)} is for continuing a run, but a changed setting changes a run's "
            f"derived name too, and {run_dir.path} holds no run. Name the one to continue: run_name={others[0]}"
            f"{' (or ' + ', '.join(others[1:4]) + ')' if others[1:] else ''}; or leave resume.allow out to start anew"
        )


def log_changes(run_dir: RunDirectory, cfg: TrainConfig, world: World, step: int, telemetry: Telemetry) -> None:
    """What differs from the last start and is allowed to. Rank 0 only."""
    stored = run_dir.stored_config()
    for change in check_resume(stored, cfg) if stored and step else []:
        telemetry.log("notice", message=f"changed since the run was started: {change}")
    earlier = starts(run_dir.path)
    if earlier and earlier[-1].world_size != world.world_size:
        telemetry.log(
            "notice",
            message=(
                f"{world.world_size} ranks where there were {earlier[-1].world_size}; the global batch stays the same"
            ),
        )
