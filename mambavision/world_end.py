"""How a command leaves the process group. Imports nothing heavy: a command line that is refused has not loaded torch.

Gloo runs collectives in threads of its own, and one that is still letting go of its last work when the interpreter
shuts down ends the process with SIGABRT ("terminate called without an active exception"): it needs the interpreter's
lock for it and is refused. The exit code of a finished run, or of a refusal with its message, would be lost with it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

SECONDS_AFTER_A_FAILURE = 0.2


@contextlib.contextmanager
def world_left_at_end(agreed_exit_codes: tuple[int, ...] = ()) -> Iterator[None]:
    """Around all that a command does: leaves the process group, if one was joined, however the command ends.

    Args:
        agreed_exit_codes: those of SystemExit that all ranks raise together, after what went well.
    """
    went_well = False
    try:
        yield
        went_well = True
    except SystemExit as ending:
        went_well = ending.code in agreed_exit_codes
        raise
    finally:
        if joined() and went_well:
            sys.modules["mambavision.distributed"].close_world()
        elif joined():
            # Gloo's threads may be waiting for a rank that is no more and are not waited for. Asleep, this thread
            # leaves the interpreter's lock to those that have only their last work to let go of.
            time.sleep(SECONDS_AFTER_A_FAILURE)


def joined() -> bool:
    distributed = sys.modules.get("mambavision.distributed")
    return distributed is not None and distributed.is_initialized()
