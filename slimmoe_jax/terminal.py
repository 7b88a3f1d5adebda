"""What a terminal gets to see of text from elsewhere, and what happens when nobody reads any more."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
from types import FrameType
from typing import Any, TextIO

# C0 and C1 controls but tab and newline, what separates or reorders lines, and surrogates, which no terminal can encode.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with its control characters as escapes, such as \x1b: it moves no cursor, sets no title and hides nothing."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    r"""The same with line ends and tabs as \n and \t: a name that stays where it is put."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class Remarks:
    """A stderr that ends nothing: once it cannot be written to (its reader or terminal is gone), the rest goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)


def discard(stream: TextIO) -> None:
    """Sends what is still to be written to a stream, by whatever library, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def reader_is_gone(stream: TextIO) -> bool:
    """Whether a stream is a pipe or socket that nobody reads."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def open_closed_streams() -> None:
    """Opens /dev/null in place of a standard stream that is closed.

    The next file opened would otherwise get its number, and what libraries write to stderr would end up in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))


def end_quietly_on_interrupt() -> None:
    """For the time of imports, in which Ctrl-C is no reason for a traceback and some libraries swallow it. `cli.run` ends it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def keep_interrupts() -> None:
    """Raises a KeyboardInterrupt again that Python cannot pass on: one in a callback of its garbage collector, as JAX has."""
    hook, main = sys.unraisablehook, threading.main_thread().ident or 0

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        later = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))  # when the callback has returned
        later.daemon = True
        later.start()

    sys.unraisablehook = again


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
