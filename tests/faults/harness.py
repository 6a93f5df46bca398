"""Real trainings for the fault tests: start, damage, wait, and look at what they leave behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mambavision.engine import checkpoint
from mambavision.telemetry.sinks import read_events

ROOT = Path(__file__).resolve().parents[2]
FAST = ("mambavision.engine.session", "mambavision.telemetry.console", "data.synthetic", "train", "torch._dynamo")

# 3 epochs of 8 steps (130 images: 2 are left over), checkpoints at 5, 10, 15, 20 and at the epochs' ends.
SETTINGS = (
    "experiment=tiny",
    "logger=jsonl",
    "logger.console=lines",
    "data.synthetic_train_samples=130",
    "data.synthetic_eval_samples=37",
    "trainer.epochs=3",
    "trainer.global_batch_size=16",
    "trainer.micro_batch_size=4",
    "trainer.log_every_steps=2",
    "trainer.agree_every_steps=2",
    "checkpoint.every_steps=5",
    "watchdog.heartbeat_seconds=0.5",
)
STEPS, STEPS_PER_EPOCH = 24, 8
# A checkpoint that falls due while the one before is being written comes a step or more later. Where a test counts on the
# steps above, training waits for each: there are as many steps between 8 and 10 as a slow disk likes to take.
WRITES_WAITED_FOR = "checkpoint.asynchronous=false"
# A fault: whoever wants to meet a run under way has seconds to do so, whatever the machine.
LASTING = f"sleep0.3@12-{STEPS}"
PATIENCE_SECONDS = 300.0  # a run takes 4 s; on a machine that others use too it has taken 20 times as long


class Prefork:
    """The process that forks trainings (prefork.py)."""

    def __init__(self, *preload: str):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/faults/prefork.py"), *preload],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pids: dict[str, int] = {}
        self.codes: dict[int, int] = {}
        self.changed = threading.Condition()
        self.count = 0
        assert "ready" in json.loads(self.process.stdout.readline())
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            record = json.loads(line)
            with self.changed:
                if "id" in record:
                    self.pids[record["id"]] = record["pid"]
                else:
                    self.codes[record["ended"]] = record["code"]
                self.changed.notify_all()

    def start(self, arguments: list[str], *, ranks: int, environment: dict[str, str], log: Path) -> int:
        self.count += 1
        request = {
            "id": str(self.count),
            "arguments": arguments,
            "ranks": ranks,
            "environment": environment,
            "log": str(log),
        }
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        with self.changed:
            assert self.changed.wait_for(lambda: request["id"] in self.pids, 20)
            return self.pids[request["id"]]

    def wait(self, pid: int, timeout: float) -> int | None:
        with self.changed:
            self.changed.wait_for(lambda: pid in self.codes, timeout)
            return self.codes.get(pid)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Training:
    """One launch of train.py, under way or over."""

    directory: Path  # the run's
    log: Path
    pid: int  # of the launcher, which leads a process group
    poll: Callable[[float], int | None]
    started: float = field(default_factory=time.time)
    code: int | None = None

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        """The launcher's exit code."""
        self.code = self.poll(timeout)
        if self.code is None:
            self.kill()
            raise AssertionError(f"still running after {timeout:.0f} s:\n{self.output[-4000:]}")
        return self.code

    def kill(self) -> None:
        """SIGKILL to the launcher and all ranks at once: the node is lost."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not become a group yet, or not any more
                os.kill(self.pid, signal.SIGKILL)

    def wait_for_ranks(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Until no rank runs that was seen: what was killed ends in its own time, and torchrun's ranks outlive it."""
        end = time.monotonic() + timeout
        while alive := [b["pid"] for b in self.heartbeats if running(b["pid"])]:
            assert time.monotonic() < end, f"processes {alive} still run after {timeout:.0f} s"
            time.sleep(0.01)

    def wait_for(self, condition: Callable[[], Any], timeout: float = PATIENCE_SECONDS) -> None:
        end = time.monotonic() + timeout
        while not condition():
            code = self.poll(0)
            assert code is None, f"ended with {code} before that:\n{self.output[-4000:]}"
            assert time.monotonic() < end, f"did not happen within {timeout} s:\n{self.output[-4000:]}"
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(b["step"] >= step for b in self.heartbeats))

    @property
    def heartbeats(self) -> list[dict[str, Any]]:
        """Of this launch."""
        from mambavision.engine.watchdog import read_heartbeats

        return [b for b in read_heartbeats(self.directory) if b["time"] >= self.started]

    def rank_pid(self, rank: int) -> int:
        return next(b["pid"] for b in self.heartbeats if b["rank"] == rank)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.directory / "status.json").read_text())

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Of all launches into this directory."""
        return [e for e in read_events(self.directory / "metrics.jsonl") if kind in (None, e["event"])]


class Trainer:
    """Starts trainings under one directory."""

    def __init__(self, prefork: Prefork, output_dir: Path):
        self.prefork, self.output_dir = prefork, output_dir
        self.trainings: list[Training] = []

    def start(
        self,
        name: str,
        *overrides: str,
        ranks: int = 2,
        fault: str = "",
        torchrun: bool = False,
        settings: tuple = SETTINGS,
        **environment: str,
    ) -> Training:
        """torchrun: the real one, in a process of its own, where its behaviour matters."""
        arguments = [*settings, f"output_dir={self.output_dir}", f"run_name={name}", *overrides]
        environment = {"MAMBAVISION_FAULT": fault, **environment}
        directory = self.output_dir / name
        log = self.output_dir / f"{name.replace('/', '_')}.{len(self.trainings)}.log"
        started = time.time()
        if torchrun:
            process = self._torchrun(arguments, ranks, environment, log)
            training = Training(directory, log, process.pid, lambda timeout: _wait(process, timeout), started)
        else:
            pid = self.prefork.start(arguments, ranks=ranks, environment=environment, log=log)
            training = Training(directory, log, pid, lambda timeout: self.prefork.wait(pid, timeout), started)
        self.trainings.append(training)
        return training

    def _torchrun(self, arguments: list[str], ranks: int, environment: dict[str, str], log: Path) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            "train.py",
            *arguments,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        with open(log, "w") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def run(self, name: str, *overrides: str, timeout: float = PATIENCE_SECONDS, **how: Any) -> Training:
        training = self.start(name, *overrides, **how)
        training.wait(timeout)
        return training

    def close(self) -> None:
        for training in self.trainings:
            if training.poll(0) is None:
                training.kill()


def _wait(process: subprocess.Popen, timeout: float) -> int | None:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None


def newest(directory: Path) -> Path:
    path, _ = checkpoint.newest_valid(directory / "checkpoints")
    assert path is not None, f"no checkpoint in {directory}"
    return path


def state_hash(directory: Path) -> str:
    """Over all bits of the newest checkpoint's model, EMA, optimizer and progress."""
    state = checkpoint.load(newest(directory))
    digest = hashlib.sha256()

    def add(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key], f"{name}/{key}")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                add(item, f"{name}/{index}")
        else:
            digest.update(f"{name}={value!r}".encode())

    add({key: state[key] for key in ("model", "ema", "optimizer", "progress")}, "")
    return digest.hexdigest()


def valid_steps(directory: Path) -> list[int]:
    paths = checkpoint.list_checkpoints(directory / "checkpoints")
    return [checkpoint.step_of(p) for p in paths if checkpoint.verify(p) is None]


def running(pid: int) -> bool:
    """Alive and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
