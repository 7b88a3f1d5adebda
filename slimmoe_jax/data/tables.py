"""Parquet files: their rows, or one line that says why there are none.

Columns of any type are read, and values come as Python's: text as str whatever its encoding in the file, binary as bytes, which
no format takes for text, lists and structs as lists and dicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimmoe_jax.config import InputError, reason
from slimmoe_jax.data import reading
from slimmoe_jax.data.reading import Field, Unit


def units(file: Path, field: Field) -> Iterator[Unit]:
    """The units of a file: several row groups each, or rows where a row group is too large for a worker at once.

    Raises:
      InputError: a damaged or encrypted file, or one without the column.
    """
    parquet, names = _open(file)
    column = _column(names, field, file)
    reading.say_column(field, column)
    file_size, count = file.stat().st_size, parquet.num_row_groups
    groups: list[int] = []
    size, first_row, rows = 0, 1, 0
    for number in range(count):
        group = parquet.metadata.row_group(number)
        if group.total_byte_size > 4 * reading.UNIT_BYTES:  # read here, piece by piece
            if groups:
                yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups))
                groups, size, first_row, rows = [], 0, first_row + rows, 0
            for unit in reading.group(str(file), _rows(parquet, file, number, column, file_size // count)):
                yield dataclasses.replace(unit, first_row=first_row + unit.first_row - 1)
            first_row += group.num_rows
            continue
        groups.append(number)
        rows += group.num_rows
        size += group.total_byte_size
        if size >= reading.UNIT_BYTES:
            yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups))
            groups, size, first_row, rows = [], 0, first_row + rows, 0
    if groups:
        yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups))


def values(unit: Unit, field: Field) -> list[Any]:
    """The values of a unit's row groups.

    Raises:
      InputError: a damaged file, or values that Python has no type for.
    """
    parquet, names = _open(unit.file)
    column = _column(names, field, unit.file)
    try:
        table = parquet.read_row_groups(unit.row_groups, columns=None if column is None else [column])
    except Exception as error:  # pyarrow's own kinds, OSError, ValueError, NotImplementedError: what is wrong differs in words
        raise _refusal(unit.file, error) from error
    return _python(table, column, unit.file)


def _rows(parquet: Any, file: Path, number: int, column: str | None, size: int) -> Iterator[tuple[Any, int, int]]:
    """The values of one row group, which takes up `size` bytes of the file."""
    count, read = parquet.metadata.row_group(number).num_rows, 0
    for batch in _batches(parquet, file, number, column):
        for value in _python(batch, column, file):
            read += 1
            yield value, reading.size_of(value), size * read // count


def _batches(parquet: Any, file: Path, number: int, column: str | None) -> Iterator[Any]:
    columns = None if column is None else [column]
    try:
        yield from parquet.iter_batches(batch_size=256, row_groups=[number], columns=columns)
    except Exception as error:  # as in `values`
        raise _refusal(file, error) from error


def _open(file: Path | str) -> tuple[Any, list[str]]:
    """A parquet file and the names of its columns."""
    parquet = reading.module("pyarrow.parquet", "reading parquet")
    try:
        opened = parquet.ParquetFile(file, buffer_size=reading.BLOCK, page_checksum_verification=True)
        return opened, opened.schema_arrow.names
    except Exception as error:  # as in `values`
        raise _refusal(file, error) from error


def _column(names: list[str], field: Field, file: Path | str) -> str | None:
    """The column to read, or None for all of them; no name that is read may stand for two."""
    column = reading.column(field, names, str(file))
    twice = sorted({name for name in names if names.count(name) > 1 and column in (None, name)})
    if twice:
        raise InputError(f"{file} has several columns named {twice[0]!r}: rename or remove all but one")
    return column


def _python(table: Any, column: str | None, file: Path | str) -> list[Any]:
    """The values of a column, or rows as dicts."""
    if column is not None:
        return _converted(table, column, file)
    if not table.column_names:
        return [{} for _ in range(table.num_rows)]
    columns = [_converted(table, name, file) for name in table.column_names]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _converted(table: Any, name: str, file: Path | str) -> list[Any]:
    try:
        return table.column(name).to_pylist()
    except Exception as error:  # ArrowException, OverflowError and others, by the type of the column
        kind = table.schema.field(name).type
        raise InputError(
            f"{file}, column {name!r} of type {kind}, holds values that cannot be read ({reason(error)}): convert or remove it"
        ) from error


def _refusal(file: Path | str, error: Exception) -> InputError:
    if isinstance(error, PermissionError):
        return reading.unreadable(file, error)
    if "crypt" in str(error):
        return InputError(f"{file} is encrypted ({reason(error)}): write it without encryption")
    if isinstance(error, NotImplementedError):
        return InputError(f"{file} holds what this pyarrow cannot read ({reason(error)}): upgrade it, or write the file again")
    return reading.damaged(file, error)
