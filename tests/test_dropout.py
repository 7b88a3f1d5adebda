"""Dropout by a hash: it drops what it should, independently, and the gradient goes where the values went."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax.dropout import Dropout, drop

SHAPE = (64, 128, 96)
RATE = 0.1


def dropped(seed, shape=SHAPE, rate=RATE):
    return np.asarray(drop(jnp.ones(shape), jnp.array(seed, jnp.uint32), rate)) == 0


def within(share, expected, number, sigmas=5):
    """Whether a share of `number` independent draws is near its expectation."""
    return abs(share - expected) < sigmas * (expected * (1 - expected) / number) ** 0.5


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_the_share_dropped_is_the_rate_and_the_mean_is_kept(rate):
    y = np.asarray(drop(jnp.ones(SHAPE), jnp.array([3, 4], jnp.uint32), rate))
    assert within((y == 0).mean(), rate, y.size)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


def test_places_are_dropped_independently_of_each_other():
    """Of a place and its neighbour along any axis, near or far, both are dropped with a probability of rate^2."""
    mask = dropped([1, 2])
    for axis, size in enumerate(SHAPE):
        for distance in (1, 2, 3, 8, 16, 32):
            pair = mask.take(range(size - distance), axis) & mask.take(range(distance, size), axis)
            assert within(pair.mean(), RATE**2, pair.size), (axis, distance)
    for axis in range(3):  # nor do whole rows stand out
        others = tuple(other for other in range(3) if other != axis)
        shares, number = mask.mean(axis=others), mask.size / SHAPE[axis]
        assert all(within(share, RATE, number) for share in shares)


@pytest.mark.parametrize("other", [[1, 3], [2, 2], [0, 2], [1, 2 + 2**31], [2, 1]])
def test_seeds_give_masks_that_know_nothing_of_each_other(other):
    both = dropped([1, 2]) & dropped(other)
    assert within(both.mean(), RATE**2, both.size)


def test_the_gradient_is_dropped_where_the_values_were():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    seed = jnp.array([5, 6], jnp.uint32)
    y, back = jax.vjp(lambda x: drop(x, seed, RATE), x)
    (grad,) = back(jnp.ones(SHAPE))
    np.testing.assert_array_equal(np.asarray(grad == 0), np.asarray(y == 0))
    np.testing.assert_allclose(grad * x, y, rtol=1e-6)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        dropout = Dropout(0.5, train=True)
        return dropout(x), dropout(x)


def test_the_module_draws_a_new_mask_for_each_key_and_place_and_rests_in_evaluation():
    x = jnp.ones((4, 32))
    both = lambda key: Twice().apply({}, x, rngs={"dropout": key})  # noqa: E731
    first, second = both(jax.random.key(0))
    assert (np.asarray(first) != np.asarray(second)).any(), "two dropouts of a model drop different places"
    assert (np.asarray(first) != np.asarray(both(jax.random.key(1))[0])).any()
    np.testing.assert_array_equal(first, both(jax.random.key(0))[0])
    np.testing.assert_array_equal(Dropout(RATE, train=False).apply({}, x), x)
