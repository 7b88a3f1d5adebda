"""Losses of twenty steps of each shipped config at reduced size, against those kept in golden.json.

They change when the numerics of training change: initialisation, model, losses, routing, optimiser, schedule, dropout, or a shipped
config's hyperparameters. Where that is what a commit means to do, it says so, and `python tests/test_golden.py` writes them anew.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from slimmoe_jax import config as config_lib
from slimmoe_jax import optim, sharding, state, step
from slimmoe_jax.config import MeshConfig, TrainConfig

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
STEPS, VOCABULARY, CONTEXT = 20, 64, 32
# Rounding differs between processors and versions of XLA, and twenty steps amplify it.
TOLERANCE = 2e-3


def reduced(name: str) -> TrainConfig:
    """A shipped config with four small layers of its kinds, its own optimiser, schedule and dropout over twenty steps."""
    config = config_lib.load(ROOT / "configs" / f"{name}.py")
    model = dataclasses.replace(
        config.model, vocab_size=VOCABULARY, layers=4, width=32, heads=4, head_dim=8, expert_hidden=32,
        kv_heads=tuple(sorted({min(kv, 4) for kv in config.model.layer_kv_heads}, reverse=True))[:1] + (2, 1, 2),
    )  # fmt: skip
    warmup = min(config.optim.warmup_steps, 5)
    return dataclasses.replace(
        config, model=model, steps=STEPS, mesh=MeshConfig(), data=dataclasses.replace(config.data, context=CONTEXT, batch_size=8),
        optim=dataclasses.replace(config.optim, schedule_steps=STEPS, warmup_steps=warmup),
    )  # fmt: skip


def batch(config: TrainConfig, number: int) -> dict[str, np.ndarray]:
    """Records of a little language that is easy to learn; packed ones where the config has such."""
    rng = np.random.default_rng(number)
    tokens = (rng.integers(1, 8, (8, 1)) * np.arange(CONTEXT + 1) + rng.integers(0, VOCABULARY, (8, 1))) % VOCABULARY
    if config.data.format == "text" and not config.data.mix:
        return {"tokens": tokens.astype(np.int32)}
    segments = np.repeat([[1] * 12 + [2] * 15 + [0] * 6], 8, axis=0)
    targets = (rng.random(tokens.shape) < 0.6) & (segments > 0)
    return {"tokens": tokens.astype(np.int32), "segments": segments.astype(np.int32), "targets": targets.astype(np.int32)}


def losses(name: str) -> list[float]:
    config = reduced(name)
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    current, found = state.create(config, mesh), []
    with sharding.use(mesh):
        run = jax.jit(step.make_train_step(config, state.build_model(config), optim.make(config), end_token=0))
        for number in range(STEPS):
            current, metrics = run(current, sharding.put_batch(batch(config, number), mesh))
            found.append(round(float(metrics["loss"]), 5))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_of_a_shipped_config_are_those_that_were_kept(name):
    kept = json.loads(GOLDEN.read_text())
    assert name in kept, f"configs/{name}.py is new: python tests/test_golden.py keeps its losses"
    np.testing.assert_allclose(
        losses(name), kept[name], rtol=TOLERANCE, err_msg=f"the numerics of configs/{name}.py changed. {' '.join(__doc__.split())}"
    )


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in CONFIGS}, indent=1) + "\n")
