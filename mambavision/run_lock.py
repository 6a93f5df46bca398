"""One process at a time owns a run directory: a lock file with host, pid and heartbeat, taken over from the dead.

Works over a shared file system without lock service: a hard link makes the file appear complete and at once, and its
time of change, kept fresh by the owner, tells whether an owner on another host still lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mambavision.processes import is_alive, start_ticks

_STALE_BEATS = 3  # an owner elsewhere that misses so many heartbeats is gone


class LockLost(OSError):
    """Another process has taken the run directory over, so this one must not write there any more."""


class RunLock:
    def __init__(self, directory: Path, heartbeat_seconds: float):
        self.path = directory / "LOCK"
        self.heartbeat_seconds = heartbeat_seconds
        self.token = uuid.uuid4().hex
        self.held = False
        self.lost_to: str | None = None

    def acquire(self) -> str | None:
        """Take the lock. Returns whom it was taken over from, None if nobody.

        Raises:
            ValueError: a living process holds it; names its host and pid. Takes up to three heartbeats to find out.
        """
        taken_from = None
        while not self._create():
            owner = self._read()
            if owner is None:  # released in this instant, or torn; look again
                time.sleep(0.05)
                continue
            self._check_gone(owner)
            if self._replace(owner):
                taken_from = f"pid {owner['pid']} on {owner['host']}"
                break
        self.held = True
        return taken_from

    def _write_temporary(self) -> Path:
        record = {"host": socket.gethostname(), "pid": os.getpid(), **_own_identity()}
        temporary = self.path.with_name(f"LOCK.{self.token}.tmp")
        temporary.write_text(json.dumps({**record, "token": self.token, "since": time.time()}) + "\n")
        return temporary

    def _create(self) -> bool:
        temporary = self._write_temporary()
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively(temporary.read_text())
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_exclusively(self, text: str) -> bool:
        try:
            with open(self.path, "x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _check_gone(self, owner: dict[str, Any]) -> None:
        """Returns when the owner cannot be alive any more, raises ValueError when it is."""
        mine = _own_identity()
        if owner["host"] == socket.gethostname() and all(owner.get(k) == mine[k] for k in ("boot", "pid_namespace")):
            if not _lives(owner):
                return
        else:
            # On another host a heartbeat decides: one more of them means alive, none for three means gone.
            first, deadline = self._changed(), time.monotonic() + _STALE_BEATS * self.heartbeat_seconds
            while time.monotonic() < deadline and self._changed() == first:
                time.sleep(min(0.2, self.heartbeat_seconds / 4))
            if self._changed() == first:
                return
        raise ValueError(
            f"{self.path.parent} is in use by another training: pid {owner['pid']} on {owner['host']}, since "
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(owner['since']))}. Stop that one first (create "
            f"{self.path.parent / 'STOP'}), or start another run with run_name=NAME"
        )

    def _changed(self) -> float | None:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _replace(self, owner: dict[str, Any]) -> bool:
        """Put ours in place of a dead owner's lock. Of several who see the same dead owner one succeeds.

        Whoever creates the claim on the owner's token is alone in replacing that owner's lock, and no other's: a plain
        rename would also carry off the lock of somebody who had been faster.
        """
        claim = self.path.with_name(f"LOCK.{owner['token']}.claim")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:  # another is at it, for an instant; unless it died doing so
            deadline = time.monotonic() + _STALE_BEATS * self.heartbeat_seconds
            while claim.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            if claim.exists():
                claim.unlink(missing_ok=True)
            return False
        try:
            found = self._read()
            if found is None or found["token"] != owner["token"]:
                return False
            os.replace(self._write_temporary(), self.path)
            return True
        finally:
            claim.unlink(missing_ok=True)

    @contextlib.contextmanager
    def heartbeat(self, lost: Callable[[str], None]) -> Iterator[None]:
        """Keep the lock fresh from a thread, whatever the caller does meanwhile: opening data can take minutes.

        lost(message): called once, if another process has taken the lock over.
        """
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self.heartbeat_seconds):
                try:
                    self.refresh()
                except LockLost as error:
                    return lost(str(error))

        thread = threading.Thread(target=beat, name="run lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def refresh(self) -> None:
        """A heartbeat. Raises LockLost if the lock has been taken over."""
        self.check()
        with contextlib.suppress(OSError):  # a full or absent disk: the next heartbeat tries again
            os.utime(self.path)

    def check(self) -> None:
        """Raises LockLost, from then on always, if the lock is another's; an unreadable one is believed ours."""
        owner = self._read() if self.held else None
        if owner is not None and owner["token"] != self.token:
            self.held = False
            self.lost_to = f"pid {owner['pid']} on {owner['host']}"
        if self.lost_to is not None:
            raise LockLost(f"{self.path.parent} was taken over by {self.lost_to}; this process stops writing")

    def release(self) -> None:
        owner = self._read()
        if self.held and owner is not None and owner["token"] == self.token:
            self.path.unlink(missing_ok=True)
        self.held = False


def _lives(owner: dict[str, Any]) -> bool:
    """Of an owner on this host: its start time tells it from a later process with the same number."""
    if owner["started"] is None:  # no /proc
        return is_alive(owner["pid"])
    return start_ticks(owner["pid"]) == owner["started"]


def _own_identity() -> dict[str, Any]:
    """What tells this process from all others of its host: boot, pid namespace, start time; None where unknown."""
    identity: dict[str, Any] = {"boot": None, "pid_namespace": None, "started": start_ticks(os.getpid())}
    with contextlib.suppress(OSError):
        identity["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity["pid_namespace"] = os.readlink("/proc/self/ns/pid")
    return identity
