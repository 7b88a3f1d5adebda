"""How much rotation does a model need, and what carries to longer texts?

    python -m slimmoe_jax.ablate --config configs/ablations/positions.py --out ablations/positions

Hypothesis: one layer in four without positions costs nothing within the trained length and helps beyond it; without any rotation
the loss is worse, and an eighth of the dimensions rotated mends most of that.

The report's loss by position reaches four times the trained length.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    return Study(
        name="positions",
        base=config.load(Path(__file__).parent / "base.py"),
        axes={
            "rotary": {
                "rope": {"model.rotary": (1.0,)},
                "nope": {"model.rotary": (0.0,)},
                "one_in_four_nope": {"model.rotary": (1.0, 1.0, 1.0, 0.0)},
                "one_in_two_nope": {"model.rotary": (1.0, 0.0)},
                "half": {"model.rotary": (0.5,)},
                "eighth": {"model.rotary": (0.125,)},
            }
        },
    )
