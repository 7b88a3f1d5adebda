"""Parquet files: their rows, or one line that says why there are none.

Columns of any type are read, and values come as Python's: text as str whatever its encoding in the file, binary as bytes, which
no format takes for text, lists and structs as lists and dicts.

A small file may hold large rows, through compression, dictionaries and run lengths: what is too large is refused by what the
file says of its row groups, or else by the decoded columns, before Python's objects are made of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimmoe_jax.config import InputError, reason
from slimmoe_jax.data import footers, reading
from slimmoe_jax.data.footers import RowGroup
from slimmoe_jax.data.reading import Field, RowLimit, Unit

_BATCH_ROWS = 256  # decoded at once, at most
_BATCH_BYTES = 2**28  # decoded at once, as far as can be told before
_TIMES = 200  # by which no text worth training on is compressed


def units(file: Path, field: Field, limit: RowLimit = reading.NO_CONFIG) -> Iterator[Unit]:
    """The units of a file: several row groups each, or rows where a row group is too large for a worker at once.

    Raises:
      InputError: a damaged or encrypted file, one without the column, or one with a row that is too long.
    """
    parquet, names = _open(file)
    column = _column(names, field, file)
    reading.say_column(field, column)
    described = _described(file)
    file_size, count = file.stat().st_size, len(described)
    groups: list[int] = []
    size, first_row, rows = 0, 1, 0
    for number, group in enumerate(described):
        _check_row_group(group, number, column, file, limit)
        if group.size > 4 * reading.UNIT_BYTES:  # read here, piece by piece
            if groups:
                yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups), limit=limit)
                groups, size, first_row, rows = [], 0, first_row + rows, 0
            in_group = _rows(parquet, file, number, column, file_size // count, first_row, limit)
            for unit in reading.group(str(file), in_group, limit=limit):
                yield dataclasses.replace(unit, first_row=first_row + unit.first_row - 1)
            first_row += group.rows
            continue
        groups.append(number)
        rows += group.rows
        size += group.size
        if size >= reading.UNIT_BYTES:
            yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups), limit=limit)
            groups, size, first_row, rows = [], 0, first_row + rows, 0
    if groups:
        yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups), limit=limit)


def values(unit: Unit, field: Field) -> Iterator[Any]:
    """The values of a unit's row groups.

    Raises:
      InputError: a damaged file, values that Python has no type for, or a row that is too long.
    """
    parquet, names = _open(unit.file)
    column = _column(names, field, unit.file)
    row = unit.first_row
    for number in unit.row_groups or ():
        for batch in _batches(parquet, unit.file, number, column, row, unit.limit):
            yield from _python(batch, column, unit.file)
            row += batch.num_rows


def _rows(
    parquet: Any, file: Path, number: int, column: str | None, size: int, first_row: int, limit: RowLimit
) -> Iterator[tuple[Any, int, int]]:
    """The values of one row group, which takes up `size` bytes of the file."""
    count, read = max(_described(file)[number].rows, 1), 0
    for batch in _batches(parquet, file, number, column, first_row, limit):
        for value in _python(batch, column, file):
            read += 1
            yield value, reading.size_of(value), size * read // count


def _batches(parquet: Any, file: Path | str, number: int, column: str | None, first_row: int, limit: RowLimit) -> Iterator[Any]:
    """A row group in tables of a few rows, no row of them too long."""
    columns = None if column is None else [column]
    at_once = _rows_at_once(_described(file)[number], column)
    try:
        for batch in parquet.iter_batches(batch_size=at_once, row_groups=[number], columns=columns):
            yield from _fitting(batch, file, first_row, limit)
            first_row += batch.num_rows
    except InputError:
        raise
    except Exception as error:  # pyarrow's own kinds, OSError, ValueError, NotImplementedError: what is wrong differs in words
        raise _refusal(file, error) from error


# --- sizes -----------------------------------------------------------------------------------------------------------


def _check_row_group(group: RowGroup, number: int, column: str | None, file: Path, limit: RowLimit) -> None:
    """Raises InputError where a row group must hold a row that is too long, or is a small file blown up."""
    where = f"a row of row group {number + 1}"
    for chunk in group.of(column):
        if chunk.size > group.rows * limit.bytes + reading.BLOCK or chunk.size > max(2 * limit.bytes, _TIMES * chunk.packed):
            raise limit.refusal(file, where)
        if chunk.values - group.rows > limit.bytes:
            raise limit.too_many(file, where)


def _rows_at_once(group: RowGroup, column: str | None) -> int:
    longest = sum(max(chunk.longest, chunk.size // max(group.rows, 1)) for chunk in group.of(column))
    return min(max(_BATCH_BYTES // max(longest, 1), 1), _BATCH_ROWS)


def _fitting(batch: Any, file: Path | str, first_row: int, limit: RowLimit) -> Iterator[Any]:
    """A table, in halves where it is too large to become Python's objects at once.

    Raises:
      InputError: a single row is.
    """
    weights = [_weight(column) for column in batch.columns]
    length, memory = sum(length for length, _ in weights), 64 * sum(values for _, values in weights)
    if length <= limit.bytes and memory <= limit.memory:
        yield batch
    elif batch.num_rows == 1:
        raise (limit.refusal if length > limit.bytes else limit.too_many)(file, f"row {first_row}")
    else:
        half = batch.num_rows // 2
        yield from _fitting(batch.slice(0, half), file, first_row, limit)
        yield from _fitting(batch.slice(half), file, first_row + half, limit)


def _weight(array: Any) -> tuple[int, int]:
    """The bytes of an array's values, each time that they occur, and how many values there are, those within others included."""
    types = reading.module("pyarrow.types", "reading parquet")
    kind = array.type
    if hasattr(array, "storage"):  # of an extension type
        return _weight(array.storage)
    if types.is_struct(kind):
        parts = [_weight(part) for part in array.flatten()]
    elif types.is_nested(kind):  # lists of all sorts, and maps
        parts = [_weight(array.flatten())]
    elif types.is_dictionary(kind):
        parts = [(_dictionary_bytes(array), 0)]
    else:
        parts = [(array.nbytes, 0)]
    return sum(length for length, _ in parts), len(array) + sum(values for _, values in parts)


def _dictionary_bytes(array: Any) -> int:
    compute = reading.module("pyarrow.compute", "reading parquet")
    if not len(array.dictionary):
        return 0
    try:
        lengths = compute.binary_length(array.dictionary)
    except NotImplementedError:  # neither text nor binary
        return array.dictionary.nbytes // len(array.dictionary) * len(array)
    return compute.sum(compute.take(lengths, array.indices)).as_py() or 0


# --- files, columns and values ---------------------------------------------------------------------------------------


def _described(file: Path | str) -> tuple[RowGroup, ...]:
    try:
        return footers.read(file)
    except PermissionError as error:
        raise reading.unreadable(file, error) from error
    except (OSError, ValueError) as error:
        raise reading.damaged(file, error) from error


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
