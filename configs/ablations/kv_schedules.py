"""Where in the depth do key and value heads belong, when their number in all is given?

    python -m slimmoe_jax.ablate --config configs/ablations/kv_schedules.py --out ablations/kv_schedules

Hypothesis: heads at both ends and few in the middle (the 250M's schedule, and DeciLM-6B's) beat as many spread evenly.

Every schedule has 16 kv heads over eight layers, so that parameters, FLOPs and cache are the same.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    return Study(
        name="kv_schedules",
        base=config.load(Path(__file__).parent / "base.py"),
        axes={
            "schedule": {
                "uniform": {"model.kv_heads": (2,)},
                "rising": {"model.kv_heads": (1, 1, 1, 1, 2, 2, 4, 4)},
                "falling": {"model.kv_heads": (4, 4, 2, 2, 1, 1, 1, 1)},
                "u": {"model.kv_heads": (4, 2, 1, 1, 1, 1, 2, 4)},
            }
        },
    )
