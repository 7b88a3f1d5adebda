"""Prepared records: fixed-length rows of tokens on disk, read by index.

A folder of records holds `manifest.json` and, for each split, files `.npy`, memory-mapped when read: [records, context + 1]
of text, or [records, 3, context + 1] of packed examples (see `packing`). The manifest says what they are made of, with
sha256 sums. The files are compared with them when they are first used, and again when they have changed: `verified.json` keeps
what they were like. Grain decides the order: it shuffles record numbers by seed and epoch, mixes sources by weight, and the state
of the iterator is one number that goes into the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimmoe_jax import files
from slimmoe_jax.config import InputError, ModelConfig
from slimmoe_jax.data import packing, tokenizers
from slimmoe_jax.progress import Meter, short

if TYPE_CHECKING:
    import grain

FORMAT = 2
_EPOCHS = 1_000_000  # endless, within what Grain can count
VERIFIED_FILE = "verified.json"  # in a folder of records, or below _ELSEWHERE where that cannot be written to
_ELSEWHERE = "~/.cache/slimmoe_jax/verified"
_SHOWN_FROM = 2**28  # bytes to compare from which progress is shown
_BLOCK = 2**22  # bytes read at once


class Split:
    """The records of one split, in files that together are one long array."""

    def __init__(
        self, directory: Path, entry: dict[str, Any], record_length: int, channels: Sequence[str], most: int | None = None
    ):
        """Opens the files; with `most`, only the first so many records are there."""
        self._made_from = (directory, entry, record_length, channels, most)
        self.targets, self.bytes = int(entry["targets"]), int(entry["bytes"])
        self.packed = len(channels) > 1
        shape = (len(channels), record_length) if self.packed else (record_length,)
        self._channels = channels
        self._arrays = [_map_file(directory, file, shape) for file in entry["files"]]
        self._first = np.cumsum([0] + [len(array) for array in self._arrays])
        if most is not None:
            self._first = np.minimum(self._first, most)

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, self._made_from  # a reading process maps the files itself; the records are not sent to it

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The records of these numbers, in this order: [n, context + 1] or, packed, [n, 3, context + 1], int32."""
        indices = np.asarray(indices)
        out = np.empty((len(indices), *self._arrays[0].shape[1:]), np.int32)
        files = np.searchsorted(self._first, indices, side="right") - 1
        for file in np.unique(files):
            rows = files == file
            out[rows] = self._arrays[file][indices[rows] - self._first[file]]
        return out

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The same by channel: "tokens" and, packed, "segments" and "targets", each [n, context + 1] int32."""
        records = self.read(indices)
        if not self.packed:
            return {"tokens": records}
        return {name: records[:, channel] for channel, name in enumerate(self._channels)}

    def first(self, number: int) -> Split:
        """The first so many records; `targets` and `bytes` stay those of the whole split."""
        return Split(*self._made_from[:-1], number)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text that is to be predicted, a token.

        Raises:
          InputError: there is nothing to predict.
        """
        if self.bytes < 1 or self.targets < 1:
            raise InputError(f"the records in {self._made_from[0]} have no targets in this split: prepare more text")
        return self.bytes / self.targets


class Mixture:
    """Several splits, numbered one after another; which comes how often is for `batches` to say."""

    def __init__(self, splits: Sequence[Split], weights: Sequence[float]):
        self.splits, self.weights = tuple(splits), tuple(weights)
        self.packed = any(split.packed for split in splits)
        self.first = np.cumsum([0] + [len(split) for split in splits])

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `Split.batch`.

        Among packed records, one of text is a single segment of which everything is to be predicted, and "text" [n] int32 says
        which those are: where documents are to be segments, the step finds their ends (see `step.inputs_of`).
        """
        out: dict[str, np.ndarray] = {}
        sources = np.searchsorted(self.first, indices, side="right") - 1
        for source in np.unique(sources):
            rows = sources == source
            part = self.splits[source].batch(indices[rows] - self.first[source])
            if self.packed:
                part["text"] = np.full(len(part["tokens"]), "segments" not in part, np.int32)
            if self.packed and "segments" not in part:
                part |= {name: np.ones_like(part["tokens"]) for name in ("segments", "targets")}
            for name, values in part.items():
                out.setdefault(name, np.empty((len(indices), *values.shape[1:]), np.int32))[rows] = values
        return out


class Records:
    """A folder of prepared records."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory, self.manifest = directory, manifest
        self.context = int(manifest["context"])
        if manifest["record_length"] != self.context + 1:
            raise ValueError(f"record_length {manifest['record_length']} with context {self.context}")
        self.end_token = int(manifest["tokenizer"]["end_token"])
        self.vocab_size = int(manifest["tokenizer"]["vocab_size"])
        self.fingerprint: str = manifest["tokenizer"]["fingerprint"]
        if not 0 <= self.end_token < self.vocab_size:
            raise ValueError(f"end_token {self.end_token} of a vocabulary of {self.vocab_size}")
        if manifest["channels"] not in (["tokens"], list(packing.CHANNELS)):
            raise ValueError(f"channels {manifest['channels']}")
        sums = [file["sha256"] for entry in manifest["splits"].values() for file in entry["files"]]
        texts = [manifest["source"], manifest["tokenizer"]["name"], self.fingerprint, *sums]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a source, a name or a sum is no text")
        shape = (self.context + 1, manifest["channels"])
        self._splits = {name: Split(directory, entry, *shape) for name, entry in manifest["splits"].items()}
        for name in ("train", "validation"):
            if not len(self._splits[name]):
                raise ValueError(f"no {name} records")

    @property
    def digest(self) -> str:
        """The sha256 of what the records are, whatever their folder is called: tokens, splits and tokenizer."""
        splits = {name: [file["sha256"] for file in entry["files"]] for name, entry in self.manifest["splits"].items()}
        return hashlib.sha256(json.dumps([self.context, self.fingerprint, splits], sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """`train` or `validation`."""
        return self._splits[name]

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that made the records, its fingerprint checked."""
        tokenizer = tokenizers.saved(self.directory)
        if tokenizer.fingerprint != self.fingerprint:
            raise InputError(
                f"the tokenizer in {self.directory} (sha256 {tokenizer.fingerprint[:12]}) is not the one that made the records"
                f" ({self.fingerprint[:12]}): restore it, or prepare the records again"
            )
        return tokenizer

    def verify(self) -> None:
        """Reads what was not read before, or has changed since, and compares it with the manifest's sha256 sums and the vocabulary.

        Raises:
          InputError: a file is not what the manifest says, or holds tokens that the tokenizer does not have.
        """
        entries = [file for entry in self.manifest["splits"].values() for file in entry["files"]]
        before, marks = self._verified(), {}
        total = sum((self.directory / file["file"]).stat().st_size for file in entries)
        done = 0
        with Meter(f"verify {self.directory}", total, quiet=total < _SHOWN_FROM) as meter:
            for file in entries:
                path = self.directory / file["file"]
                mark = self._mark(path, file)
                if before.get(file["file"]) != mark:
                    for read in self._check(path, file):
                        meter.update(done + read, f"{short(done + read)}B of {short(total)}B")
                done += path.stat().st_size
                marks[file["file"]] = mark
        if marks != before:
            self._keep_verified(marks)

    def _mark(self, path: Path, entry: dict[str, Any]) -> list[Any]:
        """What stays the same while a file does, and what it was compared with."""
        now = path.stat()
        return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, entry["sha256"], self.vocab_size, self.manifest["channels"]]

    def _check(self, path: Path, entry: dict[str, Any]) -> Iterator[int]:
        """Compares one file; yields the bytes read so far."""
        channels: list[str] = self.manifest["channels"]
        width = self.context + 1
        most = {"tokens": self.vocab_size - 1, "segments": width, "targets": 1}
        digest, faults = hashlib.sha256(), dict[str, int]()
        try:
            with path.open("rb") as file:
                major, _ = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                _, by_columns, dtype = read_header(file)
                start = file.tell()
                file.seek(0)
                digest.update(file.read(start))
                record = dtype.itemsize * width * len(channels)
                while block := file.read(max(1, _BLOCK // record) * record):
                    digest.update(block)
                    values = np.frombuffer(block[: len(block) // record * record], dtype).reshape(-1, len(channels), width)
                    for number, name in enumerate(channels):
                        largest = int(values[:, number].max(initial=0))
                        if largest > most[name]:
                            faults[name] = max(largest, faults.get(name, 0))
                    yield file.tell()
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): restore it, or prepare the records again") from error
        wrong = [f"it has {name} up to {largest:,}, where {most[name]:,} is the most" for name, largest in faults.items()]
        if by_columns and len(channels) > 1:
            wrong.insert(0, "it is stored by columns")
        if digest.hexdigest() != entry["sha256"]:
            wrong.insert(0, "its sha256 is not the manifest's")
        if wrong:
            raise InputError(
                f"{path} is damaged ({'; '.join(wrong)}): restore it, or remove the folder and prepare the records again"
            )

    def _verified_files(self) -> list[Path]:
        name = hashlib.sha256(str(self.directory.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
        return [self.directory / VERIFIED_FILE, Path(_ELSEWHERE).expanduser() / f"{name}.json"]

    def _verified(self) -> dict[str, Any]:
        """The marks of the files that were compared before."""
        for path in self._verified_files():
            with contextlib.suppress(OSError, ValueError):
                kept = files.read_json(path)
                if isinstance(kept, dict):
                    return kept
        return {}

    def _keep_verified(self, marks: dict[str, Any]) -> None:
        """Keeps the marks where that is possible; what is lost is only time."""
        for path in self._verified_files():
            with contextlib.suppress(OSError):
                if path.parent != self.directory:
                    path.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(path, marks, f".{os.getpid()}.tmp")  # several processes may do so at once
                return


def open_records(directory: str | Path, context: int | None = None, model: ModelConfig | None = None) -> Records:
    """Opens prepared records and checks that they fit.

    Args:
      context: the length that the config asks for.
      model: the model that is to read them.
    Raises:
      InputError: no records, damaged ones, or ones of another length or vocabulary.
    """
    directory = Path(directory)
    path = directory / "manifest.json"
    if not path.is_file():
        raise InputError(f"{directory} holds no records (no manifest.json): run python -m slimmoe_jax.data.prepare")
    try:
        manifest = files.read_json(path)
        if manifest["format"] != FORMAT:
            raise InputError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: prepare the records again")
        records = Records(directory, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it, or remove the folder and prepare the records again"
        ) from error
    if context is not None and context != records.context:
        raise InputError(
            f"{directory} holds records of data.context = {records.context}, not {context}: prepare others with --data.records"
            " DIR, or change data.context"
        )
    if model is not None and model.vocab_size != records.vocab_size:
        raise InputError(
            f"model.vocab_size = {model.vocab_size}, but the tokenizer of {directory} has {records.vocab_size} tokens:"
            " make them equal"
        )
    return records


def check_same_tokenizer(records: Records, run: str | Path) -> None:
    """Raises InputError where records were made with another tokenizer than the run's."""
    ours, theirs = tokenizers.saved(run), records.manifest["tokenizer"]
    if ours.fingerprint != records.fingerprint:
        raise InputError(
            f"{records.directory} was made with another tokenizer ({theirs['name']}, sha256 {records.fingerprint[:12]}) than"
            f" the model of {run} ({ours.name}, {ours.fingerprint[:12]}): prepare the text with the model's tokenizer"
        )


def batches(
    source: Split | Mixture, batch_size: int, *, seed: int, workers: int = 0, process: int = 0, processes: int = 1
) -> Batches:
    """Endless shuffled batches, each epoch in a new order, with this process's share of the rows.

    Record numbers are batched before anything is read, and each batch is then one gather from the files. So the global batches
    do not depend on the number of processes or workers. A mixture takes records from its splits by weight, evenly spread; each
    split goes through epochs of its own.

    Args:
      batch_size: rows of the global batch; `processes` divides it.
      workers: reading processes; 0 reads in threads.
    Returns: an iterator of `Split.batch`'s arrays, [batch_size / processes, context + 1] int32, with their numbers, "records".
    Raises:
      InputError: the batch does not divide.
    """
    import grain  # which imports JAX: not needed to prepare records

    share = batch_size // processes
    if share * processes != batch_size:
        raise InputError(f"data.batch_size = {batch_size} does not divide among {processes} processes: choose a multiple")
    mine = slice(process * share, (process + 1) * share)
    mixture = source if isinstance(source, Mixture) else Mixture([source], [1.0])

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        return mixture.batch(numbers[mine]) | {"records": numbers[mine].astype(np.int64)}

    ranges = [
        grain.MapDataset.range(int(first), int(stop)).shuffle(seed=seed + n).repeat(_EPOCHS)
        for n, (first, stop) in enumerate(itertools.pairwise(mixture.first))
    ]
    numbers = grain.MapDataset.mix(ranges, mixture.weights) if len(ranges) > 1 else ranges[0]
    return Batches(numbers.batch(batch_size).map(read), workers)


class Batches:
    """An iterator over a Grain dataset, in threads or worker processes.

    Its state is Grain's for threads, the number of the next batch, whatever reads them: a run may be resumed with another number
    of workers, whose own states Grain could not carry over.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int):
        self._dataset, self._workers, self._next = dataset, workers, 0
        self._iterator: grain.DatasetIterator[dict[str, np.ndarray]] | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """What `set_state` takes; JSON can hold it."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on as the iterator that gave `state` would."""
        self.close()
        self._next = int(state["next_index"])

    def close(self) -> None:
        """Ends the readers; the next batch starts others."""
        if self._iterator is not None:
            self._finalizer()
            self._iterator = None

    def _start(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        import grain
        from absl import flags

        rest = self._dataset[self._next :].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain asks absl's flags, which only absl's own programs parse
                flags.FLAGS.mark_as_parsed()
            rest = rest.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=4))
        iterator = iter(rest)
        self._finalizer = weakref.finalize(self, iterator.close)  # before the interpreter takes the workers' queues apart
        return iterator


def evaluation_batches(
    split: Split, batch_size: int, most: int = 0, *, process: int = 0, processes: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """The split's records in order, once; the last batch is filled with rows of weight 0.

    Args:
      most: number of batches; 0 means all.
    Returns: batches of `Split.batch`'s arrays, [batch_size / processes, context + 1] int32, and "weight" [batch_size / processes]
      float32.
    """
    share = batch_size // processes
    if share * processes != batch_size:
        raise InputError(f"a batch of {batch_size} does not divide among {processes} processes: choose a multiple")
    total = -(-len(split) // batch_size)
    for batch in range(min(total, most) if most else total):
        numbers = batch * batch_size + process * share + np.arange(share)
        weight = (numbers < len(split)).astype(np.float32)
        yield split.batch(np.minimum(numbers, len(split) - 1)) | {"weight": weight}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map_file(directory: Path, entry: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    path = directory / entry["file"]
    if path.parent != directory:
        raise InputError(f"{directory}/manifest.json names {entry['file']}, outside its folder: prepare the records again")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python: TokenError, SyntaxError and others
        raise InputError(f"{path} is damaged ({str(error)[:120]}): prepare the records again") from error
    if array.shape != (entry["records"], *shape) or array.dtype.kind != "u":
        raise InputError(
            f"{path} holds {array.dtype} {list(array.shape)}, the manifest says {[entry['records'], *shape]}:"
            " prepare the records again"
        )
    return array
