"""Loss spikes: how far a step's loss and gradient lie from those of the steps before it, and how often that is far.

Axes: W steps of the window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

# SpikeScore counts losses at least so many standard deviations above the mean of the steps before (OLMo 2, arXiv 2501.00656, which
# takes the last 1,000 steps; here it is the window that skipping uses).
SPIKE_SIGMA = 7.0


class Window(struct.PyTreeNode):
    """The losses and gradient norms of the last W finite steps."""

    losses: jax.Array  # [W] float32, nats a token
    norms: jax.Array  # [W] float32
    count: jax.Array  # [] int32, steps that have entered so far
    spikes: jax.Array  # [] int32, of those, how many were spikes

    @classmethod
    def empty(cls, size: int) -> Window:
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.float32), zero, zero)


def sigmas(window: Window, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Standard deviations by which loss and gradient norm, each [], exceed the window's means; 0 until it is half full."""
    size = window.losses.size
    filled = jnp.arange(size) < window.count

    def above(values: jax.Array, value: jax.Array) -> jax.Array:
        number = jnp.maximum(filled.sum(), 1)
        mean = jnp.where(filled, values, 0).sum() / number
        variance = jnp.where(filled, (values - mean) ** 2, 0).sum() / number
        return jnp.where(window.count >= max(2, size // 2), (value - mean) / jnp.sqrt(variance + 1e-12), 0.0)

    return above(window.losses, loss), above(window.norms, norm)


def push(window: Window, loss: jax.Array, norm: jax.Array, loss_sigma: jax.Array) -> Window:
    """The window with one step more, in the place of the oldest."""
    place = window.count % window.losses.size
    return Window(
        losses=window.losses.at[place].set(loss),
        norms=window.norms.at[place].set(norm),
        count=window.count + 1,
        spikes=window.spikes + (loss_sigma >= SPIKE_SIGMA),
    )


def score(window: Window) -> jax.Array:
    """SpikeScore: the share of steps that were spikes, []."""
    return window.spikes / jnp.maximum(window.count, 1)
