"""How the training step is compiled."""

import jax
import numpy as np
import pytest

from slimmoe_jax import sharding, state, step
from slimmoe_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=64, layers=1, width=32, heads=2, head_dim=16, kv_heads=(1,), expert_hidden=32),
    data=DataConfig(context=16, batch_size=8),
    mesh=MeshConfig(data=8),
)


def one_step():
    """The first step's metrics, and the state before and after it."""
    mesh = sharding.make_mesh(CONFIG.mesh)
    before = state.create(CONFIG, mesh)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17), np.int32)
    with sharding.use(mesh):
        after, metrics = step.jit_train_step(CONFIG, mesh, end_token=0)(before, sharding.put_batch({"tokens": tokens}, mesh))
    return before, after, metrics


def test_the_state_is_donated_and_keeps_its_layout():
    before, after, metrics = one_step()
    assert before.params["head"].is_deleted() and not after.params["head"].is_deleted()
    assert metrics["loss"].is_fully_replicated
    wanted = jax.tree.map(lambda leaf: leaf.sharding, state.abstract(CONFIG, after.params["head"].sharding.mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == wanted


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(step, "WIDE_VECTORS", {"xla_cpu_no_such_option": 1})
    assert step.compiler_options() == {}
    assert np.isfinite(one_step()[2]["loss"])


def test_wide_vectors_change_rounding_alone(monkeypatch):
    loss = float(one_step()[2]["loss"])
    monkeypatch.setattr(step, "compiler_options", lambda: {})
    assert float(one_step()[2]["loss"]) == pytest.approx(loss, rel=1e-5)
