"""Where text comes from: a hub dataset, local files of its layout, or the standard library of the Python that runs this.

A source is cut into units, each some 16 MB of text and small enough to pickle: rows, or the name of a
parquet file and its row groups. The reading process only decompresses and cuts; parsing and tokenizing are left to
whoever takes a unit. The cut depends on the source alone, so that a unit's number means the same text in every process
and after every restart.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import hashlib
import importlib
import json
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from slimmoe_jax.config import InputError

UNIT_BYTES = 16 * 2**20
_BLOCK = 2**20
_TXT_DOCUMENT = 2**14
_TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
_SUFFIXES = (".parquet", *_TEXT_SUFFIXES)
# Not the library itself, or not text that anyone would learn from.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


class Interrupted(InputError):
    """Stopped by something that may be gone at the next try, such as a network failure: what is done is kept."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work: either rows, or the row groups of a parquet file."""

    file: str  # for messages
    first_row: int  # number of its first row in the file, from 1
    size: int  # bytes of the source that it takes up, as `Source.total_bytes` counts them
    rows: list[object] | None = None  # bytes: a line of JSON; str: a document; anything else: an invalid row
    row_groups: tuple[int, ...] | None = None  # of the parquet file `file`


@dataclasses.dataclass(frozen=True)
class Source:
    units: Callable[[], Iterator[Unit]]
    total_bytes: int  # on disk, the sum of the units' sizes; 0: unknown
    fingerprint: str  # changes when the text does, as far as names and sizes tell
    local: bool = True
    ignored: tuple[str, ...] = ()  # files of a directory that are not of a known kind


def open_source(spec: str, text_field: str) -> Source:
    """Opens `hub:NAME[:SUBSET]`, `stdlib[:sources]`, a file, or a directory of files.

    Raises:
      InputError: nothing is there, or nothing of a known kind.
    """
    if spec.startswith("hub:"):
        return _hub(spec, text_field)
    if spec in ("stdlib", "stdlib:sources"):
        return _stdlib(with_sources=spec == "stdlib:sources")
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        raise InputError(f"data.source = {spec} does not exist: give hub:NAME[:SUBSET], a file, a directory or stdlib")
    files, ignored = ([path], []) if path.is_file() else _files_below(path)
    if not files or not files[0].name.endswith(_SUFFIXES):
        raise InputError(f"data.source = {spec} holds no text: files end in {', '.join(_SUFFIXES)}")
    sizes = [file.stat().st_size for file in files]
    names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
    return Source(
        units=lambda: _file_units(files, text_field, one_file=path.is_file()),
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


def documents(unit: Unit, text_field: str) -> Iterator[tuple[int, str | None]]:
    """The (row number, text) of each row of a unit; None for a row that is not a document.

    Raises:
      InputError: a damaged parquet file.
    """
    rows = unit.rows if unit.row_groups is None else _parquet_texts(unit, text_field)
    for number, row in enumerate(rows, start=unit.first_row):
        text = _parse(row, text_field) if isinstance(row, bytes) and unit.row_groups is None else row
        yield number, text if isinstance(text, str) and _is_unicode(text) else None


def _parse(line: bytes, text_field: str) -> object:
    if not line.strip():
        return ""
    try:
        return json.loads(line)[text_field]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


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
    return InputError(f"{file} is damaged ({_reason(error)}): fetch or write it again")


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _group(file: str, rows: Iterable[tuple[object, int, int]]) -> Iterator[Unit]:
    """Gathers rows into units. Each row comes with its length and how many bytes of the file are read up to it."""
    group: list[object] = []
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


def _file_units(files: list[Path], text_field: str, one_file: bool) -> Iterator[Unit]:
    for file in files:
        if file.name.endswith(".parquet"):
            yield from _parquet_units(file, text_field)
        elif ".jsonl" in file.name:
            yield from _group(str(file), ((line, len(line), done) for line, done in _lines(file)))
        else:
            # A file of a directory is a document. A single file would then be one document, all of it in one split: it is
            # cut at blank lines.
            yield from _group(str(file), _txt_documents(file, _TXT_DOCUMENT if one_file else UNIT_BYTES))


def _parquet_units(file: Path, text_field: str) -> Iterator[Unit]:
    parquet = _open_parquet(file)
    columns = parquet.schema_arrow.names
    if text_field not in columns:
        raise InputError(f"{file} has no column {text_field!r}: set data.text_field to one of {', '.join(columns)}")
    file_size, count = file.stat().st_size, parquet.num_row_groups
    groups: list[int] = []
    size, first_row, rows = 0, 1, 0
    for number in range(count):
        group = parquet.metadata.row_group(number)
        if group.total_byte_size > 4 * UNIT_BYTES:  # too much for a worker at once: read here, piece by piece
            if groups:
                yield Unit(str(file), first_row, file_size * len(groups) // count, row_groups=tuple(groups))
                groups, size, first_row, rows = [], 0, first_row + rows, 0
            for unit in _group(str(file), _parquet_rows(parquet, file, number, text_field, file_size // count)):
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


def _parquet_rows(parquet, file: Path, number: int, text_field: str, size: int) -> Iterator[tuple[object, int, int]]:
    """The texts of one row group, which takes up `size` bytes of the file."""
    rows, read = parquet.metadata.row_group(number).num_rows, 0
    try:
        for batch in parquet.iter_batches(batch_size=256, row_groups=[number], columns=[text_field]):
            for text in batch[text_field].to_pylist():
                read += 1
                text = text if isinstance(text, str) else None
                yield text, len(text or ""), size * read // rows
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _parquet_texts(unit: Unit, text_field: str) -> list[object]:
    parquet = _open_parquet(Path(unit.file))
    try:
        return parquet.read_row_groups(unit.row_groups, columns=[text_field])[text_field].to_pylist()
    except (OSError, ValueError) as error:
        raise _damaged(unit.file, error) from error


def _open_parquet(file: Path):
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


def _zstd_blocks(raw) -> Iterator[tuple[bytes, int]]:
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


def _hub(spec: str, text_field: str) -> Source:
    _, name, *subset = spec.split(":")
    if not name or len(subset) > 1:
        raise InputError(f"data.source = {spec} is not a dataset: write hub:NAME or hub:NAME:SUBSET")

    def rows() -> Iterator[tuple[object, int, int]]:
        datasets = _module("datasets", "reading from the hub")
        done = 0
        try:
            for row in datasets.load_dataset(name, *subset, split="train", streaming=True):
                if text_field not in row:
                    raise InputError(f"{spec} has no column {text_field!r}: set data.text_field to one of {', '.join(row)}")
                text = row[text_field] if isinstance(row[text_field], str) else None
                done += len(text or "")
                yield text, len(text or ""), done
        except InputError:
            raise
        except Exception as error:  # of the network, the hub's client or the dataset's own files
            raise Interrupted(
                f"{spec} cannot be read from the hub ({_reason(error)}): check the name and the network and run the same"
                " command again, or give a local mirror's directory as data.source"
            ) from error

    return Source(lambda: _group(spec, rows()), total_bytes=0, fingerprint=_digest(spec), local=False)


# --- the standard library --------------------------------------------------------------------------------------------


def _stdlib(with_sources: bool) -> Source:
    texts = list(dict.fromkeys(_stdlib_texts(with_sources)))  # some modules are copies of others
    size = sum(map(len, texts))
    name = f"the standard library of Python {sys.version.split()[0]}"
    return Source(lambda: iter([Unit(name, 1, size, rows=texts)]), size, _digest("\0".join(texts)))


def _stdlib_texts(with_sources: bool) -> Iterator[str]:
    """One document a help topic and one a module: its source, or its documented names with signatures and docstrings."""
    from pydoc_data import topics

    for _, text in sorted(topics.topics.items()):
        yield text
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if _STDLIB_SKIPPED.intersection(parts) or file.name.startswith("_sysconfigdata") or parts[0] == "pydoc_data":
            continue  # tests and the like, settings of this machine's build, and the help topics once more
        try:
            source = file.read_text(encoding="utf-8")
            text = source if with_sources else _documentation(".".join(parts).removesuffix(".py"), source)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # some files are there to be broken
            continue
        if text.strip():
            yield text


def _documentation(module: str, source: str) -> str:
    """The docstrings of a module, each under the name and signature that it explains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    sections = [f"{module}\n\n{ast.get_docstring(tree)}"] if ast.get_docstring(tree) else []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            signature = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            sections.append(f"{node.name}{signature}\n\n{ast.get_docstring(node)}")
    return "\n\n\n".join(sections)
