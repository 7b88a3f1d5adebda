"""Files that are there whole or not at all, whatever ends the process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the name `path` when all has gone well, in place of what was there."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_json(path: Path, tree: Any) -> None:
    """Writes JSON; a NaN, which JSON has no word for, is a ValueError."""
    text = json.dumps(tree, indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")
