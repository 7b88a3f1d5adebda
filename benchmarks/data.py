"""Speed and memory of the data pipeline alone: tokenizing, reading records, and preparing inputs of growing size.

    python benchmarks/data.py [--source SOURCE] [--megabytes 128]

The text is the standard library's unless a source is given, so that it runs anywhere. Takes some two minutes on two cores.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import machine

from slimmoe_jax.data import records, sources, tokenizers

CONTEXT, BATCH = 2_048, 32
READ_SECONDS = 3.0


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


def tokenizing(texts: list[str]) -> float:
    """GPT-2 tokens a second of one core's time, the best of three passes."""
    tokenizer, rates = tokenizers.load("gpt2"), []
    for _ in range(3):
        started = time.process_time()
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        rates.append(tokens / (time.process_time() - started))
    return max(rates)


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


def preparing(texts: list[str], megabytes: int, folder: Path, workers: int) -> tuple[float, float]:
    """Prepares that much text in a process of its own. (Tokens a second, MiB of its largest process.)"""
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
    return tokens / (finished - started), usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="stdlib:sources", help="as data.source (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=128, help="smallest input to prepare; then 2 and 4 times that")
    args = parser.parse_args()
    texts = documents(args.source, 16_000_000)
    print(machine("grain", "tiktoken", "numpy"))
    print(f"text: {args.source}, {len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f}M characters\n")
    print("| what | figure |\n|---|---|", flush=True)
    print(f"| GPT-2 encoding alone | {tokenizing(texts) / 1e6:.2f}M tokens/s a core |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for megabytes, workers in ((1, 1), (1, 2), (2, 2), (4, 2)):
            megabytes *= args.megabytes
            rate, peak = preparing(texts, megabytes, folder, workers)
            print(f"| prepare {megabytes} MB, {workers} workers | {rate / 1e6:.2f}M tokens/s, peak {peak:.0f} MiB |", flush=True)
        for workers in (0, 2):
            rate = reading(folder / "records", workers)
            print(f"| read, context {CONTEXT}, batch {BATCH}, {workers} workers | {rate / 1e6:.1f}M tokens/s |", flush=True)


if __name__ == "__main__":
    main()
