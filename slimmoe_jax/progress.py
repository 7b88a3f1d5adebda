"""Progress that a person can watch: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slimmoe_jax.terminal import printable

SECONDS_BETWEEN_LINES = 15.0


class Meter:
    """Counts up to `total` and shows `text` beside it. Use as a context manager.

    Args:
      label: what is being done.
      total: where the count ends; 0 where nobody knows.
      done: where it starts.
      quiet: show nothing, as for a process that is not the first.
    """

    def __init__(self, label: str, total: float, done: float = 0, quiet: bool = False):
        self._label, self._total, self._first = label, total, done
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._quiet = quiet
        self._live = self._console.is_terminal and not quiet
        self._started = self._printed = time.monotonic()
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}")]
        columns += [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._bar.add_task(label, total=total or None, completed=int(done), text="")

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, done: float, text: str) -> None:
        """Shows how far things are; off a terminal, at most every 15 seconds and at the end."""
        self._bar.update(self._task, completed=done, text=text)
        now = time.monotonic()
        if self._live or self._quiet or (now - self._printed < SECONDS_BETWEEN_LINES and done != self._total):
            return
        self._printed = now
        eta = ""
        if self._total and done > self._first:
            eta = f", ETA {clock((now - self._started) / (done - self._first) * (self._total - done))}"
        say(f"{self._label}: {text}, {clock(now - self._started)}{eta}")

    def note(self, line: str) -> None:
        """Prints a line that stays, above the live one."""
        if self._live:
            self._console.print(printable(line), markup=False, highlight=False)
        elif not self._quiet:
            say(line)


@contextlib.contextmanager
def waiting(label: str) -> Iterator[None]:
    """Shows on a terminal that something goes on whose end nobody can foresee, and for how long; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        shown.add_task(label, total=None)
        yield


def say(line: str) -> None:
    """Prints a line to stderr, where all remarks go: stdout is for what a command was asked for."""
    print(printable(line), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


def short(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
