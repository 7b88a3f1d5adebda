"""What is asked of a trained model beside its loss, as arrays in and numbers out. Nothing here runs a model.

Axes: R rows, S positions, N layers, E experts.

Copying and needles are made of random frequent tokens, so that nothing but the context can tell what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slimmoe_jax.data.tokenizers import Tokenizer

KEY = 4  # tokens that say which of the things seen before is meant
VALUE = 4  # tokens to be recalled after a needle's key
MOST_SCORED = 64  # tokens of a copy that are scored, so that each distance costs and weighs the same
SHORTEST_NEEDLE = 4 * (KEY + VALUE)  # tokens of a row: as much text as needle and question
UNKNOWN = "\ufffd\u2047"  # how part of a character, and SentencePiece's unknown token, are written
DEPTHS = (0.0, 0.5, 1.0)  # of a needle; 0 is the start of the context, farthest from the question


class Task(NamedTuple):
    """Rows of one kind, and where in them the answers stand."""

    kind: str  # copy, needle, needle_absent
    length: int  # distance of a copy, or length of a needle's row, tokens
    depth: float  # of the needle
    tokens: np.ndarray  # [R, row length] int32
    scored: np.ndarray  # [n] int, places of the tokens that are to be foretold
    before: np.ndarray | None = None  # [n] int, places of the same tokens where nothing foretells them

    @property
    def title(self) -> str:
        """What a progress line calls it."""
        depth = f", depth {self.depth:.0%}" if self.kind == "needle" else ""
        return f"{self.kind.replace('_', ' ')}, {self.length} tokens{depth}"


def frequent_tokens(counts: np.ndarray, share: float = 0.9) -> np.ndarray:
    """The tokens that make up a share of a text, most frequent first; the model has seen each of them."""
    order = np.argsort(-counts, kind="stable")
    return order[: int(np.searchsorted(np.cumsum(counts[order]), share * counts.sum())) + 1]


def copying(vocabulary: np.ndarray, distances: Sequence[int], rows: int, seed: int) -> list[Task]:
    """A random passage followed by itself: each token of the second stands `distance` after the same token of the first.

    Scored are the tokens after the first KEY of the copy.
    """
    random, tasks = np.random.default_rng(seed), []
    for distance in distances:
        passage = random.choice(vocabulary, (rows, distance)).astype(np.int32)
        tokens = np.concatenate([passage, passage], axis=1)
        places = np.arange(KEY, min(distance, KEY + MOST_SCORED))
        tasks.append(Task("copy", distance, 0.0, tokens, distance + places, places))
    return tasks


def needles(text: np.ndarray, vocabulary: np.ndarray, lengths: Sequence[int], rows: int, seed: int) -> list[Task]:
    """A random key and value put into text at a depth; at the text's end the key comes again, and the value is asked for.

    The task "needle_absent" asks for the same values where the text holds other keys and values.

    Args:
      text: [rows or more, longest length or more] int32.
      lengths: tokens of each task, question and answer included; SHORTEST_NEEDLE or more.
    """
    random, tasks = np.random.default_rng(seed), []
    needle = random.choice(vocabulary, (rows, KEY + VALUE)).astype(np.int32)
    other = random.choice(vocabulary, (rows, KEY + VALUE)).astype(np.int32)
    for length in lengths:
        filler = text[:rows, : length - 2 * (KEY + VALUE)]
        for kind, hidden, depths in (("needle", needle, DEPTHS), ("needle_absent", other, (0.5,))):
            for depth in depths:
                at = round(depth * filler.shape[1])
                tokens = np.concatenate([filler[:, :at], hidden, filler[:, at:], needle], axis=1).astype(np.int32)
                tasks.append(Task(kind, length, depth, tokens, np.arange(length - VALUE, length)))
    return tasks


# --- routing ---------------------------------------------------------------------------------------------------------


def token_classes(tokenizer: Tokenizer) -> tuple[list[str], np.ndarray]:
    """Names of classes, and the class of each token of the vocabulary by how it is written."""
    names = ["word", "word's end or middle", "number", "punctuation", "space", "other"]
    # Decoded behind another token, since tokenizers drop or add a space at a text's start.
    first = tokenizer.encode("a")
    start = len(tokenizer.decode(first))
    found = np.empty(tokenizer.vocab_size, np.int8)
    for token in range(tokenizer.vocab_size):
        written = tokenizer.decode([*first, token])[start:]
        bare = written.strip()
        if written and not bare:
            kind = "space"
        elif bare.isalpha():
            kind = "word" if written[0].isspace() else "word's end or middle"
        elif bare.isnumeric():
            kind = "number"
        elif bare and not any(c.isalnum() or c in UNKNOWN for c in bare):
            kind = "punctuation"
        else:
            kind = "other"
        found[token] = names.index(kind)
    return names, found


def shares_by_class(chosen: np.ndarray, classes: np.ndarray, number: int) -> np.ndarray:
    """Share of each class's choices that went to each expert, [N, classes, E]; NaN where a class has no token.

    Args:
      chosen: [N, tokens, E] bool.
      classes: [tokens] int, below `number`.
    """
    counts = _counts_by_class(chosen, classes, number)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=-1, keepdims=True)


def specialisation(chosen: np.ndarray, classes: np.ndarray, number: int) -> np.ndarray:
    """How much a choice of expert tells of the token's class, [N]: their mutual information as a share of the class's entropy.

    0: experts take all classes alike; 1: the expert gives the class away. Choices, not tokens, are counted.
    """
    joint = _counts_by_class(chosen, classes, number)
    joint /= np.maximum(joint.sum(axis=(1, 2), keepdims=True), 1)  # a layer that chose no expert at all has 0
    of_class, of_expert = joint.sum(axis=2, keepdims=True), joint.sum(axis=1, keepdims=True)
    information = np.where(joint > 0, joint * np.log(np.where(joint > 0, joint, 1) / np.maximum(of_class * of_expert, 1e-300)), 0)
    entropy = -np.where(of_class > 0, of_class * np.log(np.where(of_class > 0, of_class, 1)), 0).sum(axis=(1, 2))
    return information.sum(axis=(1, 2)) / np.maximum(entropy, 1e-12)


def _counts_by_class(chosen: np.ndarray, classes: np.ndarray, number: int) -> np.ndarray:
    """Choices of each expert by tokens of each class, [N, classes, E]."""
    return np.einsum("NTE,TC->NCE", chosen.astype(np.float64), np.eye(number)[classes])


def frequency_bins(counts: np.ndarray, bins: int = 8) -> tuple[list[float], np.ndarray]:
    """Tokens of the vocabulary in bins of about equal share of the text, rarest last.

    Returns: the median frequency of each bin's tokens, as a share of the text, and the bin of each token. Tokens that the text
    lacks are in the last bin and out of its median; where it holds no others, their frequency is that of half an occurrence.
    """
    order = np.argsort(-counts, kind="stable")
    mass = np.cumsum(counts[order]) - counts[order] / 2
    bin_of = np.empty(len(counts), np.int64)
    bin_of[order] = np.minimum(mass * bins / max(counts.sum(), 1), bins - 1).astype(np.int64)
    _, bin_of = np.unique(bin_of, return_inverse=True)  # a token that is a bin's share by itself leaves none empty
    seen = [counts[(bin_of == n) & (counts > 0)] for n in range(bin_of.max() + 1)]
    total = max(int(counts.sum()), 1)
    return [float(np.median(of_bin)) / total if of_bin.size else 0.5 / total for of_bin in seen], bin_of


def saturation(chosen: np.ndarray, final: np.ndarray) -> np.ndarray:
    """Share of the final choices that were made already, [N] (router saturation of OLMoE, arXiv 2409.02060).

    Args:
      chosen, final: [N, tokens, E] bool, of an earlier checkpoint and of the last one.
    """
    return (chosen & final).sum(axis=(1, 2)) / np.maximum(final.sum(axis=(1, 2)), 1)


def answer(task: Task, nll: np.ndarray, correct: np.ndarray) -> dict[str, float | str]:
    """Mean nats of a task's answers, and how many of them are the likeliest token.

    Args:
      nll, correct: [R, row length - 1] of the task's rows; entry s is about the token at s + 1.
    """
    found: dict[str, float | str] = {"kind": task.kind, "length": task.length, "depth": task.depth}
    found |= {"nats": float(nll[:, task.scored - 1].mean()), "accuracy": float(correct[:, task.scored - 1].mean())}
    if task.before is not None:
        found["nats_before"] = float(nll[:, task.before - 1].mean())
    return found
