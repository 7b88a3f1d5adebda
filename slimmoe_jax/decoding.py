"""Decoding: prompts are read at once, then a cached token at a time; prompts and continuations as text.

Axes: B batch, P prompt length with padding, R room for new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from slimmoe_jax import sampling, sharding
from slimmoe_jax.attention import KVCache
from slimmoe_jax.config import InputError
from slimmoe_jax.data import chat
from slimmoe_jax.data.chat import Turn
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.likelihood import rounded
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState
from slimmoe_jax.sampling import Sampling

# Lengths are rounded up, so that a program is compiled for a few lengths and not for each: prompts to a power of two from SHORTEST
# (a chat's prompts grow turn by turn), new tokens and the cache to a multiple of ROOM, and to fewer of these where they are many.
SHORTEST = 16
ROOM = 64


class Weights(NamedTuple):
    """A model and what it needs to run."""

    model: SlimMoE
    params: Any
    router: RouterState
    end_token: int  # with which a continuation ends; -1: none does


def cast_once(params: Any, dtype: jnp.dtype) -> Any:
    """Matrices in the type that the model computes in, so that not every step casts them. Router and norms stay in float32."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].key in ("router", "scale") else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


class Decoding(struct.PyTreeNode):
    """Where a batch stands. The last token of each row is chosen but has not been through the model yet."""

    cache: KVCache
    tokens: jax.Array  # [B, R] int32 generated; end tokens where there is nothing yet, or nothing more
    count: jax.Array  # [] int32 columns of `tokens` in use
    positions: jax.Array  # [B] int32 position of the next token
    done: jax.Array  # [B] bool, the end token has come
    seen: jax.Array  # [B, V] bool, tokens of the prompt and generated
    keys: jax.Array  # [B] random keys


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> tokens and positions, each [B, P] int32, padded on the left; padding has position -1."""
    longest = max(len(prompt) for prompt in prompts)
    width = max(SHORTEST, 1 << (longest - 1).bit_length())
    tokens, positions = np.zeros((len(prompts), width), np.int32), np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


@functools.partial(jax.jit, static_argnames=("model", "room", "end_token"))
def prefill(
    model: SlimMoE, params: Any, router: RouterState, tokens: jax.Array, positions: jax.Array, settings: Sampling,
    seed: jax.Array, *, room: int, end_token: int,
) -> Decoding:  # fmt: skip
    """Runs the prompts, [B, P] from `pad_left`, and chooses the first token of each. R = `room`, a multiple of ROOM."""
    batch, length = tokens.shape
    length = rounded(length, ROOM)  # prompts of all lengths up to it then share the decoding program
    rows = jnp.arange(batch)
    cache = KVCache.empty(model.config, batch, length + room, model.dtype)
    out = model.apply({"params": params}, tokens, router, positions=positions, cache=cache)
    seen = jnp.zeros((batch, model.config.vocab_size), bool).at[rows[:, None], tokens].max(positions >= 0)
    start = Decoding(
        cache=out.cache,
        tokens=jnp.full((batch, room), end_token, jnp.int32),
        count=jnp.int32(0),
        positions=positions[:, -1] + 1,
        done=jnp.zeros(batch, bool),
        seen=seen,
        keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows),
    )
    return _append(start, out.replace(hidden=out.hidden[:, -1:]).logits()[:, 0], settings, end_token)


@functools.partial(jax.jit, static_argnames=("model", "end_token"), donate_argnames="decoding")
def decode(
    model: SlimMoE, params: Any, router: RouterState, decoding: Decoding, settings: Sampling, limit: jax.Array,
    *, end_token: int,
) -> Decoding:  # fmt: skip
    """Goes on until each row has `limit` tokens (at most R) or all have ended. The argument's buffers are used up."""

    def step(d: Decoding) -> Decoding:
        last = jax.lax.dynamic_slice_in_dim(d.tokens, d.count - 1, 1, axis=1)
        out = model.apply({"params": params}, last, router, positions=d.positions[:, None], cache=d.cache)
        d = d.replace(cache=out.cache, positions=d.positions + 1)
        return _append(d, out.logits()[:, 0], settings, end_token)

    return jax.lax.while_loop(lambda d: (d.count < limit) & ~d.done.all(), step, decoding)


def _append(d: Decoding, logits: jax.Array, settings: Sampling, end_token: int) -> Decoding:
    """Chooses each row's next token from its logits [B, V]; a row that has ended stays ended."""
    # The key depends on the row and the place alone: how many tokens a call decodes changes nothing.
    keys = jax.vmap(jax.random.fold_in, (0, None))(d.keys, d.count)
    token = jnp.where(d.done, end_token, sampling.choose(logits, d.seen, settings, keys))
    return d.replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(d.tokens, token[:, None], d.count, axis=1),
        count=d.count + 1,
        done=d.done | (token == end_token),
        seen=d.seen.at[jnp.arange(token.size), token].set(True),
    )


def generate_tokens(
    weights: Weights, prompts: Sequence[Sequence[int]], settings: Sampling, *, new_tokens: int, seed: int, chunk: int = 0
) -> Iterator[np.ndarray]:
    """Continues prompts, none empty, by at most `new_tokens` tokens; stops when each has come to its end token.

    Args:
      chunk: tokens a step of the iterator; 0: all at once. The tokens are the same whatever it is.
    Yields: [B, chunk] int32, fewer in the last. After a row's end token come end tokens only.
    Raises:
      InputError: no new token is asked for.
    """
    if new_tokens < 1:
        raise InputError(f"tokens = {new_tokens}: give at least 1")
    model, params, router, end_token = weights
    room = rounded(new_tokens, ROOM)
    d = prefill(model, params, router, *pad_left(prompts), settings, np.uint32(seed % 2**32), room=room, end_token=end_token)
    given, limit = 0, min(chunk, 1) or new_tokens  # the first token is ready: it is not kept waiting for the next
    while True:
        d = decode(model, params, router, d, settings, np.int32(limit), end_token=end_token)
        tokens, count, done = sharding.fetch((d.tokens, d.count, d.done))
        yield tokens[:, given:count]
        if done.all() or count >= new_tokens:
            return
        given, limit = int(count), min(limit + chunk, new_tokens)


def until_end(tokens: Sequence[int], end_token: int) -> list[int]:
    """The tokens before the first end token."""
    tokens = [int(token) for token in tokens]
    return tokens[: tokens.index(end_token)] if end_token in tokens else tokens


def generate_batch(
    weights: Weights, prompts: Sequence[Sequence[int]], settings: Sampling, *, new_tokens: int, seed: int
) -> list[list[int]]:
    """The continuation of each prompt, up to its end token."""
    (tokens,) = generate_tokens(weights, prompts, settings, new_tokens=new_tokens, seed=seed)
    return [until_end(row, weights.end_token) for row in tokens]


def stream_tokens(
    weights: Weights, prompt: Sequence[int], settings: Sampling, *, new_tokens: int, seed: int
) -> Iterator[int]:  # fmt: skip
    """The continuation of one prompt, token by token, up to the end token."""
    for chunk in generate_tokens(weights, [prompt], settings, new_tokens=new_tokens, seed=seed, chunk=1):
        yield from until_end(chunk[0], weights.end_token)


# --- text ------------------------------------------------------------------------------------------------------------


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt.

    Raises:
      InputError: there are none.
    """
    ids = list(tokenizer.encode(text))
    if not ids:
        raise InputError("the prompt is empty: give at least one character")
    return ids


def newest(ids: list[int], context: int, new_tokens: int) -> list[int]:
    """A prompt as the model takes it: whole if the context holds it, else its newest tokens that leave room for `new_tokens`.

    Half of the context stays in any case, however many tokens are asked for.
    """
    return ids if len(ids) <= context else ids[-max(context - new_tokens, context // 2, 1) :]


def sample_text(
    model: SlimMoE, params: Any, router: RouterState, tokenizer: Tokenizer, prompt: str,
    *, new_tokens: int, temperature: float, seed: int = 0, as_chat: bool = False,
) -> str:  # fmt: skip
    """The prompt and its continuation, up to the end token.

    Args:
      as_chat: the prompt is a user's turn, which the continuation answers.

    Raises:
      InputError: the prompt is empty.
    """
    ids = chat.encode_prompt([Turn("user", prompt)], tokenizer) if as_chat else encode_text(prompt, tokenizer)
    weights, settings = Weights(model, params, router, tokenizer.end_token), Sampling(temperature=float(temperature))
    (continuation,) = generate_batch(weights, [ids], settings, new_tokens=new_tokens, seed=seed)
    return tokenizer.decode(ids + continuation)
