"""Log-likelihood of continuations, batched by length and split over the devices.

Axes: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slimmoe_jax import distributed, sharding
from slimmoe_jax.model import Output, SlimMoE
from slimmoe_jax.progress import Meter, short
from slimmoe_jax.routing import RouterState

# Widths are multiples of this, so that few programs are compiled (see `rounded`); it is also the tile of positions whose logits
# exist at once.
WIDTH_MULTIPLE = 64


class Pair(NamedTuple):
    """What is given and what is scored, as tokens. Neither is empty."""

    given: Sequence[int]
    scored: Sequence[int]


class Score(NamedTuple):
    log_likelihood: float  # of all scored tokens together, nats
    greedy: bool  # whether each scored token is the likeliest in its place


class Scorer:
    """Scores pairs with one model, at most `batch_size` sequences at a time (rounded up to a multiple of the devices)."""

    def __init__(self, model: SlimMoE, params: Any, router: RouterState, mesh: Mesh, batch_size: int):
        self._model, self._params, self._router, self._mesh = model, params, router, mesh
        self._batch_size = batch_size

    def __call__(self, pairs: Sequence[Pair], label: str = "score") -> list[Score]:
        """The score of each pair, in the order given. The caller sees to it that pairs fit the model's context.

        Longest first: memory that does not suffice shows at once, and the time left is never underestimated.
        """
        few = 1 << (max(len(pairs), 1) - 1).bit_length()  # a power of two, or each number of pairs would compile its own program
        rows = sharding.padded_rows(min(self._batch_size, few), self._mesh)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].given) - len(pairs[i].scored))
        scores: list[Score] = [Score(0.0, True)] * len(pairs)
        done = tokens = 0
        pending: tuple[list[int], Any] | None = None

        def collect(chunk: list[int], sums: Any) -> None:
            for place, total, greedy in zip(chunk, *(column.tolist() for column in sharding.fetch(sums)), strict=False):
                scores[place] = Score(total, greedy)

        with sharding.use(self._mesh), Meter(label, len(pairs), quiet=not distributed.is_first()) as meter:
            for start in range(0, len(order), rows):
                chunk = order[start : start + rows]
                batch = sharding.put_whole(padded([pairs[i] for i in chunk], rows), self._mesh)
                sums = score_batch(self._model, self._params, self._router, batch)
                if pending:  # the batch before is read while this one runs
                    collect(*pending)
                pending = (chunk, sums)
                done, tokens = done + len(chunk), tokens + sum(len(pairs[i].given) + len(pairs[i].scored) for i in chunk)
                meter.update(done, f"{done:,}/{len(pairs):,} continuations, {short(tokens)} tokens")
            if pending:
                collect(*pending)
        return scores


def padded(pairs: Sequence[Pair], rows: int) -> dict[str, np.ndarray]:
    """Pairs as a batch, padded on the right, where causal attention never looks, and below with rows of weight 0.

    Returns: tokens, targets [rows, S] int32 and weights [rows, S] float32, 1 where a target is scored.
    """
    longest = max(len(given) + len(scored) for given, scored in pairs) - 1
    shape = (rows, rounded(longest, WIDTH_MULTIPLE))
    batch = {"tokens": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32), "weights": np.zeros(shape, np.float32)}
    for row, (given, scored) in enumerate(pairs):
        ids, last = [*given, *scored], len(given) + len(scored) - 1
        batch["tokens"][row, :last], batch["targets"][row, :last] = ids[:-1], ids[1:]
        batch["weights"][row, len(given) - 1 : last] = 1
    return batch


def rounded(length: int, multiple: int) -> int:
    """A length of 1 or more rounded up to one of few, so that few programs are compiled: 16 of those up to 2,048, with 64.

    To a multiple of `multiple`, and beyond 8 of them to an eighth of the next power of two: 4 lengths per doubling, each at most a
    quarter longer than what it is for.
    """
    step = max(multiple, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


@functools.partial(jax.jit, static_argnames="model")
def score_batch(model: SlimMoE, params: Any, router: RouterState, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The log-likelihood [B] float32 and greedy [B] bool of a batch of `padded`, whose width is a multiple of WIDTH_MULTIPLE."""
    out = model.apply({"params": params}, batch["tokens"], router)
    log_likelihood, greedy = by_token(out, batch["targets"])
    return (log_likelihood * batch["weights"]).sum(axis=1), (greedy | (batch["weights"] == 0)).all(axis=1)


def by_token(out: Output, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each target's log-likelihood [B, S] float32, and whether it is the likeliest token in its place, [B, S] bool.

    Tiles run along the sequence, as in `losses.token_nll`, so that no device holds the logits of all its tokens; here the likeliest
    token is wanted from the same logits as well. S is a multiple of WIDTH_MULTIPLE.
    """

    head = out.head.astype(out.hidden.dtype)

    def tile(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, wanted = xs
        logits = jnp.einsum("BSD,DV->BSV", hidden, head, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == wanted

    log_likelihood, greedy = jax.lax.map(tile, (_tiles(out.hidden), _tiles(targets)))
    return _untiled(log_likelihood), _untiled(greedy)


def _untiled(x: jax.Array) -> jax.Array:
    """[S / tile, B, tile] -> [B, S]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def _tiles(x: jax.Array) -> jax.Array:
    """[B, S, ...] -> [S / tile, B, tile, ...]."""
    rows, width = x.shape[:2]
    return jnp.moveaxis(x.reshape(rows, width // WIDTH_MULTIPLE, WIDTH_MULTIPLE, *x.shape[2:]), 1, 0)
