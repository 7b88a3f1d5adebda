"""One unit of a source becomes files of records: what a worker process of `prepare` does.

Text is one stream of documents, cut into records without regard to where they end; what is left at a unit's end is kept for the
whole to join. Conversations and questions are packed (see `packing`). Every row that is not used is counted by its reason.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slimmoe_jax import config as config_lib
from slimmoe_jax import files
from slimmoe_jax.config import DataConfig
from slimmoe_jax.data import chat, multiple_choice, packing, records, tokenizers
from slimmoe_jax.data import sources as sources_lib
from slimmoe_jax.data.chat import Encoded
from slimmoe_jax.data.reading import Field, Unit

SPLITS = ("train", "validation")
REASONS = ("near_empty", "invalid", "too_long")  # why a row is left out
COUNTS = ("documents", "tokens", "targets", "bytes", "cut")  # what is summed in each split
_EXAMPLES = 5  # bad rows that are named


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    data: DataConfig
    tokenizer: str  # for tokenizers.load
    fingerprint: str  # of that tokenizer
    folder: Path
    dtype: str

    @property
    def length(self) -> int:
        """Tokens in a record."""
        return self.data.context + 1


class Unused(Exception):
    """A row that makes no example, and why: one of REASONS, and in words."""

    def __init__(self, reason: str, words: str = ""):
        super().__init__(reason)
        self.reason, self.words = reason, words


def process(job: Job, number: int, unit: Unit) -> dict[str, Any]:
    """Turns a unit into records in the job's folder, and returns its summary, which is written last."""
    started = time.process_time()
    tokenizer = _loaded(job.tokenizer, job.fingerprint)
    summary: dict[str, Any] = {key: dict.fromkeys(SPLITS, 0) for key in COUNTS}
    summary |= {"skipped": dict.fromkeys(REASONS, 0), "examples": [], "files": {}, "size": unit.size}
    examples: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
    for split, example in _examples(job, unit, tokenizer, summary):
        examples[split].append(example)
        made = (1, len(example.tokens), int(np.sum(example.targets)), example.target_bytes, int(example.cut))
        for key, value in zip(COUNTS, made, strict=True):
            summary[key][split] += value
    for split in SPLITS:
        if job.data.format == "text":
            stream = np.concatenate([np.empty(0, job.dtype), *(example.tokens for example in examples.pop(split))])
            rows = len(stream) // job.length
            write_array(rest_path(job.folder, number, split), stream[rows * job.length :])
            records = stream[: rows * job.length].reshape(rows, job.length)
        else:
            records = packing.pack(examples.pop(split), job.length, job.dtype)
        if len(records):
            path = job.folder / f"{split}-{number:06}.npy"
            write_array(path, records)
            summary["files"][split] = entry(path, len(records))
    summary["cpu_seconds"] = time.process_time() - started
    files.write_json(summary_path(job.folder, number), summary)
    return summary


def field_of(data: DataConfig) -> Field:
    """The column or key that is read: the one that the config names, and no other, or else the format's own."""
    return chat.COLUMNS if data.format == "chat" and not data.text_field else data.field


def named(field: Field) -> str:
    """A field in words."""
    return "the whole row" if field is None else " or ".join(map(repr, (field,) if isinstance(field, str) else field))


@functools.cache
def _loaded(spec: str, fingerprint: str) -> tokenizers.Tokenizer:
    return tokenizers.load(spec)


def _examples(job: Job, unit: Unit, tokenizer: tokenizers.Tokenizer, summary: dict[str, Any]) -> Iterator[tuple[str, Encoded]]:
    """The split and example of each row that makes one; the others are counted in the summary."""
    encode = {"text": _document, "chat": _conversation, "multiple_choice": _question}[job.data.format]
    for row, value in sources_lib.rows(unit, field_of(job.data)):
        try:
            key, example = encode(value, job, tokenizer)
        except Unused as error:
            summary["skipped"][error.reason] += 1
            if len(summary["examples"]) < _EXAMPLES:
                words = f" ({error.words})" if error.words else ""
                summary["examples"].append(f"{Path(unit.file).name} row {row}: {error.reason.replace('_', ' ')}{words}")
            continue
        # Arrays take a tenth of the memory of lists, and a unit's examples are all held at once.
        example = example._replace(tokens=np.array(example.tokens, job.dtype), targets=np.array(example.targets, bool))
        yield "validation" if is_held_out(key, job.data.validation_fraction) else "train", example


def _document(value: Any, job: Job, tokenizer: tokenizers.Tokenizer) -> tuple[bytes, Encoded]:
    """The text of a document and its tokens, all of them to be predicted."""
    if not isinstance(value, str):
        found = "" if value is None else f", but {type(value).__name__}"
        raise Unused("invalid", f"no text under {job.data.field!r}{found}")
    if len(value.strip()) < job.data.min_characters:
        raise Unused("near_empty")
    text = _utf8(value)
    ids = [*tokenizer.encode(value), tokenizer.end_token]
    return text, Encoded(ids, [True] * len(ids), len(text))


def _conversation(value: Any, job: Job, tokenizer: tokenizers.Tokenizer) -> tuple[bytes, Encoded]:
    if value is None:
        raise Unused("invalid", f"nothing under {named(field_of(job.data))}")
    try:
        turns = chat.turns_of(value)
    except ValueError as error:
        raise Unused("invalid", str(error)) from None
    key = _utf8(json.dumps(turns, ensure_ascii=False))
    if not any(turn.role == "assistant" for turn in turns):
        raise Unused("invalid", "no assistant message")
    return key, _fitting(chat.encode(turns, tokenizer, job.length))


def _question(value: Any, job: Job, tokenizer: tokenizers.Tokenizer) -> tuple[bytes, Encoded]:
    try:
        question = multiple_choice.parse(value)
    except ValueError as error:
        raise Unused("invalid", str(error)) from None
    return question_key(question), _fitting(multiple_choice.encode(question, tokenizer, job.length, job.data.choice_style))


def question_key(question: multiple_choice.Question) -> bytes:
    """What decides whether a question is held out."""
    return _utf8(json.dumps([question.query, question.choices], ensure_ascii=False))


def _fitting(example: Encoded | None) -> Encoded:
    if example is None:
        raise Unused("too_long")
    return example


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Unused("invalid", "not Unicode") from None


def is_held_out(key: bytes, fraction: float) -> bool:
    """Decided by the text alone, so that copies of a document fall on the same side."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < fraction * 2**64


# --- files of a unit -------------------------------------------------------------------------------------------------


def summary_path(folder: Path, number: int) -> Path:
    return folder / f"unit-{number:06}.json"


def summaries(folder: Path) -> list[dict[str, Any]]:
    """The summaries of the finished units, in order."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("unit-??????.json"))]


def remove_damaged(job: Job) -> list[Path]:
    """Removes the summaries of units whose files are not whole, so that these units are done again. Returns what it removed."""
    removed = []
    for path in sorted(job.folder.glob("unit-??????.json")):
        try:
            _check_whole(job, path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            path.unlink()
            removed.append(path)
    return removed


def _check_whole(job: Job, path: Path) -> None:
    """Raises one of several errors where a summary, or a file that it names, is damaged or missing."""
    summary = files.read_json(path)
    numbers = [summary[key][split] for key in COUNTS for split in SPLITS] + [summary["skipped"][reason] for reason in REASONS]
    entries = summary["files"].values()
    numbers += [summary["size"], summary["cpu_seconds"], *(entry["records"] for entry in entries)]
    names = [entry["file"] for entry in entries]
    texts = [*names, *summary["examples"], *(entry["sha256"] for entry in entries)]
    if not all(type(n) in (int, float) and n >= 0 for n in numbers) or not all(isinstance(text, str) for text in texts):
        raise TypeError("a number or text is something else")
    if not set(summary["files"]) <= set(SPLITS) or any(Path(name).name != name for name in names):
        raise ValueError("it names other files than its own")
    for name in names:
        read_array(job.folder / name)
    for split in SPLITS if job.data.format == "text" else ():
        read_array(rest_path(job.folder, int(path.stem.removeprefix("unit-")), split))


def read_array(path: Path) -> np.ndarray:
    """An array of a .npy file, mapped into memory.

    Raises:
      OSError, ValueError: it is missing or damaged.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as Python: TokenError, SyntaxError and others
        raise ValueError(config_lib.reason(error)) from error
    return array


def rest_path(folder: Path, number: int, split: str) -> Path:
    """Where a unit of text keeps the tokens that fill no record."""
    return folder / f"unit-{number:06}.{split}.npy"


def entry(path: Path, rows: int) -> dict[str, Any]:
    """A file of records as the manifest lists it."""
    return {"file": path.name, "records": rows, "sha256": records.sha256(path)}


def write_array(path: Path, array: np.ndarray) -> None:
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
