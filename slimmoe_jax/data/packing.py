"""Packing: short examples side by side in records of fixed length, each a segment of its own.

Axes: R records, L record length (context + 1).

A packed record has three channels [3, L]: tokens; segments, 1 for the first example, 2 for the next, 0 for padding; and targets,
1 where a token is to be predicted. Attention and positions stay within a segment, so an example has the loss that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimmoe_jax.data.chat import Encoded

CHANNELS = ("tokens", "segments", "targets")


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson et al., SIAM J. Comput. 3(4), 1974): longest first, each into the fullest bin.

    Args:
      lengths: each at most `capacity`.
    Returns: bins, each a list of indices into `lengths`.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free places -> bins that have just so many
    rooms = 0  # bit r is set where with_room[r] is not empty
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = rooms >> lengths[index]
        if fits:
            room = lengths[index] + (fits & -fits).bit_length() - 1  # the least room that is enough
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = room - lengths[index]
        with_room.setdefault(left, []).append(chosen)
        rooms |= 1 << left
    return bins


def pack(examples: Sequence[Encoded], length: int, dtype: str) -> np.ndarray:
    """Records [R, 3, L] that hold all examples, none longer than L."""
    bins = best_fit([len(example.tokens) for example in examples], length)
    records = np.zeros((len(bins), len(CHANNELS), length), dtype)
    for record, members in zip(records, bins, strict=True):
        start = 0
        for segment, member in enumerate(members, start=1):
            example = examples[member]
            stop = start + len(example.tokens)
            record[0, start:stop], record[1, start:stop], record[2, start:stop] = example.tokens, segment, example.targets
            start = stop
    return records
