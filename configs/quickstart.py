"""A small SlimMoE with all its parts, trained on the text that Python brings along, without a network.

    python -m slimmoe_jax.train --config configs/quickstart.py

The learning-rate schedule is 1,200 steps long, so that more of it can be had by --steps alone.
"""

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="quickstart",
        # 300 steps x 8 sequences x 256 tokens = 0.6M of the 3.4M tokens there are
        steps=300,
        log_every=1,
        model=ModelConfig(
            vocab_size=4_096,
            layers=4,
            width=128,
            heads=4,
            head_dim=32,
            kv_heads=(4, 2, 1, 2),
            rotary=(1.0, 1.0, 1.0, 0.0),
            expert_hidden=256,
            dropout=0.0,  # no token is seen twice
        ),
        data=DataConfig(
            source="stdlib:sources",
            tokenizer="sentencepiece",
            train_tokenizer=4_096,
            context=256,
            batch_size=8,
            validation_fraction=0.02,
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=40, schedule_steps=1_200),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=100, prompt="def ", ngrams=True),
    )
