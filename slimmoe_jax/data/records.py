"""Prepared records: fixed-length rows of tokens on disk, read by index.

A folder of records holds `manifest.json` and, for each split, files `.npy` of shape [records, context + 1],
memory-mapped when read. The manifest says what they are made of, with sha256 sums. Grain decides the order: it
shuffles record numbers by seed and epoch, and the state of the iterator is one number that goes into the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimmoe_jax.config import InputError, ModelConfig
from slimmoe_jax.data import tokenizers

if TYPE_CHECKING:
    import grain

FORMAT = 1
_EPOCHS = 1_000_000  # endless, within what Grain can count


class Split:
    """The records of one split, in files that together are one long array [records, context + 1]."""

    def __init__(self, directory: Path, entry: dict[str, Any], record_length: int):
        self._made_from = (directory, entry, record_length)
        self.tokens, self.bytes = int(entry["tokens"]), int(entry["bytes"])
        self._arrays = [_map_file(directory, file, record_length) for file in entry["files"]]
        self._first = np.cumsum([0] + [len(array) for array in self._arrays])

    def __reduce__(self) -> tuple:
        return Split, self._made_from  # a reading process maps the files itself; the records are not sent to it

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The records of these numbers, in this order: [n, context + 1] int32."""
        indices = np.asarray(indices)
        out = np.empty((len(indices), self._arrays[0].shape[1]), np.int32)
        files = np.searchsorted(self._first, indices, side="right") - 1
        for file in np.unique(files):
            rows = files == file
            out[rows] = self._arrays[file][indices[rows] - self._first[file]]
        return out

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the split's text a token."""
        return self.bytes / self.tokens


class Records:
    """A folder of prepared records."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory, self.manifest = directory, manifest
        self.context: int = manifest["context"]
        if manifest["record_length"] != self.context + 1:
            raise ValueError(f"record_length {manifest['record_length']} with context {self.context}")
        self.end_token: int = manifest["tokenizer"]["end_token"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self._splits = {name: Split(directory, entry, manifest["record_length"]) for name, entry in manifest["splits"].items()}
        for name in ("train", "validation"):
            if not len(self._splits[name]):
                raise ValueError(f"no {name} records")

    def split(self, name: str) -> Split:
        """`train` or `validation`."""
        return self._splits[name]

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that made the records, its fingerprint checked."""
        tokenizer, recorded = tokenizers.saved(self.directory), self.manifest["tokenizer"]["fingerprint"]
        if tokenizer.fingerprint != recorded:
            raise InputError(
                f"the tokenizer in {self.directory} (sha256 {tokenizer.fingerprint[:12]}) is not the one that made the records"
                f" ({recorded[:12]}): restore it, or prepare the records anew"
            )
        return tokenizer

    def verify(self) -> None:
        """Reads everything and compares it with the manifest's sha256 sums.

        Raises:
          InputError: a file differs.
        """
        for entry in self.manifest["splits"].values():
            for file in entry["files"]:
                if sha256(self.directory / file["file"]) != file["sha256"]:
                    raise InputError(f"{self.directory / file['file']} is damaged (its sha256 differs): prepare the records anew")


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
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise InputError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: prepare the records anew")
        records = Records(directory, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): prepare the records anew") from error
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
    if ours.fingerprint != theirs["fingerprint"]:
        raise InputError(
            f"{records.directory} was made with another tokenizer ({theirs['name']}, sha256 {theirs['fingerprint'][:12]}) than"
            f" the model of {run} ({ours.name}, {ours.fingerprint[:12]}): prepare the text with the model's tokenizer"
        )


def batches(split: Split, batch_size: int, *, seed: int, workers: int = 0, process: int = 0, processes: int = 1) -> Batches:
    """Endless shuffled batches, each epoch in a new order, with this process's share of the rows.

    Record numbers are batched before anything is read, and each batch is then one gather from the files. So the global batches
    do not depend on the number of processes or workers.

    Args:
      batch_size: rows of the global batch; `processes` divides it.
      workers: reading processes; 0 reads in threads.
    Returns: an iterator of {"tokens": [batch_size / processes, context + 1] int32, "records": their numbers, int64}.
    Raises:
      InputError: the batch does not divide.
    """
    import grain  # which imports JAX: not needed to prepare records

    share = batch_size // processes
    if share * processes != batch_size:
        raise InputError(f"data.batch_size = {batch_size} does not divide among {processes} processes: choose a multiple")
    mine = slice(process * share, (process + 1) * share)

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": split.read(numbers[mine]), "records": numbers[mine].astype(np.int64)}

    dataset = grain.MapDataset.range(len(split)).shuffle(seed=seed).repeat(_EPOCHS).batch(batch_size).map(read)
    return Batches(dataset, workers)


class Batches:
    """An iterator over a Grain dataset, in threads or worker processes.

    Its state is Grain's for threads, the number of the next batch, whatever reads them: a run may be resumed with another number
    of workers, whose own states Grain could not carry over.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int):
        self._dataset, self._workers, self._next = dataset, workers, 0
        self._iterator: Iterator | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._start()
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

    def _start(self) -> None:
        import grain
        from absl import flags

        rest = self._dataset[self._next :].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain asks absl's flags, which only absl's own programs parse
                flags.FLAGS.mark_as_parsed()
            rest = rest.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=4))
        self._iterator = iter(rest)
        self._finalizer = weakref.finalize(self, self._iterator.close)  # before the interpreter takes the workers' queues apart


def evaluation_batches(
    split: Split, batch_size: int, most: int = 0, *, process: int = 0, processes: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """The split's records in order, once; the last batch is filled with rows of weight 0.

    Args:
      most: number of batches; 0 means all.
    Returns: batches of {"tokens": [batch_size / processes, context + 1] int32, "weight": [batch_size / processes] float32}.
    """
    share = batch_size // processes
    if share * processes != batch_size:
        raise InputError(f"a batch of {batch_size} does not divide among {processes} processes: choose a multiple")
    total = -(-len(split) // batch_size)
    for batch in range(min(total, most) if most else total):
        numbers = batch * batch_size + process * share + np.arange(share)
        weight = (numbers < len(split)).astype(np.float32)
        yield {"tokens": split.read(np.minimum(numbers, len(split) - 1)), "weight": weight}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map_file(directory: Path, entry: dict[str, Any], record_length: int) -> np.ndarray:
    path = directory / entry["file"]
    if path.parent != directory:
        raise InputError(f"{directory}/manifest.json names {entry['file']}, outside its folder: prepare the records anew")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({str(error)[:120]}): prepare the records anew") from error
    if array.shape != (entry["records"], record_length) or array.dtype.kind != "u":
        raise InputError(
            f"{path} holds {array.dtype} {list(array.shape)}, the manifest says {[entry['records'], record_length]}:"
            " prepare the records anew"
        )
    return array
