"""Exact causal attention by blocks of queries, in plain XLA: for float32, and wherever no fused kernel is to be had.

A block of queries sees only the keys up to its end, which spares almost half of the square, and the backward pass forms the
probabilities anew from the queries, the keys and each query's log-sum-exp, so that no layer keeps a [S, S] array
(FlashAttention, Dao et al., arXiv 2205.14135, section 3.1; here a block of keys is all of them up to the diagonal).

Axes: B batch, S sequence, K kv heads, G query heads a kv head, N = K G query heads, H head dimension, Q queries of a block,
T keys that the block sees, M = G Q.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# More blocks spare more of the square and take longer to compile; short blocks keep the cores less busy.
MOST_BLOCKS, SHORTEST_BLOCK = 8, 64

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


@jax.custom_vjp
def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(Q K^T / sqrt(H)) V over the keys up to each query; softmax in float32.

    Args:
      query: [B, S, N, H].
      key, value: [B, S, K, H]; query head n reads kv head n // G.
      mask: [B, 1, S, S] bool, True where attention is allowed beyond being causal. Each query must see itself.
    Returns: [B, S, N, H].
    """
    return _forward(query, key, value, mask)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Residuals]:
    q, k, v = _group(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    outs: list[jax.Array] = []
    log_sums: list[jax.Array] = []
    for first, end in blocks(q.shape[3]):
        q = _after(q, outs)
        scores = _scores(q, k, mask, first, end)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("BKGQT,BKTH->BKGQH", weights.astype(v.dtype), v[:, :, :end], preferred_element_type=jnp.float32)
        outs.append((out / total).astype(q.dtype))
        log_sums.append(highest + jnp.log(total))
    out = _ungroup(jnp.concatenate(outs, axis=3))
    return out, (q, k, v, mask, out, jnp.concatenate(log_sums, axis=3))


def _backward(residuals: Residuals, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, mask, out, log_sum = residuals
    along = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)  # sum_t P_t dP_t of each query
    grad, along = _group(grad, k.shape[1]), _group(along, k.shape[1])
    d_query: list[jax.Array] = []
    d_key = d_value = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]), jnp.float32)  # [B, K, H, S], see `_over_queries`
    for first, end in blocks(q.shape[3]):
        rows = slice(first, end)
        q = _after(q, d_query)
        probabilities = jnp.exp(_scores(q, k, mask, first, end) - log_sum[..., rows, :])
        d_probabilities = jnp.einsum("BKGQH,BKTH->BKGQT", grad[..., rows, :], v[:, :, :end], preferred_element_type=jnp.float32)
        d_scores = (probabilities * (d_probabilities - along[..., rows, :])).astype(q.dtype)
        d_query.append(jnp.einsum("BKGQT,BKTH->BKGQH", d_scores, k[:, :, :end]))
        d_key = d_key.at[..., :end].add(_over_queries(d_scores, q[..., rows, :]))
        d_value = d_value.at[..., :end].add(_over_queries(probabilities.astype(v.dtype), grad[..., rows, :]))
    scale = q.shape[-1] ** -0.5
    d_query_whole = jnp.concatenate(d_query, axis=3) * scale
    d_key, d_value = (d_key * scale).astype(k.dtype), d_value.astype(v.dtype)
    return _ungroup(d_query_whole), d_key.transpose(0, 3, 1, 2), d_value.transpose(0, 3, 1, 2), None


causal_attention.defvjp(_forward, _backward)


def blocks(length: int) -> list[tuple[int, int]]:
    """The first query of each block, and the one after its last."""
    size = max(SHORTEST_BLOCK, -(-length // MOST_BLOCKS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _after(x: jax.Array, done: list[jax.Array]) -> jax.Array:
    """x, but not before the last of `done` is there: of several blocks at once, all scores would be held at once."""
    return jax.lax.optimization_barrier((x, done[-1]))[0] if done else x


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array | None, first: int, end: int) -> jax.Array:
    """The scaled scores [B, K, G, Q, T] float32 of a block's queries, -inf where they may not look."""
    scores = jnp.einsum("BKGQH,BKTH->BKGQT", q[..., first:end, :], k[:, :, :end], preferred_element_type=jnp.float32)
    queries = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 3)
    allowed = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 4) <= queries
    if mask is not None:
        allowed &= mask[:, :, None, first:end, :end]
    return jnp.where(allowed, scores * q.shape[-1] ** -0.5, -jnp.inf)


def _over_queries(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """[B, K, G, Q, T] and [B, K, G, Q, H] -> [B, K, H, T] float32.

    With one contracted axis and T last, a CPU needs no transposed copy of the weights.
    """
    weights, rows = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (weights, rows))  # G Q as one axis
    return jnp.einsum("BKMH,BKMT->BKHT", rows, weights, preferred_element_type=jnp.float32)


def _group(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, S, N, H] -> [B, K, G, S, H]."""
    batch, length, heads, size = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)


def _ungroup(x: jax.Array) -> jax.Array:
    """[B, K, G, S, H] -> [B, S, N, H]."""
    batch, _, _, length, size = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, size)
