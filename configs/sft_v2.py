"""SlimMoE-250M, third stage: multiple-choice questions of MMLU's auxiliary_train.

    python -m slimmoe_jax.data.prepare --config configs/sft_v2.py --init-from runs/sft_v1
    python -m slimmoe_jax.train --config configs/sft_v2.py --init-from runs/sft_v1

From a local mirror, or jsonl of {"question", "subject", "choices", "answer"}: --data.source DIR. The questions are those of ARC,
OpenBookQA, RACE and MCTest: what is measured on these afterwards is contaminated, and `evaluate` says so.
"""

import dataclasses
from pathlib import Path

from slimmoe_jax.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig, TrainConfig, load


def get_config() -> TrainConfig:
    base = load(Path(__file__).with_name("pretrain.py"))
    return dataclasses.replace(
        base,
        name="sft_v2",
        init_from="runs/sft_v1",
        # 99,842 questions, most of them RACE's with a passage: at some 400 tokens each (an estimate: `prepare` prints what they
        # are) 40e6 tokens, 40e6 / (32 x 2,048 tokens a step) = 610 steps an epoch. Two epochs, because only the answer is
        # predicted: some 5 tokens of 400.
        steps=1_220,
        data=DataConfig(
            source="hub:cais/mmlu:auxiliary_train",
            format="multiple_choice",
            choice_style="cloze",  # the answer itself, as evaluations of small models score it
            tokenizer="inherit",
            context=2_048,
            batch_size=32,
            validation_fraction=0.01,  # 1,000 questions
        ),
        optim=OptimConfig(
            learning_rate=5e-5,  # half of the stage before: few targets a step make noisy gradients
            warmup_steps=37,  # 3% of the steps
            accumulate=base.optim.accumulate,
        ),
        checkpoint=CheckpointConfig(every=305),
        eval=EvalConfig(every=305, batches=20, prompt="Question: What do plants need to make food?\nAnswer:"),
    )
