"""How the C library's allocator treats the large tensors of a CPU run."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Let freed tensors stay with the process, for the next step to use again, instead of going back to the system.

    By default glibc maps large tensors one by one and returns what is free at the end of its heap, so that every step
    faults its activations in again, page by page. Returns whether there is a glibc that took the settings; other C
    libraries are left as they are. The process does not shrink any more before it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, -1) == 1  # -1: never
