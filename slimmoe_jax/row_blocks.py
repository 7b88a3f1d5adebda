"""Grouped matrix products in plain XLA: a loop over blocks of rows, each times the matrix of its group. Meant for CPUs.

Groups may have any size, nothing is dropped, and only rows that are in use are computed: the number of turns depends on the data,
which costs nothing on a CPU. A block starts where its group starts; where a group's last block reaches into the next group, that
group's own blocks overwrite what it wrote there.

Axes: M rows, E groups (experts), D and F the two sides of a group's matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Rows of a block. Longer blocks leave more of a group's last one unused, shorter ones keep the cores less busy.
BLOCK = 256

Saved = tuple[jax.Array, jax.Array, jax.Array]  # rows, weights, group sizes


@jax.custom_vjp
def blocked_dot(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies each row by the matrix of its group; the rows of a group lie together, groups in order. Differentiable.

    Args:
      rows: [M, D], of which at least the last `BLOCK` belong to no group.
      weights: [E, D, F]; cast to the type of `rows`. Their gradient is summed and returned in their own type.
      group_sizes: [E] int32, 0 or more each, at most M - BLOCK together.
    Returns: [M, F] of the type of `rows`; rows of no group are undefined.
    """
    return _product(rows, weights, group_sizes, transposed=False)


def _forward(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, Saved]:
    return blocked_dot(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(saved: Saved, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, weights, group_sizes = saved
    return _product(grad, weights, group_sizes, transposed=True), _outer_products(rows, grad, weights.dtype, group_sizes), None


blocked_dot.defvjp(_forward, _backward)


def _product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    """[M, D] times [E, D, F] -> [M, F]; transposed: [M, F] times [E, D, F] -> [M, D]."""
    columns = weights.shape[1 if transposed else 2]
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def group(number: jax.Array, out: jax.Array) -> jax.Array:
        weight = jax.lax.dynamic_index_in_dim(weights, number, keepdims=False).astype(rows.dtype)

        def block(start: jax.Array, _: jax.Array, out: jax.Array) -> jax.Array:
            product = jax.lax.dot_general(_block(rows, start), weight, contracted, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, axis=0)

        return _over_blocks(group_sizes, number, block, out)

    return jax.lax.fori_loop(0, group_sizes.size, group, jnp.zeros((rows.shape[0], columns), rows.dtype))


def _outer_products(rows: jax.Array, grad: jax.Array, dtype: jnp.dtype, group_sizes: jax.Array) -> jax.Array:
    """[M, D] and [M, F] -> [E, D, F]: for each group the sum over its rows, in float32."""
    shape = (rows.shape[1], grad.shape[1])
    contracted = (((0,), (0,)), ((), ()))

    def group(number: jax.Array, out: jax.Array) -> jax.Array:
        def block(start: jax.Array, inside: jax.Array, total: jax.Array) -> jax.Array:
            left = jnp.where(inside[:, None], _block(rows, start), 0)
            return total + jax.lax.dot_general(left, _block(grad, start), contracted, preferred_element_type=jnp.float32)

        total = _over_blocks(group_sizes, number, block, jnp.zeros(shape, jnp.float32))
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(dtype), number, axis=0)

    return jax.lax.fori_loop(0, group_sizes.size, group, jnp.zeros((group_sizes.size, *shape), dtype))


def _over_blocks(
    group_sizes: jax.Array, number: jax.Array, block: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], carry: jax.Array
) -> jax.Array:
    """Runs `block(first row, which of its rows are the group's, carry)` over the blocks of one group."""
    end = jnp.cumsum(group_sizes)[number]
    first = end - group_sizes[number]

    def turn(n: jax.Array, carry: jax.Array) -> jax.Array:
        start = first + n * BLOCK
        return block(start, start + jnp.arange(BLOCK) < end, carry)

    return jax.lax.fori_loop(0, -(-group_sizes[number] // BLOCK), turn, carry)


_block = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=BLOCK)
