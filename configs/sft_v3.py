"""SlimMoE-250M, fourth stage: instructions of OpenHermes-2.5, whose result is SlimMoE-250M-instruct.

    python -m slimmoe_jax.data.prepare --config configs/sft_v3.py --init-from runs/sft_v2
    python -m slimmoe_jax.train --config configs/sft_v3.py --init-from runs/sft_v2

From a local mirror of the data set, or jsonl of {"messages": [{"role", "content"}]}: --data.source DIR
"""

import dataclasses
from pathlib import Path

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig, TrainConfig, load


def get_config() -> TrainConfig:
    base = load(Path(__file__).with_name("pretrain.py"))
    return dataclasses.replace(
        base,
        name="sft_v3",
        init_from="runs/sft_v2",
        # train_sft has about 1.0e6 conversations, most of one exchange: at some 400 tokens each (an estimate: `prepare` prints
        # what they are) 400e6 tokens, 400e6 / (32 x 2,048 tokens a step) = 6,100 steps: one epoch.
        steps=6_100,
        data=DataConfig(
            source="hub:HuggingFaceTB/OpenHermes-2.5-H4",
            split="train_sft",
            format="chat",
            tokenizer="inherit",
            context=2_048,
            batch_size=32,
            validation_fraction=0.002,  # 2,000 conversations
        ),
        optim=OptimConfig(
            learning_rate=1e-4,  # as on the first conversations: the format is known, the instructions are new
            warmup_steps=183,  # 3% of the steps
            accumulate=base.optim.accumulate,
        ),
        checkpoint=CheckpointConfig(every=1_000),
        eval=EvalConfig(every=1_000, batches=20, prompt="Write a haiku about the sea."),
    )
