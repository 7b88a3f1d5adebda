"""Rows of the embedding table by token, with a gradient that frequent tokens do not slow down.

The gradient of a gather is a scatter-add. On NVIDIA GPUs its float32 additions to one row wait for each other, and in text a few
tokens are a large part of all. Sorted by token, rows to be added stand together, and the compiler adds them up before it writes.
Unmeasured here: no GPU has run it.

Axes: T tokens, V vocabulary, D model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """[V, D] and [...] int32 -> [..., D].

    Several devices each scatter their own tokens' rows: to sort them, they would have to gather them first.
    """
    one_gpu = jax.default_backend() == "gpu" and jax.device_count() == 1
    return sorted_lookup(table, tokens) if one_gpu else table[tokens]


@jax.custom_vjp
def sorted_lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """As `lookup`, with the sorted gradient wherever it runs."""
    return table[tokens]


def _forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[tokens], (tokens, jnp.zeros((table.shape[0], 0), table.dtype))  # the table's size and type, not the table


def _backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None]:
    tokens, like = residuals
    tokens, rows = tokens.reshape(-1), grad.reshape(-1, grad.shape[-1])
    order = jnp.argsort(tokens)
    summed = jax.ops.segment_sum(rows[order].astype(jnp.float32), tokens[order], like.shape[0], indices_are_sorted=True)
    return summed.astype(like.dtype), None


sorted_lookup.defvjp(_forward, _backward)
