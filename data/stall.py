"""How long a rank may wait for a batch: warnings that name it, then an end."""

from __future__ import annotations

import logging
import socket
import time

logger = logging.getLogger(__name__)


class StallWatch:
    """Made when a batch is asked for; `check` is called again and again while it does not come."""

    def __init__(self, rank: int, warning_seconds: float, timeout_seconds: float):
        self.where = f"rank {rank} ({socket.gethostname()})"
        self.timeout_seconds = timeout_seconds
        self._started = time.monotonic()
        self._warn_at = warning_seconds

    def check(self) -> None:
        """Warns at the warning time and each doubling of it; raises TimeoutError at the timeout."""
        waited = time.monotonic() - self._started
        if waited > self.timeout_seconds:
            raise TimeoutError(
                f"no batch for {waited:.0f} s on {self.where} (data.timeout_seconds={self.timeout_seconds:g}); "
                "is the file system there?"
            )
        if waited > self._warn_at:
            logger.warning("waiting for data since %.0f s on %s", waited, self.where)
            self._warn_at *= 2
