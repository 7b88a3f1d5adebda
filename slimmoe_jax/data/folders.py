"""The files of a local source: which a directory holds, of which split each is, and a fingerprint of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from slimmoe_jax.config import InputError
from slimmoe_jax.data import reading

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
# Up to this size, over all files, the fingerprint is of everything; beyond, of each file's start, middle and end.
FINGERPRINT_BYTES = 2**30
_SAMPLE = 2**16
_NAMED = 5
_ENTRIES = 8  # how often one folder is entered, each time under another name: links between n folders make n! names

# The words by which the `datasets` library knows splits, delimited by anything but letters.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = "|".join(word for words in _SPLITS.values() for word in words)
_WHOLE = re.compile(rf"({_WORDS})\d*", re.IGNORECASE)
_PART = re.compile(rf"^({_WORDS})(?=[\d_]|$)|(?<=[\d_])({_WORDS})$", re.IGNORECASE)
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:\W.*)?")  # as the hub names them
_NUMBERS = re.compile(r"([-_. ]+(\d+|of(?=[-_. ]+\d)))+$")


class Kind(NamedTuple):
    form: str  # parquet, jsonl or txt
    packing: str  # gz, zst, or empty
    stem: str  # the name without these


def kind_of(name: str) -> Kind | None:
    """What a file holds, by the end of its name alone; None for what is not read."""
    lower = name.lower()
    for suffix in SUFFIXES:
        if lower.endswith(suffix):
            form, _, packing = suffix[1:].partition(".")
            return Kind(form, packing, name[: -len(suffix)])
    return None


def find(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files below a folder, of known and of other kinds, through links. Hidden ones are no part of the text.

    Raises:
      InputError: a link leads nowhere, or a folder cannot be read.
    """
    files = sorted(_walk(folder, (os.path.realpath(folder),), Counter()))
    known = [file for file in files if os.path.isfile(file) and kind_of(file.name)]
    kept = set(known)
    return known, [file for file in files if file not in kept]


def _walk(folder: Path, above: tuple[str, ...], entered: Counter[str]) -> Iterator[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise reading.unreadable(folder, error) from error
    for path in inside:
        if path.name.startswith("."):
            continue
        if os.path.islink(path) and not os.path.exists(path):
            raise InputError(f"{path} is a link to {os.readlink(path)}, which is not there: restore it or remove the link")
        if not os.path.isdir(path):
            yield path
            continue
        real = os.path.realpath(path)
        if real not in above and entered[real] < _ENTRIES:
            entered[real] += 1
            yield from _walk(path, (*above, real), entered)


def once(files: Sequence[Path]) -> list[Path]:
    """The files without those that a link gives another name to: the first name counts."""
    return list({os.path.realpath(file): file for file in reversed(files)}.values())[::-1]


# --- splits ----------------------------------------------------------------------------------------------------------


def split_of(name: PurePath) -> str | None:
    """The split that a file's name, relative to its source, tells: its own or that of a folder that it is in."""
    own, sure = _own_split(name)
    return own if sure else _folder_split(name) or _label(own)


def _folder_split(name: PurePath) -> str | None:
    return next((label for part in reversed(name.parts[:-1]) if (label := _label(part))), None)


def _stem(name: PurePath) -> str:
    kind = kind_of(name.name)
    return kind.stem if kind else name.name


def _own_split(name: PurePath) -> tuple[str, bool]:
    """A file's name without its numbers, and whether that is a split beyond doubt: of SPLIT-00000-of-00005, train, test1 ..."""
    if shard := _SHARD.fullmatch(_stem(name)):
        return shard[1], True
    stem = _NUMBERS.sub("", _stem(name))
    whole = _WHOLE.fullmatch(stem)
    return (whole[1], True) if whole else (stem, False)


def _label(name: str) -> str | None:
    """The word at a name's beginning or end that names a split: train of train-a, test_sft of chat-test_sft."""
    name = _NUMBERS.sub("", name)
    words = [re.match(r"\w+", name), re.search(r"\w+$", name)]
    return next((word[0] for word in words if word and _group(word[0])), None)


def _group(split: str | None) -> str | None:
    """train, validation or test, where a split's name begins or ends with a word for it."""
    found = _PART.search(split or "")
    word = (found[1] or found[2]).lower() if found else ""
    return next((group for group, words in _SPLITS.items() if word in words), None)


def _is_of(name: PurePath, split: str) -> bool:
    """Whether a file is of a split that is asked for by name."""
    own, sure = _own_split(name)
    if sure:
        return split in (own, _stem(name))
    if split in name.parts[:-1]:
        return True
    if folder := _folder_split(name):
        return folder == split
    within = re.search(rf"(?:^|\W){re.escape(split)}(?:_?\d+)*(?:\W|$)", _stem(name))
    return own == split or within is not None


def select(folder: Path, files: Sequence[Path], split: str) -> tuple[list[Path], tuple[str, ...]]:
    """The files of a split, and remarks on what a person may not expect.

    Args:
      split: its name; empty for the train split where the files fall into splits, as the hub has it, or else for all files.
    Raises:
      InputError: no file is of that split, or several splits could be meant.
    """
    names = {file: file.relative_to(folder) for file in files}
    if split:
        chosen = [file for file in files if _is_of(names[file], split)]
        if not chosen:
            raise InputError(f"data.split = {split} is not in {folder}, {_there(list(names.values()))}")
        return chosen, ()
    splits = {file: split_of(name) for file, name in names.items()}
    groups = {file: _group(own) for file, own in splits.items()}
    others = [file for file in files if groups[file] in ("validation", "test")]
    if not others or len(set(groups.values())) == 1:
        return list(files), ()
    train = sorted({own for file, own in splits.items() if own and groups[file] == "train"})
    if not train:
        also = f"also read: {_count(others)} named like other splits ({_listed(str(names[file]) for file in others)})"
        return list(files), (f"{also}; --data.split NAME reads one split alone",)
    if len(train) > 1 and "train" not in train:
        raise InputError(f"{folder} has the splits {', '.join(train)} and others: set data.split to one of them")
    one = "train" if "train" in train else train[0]
    rest = [file for file in files if splits[file] != one]
    left_out = f"left out: {_count(rest)} outside the {one} split ({_listed(str(names[file]) for file in rest)})"
    return [file for file in files if splits[file] == one], (f"{left_out}; --data.split NAME reads another",)


def _there(names: Sequence[PurePath]) -> str:
    splits = sorted({own for name in names if (own := split_of(name))})
    if splits:
        return f"which has {', '.join(splits)}: set data.split to one of them"
    files = f"whose files ({_listed(map(str, names))}) name no split"
    return f"{files}: leave data.split empty, name the files SPLIT-*, or put them into a folder SPLIT"


def _count(files: Sequence[Path]) -> str:
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"


def _listed(names: Iterator[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_NAMED]) + (", ..." if len(shown) > _NAMED else "")


# --- fingerprint -----------------------------------------------------------------------------------------------------


def fingerprint(names: Sequence[str], files: Sequence[Path]) -> str:
    """A sha256 of names, sizes and contents.

    Contents count as a whole where the files have up to FINGERPRINT_BYTES together, and else by the first, middle and last 64 KiB
    of each.

    Raises:
      InputError: a file cannot be read.
    """
    total = hashlib.sha256()
    try:
        sizes = [file.stat().st_size for file in files]
        whole = sum(sizes) <= FINGERPRINT_BYTES
        for name, size, file in zip(names, sizes, files, strict=True):
            total.update(json.dumps([name, size, _digest(file, size, whole)]).encode())
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): see to its permissions and its disk") from error
    return total.hexdigest()


def _digest(file: Path, size: int, whole: bool) -> str:
    with file.open("rb") as raw:
        if whole or size <= 3 * _SAMPLE:
            return hashlib.file_digest(raw, "sha256").hexdigest()
        digest = hashlib.sha256()
        for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
            raw.seek(start)
            digest.update(raw.read(_SAMPLE))
        return digest.hexdigest()
