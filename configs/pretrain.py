"""SlimMoE-250M on FineWeb-Edu sample-10BT: the pretraining stage.

    python -m slimmoe_jax.data.prepare --config configs/pretrain.py      # once; 10e9 tokens, 20 GB of records
    python -m slimmoe_jax.train --config configs/pretrain.py

From local files of the same layout instead of the hub:

    python -m slimmoe_jax.train --config configs/pretrain.py --data.source DIR
"""

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(  # the model is the default ModelConfig: SlimMoE-250M, 250,284,288 parameters
        name="pretrain",
        # 5.2e9 tokens / (32 sequences x 2,048 tokens = 65,536 tokens a step) = 79,346 steps
        steps=79_346,
        precision="float32",
        data=DataConfig(
            source="hub:HuggingFaceFW/fineweb-edu:sample-10BT",
            tokenizer="gpt2",
            context=2_048,
            batch_size=32,
            validation_fraction=0.0005,  # of 10e9 tokens: 5e6, more than any evaluation reads
        ),
        optim=OptimConfig(
            learning_rate=6e-4,  # the usual peak for models of GPT-2's size
            warmup_steps=800,  # 1% of the steps, 52e6 tokens
            schedule="cosine",
            # In halves an estimated 30 GiB in float32, for one more forward pass. For 32 sequences at once XLA plans 64 GiB, which
            # an 80 GB card should hold: --optim.accumulate 1. In bfloat16, 29 GiB: --precision bfloat16 --optim.accumulate 1.
            accumulate=2,
        ),
        checkpoint=CheckpointConfig(every=1_000),  # 65.5e6 tokens, 2.3 hours on the card's A100
        eval=EvalConfig(every=1_000, batches=20),  # 20 x 65,536 = 1.3e6 held-out tokens
    )
