"""Products whose weights' gradients are kept in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import sharding
from slimmoe_jax.config import MeshConfig
from slimmoe_jax.products import weigh

SHAPES = {
    "BSD,DNH->BSNH": ((2, 7, 6), (6, 3, 4)),
    "BSM,MD->BSD": ((2, 7, 6), (6, 5)),
    "ERD,EDF->ERF": ((3, 7, 6), (3, 6, 5)),
    "ERF,EFD->RD": ((3, 7, 6), (3, 6, 5)),
}


@pytest.mark.parametrize("spec", SHAPES)
def test_value_and_gradients_are_einsums_own(spec):
    """In bfloat16 against einsum in float32 on the same rounded inputs; in float32 the same to the bit."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = (jax.random.normal(key, shape) for key, shape in zip(keys, SHAPES[spec], strict=False))
    x, weight = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, weight))
    y, back = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, weight)
    grad = jax.random.normal(keys[2], y.shape).astype(jnp.bfloat16)
    expected = (y, *back(grad.astype(jnp.float32)))

    same, same_back = jax.vjp(lambda x, w: weigh(spec, x, w), x, weight)
    jax.tree.map(np.testing.assert_array_equal, (same, *same_back(grad.astype(jnp.float32))), expected)

    low, low_back = jax.vjp(lambda x, w: weigh(spec, x, w), x.astype(jnp.bfloat16), weight)
    got = (low, *low_back(grad))
    assert [a.dtype for a in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=1e-2, atol=2e-2)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5, atol=1e-5)  # not rounded to bfloat16


def test_devices_add_up_in_float32():
    """Eight devices, each with a share of the rows: 4,096 + 7 x 1 is lost where partial sums are rounded to bfloat16."""
    mesh = sharding.make_mesh(MeshConfig())
    x = np.ones((8, 4_096), np.float32)
    x[1:, 1:] = 0
    rows = jax.device_put(jnp.asarray(x.reshape(8, 4_096, 1), jnp.bfloat16), sharding.batch_sharding(mesh))
    gradient = jax.jit(jax.grad(lambda w: weigh("BSD,DF->BSF", rows, w).astype(jnp.float32).sum()))(jnp.ones((1, 1)))
    assert float(gradient[0, 0]) == 4_096 + 7
