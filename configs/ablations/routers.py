"""Which router makes the most of the same mean number of experts?

    python -m slimmoe_jax.ablate --config configs/ablations/routers.py --out ablations/routers

Hypothesis: at a mean of two experts a token, adaptive routing (top-p, ReLU) is no worse than top-2, and all of them beat a dense
model of their active parameters without reaching one of their total parameters.

top_2, adaptive_2 and relu_2 use two experts a token in the mean; top_1 and adaptive_1.5 (the base) use fewer.
"""

from pathlib import Path

from slimmoe_jax import config
from slimmoe_jax.study.design import Study


def get_config() -> Study:
    dense = {"model.experts": 1, "model.router.max_experts": 1}
    return Study(
        name="routers",
        base=config.load(Path(__file__).parent / "base.py"),
        axes={
            "router": {
                "top_2": {"model.router.kind": "top_k", "model.router.max_experts": 2},
                "adaptive_2": {"model.router.kind": "top_p", "model.router.max_experts": 4, "model.router.target_experts": 2.0},
                "relu_2": {"model.router.kind": "relu", "model.router.max_experts": 4, "model.router.target_experts": 2.0},
                "adaptive_1.5": {},
                "top_1": {"model.router.kind": "top_k", "model.router.max_experts": 1},
                "dense_active": dense | {"model.expert_hidden": 384},  # 2 experts of 192
                "dense_total": dense | {"model.expert_hidden": 768},  # 4 experts of 192
            }
        },
    )
