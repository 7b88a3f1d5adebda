"""SlimMoE-250M, second stage: conversations of UltraChat-200k.

    python -m slimmoe_jax.data.prepare --config configs/sft_v1.py --init-from runs/pretrain
    python -m slimmoe_jax.train --config configs/sft_v1.py --init-from runs/pretrain

From a local mirror of the data set, or jsonl of {"messages": [{"role", "content"}]}: --data.source DIR
"""

import dataclasses
from pathlib import Path

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig, TrainConfig, load


def get_config() -> TrainConfig:
    base = load(Path(__file__).with_name("pretrain.py"))
    return dataclasses.replace(
        base,
        name="sft_v1",
        init_from="runs/pretrain",
        # train_sft has 207,865 conversations. At some 1,200 tokens each (an estimate: `prepare` prints what they are, and packs
        # them with hardly any padding) they are 250e6 tokens: 250e6 / (32 x 2,048 tokens a step) = 3,800 steps an epoch.
        # One epoch, since a conversation seen twice teaches a model of this size little that is new.
        steps=3_800,
        data=DataConfig(
            source="hub:HuggingFaceH4/ultrachat_200k",
            split="train_sft",
            format="chat",
            tokenizer="inherit",
            context=2_048,
            batch_size=32,
            validation_fraction=0.005,  # 1,000 conversations
        ),
        optim=OptimConfig(
            learning_rate=1e-4,  # a sixth of pretraining's peak, which ended at 6e-5: high enough to move, too low to forget
            warmup_steps=114,  # 3% of the steps: the moments of Adam start anew
            accumulate=base.optim.accumulate,
        ),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=500, batches=20, prompt="What is photosynthesis?"),
    )
