"""Speed and memory of the data pipeline alone: tokenizing, reading records, and preparing inputs of growing size.

    python benchmarks/data.py [--source SOURCE] [--megabytes 128] [--characters 16]

The text is the standard library's unless a source is given, so that it runs anywhere. The peer is what people usually do: the
Rust library `tokenizers`, its GPT-2 rebuilt from our ranks, in `datasets.map(batched=True)` over documents in memory, batches of
1,000, one process, one thread; the tokens of a sample of documents must be equal on both sides, or there is no table. Encoding
sides take turns, three passes each, and the best counts. "A core" is tokens a second of processor time, of all processes
together; the last column is that figure over the peer's. `prepare` does more than the peer (it reads JSON, splits, packs, writes
records and their sums), on the same documents repeated, and its start-up counts. Needs `tokenizers`. Takes some three minutes on
two cores.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from common import header, machine, row

from slimmoe_jax.conversion import tokenizer as conversion
from slimmoe_jax.data import records, sources, tokenizers

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core against a core; read when it is first used

CONTEXT, BATCH = 2_048, 32
READ_SECONDS = 3.0
PREPARE = ((1, 1), (1, 2), (2, 2), (4, 2))  # (times --megabytes, workers)
READERS = (0, 2)  # worker processes; 0 reads in threads
PASSES = 3
SAMPLE = 500  # documents whose tokens are compared
OURS, FAST, PEER = "GPT-2 encoding alone", "`tokenizers` alone", "`tokenizers` in `datasets.map`"

Encode = Callable[[list[str]], Sequence[list[int]]]


class Rate(NamedTuple):
    """Tokens a second."""

    core: float  # of processor time
    wall: float

    def cells(self, name: str, peer: float, more: str = "") -> str:
        figure = f"{self.core / 1e6:.2f}M tokens/s a core, {self.wall / 1e6:.2f}M in all{more}"
        return row([name, figure, f"{self.core / peer:.2f}"])


def documents(source: str, characters: int) -> list[str]:
    """The source's first documents, up to so many characters."""
    found, left = [], characters
    for unit in sources.open_source(source, "text").units():
        for _, text in sources.documents(unit, "text"):
            if text:
                found.append(text)
                left -= len(text)
            if left <= 0:
                return found
    return found


def encoders() -> dict[str, Encode]:
    """Texts -> tokens, by side."""
    import datasets  # here, after `preparing`: a process starts out with its parent's peak of memory as its own
    import tokenizers as rust

    datasets.disable_progress_bars()
    ours = tokenizers.load("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        conversion.write(ours, CONTEXT, Path(folder))
        fast = rust.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    fast.encode_special_tokens = True  # text that spells <|endoftext|> is text, as it is for ours

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in fast.encode_batch(texts)]

    def mapped(texts: list[str]) -> Sequence[list[int]]:
        rows = datasets.Dataset.from_dict({"text": texts})
        options = dict(batched=True, batch_size=1_000, remove_columns=["text"], load_from_cache_file=False)
        return rows.map(lambda batch: {"tokens": encode(batch["text"])}, **options)["tokens"]

    return {OURS: ours.encode_batch, FAST: encode, PEER: mapped}


def check_equal(sides: dict[str, Encode], texts: list[str]) -> None:
    """Stops the program where a side's tokens differ from ours."""
    sample = texts[:: max(1, len(texts) // SAMPLE)]
    expected = sides[OURS](sample)
    for name, side in sides.items():
        for number, (found, ours) in enumerate(zip(side(sample), expected, strict=True)):
            if list(found) != ours:
                raise SystemExit(f"{name}: the tokens of document {number} of the sample differ from ours")


def tokenizing(sides: dict[str, Encode], texts: list[str]) -> dict[str, Rate]:
    """The best of each side's passes, the sides taking turns."""
    total = sum(map(len, sides[OURS](texts)))
    rates = {name: Rate(0.0, 0.0) for name in sides}
    for _ in range(PASSES):
        for name, side in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            side(texts)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            rates[name] = Rate(max(rates[name].core, total / cpu), max(rates[name].wall, total / wall))
    return rates


def reading(directory: Path, workers: int) -> float:
    """Tokens a second that the iterator of training batches delivers, records in the page cache."""
    split = records.open_records(directory).split("train")
    batches = records.batches(split, BATCH, seed=0, workers=workers)
    for _ in range(-(-len(split) // BATCH) + 16):  # an epoch, so that every page has been read
        next(batches)
    started, tokens = time.perf_counter(), 0
    while time.perf_counter() - started < READ_SECONDS:
        tokens += next(batches)["tokens"].size
    rate = tokens / (time.perf_counter() - started)
    batches.close()
    return rate


def preparing(texts: list[str], megabytes: int, folder: Path, workers: int) -> tuple[Rate, float]:
    """Prepares that much text in a process of its own. (Its rate, MiB of its largest process.)"""
    source, left = folder / "text.jsonl", megabytes * 1_000_000
    with source.open("w") as file:
        for text in itertools.cycle(texts):
            left -= file.write(json.dumps({"text": text}) + "\n")
            if left <= 0:
                break
    out = folder / "records"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "slimmoe_jax.data.prepare", "--source", str(source), "--out", str(out)]
    command += ["--workers", str(workers), "--data.validation-fraction", "0.05"]
    started = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    process = os.posix_spawn(sys.executable, command, os.environ, file_actions=quiet)
    _, status, usage = os.wait4(process, 0)  # its peak is that of itself and of the children that it waited for
    finished = time.perf_counter()
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    tokens = sum(split["tokens"] for split in records.open_records(out).manifest["splits"].values())
    processor = usage.ru_utime + usage.ru_stime  # of its children as well
    return Rate(tokens / processor, tokens / (finished - started)), usage.ru_maxrss / 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="stdlib:sources", help="as data.source (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=128, help="smallest input to prepare; then 2 and 4 times that")
    parser.add_argument("--characters", type=float, default=16, help="millions of the source (default: %(default)s)")
    args = parser.parse_args(argv)
    texts, prepared = documents(args.source, int(args.characters * 1e6)), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for factor, workers in PREPARE:
            megabytes = factor * args.megabytes
            what = f"prepare {megabytes} MB, {workers} worker{'s' * (workers > 1)}"
            prepared[what] = preparing(texts, megabytes, folder, workers)
        delivered = {workers: reading(folder / "records", workers) for workers in READERS}
    sides = encoders()
    check_equal(sides, texts)
    encoded = tokenizing(sides, texts)
    print(machine("grain", "tiktoken", "numpy", "tokenizers", "datasets"))
    print(f"text: {args.source}, {len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f}M characters\n")
    print(header(["what", "figure", "x `datasets.map`"]))
    peer = encoded[PEER].core
    for what, rate in encoded.items():
        print(rate.cells(what, peer))
    for what, (rate, peak) in prepared.items():
        print(rate.cells(what, peer, f", peak {peak:.0f} MiB"))
    for workers, rate in delivered.items():
        what = f"read, context {CONTEXT}, batch {BATCH}, {workers} workers"
        print(row([what, f"{rate / 1e6:.1f}M tokens/s", ""]))


if __name__ == "__main__":
    main()
