"""Training in bfloat16: every parameter's gradient is float32's but for the rounding of what it is made from.

A sum of many terms in bfloat16 stops growing once it is 256 times as large as a term, and text has tokens that are a large part of
all: their rows would be far too short. Rounding errors of single terms cancel out over a sum and leave less than a percent.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from slimmoe_jax import sharding, state, step
from slimmoe_jax.config import DataConfig, ModelConfig, OptimConfig, RouterConfig, TrainConfig

ROWS, CONTEXT, VOCABULARY = 16, 1_024, 512
WHOLE, ROW = 0.05, 0.08  # relative errors allowed: of a parameter's gradient, and of any of its rows that is not small itself
CASES = [("as training starts", 1), ("as training starts", 8), ("capacity", 8), ("dense, tied, accumulated", 1)]

VARIANTS = {
    "as training starts": {},
    "capacity": {"dispatch": "capacity", "gated": True},
    "dense, tied, accumulated": {"dispatch": "dense", "tie_embeddings": True, "accumulate": 2},
}


def tokens():
    """Zipf-distributed: the most frequent token is a quarter of all, and most occur a few times."""
    return np.minimum(np.random.default_rng(0).zipf(1.2, (ROWS, CONTEXT + 1)) - 1, VOCABULARY - 1).astype(np.int32)


@functools.cache
def gradients(precision, variant="as training starts", devices=1):
    """The gradient of the training loss in each parameter, by one step of plain descent at a rate of 1."""
    changes = dict(VARIANTS[variant])
    model = dict(
        vocab_size=VOCABULARY, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(1.0, 0.0), qk_norm=True,
        expert_hidden=48, dropout=0.0, router=RouterConfig(kind="top_k"),
    )  # fmt: skip
    optim = OptimConfig(accumulate=changes.pop("accumulate", 1))
    config = TrainConfig(
        precision=precision, model=ModelConfig(**model | changes), data=DataConfig(context=CONTEXT, batch_size=ROWS), optim=optim
    )
    mesh = jax.make_mesh(
        (devices, 1, 1), ("data", "fsdp", "expert"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices]
    )
    before, descent = state.create(config, mesh), optax.sgd(1.0)
    before = before.replace(opt_state=descent.init(before.params))
    with sharding.use(mesh):
        run = jax.jit(step.make_train_step(config, state.build_model(config), descent, end_token=0))
        after, metrics = run(before, sharding.put_batch({"tokens": tokens()}, mesh))
    assert not metrics["skipped"]
    moved = jax.tree.map(lambda a, b: np.subtract(a, b, dtype=np.float64), *jax.device_get((before.params, after.params)))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(moved)}


def errors(exact, rounded):
    """Relative errors of each row whose norm is at least a tenth of the largest, and of the whole."""
    exact, rounded = (leaf.reshape(leaf.shape[0] if leaf.ndim > 1 else 1, -1) for leaf in (exact, rounded))
    size, error = np.linalg.norm(exact, axis=1), np.linalg.norm(exact - rounded, axis=1)
    large = size > 0.1 * size.max()
    return error[large] / size[large], np.linalg.norm(error) / np.linalg.norm(size)


@pytest.mark.parametrize(("variant", "devices"), CASES)
def test_no_gradient_is_summed_in_bfloat16(variant, devices):
    exact, rounded = (gradients(precision, variant, devices) for precision in ("float32", "bfloat16"))
    for name, gradient in exact.items():
        rows, whole = errors(gradient, rounded[name])
        assert whole < WHOLE and rows.max() < ROW, f"{name}: {whole:.4f} in all, {rows.max():.4f} in one row"


@pytest.mark.parametrize(("variant", "devices"), CASES)
def test_the_most_frequent_tokens_row_is_right(variant, devices):
    """It takes part in a quarter of all positions: added up in bfloat16, a third of its length would be left."""
    exact, rounded = (gradients(precision, variant, devices)["['embedding']"] for precision in ("float32", "bfloat16"))
    often = np.bincount(tokens()[:, :-1].ravel()).argmax()
    assert np.linalg.norm(rounded[often] - exact[often]) < 0.02 * np.linalg.norm(exact[often])
