"""RMSNorm that keeps its input alone for the backward pass.

Differentiated by rule, a norm in float32 keeps several float32 arrays of its input's size. Here the input, which the residual
stream keeps anyway, and one number a token suffice.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

Residuals = tuple[jax.Array, jax.Array, jax.Array]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """[..., D] and [D] float32 -> [..., D] of x's type."""
    return _forward(x, scale, epsilon)[0]


def _forward(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, Residuals]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * _wide(scale, x)).astype(x.dtype), (x, scale, inverse)


def _backward(epsilon: float, residuals: Residuals, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, inverse = residuals
    normed, grad = x.astype(jnp.float32) * inverse, grad.astype(jnp.float32)
    scaled = grad * _wide(scale, x)
    d_x = inverse * (scaled - normed * jnp.mean(scaled * normed, axis=-1, keepdims=True))
    d_scale = jnp.sum(grad * normed, axis=tuple(range(x.ndim - 1)))
    return d_x.astype(x.dtype), d_scale


def _wide(scale: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


rms_norm.defvjp(_forward, _backward)
