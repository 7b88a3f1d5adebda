"""Dropout whose mask is a hash of each value's place and a seed: cheaper than a random generator, and never kept.

The hash fuses with whatever makes and uses the values, and the backward pass forms the mask anew, so that dropout moves no memory
of its own. The same seed drops the same places on any mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
    """Zeroes a share `rate` of the values, each by itself, and scales the others by 1 / (1 - rate), when training.

    Takes a key of the collection "dropout".
    """

    rate: float
    train: bool

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.draw()(x)

    def draw(self) -> Callable[[jax.Array], jax.Array]:
        """A pure function that drops the places of one draw."""
        if not self.train or self.rate == 0:
            return lambda x: x
        seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        return lambda x: drop(x, seed, self.rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: jax.Array, seed: jax.Array, rate: float) -> jax.Array:
    """x with a share `rate` of its values dropped; `seed` is [2] uint32."""
    return jnp.where(_kept(x.shape, seed, rate), x / (1 - rate), jnp.zeros((), x.dtype))


def _backward(rate: float, seed: jax.Array, grad: jax.Array) -> tuple[jax.Array, None]:
    return drop(grad, seed, rate), None


drop.defvjp(lambda x, seed, rate: (drop(x, seed, rate), seed), _backward)


def _kept(shape: tuple[int, ...], seed: jax.Array, rate: float) -> jax.Array:
    """The mask of a tensor: bool of its shape, True with a probability of 1 - rate."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    return _hash(_hash(place ^ seed[0]) + seed[1]) >= jnp.uint32(round(rate * 2**32))


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of the input flips each bit of the output about half of the time.

    The constants are those of "lowbias32" in Wellons' search for such functions (nullprogram.com/blog/2018/07/31).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
