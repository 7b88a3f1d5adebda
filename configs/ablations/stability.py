"""Which learning rates does a model bear, with and without QK-norm, with and without positions?

    python -m slimmoe_jax.ablate --config configs/ablations/stability.py --out ablations/stability

Hypothesis: models without positions break at lower learning rates than rotary ones, and QK-norm mends that (arXiv 2603.11611).

The columns "spikes" and "skipped" of the results say what happened on the way.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    return Study(
        name="stability",
        base=config.load(Path(__file__).parent / "base.py"),
        axes={
            "rate": {
                "x1": {"optim.learning_rate": 2e-3},
                "x4": {"optim.learning_rate": 8e-3},
                "x16": {"optim.learning_rate": 32e-3},
            },
            "qk_norm": {"plain": {}, "qk_norm": {"model.qk_norm": True}},
            "positions": {"rope": {"model.rotary": (1.0,)}, "nope": {"model.rotary": (0.0,)}},
        },
    )
