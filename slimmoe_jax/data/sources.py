"""Where text comes from: a hub dataset, local files of its layout, or the standard library of the Python that runs this.

A source is cut into units, each some 16 MB of text and small enough to pickle: rows, or the name of a
parquet file and its row groups. The reading process only decompresses and cuts; parsing and tokenizing are left to
whoever takes a unit. The cut depends on the source alone, so that a unit's number means the same text in every process
and after every restart.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from slimmoe_jax.config import InputError, reason
from slimmoe_jax.data import stdlib
from slimmoe_jax.progress import say

UNIT_BYTES = 16 * 2**20
_BLOCK = 2**20
_TXT_DOCUMENT = 2**14
_TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
_SUFFIXES = (".parquet", *_TEXT_SUFFIXES)


class Interrupted(InputError):
    """Stopped by something that may be gone at the next try, such as a network failure: what is done is kept."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work: either rows, or the row groups of a parquet file."""

    file: str  # for messages
    first_row: int  # number of its first row in the file, from 1
    size: int  # bytes of the source that it takes up, as `Source.total_bytes` counts them
    rows: list[Any] | None = None  # bytes: a line of JSON; anything else: the value itself
    row_groups: tuple[int, ...] | None = None  # of the parquet file `file`


@dataclasses.dataclass(frozen=True)
class Source:
    units: Callable[[], Iterator[Unit]]
    total_bytes: int  # on disk, the sum of the units' sizes; 0: unknown
    fingerprint: str  # changes when the text does, as far as names and sizes tell
    local: bool = True
    ignored: tuple[str, ...] = ()  # files of a directory that are not of a known kind


def open_source(spec: str, field: str | None = "text", split: str = "", form: str = "text") -> Source:
    """Opens `hub:NAME[:SUBSET]`, `stdlib[:sources]`, a file, or a directory of files.

    Args:
      field: the column or key that is read; None takes whole rows.
      split: of a hub dataset (empty: train); of a directory it takes the files named SPLIT-*, where there are such.
      form: what the standard library is to be made into: text, chat or multiple_choice.
    Raises:
      InputError: nothing is there, or nothing of a known kind.
    """
    if spec.startswith("hub:"):
        return _hub(spec, field, split or "train")
    if spec in ("stdlib", "stdlib:sources"):
        return _stdlib(spec == "stdlib:sources", form)
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        raise InputError(f"data.source = {spec} does not exist: give hub:NAME[:SUBSET], a file, a directory or stdlib")
    files, ignored = ([path], []) if path.is_file() else _files_below(path)
    if split and path.is_dir():
        files = [file for file in files if file.name.startswith((f"{split}-", f"{split}."))] or files
    if not files or not files[0].name.endswith(_SUFFIXES):
        raise InputError(f"data.source = {spec} holds no text: files end in {', '.join(_SUFFIXES)}")
    if form != "text":
        for file in files:
            if ".txt" in file.name:
                raise InputError(
                    f"{file} is plain text, which holds no {form} rows: give jsonl or parquet, or set data.format to text"
                )
    sizes = [file.stat().st_size for file in files]
    names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
    return Source(
        units=lambda: _file_units(files, field, one_file=path.is_file()),
        total_bytes=sum(sizes),
        fingerprint=_digest(json.dumps([names, sizes])),
        ignored=tuple(str(file.relative_to(path)) for file in ignored),
    )


def _files_below(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of known and of other kinds. Hidden ones, such as a download's cache, are no part of the text."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    known = [file for file in files if file.name.endswith(_SUFFIXES)]
    return known, [file for file in files if not file.name.endswith(_SUFFIXES)]


def rows(unit: Unit, field: str | None) -> Iterator[tuple[int, Any]]:
    """The (row number, value) of each row of a unit: what stands under `field`, or the whole row; None where that is missing.

    Raises:
      InputError: a damaged parquet file.
    """
    values: Iterable[Any] = (unit.rows or ()) if unit.row_groups is None else _parquet_values(unit, field)
    for number, row in enumerate(values, start=unit.first_row):
        yield number, _parse(row, field) if isinstance(row, bytes) and unit.row_groups is None else row


def documents(unit: Unit, field: str) -> Iterator[tuple[int, str | None]]:
    """The (row number, text) of each row of a unit; None for a row that is not a document."""
    for number, value in rows(unit, field):
        yield number, value if isinstance(value, str) and _is_unicode(value) else None


def _parse(line: bytes, field: str | None) -> Any:
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
        return row if field is None else row[field]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _size(value: Any) -> int:
    """Some measure of a value's length, in characters."""
    return len(value) if isinstance(value, str) else len(str(value or ""))


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _module(name: str, why: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{why} needs the package {name}: pip install {name}") from error


def _damaged(file: Path | str, error: Exception) -> InputError:
    return InputError(f"{file} is damaged ({reason(error)}): fetch or write it again")


def _group(file: str, rows: Iterable[tuple[Any, int, int]]) -> Iterator[Unit]:
    """Gathers rows into units. Each row comes with its length and how many bytes of the file are read up to it."""
    group: list[Any] = []
    length, first_row, before, done = 0, 1, 0, 0
    for row, row_length, done in rows:
        group.append(row)
        length += row_length
        if length >= UNIT_BYTES:
            yield Unit(file, first_row, done - before, rows=group)
            first_row += len(group)
            group, length, before = [], 0, done
    if group:
        yield Unit(file, first_row, done - before, rows=group)


# --- files -----------------------------------------------------------------------------------------------------------


def _file_units(files: list[Path], field: str | None, one_file: bool) -> Iterator[Unit]:
    for file in files:
        if file.name.endswith(".parquet"):
            yield from _parquet_units(file, field)
        elif ".jsonl" in file.name:
            yield from _group(str(file), ((line, len(line), done) for line, done in _lines(file)))
        else:
            # A file of a directory is a document. A single file would then be one document, all of it in one split: it is
            # cut at blank lines.
            yield from _group(str(file), _txt_documents(file, _TXT_DOCUMENT if one_file else UNIT_BYTES))


def _parquet_units(file: Path, field: str | None) -> Iterator[Unit]:
    parquet = _open_parquet(file)
    columns = parquet.schema_arrow.names
    if field is not None and field not in columns:
        raise InputError(f"{file} has no column {field!r}: set data.text_field to one of {', '.join(columns)}")
    file_size, count = file.stat().st_size, parquet.num_row_groups
    groups: list[int] = []
    size, first_row, rows = 0, 1, 0
    for number in range(count):
        group = parquet.metadata.row_group(number)
        if group.total_byte_size > 4 * UNIT_BYTES:  # too much for a worker at once: read here, piece by piece
            if groups:
                yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups))
                groups, size, first_row, rows = [], 0, first_row + rows, 0
            for unit in _group(str(file), _parquet_rows(parquet, file, number, field, file_size // count)):
                yield dataclasses.replace(unit, first_row=first_row + unit.first_row - 1)
            first_row += group.num_rows
            continue
        groups.append(number)
        rows += group.num_rows
        size += group.total_byte_size
        if size >= UNIT_BYTES:
            yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups))
            groups, size, first_row, rows = [], 0, first_row + rows, 0
    if groups:
        yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups))


def _parquet_rows(parquet: Any, file: Path, number: int, field: str | None, size: int) -> Iterator[tuple[Any, int, int]]:
    """The values of one row group, which takes up `size` bytes of the file."""
    count, read = parquet.metadata.row_group(number).num_rows, 0
    try:
        for batch in parquet.iter_batches(batch_size=256, row_groups=[number], columns=field and [field]):
            for value in batch.to_pylist() if field is None else batch[field].to_pylist():
                read += 1
                yield value, _size(value), size * read // count
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _parquet_values(unit: Unit, field: str | None) -> list[Any]:
    parquet = _open_parquet(Path(unit.file))
    try:
        table = parquet.read_row_groups(unit.row_groups, columns=field and [field])
        return table.to_pylist() if field is None else table[field].to_pylist()
    except (OSError, ValueError) as error:
        raise _damaged(unit.file, error) from error


def _open_parquet(file: Path) -> Any:
    parquet = _module("pyarrow.parquet", "reading parquet")
    try:
        return parquet.ParquetFile(file, buffer_size=_BLOCK, page_checksum_verification=True)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _txt_documents(file: Path, least: int) -> Iterator[tuple[str, int, int]]:
    """Documents of at least `least` bytes, cut before a blank line, or where no blank line comes within four times that."""
    lines: list[bytes] = []
    size, first_line, done = 0, 1, 0

    def document(done: int) -> tuple[str, int, int]:
        try:
            return b"".join(lines).decode("utf-8-sig" if first_line == 1 else "utf-8"), size, done
        except UnicodeDecodeError as error:
            at = first_line + b"".join(lines)[: error.start].count(b"\n")
            raise InputError(f"{file} is not UTF-8 ({error.reason} in line {at}): convert it to UTF-8") from error

    for line, done in _lines(file):
        if (size >= least and not line.strip()) or size >= 4 * least:
            yield document(done)
            first_line += len(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield document(done)


def _lines(file: Path) -> Iterator[tuple[bytes, int]]:
    """Lines with their ends, and how many bytes of the file are read."""
    rest: list[bytes] = []  # of a line that goes on in the next block
    done = 0
    for block, done in _blocks(file):
        first, *others = block.split(b"\n")
        rest.append(first)
        if not others:
            continue
        yield b"".join(rest) + b"\n", done
        *whole, last = others
        for line in whole:
            yield line + b"\n", done
        rest = [last]
    if any(rest):
        yield b"".join(rest), done


def _blocks(file: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks, and how many bytes of the file are read.

    Raises:
      InputError: the file is damaged or ends too early.
    """
    try:
        with file.open("rb") as raw:
            if file.name.endswith(".zst"):
                yield from _zstd_blocks(raw)
            else:
                stream = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
                while block := stream.read(_BLOCK):
                    yield block, raw.tell()
    except PermissionError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): change its permissions") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(file, error) from error


def _zstd_blocks(raw: Any) -> Iterator[tuple[bytes, int]]:
    zstandard = _module("zstandard", "reading .zst")
    frame = None
    try:
        while block := raw.read(_BLOCK):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block), raw.tell()
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:  # the library itself takes a truncated stream for a finished one
        raise EOFError("the last frame is incomplete")


# --- hub -------------------------------------------------------------------------------------------------------------


def _hub(spec: str, field: str | None, split: str) -> Source:
    _, name, *subset = spec.split(":")
    if not name or len(subset) > 1:
        raise InputError(f"data.source = {spec} is not a dataset: write hub:NAME or hub:NAME:SUBSET")

    def values() -> Iterator[tuple[Any, int, int]]:
        datasets = _module("datasets", "reading from the hub")
        done = 0
        try:
            for row in datasets.load_dataset(name, *subset, split=split, streaming=True):
                if field is not None and field not in row:
                    raise InputError(f"{spec} has no column {field!r}: set data.text_field to one of {', '.join(row)}")
                value = row if field is None else row[field]
                done += _size(value)
                yield value, _size(value), done
        except InputError:
            raise
        except Exception as error:  # of the network, the hub's client or the dataset's own files
            raise Interrupted(
                f"{spec} cannot be read from the hub ({reason(error)}): check the name and the network and run the same"
                " command again, or give a local mirror's directory as data.source"
            ) from error

    return Source(lambda: _group(spec, values()), total_bytes=0, fingerprint=_digest(f"{spec} {split}"), local=False)


# --- the standard library --------------------------------------------------------------------------------------------


@functools.cache
def _stdlib(with_sources: bool, form: str) -> Source:
    say("reading the standard library")  # which takes seconds
    of_form: dict[str, Callable[[], list[Any]]] = {"chat": stdlib.conversations, "multiple_choice": stdlib.questions}
    rows = of_form.get(form, lambda: stdlib.texts(with_sources))()
    size = sum(_size(row) for row in rows)
    name = f"the standard library of Python {sys.version.split()[0]}"
    return Source(lambda: iter([Unit(name, 1, size, rows=rows)]), size, _digest(json.dumps(rows)))
