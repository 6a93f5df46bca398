"""A thread of each rank that says what the rank is doing, and notices when nothing moves. Takes no part in training.

heartbeats/rank_00003.json in the run directory tells rank, host, pid, step and phase; on a stall every rank writes the
stacks of all its threads to stacks/, and what it knows about the others to stderr and, on rank 0, to the log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mambavision.config import WatchdogConfig
from mambavision.distributed import World

T = TypeVar("T")
_TICK_SECONDS = 0.5
DEAD_AFTER_BEATS = 3  # a rank this many heartbeats silent is called dead
_ORPHAN_SECONDS = 60.0  # the time to save after the launcher's death
_LAST_RESORT_SECONDS = 60.0  # after the collectives' own timeout
_WIDTH = 512  # bytes of a heartbeat; fixed, so that one write replaces another


class Watchdog:
    def __init__(
        self,
        world: World,
        directory: Path,
        cfg: WatchdogConfig,
        *,
        log: Callable[..., None],
        notice: Callable[[str], None],
        data_warning_seconds: float,
    ):
        """directory: the run's. log(event, **fields): the run's log (no sinks on ranks other than 0).
        notice(cause): asks the run to stop."""
        self.world, self.directory, self.cfg = world, directory, cfg
        self.log, self.notice = log, notice
        self.data_warning_seconds = data_warning_seconds
        self.host = socket.gethostname()
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ else None
        self.step, self.phase = 0, "start"
        self.armed = False  # nothing is a stall before the first step is done
        self.moved = time.monotonic()
        self.ended = threading.Event()
        self.file: int | None = None
        self.thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        with contextlib.suppress(OSError):  # a directory that cannot be written is found and reported by others
            self.path.parent.mkdir(exist_ok=True)
            self.file = os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o644)
        self.beat(0, "start")
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._write("end")
        if self.file is not None:
            os.close(self.file)

    @property
    def path(self) -> Path:
        return heartbeat_path(self.directory, self.world.rank)

    def beat(self, step: int, phase: str) -> None:
        """The training thread is at `step` (steps done) and about to do `phase`: step, data, evaluate, checkpoint."""
        self.step, self.phase, self.moved = step, phase, time.monotonic()
        if phase == "step":
            self._write()  # so that the step at which a process is killed is known afterwards

    def arm(self) -> None:
        """The first step is done; from now on standing still is a fault."""
        self.armed = True

    def while_iterating(self, items: Iterable[T], step: int, phase: str) -> Iterator[T]:
        for item in items:
            self.beat(step, phase)
            yield item

    def _write(self, phase: str | None = None) -> None:
        record = {
            "rank": self.world.rank,
            "host": self.host,
            "pid": os.getpid(),
            "step": self.step,
            "phase": phase or self.phase,
        }
        line = json.dumps({**record, "time": round(time.time(), 3)}).ljust(_WIDTH - 1) + "\n"
        if self.file is not None:
            with contextlib.suppress(OSError):  # a heartbeat that is lost is not worth a word
                os.pwrite(self.file, line.encode(), 0)

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        last_beat, reported_stall, reported_data, orphan_since = 0.0, False, False, None
        while not self.ended.wait(_TICK_SECONDS):
            now = time.monotonic()
            if now - last_beat >= self.cfg.heartbeat_seconds:
                last_beat = now
                self._write()
            still = now - self.moved
            if still < _TICK_SECONDS * 2:
                reported_stall = reported_data = False
            if self.phase == "data" and still > self.data_warning_seconds and not reported_data:
                reported_data = True
                self._say(
                    f"rank {self.world.rank} on {self.host} has waited {still:.0f} s for its next batch (step "
                    f"{self.step})"
                )
            if self.armed and still > self.cfg.stall_seconds and not reported_stall:
                reported_stall = True
                self._report_stall(still)
            if self.armed and still > self.cfg.step_timeout_seconds + self.cfg.stall_seconds + _LAST_RESORT_SECONDS:
                self._end(f"rank {self.world.rank} has not moved for {still:.0f} s, nor have its collectives timed out")
            if self.launcher is not None and os.getppid() != self.launcher:
                orphan_since = orphan_since or now
                self.notice("the launcher has died")
                if now - orphan_since > _ORPHAN_SECONDS:
                    self._end("the launcher has died and the run did not stop in time")

    def _report_stall(self, seconds: float) -> None:
        stacks = self.directory / "stacks" / f"rank_{self.world.rank:05d}.txt"
        with contextlib.suppress(OSError):
            stacks.parent.mkdir(exist_ok=True)
            with open(stacks, "w") as file:
                file.write(
                    f"rank {self.world.rank} on {self.host}: {seconds:.0f} s at step {self.step}, {self.phase}\n"
                )
                faulthandler.dump_traceback(file, all_threads=True)
        self.log(
            "stall",
            step=self.step,
            rank=self.world.rank,
            host=self.host,
            phase=self.phase,
            seconds=seconds,
            others=self.suspects(),
        )
        self._say(
            f"no step for {seconds:.0f} s at step {self.step}; {'; '.join(self.suspects()) or 'all ranks live'}; "
            f"stacks in {stacks}"
        )

    def suspects(self) -> list[str]:
        """Ranks that are silent or behind, by their heartbeats."""
        beats = read_heartbeats(self.directory)
        # Those of an earlier, larger world are left over.
        beats = [b for b in beats if b["rank"] < self.world.world_size]
        newest = max((b["step"] for b in beats), default=0)
        found = []
        for beat in beats:
            silent = time.time() - beat["time"]
            who = f"rank {beat['rank']} on {beat['host']} (pid {beat['pid']})"
            if silent > DEAD_AFTER_BEATS * max(self.cfg.heartbeat_seconds, _TICK_SECONDS):
                found.append(f"{who} has been silent for {silent:.0f} s at step {beat['step']}")
            elif beat["step"] < newest or beat["phase"] == "data":
                found.append(f"{who} is at step {beat['step']}, {beat['phase']}")
        return found

    def _say(self, message: str) -> None:
        self.log("warning", message=message)
        if not self.world.is_main:
            print(f"warning   {message}", file=sys.stderr, flush=True)

    def _end(self, cause: str) -> None:
        """The training thread cannot be reached, so nothing can be unwound."""
        self._say(cause)
        os._exit(1)


def heartbeat_path(directory: Path, rank: int) -> Path:
    return directory / "heartbeats" / f"rank_{rank:05d}.json"


def read_heartbeats(directory: Path) -> list[dict[str, Any]]:
    """The last sign of life of every rank, also those of earlier starts."""
    beats = []
    for path in sorted((directory / "heartbeats").glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError):
            beats.append(json.loads(path.read_text()))
    return beats
