"""Whether a process lives: what takes over locks, names dead ranks and tells lost points of a sweep asks this."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from mambavision.processes import is_alive, start_ticks


def test_a_process_that_has_ended_and_was_not_waited_for_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    assert is_alive(child.pid) and is_alive(os.getpid())
    child.stdin.close()
    deadline = time.monotonic() + 10
    while is_alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    still_a_zombie = child.returncode is None  # nobody has called wait
    assert still_a_zombie and not is_alive(child.pid) and start_ticks(child.pid) is None
    child.wait()
    assert not is_alive(child.pid)
