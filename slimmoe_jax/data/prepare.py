"""Turns text into fixed-length records of tokens.

`python -m slimmoe_jax.data.prepare --config configs/pretrain.py [--source SOURCE] [--out DIR] [--train-tokenizer N] [--workers N]`

The source is cut into units, which worker processes tokenize. Each finished unit leaves its records and a small JSON
file in `DIR.partial`, written atomically; a run that was killed goes on from there. At the end what units left over is
joined into further records, the manifest is written, and the folder gets its name. The result does not depend on the
number of workers or on interruptions.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from slimmoe_jax import cli, config
from slimmoe_jax.config import DataConfig, InputError
from slimmoe_jax.data import records, tokenizers
from slimmoe_jax.data import sources as sources_lib
from slimmoe_jax.data.sources import Source, Unit
from slimmoe_jax.progress import Meter, short

SPLITS = ("train", "validation")
_EXAMPLES = 5  # bad rows that are named
_TOKENIZER_TEXT = 32 * 2**20  # bytes of text that a tokenizer is trained on, from the source's start


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a worker needs to know."""

    data: DataConfig
    tokenizer: str  # for tokenizers.load
    folder: Path
    dtype: str


def prepare(data: DataConfig, out: str | Path, workers: int = 0) -> dict[str, Any]:
    """Prepares `data.source` into the folder `out` and returns the manifest. Records that are there already are kept.

    Args:
      workers: processes; 0 takes one a core.
    Raises:
      InputError: nothing usable in the source, a damaged file, or a folder with other records.
    """
    out = Path(out)
    source = sources_lib.open_source(data.source, data.text_field)
    settings = _settings(data, source)
    if (out / "manifest.json").exists():
        manifest = records.open_records(out).manifest
        if manifest["settings"] != settings:
            raise InputError(f"{out} holds records of another source or other settings: give another --out, or remove it")
        return manifest
    if out.exists():
        raise InputError(f"{out} exists and holds no records: give another --out, or remove it")
    folder = out.with_name(out.name + ".partial")
    resumed = folder.exists()
    try:
        _start(folder, settings, resumed)
        tokenizer = _tokenizer(data, source, folder)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        job = _Job(data, "gpt2" if tokenizer.path is None else str(tokenizer.path), folder, dtype)
        seconds = _run_units(job, source, workers or os.cpu_count() or 1)
        manifest = _finish(job, tokenizer, settings, seconds)
    except InputError:
        if not resumed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    os.rename(folder, out)
    return manifest


def _settings(data: DataConfig, source: Source) -> dict[str, Any]:
    """Everything that shapes the records."""
    tokenizer = data.tokenizer if data.train_tokenizer else tokenizers.load(data.tokenizer).fingerprint
    return {
        "source": data.source,
        "source_fingerprint": source.fingerprint,
        "text_field": data.text_field,
        "tokenizer": tokenizer,
        "train_tokenizer": data.train_tokenizer,
        "context": data.context,
        "validation_fraction": data.validation_fraction,
        "min_characters": data.min_characters,
    }


def _start(folder: Path, settings: dict[str, Any], resumed: bool) -> None:
    path = folder / "settings.json"
    if resumed:
        if not path.exists() or json.loads(path.read_text()) != settings:
            raise InputError(f"{folder} is left from other settings or another source: remove it to start over")
        return
    folder.mkdir(parents=True)
    _write_json(path, settings)


def _tokenizer(data: DataConfig, source: Source, folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer, trained first if the config says so, kept in the folder."""
    if not data.train_tokenizer:
        tokenizer = tokenizers.load(data.tokenizer)
        tokenizers.save(tokenizer, folder)
        return tokenizer
    path = folder / "tokenizer.model"
    if not (folder / "tokenizer.json").exists():
        tokenizers.train_sentencepiece(_first_texts(data, source), data.train_tokenizer, path)
        tokenizer = tokenizers.SentencePiece(path)
        _write_json(folder / "tokenizer.json", tokenizers.describe(tokenizer))
    return tokenizers.saved(folder)


def _first_texts(data: DataConfig, source: Source) -> Iterator[str]:
    left = _TOKENIZER_TEXT
    for unit in source.units():
        for _, text in sources_lib.documents(unit, data.text_field):
            if text:
                yield text
                left -= len(text)
            if left < 0:
                return


# --- units -----------------------------------------------------------------------------------------------------------


def _run_units(job: _Job, source: Source, workers: int) -> float:
    """Has every unit done that is not done yet. Returns the seconds it took."""
    started = time.monotonic()
    tokens = 0
    with Meter("prepare", source.total_bytes) as meter:
        for unit, summary in _done_units(job, source, workers):
            tokens += sum(summary["tokens"].values())
            rate = tokens / max(time.monotonic() - started, 1e-9)
            meter.update(unit.done, f"{short(tokens)} tokens, {short(rate)} tokens/s")
    return time.monotonic() - started


def _done_units(job: _Job, source: Source, workers: int) -> Iterator[tuple[Unit, dict[str, Any]]]:
    todo = ((n, unit) for n, unit in enumerate(source.units()) if not _summary_path(job.folder, n).exists())
    if workers == 1 or not source.total_bytes > sources_lib.UNIT_BYTES // 4 and source.local:
        for number, unit in todo:
            yield unit, _tokenize_unit(job, number, unit)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        running: dict[concurrent.futures.Future, Unit] = {}
        try:
            for number, unit in todo:
                running[pool.submit(_tokenize_unit, job, number, unit)] = unit
                if len(running) > workers:  # few units in flight keep memory flat
                    yield from _collect(running, concurrent.futures.FIRST_COMPLETED)
            yield from _collect(running, concurrent.futures.ALL_COMPLETED)
        except BrokenProcessPool as error:
            raise InputError(
                f"a worker process died, for want of memory perhaps: run the same command again with fewer --workers than"
                f" {workers}; it goes on from where it stopped"
            ) from error


def _collect(running: dict[concurrent.futures.Future, Unit], when: str) -> Iterator[tuple[Unit, dict[str, Any]]]:
    for future in concurrent.futures.wait(running, return_when=when).done:
        yield running.pop(future), future.result()


def _summary_path(folder: Path, number: int) -> Path:
    return folder / f"unit-{number:06}.json"


@functools.cache
def _loaded(spec: str) -> tokenizers.Tokenizer:
    return tokenizers.load(spec)


def _tokenize_unit(job: _Job, number: int, unit: Unit) -> dict[str, Any]:
    """Tokenizes one unit. Leaves its training records, its left-over and validation tokens, and last a summary."""
    tokenizer, length = _loaded(job.tokenizer), job.data.context + 1
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    summary: dict[str, Any] = {key: dict.fromkeys(SPLITS, 0) for key in ("documents", "tokens", "bytes")}
    skipped, examples = {"near_empty": 0, "invalid": 0}, []
    for row, text in sources_lib.documents(unit, job.data.text_field):
        if text is None or len(text.strip()) < job.data.min_characters:
            reason = "invalid" if text is None else "near_empty"
            skipped[reason] += 1
            examples.append(f"{Path(unit.file).name} row {row}: {reason}")
            continue
        encoded = text.encode()
        split = "validation" if _is_held_out(encoded, job.data.validation_fraction) else "train"
        ids = np.array([*tokenizer.encode(text), tokenizer.end_token], job.dtype)
        parts[split].append(ids)
        summary["documents"][split] += 1
        summary["tokens"][split] += len(ids)
        summary["bytes"][split] += len(encoded)
    train, held_out = (np.concatenate([np.empty(0, job.dtype), *parts[split]]) for split in SPLITS)
    whole = len(train) // length * length
    summary |= {"records": whole // length, "sha256": None, "skipped": skipped, "examples": examples[:_EXAMPLES]}
    if whole:
        path = job.folder / f"train-{number:06}.npy"
        _write_array(path, train[:whole].reshape(-1, length))
        summary["sha256"] = records.sha256(path)
    _write_array(job.folder / f"unit-{number:06}.train-rest.npy", train[whole:])
    _write_array(job.folder / f"unit-{number:06}.validation.npy", held_out)
    _write_json(_summary_path(job.folder, number), summary)
    return summary


def _is_held_out(text: bytes, fraction: float) -> bool:
    """Decided by the document's text alone, so that copies of a document fall on the same side."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < fraction * 2**64


def _write_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)


def _write_json(path: Path, tree: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=2) + "\n")
    os.replace(temporary, path)


# --- the whole -------------------------------------------------------------------------------------------------------


def _finish(job: _Job, tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Joins the units' left-overs into records, writes the manifest and removes what only the units needed."""
    numbers = sorted(int(path.stem.removeprefix("unit-")) for path in job.folder.glob("unit-??????.json"))
    summaries = [json.loads(_summary_path(job.folder, number).read_text()) for number in numbers]
    files: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for number, summary in zip(numbers, summaries, strict=True):
        if summary["records"]:
            entry = {"file": f"train-{number:06}.npy", "records": summary["records"], "sha256": summary["sha256"]}
            files["train"].append(entry)
    left_over = {}
    for split, kind, name in (
        ("train", "train-rest", "train-rest.npy"),
        ("validation", "validation", "validation.npy"),
    ):
        pieces = [np.load(job.folder / f"unit-{number:06}.{kind}.npy") for number in numbers]
        tokens = np.concatenate([np.empty(0, job.dtype), *pieces])
        rows = len(tokens) // (job.data.context + 1)
        left_over[split] = len(tokens) - rows * (job.data.context + 1)
        if rows:
            _write_array(job.folder / name, tokens[: len(tokens) - left_over[split]].reshape(rows, -1))
            files[split].append({"file": name, "records": rows, "sha256": records.sha256(job.folder / name)})
    splits = {}
    for split in SPLITS:
        sums = {key: sum(summary[key][split] for summary in summaries) for key in ("documents", "tokens", "bytes")}
        count = sum(file["records"] for file in files[split])
        splits[split] = sums | {"records": count, "leftover_tokens": left_over[split], "files": files[split]}
    _check_not_empty(job.data, splits, summaries)
    manifest = {
        "format": records.FORMAT,
        "source": job.data.source,
        "settings": settings,
        "context": job.data.context,
        "record_length": job.data.context + 1,
        "tokenizer": tokenizers.describe(tokenizer),
        "splits": splits,
        "skipped": {key: sum(summary["skipped"][key] for summary in summaries) for key in ("near_empty", "invalid")},
        "skipped_examples": [row for summary in summaries for row in summary["examples"]][:_EXAMPLES],
        "seconds": round(seconds, 3),
    }
    for path in [*job.folder.glob("unit-*"), job.folder / "settings.json"]:
        path.unlink()
    _write_json(job.folder / "manifest.json", manifest)
    return manifest


def _check_not_empty(data: DataConfig, splits: dict[str, Any], summaries: list[dict[str, Any]]) -> None:
    if not splits["train"]["documents"] + splits["validation"]["documents"]:
        bad = [row for summary in summaries for row in summary["examples"]][:3]
        raise InputError(
            f"data.source = {data.source} holds no document of at least {data.min_characters} characters under"
            f" {data.text_field!r} ({'; '.join(bad) or 'it is empty'}): check data.source and data.text_field"
        )
    for split in SPLITS:
        if not splits[split]["records"]:
            direction = "raise" if split == "validation" else "lower"
            raise InputError(
                f"the {split} split has {splits[split]['tokens']} tokens, less than one record of {data.context + 1}:"
                f" {direction} data.validation_fraction, lower data.context, or give more text"
            )


def summary_lines(manifest: dict[str, Any], out: Path) -> list[str]:
    """What a person wants to know of prepared records."""
    lines = []
    for name in SPLITS:
        split = manifest["splits"][name]
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens in {split['records']:,} records of"
            f" {manifest['record_length']}, {split['bytes'] / split['tokens']:.2f} bytes a token,"
            f" {split['leftover_tokens']} tokens left over"
        )
    skipped = manifest["skipped"]
    if any(skipped.values()):
        examples = "; ".join(manifest["skipped_examples"])
        lines.append(f"left out: {skipped['near_empty']} near-empty and {skipped['invalid']} invalid rows ({examples})")
    lines.append(f"records: {out}")
    return lines


_SHORT_FLAGS = {"--source": "--data.source", "--out": "--data.records", "--train-tokenizer": "--data.train-tokenizer"}


def main(argv: Sequence[str]) -> None:
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    workers = 0
    if "--workers" in argv:
        at = argv.index("--workers")
        if at + 1 == len(argv) or not argv[at + 1].isdigit():
            raise InputError("--workers needs a number of processes; 0 takes one a core")
        workers = int(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
    if "--train-tokenizer" in argv and "--data.tokenizer" not in argv:
        argv += ["--data.tokenizer", "sentencepiece"]
    whole = cli.train_config(
        [_SHORT_FLAGS.get(word, word) for word in argv],
        prog="data.prepare",
        description="Text to fixed-length records. Short for data.source, data.records and data.train-tokenizer: --source,"
        " --out, --train-tokenizer; --workers N sets the processes (0: one a core).",
    )
    out = config.records_dir(whole.data)
    manifest = prepare(whole.data, out, workers)
    print("\n".join(summary_lines(manifest, out)))


if __name__ == "__main__":
    cli.run(main)
