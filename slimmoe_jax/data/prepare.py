"""Turns text, conversations or multiple-choice questions into fixed-length records of tokens.

`python -m slimmoe_jax.data.prepare --config configs/pretrain.py [--source SOURCE] [--out DIR] [--train-tokenizer N] [--workers N]`

The source is cut into units, which worker processes tokenize (see `units`). Each finished unit leaves its records and a
small JSON file in `DIR.partial`, written atomically; a run that was killed goes on from there. At the end what units left
over is joined into further records, the manifest is written, and the folder gets its name. The result does not depend on
the number of workers or on interruptions.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from slimmoe_jax import cli, config, files
from slimmoe_jax.config import DataConfig, InputError
from slimmoe_jax.data import packing, records, tokenizers, units
from slimmoe_jax.data import sources as sources_lib
from slimmoe_jax.data.reading import RowLimit
from slimmoe_jax.data.sources import FINGERPRINT_VERSION, Interrupted, Source
from slimmoe_jax.data.units import COUNTS, REASONS, SPLITS, Job
from slimmoe_jax.locking import LOCK_FILE, one_writer
from slimmoe_jax.progress import Meter, say, short, waiting
from slimmoe_jax.terminal import printable

_NAMED = 5  # bad rows and ignored files that are named
_TOKENIZER_TEXT = 32 * 2**20  # characters of text that a tokenizer is trained on, from the source's start


def open_source(data: DataConfig) -> Source:
    """The source that the config names, opened for its format."""
    limit = RowLimit(data.max_row_bytes, "split it into several, or raise the limit with --data.max-row-bytes")
    return sources_lib.open_source(data.source, units.field_of(data), data.split, data.format, limit)


def with_tokenizer(part: DataConfig, main: Path) -> DataConfig:
    """A mixed source takes the tokenizer that was trained for the records in `main`."""
    if not part.train_tokenizer:
        return part
    return dataclasses.replace(part, tokenizer=str(main / "tokenizer.model"), train_tokenizer=0)


def prepare(data: DataConfig, out: str | Path, workers: int = 0) -> dict[str, Any]:
    """Prepares `data.source` into the folder `out` and returns the manifest. Records that are there already are kept.

    Args:
      workers: processes; 0 takes one a core.
    Raises:
      InputError: nothing usable in the source, a damaged file, or a folder with other records.
    """
    out = Path(out)
    source = open_source(data)
    settings = _settings(data, source)
    if (out / "manifest.json").exists():
        manifest = records.open_records(out).manifest
        if manifest.get("settings") != settings:
            raise InputError(
                f"{out} holds other records ({_difference(manifest.get('settings'), settings)}): give another --out, or remove it"
            )
        return manifest
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and holds no records: give another --out, or remove it")
    folder = out.with_name(out.name + ".partial")
    resumed = folder.exists()
    try:
        with one_writer(folder, "data.prepare", "give another --out"):
            try:
                manifest = _prepare(data, source, settings, folder, workers or _cores())
            except InputError as error:
                worth_keeping = isinstance(error, Interrupted) and any(folder.glob("unit-??????.json"))
                if not resumed and not worth_keeping:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            (folder / LOCK_FILE).unlink()
            os.rename(folder, out)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}): see to the space and the permissions there") from error
    return manifest


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(data: DataConfig, source: Source, settings: dict[str, Any], folder: Path, workers: int) -> dict[str, Any]:
    """All of the work, in `folder`, from wherever an earlier run has left it."""
    _start(folder, settings)
    if not (folder / "manifest.json").exists():
        tokenizer = _tokenizer(data, source, folder)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        spec = "gpt2" if tokenizer.path is None else str(tokenizer.path)
        job = Job(data, spec, tokenizer.fingerprint, folder, dtype)
        _run_units(job, source, workers)
        files.write_json(folder / "manifest.json", _join(job, tokenizer, source, settings))
    manifest = records.open_records(folder).manifest
    for path in [*folder.glob("unit-*"), *folder.glob("*.tmp"), folder / "settings.json"]:
        path.unlink(missing_ok=True)
    return manifest


def _settings(data: DataConfig, source: Source) -> dict[str, Any]:
    """Everything that shapes the records."""
    tokenizer = data.tokenizer if data.train_tokenizer else tokenizers.load(data.tokenizer).fingerprint
    return {
        "source": data.source,
        "source_fingerprint": source.fingerprint,
        "format": data.format,
        "split": data.split,
        "choice_style": data.choice_style,
        "text_field": data.field,
        "tokenizer": tokenizer,
        "train_tokenizer": data.train_tokenizer,
        "context": data.context,
        "validation_fraction": data.validation_fraction,
        "min_characters": data.min_characters,
    }


def check_made_for(data: DataConfig, opened: records.Records) -> None:
    """Refuses records other than those that the config would be prepared to now, as far as can be told.

    A source that is here is compared by its text, so that it may go by another path; one that is not, by its name. Records of the
    user's own making are compared in the settings that they state.

    Raises:
      InputError: names what differs.
    """
    made = opened.manifest.get("settings")
    if not isinstance(made, dict):
        return
    asked = _asked(data, made, opened.fingerprint)
    if any(made.get(name) != value for name, value in asked.items()):
        raise InputError(
            f"{opened.directory} holds other records than the config asks for ({_difference(made, asked)}): remove it to prepare"
            " them again, or name another folder with --data.records"
        )


def _asked(data: DataConfig, made: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """The settings of this config that decide whether records made with `made` and a tokenizer of that fingerprint are its own."""
    asked: dict[str, Any] = {"format": data.format, "split": data.split}
    if data.format == "multiple_choice":
        asked["choice_style"] = data.choice_style
    shaping = {"text_field": data.field, "validation_fraction": data.validation_fraction}
    shaping |= {"min_characters": data.min_characters} if data.format == "text" else {}
    asked |= {name: value for name, value in shaping.items() if name in made}
    comparable = str(made.get("source_fingerprint")).startswith(FINGERPRINT_VERSION)
    if comparable and (data.source.startswith(("hub:", "stdlib")) or Path(data.source).expanduser().exists()):
        asked["source_fingerprint"] = open_source(data).fingerprint
    else:
        asked["source"] = data.source
    if data.train_tokenizer:
        asked |= {"train_tokenizer": data.train_tokenizer} if "train_tokenizer" in made else {}
    elif (fingerprint := tokenizers.load(data.tokenizer).fingerprint) != tokenizer:
        asked["tokenizer"] = fingerprint
    return asked


def _difference(old: Any, new: dict[str, Any]) -> str:
    """The first setting that differs, in words."""
    for name, value in new.items():
        before = old.get(name) if isinstance(old, dict) else None
        if before != value:
            if name == "source_fingerprint":
                known = str(before).startswith(FINGERPRINT_VERSION)
                return "the source has changed since" if known else "an earlier version, which knew less of the source, made them"
            if name == "tokenizer" and isinstance(before, str) and len(before) == len(value) == 64:  # sums of both
                return f"the tokenizer has changed since, from sha256 {before[:12]} to {value[:12]}"
            return f"data.{name} = {before}, not {value}"
    return "of another version of this program"


def _start(folder: Path, settings: dict[str, Any]) -> None:
    """Notes the settings in a new folder; refuses one that was begun with others."""
    for name in ("manifest.json", "settings.json"):
        if (folder / name).exists():
            try:
                kept = files.read_json(folder / name)
                kept = kept["settings"] if name == "manifest.json" else kept
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{folder / name} is damaged ({config.reason(error)}): remove {folder} to start over") from error
            if kept != settings:
                raise InputError(f"{folder} was begun otherwise ({_difference(kept, settings)}): remove it to start over")
            return
    if any(path.suffix != ".tmp" and path.name != LOCK_FILE for path in folder.iterdir()):
        raise InputError(f"{folder} is in the way, and not a preparation that was broken off: remove it, or give another --out")
    files.write_json(folder / "settings.json", settings)


def _tokenizer(data: DataConfig, source: Source, folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer, trained first if the config says so, kept in the folder."""
    if not data.train_tokenizer:
        tokenizer = tokenizers.load(data.tokenizer)
        tokenizers.save(tokenizer, folder)
        return tokenizer
    path = folder / "tokenizer.model"
    if not (folder / "tokenizer.json").exists():
        with waiting(f"training a vocabulary of {data.train_tokenizer:,} pieces"):
            tokenizers.train_sentencepiece(_first_texts(data, source), data.train_tokenizer, path)
        files.write_json(folder / "tokenizer.json", tokenizers.describe(tokenizers.SentencePiece(path)))
    return tokenizers.saved(folder)


def _first_texts(data: DataConfig, source: Source) -> Iterator[str]:
    left = _TOKENIZER_TEXT
    for unit in source.units():
        for _, value in sources_lib.rows(unit, units.field_of(data)):
            for text in _texts_in(value):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return


def _texts_in(value: Any) -> Iterator[str]:
    """The strings of a row, however deep; keys are no text."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_texts_in, value.values()))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_texts_in, value))


# --- units -----------------------------------------------------------------------------------------------------------


def _run_units(job: Job, source: Source, workers: int) -> None:
    """Has every unit done that is not done yet."""
    for path in units.remove_damaged(job):
        say(f"{path} or a file of its unit is damaged: that unit is prepared again")
    started, tokens = time.monotonic(), 0
    done = sum(summary["size"] for summary in units.summaries(job.folder))
    with Meter("prepare", source.total_bytes, done) as meter:
        for summary in _work(job, source, workers):
            done += summary["size"]
            tokens += sum(summary["tokens"].values())
            rate = tokens / max(time.monotonic() - started, 1e-9)
            meter.update(done, f"{short(tokens)} tokens, {short(rate)} tokens/s")


def _work(job: Job, source: Source, workers: int) -> Iterator[dict[str, Any]]:
    """The summaries of units as they get done, in any order."""
    missing = ((n, unit) for n, unit in enumerate(source.units()) if not units.summary_path(job.folder, n).exists())
    first = list(itertools.islice(missing, 2))
    todo = itertools.chain(first, missing)
    if workers == 1 or len(first) < 2:
        for number, unit in todo:
            yield units.process(job, number, unit)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        running: set[concurrent.futures.Future[dict[str, Any]]] = set()
        try:
            for number, unit in todo:
                running.add(pool.submit(units.process, job, number, unit))
                if len(running) > workers:  # few units in flight keep memory flat
                    done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in concurrent.futures.as_completed(running))
        except BrokenProcessPool as error:
            raise Interrupted(
                f"a worker process died, for want of memory perhaps: run the same command again with fewer --workers than"
                f" {workers}; it goes on from where it stopped"
            ) from error


def _start_worker() -> None:
    """A worker ends with its parent, even one killed by SIGKILL, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# --- the whole -------------------------------------------------------------------------------------------------------


def _join(job: Job, tokenizer: tokenizers.Tokenizer, source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes records of what units of text had left, and returns the manifest."""
    summaries, text = units.summaries(job.folder), job.data.format == "text"
    splits = {}
    for split in SPLITS:
        files = [summary["files"][split] for summary in summaries if split in summary["files"]]
        sums: dict[str, Any] = {key: sum(summary[key][split] for summary in summaries) for key in COUNTS}
        sums["leftover_tokens"] = _join_rest(job, split, len(summaries), files) if text else 0
        splits[split] = sums | {"records": sum(file["records"] for file in files), "files": files}
    examples = list(itertools.chain.from_iterable(summary["examples"] for summary in summaries))[:_NAMED]
    skipped = {reason: sum(summary["skipped"][reason] for summary in summaries) for reason in REASONS}
    _check_not_empty(job.data, splits, skipped, examples)
    return {
        "format": records.FORMAT,
        "source": job.data.source,
        "settings": settings,
        "context": job.data.context,
        "record_length": job.length,
        "channels": ["tokens"] if text else list(packing.CHANNELS),
        "dtype": job.dtype,
        "tokenizer": tokenizers.describe(tokenizer),
        "splits": splits,
        "skipped": skipped,
        "skipped_examples": examples,
        "ignored_files": list(source.ignored),
        "remarks": list(source.remarks),
        "cpu_seconds": round(sum(summary["cpu_seconds"] for summary in summaries), 3),
    }


def _join_rest(job: Job, split: str, count: int, files: list[dict[str, Any]]) -> int:
    """Adds to `files` one of the records that the units' remaining tokens make. Returns how many tokens are left of those."""
    rest = np.concatenate([np.empty(0, job.dtype), *(np.load(units.rest_path(job.folder, n, split)) for n in range(count))])
    rows = len(rest) // job.length
    if rows:
        path = job.folder / f"{split}-rest.npy"
        units.write_array(path, rest[: rows * job.length].reshape(rows, job.length))
        files.append(units.entry(path, rows))
    return len(rest) - rows * job.length


_NOUNS = {"text": "documents", "chat": "conversations", "multiple_choice": "questions"}


def _check_not_empty(data: DataConfig, splits: dict[str, Any], skipped: dict[str, int], examples: list[str]) -> None:
    lost, advice = _lost(data, splits, skipped)
    if not splits["train"]["documents"] + splits["validation"]["documents"]:
        what = {
            "text": f"document of at least {data.min_characters} characters under {data.field!r}",
            "chat": f"conversation of at most {data.context + 1} tokens under {units.named(units.field_of(data))}",
            "multiple_choice": f"multiple-choice question of at most {data.context + 1} tokens",
        }[data.format]
        why = "; ".join([lost, *examples[:3]]) if lost else "it is empty"
        raise InputError(f"data.source = {data.source} holds no {what} ({why}): {advice or 'check data.source'}")
    for split in SPLITS:
        if not splits[split]["records"]:
            ways = [_larger_fraction(data, splits) if split == "validation" else "lower data.validation_fraction"]
            ways = [advice, *ways] if advice else [*ways, "lower data.context"]
            raise InputError(
                f"the {split} split has {splits[split]['tokens']} tokens, less than one record of {data.context + 1}"
                f"{f' ({lost})' if lost else ''}: {', '.join(ways)}, or give more text"
            )


def _lost(data: DataConfig, splits: dict[str, Any], skipped: dict[str, int]) -> tuple[str, str]:
    """How many rows are left out for what reasons, and what to do about the reason that matters; empty where none does."""
    counts = {reason: skipped[reason] for reason in REASONS if skipped[reason]}
    if not counts:
        return "", ""
    words = {
        "near_empty": f"shorter than data.min_characters = {data.min_characters}",
        "invalid": "invalid",
        "too_long": f"longer than data.context + 1 = {data.context + 1} tokens",
    }
    ways = {
        "near_empty": "lower data.min_characters",
        "invalid": "check data.source, data.format and data.text_field",
        "too_long": "raise data.context",
    }
    rows = sum(counts.values()) + sum(splits[split]["documents"] for split in SPLITS)
    most = max(counts, key=counts.__getitem__)
    if 2 * counts[most] < rows:  # most rows are used: only a longer context would still help
        most = "too_long"
    lost = ", ".join(f"{count:,} {words[reason]}" for reason, count in counts.items())
    return f"of {rows:,} {_NOUNS[data.format]}, {lost}", ways[most] if most in counts else ""


def _larger_fraction(data: DataConfig, splits: dict[str, Any]) -> str:
    """Advice: a fraction that can be expected to hold out some five documents and five records."""
    tokens, documents = (sum(splits[split][key] for split in SPLITS) for key in ("tokens", "documents"))
    needed = max(5 * (data.context + 1) / tokens, 5 / documents, 2 * data.validation_fraction)
    return "raise data.validation_fraction" + (f" to {needed:.2g} or so" if needed < 0.5 else "")


def summary_lines(manifest: dict[str, Any], out: Path) -> list[str]:
    """What a person wants to know of prepared records.

    Raises:
      InputError: the manifest lacks a number, or has something else in its place.
    """
    try:
        return _summary_lines(manifest, out)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{out / 'manifest.json'} is damaged ({type(error).__name__}: {error}): restore it, or remove the folder and prepare"
            " the records again"
        ) from error


def _summary_lines(manifest: dict[str, Any], out: Path) -> list[str]:
    lines = []
    packed = "segments" in manifest["channels"]
    for name in SPLITS:
        split = manifest["splits"][name]
        places = split["records"] * manifest["record_length"]
        line = f"{name}: {split['documents']:,} {'examples' if packed else 'documents'}, {split['tokens']:,} tokens"
        line += f" in {split['records']:,} records of {manifest['record_length']}"
        if packed:
            line += f", {split['tokens'] / places:.1%} full, {split['targets']:,} tokens to be predicted"
        else:
            line += f", {split['bytes'] / split['tokens']:.2f} bytes a token, {split['leftover_tokens']} tokens left over"
        lines.append(line)
    skipped, ignored = manifest["skipped"], manifest["ignored_files"]
    cut = sum(manifest["splits"][name]["cut"] for name in SPLITS)
    if cut:
        lines.append(f"cut: {cut} conversations that were too long end with the last answer that fits")
    if any(skipped.values()):
        counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in skipped.items() if count)
        lines.append(f"left out: {counts} ({'; '.join(manifest['skipped_examples'])})")
    if ignored:
        lines.append(f"ignored: {len(ignored)} files of other kinds ({', '.join(ignored[:_NAMED])})")
    lines += manifest.get("remarks", [])  # which records of an earlier version do not have
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    lines.append(f"speed: {short(tokens / max(manifest['cpu_seconds'], 1e-9))} tokens/s a core")
    lines.append(f"records: {out}")
    return lines


_SHORT_FLAGS = {"--source": "--data.source", "--out": "--data.records", "--train-tokenizer": "--data.train-tokenizer"}


def main(argv: Sequence[str]) -> int:
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
    if (out / "manifest.json").exists():
        say(f"{out} is prepared already")
    try:
        manifest = prepare(whole.data, out, workers)
        print(printable("\n".join(summary_lines(manifest, out))))
        for _, part in config.mixed(whole.data):
            part = with_tokenizer(part, out)
            more = prepare(part, config.records_dir(part), workers)
            print(printable("\n".join(summary_lines(more, config.records_dir(part)))))
    except KeyboardInterrupt:
        say("stopped: the same command resumes from there")
        return 128 + signal.SIGINT
    vocabulary = manifest["tokenizer"]["vocab_size"]
    if vocabulary != whole.model.vocab_size:
        print(f"note: train on these records with --model.vocab-size {vocabulary} (it is {whole.model.vocab_size} in the config)")
    return 0


if __name__ == "__main__":
    cli.run(main)
