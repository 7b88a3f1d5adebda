"""From how many epochs over the same text on does dropout pay?

    python -m slimmoe_jax.ablate --config configs/ablations/dropout.py --out ablations/dropout

Hypothesis: with fresh text dropout of 0.1 costs loss; with text seen many times it gains.

All arms train for the base's number of steps; the fewer records they read, the more often they see each. With other --base.steps
the epochs change in proportion.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    base = config.load(Path(__file__).parent / "base.py")
    sequences = base.steps * base.data.batch_size
    return Study(
        name="dropout",
        base=base,
        axes={
            "epochs": {
                "1_epoch": {"data.train_records": sequences},
                "4_epochs": {"data.train_records": sequences // 4},
                "16_epochs": {"data.train_records": sequences // 16},
            },
            "dropout": {"0": {"model.dropout": 0.0}, "0.1": {"model.dropout": 0.1}},
        },
    )
