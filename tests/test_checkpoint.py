"""Checkpoints: which are kept, what they hold, where they are restored to, and what is said when they cannot be."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from slimmoe_jax import checkpoint, sharding, state
from slimmoe_jax.config import CheckpointConfig, InputError, MeshConfig, ModelConfig, TrainConfig

CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=32, layers=2, width=16, heads=2, head_dim=8, kv_heads=(2, 1), expert_hidden=16),
    mesh=MeshConfig(data=8),
    checkpoint=CheckpointConfig(keep_last=2),
)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(CONFIG.mesh)


@pytest.fixture(scope="module")
def fresh(mesh):
    return state.create(CONFIG, mesh)


def saved(directory, fresh, config, losses, first=1):
    """A run's checkpoints, one a step from `first`, with these validation losses."""
    checkpoints = checkpoint.Checkpoints(directory, config)
    for step, loss in enumerate(losses, start=first):
        checkpoints.save(step, fresh.replace(step=fresh.step + step), {"next_index": step}, config, loss)
    checkpoints.close()
    return checkpoint.Checkpoints(directory)


def steps_in(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_newest_and_the_best_are_kept_also_after_a_restart(tmp_path, fresh, mesh):
    found = saved(tmp_path, fresh, CONFIG, [3.0, 1.0, 2.0, 2.5, None])
    assert steps_in(tmp_path) == [2, 4, 5] and found.latest == 5 and found.best == 2
    found = saved(tmp_path, fresh, CONFIG, [1.5, None, None], first=6)
    assert steps_in(tmp_path) == [2, 7, 8] and found.best == 2
    assert checkpoint.load_run(tmp_path / "best", mesh).step == 2
    saved(tmp_path, fresh, CONFIG, [0.5, None, None], first=9)
    assert steps_in(tmp_path) == [9, 10, 11]


def test_best_is_refused_where_no_loss_was_recorded(tmp_path, fresh, mesh):
    saved(tmp_path, fresh, CONFIG, [None])
    with pytest.raises(InputError, match="has no best checkpoint"):
        checkpoint.load_run(tmp_path / "best", mesh)


def test_only_the_newest_are_kept_when_the_best_is_not_wanted(tmp_path, fresh):
    config = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(keep_last=1, keep_best=False))
    saved(tmp_path, fresh, config, [1.0, 2.0, 3.0])
    assert steps_in(tmp_path) == [3]


def test_everything_comes_back_on_any_mesh(tmp_path, fresh):
    found = saved(tmp_path, fresh, CONFIG, [1.0])
    for axes in (MeshConfig(data=8), MeshConfig(data=2, fsdp=2, expert=2)):
        config = dataclasses.replace(CONFIG, mesh=axes)
        restored, data = found.restore(config, sharding.make_mesh(axes))
        assert data == {"next_index": 1} and int(restored.step) == 1
        assert_equal(restored.replace(step=fresh.step), fresh)
        wanted = state.abstract(config, sharding.make_mesh(axes))
        for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding == like.sharding
    up = restored.params["layer_0"]["experts"]["up"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, 8, 16)}, "experts and width are split in two"


def test_a_run_can_be_named_in_three_ways(tmp_path, fresh, mesh):
    saved(tmp_path, fresh, CONFIG, [1.0, 2.0])
    for path, step in ((tmp_path, 2), (tmp_path / "1", 1), (tmp_path / "checkpoints" / "1", 1)):
        run = checkpoint.load_run(path, mesh)
        assert run.step == step and run.config == CONFIG
        assert_equal((run.params, run.router), (fresh.params, fresh.router))


def test_what_cannot_be_restored_is_named(tmp_path, fresh, mesh):
    found = saved(tmp_path, fresh, CONFIG, [1.0, 2.0])
    with pytest.raises(InputError, match=r"no checkpoint 7 in .*: it holds steps \[1, 2\]"):
        found.restore(CONFIG, mesh, 7)
    wider = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, width=32))
    with pytest.raises(InputError, match="cannot be read"):
        found.restore(wider, mesh)
    with pytest.raises(InputError, match="holds no run"):
        checkpoint.load_run(tmp_path / "elsewhere", mesh)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.safetensors").touch()
    with pytest.raises(InputError, match="--from-hf makes a run of it"):
        checkpoint.load_run(tmp_path / "exported", mesh)


def test_an_unfinished_save_does_not_count(tmp_path, fresh):
    """A folder gets its name when it is complete: what a kill leaves behind is no checkpoint, and is cleared by the next save."""
    saved(tmp_path, fresh, CONFIG, [1.0, 2.0])
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    assert checkpoint.Checkpoints(tmp_path).latest == 1
    saved(tmp_path, fresh, CONFIG, [2.0], first=2)
    assert steps_in(tmp_path) == [1, 2]
    for step in ("1", "2"):
        shutil.rmtree(folder / step)
    with pytest.raises(InputError, match="train one first"):
        checkpoint.load_run(tmp_path, sharding.make_mesh(CONFIG.mesh))


def test_a_state_of_another_form_is_no_damage(tmp_path, fresh, mesh):
    """A checkpoint whose optimizer is of another tree, such as an earlier version's: named, and left where it is."""
    saved(tmp_path, fresh.replace(opt_state={"mu": fresh.params}), CONFIG, [None, None])
    with pytest.raises(InputError, match="is whole, but not of this config and version .its optimizer has") as caught:
        checkpoint.Checkpoints(tmp_path, CONFIG).restore(CONFIG, mesh)
    assert "--init-from" in str(caught.value) and "remove" not in str(caught.value)
    assert steps_in(tmp_path) == [1, 2]
