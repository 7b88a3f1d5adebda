"""Products with weights whose gradient is never summed in bfloat16.

A weight's gradient is a sum over all tokens and, on several devices, over those. Differentiated by rule, a product in bfloat16
rounds it on each device before the devices add up, again in bfloat16. Here it is formed in the weight's own type, float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def weigh(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`einsum(spec, x, weight)` in the type of x, with a gradient of the weight that is summed in the weight's type.

    Args:
      spec: such as "BSD,DF->BSF"; each letter stands in two or three of its terms.
    """
    return jnp.einsum(spec, x, weight) if x.dtype == weight.dtype else _weigh(spec, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weigh(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, weight.astype(x.dtype))


def _forward(spec: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _weigh(spec, x, weight), (x, weight)


def _backward(spec: str, saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    terms, out = spec.split("->")
    of_x, of_weight = terms.split(",")
    d_x = jnp.einsum(f"{out},{of_weight}->{of_x}", grad, weight.astype(x.dtype))
    return d_x, jnp.einsum(f"{of_x},{out}->{of_weight}", x, grad, preferred_element_type=weight.dtype)


_weigh.defvjp(_forward, _backward)
