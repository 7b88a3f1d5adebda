"""What does computing in bfloat16 cost?

    python -m slimmoe_jax.ablate --config configs/ablations/precision.py --out ablations/precision

Hypothesis: with float32 parameters, norms, softmax and routers, bfloat16 matrix products cost no loss beyond the noise.

On a processor, bfloat16 is emulated: its speed there says nothing of a GPU's.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    return Study(
        name="precision",
        base=config.load(Path(__file__).parent / "base.py"),
        axes={"precision": {"float32": {"precision": "float32"}, "bfloat16": {"precision": "bfloat16"}}},
    )
