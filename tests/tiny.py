"""A config and its text, small enough to train in seconds, for tests that start the commands as users do."""

import json
import os
import sys

CACHE = os.path.expanduser("~/.cache/slimmoe_jax/xla-tests")  # of compiled programs, which all tests share
TEXTS = [f"Document {n}: " + " ".join(f"word{(n * 7 + i) % 50}" for i in range(60)) for n in range(120)]
_SOURCE = """
from slimmoe_jax.config import *

def get_config():
    config = TrainConfig(
        name="tiny", steps=8, log_every=1,
        model=ModelConfig(vocab_size=300, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(1.0, 0.0),
                          expert_hidden=32, dropout=0.1),
        data=DataConfig(source="text.jsonl", records="records", tokenizer="sentencepiece", train_tokenizer=300, context=32,
                        batch_size=8, validation_fraction=0.1),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(every=4),
        eval=EvalConfig(every=4, batches=2, sample_tokens=8),
    )
"""


def source(**changes):
    """The config's file, with some fields changed; a dot in a field's name is written as two underscores."""
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return f"{_SOURCE}    return override(config, {fields!r})\n"


def train_command(*flags):
    """The words that train tiny.py in its folder."""
    return [sys.executable, "-m", "slimmoe_jax.train", "--config", "tiny.py", "--compilation-cache", CACHE, *map(str, flags)]


def write(folder, config):
    """Writes tiny.py, which is the text `config`, and text.jsonl, and returns the folder."""
    (folder / "tiny.py").write_text(config)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder
