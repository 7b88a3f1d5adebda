"""Where text comes from: a hub dataset, local files of its layout, or the standard library of the Python that runs this.

A source is cut into units, each some 16 MB of text and small enough to pickle: raw lines, texts, or the name of a
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
_TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
_SUFFIXES = (".parquet", *_TEXT_SUFFIXES)
# Not the library itself, or not text that anyone would learn from.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work. Exactly one of lines, texts and row_groups is set."""

    file: str  # for messages
    first_row: int  # number of its first row in the file, from 1
    done: int  # bytes of the source read so far, this unit included
    lines: list[bytes] | None = None  # JSON objects
    texts: list[object] | None = None  # documents; an entry that is not a string is an invalid row
    row_groups: tuple[int, ...] | None = None  # of the parquet file `file`


@dataclasses.dataclass(frozen=True)
class Source:
    units: Callable[[], Iterator[Unit]]
    total_bytes: int  # on disk, what `Unit.done` runs up to; 0: unknown
    fingerprint: str  # changes when the text does, as far as names and sizes tell
    local: bool = True


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
    if not path.exists():
        raise InputError(f"data.source = {spec} does not exist: give hub:NAME[:SUBSET], a file, a directory or stdlib")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
    if not files or not files[0].name.endswith(_SUFFIXES):
        raise InputError(f"data.source = {spec} holds no text: files end in {', '.join(_SUFFIXES)}")
    sizes = [file.stat().st_size for file in files]
    names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
    return Source(
        units=lambda: _file_units(files, text_field),
        total_bytes=sum(sizes),
        fingerprint=_digest(json.dumps([names, sizes])),
    )


def documents(unit: Unit, text_field: str) -> Iterator[tuple[int, str | None]]:
    """The (row number, text) of each row of a unit; None for a row that is not a document.

    Raises:
      InputError: a damaged parquet file.
    """
    if unit.row_groups is not None:
        rows: Iterable[object] = _parquet_texts(unit, text_field)
    elif unit.lines is not None:
        rows = (_parse(line, text_field) for line in unit.lines)
    else:
        rows = unit.texts
    for number, text in enumerate(rows, start=unit.first_row):
        yield number, text if isinstance(text, str) and _is_unicode(text) else None


def _parse(line: bytes, text_field: str) -> object:
    try:
        return json.loads(line)[text_field]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _module(name: str, why: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{why} needs the package {name}: pip install {name}") from error


# --- files -----------------------------------------------------------------------------------------------------------


def _file_units(files: list[Path], text_field: str) -> Iterator[Unit]:
    before = 0
    for file in files:
        if file.name.endswith(".parquet"):
            units = _parquet_units(file, text_field)
        else:
            cut = _jsonl_units if ".jsonl" in file.name else _txt_units
            units = cut(file)
        for unit in units:
            yield dataclasses.replace(unit, done=before + unit.done)
        before += file.stat().st_size


def _parquet_units(file: Path, text_field: str) -> Iterator[Unit]:
    parquet = _open_parquet(file)
    columns = parquet.schema_arrow.names
    if text_field not in columns:
        raise InputError(f"{file} has no column {text_field!r}: set data.text_field to one of {', '.join(columns)}")
    groups, size, first_row, rows = [], 0, 1, 0
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        groups.append(number)
        rows += group.num_rows
        size += group.total_byte_size
        if size >= UNIT_BYTES or number == parquet.num_row_groups - 1:
            done = file.stat().st_size * (number + 1) // parquet.num_row_groups
            yield Unit(str(file), first_row, done, row_groups=tuple(groups))
            groups, size, first_row, rows = [], 0, first_row + rows, 0


def _parquet_texts(unit: Unit, text_field: str) -> list[object]:
    try:
        return _open_parquet(Path(unit.file)).read_row_groups(unit.row_groups, columns=[text_field])[text_field].to_pylist()
    except (OSError, ValueError) as error:
        raise _damaged(unit.file, error) from error


def _open_parquet(file: Path):
    parquet = _module("pyarrow.parquet", "reading parquet")
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _jsonl_units(file: Path) -> Iterator[Unit]:
    lines, size, first_row, done = [], 0, 1, 0
    for line, done in _lines(file):
        lines.append(line)
        size += len(line)
        if size >= UNIT_BYTES:
            yield Unit(str(file), first_row, done, lines=lines)
            lines, size, first_row = [], 0, first_row + len(lines)
    if lines:
        yield Unit(str(file), first_row, done, lines=lines)


def _txt_units(file: Path) -> Iterator[Unit]:
    """A text file is one document; a longer one than a unit is cut at a line's end, each part a document."""
    lines, size, first_row, done = [], 0, 1, 0

    def unit(done: int) -> Unit:
        try:
            text = b"\n".join(lines).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 ({error.reason} near line {first_row}): convert it") from error
        return Unit(str(file), first_row, done, texts=[text])

    for line, done in _lines(file):
        lines.append(line)
        size += len(line)
        if size >= UNIT_BYTES:
            yield unit(done)
            lines, size, first_row = [], 0, first_row + len(lines)
    if lines:
        yield unit(done)


def _lines(file: Path) -> Iterator[tuple[bytes, int]]:
    """Lines without their ends, and how many bytes of the file are read."""
    rest = b""
    for block, done in _blocks(file):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r"), done
    if rest:
        yield rest.removesuffix(b"\r"), file.stat().st_size


def _blocks(file: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks, and how many bytes of the file are read.

    Raises:
      InputError: the file is damaged or ends too early.
    """
    with file.open("rb") as raw:
        try:
            if file.name.endswith(".zst"):
                yield from _zstd_blocks(raw)
            else:
                stream = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
                while block := stream.read(_BLOCK):
                    yield block, raw.tell()
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


def _damaged(file: Path | str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    return InputError(f"{file} is damaged ({reason}): fetch or write it again")


# --- hub -------------------------------------------------------------------------------------------------------------


def _hub(spec: str, text_field: str) -> Source:
    _, name, *subset = spec.split(":")

    def units() -> Iterator[Unit]:
        datasets = _module("datasets", "reading from the hub")
        texts, size, first_row = [], 0, 1
        try:
            for row in datasets.load_dataset(name, *subset, split="train", streaming=True):
                if text_field not in row:
                    raise InputError(f"{spec} has no column {text_field!r}: set data.text_field to one of {', '.join(row)}")
                texts.append(row[text_field])
                size += len(row[text_field]) if isinstance(row[text_field], str) else 0
                if size >= UNIT_BYTES:
                    yield Unit(spec, first_row, 0, texts=texts)
                    texts, size, first_row = [], 0, first_row + len(texts)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise InputError(
                f"{spec} cannot be read from the hub ({reason}): check the name and the network, or give a local mirror's"
                " directory as data.source"
            ) from error
        if texts:
            yield Unit(spec, first_row, 0, texts=texts)

    return Source(units, total_bytes=0, fingerprint=_digest(spec), local=False)


# --- the standard library --------------------------------------------------------------------------------------------


def _stdlib(with_sources: bool) -> Source:
    texts = list(_stdlib_texts(with_sources))
    size = sum(map(len, texts))
    name = f"the standard library of Python {sys.version.split()[0]}"
    return Source(lambda: iter([Unit(name, 1, size, texts=texts)]), size, _digest("\0".join(texts)))


def _stdlib_texts(with_sources: bool) -> Iterator[str]:
    """One document a help topic and one a module: its source, or its documented names with signatures and docstrings."""
    from pydoc_data import topics

    for _, text in sorted(topics.topics.items()):
        yield text
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if _STDLIB_SKIPPED.intersection(parts):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            text = source if with_sources else _documentation(".".join(parts).removesuffix(".py"), source)
        except (UnicodeDecodeError, SyntaxError, RecursionError, MemoryError):  # some files are there to be broken
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
