"""Locks that end with the process, however it ends: one writer for each folder.

They are the kernel's (flock), so `kill -9` leaves none behind. On NFS, Linux turns them into byte-range locks, which hold across
hosts; so do Lustre (mounted with `flock`), GPFS and CephFS. On a file system without locks a remark says that there is none.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from slimmoe_jax import files
from slimmoe_jax.config import InputError
from slimmoe_jax.progress import say

LOCK_FILE = ".lock"  # in a locked folder; it stays, and says who holds the lock or held it last
_held: set[Path] = set()  # by this process


@contextlib.contextmanager
def one_writer(folder: Path, doing: str, otherwise: str) -> Iterator[None]:
    """Keeps other processes from writing into a folder, which is made if it is missing; within, this process may lock it again.

    Args:
      doing: what this process does there, for the line that another one gets.
      otherwise: what can be done in place of waiting, to end the line that this one gets.
    Raises:
      InputError: another process holds the lock, and the line says which; or no folder can be there, as in /proc.
      OSError: the folder cannot be written to, for a reason that `files.refused_write` knows.
    """
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    path = folder / LOCK_FILE
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks nothing that is open for reading alone
    except OSError as error:
        if files.refused_write(error):
            raise
        raise InputError(f"{folder} cannot be made or written to ({error.strerror}): {otherwise}") from error
    try:
        _lock(handle, path, otherwise)
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        os.truncate(handle, 0)
        os.write(handle, f"{doing}: process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
        _held.add(folder)
        yield
    finally:
        _held.discard(folder)
        with contextlib.suppress(OSError):
            if made and os.listdir(folder) == [LOCK_FILE]:  # nothing was written, as when the config is refused
                path.unlink()
                for place in made:
                    place.rmdir()
        os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether a process holds the lock of a folder."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:  # held, or a file system without locks
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)


def _lock(handle: int, path: Path, otherwise: str) -> None:
    for _ in range(10):  # `in_use` of another process holds it for a moment
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)
        except OSError as error:
            say(
                f"warning: {path.parent} cannot be locked ({error.strerror}): its file system does not keep a second process from"
                " writing there"
            )
            return
    holder = path.read_text(errors="replace").strip() or "it does not say what it does"
    raise InputError(f"another process is at work in {path.parent} ({holder}): wait for it, stop it, or {otherwise}")
