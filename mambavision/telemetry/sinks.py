"""Where a run's events go. metrics.jsonl is the truth; console and W&B are views of it that may fail.

An event is a name and a flat dict: `start`, `train`, `eval`, `checkpoint`, `stop`, ... Keys are the same everywhere.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    def log(self, event: str, fields: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Telemetry:
    """Sends each event to every sink. On ranks other than 0 there are no sinks, so callers need not ask who they are."""

    def __init__(self, sinks: list[Sink]):
        self.sinks = sinks
        self.lock = threading.Lock()  # the checkpoint writer logs from its own thread

    def log(self, event: str, **fields: Any) -> None:
        with self.lock:
            for sink in self.sinks:
                sink.log(event, fields)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


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
            if self.file is None:
                self.file = open(self.path, "a")
            self.file.write(line + "\n")
            self.file.flush()
        except OSError as error:
            self.lost += 1
            self.file = None
            if time.monotonic() - self.last_warning > 60 or self.lost == 1:
                self.last_warning = time.monotonic()
                print(f"warning: {self.path} cannot be written ({error.strerror}); {self.lost} lines lost so far", file=sys.stderr)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


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
    if not path.exists():
        return events
    for line in path.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
