"""What a run reads: its records, prepared first where they are missing and small, and the sources mixed into them."""

from __future__ import annotations

from slimmoe_jax import config as config_lib
from slimmoe_jax.config import DataConfig, InputError, ModelConfig
from slimmoe_jax.data import prepare, tokenizers
from slimmoe_jax.data.records import Mixture, Records, Split, open_records
from slimmoe_jax.progress import say

# A local source up to this size is prepared on the way; a larger one is worth its own command.
AUTO_PREPARE_BYTES = 2**30


def open_all(data: DataConfig, model: ModelConfig) -> tuple[Records, Mixture]:
    """The records of `data.source`, and the training records of that and of `data.mix` by weight.

    Raises:
      InputError: records are missing and their source is too large to prepare here, or they do not fit the config.
    """
    _check_vocabulary(data, model)
    main = _open_or_prepare(data, model)
    splits, weights = [_first(main, data.train_records)], [1.0]
    for weight, part in config_lib.mixed(data):
        records = _open_or_prepare(prepare.with_tokenizer(part, main.directory), model)
        if records.fingerprint != main.fingerprint:
            raise InputError(
                f"{records.directory}, of data.mix, was made with another tokenizer than {main.directory}: prepare it with that of"
                f" {main.directory}"
            )
        splits.append(records.split("train"))
        weights.append(weight)
    return main, Mixture(splits, weights)


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
        if data.records:  # a folder by default name is the config's own
            prepare.check_made_for(data, directory)
    else:
        source = prepare.open_source(data)
        if not source.local or source.total_bytes > AUTO_PREPARE_BYTES:
            raise InputError(
                f"{directory} holds no records, and {data.source} is too large to prepare on the way: run"
                " python -m slimmoe_jax.data.prepare with the same config and overrides first"
            )
        manifest = prepare.prepare(data, directory)
        say("\n".join(prepare.summary_lines(manifest, directory)))
    return open_records(directory, data.context, model)
