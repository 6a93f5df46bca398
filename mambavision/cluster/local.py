"""Running the points of a sweep on this machine: one torchrun each, so many at a time; a failing one hurts no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mambavision.cluster.points import Point
from mambavision.cluster.slurm import ROOT

_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0  # for checkpoints to be written after a notice


class LocalRuns:
    """Use as a context manager: on leaving it, whatever still runs has been asked to stop and has stopped."""

    def __init__(self, points: Sequence[Point], *, nproc_per_node: int, max_running: int, logs: Path):
        self.waiting, self.nproc, self.max_running, self.logs = list(points), nproc_per_node, max_running, logs
        self.running: dict[subprocess.Popen, Point] = {}
        self.exit_codes: dict[str, int] = {}
        self.notice: int | None = None

    def __enter__(self) -> LocalRuns:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.previous = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.terminate()  # torchrun passes it on; the ranks write a checkpoint
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for process in self.running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.notice = number

    def run(self, show: Callable[[set[str]], None]) -> None:
        """Until all points have been tried, or a signal asks to stop. `show` is told which points run now."""
        while (self.waiting or self.running) and self.notice is None:
            while self.waiting and len(self.running) < self.max_running:
                self._start(self.waiting.pop(0))
            show({p.name for p in self.running.values()})
            time.sleep(_POLL_SECONDS)
            for process in [p for p in self.running if p.poll() is not None]:
                self.exit_codes[self.running.pop(process).name] = process.returncode

    def last_error(self, point: Point) -> str | None:
        """What the newest start of a point refused with, if it did."""
        lines = self._log(point).read_text(errors="replace").splitlines()
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)

    def _log(self, point: Point) -> Path:
        return self.logs / f"{point.name or 'run'}.out"

    def _start(self, point: Point) -> None:
        # The point's words are settings, not torchrun's options, whatever they look like.
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
        with open(self._log(point), "a") as log:
            process = subprocess.Popen(
                [*torchrun, str(ROOT / "train.py"), *point.overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the runs in order
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        self.running[process] = point
