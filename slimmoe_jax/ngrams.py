"""Unigram and interpolated bigram models: the bars that a language model of the same records has to clear."""

from __future__ import annotations

import dataclasses

import numpy as np

from slimmoe_jax.data.records import Records

MOST_TOKENS = 20_000_000  # of the training split; more would not change the figures, only the memory


@dataclasses.dataclass(frozen=True)
class NgramLosses:
    """Mean negative log-likelihood of held-out targets, nats a token."""

    unigram: float
    bigram: float
    training_tokens: int


def of_records(records: Records, scored: int) -> NgramLosses:
    """Fits both models on the training split and scores the first `scored` held-out records; 0: all."""
    train, held_out = records.split("train"), records.split("validation")
    targets = held_out.read(np.arange(min(len(held_out), scored or len(held_out))))
    training = train.read(np.arange(min(len(train), MOST_TOKENS // records.context)))
    return fit_and_score(training, targets, records.vocab_size)


def fit_and_score(training: np.ndarray, held_out: np.ndarray, vocab_size: int) -> NgramLosses:
    """Fits both models on training records and scores the targets that a language model is scored on.

    The unigram model has add-one counts. The bigram model is interpolated with it by Witten and Bell's weights (IEEE Trans.
    Inf. Theory 37(4), 1991): after a word seen c times with t different successors, the unigram gets t / (c + t).

    Args:
      training, held_out: [records, length] token ids; targets are all but the first of each record.
    """
    counts = np.bincount(training.ravel(), minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)

    pairs, pair_counts = np.unique(_pairs(training, vocab_size), return_counts=True)
    followed = np.bincount(pairs // vocab_size, weights=pair_counts, minlength=vocab_size)  # times a word has a successor
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)  # different ones

    queries = _pairs(held_out, vocab_size)
    previous, target = queries // vocab_size, queries % vocab_size
    place = np.minimum(np.searchsorted(pairs, queries), len(pairs) - 1)
    seen = np.where(pairs[place] == queries, pair_counts[place], 0)
    total = followed[previous] + successors[previous]
    bigram = np.where(total > 0, (seen + successors[previous] * unigram[target]) / np.maximum(total, 1), unigram[target])
    return NgramLosses(
        unigram=float(-np.log(unigram[target]).mean()),
        bigram=float(-np.log(bigram).mean()),
        training_tokens=int(training.size),
    )


def _pairs(records: np.ndarray, vocab_size: int) -> np.ndarray:
    """Neighbouring tokens as one number each."""
    records = records.astype(np.int64)
    return (records[:, :-1] * vocab_size + records[:, 1:]).ravel()
