"""What the ablation studies vary: a SlimMoE of 2.1M parameters, small enough for a processor.

    python -m slimmoe_jax.train --config configs/ablations/base.py

Eight layers have the schedules of the 250M in small: kv heads rich at both ends and single in the middle, every fourth layer
without positions. The text is that of Python's own files, so that every study runs anywhere; `--base.data.source FILE` names
better text.
"""

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="ablation_base",
        steps=480,  # x 4 sequences x 256 tokens = 0.49M tokens
        log_every=4,
        model=ModelConfig(
            vocab_size=512,
            layers=8,
            width=128,
            heads=4,
            head_dim=32,
            kv_heads=(4, 2, 1, 1, 1, 1, 2, 4),
            rotary=(1.0, 1.0, 1.0, 0.0),
            expert_hidden=192,
            dropout=0.0,  # no token is seen twice
        ),
        data=DataConfig(
            source="stdlib:sources",
            tokenizer="sentencepiece",
            train_tokenizer=512,
            context=256,
            batch_size=4,
            validation_fraction=0.02,
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=48, final_fraction=0.0),
        checkpoint=CheckpointConfig(every=120, keep_last=4, keep_best=False),
        eval=EvalConfig(every=0, batches=100, sample_tokens=0),
    )
