"""The loop over blocks of rows is a product of each row with its group's matrix, in value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import row_blocks

D, F = 6, 5


def make_inputs(sizes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    number = sum(sizes) + row_blocks.BLOCK
    rows, weights, grad = (
        rng.standard_normal((number, D)),
        rng.standard_normal((len(sizes), D, F)),
        rng.standard_normal((number, F)),
    )
    return jnp.asarray(rows, dtype), jnp.asarray(weights, jnp.float32), jnp.asarray(sizes, jnp.int32), jnp.asarray(grad, dtype)


SIZES = [[3, 1, 2], [0, 5, 0], [256, 0, 257], [700, 1, 255, 300], [0, 0], [1]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_each_row_alone(sizes):
    """By numpy in float64: groups that are empty, that fill a block exactly, by one more and by one less."""
    rows, weights, group_sizes, grad = make_inputs(sizes)
    used = sum(sizes)
    y, back = jax.vjp(lambda rows, weights: row_blocks.blocked_dot(rows, weights, group_sizes), rows, weights)
    d_rows, d_weights = back(grad)
    group = np.repeat(np.arange(len(sizes)), sizes)
    x, w, g = (np.asarray(a, np.float64) for a in (rows, weights, grad))
    np.testing.assert_allclose(y[:used], np.einsum("mi,mio->mo", x[:used], w[group]), atol=1e-5)
    np.testing.assert_allclose(d_rows[:used], np.einsum("mo,mio->mi", g[:used], w[group]), atol=1e-5)
    expected = np.zeros(w.shape)
    for row, of in enumerate(group):
        expected[of] += np.outer(x[row], g[row])
    np.testing.assert_allclose(d_weights, expected, atol=2e-4)


def test_rows_of_no_group_leave_no_trace_even_where_they_are_not_numbers():
    rows, weights, sizes, grad = make_inputs([3, 4])
    y, back = jax.vjp(lambda r, w: row_blocks.blocked_dot(r, w, sizes), rows.at[7:].set(jnp.nan), weights)
    assert np.isfinite(y[:7]).all() and np.isfinite(back(grad)[1]).all()


def test_in_bfloat16_the_weights_gradient_is_summed_in_float32():
    """2,000 rows of ones in one group: bfloat16 would stop adding at 256."""
    rows = jnp.ones((2_000 + row_blocks.BLOCK, D), jnp.bfloat16)
    sizes = jnp.array([0, 2_000], jnp.int32)
    y, back = jax.vjp(lambda w: row_blocks.blocked_dot(rows, w, sizes), jnp.ones((2, D, F)))
    (d_weights,) = back(jnp.ones_like(y))
    assert y.dtype == jnp.bfloat16 and d_weights.dtype == jnp.float32
    np.testing.assert_array_equal(d_weights[1], 2_000)
    np.testing.assert_array_equal(d_weights[0], 0)


def test_only_blocks_in_use_are_computed():
    """The loop takes as many turns as blocks are in use, counted from outside the program."""
    turns = []

    def block(start, inside, carry):
        jax.debug.callback(lambda start, inside: turns.append((int(start), int(inside.sum()))), start, inside)
        return carry

    sizes = jnp.array([300, 0, 10], jnp.int32)
    for group in range(3):
        jax.jit(lambda n: row_blocks._over_blocks(sizes, n, block, jnp.int32(0)))(group)
    jax.effects_barrier()
    assert sorted(turns) == [(0, 256), (256, 44), (300, 10)]
