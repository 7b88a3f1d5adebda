"""Generation: prefill, then cached decoding, for one prompt or a batch of them.

`python -m slimmoe_jax.generate --checkpoint runs/quickstart --prompt "The function returns"`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimmoe_jax import checkpoint, cli, sharding, state
from slimmoe_jax.attention import KVCache
from slimmoe_jax.config import InputError, MeshConfig
from slimmoe_jax.data import tokenizers
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState


def pad_left(prompts: Sequence[Sequence[int]], multiple: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> tokens and positions, each [B, P] int32, padded on the left to a common length.

    The length is rounded up to `multiple`, so that prompts of similar length share a compiled program.
    """
    longest = max(len(prompt) for prompt in prompts)
    width = -(-longest // multiple) * multiple
    tokens, positions = np.zeros((len(prompts), width), np.int32), np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


@functools.partial(jax.jit, static_argnames=("model", "new_tokens", "end_token"))
def decode(
    model: SlimMoE, params: Any, router: RouterState, tokens: jax.Array, positions: jax.Array, key: jax.Array,
    temperature: jax.Array, *, new_tokens: int, end_token: int,
) -> jax.Array:  # fmt: skip
    """Continues each prompt by `new_tokens` tokens; after an end token come only end tokens.

    Args:
      tokens, positions: [B, P] from `pad_left`.
      temperature: []; 0 takes the likeliest token.
    Returns: [B, new_tokens] int32.
    """
    batch, prompt_length = tokens.shape
    cache = KVCache.empty(model.config, batch, prompt_length + new_tokens, model.dtype)
    out = model.apply({"params": params}, tokens, router, positions=positions, cache=cache)

    def pick(logits: jax.Array, key: jax.Array) -> jax.Array:
        sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, sampled, jnp.argmax(logits, axis=-1)).astype(jnp.int32)

    def body(carry, key):
        cache, token, position, done = carry
        token = jnp.where(done, end_token, token)
        done |= token == end_token
        out = model.apply({"params": params}, token[:, None], router, positions=position[:, None], cache=cache)
        return (out.cache, pick(out.logits()[:, -1], key), position + 1, done), token

    first_key, *_ = keys = jax.random.split(key, new_tokens + 1)
    last = out.replace(hidden=out.hidden[:, -1:]).logits()[:, -1]
    carry = (out.cache, pick(last, first_key), positions[:, -1] + 1, jnp.zeros(batch, bool))
    _, generated = jax.lax.scan(body, carry, keys[1:])
    return generated.T


def sample_text(
    model: SlimMoE, params: Any, router: RouterState, tokenizer: tokenizers.Tokenizer, prompt: str,
    *, new_tokens: int, temperature: float, seed: int = 0,
) -> str:  # fmt: skip
    """The prompt and its continuation, up to the end token.

    Raises:
      InputError: the prompt is empty.
    """
    ids = list(tokenizer.encode(prompt))
    if not ids:
        raise InputError("the prompt is empty: give at least one character")
    tokens, positions = pad_left([ids])
    generated = decode(
        model, params, router, jnp.asarray(tokens), jnp.asarray(positions), jax.random.key(seed), jnp.float32(temperature),
        new_tokens=new_tokens, end_token=tokenizer.end_token,
    )  # fmt: skip
    continuation = [int(token) for token in jax.device_get(generated)[0]]
    if tokenizer.end_token in continuation:
        continuation = continuation[: continuation.index(tokenizer.end_token)]
    return tokenizer.decode(ids + continuation)


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    checkpoint: str = ""  # folder of a run (its newest weights), RUN/STEP or RUN/best
    prompt: str = "The"  # text to continue
    tokens: int = 100  # new tokens
    temperature: float = 0.8  # 0: greedy
    seed: int = 0


def main(argv: Sequence[str]) -> None:
    args = cli.parse(GenerateArgs, argv, prog="generate", description="Continues a prompt.", default=GenerateArgs())
    if not args.checkpoint:
        raise InputError("--checkpoint is missing: give the folder of a training run")
    run = checkpoint.load_run(args.checkpoint, sharding.make_mesh(MeshConfig()))
    text = sample_text(
        state.build_model(run.config), run.params, run.router, tokenizers.saved(run.directory), args.prompt,
        new_tokens=args.tokens, temperature=args.temperature, seed=args.seed,
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    cli.run(main)
