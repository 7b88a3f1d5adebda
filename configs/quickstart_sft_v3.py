"""The quickstart's fourth stage: conversations again, mixed with questions and with the text of the first stage.

python -m slimmoe_jax.train --config configs/quickstart_sft_v3.py
"""

import dataclasses
from pathlib import Path

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig, TrainConfig, load


def get_config() -> TrainConfig:
    base = load(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(
        base,
        name="quickstart_sft_v3",
        init_from="runs/quickstart_sft_v2",
        steps=150,  # x 8 records of 256 tokens = 0.3M tokens
        data=DataConfig(
            source="stdlib",
            format="chat",
            mix=("0.25:multiple_choice:stdlib", "0.25:text:stdlib:sources"),  # records for each of the conversations'
            tokenizer="inherit",
            context=256,
            batch_size=8,
            validation_fraction=0.02,
        ),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=10),
        checkpoint=CheckpointConfig(every=75),
        eval=EvalConfig(every=75, prompt="What does `json.dumps` do?"),
    )
