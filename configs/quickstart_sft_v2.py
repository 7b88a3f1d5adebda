"""The quickstart's third stage: multiple-choice questions about the standard library, drawn from its docstrings.

python -m slimmoe_jax.train --config configs/quickstart_sft_v2.py
"""

import dataclasses
from pathlib import Path

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig, TrainConfig, load


def get_config() -> TrainConfig:
    base = load(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(
        base,
        name="quickstart_sft_v2",
        init_from="runs/quickstart_sft_v1",
        steps=150,  # x 8 records of 256 tokens = 0.3M tokens, an epoch
        data=DataConfig(
            source="stdlib", format="multiple_choice", tokenizer="inherit", context=256, batch_size=8, validation_fraction=0.02
        ),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=10),
        checkpoint=CheckpointConfig(every=75),
        eval=EvalConfig(every=75, prompt="Question: Which name in the Python module json is a class?\nAnswer:", sample_tokens=12),
    )
