"""A lock on a folder that goes with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from slimmoe_jax.config import InputError


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Keeps a second process out of the folder.

    Raises:
      InputError: with the words of `refusal`, where another holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(refusal) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
