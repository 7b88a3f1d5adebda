"""Sampling: from logits to the next token.

Axes: B batch, V vocabulary.

The settings are traced values, not constants of the program, so changing one compiles nothing. Filters apply in the order of
transformers' logits processors, each to what the ones before it left:

- repetition penalty (CTRL, Keskar et al., arXiv 1909.05858), also of greedy decoding
- temperature
- top-k: the k likeliest
- top-p (Holtzman et al., arXiv 1904.09751): the fewest likeliest tokens whose probabilities sum to p
- min-p (Nguyen et al., arXiv 2407.01082): those at least min_p times as probable as the likeliest
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from slimmoe_jax.config import InputError, shown
from slimmoe_jax.validation import MOST, in_float32


class Sampling(struct.PyTreeNode):
    """How the next token is chosen."""

    temperature: jax.Array | float = 0.8  # 0: always the likeliest
    top_k: jax.Array | int = 0  # tokens; 0: off
    top_p: jax.Array | float = 1.0  # probability; 1: off
    min_p: jax.Array | float = 0.0  # share of the likeliest token's probability; 0: off
    repetition_penalty: jax.Array | float = 1.0  # 1: off


def check(sampling: Sampling) -> None:
    """Raises InputError, naming the flag, where a value has no meaning, or where float32 or int32 cannot hold it."""
    s = sampling
    if not _is_number(s.temperature) or s.temperature < 0:
        raise InputError(f"--temperature = {shown(s.temperature)}: give 0 (greedy) or more")
    check_whole("--top-k", s.top_k, 0, np.iinfo(np.int32).max, ", or 0 for no limit")
    if not _is_number(s.top_p) or not 0 < s.top_p <= 1:
        raise InputError(f"--top-p = {shown(s.top_p)}: give a probability above 0, at most 1 (off)")
    if not _is_number(s.min_p) or not 0 <= s.min_p <= 1:
        raise InputError(f"--min-p = {shown(s.min_p)}: give a share from 0 (off) to 1")
    if not _is_number(s.repetition_penalty) or s.repetition_penalty <= 0:
        raise InputError(f"--repetition-penalty = {shown(s.repetition_penalty)}: give a factor above 0; 1 is off")


def check_length(name: str, tokens: Any) -> None:
    """Raises InputError where no such number of tokens can be generated. `name` is that of the flag."""
    check_whole(name, tokens, 1, MOST["eval.sample_tokens"])


def check_seed(name: str, seed: Any) -> None:
    """Raises InputError where this is no seed. `name` is that of the flag."""
    check_whole(name, seed, 0, MOST["seed"])


def check_whole(name: str, value: Any, least: int, most: int, otherwise: str = "") -> None:
    """Raises InputError, naming the flag, where this is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name} = {shown(value)}: give a whole number{otherwise}")
    if value < least:
        raise InputError(f"{name} = {shown(value)}: give at least {least}{otherwise}")
    if value > most:
        raise InputError(f"{name} = {shown(value)}: give at most {most:,}{otherwise}")


def _is_number(value: Any) -> bool:
    """Whether this is a finite number that float32 can hold."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and in_float32(value)


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Lowers the logits [B, V] of tokens that were seen [B, V]: divided by the penalty, or multiplied where negative."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_likely(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """top-k, top-p and min-p: [B, V] with -inf where a token is ruled out. The likeliest token always stays.

    Tokens exactly as likely as the last one kept are kept as well.
    """

    def top(logits: jax.Array) -> jax.Array:
        ranked = jnp.sort(logits, axis=-1)  # ascending
        vocabulary = logits.shape[-1]
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary)
        least = jax.lax.dynamic_slice_in_dim(ranked, vocabulary - k, 1, axis=-1)  # [B, 1] the k-th likeliest
        ranked = jnp.where(ranked < least, -jnp.inf, ranked)
        below = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)  # mass of a token and all less likely ones
        kept = (below > 1 - sampling.top_p).at[:, -1].set(True)
        least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < least, -jnp.inf, logits)

    # Sorting a vocabulary costs more than a layer, so it is done only where something asks for it.
    logits = jax.lax.cond((sampling.top_k > 0) | (sampling.top_p < 1), top, lambda logits: logits, logits)
    relative = jnp.exp(logits - logits.max(axis=-1, keepdims=True))  # probability over the likeliest token's
    return jnp.where(relative < sampling.min_p, -jnp.inf, logits)


def choose(logits: jax.Array, seen: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """The next token of each row, [B] int32.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, tokens of the prompt and of what was generated.
      keys: [B] random keys, one a row, so that a row's choice does not depend on its neighbours.
    """
    logits = penalise(logits, seen, sampling.repetition_penalty)

    def sample(logits: jax.Array) -> jax.Array:
        likely = keep_likely(logits / jnp.maximum(sampling.temperature, 1e-6), sampling)
        return jax.vmap(jax.random.categorical)(keys, likely)

    greedy = functools.partial(jnp.argmax, axis=-1)
    return jax.lax.cond(sampling.temperature > 0, sample, greedy, logits).astype(jnp.int32)
