"""Which rank failed first, and why: each failing rank leaves a note, rank 0 reads them before it says how it ended."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import traceback
from pathlib import Path

from mambavision.distributed import World
from mambavision.engine.watchdog import read_heartbeats
from mambavision.processes import is_alive
from mambavision.run_dir import write_atomically

_CONSEQUENCES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_WAIT_SECONDS = 1.0  # for notes of ranks that failed in the same moment


def leave_note(directory: Path, world: World, error: BaseException, step: int, *, refused: bool) -> None:
    """refused: starting again would end alike, whatever the others met in consequence."""
    record = {
        "time": time.time(),
        "rank": world.rank,
        "host": socket.gethostname(),
        "step": step,
        "cause": f"{type(error).__name__}: {error}",
        "consequence": is_consequence(error),
        "refused": refused,
        "traceback": "".join(traceback.format_exception(error)),
    }
    with contextlib.suppress(OSError):  # the directory may be what failed
        (directory / "failures").mkdir(exist_ok=True)
        write_atomically(directory / "failures" / f"rank_{world.rank:05d}.json", json.dumps(record, indent=1) + "\n")


def is_consequence(error: BaseException) -> bool:
    """Whether the error only says that another rank is gone."""
    text = str(error)
    return (
        type(error).__name__ in _CONSEQUENCES or "gloo" in text or "NCCL" in text or "Connection closed by peer" in text
    )


def first_cause(
    directory: Path, world: World, error: BaseException, since: float, *, refused: bool, silent_seconds: float
) -> tuple[str, bool]:
    """(cause, whether starting again would end alike): of the rank that failed first, else of this rank's own error.

    since: when this start began, seconds since 1970; silent_seconds: without a heartbeat for so long a rank is frozen.
    """
    own = f"{type(error).__name__}: {error}"
    if world.world_size == 1 or not is_consequence(error):
        return own, refused
    time.sleep(_WAIT_SECONDS)
    notes = [n for n in _notes(directory) if n["time"] >= since and not n["consequence"]]
    if notes:
        first = min(notes, key=lambda n: n["time"])
        return f"rank {first['rank']} on {first['host']} at step {first['step']}: {first['cause']}", first["refused"]
    gone = [
        f"rank {b['rank']} on {b['host']} (pid {b['pid']}) is gone since step {b['step']} without a word: killed, "
        "out of memory?"
        for b in read_heartbeats(directory)
        if b["rank"] < world.world_size and b["host"] == socket.gethostname() and not is_alive(b["pid"])
    ]
    frozen = [
        f"rank {b['rank']} on {b['host']} (pid {b['pid']}) has been silent since step {b['step']}"
        for b in read_heartbeats(directory)
        if b["rank"] < world.world_size and time.time() - b["time"] > silent_seconds and b["rank"] != world.rank
    ]
    return f"{'; '.join(gone or frozen)} ({own})" if gone or frozen else own, False


def _notes(directory: Path) -> list[dict]:
    notes = []
    for path in (directory / "failures").glob("rank_*.json"):
        with contextlib.suppress(OSError, ValueError):
            notes.append(json.loads(path.read_text()))
    return notes
