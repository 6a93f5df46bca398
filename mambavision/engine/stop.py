"""Stopping on notice: a signal on any rank or a STOP file in the run directory, agreed at a step boundary."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from mambavision.distributed import World, agree

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_IMPATIENT = 3  # so many Ctrl-C end the process at once


class StopNotice:
    """Remembers that somebody asked to stop; `agreed()` makes all ranks know it at the same step."""

    def __init__(self, world: World, stop_file: Path):
        self.world, self.stop_file = world, stop_file
        self.cause: str | None = None
        self.interrupts = 0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopNotice:
        for number in _SIGNALS:
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

    def agreed(self) -> bool:
        """Collective: true on every rank if any of them has been asked to stop."""
        if self.world.is_main and self.cause is None and self.stop_file.exists():
            self.cause = "STOP file"
        stop = bool(agree(int(self.cause is not None)))
        if stop and self.cause is None:
            self.cause = "notice on another rank"
        return stop
