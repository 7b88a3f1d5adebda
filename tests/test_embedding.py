"""The sorted gradient of the embedding is the gradient of the embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import embedding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sorted_gradient_is_the_sum_of_each_tokens_rows(dtype):
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.3, (4, 64)) - 1, 39)  # some tokens often, some never; the last of the vocabulary too
    table = jnp.asarray(rng.standard_normal((40, 8)), dtype)
    grad = jnp.asarray(rng.standard_normal((4, 64, 8)), dtype)
    value, back = jax.vjp(lambda table: embedding.sorted_lookup(table, tokens), table)
    np.testing.assert_array_equal(value, np.asarray(table)[tokens])
    expected = np.zeros((40, 8))
    for token, row in zip(tokens.ravel(), np.asarray(grad, np.float64).reshape(-1, 8), strict=True):
        expected[token] += row
    (got,) = back(grad)
    assert got.dtype == dtype and (tokens == 39).any() and not np.isin(np.arange(40), tokens).all()
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=1e-5 if dtype == jnp.float32 else 1e-2, atol=1e-5)
