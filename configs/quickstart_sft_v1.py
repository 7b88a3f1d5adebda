"""The quickstart's second stage: conversations about the standard library, drawn from its docstrings.

python -m slimmoe_jax.train --config configs/quickstart_sft_v1.py
"""

import dataclasses
from pathlib import Path

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig, TrainConfig, load


def get_config() -> TrainConfig:
    base = load(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(
        base,
        name="quickstart_sft_v1",
        init_from="runs/quickstart",
        steps=150,  # x 8 records of 256 tokens = 0.3M tokens, three quarters of an epoch
        data=DataConfig(source="stdlib", format="chat", tokenizer="inherit", context=256, batch_size=8, validation_fraction=0.02),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10),  # a third of the first stage's peak
        checkpoint=CheckpointConfig(every=75),
        eval=EvalConfig(every=75, prompt="What does `json.dumps` do?"),
    )
