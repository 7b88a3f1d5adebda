"""All experts' feed-forward layers in plain XLA: a loop over blocks of rows, each with the weights of its expert. Meant for CPUs.

Experts may have any number of rows, nothing is dropped, and only blocks in use are computed: the number of turns depends on the
data, which costs nothing on a CPU. A turn does the whole layer for its block, so that what lies between the products stays in the
processor's caches. A block starts where its expert's rows start; where an expert's last block reaches into the next expert's rows,
those are written again by their own blocks.

Axes: T tokens, M rows, E experts, D model, F expert hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Rows of a block. Longer blocks leave more of an expert's last one unused; where the weights are small, shorter ones keep the cores
# less busy than the turns themselves do.
BLOCK, LONG_BLOCK, SMALL_WEIGHT = 256, 512, 2**16

Activation = Callable[[jax.Array, jax.Array | None], jax.Array]  # of the hidden layer [.., F] and its gate
Gather = Callable[[jax.Array, Any], jax.Array]  # tokens [T, D] and a plan -> rows [M, D]
Dropout = Callable[[jax.Array, jax.Array], jax.Array]  # of activations [M, F] and their rows' numbers [M]; a pytree


class ExpertWeights(NamedTuple):
    """The feed-forward weights of all experts; `gate` is None where the hidden layer is not gated."""

    up: jax.Array  # [E, D, F]
    down: jax.Array  # [E, F, D]
    gate: jax.Array | None  # [E, D, F]


class Layout(NamedTuple):
    """Which rows an expert has, one expert after another, and at least `block_rows` of no expert after the last."""

    plan: Any  # what `gather` needs; with `group_sizes` [E] int32, the rows of each expert
    numbers: jax.Array  # [M] uint32, by which dropout knows the rows


def block_rows(width: int, hidden: int) -> int:
    """Rows of a block for weights [D, F] of this size."""
    return LONG_BLOCK if width * hidden <= SMALL_WEIGHT else BLOCK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expert_rows(
    gather: Gather, activate: Activation, x: jax.Array, weights: ExpertWeights, layout: Layout, dropout: Dropout | None
) -> jax.Array:
    """down(dropout(activate(up(row)))) for each row, with its expert's weights. Differentiable in x and the weights.

    Args:
      gather: gives the rows of x that a plan names, zeros where it names none.
      x: [T, D].
      weights: cast to the type of x; their gradients are summed and returned in their own type.
    Returns: [M, D] of the type of x; rows of no expert are undefined.
    """
    return _forward(gather, activate, x, weights, layout, dropout)[0]


def _forward(
    gather: Gather, activate: Activation, x: jax.Array, weights: ExpertWeights, layout: Layout, dropout: Dropout | None
) -> tuple[jax.Array, Any]:
    rows = gather(x, layout.plan)
    up, down, gate = _cast(weights, x.dtype)
    blocks, kept = _Blocks.of(layout, weights), _kept(dropout, layout, up)

    def expert(number: jax.Array, carry: Any) -> Any:
        own = jax.tree.map(lambda w: _at(w, number), ExpertWeights(up, down, gate))

        def block(n: jax.Array, carry: Any) -> Any:
            all_hidden, out = carry
            start = blocks.first(number, n)
            row = blocks.read(rows, start)
            hidden = jax.tree.map(lambda w: _dot(row, w), (own.up, own.gate))
            active = activate(*hidden) if kept is None else activate(*hidden) * blocks.read(kept, start)
            done = (hidden, _dot(active, own.down))
            return jax.tree.map(lambda to, part: _write(to, part, start), (all_hidden, out), done)

        return jax.lax.fori_loop(0, blocks.turns[number], block, carry)

    hidden = jax.tree.map(lambda w: jnp.zeros((rows.shape[0], w.shape[2]), x.dtype), (up, gate))
    hidden, out = jax.lax.fori_loop(0, up.shape[0], expert, (hidden, jnp.zeros_like(rows)))
    return out, (x, weights, layout, dropout, hidden)


def _backward(gather: Gather, activate: Activation, saved: Any, grad: jax.Array) -> Any:
    x, weights, layout, dropout, hidden = saved
    rows, back = jax.vjp(lambda x: gather(x, layout.plan), x)
    # Transposed once, here: a product would do it for each block.
    up, down, gate = jax.lax.optimization_barrier(jax.tree.map(lambda w: w.swapaxes(1, 2), _cast(weights, x.dtype)))
    blocks, kept = _Blocks.of(layout, weights), _kept(dropout, layout, down)

    def expert(number: jax.Array, carry: Any) -> Any:
        own = jax.tree.map(lambda w: _at(w, number), ExpertWeights(up, down, gate))

        def block(n: jax.Array, carry: Any) -> Any:
            d_rows, d_own = carry
            start = blocks.first(number, n)
            row = blocks.read(rows, start)
            inside = start + jnp.arange(blocks.rows) < blocks.end[number]
            d_out = jnp.where(inside[:, None], blocks.read(grad, start), 0)  # and so all that comes of it
            of_block = jax.tree.map(lambda h: blocks.read(h, start), hidden)
            active, back_to_hidden = jax.vjp(lambda h: activate(*h), of_block)
            d_active = _dot(d_out, own.down)
            if kept is not None:
                kept_here = blocks.read(kept, start)
                active, d_active = active * kept_here, d_active * kept_here
            ((d_up, d_gate),) = back_to_hidden(d_active)
            d_row = _dot(d_up, own.up) if gate is None else _dot(d_up, own.up) + _dot(d_gate, own.gate)
            parts = ExpertWeights(_outer(row, d_up), _outer(active, d_out), None if gate is None else _outer(row, d_gate))
            return _write(d_rows, d_row, start), jax.tree.map(jnp.add, d_own, parts)

        d_rows, d_weights = carry
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape[1:], jnp.float32), weights)
        d_rows, d_own = jax.lax.fori_loop(0, blocks.turns[number], block, (d_rows, zeros))
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return d_rows, jax.tree.map(lambda to, part: write(to, part.astype(to.dtype)), d_weights, d_own)

    start = (jnp.zeros_like(rows), jax.tree.map(jnp.zeros_like, weights))
    d_rows, d_weights = jax.lax.fori_loop(0, up.shape[0], expert, start)
    return *back(d_rows), d_weights, None, None


expert_rows.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
    """The blocks of each expert."""

    rows: int  # of a block
    start: jax.Array  # [E] int32, the expert's first row
    end: jax.Array  # [E] int32, the one after its last
    turns: jax.Array  # [E] int32, blocks that it takes

    @classmethod
    def of(cls, layout: Layout, weights: ExpertWeights) -> _Blocks:
        rows, sizes = block_rows(*weights.up.shape[1:]), layout.plan.group_sizes
        end = jnp.cumsum(sizes)
        return cls(rows, end - sizes, end, (sizes + rows - 1) // rows)

    def first(self, expert: jax.Array, n: jax.Array) -> jax.Array:
        """The first row of an expert's n-th block."""
        return self.start[expert] + n * self.rows

    def read(self, x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, self.rows)


def _kept(dropout: Dropout | None, layout: Layout, weights: jax.Array) -> jax.Array | None:
    """What dropout multiplies each activation by, [M, F] for weights [E, _, F].

    All at once, since a loop's turn would form the hash on one core. Both passes form it: it is not kept.
    """
    if dropout is None:
        return None
    return dropout(jnp.ones((layout.numbers.size, weights.shape[2]), weights.dtype), layout.numbers)


def _cast(weights: ExpertWeights, dtype: jnp.dtype) -> ExpertWeights:
    return jax.tree.map(lambda w: w.astype(dtype), weights)


def _at(weights: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(weights, number, keepdims=False)


def _write(to: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(to, part.astype(to.dtype), start, axis=0)


def _dot(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """The product, summed in float32, in the type of the rows."""
    return jax.lax.dot(rows, weight, preferred_element_type=jnp.float32).astype(rows.dtype)


def _outer(rows: jax.Array, grad: jax.Array) -> jax.Array:
    """[M, D] and [M, F] -> [D, F] float32, the sum over the rows."""
    return jnp.einsum("MD,MF->DF", rows, grad, preferred_element_type=jnp.float32)
