"""Coverage-guided fuzzing of everything that reads a file, with atheris (libFuzzer).

    pip install atheris
    python tests/fuzz/run.py READER|all --seconds N [--work DIR]
    python tests/fuzz/run.py READER|all FILE...     # replays files, such as a crash
    python tests/fuzz/run.py --summary DIR          # what the runs with --work DIR found so far

A reader must succeed or raise InputError with one line. Anything else is a crash: another exception, 20 seconds, 2 GB of memory.
`all` gives each reader an equal share of the time, one after another. DIR (fuzz-work by default) gets, for each reader, the inputs
that reach new code, a log, and the inputs that crash it (crash-*, timeout-*, oom-*). A reader that crashes is started again for the
rest of its time.

corpus/READER holds a few small inputs to start from. Without atheris these are replayed, as `pytest tests/test_fuzz.py` does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimmoe_jax.config import DataConfig

CORPUS = Path(__file__).with_name("corpus")
_FOLDER = b"/FOLDER"  # in the corpus, for that in which a reader works
LIMITS = ("-timeout=20", "-rss_limit_mb=2048", "-detect_leaks=0", "-print_final_stats=1")
Attempt = Callable[[bytes], object]  # reads one input


# --- readers ---------------------------------------------------------------------------------------------------------
# Each is given a folder of its own and returns what reads an input. Imports are inside: each process instruments what it needs.


def _rows(folder: Path, suffix: str, form: str) -> Attempt:
    """A source of rows, each of them made into an example."""
    from slimmoe_jax.config import DataConfig
    from slimmoe_jax.data import prepare, tokenizers, units

    path = folder / f"rows.{suffix}"
    data = DataConfig(source=str(path), format=form, tokenizer="gpt2", context=32, max_row_bytes=2**20)
    tokenizer = tokenizers.load("gpt2")
    job = units.Job(data, "gpt2", tokenizer.fingerprint, folder, "uint16")

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        source = prepare.open_source(data)
        source.fingerprint  # noqa: B018
        for unit in source.units():
            summary = {"skipped": dict.fromkeys(units.REASONS, 0), "examples": []}
            for _, example in units._examples(job, unit, tokenizer, summary):
                assert len(example.tokens) == len(example.targets)
            json.dumps(summary)

    return attempt


def _config(folder: Path) -> Attempt:
    from slimmoe_jax import config, validation

    path = folder / "config.json"

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        validation.validate(config.load(path))

    return attempt


def _records(folder: Path) -> tuple[Path, dict]:
    """A folder of records, and its manifest."""
    import numpy as np

    from slimmoe_jax.data import records, tokenizers, units

    tokenizer, splits = tokenizers.load("gpt2"), {}
    for split in ("train", "validation"):
        path = folder / f"{split}-000000.npy"
        units.write_array(path, np.arange(3 * 9, dtype=np.uint16).reshape(3, 9))
        splits[split] = {"targets": 24, "bytes": 80, "files": [units.entry(path, 3)]}
    about = {"format": records.FORMAT, "context": 8, "record_length": 9, "channels": ["tokens"], "source": "x"}
    manifest = about | {"tokenizer": tokenizers.describe(tokenizer), "splits": splits}
    tokenizers.save(tokenizer, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder, manifest


def _read_records(folder: Path) -> None:
    import numpy as np

    from slimmoe_jax.data import records

    (folder / records.VERIFIED_FILE).unlink(missing_ok=True)
    opened = records.open_records(folder)
    opened.verify()
    opened.tokenizer()
    for name in ("train", "validation"):
        split = opened.split(name)
        split.batch(np.arange(len(split)))


def _manifest(folder: Path) -> Attempt:
    _records(folder)

    def attempt(content: bytes) -> None:
        (folder / "manifest.json").write_bytes(content)
        _read_records(folder)

    return attempt


def _npy(folder: Path) -> Attempt:
    """A file of records, whose sum the manifest has."""
    import hashlib

    _, manifest = _records(folder)
    entry = manifest["splits"]["train"]["files"][0]

    def attempt(content: bytes) -> None:
        (folder / entry["file"]).write_bytes(content)
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))
        _read_records(folder)

    return attempt


def _partial(folder: Path, name: str) -> Attempt:
    """A file of a preparation that was interrupted."""
    import shutil

    from slimmoe_jax.data import prepare

    data = _text(folder)
    settings = json.dumps(prepare._settings(data, prepare.open_source(data)))
    prepare.prepare(data, folder / "whole", workers=1)
    (folder / "whole" / "manifest.json").unlink()

    def attempt(content: bytes) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.rmtree(folder / "out.partial", ignore_errors=True)
        shutil.copytree(folder / "whole", folder / "out.partial")
        (folder / "out.partial" / "settings.json").write_text(settings)
        (folder / "out.partial" / name).write_bytes(content.replace(_FOLDER, bytes(folder)))
        prepare.summary_lines(prepare.prepare(data, folder / "out", workers=1), folder / "out")

    return attempt


def _prepared(folder: Path) -> Attempt:
    """The manifest of records that `prepare` finds and keeps."""
    from slimmoe_jax.data import prepare, records

    data = _text(folder)
    prepare.prepare(data, folder / "out", workers=1)

    def attempt(content: bytes) -> None:
        (folder / "out" / "manifest.json").write_bytes(content.replace(_FOLDER, bytes(folder)))
        opened = records.open_records(folder / "out")
        prepare.check_made_for(data, opened)
        prepare.summary_lines(opened.manifest, folder / "out")

    return attempt


def _text(folder: Path) -> DataConfig:
    """The config of a little text, in a file."""
    from slimmoe_jax.config import DataConfig

    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"some text, number {n}"}) + "\n" for n in range(80)))
    return DataConfig(source=str(folder / "text.jsonl"), tokenizer="gpt2", context=8, validation_fraction=0.3)


def _tokenizer_json(folder: Path) -> Attempt:
    from slimmoe_jax.data import tokenizers

    def attempt(content: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(content)
        tokenizers.saved(folder, 300)

    return attempt


def _tokenizer_model(folder: Path) -> Attempt:
    from slimmoe_jax.data import tokenizers

    path = folder / "tokenizer.model"

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        tokenizers.load(str(path)).encode("A few words, 12 numbers and \u00e9.")

    return attempt


def _hf_config(folder: Path) -> Attempt:
    from slimmoe_jax import convert, validation
    from slimmoe_jax.config import DataConfig, TrainConfig
    from slimmoe_jax.conversion import configs

    path = folder / "config.json"

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        model, context = configs.from_hf(convert._json(path), str(path))
        validation.validate(TrainConfig(model=model, data=DataConfig(context=context)))

    return attempt


def _hf_tokenizer(folder: Path) -> Attempt:
    from slimmoe_jax.conversion import tokenizer

    tokenizer._gpt2 = functools.cache(tokenizer._gpt2)  # which takes a second to make

    def attempt(content: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(content)
        tokenizer.read(folder)

    return attempt


def _safetensors(folder: Path) -> Attempt:
    from slimmoe_jax import convert

    def attempt(content: bytes) -> None:
        (folder / "model.safetensors").write_bytes(content)
        convert.read_tensors(folder)

    return attempt


def _training_file(folder: Path) -> Attempt:
    """What an exported folder keeps of its training, which makes a run of it again."""
    from slimmoe_jax import convert, validation
    from slimmoe_jax.config import ModelConfig
    from slimmoe_jax.data import tokenizers

    model, tokenizer = ModelConfig(), tokenizers.load("gpt2")
    path = folder / convert.TRAINING_FILE

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        kept = convert._json(path)
        config, _ = convert.training_config(model, 32, tokenizer, kept, folder, folder / "out")
        validation.validate(config)
        convert.router_state(model, {}, kept)

    return attempt


def _result(folder: Path) -> Attempt:
    """The measurements of a run, which a report shows."""
    from slimmoe_jax import report

    def attempt(content: bytes) -> None:
        (folder / "result.json").write_bytes(content)
        report._kept(folder / "result.json")

    return attempt


def _dump(folder: Path) -> Attempt:
    from slimmoe_jax import dump

    def attempt(content: bytes) -> None:
        (folder / "batch-3.npz").write_bytes(content)
        dump.read_batch(folder / "batch-3.npz")

    return attempt


def _arm(folder: Path) -> Attempt:
    from slimmoe_jax import config, validation
    from slimmoe_jax.study import arm

    def attempt(content: bytes) -> None:
        (folder / "arm.json").write_bytes(content)
        spec = arm.read_spec(folder)
        validation.validate(config.from_json(spec["config"], "arm.json"))

    return attempt


def _remembered(folder: Path) -> Attempt:
    from slimmoe_jax.data import loading

    def attempt(content: bytes) -> None:
        (folder / "records.json").write_bytes(content)
        loading._remembered(folder)

    return attempt


def _metrics(folder: Path) -> Attempt:
    from slimmoe_jax import metrics

    path = folder / "metrics.jsonl"

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        metrics.read_jsonl(path)
        metrics.last_row(path)

    return attempt


def _questions(folder: Path) -> Attempt:
    from slimmoe_jax import tasks

    path = folder / "questions.jsonl"

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        json.dumps(tasks.read(path).invalid)

    return attempt


READERS: dict[str, Callable[[Path], Attempt]] = {
    "text": lambda folder: _rows(folder, "jsonl", "text"),
    "chat": lambda folder: _rows(folder, "jsonl", "chat"),
    "multiple_choice": lambda folder: _rows(folder, "jsonl", "multiple_choice"),
    "txt": lambda folder: _rows(folder, "txt", "text"),
    "gz": lambda folder: _rows(folder, "jsonl.gz", "text"),
    "zst": lambda folder: _rows(folder, "jsonl.zst", "text"),
    "parquet": lambda folder: _rows(folder, "parquet", "text"),
    "parquet_chat": lambda folder: _rows(folder, "parquet", "chat"),
    "questions": _questions,
    "config": _config,
    "manifest": _manifest,
    "npy": _npy,
    "partial": lambda folder: _partial(folder, "unit-000000.json"),
    "partial_settings": lambda folder: _partial(folder, "settings.json"),
    "partial_manifest": lambda folder: _partial(folder, "manifest.json"),
    "prepared": _prepared,
    "tokenizer_json": _tokenizer_json,
    "tokenizer_model": _tokenizer_model,
    "hf_config": _hf_config,
    "hf_tokenizer": _hf_tokenizer,
    "safetensors": _safetensors,
    "training_file": _training_file,
    "dump": _dump,
    "result": _result,
    "arm": _arm,
    "remembered": _remembered,
    "metrics": _metrics,
}


# --- trying inputs ---------------------------------------------------------------------------------------------------


def checked(attempt: Attempt, content: bytes) -> bool:
    """Reads one input. Returns whether it was refused, which must take one line."""
    from slimmoe_jax.config import InputError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # remarks
            attempt(content)
    except InputError as error:
        message = str(error)
        assert message.strip() and len(message.splitlines()) == 1 and len(message) < 10_000, f"not one line: {message[:500]!r}"
        return True
    return False


def replay(reader: str, files: Sequence[Path] = ()) -> int:
    """Reads the files, or those of the reader's corpus. Returns how many there are."""
    files = files or sorted((CORPUS / reader).iterdir())
    with tempfile.TemporaryDirectory() as folder:
        attempt = READERS[reader](Path(folder))
        for file in files:
            try:
                checked(attempt, file.read_bytes())
            except Exception as error:
                error.add_note(f"reader {reader}, input {file}")
                raise
    return len(files)


def fuzz(reader: str, options: list[str]) -> None:
    """Has libFuzzer make inputs until its time is over. Does not return."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import atheris

    with atheris.instrument_imports(include=["slimmoe_jax"]):
        folder = tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        attempt = READERS[reader](Path(folder))
    atheris.Setup([sys.argv[0], *options], lambda content: checked(attempt, content) and None)
    atheris.Fuzz()


# --- many readers ----------------------------------------------------------------------------------------------------


def run(reader: str, seconds: float, work: Path) -> None:
    """Fuzzes one reader in processes of its own, of which each crash ends one."""
    found, log = work / reader / "corpus", work / reader / "log"
    found.mkdir(parents=True, exist_ok=True)
    longest = max(4096, 1024 + max(file.stat().st_size for file in (CORPUS / reader).iterdir()))
    until = time.monotonic() + seconds
    while (left := int(until - time.monotonic())) > 2:
        command = [
            sys.executable,
            __file__,
            "--worker",
            reader,
            str(found),
            str(CORPUS / reader),
            f"-max_total_time={left}",
            f"-max_len={longest}",
        ]
        with log.open("ab") as file:
            done = subprocess.run([*command, f"-artifact_prefix={work / reader}/", *LIMITS], stdout=file, stderr=file)
        if done.returncode == 0:
            return


def summary(work: Path) -> list[str]:
    """A line for each reader: inputs tried, code reached, inputs kept, crashes; and one for all."""
    lines, total, crashes = [], 0, 0
    for reader in READERS:
        log = work / reader / "log"
        if not log.exists():
            continue
        text = log.read_text(errors="replace")
        tried = sum(int(number) for number in re.findall(r"stat::number_of_executed_units: (\d+)", text))
        running = re.findall(r"^#(\d+)\s", text.rsplit("stat::peak_rss_mb", 1)[-1], re.MULTILINE)
        tried += int(running[-1]) if running else 0
        reached = [int(number) for number in re.findall(r"cov: (\d+)", text)]
        bad = [path for kind in ("crash", "timeout", "oom", "leak") for path in (work / reader).glob(f"{kind}-*")]
        kept = len(list((work / reader / "corpus").iterdir()))
        lines.append(f"{reader:16}{tried:>10,} inputs, {max(reached, default=0):>5} edges, {kept:>5} kept, {len(bad)} crashes")
        total, crashes = total + tried, crashes + len(bad)
    return [*lines, f"{'all':16}{total:>10,} inputs, {crashes} crashes"]


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--worker"]:
        fuzz(argv[1], list(argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", nargs="?", choices=[*READERS, "all"])
    parser.add_argument("files", nargs="*", type=Path, help="inputs to replay")
    parser.add_argument("--seconds", type=float, default=60, help="in all")
    parser.add_argument("--work", type=Path, default=Path("fuzz-work"))
    parser.add_argument("--summary", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    if args.summary:
        lines = summary(args.summary)
        print("\n".join(lines))
        return int(len(lines) == 1)  # nothing was fuzzed there
    if not args.reader:
        parser.error("give a reader, or all")
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds}: give more than 0")
    if missing := [str(file) for file in args.files if not file.is_file()]:
        parser.error(f"{missing[0]} is not a file")
    readers = list(READERS) if args.reader == "all" else [args.reader]
    if args.files or importlib.util.find_spec("atheris") is None:
        for reader in readers:
            print(f"{reader}: {replay(reader, args.files)} inputs replayed, none of them crashes")
        return 0
    for reader in readers:
        run(reader, args.seconds / len(readers), args.work)
    lines = summary(args.work)
    print("\n".join(lines))
    return int(not lines[-1].endswith(" 0 crashes"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
