"""Files that are there whole or not at all, whatever ends the process; JSON; and what to do where the system refuses a write."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What helps where the system refuses a write.
ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
}
MOST_NESTED = 200  # lists and objects of a JSON text in each other; Python itself, and what prints it, breaks at about a thousand


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A path to write to, whose file takes the name `path` when all has gone well, in place of what was there.

    Args:
      suffix: of the file until then; several processes that may write the same file at once need one each.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, tree: Any, suffix: str = ".tmp") -> None:
    """Writes JSON, as `replacing` does; a NaN, which JSON has no word for, is a ValueError."""
    text = json.dumps(tree, indent=2, allow_nan=False)
    with replacing(path, suffix) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
      OSError, ValueError: the file cannot be read; is not JSON; or is nested deeper than Python can follow.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or nested too deep."""
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if text.count("[") + text.count("{") > MOST_NESTED and any(depth > MOST_NESTED for _, _, depth in _leaves(tree)):
        raise ValueError("it is nested too deep")
    return tree


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def not_finite(tree: Any) -> list[str]:
    """The dotted names of the numbers in a JSON tree that are NaN, infinite, or whole but beyond the largest float."""

    def wrong(value: Any) -> bool:
        beyond = isinstance(value, int) and abs(value) > sys.float_info.max
        return beyond or (isinstance(value, float) and not math.isfinite(value))

    return [name for name, value, _ in _leaves(tree) if wrong(value)]


def _leaves(tree: Any) -> Iterator[tuple[str, Any, int]]:
    """What of a JSON tree is no list or object, or an empty one: its dotted name, it, and how many of those it is in."""
    left = [("", tree, 0)]
    while left:
        name, value, depth = left.pop()
        if isinstance(value, dict) and value:
            left += [(f"{name}.{key}".lstrip("."), item, depth + 1) for key, item in reversed(value.items())]
        elif isinstance(value, (list, tuple)) and value:
            left += [(f"{name}[{n}]", item, depth + 1) for n, item in reversed(list(enumerate(value)))]
        else:
            yield name, value, depth


def with_nulls(tree: Any) -> Any:
    """A JSON tree with null for each float that is not finite, which JSON has no word for."""
    if isinstance(tree, dict):
        return {key: with_nulls(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [with_nulls(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be made in a folder."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp"):
        pass


def refused_write(error: BaseException) -> int | None:
    """The number, a key of ADVICE, of the system's refusal behind an exception of whatever library; None where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in ADVICE:
            return seen.errno
        for number in ADVICE:  # libraries in C++ and Rust pass on what the system says, in words
            if os.strerror(number) in str(seen):
                return number
        seen = seen.__cause__ or seen.__context__
    return None
