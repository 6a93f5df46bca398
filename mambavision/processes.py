"""What this host tells about its processes by /proc; where that is missing (macOS), by signals."""

from __future__ import annotations

import os
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether the process runs on this host. A zombie is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return _has_no_proc() or start_ticks(pid) is not None


def start_ticks(pid: int) -> int | None:
    """Clock ticks from the boot to the process's start, which tell it from a later one of its number.

    None if it is dead, or a zombie, or there is no /proc.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _has_no_proc() -> bool:
    return not Path("/proc/self/stat").exists()
