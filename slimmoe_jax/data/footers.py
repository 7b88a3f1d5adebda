"""What a parquet file says of its row groups, before any of them is read.

pyarrow's objects for the same end the whole process on some damaged files, and do not tell the size of a dictionary.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from pathlib import Path
from typing import Any

# Encodings, by their numbers in the format.
_DICTIONARIES = {2, 8}
_DELTA_BYTE_ARRAY = 7
_PAGE_HEADER = 256  # bytes, more than a dictionary's takes


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A row group's part of one column. Columns with lists and structs have several, one for each kind of value in them."""

    column: str
    values: int  # missing ones included
    size: int  # bytes when decompressed, still encoded
    packed: int  # bytes in the file
    longest: int  # bytes that a value may take when decoded, as far as can be told; 0: about as many as encoded


@dataclasses.dataclass(frozen=True)
class RowGroup:
    rows: int
    size: int  # bytes when decompressed, still encoded, of all columns
    chunks: tuple[Chunk, ...]

    def of(self, column: str | None) -> list[Chunk]:
        """The parts that belong to one column, or all of them."""
        return [chunk for chunk in self.chunks if column in (None, chunk.column)]


def read(file: Path | str) -> tuple[RowGroup, ...]:
    """The row groups of a file.

    Raises:
      OSError, ValueError: it cannot be read, or is damaged.
    """
    status = Path(file).stat()
    return _read(str(file), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # units of one file come one after another
def _read(file: str, size: int, changed: int) -> tuple[RowGroup, ...]:
    try:
        with open(file, "rb") as raw:
            raw.seek(max(size - 8, 0))
            length = int.from_bytes(raw.read(4), "little")
            raw.seek(max(size - 8 - length, 0))
            footer = _Thrift(raw.read(length)).struct()
            return tuple(
                RowGroup(
                    max(_whole(group[3]), 0),
                    _whole(group[2]),
                    tuple(_chunk(chunk[3], raw) for chunk in group[1] if 3 in chunk),  # else its description is encrypted
                )
                for group in footer.get(4, ())
            )
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its footer is damaged") from error


def _chunk(about: dict[int, Any], raw: Any) -> Chunk:
    encodings, size = set(about[2]), _whole(about[6])
    longest = 0
    if _DELTA_BYTE_ARRAY in encodings:  # a value may be the one before and a letter
        longest = size
    elif encodings & _DICTIONARIES:  # each value may be the longest in the dictionary
        longest = _dictionary_size(raw, about.get(11), size)
    return Chunk(about[3][0].decode(errors="replace"), _whole(about[5]), size, _whole(about[7]), longest)


def _whole(value: Any) -> int:
    """A number that is one: a damaged footer may have anything in its place."""
    if not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} in place of a number")
    return value


def _dictionary_size(raw: Any, place: Any, size: int) -> int:
    """Bytes of a dictionary when decompressed; of the whole chunk where that is not known."""
    if not isinstance(place, int) or place < 0:
        return size
    raw.seek(place)
    header = _Thrift(raw.read(_PAGE_HEADER))
    try:
        return int(header.struct()[2])
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError):
        return size


class _Thrift:
    """Values in Thrift's compact protocol, structs as dicts by the numbers of their fields."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            kind = header & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)  # a truth value is in the header
        return fields

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2 | 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return struct.unpack("<d", self._bytes(8))[0]
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                header = self._byte()
                size = header >> 4 if header >> 4 < 15 else self._varint()
                return [self._value(header & 15) for _ in range(size)]
            case 11:
                size = self._varint()
                kinds = self._byte() if size else 0
                return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(size)]
            case 12:
                return self.struct()
        raise ValueError(f"its footer is damaged (a value of kind {kind})")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        self._at += size
        if len(found) < size:
            raise IndexError
        return found

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
