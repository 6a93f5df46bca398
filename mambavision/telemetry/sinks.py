"""Where a run's events go. metrics.jsonl is the truth; console and W&B are views of it that may fail.

An event is a name and a flat dict: `start`, `train`, `eval`, `checkpoint`, `stop`, ... Keys are the same everywhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    def log(self, event: str, fields: dict[str, Any]) -> None: ...

    def close(self, *, in_a_hurry: bool = False) -> None: ...


class Telemetry:
    """Sends each event to every sink. On ranks other than 0 there are no sinks, so callers need not ask."""

    def __init__(self, sinks: list[Sink]):
        self.sinks = sinks
        # The checkpoint writer, the watchdog and W&B log from their own threads, sinks from within log.
        self.lock = threading.RLock()

    def log(self, event: str, **fields: Any) -> None:
        with self.lock:
            for sink in self.sinks:
                sink.log(event, fields)

    def close(self, *, in_a_hurry: bool = False) -> None:
        """in_a_hurry: the launcher is about to kill; do not wait for a network."""
        for sink in reversed(self.sinks):  # metrics.jsonl last: it takes the others' last words
            sink.close(in_a_hurry=in_a_hurry)


class LogForwarder(logging.Handler):
    """Warnings of the data path and the libraries below, which know nothing of runs, into the run's log.

    On ranks without sinks they go to stderr, as they would have without us.
    """

    def __init__(self, telemetry: Telemetry):
        super().__init__(logging.WARNING)
        self.telemetry = telemetry

    def emit(self, record: logging.LogRecord) -> None:
        if self.telemetry.sinks:
            self.telemetry.log("warning", message=record.getMessage())
        else:
            print(f"warning   {record.getMessage()}", file=sys.stderr, flush=True)

    def __enter__(self) -> LogForwarder:
        for name in ("data", "mambavision"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("data", "mambavision"):
            logging.getLogger(name).removeHandler(self)
            logging.getLogger(name).propagate = True


class JsonlSink:
    """One JSON object a line, flushed at once. A write that fails costs the line, never the run."""

    def __init__(self, path: Path):
        self.path = path
        self.lost = 0
        self.last_warning = 0.0
        self.file = None

    def log(self, event: str, fields: dict[str, Any]) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **{k: _plain(v) for k, v in fields.items()}})
        try:
            if self.file is None or not self._still_there():
                self.file = open(self.path, "a")  # noqa: SIM115 - kept open
                if _ends_in_mid_line(self.path):
                    self.file.write("\n")  # a kill has cut a line short; the next one must not be lost with it
            self.file.write(line + "\n")
            self.file.flush()
        except OSError as error:
            self.lost += 1
            self.file = None
            if time.monotonic() - self.last_warning > 60 or self.lost == 1:
                self.last_warning = time.monotonic()
                print(
                    f"warning: {self.path} cannot be written ({error.strerror}); {self.lost} lines lost so far",
                    file=sys.stderr,
                )

    def _still_there(self) -> bool:
        """Whether the open file is the one the path names; a directory may have been moved or mounted anew."""
        return self.path.exists() and os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))

    def close(self, *, in_a_hurry: bool = False) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what could not be flushed has been reported
                self.file.close()
            self.file = None


def _ends_in_mid_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    """JSON has no inf and nan; they are written as text so that every reader takes the line."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    return value


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics.jsonl; a line that a kill cut short is passed over."""
    events = []
    if not path.is_file():  # neither there, nor something that reads without end, as /dev/full does
        return events
    for line in path.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
