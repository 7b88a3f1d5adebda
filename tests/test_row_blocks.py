"""The loop over blocks of rows is each row's feed-forward layer with its expert's weights, in value and gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import row_blocks
from slimmoe_jax.row_blocks import ExpertWeights, Layout

D, F = 6, 5
SPARE = row_blocks.block_rows(D, F)


class Plan(NamedTuple):
    group_sizes: jax.Array


def layout(sizes):
    rows = sum(sizes) + SPARE
    return Layout(Plan(jnp.asarray(sizes, jnp.int32)), jnp.arange(rows, dtype=jnp.uint32))


def as_they_are(x, plan):
    """Rows that are tokens already."""
    return x


def activate(hidden, gate):
    return jnp.sin(hidden) if gate is None else jnp.sin(gate) * hidden


def make_inputs(sizes, gated):
    rng = np.random.default_rng(0)
    rows, experts = sum(sizes) + SPARE, len(sizes)
    x, grad = rng.standard_normal((rows, D)), rng.standard_normal((rows, D))
    weights = [rng.standard_normal(shape) for shape in ((experts, D, F), (experts, F, D), (experts, D, F))]
    return x, ExpertWeights(*weights[:2], weights[2] if gated else None), grad


def by_rows(x, weights, group, grad):
    """Each row alone, in float64 by numpy: outputs, and gradients in rows and weights by the rules on paper."""
    y, d_x = np.zeros(x.shape), np.zeros(x.shape)
    d_weights = jax.tree.map(np.zeros_like, weights)
    for m, e in enumerate(group):
        up, gate = x[m] @ weights.up[e], None if weights.gate is None else x[m] @ weights.gate[e]
        active = np.sin(up) if gate is None else np.sin(gate) * up
        y[m] = active @ weights.down[e]
        d_active = weights.down[e] @ grad[m]
        d_up = d_active * (np.cos(up) if gate is None else np.sin(gate))
        d_weights.down[e] += np.outer(active, grad[m])
        d_weights.up[e] += np.outer(x[m], d_up)
        d_x[m] = weights.up[e] @ d_up
        if gate is not None:
            d_gate = d_active * np.cos(gate) * up
            d_weights.gate[e] += np.outer(x[m], d_gate)
            d_x[m] += weights.gate[e] @ d_gate
    return y, d_x, d_weights


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [[3, 1, 2], [0, 5, 0], [SPARE, 0, SPARE + 1], [700, 1, SPARE - 1, 300], [0, 0], [1]], ids=str)
def test_values_and_gradients_are_those_of_each_row_alone(sizes, gated):
    """Experts without rows, with rows that fill a block exactly, and with one more and one less."""
    x, weights, grad = make_inputs(sizes, gated)
    used, group = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    y, d_x, d_weights = by_rows(x[:used], weights, group, grad[:used])
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, weights, grad))

    def run(x, weights):
        return row_blocks.expert_rows(as_they_are, activate, x, weights, layout(sizes), None)

    got, back = jax.vjp(run, *low[:2])
    got_x, got_weights = back(low[2])
    np.testing.assert_allclose(got[:used], y, atol=1e-4)
    np.testing.assert_allclose(got_x[:used], d_x, atol=5e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3), got_weights, d_weights)


def test_rows_of_no_expert_leave_no_trace_even_where_they_are_not_numbers():
    x, weights, grad = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), make_inputs([3, 4], True))

    def run(x, weights):
        return row_blocks.expert_rows(as_they_are, activate, x, weights, layout([3, 4]), None)

    y, back = jax.vjp(run, x, weights)
    d_x, d_weights = back(grad.at[7:].set(jnp.nan))
    assert np.isfinite(y[:7]).all() and np.isfinite(d_x[:7]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(d_weights))


def test_in_bfloat16_the_weights_gradients_are_summed_in_float32():
    """2,000 rows of ones with one expert: bfloat16 would stop adding at 256."""
    sizes, ones = [0, 2_000], jnp.ones((2_000 + SPARE, D), jnp.bfloat16)
    weights = ExpertWeights(jnp.ones((2, D, F)), jnp.ones((2, F, D)), None)

    def run(weights):
        return row_blocks.expert_rows(as_they_are, lambda hidden, gate: hidden, ones, weights, layout(sizes), None)

    y, back = jax.vjp(run, weights)
    (d_weights,) = back(ones)
    assert y.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(d_weights)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(d_weights.up[1], 2_000 * D)
    np.testing.assert_array_equal(d_weights.down[1], 2_000 * D)
    assert not d_weights.up[0].any() and not d_weights.down[0].any()


def test_only_blocks_in_use_are_computed():
    """The activation runs once a block in use, counted from outside the program."""
    turns = []

    def counted(hidden, gate):
        jax.debug.callback(lambda: turns.append(1))
        return hidden

    x, weights, _ = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), make_inputs([SPARE + 1, 0, 10], False))
    jax.block_until_ready(row_blocks.expert_rows(as_they_are, counted, x, weights, layout([SPARE + 1, 0, 10]), None))
    jax.effects_barrier()
    assert len(turns) == 2 + 0 + 1


@pytest.mark.parametrize(("width", "hidden", "rows"), [(128, 256, 512), (256, 256, 512), (256, 512, 256), (768, 1_536, 256)])
def test_small_weights_have_longer_blocks(width, hidden, rows):
    assert row_blocks.block_rows(width, hidden) == rows
