"""How far do runs differ that differ in their seed alone?

    python -m slimmoe_jax.ablate --config configs/ablations/noise_floor.py --out ablations/noise_floor

Hypothesis: seeds move the validation loss by hundredths of a nat. A study's difference below that is no finding.

A seed draws the initial weights and the order of the text. Differences between arms are paired by seed, so that their noise is
smaller than what this shows; each study's report gives its own.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    return Study(
        name="noise_floor",
        base=config.load(Path(__file__).parent / "base.py"),
        axes={"arm": {"base": {}}},
        seeds=(0, 1, 2, 3, 4, 5),
    )
