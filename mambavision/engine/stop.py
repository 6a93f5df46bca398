"""Stopping on notice: a signal on any rank, a STOP file in the run directory, or the launcher's death.

A notice is only remembered; the ranks agree on it at a step boundary, so that all of them stop at the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType

from mambavision.distributed import World, agree
from mambavision.processes import start_ticks

NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_IMPATIENT = 3  # so many Ctrl-C end the process at once
_HEARD = b"\nstopping: the run ends at the next step, saved; two more Ctrl-C end it at once, unsaved\n"
# Launchers kill 30 s (torchrun, Kubernetes) after their notice, and saving takes some of them.
_HEEDED_WITHIN_SECONDS = 5.0


class Decision(IntEnum):
    """What the ranks can agree on at a step boundary; of several wishes the largest is granted."""

    CONTINUE = 0
    STOP = 1
    ROLL_BACK = 2


class StopNotice:
    """Remembers that somebody asked to stop; `agreed()` makes all ranks know it at the same step."""

    def __init__(self, world: World, stop_file: Path):
        self.world, self.stop_file = world, stop_file
        self.cause: str | None = None
        self.interrupts = 0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopNotice:
        for number in NOTICES:
            # Of inherited "ignore" settings only nohup's (SIGHUP) is respected: slurm/train.sbatch has torchrun ignore
            # USR1, and the ranks inherit that.
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self.previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.cause = self.cause or signal.Signals(number).name
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts >= _IMPATIENT:
                raise KeyboardInterrupt
            if self.interrupts == 1 and self.world.is_main:
                with contextlib.suppress(OSError):  # not print: what has been interrupted may be printing
                    os.write(2, _HEARD)

    def give(self, cause: str) -> None:
        """A notice that is no signal."""
        self.cause = self.cause or cause

    def remove_old_stop_file(self) -> None:
        """A STOP file older than this process was meant for an earlier start; a newer one is meant for us."""
        with contextlib.suppress(FileNotFoundError):
            if self.stop_file.stat().st_mtime < process_start_time():
                self.stop_file.unlink()

    def agreed(self, wish: Decision = Decision.CONTINUE) -> Decision:
        """Collective: the strongest wish of any rank, STOP for each that has been given notice."""
        if self.world.is_main and self.cause is None and self.stop_file.exists():
            self.cause = "STOP file"
        decision = Decision(agree(max(wish, Decision.STOP if self.cause is not None else Decision.CONTINUE)))
        if decision is Decision.STOP and self.cause is None:
            self.cause = "notice on another rank"
        return decision


class Meetings:
    """After which steps the ranks meet to agree: every so many, and more often where steps are slow.

    So a notice is heeded within seconds whatever a step takes: with 32 accumulated micro-batches that can be several.
    """

    def __init__(self, every: int):
        self.every = every  # steps, at most
        self.interval = 1  # until it is known how long a step takes
        self.last: tuple[int, float] | None = None  # step and time of the meeting before

    def due(self, step: int) -> bool:
        return step % self.interval == 0

    def held(self, step: int) -> None:
        """Collective, after what the ranks waited for at this step: as often as the slowest rank needs it."""
        now, wanted = time.monotonic(), 1
        if self.last is not None and step > self.last[0]:
            seconds_a_step = (now - self.last[1]) / (step - self.last[0])
            wanted = min(self.every, max(1, int(_HEEDED_WITHIN_SECONDS / max(seconds_a_step, 1e-9))))
        self.interval = self.every - agree(self.every - wanted)
        self.last = step, now


_IMPORT_TIME = time.time()


def process_start_time() -> float:
    """Seconds since 1970 at which this process was started; where /proc is missing, when this module was imported."""
    ticks = start_ticks(os.getpid())
    if ticks is None:
        return _IMPORT_TIME
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
