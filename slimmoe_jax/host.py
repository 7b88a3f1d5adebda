"""How the process holds its memory, where the CPU is the device."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

ACCELERATORS = ("nvidia[0-9]*", "accel*", "kfd")  # in /dev
# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets the process keep memory that it frees, and says whether it does. To be called before JAX starts its threads.

    On a CPU, XLA asks for a program's buffers anew at each call. glibc takes blocks of that size from the kernel each time and
    gives them back after, so that each step begins with page faults all over its buffers (docs/performance.md has what that costs).
    The process's resident memory then stays at its peak. Nothing is done beside an accelerator, or without glibc.
    """
    if sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena: those of threads are too small for such blocks, and fall back on mappings of their own.
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
