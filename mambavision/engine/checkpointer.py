"""When checkpoints are written and which are kept. Training waits for a copy to host memory, a thread does the rest.

Only rank 0 writes: after each step all ranks hold the same state, so nothing has to be gathered.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mambavision.config import CheckpointConfig
from mambavision.engine import checkpoint, faults
from mambavision.engine.checkpoint import (
    CheckpointError,
    best_of,
    checkpoint_path,
    list_checkpoints,
    read_sidecar,
    sidecar,
)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 5.0, 300.0
_FINAL_ATTEMPTS = 3  # for a checkpoint that the run waits for
_CLOSE_SECONDS = 5.0  # all ranks are to be down 10 s after a failure


class HostCopy:
    """A copy of a nested state in host memory, made into the same buffers each time: all that training waits for."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def prepare(self, state: Any) -> None:
        """Allocate and touch the buffers, so that the first copy does not wait for the kernel to hand out pages."""
        self._place(state, "", [], [])
        for buffer in self.buffers.values():
            buffer.zero_()

    def take(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """Returns the copied state and a function that waits until device-to-host copies have arrived."""
        sources: list[torch.Tensor] = []
        targets: list[torch.Tensor] = []
        copied = self._place(state, "", sources, targets)
        if sources:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        if not any(t.is_cuda for t in sources):
            return copied, lambda: None
        arrived = torch.cuda.Event()
        arrived.record()
        return copied, arrived.synchronize

    def _place(self, value: Any, key: str, sources: list, targets: list) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            buffer = self.buffers.get(key)
            if (
                buffer is None
                or buffer.shape != value.shape
                or buffer.dtype != value.dtype
                or buffer.stride() != value.stride()
            ):
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                self.buffers[key] = buffer
            sources.append(value)
            targets.append(buffer)
            return buffer
        if isinstance(value, dict):
            return {k: self._place(v, f"{key}/{k}", sources, targets) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._place(v, f"{key}/{i}", sources, targets) for i, v in enumerate(value))
        return value


class Checkpointer:
    """Saves without stopping the training, keeps what is worth keeping, and survives a full disk. Rank 0 only."""

    def __init__(
        self,
        directory: Path,
        cfg: CheckpointConfig,
        log: Callable[..., None],
        *,
        may_write: Callable[[], None] = lambda: None,
    ):
        """log(event, **fields): where "checkpoint" and "checkpoint_failed" events go.
        may_write: raises OSError where the run directory has come to belong to another process."""
        self.directory, self.cfg, self.log, self.may_write = directory, cfg, log, may_write
        self.host_copy = HostCopy()
        self.thread: threading.Thread | None = None
        self.failures = 0
        self.last_error: str | None = None
        self.on_disk_step = -1  # the newest step that is safely written (or was resumed from)
        self.copied_step = -1  # the step of the write under way
        self.last_save_time = time.monotonic()
        self.retry_time: float | None = None

    def prepare(self, state: dict[str, Any]) -> None:
        """In the background: buffers for states of this shape. Called once all of the state exists (after a step)."""
        self.finish()
        self.thread = threading.Thread(
            target=self.host_copy.prepare, args=(state,), name="checkpoint-buffers", daemon=True
        )
        self.thread.start()

    def due(self, step: int) -> bool:
        """By steps, by minutes or because a write failed, whichever comes first; not while a write is under way."""
        if step == self.on_disk_step or self.writing:
            return False
        now = time.monotonic()
        every, last = self.cfg.every_steps, max(self.on_disk_step, self.copied_step, 0)
        by_steps = every is not None and step // every > last // every
        by_minutes = self.cfg.every_minutes is not None and now - self.last_save_time >= 60 * self.cfg.every_minutes
        return by_steps or by_minutes or (self.retry_time is not None and now >= self.retry_time)

    @property
    def writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def save(
        self, state: dict[str, Any], *, step: int, record: dict[str, Any], wait: bool = False, again: bool = False
    ) -> None:
        """Copy `state` to host memory and write it in the background; with `wait`, return when it is on disk.

        again: write even if this step is on disk already.

        Raises:
            CheckpointError: `max_write_failures` writes in a row have failed, or the one that is waited for did.
        """
        start = time.perf_counter()
        self.finish()
        for _ in range(_FINAL_ATTEMPTS if wait else 1):
            if self.on_disk_step == step and not again:
                return
            again = False
            copied, arrived = self.host_copy.take(state)
            blocked_seconds = time.perf_counter() - start
            self.copied_step, self.last_save_time = step, time.monotonic()
            self.thread = threading.Thread(
                target=self._write,
                args=(copied, arrived, {"step": step, **record}, blocked_seconds),
                name="checkpoint",
                daemon=True,
            )
            self.thread.start()
            if wait or not self.cfg.asynchronous:
                self.finish()
            if wait and self.on_disk_step != step:
                time.sleep(1.0)
        if wait and self.on_disk_step != step:
            raise CheckpointError(self._advice(f"the checkpoint of step {step} could not be written"))

    def _write(self, state: dict, arrived: Callable[[], None], record: dict, blocked_seconds: float) -> None:
        path = checkpoint_path(self.directory, record["step"])
        start = time.perf_counter()
        try:
            arrived()
            faults.at("copy", record["step"])
            if "guard" in state:
                record["refused_in_a_row"] = int(state["guard"]["refused_in_a_row"])
            broken = first_not_finite({"model": state.get("model"), "ema": state.get("ema")})
            if broken is not None:
                raise OSError(f"{broken} holds values that are not finite; such weights are never kept")
            self.may_write()
            self.directory.mkdir(exist_ok=True)
            checkpoint.write(path, state, record)
            faults.at("retain", record["step"])
            self.failures, self.last_error, self.retry_time = 0, None, None
            self.on_disk_step = record["step"]
            timing = {"seconds": time.perf_counter() - start, "blocked_seconds": blocked_seconds}
            self.log("checkpoint", step=record["step"], path=path.name, **timing, bytes=path.stat().st_size)
            self.retain()
            faults.at("saved", record["step"])
        except (OSError, RuntimeError) as error:
            self.failures += 1
            self.last_error = f"{error} ({_free_space(self.directory)})"
            wait = min(_FIRST_RETRY_SECONDS * 2 ** (self.failures - 1), _LAST_RETRY_SECONDS)
            self.last_save_time = time.monotonic()
            self.retry_time = self.last_save_time + wait
            self.log(
                "checkpoint_failed", step=record["step"], path=path.name, cause=self.last_error, failures=self.failures
            )

    def finish(self) -> None:
        """Wait for the write that is under way."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failures >= self.cfg.max_write_failures:
            raise CheckpointError(self._advice(f"{self.failures} checkpoints in a row could not be written"))

    def close(self) -> None:
        """Give the write that is under way a few seconds, where a run fails beside it. Says nothing about how it went.

        Cut off, the checkpoint would be lost; and a thread that the interpreter's end meets in torch's code ends the
        process with SIGABRT.
        """
        if self.thread is not None:
            self.thread.join(_CLOSE_SECONDS)

    def _advice(self, what: str) -> str:
        return (
            f"{what}: {self.last_error}. Free space or give another output_dir, then repeat the command; "
            f"the last good checkpoint in {self.directory} is intact"
        )

    def retain(self) -> None:
        """Delete what is neither among the newest, the best, an epoch to keep, nor what a rollback would need.

        Called when a checkpoint has just been written, which is among the newest: a valid one always remains.
        """
        paths = list_checkpoints(self.directory)
        keep = set(paths[-self.cfg.keep_last :]) | {checkpoint_path(self.directory, self.on_disk_step)}
        records = {p: read_sidecar(p) or {} for p in paths}
        keep |= set([p for p in paths if is_good(records[p])][-1:])
        if self.cfg.keep_best and (best := best_of(paths)) is not None:
            keep.add(best)
        if self.cfg.keep_every_epochs:
            keep |= {p for p in paths if _epoch_to_keep(records[p], self.cfg.keep_every_epochs)}
        for path in paths:
            if path not in keep:
                # The checkpoint first: between the two a kill leaves a lone sidecar, which counts for nothing.
                path.unlink(missing_ok=True)
                sidecar(path).unlink(missing_ok=True)


def is_good(record: dict[str, Any]) -> bool:
    """Whether the last step before this checkpoint was an accepted one: what a rollback may go back to."""
    return record.get("refused_in_a_row", 0) == 0


def first_not_finite(state: Any, name: str = "") -> str | None:
    """The first tensor in a nested state that holds inf or nan. Reads all of it: for the writer's thread."""
    if isinstance(state, torch.Tensor):
        # A sum is finite unless a term is not (or 1e38 is exceeded, which is no weight either): no temporary needed.
        return (
            None if not state.is_floating_point() or torch.isfinite(state.sum(dtype=torch.float32)) else name.strip(".")
        )
    items = state.items() if isinstance(state, dict) else ()
    return next((found for k, v in items if (found := first_not_finite(v, f"{name}.{k}")) is not None), None)


def _epoch_to_keep(record: dict[str, Any], every: int) -> bool:
    return record.get("epoch_finished") is not None and record["epoch_finished"] % every == 0


def _free_space(directory: Path) -> str:
    try:
        stat = os.statvfs(directory)
        return f"{stat.f_bavail * stat.f_frsize / 2**20:.0f} MiB free in {directory}"
    except OSError as error:
        return f"{directory}: {error.strerror}"
