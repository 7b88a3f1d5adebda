"""Can a small mixture of experts carry different attention mechanisms and positional encodings?

    python -m slimmoe_jax.ablate --config configs/ablations/headline.py --out ablations/headline

Hypothesis: the mixture gains on a dense model of equal active parameters whatever attention and positions it has (no interaction),
variable grouped-query attention keeps the loss of GQA of equal cache, and one layer in four without positions costs nothing.

The full factorial of feed-forward layer, attention and positions. VGQA and GQA have the same number of kv heads in all.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    return Study(
        name="headline",
        base=config.load(Path(__file__).parent / "base.py"),
        axes={
            "ffn": {
                "moe": {},
                # 1.5 experts of 192 are active in the mixture
                "dense": {"model.experts": 1, "model.router.max_experts": 1, "model.expert_hidden": 288},
            },
            "attention": {
                "vgqa": {"model.kv_heads": (4, 2, 1, 1, 1, 1, 2, 4)},  # 16 kv heads in all
                "mha": {"model.kv_heads": (4,)},  # 32
                "gqa": {"model.kv_heads": (2,)},  # 16
                "mqa": {"model.kv_heads": (1,)},  # 8
            },
            "positions": {
                "hybrid": {"model.rotary": (1.0, 1.0, 1.0, 0.0)},
                "rope": {"model.rotary": (1.0,)},
                "nope": {"model.rotary": (0.0,)},
            },
        },
    )
