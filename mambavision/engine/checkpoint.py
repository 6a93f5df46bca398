"""Checkpoints that can be believed: written to a temporary name, fsynced, checksummed, renamed; verified before use.

A checkpoint is two files, checkpoints/step_00000120.pt (a dict: model, ema, optimizer, scaler, progress, eval, ...) and
step_00000120.pt.json (checksum, size, step, metrics). The newest valid one wins. Only rank 0 writes: after each step all
ranks hold the same state, so nothing has to be gathered and nobody has to wait.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from mambavision.config import CheckpointConfig
from mambavision.run_dir import write_atomically

_READ_BYTES = 1 << 24


class CheckpointError(RuntimeError):
    """No checkpoint can be used, or none can be written; the message says why and what to do."""


@dataclass(frozen=True)
class Refusal:
    path: Path
    reason: str


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}.pt"


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(sidecar(path).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Oldest first; complete or damaged alike."""
    return sorted(directory.glob("step_*.pt"))


def verify(path: Path) -> str | None:
    """None if the file is what was written, else the reason why it cannot be believed."""
    record = read_sidecar(path)
    if record is None:
        return f"its checksum file {sidecar(path).name} is missing or unreadable"
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"it has {size} bytes where {record['bytes']} were written"
        return None if _hash_file(path) == record["xxh3_128"] else "its checksum does not match: the content has changed"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def newest_valid(directory: Path) -> tuple[Path | None, list[Refusal]]:
    """The newest checkpoint that can be believed, and why newer ones were passed over.

    Raises:
        CheckpointError: there are checkpoints, but not one is valid. A run is never silently started over.
    """
    refused: list[Refusal] = []
    for path in reversed(list_checkpoints(directory)):
        reason = verify(path)
        if reason is None:
            return path, refused
        refused.append(Refusal(path, reason))
    if refused:
        reasons = "\n".join(f"  {r.path.name}: {r.reason}" for r in refused)
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints in {directory} is valid:\n{reasons}\nNothing was changed. Put a good copy "
            "back (with its .json), or start another run with run_name=NAME"
        )
    return None, refused


def load(path: Path) -> dict[str, Any]:
    """Tensors and plain values only, never code; on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


class _HashingFile:
    """What torch.save writes into: passes bytes on to a file and through the checksum."""

    def __init__(self, file: Any):
        self.file, self.digest, self.size = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, state: dict[str, Any], record: dict[str, Any]) -> None:
    """Write state and its sidecar so that a kill at any instant leaves the old files or the new, complete ones.

    Raises:
        OSError, RuntimeError: the disk is full, read-only or gone; nothing half-written is left under the final name.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            hashing = _HashingFile(file)
            torch.save(state, hashing)
            file.flush()
            os.fsync(file.fileno())
        record = {**record, "xxh3_128": hashing.digest.hexdigest(), "bytes": hashing.size}
        # The sidecar first: a checkpoint without one is not believed, a sidecar without its checkpoint is just litter.
        write_atomically(sidecar(path), json.dumps(record, indent=1) + "\n")
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HostCopy:
    """A copy of a nested state in host memory, made into the same buffers each time: the only part training waits for."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

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
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
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

    def __init__(self, directory: Path, cfg: CheckpointConfig, log: Callable[..., None]):
        """log(event, **fields): where "checkpoint" and "checkpoint_failed" events go."""
        self.directory, self.cfg, self.log = directory, cfg, log
        self.host_copy = HostCopy()
        self.writer: threading.Thread | None = None
        self.failures = 0
        self.last_error: str | None = None
        self.last_saved_step = -1
        self.last_save_time = time.monotonic()

    def due(self, step: int) -> bool:
        """By steps or by minutes, whichever is configured and comes first; not while the last write is still going on."""
        if step == self.last_saved_step or self.writing:
            return False
        by_steps = self.cfg.every_steps is not None and step % self.cfg.every_steps == 0
        minutes = (time.monotonic() - self.last_save_time) / 60
        return by_steps or (self.cfg.every_minutes is not None and minutes >= self.cfg.every_minutes)

    @property
    def writing(self) -> bool:
        return self.writer is not None and self.writer.is_alive()

    def save(self, state: dict[str, Any], *, step: int, record: dict[str, Any], wait: bool = False) -> None:
        """Copy `state` to host memory and write it in the background; with `wait`, return when it is on disk.

        Raises:
            CheckpointError: `max_write_failures` writes in a row have failed.
        """
        self.finish()
        self.last_saved_step, self.last_save_time = step, time.monotonic()
        start = time.perf_counter()
        copied, arrived = self.host_copy.take(state)
        blocked_seconds = time.perf_counter() - start
        self.writer = threading.Thread(
            target=self._write, args=(copied, arrived, {"step": step, **record}, blocked_seconds), name="checkpoint", daemon=True
        )
        self.writer.start()
        if wait or not self.cfg.asynchronous:
            self.finish()

    def _write(self, state: dict, arrived: Callable[[], None], record: dict, blocked_seconds: float) -> None:
        path = checkpoint_path(self.directory, record["step"])
        start = time.perf_counter()
        try:
            arrived()
            write(path, state, record)
            self.failures = 0
            self.last_error = None
            seconds = time.perf_counter() - start
            self.log(
                "checkpoint", step=record["step"], path=path.name, seconds=seconds, blocked_seconds=blocked_seconds, bytes=path.stat().st_size
            )
            self.retain()
        except (OSError, RuntimeError) as error:
            self.failures += 1
            self.last_error = f"{error} ({_free_space(self.directory)})"
            self.last_save_time = time.monotonic()
            self.log("checkpoint_failed", step=record["step"], path=path.name, cause=self.last_error, failures=self.failures)

    def finish(self) -> None:
        """Wait for the write that is under way."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        if self.failures >= self.cfg.max_write_failures:
            raise CheckpointError(
                f"{self.failures} checkpoints in a row could not be written: {self.last_error}. Free space or give another "
                f"output_dir, then repeat the command; the last good checkpoint in {self.directory} is intact"
            )

    def retain(self) -> None:
        """Delete what is neither among the newest, the best, nor an epoch to keep. The newest is always kept."""
        paths = list_checkpoints(self.directory)
        keep = set(paths[-self.cfg.keep_last :])
        records = {p: read_sidecar(p) or {} for p in paths}
        if self.cfg.keep_best:
            scored = [p for p in paths if records[p].get("score") is not None]
            keep |= set(sorted(scored, key=lambda p: records[p]["score"])[-1:])
        if self.cfg.keep_every_epochs:
            keep |= {p for p in paths if _epoch_to_keep(records[p], self.cfg.keep_every_epochs)}
        for path in paths:
            if path not in keep:
                path.unlink(missing_ok=True)
                sidecar(path).unlink(missing_ok=True)

    def clean_up(self) -> None:
        """Remove what a killed writer left behind: temporary files and sidecars without their checkpoint."""
        for litter in self.directory.glob("*.tmp"):
            litter.unlink(missing_ok=True)
        for record in self.directory.glob("step_*.pt.json"):
            if not record.with_suffix("").exists():
                record.unlink(missing_ok=True)


def _epoch_to_keep(record: dict[str, Any], every: int) -> bool:
    return record.get("epoch_finished") is not None and record["epoch_finished"] % every == 0


def _free_space(directory: Path) -> str:
    try:
        stat = os.statvfs(directory)
        return f"{stat.f_bavail * stat.f_frsize / 2**20:.0f} MiB free in {directory}"
    except OSError as error:
        return f"{directory}: {error.strerror}"
