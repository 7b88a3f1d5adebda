"""The devices of this machine, and how the process holds its memory where the CPU is the device."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from slimmoe_jax.config import InputError, reason

ACCELERATORS = ("nvidia[0-9]*", "accel*", "kfd")  # in /dev
# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MADV_HUGEPAGE = 14
HUGE_PAGE = 2 << 20
HEAP = 1 << 30  # bytes of address space; below the most that M_TRIM_THRESHOLD can be told to keep, 2 GiB


def prepare() -> None:
    """What a program does that runs for long on a CPU, before JAX starts its devices; nothing beside an accelerator.

    Memory is kept (`keep_freed_memory`), and programs run in the thread that calls them: only the main thread's heap holds
    blocks of a program's size, and there they do not lie between the remains of compilation, which has threads of its own.
    """
    if keep_freed_memory():
        import jax  # not at the top: a peer's process measures without it

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def check_devices() -> None:
    """Starts JAX's devices.

    Raises:
      InputError: there are none of the kind that JAX_PLATFORMS names.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        why = f" ({reason(error)})" if str(error) else ""
        asked = os.environ.get("JAX_PLATFORMS")
        named = f"JAX_PLATFORMS={asked} names no device of this machine" if asked else "JAX finds no device"
        raise InputError(
            f"{named}{why}: unset it or set it to cpu, or for an NVIDIA GPU install slimmoe_jax[cuda12] or [cuda13]"
        ) from error


def keep_freed_memory(one_heap: bool = False) -> bool:
    """Lets the main thread's heap keep memory that is freed, in huge pages where the kernel allows; whether it could.

    With `one_heap` all threads share it, in small pages: for programs whose other threads take large blocks too.

    On a CPU, XLA asks for a program's buffers anew at each call. glibc takes blocks of that size from the kernel each time and
    gives them back after, so that each step begins with page faults all over its buffers (docs/performance.md has what that costs).
    The process's resident memory then stays at its peak. Nothing is done beside an accelerator, or without glibc.
    """
    if sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in ACCELERATORS):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1} | ({M_ARENA_MAX: 1} if one_heap else {})
    kept = all(libc.mallopt(name, value) == 1 for name, value in settings.items())
    if kept and not one_heap:
        _advise_huge_pages(libc)
    return kept


def _advise_huge_pages(libc: ctypes.CDLL) -> None:
    """Takes address space for the heap, and asks for huge pages there. What is never touched is never resident."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(HEAP)
    if block:
        first = -(-block // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(block + HEAP - first), MADV_HUGEPAGE)
        libc.free(block)
