"""A small SlimMoE with all its parts, trained on the text that Python brings along. Five minutes on two CPU cores, no
network.

python -m slimmoe_jax.train --config configs/quickstart.py
"""

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="quickstart",
        # 400 steps x 16 sequences x 256 tokens = 1.6M tokens, under half an epoch of the 3.6M there are
        steps=400,
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
            batch_size=16,
            validation_fraction=0.02,
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=20, schedule_steps=400),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=100, prompt="def ", ngrams=True),
    )
