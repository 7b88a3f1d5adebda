"""What the benchmarks share: the machine in words, and tables in Markdown."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine(*packages: str, device: str = "") -> str:
    """The processor, or the device given, and the versions of Python and of packages, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{names[0] if names else platform.machine()}, {cores()} of {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{device or processor}, Python {platform.python_version()}, {versions}"


def one_device():
    """A mesh of the first device alone, so that a figure means the same on a machine with several."""
    import jax  # not at the top: what measures data alone needs no JAX

    axes = ("data", "fsdp", "expert")
    return jax.make_mesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1])


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def header(names: Sequence[str]) -> str:
    return row(names) + "\n" + "|---" * len(names) + "|"


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """The median, and in brackets the lowest and highest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
