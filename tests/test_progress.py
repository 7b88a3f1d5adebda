"""What a person sees while waiting: on a terminal, without colours, and where there is no terminal."""

import os
import pty
import re
import subprocess
import sys

import pytest

PROGRAM = """
import time
from slimmoe_jax.progress import Meter, waiting
with waiting("loading"):
    time.sleep(0.3)
with Meter("count", 3) as meter:
    for done in (1, 2, 3):
        meter.update(done, f"{done} of 3")
        time.sleep(0.15)
    meter.note("a note")
"""
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")


def on_a_terminal(**environment):
    """All that the program writes to a terminal, bytes."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"} | environment
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so when the other end is closed
            part = b""
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0
    return written


def test_a_terminal_shows_what_goes_on():
    written = on_a_terminal()
    assert COLOUR.search(written)
    text = COLOUR.sub(b"", written)
    assert b"loading 0:00:00" in text and b"3 of 3" in text and b"a note" in text and b"ETA" in text


def test_colours_are_left_out_where_nobody_wants_them():
    written = on_a_terminal(NO_COLOR="1")
    assert b"loading 0:00:00" in written and not re.search(rb"\x1b\[(3|4|9)\d", written)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_file_gets_few_plain_lines(stream):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    lines = {"stdout": [], "stderr": [b"count: 3 of 3, 0:00:00, ETA 0:00:00", b"a note"]}
    assert getattr(done, stream).splitlines() == lines[stream]
