"""What must balance the experts, and over which tokens?

    python -m slimmoe_jax.ablate --config configs/ablations/balancing.py --out ablations/balancing

Hypothesis: without balancing some experts starve; balanced over the global batch they stay busy at a lower loss than over each
micro-batch (arXiv 2501.11873); a selection bias (arXiv 2408.15664) does as well without a loss of its own. The z-loss changes
little.

Steps are taken in two micro-batches, without which the global batch and the micro-batch were the same.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    return Study(
        name="balancing",
        base=config.override(config.load(Path(__file__).parent / "base.py"), {"optim.accumulate": 2}),
        axes={
            "balance": {
                "global": {"model.router.balance": "aux"},
                "micro": {"model.router.balance": "aux_micro"},
                "bias": {"model.router.balance": "bias"},
                "none": {"model.router.balance": "none"},
            },
            "z_loss": {
                "z": {"model.router.z_weight": 1e-3},
                "no_z": {"model.router.z_weight": 0.0},
            },
        },
    )
