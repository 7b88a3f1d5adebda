"""RMSNorm against its formula, differentiated by rule, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax.norm import rms_norm

EPSILON = 1e-5


def plain(x, scale):
    wide = x.astype(jnp.float32)
    return (wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPSILON) * scale[None, None]).astype(x.dtype)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])  # about epsilon's square root, and far above it
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradient_are_those_of_the_formula(dtype, size):
    keys = jax.random.split(jax.random.key(0), 3)
    x = (size * jax.random.normal(keys[0], (3, 5, 16))).astype(dtype)
    scale, grad = jax.random.normal(keys[1], (16,)), jax.random.normal(keys[2], x.shape).astype(dtype)
    value, back = jax.vjp(lambda x, scale: rms_norm(x, scale, EPSILON), x, scale)
    expected, plain_back = jax.vjp(plain, x, scale)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (value, expected)), rtol=tolerance, atol=tolerance)
    for got, wanted in zip(back(grad), plain_back(grad), strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = (np.asarray(y, np.float32) for y in (got, wanted))
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
