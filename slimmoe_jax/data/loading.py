"""What a run reads: its records, prepared first where they are missing and small, and the sources mixed into them.

A run remembers its records: `records.json` in its folder has the folder in which it was trained and, for each of its sources, where
its records are and a digest of them. It resumes, and is evaluated, on those and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimmoe_jax import config as config_lib
from slimmoe_jax import files
from slimmoe_jax.config import RECORDS_FILE, DataConfig, InputError, ModelConfig, TrainConfig
from slimmoe_jax.data import prepare, tokenizers
from slimmoe_jax.data.records import Mixture, Records, Split, check_same_tokenizer, open_records
from slimmoe_jax.progress import say

# A local source up to this size is prepared on the way; a larger one is worth its own command.
AUTO_PREPARE_BYTES = 2**30


def open_all(data: DataConfig, model: ModelConfig) -> tuple[Records, Mixture]:
    """The records of `data.source`, and the training records of that and of `data.mix` by weight. Raises as `open_parts`."""
    opened = open_parts(data, model)
    return opened[0], mixture(data, opened)


def open_parts(data: DataConfig, model: ModelConfig) -> list[Records]:
    """The records of `data.source`, and of each part of `data.mix`.

    Raises:
      InputError: records are missing and their source is too large to prepare here; or they are damaged, do not fit the config,
        or differ from what it would be prepared to now.
    """
    _check_vocabulary(data, model)
    main = _open_or_prepare(data, model)
    opened = [main]
    for _, part in config_lib.mixed(data):
        records = _open_or_prepare(prepare.with_tokenizer(part, main.directory), model)
        if records.fingerprint != main.fingerprint:
            raise InputError(
                f"{records.directory}, of data.mix, was made with another tokenizer than {main.directory}: prepare it with that of"
                f" {main.directory}"
            )
        opened.append(records)
    return opened


def mixture(data: DataConfig, opened: Sequence[Records]) -> Mixture:
    """The training records of what `open_parts` opened, by weight.

    Raises:
      InputError: there are fewer than `data.train_records`.
    """
    main, *others = opened
    weights = [1.0, *(weight for weight, _ in config_lib.mixed(data))]
    return Mixture([_first(main, data.train_records), *(records.split("train") for records in others)], weights)


def _first(records: Records, number: int) -> Split:
    train = records.split("train")
    if number > len(train):
        raise InputError(
            f"data.train_records = {number}, but {records.directory} has {len(train)} records to train on: lower it, or give more"
        )
    return train.first(number) if number else train


def _check_vocabulary(data: DataConfig, model: ModelConfig) -> None:
    """Refuses a tokenizer that cannot fit the model, before anything is prepared with it."""
    size = data.train_tokenizer or tokenizers.load(data.tokenizer).vocab_size
    if size != model.vocab_size:
        named = (
            f"data.train_tokenizer = {size}" if data.train_tokenizer else f"data.tokenizer = {data.tokenizer}, of {size} tokens,"
        )
        raise InputError(f"{named} does not go with model.vocab_size = {model.vocab_size}: make them equal")


def _open_or_prepare(data: DataConfig, model: ModelConfig) -> Records:
    directory = config_lib.records_dir(data)
    if (directory / "manifest.json").exists():
        records = open_records(directory, data.context, model)
        prepare.check_made_for(data, records)
        records.verify()
        return records
    source = prepare.open_source(data)
    if not source.local or source.total_bytes > AUTO_PREPARE_BYTES:
        raise InputError(
            f"{directory} holds no records, and {data.source} is too large to prepare on the way: run"
            " python -m slimmoe_jax.data.prepare with the same config and overrides first"
        )
    manifest = prepare.prepare(data, directory)
    say("\n".join(prepare.summary_lines(manifest, directory)))
    records = open_records(directory, data.context, model)
    records.verify()
    return records


# --- what a run remembers --------------------------------------------------------------------------------------------


def remember(run: Path, opened: Sequence[Records]) -> None:
    """Writes `records.json` into a run's folder."""
    entries = [
        {"source": records.manifest["source"], "directory": str(records.directory.absolute()), "digest": records.digest}
        for records in opened
    ]
    files.write_json(run / RECORDS_FILE, {"folder": str(Path.cwd()), "records": entries})


def check_remembered(run: Path, opened: Sequence[Records]) -> None:
    """Refuses other records than those that the run in this folder was trained on.

    Raises:
      InputError: names the first that differ.
    """
    for kept, records in zip(_remembered(run), opened, strict=False):
        if kept["digest"] != records.digest:
            raise InputError(
                f"{run} was trained on other records of {kept['source']} (sha256 {kept['digest'][:12]}) than those in"
                f" {records.directory} ({records.digest[:12]}): restore them, or choose another --workdir"
            )


def of_run(run: Path, config: TrainConfig) -> Records:
    """The records of a run's own source, as they were when it was trained; its config says where they are.

    Raises:
      InputError: they are not there, are others by now, or are damaged.
    """
    directory = config_lib.records_dir(config.data)
    records = open_records(directory, config.data.context)
    check_same_tokenizer(records, run)
    kept = _remembered(run)
    if kept and kept[0]["digest"] != records.digest:
        raise InputError(
            f"{run} was trained on other records (sha256 {kept[0]['digest'][:12]}) than those in {directory}"
            f" ({records.digest[:12]}): restore them, or name with --records what to evaluate on"
        )
    records.verify()
    return records


def _remembered(run: Path) -> list[dict[str, Any]]:
    """The entries of `records.json`; none where an older version trained the run.

    Raises:
      InputError: the file is damaged.
    """
    path = run / RECORDS_FILE
    if not path.is_file():
        return []
    try:
        entries = files.read_json(path)["records"]
        return [{name: str(entry[name]) for name in ("source", "directory", "digest")} for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or remove it to go on without knowing its records") from error
