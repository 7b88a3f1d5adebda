"""Dropout whose mask is a hash of each value's place and a seed: cheaper than a random generator, and never kept.

The hash fuses with whatever makes and uses the values, and the backward pass forms the mask anew, so that dropout moves no memory
of its own. The same seed drops the same places on any mesh.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct


class Draw(struct.PyTreeNode):
    """A pure function (x, rows=None) that drops the places of one draw; see `drop`."""

    seed: jax.Array  # [2] uint32
    rate: float = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        return drop(x, self.seed, self.rate, rows)


class Dropout(nn.Module):
    """Zeroes a share `rate` of the values, each by itself, and scales the others by 1 / (1 - rate), when training.

    Takes a key of the collection "dropout".
    """

    rate: float
    train: bool

    def __call__(self, x: jax.Array) -> jax.Array:
        draw = self.draw()
        return x if draw is None else draw(x)

    def draw(self) -> Draw | None:
        """One draw of places, None where nothing is dropped."""
        if not self.train or self.rate == 0:
            return None
        return Draw(jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32), self.rate)


def drop(x: jax.Array, seed: jax.Array, rate: float, rows: jax.Array | None = None) -> jax.Array:
    """x with a share `rate` of its values dropped.

    Args:
      x: [.., D].
      seed: [2] uint32.
      rows: [..] uint32, the numbers by which the hash knows the rows of x; counted from 0 unless given. Rows that are moved, or
        split over devices, keep what they drop with their numbers.
    """
    if rows is None:
        rows = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(x.shape[:-1])
    return _drop(x, seed, rows, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _drop(x: jax.Array, seed: jax.Array, rows: jax.Array, rate: float) -> jax.Array:
    return jnp.where(_kept(x.shape[-1], rows, seed, rate), x / (1 - rate), jnp.zeros((), x.dtype))


def _forward(x: jax.Array, seed: jax.Array, rows: jax.Array, rate: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _drop(x, seed, rows, rate), (seed, rows)


def _backward(rate: float, saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None, None]:
    return _drop(grad, *saved, rate), None, None


_drop.defvjp(_forward, _backward)


def _kept(width: int, rows: jax.Array, seed: jax.Array, rate: float) -> jax.Array:
    """The mask [.., width] of rows with these numbers, True with a probability of 1 - rate."""
    lane = jax.lax.broadcasted_iota(jnp.uint32, (*rows.shape, width), rows.ndim)
    place = rows[..., None] * jnp.uint32(width) + lane
    return _hash(_hash(place ^ seed[0]) + seed[1]) >= jnp.uint32(round(rate * 2**32))


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of the input flips each bit of the output about half of the time.

    The constants are those of "lowbias32" in Wellons' search for such functions (nullprogram.com/blog/2018/07/31).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
