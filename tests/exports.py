"""A run with random weights, as training leaves one, for the tests of conversion and of what it writes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimmoe_jax import checkpoint, model
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import ModelConfig, RouterConfig
from slimmoe_jax.data import stdlib, tokenizers
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState

MODEL = ModelConfig(
    vocab_size=600, layers=2, width=32, heads=4, head_dim=8, kv_heads=(4, 2), rotary=(1.0, 0.0), expert_hidden=24, dropout=0.1,
    init_std=0.3, router=RouterConfig(threshold=0.5),
)  # fmt: skip


def make_pieces(path):
    """A small SentencePiece vocabulary."""
    tokenizers.train_sentencepiece(stdlib.texts(with_sources=False)[:60], 600, path)
    return tokenizers.load(str(path))


def make_run(folder, config, tokenizer, step=7):
    """Random weights, and controllers that have moved."""
    params = nn.unbox(jax.jit(lambda key: model.init(SlimMoE(config.model), key))(jax.random.key(1)))
    router = RouterState.initial(config.model).replace(
        threshold=jnp.float32(0.47), integral=jnp.float32(-3.7), l1_weight=jnp.float32(3.3e-6)
    )
    folder.mkdir()
    config_lib.save(config, folder / "config.json")
    tokenizers.save(tokenizer, folder)
    checkpoints = checkpoint.Checkpoints(folder, config)
    checkpoints.save_weights(step, params, router, config)
    checkpoints.close()
    return folder
