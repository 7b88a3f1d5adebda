"""What the readers of all sources share: units of work, lines of plain and compressed files, and errors that name the file."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from slimmoe_jax.config import DataConfig, InputError, reason
from slimmoe_jax.progress import say
from slimmoe_jax.terminal import one_line

UNIT_BYTES = 16 * 2**20
UNIT_ROWS = 2**20  # rows of a unit at most: tiny ones take far more memory than their bytes
BLOCK = 2**20
_ZSTD_INPUT = 2**12  # compressed bytes per call: a run of one byte expands up to 32,768 times
_ZSTD_WINDOW = 2**31  # the largest that any zstd writes

Field = str | tuple[str, ...] | None  # a column or key; of several, the first that a row has; None: whole rows


@dataclasses.dataclass(frozen=True)
class RowLimit:
    """How long a row may be, and what to do about a longer one."""

    bytes: int = DataConfig.max_row_bytes
    advice: str = "split it into several"

    @property
    def memory(self) -> int:
        """Bytes that a row may take as Python's objects, by estimate: a list of a few bytes of JSON takes about a hundred."""
        return 8 * self.bytes

    def refusal(self, file: Path | str, row: str) -> InputError:
        """The error to raise for a row that is too long."""
        return InputError(f"{file}, {row}, is longer than {self.bytes:,} bytes: {self.advice}")

    def too_many(self, file: Path | str, row: str) -> InputError:
        """The error to raise for a row of too many values."""
        return InputError(f"{file}, {row}, holds so many values that it would take over {self.memory:,} bytes: {self.advice}")


NO_CONFIG = RowLimit()  # of what is read without one


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work: either rows, or the row groups of a parquet file."""

    file: str  # for messages
    first_row: int  # number of its first row in the file, from 1
    size: int  # bytes of the source that it takes up, as `Source.total_bytes` counts them
    rows: list[Any] | None = None
    json: bool = False  # whether each row is a line of JSON, still to be parsed, instead of the value itself
    row_groups: tuple[int, ...] | None = None  # of the parquet file `file`
    limit: RowLimit = NO_CONFIG  # of each row


def group(file: str, rows: Iterable[tuple[Any, int, int]], json: bool = False, limit: RowLimit = NO_CONFIG) -> Iterator[Unit]:
    """Gathers rows into units. Each row comes with its length and how many bytes of the file are read up to it."""
    gathered: list[Any] = []
    length, first_row, before, done = 0, 1, 0, 0
    for row, row_length, done in rows:
        gathered.append(row)
        length += row_length
        if length >= UNIT_BYTES or len(gathered) == UNIT_ROWS:
            yield Unit(file, first_row, done - before, gathered, json, limit=limit)
            first_row += len(gathered)
            gathered, length, before = [], 0, done
    if gathered:
        yield Unit(file, first_row, done - before, gathered, json, limit=limit)


def size_of(value: Any) -> int:
    """Some measure of a value's length, in characters."""
    return len(value) if isinstance(value, str) else len(str(value or ""))


def column(field: Field, names: Sequence[str], where: str) -> str | None:
    """The name under which `field` is found among a row's columns; None for whole rows.

    Raises:
      InputError: it is not there.
    """
    wanted = (field,) if isinstance(field, str) else field
    if wanted is None:
        return None
    for name in wanted:
        if name in names:
            return name
    what = f"set data.text_field to one of {one_line(', '.join(names))}" if names else "it has no columns at all"
    raise InputError(f"{where} has no column {wanted[0]!r}: {what}")


@functools.cache
def say_once(line: str) -> None:
    """Prints a remark to stderr the first time that a process makes it."""
    say(line)


def say_column(field: Field, found: str | None) -> None:
    """Remarks, once, that another column is read than the first choice."""
    if isinstance(field, tuple) and found and found != field[0]:
        say_once(f"no column {field[0]!r}: reading {found!r} instead")


def module(name: str, why: str) -> ModuleType:
    """Imports a package that only some sources need.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{why} needs the package {name}: pip install {name}") from error


def damaged(file: Path | str, error: BaseException) -> InputError:
    """The error to raise for a file that ends too early or does not decode."""
    return InputError(f"{file} is damaged ({reason(error)}): fetch or write it again")


def unreadable(file: Path | str, error: OSError) -> InputError:
    """The error to raise for a file or folder that cannot be opened."""
    return InputError(f"{file} cannot be read ({error.strerror}): check its permissions")


def lines(file: Path, packing: str, limit: RowLimit = NO_CONFIG) -> Iterator[tuple[bytes, int]]:
    """Lines with their ends, and how many bytes of the file are read.

    Args:
      packing: gz, zst, or empty for a plain file.
      limit: of a line without its end.
    Raises:
      InputError: the file is damaged or ends too early, or a line is too long.
    """
    rest: list[bytes] = []  # of a line that continues in the next block
    length, number, done = 0, 1, 0
    for block, done in _blocks(file, packing):
        first, *others = block.split(b"\n")
        rest.append(first)
        length += len(first)
        if length > limit.bytes:
            raise limit.refusal(file, f"line {number}")
        if not others:
            continue
        yield b"".join(rest) + b"\n", done
        *whole, last = others
        for line in whole:
            number += 1
            if len(line) > limit.bytes:
                raise limit.refusal(file, f"line {number}")
            yield line + b"\n", done
        rest, length, number = [last], len(last), number + 1
    if length > limit.bytes:
        raise limit.refusal(file, f"line {number}")
    if any(rest):
        yield b"".join(rest), done


def _blocks(file: Path, packing: str) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks, and how many bytes of the file are read."""
    try:
        with file.open("rb") as raw:
            if packing and not file.stat().st_size:
                raise EOFError("it is empty")  # nothing at all, compressed, still has a header
            if packing == "zst":
                for block, done in _zstd_blocks(file, raw):
                    yield from ((block[start : start + BLOCK], done) for start in range(0, len(block), BLOCK))
            else:
                stream = gzip.GzipFile(fileobj=raw) if packing else raw
                while block := stream.read(BLOCK):
                    yield block, raw.tell()
    except PermissionError as error:
        raise unreadable(file, error) from error
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(file, error) from error


def _zstd_blocks(file: Path, raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    zstandard = module("zstandard", "reading .zst")
    frame = None
    made, size = [], 0
    try:
        while block := raw.read(_ZSTD_INPUT):
            while block:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
                made.append(frame.decompress(block))
                size += len(made[-1])
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            if size >= BLOCK:
                yield b"".join(made), raw.tell()
                made, size = [], 0
        if size:
            yield b"".join(made), raw.tell()
    except zstandard.ZstdError as error:
        if "ictionary" in str(error):
            raise InputError(
                f"{file} is compressed with a dictionary, which the file does not hold: compress it without one"
            ) from error
        if "memory" in str(error):
            raise InputError(f"{file} cannot be decompressed ({reason(error)}): compress it with a smaller window") from error
        raise OSError(str(error)) from error
    if frame is not None:  # the library itself takes a truncated stream for a finished one
        raise EOFError("the last frame is incomplete")
