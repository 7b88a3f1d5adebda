"""Losses: tiled cross-entropy over the vocabulary, and the routers' auxiliary losses from global sums.

Axes: B batch, S sequence, D model, V vocabulary, E experts, N layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from slimmoe_jax.config import RouterConfig
from slimmoe_jax.routing import RouterState, RoutingStats

# Tokens whose logits exist at once. 8,192 x 50,257 in float32 is 1.5 GiB; smaller tiles cost nothing on a CPU.
TILE_TOKENS = 8_192

Residuals = tuple[jax.Array, jax.Array, jax.Array]  # gradients of hidden and head, loss of each token
# The vocabulary is padded to a multiple of this inside the loss: products with 50,257 columns miss a GPU's fast kernels.
VOCABULARY_MULTIPLE = 128


def _tiles(hidden: jax.Array, tile_tokens: int) -> int:
    """The number of tiles: the fewest that divide S evenly and hold at most `tile_tokens` tokens each, all rows of B in each.

    Tiles run along the sequence, so that a batch sharded over devices stays where it is.
    """
    batch, length = hidden.shape[:2]
    return next(n for n in range(1, length + 1) if length % n == 0 and (batch * length // n <= tile_tokens or n == length))


def _split(x: jax.Array, tiles: int) -> jax.Array:
    """[B, S, ...] -> [tiles, B, S / tiles, ...]."""
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, tiles, length // tiles, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """[tiles, B, S / tiles, ...] -> [B, S, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _padded(head: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[D, V] -> [D, V rounded up] of the type."""
    return jnp.pad(head.astype(dtype), ((0, 0), (0, -head.shape[1] % VOCABULARY_MULTIPLE)))


def _logits(hidden: jax.Array, head: jax.Array, vocabulary: int) -> jax.Array:
    """[B, S, D] and a padded head -> logits float32, -inf beyond the vocabulary."""
    logits = jnp.einsum("BSD,DV->BSV", hidden, head, preferred_element_type=jnp.float32)
    if head.shape[1] == vocabulary:
        return logits
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) < vocabulary, logits, -jnp.inf)


def _nll(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood [B, S] in nats, and the log of the partition function [B, S]."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def token_nll(hidden: jax.Array, head: jax.Array, targets: jax.Array, tile_tokens: int = TILE_TOKENS) -> jax.Array:
    """Negative log-likelihood of each target in nats, [B, S] float32, for evaluation.

    Args: as `cross_entropy`.
    """
    tiles, padded, vocabulary = _tiles(hidden, tile_tokens), _padded(head, hidden.dtype), head.shape[1]
    nll = jax.lax.map(lambda t: _nll(_logits(t[0], padded, vocabulary), t[1])[0], (_split(hidden, tiles), _split(targets, tiles)))
    return _join(nll)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_weight: float = 0.0,
    tile_tokens: int = TILE_TOKENS,
) -> jax.Array:
    """Weighted sum of cross-entropy in nats, without ever holding all logits.

    The gradient is formed tile by tile in the forward pass, while a tile's logits are there: no recomputation, and what
    is kept for the backward pass has the size of `hidden` and `head`.

    Args:
      hidden: [B, S, D] final hidden states, in whose type logits are formed.
      head: [D, V] output embedding; its gradient is summed over the tiles in float32 and returned in its own type.
      targets: [B, S] int32.
      weights: [B, S] float32; 0 leaves a token out.
      z_weight: adds z_weight * log(Z)^2 a token (PaLM, arXiv 2204.02311).
      tile_tokens: most tokens whose logits exist at once.
    Returns: [] float32, a sum: divide by the sum of the weights for a mean.
    """
    tiles, padded, vocabulary = _tiles(hidden, tile_tokens), _padded(head, hidden.dtype), head.shape[1]

    def tile_loss(tile: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        nll, log_z = _nll(_logits(tile[0], padded, vocabulary), tile[1])
        return jnp.sum((nll + z_weight * log_z**2) * tile[2])

    return jax.lax.map(tile_loss, (_split(hidden, tiles), _split(targets, tiles), _split(weights, tiles))).sum()


@jax.named_scope("cross_entropy")
def _cross_entropy_fwd(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, z_weight: float, tile_tokens: int
) -> tuple[jax.Array, Residuals]:
    tiles, padded, vocabulary = _tiles(hidden, tile_tokens), _padded(head, hidden.dtype), head.shape[1]

    def body(d_head: jax.Array, tile: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        h, target, weight = tile
        logits = _logits(h, padded, vocabulary)
        nll, log_z = _nll(logits, target)
        probabilities = jnp.exp(logits - log_z[..., None])
        scale = (weight * (1 + 2 * z_weight * log_z))[..., None]
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target[..., None]
        d_logits = (probabilities * scale - jnp.where(is_target, weight[..., None], 0)).astype(h.dtype)
        d_head += jnp.einsum("BSD,BSV->DV", h, d_logits, preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("BSV,DV->BSD", d_logits, padded)
        token_loss = nll + z_weight * log_z**2
        return d_head, (jnp.sum(token_loss * weight), d_hidden, token_loss)

    xs = (_split(hidden, tiles), _split(targets, tiles), _split(weights, tiles))
    d_head, (loss, d_hidden, token_loss) = jax.lax.scan(body, jnp.zeros(padded.shape, jnp.float32), xs)
    return loss.sum(), (_join(d_hidden), d_head[:, :vocabulary].astype(head.dtype), _join(token_loss))


@jax.named_scope("cross_entropy")
def _cross_entropy_bwd(
    z_weight: float, tile_tokens: int, residuals: Residuals, grad: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    d_hidden, d_head, token_loss = residuals
    # Scaled in float32: `grad` is 1 / tokens, which in bfloat16 would be off by up to 0.2%, the same way for all parameters.
    return (grad * d_hidden).astype(d_hidden.dtype), (grad * d_head).astype(d_head.dtype), None, grad * token_loss


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def balance_loss(stats: RoutingStats) -> jax.Array:
    """E sum_i f_i P_i, the mean over layers (Switch, arXiv 2101.03961, eq. 4; for top-k as in Mixtral).

    f_i is the share of tokens that chose expert i, P_i the mean router probability. At an even load it equals the mean
    number of experts a token.

    Args:
      stats: stacked sums [N, ...] over the batch that is to be balanced.
    """
    tokens = jnp.maximum(stats.tokens, 1)[:, None]
    share, probability = jax.lax.stop_gradient(stats.counts) / tokens, stats.score_sum / tokens
    return stats.counts.shape[-1] * jnp.mean(jnp.sum(share * probability, axis=-1))


def relu_l1_loss(stats: RoutingStats, balanced: bool) -> jax.Array:
    """Mean sum of a token's gates, the mean over layers; with `balanced`, gates of busier experts weigh more.

    ReMoE (arXiv 2412.14711), eq. 7 and, balanced, eq. 11.
    """
    tokens = jnp.maximum(stats.tokens, 1)[:, None]
    counts = jax.lax.stop_gradient(stats.counts)
    weight = counts / jnp.maximum(counts.mean(axis=-1, keepdims=True), 1) if balanced else 1.0
    return jnp.mean(jnp.sum(weight * stats.score_sum / tokens, axis=-1))


def router_z_loss(stats: RoutingStats) -> jax.Array:
    """Mean squared log-partition of the router logits, the mean over layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return jnp.mean(stats.z_sum / jnp.maximum(stats.tokens, 1))


def router_losses(stats: RoutingStats, state: RouterState, config: RouterConfig) -> dict[str, jax.Array]:
    """The weighted auxiliary losses that the config asks for, by name, each []."""
    losses = {}
    balanced = config.balance in ("aux", "aux_micro")
    if config.kind == "relu":
        losses["l1_loss"] = state.l1_weight * relu_l1_loss(stats, balanced)
    elif balanced:
        losses["balance_loss"] = config.balance_weight * balance_loss(stats)
    if config.z_weight:
        losses["router_z_loss"] = config.z_weight * router_z_loss(stats)
    return losses
