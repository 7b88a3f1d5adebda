"""Several processes that train one model: how they find each other, wait for each other, and stop together.

Under SLURM, Kubernetes (indexed jobs) and Open MPI, JAX finds the others by itself. Elsewhere each process is told:

    python -m slimmoe_jax.train --config C.py --coordinator HOST:PORT --processes 2 --process 0     # and 1, on the other host
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from slimmoe_jax import __version__, progress
from slimmoe_jax.config import InputError, reason

FLAGS = ("--coordinator", "--processes", "--process")
LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # what those that JAX knows set for each task: how many there are
MISSED_AFTER = 30  # seconds after which a process that has gone ends the others too


def start(argv: Sequence[str]) -> list[str]:
    """Joins the other processes, if there are any, and returns argv without the flags that say where they are.

    Raises:
      InputError: the flags are incomplete, or the others cannot be reached.
    """
    argv, given = _take_flags(argv)
    launched = any(int(os.environ.get(name, "1")) > 1 for name in LAUNCHERS) or "JOB_COMPLETION_INDEX" in os.environ
    if not given and not launched:
        return argv
    if given and len(given) < len(FLAGS):
        raise InputError(f"{', '.join(flag for flag in FLAGS if flag not in given)} is missing: the three go together")
    try:
        if given:
            number, process = int(given["--processes"]), int(given["--process"])
            if not 0 <= process < number:
                raise InputError(f"--process {process} of --processes {number}: they are numbered from 0")
            if process == 0:
                _check_free(given["--coordinator"])
            jax.distributed.initialize(given["--coordinator"], number, process, heartbeat_timeout_seconds=MISSED_AFTER)
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=MISSED_AFTER)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the other processes cannot be joined ({reason(error)}): check {', '.join(FLAGS)}") from error
    return argv


def _check_free(coordinator: str) -> None:
    """Refuses an address HOST:PORT whose port is taken on this machine: JAX's own service would end the process by a signal."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise InputError(
                f"--coordinator {coordinator}: port {port} cannot be used ({error.strerror}): choose another"
            ) from error


def _take_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    rest, given = [], {}
    words = iter(argv)
    for word in words:
        flag, _, value = word.partition("=")
        if flag in FLAGS:
            given[flag] = value or next(words, "")
        else:
            rest.append(word)
    return rest, given


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line to stderr, from the first process alone."""
    if is_first():
        progress.say(line)


def wait(what: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather(text: str) -> list[str]:
    """What each process gives, in their order. All must call it."""
    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text.encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(said)))))
    rows = np.asarray(multihost_utils.process_allgather(np.pad(said, (0, longest - len(said)))))
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process refuses within, all refuse. Nothing within may wait for the others.

    Raises:
      InputError: the first refusal.
    """
    if jax.process_count() == 1:
        yield
        return
    refusal = ""
    try:
        yield
    except InputError as error:
        refusal = str(error)
    refusals = [(process, line) for process, line in enumerate(gather(refusal)) if line]
    if refusals:
        process, line = refusals[0]
        raise InputError(line if process == jax.process_index() else f"process {process} refuses: {line}")


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process goes through alone; the others follow and find what it has made. What one refuses, all refuse."""
    if not is_first():
        with together():
            pass
    with together():
        yield
    if is_first():
        with together():
            pass


def check_same(facts: Mapping[str, Any]) -> None:
    """Compares what must be the same in all processes.

    Args:
      facts: anything that JSON can hold, by the name under which a difference is reported.
    Raises:
      InputError: in all processes, where a fact differs; names the first that does.
    """
    if jax.process_count() == 1:
        return
    first, *others = map(json.loads, gather(json.dumps(facts)))
    for process, other in enumerate(others, start=1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise InputError(
                    f"process {process} has {name} = {other.get(name)}, process 0 has {first.get(name)}: start all processes"
                    " with the same command, versions and data"
                )


def versions() -> dict[str, str]:
    """What runs here, for `check_same`: the versions of Python, JAX and this package, and the sha256 of its source."""
    package = Path(__file__).parent
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(path.read_bytes())
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "slimmoe_jax": __version__,
        "slimmoe_jax's source (sha256)": source.hexdigest()[:12],
    }


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP end the run after the current step, with a checkpoint. A second one changes nothing.

    SIGHUP comes when the terminal goes away; `nohup` has it ignored, and so it stays.

    Of several processes any may be asked to stop, as a cluster does with one that it is about to take away: all then stop after the
    same step, which JAX agrees upon.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._several = jax.process_count() > 1

    def __enter__(self) -> StopSignals:
        # With several processes SIGTERM belongs to JAX, which tells the others.
        numbers = [signal.SIGINT, signal.SIGHUP] + ([] if self._several else [signal.SIGTERM])
        numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_after(self, step: int) -> bool:
        """Whether this step is the last. All processes ask, at each step."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.received = self.received or signal.SIGTERM
            return True
        return self.received is not None and not self._several

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
