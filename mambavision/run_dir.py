"""The run directory: named by the configuration, made by rank 0, told to the others. Owns config.yaml and status.json.

runs/<run_name>/ holds config.yaml, metrics.jsonl, status.json, checkpoints/ and W&B's own folder. The same command
finds the same directory and continues; nothing in the name comes from the clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from mambavision.config import TrainConfig

# Settings that change neither the weights nor what a run is; they do not name it and may differ on resume.
HARMLESS = (
    "run_name",
    "output_dir",
    "logger",
    "resume",
    "watchdog",
    "checkpoint",
    "debug",
    "max_restarts_without_progress",
    "data.num_workers",
    "data.os_cache",
    "data.verify_checksum",
    "data.stall_warning_seconds",
    "data.timeout_seconds",
    "trainer.log_every_steps",
    "trainer.agree_every_steps",
    "trainer.eval_batch_size",
    "trainer.expected_gpus",
)
# Settings that may change the result, yet are a user's to change in the middle of a run: recorded, not refused. They do
# not name the run either: whoever moves to other hardware, or follows a message's advice, continues it.
ALLOWED = (
    "data.path",
    "data.decoder",
    "data.corrupt_images",
    "data.max_corrupt_fraction",
    "guard",
    "model.scan_backend",
    "model.checkpoint",
    "model.checkpoint_weights",
    "trainer.max_steps",
    "trainer.device",
    "trainer.precision",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.compile_mode",
    "trainer.grad_checkpointing",
    "trainer.deterministic",
    "trainer.threads",
    "trainer.eval_every_epochs",
)
# Settings that came after runs had been named, at the value that was meant before: those runs keep their names, and
# nothing has changed about them.
_ADDED_LATER = {
    "model.checkpoint_weights": "model",
    "trainer.grad_checkpointing": False,
    "trainer.compile_mode": "auto",
    "model.freeze": None,
    "optimizer.layer_decay": None,
    "trainer.loss": "cross_entropy",
    "trainer.bce_threshold": None,
}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def belongs_to(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == g or key.startswith(f"{g}.") for g in groups)


def makes_another_run(key: str) -> bool:
    """Whether a setting is part of a derived run name: those refused on resume, and where the weights began."""
    return key.startswith("model.checkpoint") or not belongs_to(key, (*HARMLESS, *ALLOWED))


def settings_hash(cfg: TrainConfig, counts: Callable[[str], bool]) -> str:
    """Eight hex digits over the settings that count."""
    counted = {k: v for k, v in flatten(asdict(cfg)).items() if counts(k) and _ADDED_LATER.get(k, ...) != v}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]


def run_name(cfg: TrainConfig) -> str:
    return cfg.run_name or f"{cfg.model.name}-{_data_name(cfg)}-{settings_hash(cfg, makes_another_run)}"


def run_directory(cfg: TrainConfig) -> str:
    return os.path.join(cfg.output_dir, run_name(cfg))


def _data_name(cfg: TrainConfig) -> str:
    return Path(cfg.data.path).name if cfg.data.path else cfg.data.source


class RunDirectory:
    """Paths of one run, and the two small files that say what it is and how it ended."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.status_file = path / "status.json"
        self.config_file = path / "config.yaml"
        self.stop_file = path / "STOP"

    def create(self) -> None:
        """Make the directories. Rank 0 only.

        Raises:
            ValueError: the directory cannot be made or written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for directory in (self.path, self.checkpoints):  # not found out after the first minutes of training
                write_atomically(directory / "writable", "")
                (directory / "writable").unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write the run directory {self.path}: {error.strerror} ({error.filename or self.path}); give "
                "another with output_dir=DIR or run_name=NAME"
            ) from error

    def write_config(self, cfg: TrainConfig) -> None:
        """What the run is from now on; written once the checkpoint it continues from has been accepted."""
        write_atomically(self.config_file, yaml.safe_dump(plain(asdict(cfg)), sort_keys=False))

    def check_data(self, data: dict[str, Any], allow: tuple[str, ...]) -> None:
        """Remember which data set the run trains on; refuse to continue on another.

        Raises:
            ValueError: size, classes or content differ from the first start's and `allow` does not name
            data.fingerprint.
        """
        file = self.path / "data.json"
        if file.exists() and not belongs_to("data.fingerprint", allow):
            try:
                stored = dict(json.loads(file.read_text()))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{file} cannot be read ({error}), and it says which data the run was started on; remove it if "
                    "that is this data, or start another run with run_name=NAME"
                ) from error
            # What an older start did not know (class_names) cannot differ.
            table = [f"  {k}: {_change(stored[k], v)}" for k, v in data.items() if k in stored and stored[k] != v]
            if table:
                raise ValueError(
                    "this run was started on other data:\n"
                    + "\n".join(table)
                    + "\ngive the data.path it was started with, start another run with run_name=NAME, or allow the "
                    "change: resume.allow=[data.fingerprint]"
                )
        write_atomically(file, json.dumps(data, indent=1) + "\n")

    def stored_config(self) -> dict[str, Any] | None:
        """None where there is none. Raises ValueError where it says nothing."""
        if not self.config_file.exists():
            return None
        try:
            return dict(yaml.safe_load(self.config_file.read_text()))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.config_file} cannot be read ({error}), and it says which run this directory holds; put it back "
                "(each checkpoint has it under `config`), or start another run with run_name=NAME"
            ) from error

    def write_status(self, status: str, *, step: int, **details: Any) -> None:
        """status: running | finished | preempted | failed, with the step and, where there is one, a cause."""
        record = {
            "status": status,
            "step": step,
            **details,
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        write_atomically(self.status_file, json.dumps(record, indent=1) + "\n")

    def status(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.status_file.read_text())
        except (OSError, ValueError):
            return None


def _change(before: Any, now: Any) -> str:
    """`old -> new`; of lists, the first entry that differs."""
    if not isinstance(before, list) or not isinstance(now, list):
        return f"{before} -> {now}"
    index = next((i for i, (a, b) in enumerate(zip(before, now)) if a != b), min(len(before), len(now)))
    return f"number {index} was {before[index : index + 1]}, is {now[index : index + 1]}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Readers see the old content or the new, never a part; fsynced."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """Nested dicts, lists and scalars only: what YAML, JSON and a checkpoint's safe loader take."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def config_changes(stored: dict[str, Any], current: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings whose value differs from the stored run's: key -> (stored, current)."""
    before, after = _ADDED_LATER | flatten(stored), flatten(plain(asdict(current)))
    return {k: (before.get(k), after.get(k)) for k in sorted({*before, *after}) if before.get(k) != after.get(k)}


def check_resume(stored: dict[str, Any], current: TrainConfig) -> list[str]:
    """Compare a run's stored configuration with the one asked for. Returns notices about allowed changes.

    Raises:
        ValueError: a change that would make it another run, with the difference and how to allow it.
    """
    changes = {k: v for k, v in config_changes(stored, current).items() if not belongs_to(k, HARMLESS)}
    refused = {k: v for k, v in changes.items() if not belongs_to(k, (*ALLOWED, *current.resume.allow))}
    if refused:
        table = "\n".join(f"  {k}: {a!r} -> {b!r}" for k, (a, b) in refused.items())
        raise ValueError(
            f"this run was started with other settings:\n{table}\nstart another run with run_name=NAME, take the "
            f"stored values, or allow the change: 'resume.allow=[{','.join(refused)}]'"
        )
    return [f"{k}: {a!r} -> {b!r}" for k, (a, b) in changes.items()]
