"""Checkpoint files that can be believed: written to a temporary name, fsynced, checksummed, renamed; verified.

A checkpoint is two files, checkpoints/step_00000120.pt (a dict: model, ema, optimizer, scaler, progress, ...) and
step_00000120.pt.json (checksum, size, step, metrics). The newest valid one wins. When they are written, and which are
kept, is checkpointer.py's business.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from mambavision.engine import faults
from mambavision.run_dir import write_atomically

_READ_BYTES = 1 << 24
DAMAGED = ".damaged"  # added to the names of files that were passed over: kept to look at, never read again


class CheckpointError(RuntimeError):
    """No checkpoint can be used, or none can be written; the message says why and what to do."""


@dataclass(frozen=True)
class Refusal:
    path: Path
    reason: str


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}.pt"


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(sidecar(path).read_text())
    except (OSError, ValueError):
        return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Oldest first; complete or damaged alike.

    By the samples that had been seen, as the sidecars say: a larger global batch has lower step numbers further on. One
    that does not say comes after the step before it.
    """
    samples, order = 0, {}
    for path in sorted(p for p in directory.glob("step_*.pt") if p.stem.removeprefix("step_").isdigit()):
        samples = (read_sidecar(path) or {}).get("samples_seen", samples)
        order[path] = samples
    return sorted(order, key=order.__getitem__)  # stable: equal ones stay in the order of their numbers


def best_of(paths: list[Path]) -> Path | None:
    """The one with the highest score in its sidecar, the newer of two alike; None where none was evaluated."""
    scores = {path: (read_sidecar(path) or {}).get("score") for path in paths}
    scored = [path for path in paths if scores[path] is not None]
    return sorted(scored, key=lambda path: scores[path])[-1] if scored else None


def verify(path: Path) -> str | None:
    """None if the file is what was written, else the reason why it cannot be believed."""
    record = read_sidecar(path)
    if record is None:
        return f"its checksum file {sidecar(path).name} is missing or unreadable"
    # While a step is written anew (after a rollback) the sidecar holds for the file that is there and the one to come.
    versions = [v for v in (record, record.get("replaces")) if v]
    try:
        size = path.stat().st_size
        if size not in [v["bytes"] for v in versions]:
            return f"it has {size} bytes where {record['bytes']} were written"
        matches = _hash_file(path) in [v["xxh3_128"] for v in versions]
        return None if matches else "its checksum does not match: the content has changed"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def refuse_damaged(path: Path) -> None:
    """For a file that somebody names. Raises ValueError where it is one of ours and not what was written.

    torch.load passes over a flipped bit. A file without our checksum may be anybody's.
    """
    if "xxh3_128" in (read_sidecar(path) or {}) and (reason := verify(path)) is not None:
        raise ValueError(f"{path} is damaged: {reason}; give another checkpoint, or put a good copy of this one back")


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def newest_valid(
    directory: Path, *, accept: Callable[[dict[str, Any]], bool] = lambda record: True
) -> tuple[Path | None, list[Refusal]]:
    """The newest checkpoint that can be believed, and why newer ones were passed over.

    accept: looks at a checkpoint's record (its sidecar); those it declines are passed over without a word.

    Raises:
        CheckpointError: there are checkpoints, but not one is valid. A run is never silently started over.
    """
    refused: list[Refusal] = []
    for path in reversed(list_checkpoints(directory)):
        record = read_sidecar(path)
        if record is not None and not accept(record):
            continue
        reason = verify(path)
        if reason is None:
            return path, refused
        refused.append(Refusal(path, reason))
    if refused:
        reasons = "\n".join(f"  {r.path.name}: {r.reason}" for r in refused)
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints in {directory} is valid:\n{reasons}\nNothing was changed. "
            "Put a good copy back (with its .json), or start another run with run_name=NAME"
        )
    return None, refused


def set_aside(refusals: list[Refusal]) -> None:
    """Rename damaged checkpoints, so that they neither count as kept ones nor are met again."""
    for refusal in refusals:
        for path in (refusal.path, sidecar(refusal.path)):
            if path.exists():
                os.replace(path, path.with_name(path.name + DAMAGED))


def load(path: Path) -> dict[str, Any]:
    """Tensors and plain values only, never code; on the CPU.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} holds more than tensors and plain values and was not loaded ({reason}). Use a checkpoint "
            "that this program has written, or start another run with run_name=NAME"
        ) from error


def check_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    problems = [f"  missing: {k}" for k in ours if k not in theirs] + [
        f"  unknown: {k}" for k in theirs if k not in ours
    ]
    problems += [
        f"  {k}: the checkpoint has {tuple(theirs[k].shape)}, the model {tuple(v.shape)}"
        for k, v in ours.items()
        if k in theirs and theirs[k].shape != v.shape
    ]
    if problems:
        more = [f"  ... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(
            "the checkpoint is of another model:\n"
            + "\n".join(problems[:10] + more)
            + "\nnothing was overwritten; give the "
            "settings the run was started with (config.yaml in the run directory), or start another with run_name=NAME"
        )


class _HashingFile:
    """What torch.save writes into: passes bytes on to a file and through the checksum."""

    def __init__(self, file: Any, step: int):
        self.file, self.step, self.digest, self.size = file, step, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        if self.size:
            faults.at("payload", self.step)
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
    step = step_of(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            faults.at("open", step)
            hashing = _HashingFile(file, step)
            torch.save(state, hashing)
            file.flush()
            faults.at("fsync", step)
            os.fsync(file.fileno())
        record = {**record, "xxh3_128": hashing.digest.hexdigest(), "bytes": hashing.size}
        if path.exists() and (old := read_sidecar(path)) is not None:
            record["replaces"] = {key: old[key] for key in ("xxh3_128", "bytes")}
        # The sidecar first: a checkpoint without one is not believed, a sidecar without its checkpoint is just litter.
        write_atomically(sidecar(path), json.dumps(record, indent=1) + "\n")
        faults.at("rename", step)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the directory is gone or read-only, which the error that led here says already


def fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean_up(directory: Path) -> None:
    """Remove what a killed writer left behind: temporary files and sidecars without their checkpoint."""
    for litter in directory.glob("*.tmp"):
        litter.unlink(missing_ok=True)
    for record in directory.glob("step_*.pt.json"):
        if not record.with_suffix("").exists():
            record.unlink(missing_ok=True)
