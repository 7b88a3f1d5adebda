"""Where text comes from: a hub dataset, local files of its layout, or the standard library of the Python that runs this.

A source is cut into units, each some 16 MB of text and small enough to pickle: rows, or the name of a
parquet file and its row groups. The reading process only decompresses and cuts; parsing and tokenizing are left to
whoever takes a unit. The cut depends on the source alone, so that a unit's number means the same text in every process
and after every restart.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slimmoe_jax import files as files_lib
from slimmoe_jax.config import InputError, reason
from slimmoe_jax.data import folders, reading, stdlib, tables
from slimmoe_jax.data.reading import Field, RowLimit, Unit
from slimmoe_jax.progress import say

FINGERPRINT_VERSION = "2:"  # how fingerprints begin; those of version 1, of names and sizes alone, had no such mark
_TXT_DOCUMENT = 2**14
_COSTS = {b"{": 232, b"[": 96, b",": 64}  # bytes of memory that what begins there takes, about


class Interrupted(InputError):
    """Stopped by something that may be gone at the next try, such as a network failure: what is done is kept."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of rows. Opening one reads nothing of it; its units and its fingerprint do."""

    units: Callable[[], Iterator[Unit]]
    total_bytes: int  # on disk, the sum of the units' sizes; 0: unknown
    digest: Callable[[], str]  # of the text
    local: bool = True
    ignored: tuple[str, ...] = ()  # files of a directory that are not of a known kind
    remarks: tuple[str, ...] = ()  # on which of its files are read

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when the text does.

        Of files it is a sha256 of their names below the directory, sizes and contents: all of these up to 1 GiB together, beyond
        that the first, middle and last 64 KiB of each file. Of the standard library it depends on the Python version and on
        `stdlib.VERSION`; of a hub's data set on its name, subset and split alone.

        Raises:
          InputError: a file cannot be read.
        """
        return FINGERPRINT_VERSION + self.digest()


def open_source(
    spec: str, field: Field = "text", split: str = "", form: str = "text", limit: RowLimit = reading.NO_CONFIG
) -> Source:
    """Opens `hub:NAME[:SUBSET]`, `stdlib[:sources]`, a file, or a directory of files.

    Args:
      field: the column or key that is read, of several the first that a row has; None takes whole rows.
      split: of a hub dataset (empty: train) or of a directory (empty: train where its files fall into splits, else all files).
      form: what the standard library is to be made into: text, chat or multiple_choice.
      limit: of each row.
    Raises:
      InputError: nothing is there, or nothing of a known kind or of the split.
    """
    if spec.startswith("hub:"):
        return _hub(spec, field, split or "train", limit)
    if spec in ("stdlib", "stdlib:sources"):
        return dataclasses.replace(_stdlib(spec == "stdlib:sources", form), remarks=_no_splits(split, "the standard library"))
    path = Path(spec).expanduser()
    if not spec or not os.path.exists(path):
        raise InputError(f"data.source = {spec} does not exist: give hub:NAME[:SUBSET], a file, a directory or stdlib")
    directory = path.is_dir()
    files, ignored = folders.find(path) if directory else ([path], [])
    if not files or not folders.kind_of(files[0].name):
        raise InputError(f"data.source = {spec} holds no text: files end in {', '.join(folders.SUFFIXES)}")
    remarks = _no_splits(split, "a single file")
    if directory:
        files, remarks = folders.select(path, files, split)
        files = folders.once(files)
    for file in files:
        if form != "text" and _form(file) == "txt":
            raise InputError(f"{file} is plain text, which holds no {form} rows: give jsonl or parquet, or set data.format to text")
    names = [str(file.relative_to(path)) if directory else file.name for file in files]
    return Source(
        units=lambda: _file_units(files, field, not directory, limit),
        total_bytes=sum(file.stat().st_size for file in files),
        digest=lambda: folders.fingerprint(names, files),
        ignored=tuple(str(file.relative_to(path)) for file in ignored),
        remarks=remarks,
    )


def _no_splits(split: str, what: str) -> tuple[str, ...]:
    return (f"data.split = {split}: {what} has no splits, all of it is read",) if split else ()


def _form(file: Path) -> str:
    kind = folders.kind_of(file.name)
    return kind.form if kind else ""


def rows(unit: Unit, field: Field) -> Iterator[tuple[int, Any]]:
    """The (row number, value) of each row of a unit: what stands under `field`, or the whole row; None where that is missing.

    Raises:
      InputError: a damaged parquet file, or one with values that Python has no type for; a row that is too large.
    """
    values = (unit.rows or []) if unit.row_groups is None else tables.values(unit, field)
    for number, row in enumerate(values, start=unit.first_row):
        if unit.json and _memory(row, unit.limit) > unit.limit.memory:
            raise unit.limit.too_many(unit.file, f"line {number}")
        yield number, _parse(row, field) if unit.json else row


def documents(unit: Unit, field: Field) -> Iterator[tuple[int, str | None]]:
    """The (row number, text) of each row of a unit; None for a row that is not a document."""
    for number, value in rows(unit, field):
        yield number, value if isinstance(value, str) and _is_unicode(value) else None


def _parse(line: bytes, field: Field) -> Any:
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
        if _is_deep(row):
            return None
        if field is None:
            return row
        return row[field if isinstance(field, str) else next((name for name in field if name in row), field[0])]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _memory(line: bytes, limit: RowLimit) -> int:
    """About how many bytes the values in a line of JSON take; 0 where they cannot be too many."""
    if len(line) * max(_COSTS.values()) <= limit.memory or _estimate(line) <= limit.memory:
        return 0
    characters = np.frombuffer(line.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    in_text = np.logical_xor.accumulate(characters == ord('"'))  # where what looks like lists is none
    return _estimate(characters[~in_text].tobytes()) + len(line)


def _estimate(line: bytes) -> int:
    return sum(cost * line.count(mark) for mark, cost in _COSTS.items())


def _is_deep(tree: Any) -> bool:
    """Whether lists and objects are nested deeper than what prints or walks them can follow."""
    level = [tree]
    for _ in range(files_lib.MOST_NESTED):
        inside = (value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list)))
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --- files -----------------------------------------------------------------------------------------------------------


def _file_units(files: list[Path], field: Field, one_file: bool, limit: RowLimit) -> Iterator[Unit]:
    for file in files:
        kind = folders.kind_of(file.name)
        assert kind is not None
        if kind.form == "parquet":
            yield from tables.units(file, field, limit)
        elif kind.form == "jsonl":
            yield from reading.group(str(file), _json_lines(file, kind.packing, field, limit), json=True, limit=limit)
        else:
            # A file of a directory is a document. A single file would then be one document, all of it in one split: it is
            # cut at blank lines.
            least = _TXT_DOCUMENT if one_file else reading.UNIT_BYTES
            yield from reading.group(str(file), _txt_documents(file, kind.packing, least, limit))


def _json_lines(file: Path, packing: str, field: Field, limit: RowLimit) -> Iterator[tuple[bytes, int, int]]:
    """The lines of a file. They are parsed by others; but where there is a second choice of field, its first use is remarked on."""
    others = [] if field is None or isinstance(field, str) else [json.dumps(name).encode() for name in field[1:]]
    first = json.dumps(field[0]).encode() if others and field else b""
    for line, done in reading.lines(file, packing, limit):
        if others and first not in line and any(other in line for other in others) and not _memory(line, limit):
            found = next((name for name in field or () if _parse(line, name) is not None), None)
            reading.say_column(field, found)
            others = [] if found else others
        yield line, len(line), done


def _txt_documents(file: Path, packing: str, least: int, limit: RowLimit) -> Iterator[tuple[str, int, int]]:
    """Documents of at least `least` bytes, cut before a blank line, or where no blank line comes within four times that."""
    lines: list[bytes] = []
    size, first_line, done = 0, 1, 0

    def document(done: int) -> tuple[str, int, int]:
        try:
            return b"".join(lines).decode("utf-8-sig" if first_line == 1 else "utf-8"), size, done
        except UnicodeDecodeError as error:
            at = first_line + b"".join(lines)[: error.start].count(b"\n")
            raise InputError(f"{file} is not UTF-8 ({error.reason} in line {at}): convert it to UTF-8") from error

    for line, done in reading.lines(file, packing, limit):
        if (size >= least and not line.strip()) or size >= 4 * least:
            yield document(done)
            first_line += len(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield document(done)


# --- hub -------------------------------------------------------------------------------------------------------------


def _hub(spec: str, field: Field, split: str, limit: RowLimit) -> Source:
    _, name, *subset = spec.split(":")
    if not name or len(subset) > 1:
        raise InputError(f"data.source = {spec} is not a dataset: write hub:NAME or hub:NAME:SUBSET")

    def values() -> Iterator[tuple[Any, int, int]]:
        datasets = reading.module("datasets", "reading from the hub")
        done = 0
        try:
            for number, row in enumerate(datasets.load_dataset(name, *subset, split=split, streaming=True), start=1):
                column = reading.column(field, list(row), spec)
                reading.say_column(field, column)
                value = row if column is None else row[column]
                size = reading.size_of(value)
                if size > limit.bytes:
                    raise limit.refusal(spec, f"row {number}")
                done += size
                yield value, size, done
        except InputError:
            raise
        except Exception as error:  # of the network, the hub's client or the dataset's own files
            raise Interrupted(
                f"{spec} cannot be read from the hub ({reason(error)}): check the name and the network and run the same"
                " command again, or give a local mirror's directory as data.source"
            ) from error

    return Source(lambda: reading.group(spec, values()), total_bytes=0, digest=lambda: _digest(f"{spec} {split}"), local=False)


# --- the standard library --------------------------------------------------------------------------------------------


def _stdlib(with_sources: bool, form: str) -> Source:
    python = sys.version.split()[0]

    def units() -> Iterator[Unit]:
        rows = _stdlib_rows(with_sources, form)
        size = sum(map(reading.size_of, rows))
        yield Unit(f"the standard library of Python {python}", 1, size, rows=rows)

    return Source(units, total_bytes=0, digest=lambda: _digest(["stdlib", stdlib.VERSION, python, with_sources, form]))


@functools.cache
def _stdlib_rows(with_sources: bool, form: str) -> list[Any]:
    say("reading the standard library")  # which takes seconds
    of_form: dict[str, Callable[[], list[Any]]] = {"chat": stdlib.conversations, "multiple_choice": stdlib.questions}
    return of_form.get(form, lambda: stdlib.texts(with_sources))()
