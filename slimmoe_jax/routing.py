"""Routing: from router scores to gates, a mask, statistics, and the state that balances and controls the router.

Axes: ... any token axes (B, S), T their number, E experts, K `max_experts`, N layers.

A router is stateless inside a step. What moves between steps (the top-p threshold, selection biases, the ReLU router's
L1 weight) is `RouterState`, which belongs to the training state and to the weights: evaluation, generation and export
use its last value. All quantities are float32. No token's routing depends on another token's.

Sources: top-k gating, Shazeer et al. (arXiv 1701.06538); top-p, Huang et al. (arXiv 2403.07652); a global p held by a
PI controller, arXiv 2512.13996; selection bias without an auxiliary loss, Wang et al. (arXiv 2408.15664); ReLU
routing, ReMoE (arXiv 2412.14711); balance over the global batch, Qiu et al. (arXiv 2501.11873).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from slimmoe_jax.config import ModelConfig, RouterConfig

# An expert with less than this share of an even load counts as dead.
DEAD_BELOW = 0.01
# The ReLU router's L1 weight goes no lower. It does nothing there already; a target that is not reached for hundreds of steps would
# otherwise take it to where as many are needed to come back, and in the end to 0, from where no factor leads.
L1_LEAST = 1e-12
QUARTERS = 4  # parts of a sequence by which drops are counted: where capacity is short they grow with the position


class RouterState(struct.PyTreeNode):
    """What the controllers hold between steps."""

    threshold: jax.Array  # [] the probability mass p of top_p
    integral: jax.Array  # [] the PI controller's summed error, experts a token x steps
    bias: jax.Array  # [N, E] added to the scores for selection only
    l1_weight: jax.Array  # [] weight of the ReLU router's L1 loss

    @classmethod
    def initial(cls, config: ModelConfig) -> RouterState:
        return cls(
            threshold=jnp.float32(config.router.threshold),
            integral=jnp.float32(0),
            bias=jnp.zeros((config.layers, config.experts), jnp.float32),
            l1_weight=jnp.float32(config.router.l1_initial),
        )


class RoutingStats(struct.PyTreeNode):
    """Sums over tokens, so that devices and micro-batches add up to the global batch. Stacked, each has a leading [N]."""

    tokens: jax.Array  # [] tokens routed, padding left out
    counts: jax.Array  # [E] tokens that chose each expert
    score_sum: jax.Array  # [E] sum of router probabilities (of gates, for the ReLU router)
    z_sum: jax.Array  # [] sum of logsumexp(logits)^2
    entropy_sum: jax.Array  # [] sum of the router distribution's entropy, nats
    histogram: jax.Array  # [K + 1] tokens by number of experts chosen
    choices: jax.Array  # [4] choices of experts by quarter of the sequence
    dropped: jax.Array  # [4] those of them that found their expert full
    logit_max: jax.Array  # [] largest absolute router logit; a maximum, not a sum

    def __add__(self, other: RoutingStats) -> RoutingStats:
        total = jax.tree.map(jnp.add, self, other)
        return total.replace(logit_max=jnp.maximum(self.logit_max, other.logit_max))


class Routing(struct.PyTreeNode):
    """The decision for a set of tokens."""

    gates: jax.Array  # [..., E] float32, 0 where not chosen
    mask: jax.Array  # [..., E] bool
    stats: RoutingStats


def route(
    logits: jax.Array, config: RouterConfig, threshold: jax.Array, bias: jax.Array, valid: jax.Array | None = None
) -> Routing:
    """Chooses at most `max_experts` experts for each token.

    Args:
      logits: [..., E] float32 router outputs.
      threshold: [] p of top_p.
      bias: [E] selection bias of this layer; it decides who is chosen, never the gate.
      valid: [...] bool, False for padding, which is routed but not counted.
    """
    if config.kind == "relu":
        scores = jax.nn.relu(logits)
        order_by = logits
    else:
        scores = jax.nn.softmax(logits, axis=-1)
        order_by = scores + jnp.broadcast_to(jax.lax.stop_gradient(bias), scores.shape)
    mask = _choose(order_by, scores, config, threshold)
    gates = jnp.where(mask, scores, 0.0)
    if config.renormalize:
        gates = gates / jnp.maximum(gates.sum(axis=-1, keepdims=True), 1e-9)
    return Routing(gates, mask, _stats(logits, scores, mask, config, valid))


def _choose(order_by: jax.Array, scores: jax.Array, config: RouterConfig, threshold: jax.Array) -> jax.Array:
    """The mask [..., E] of chosen experts. For top_p: the fewest experts, best first, whose scores sum to p."""
    experts = order_by.shape[-1]
    one_hot = jax.nn.one_hot(_rank(order_by), min(config.max_experts, experts), axis=-2, dtype=bool)  # [..., K, E]
    best = jnp.sum(jnp.where(one_hot, scores[..., None, :], 0.0), axis=-1)  # [..., K]
    if config.kind == "top_k":
        keep = jnp.ones(best.shape, bool)
    elif config.kind == "top_p":
        before = jnp.cumsum(best, axis=-1) - best  # mass of the experts ranked above
        keep = (before < threshold).at[..., 0].set(True)
    else:
        keep = best > 0
    return jnp.any(one_hot & keep[..., None], axis=-2)


def _rank(x: jax.Array) -> jax.Array:
    """[..., E] -> [..., E] int32, how many are higher, or as high and before. E is small, and no partitioner splits a top-k."""
    shape = (*x.shape, x.shape[-1])
    this, other = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (x.ndim - 1, x.ndim))
    ahead = (x[..., None, :] > x[..., :, None]) | ((x[..., None, :] == x[..., :, None]) & (other < this))
    return ahead.sum(axis=-1, dtype=jnp.int32)


def _stats(logits: jax.Array, scores: jax.Array, mask: jax.Array, config: RouterConfig, valid: jax.Array | None) -> RoutingStats:
    valid = jnp.ones(mask.shape[:-1], bool) if valid is None else valid
    weight = valid.astype(jnp.float32)
    tokens = tuple(range(mask.ndim - 1))
    chosen = jnp.sum(mask, axis=-1)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
    z = jax.nn.logsumexp(logits, axis=-1) ** 2
    bins = jax.nn.one_hot(chosen, config.max_experts + 1)
    return RoutingStats(
        tokens=weight.sum(),
        counts=jnp.sum(mask * weight[..., None], axis=tokens),
        score_sum=jnp.sum(scores * weight[..., None], axis=tokens),
        z_sum=jnp.sum(z * weight),
        entropy_sum=jnp.sum(entropy * weight),
        histogram=jnp.sum(bins * weight[..., None], axis=tokens),
        choices=jnp.zeros(QUARTERS),
        dropped=jnp.zeros(QUARTERS),
        logit_max=jnp.max(jnp.where(valid[..., None], jnp.abs(logits), 0.0)),
    )


def by_quarter(choices: jax.Array) -> jax.Array:
    """[B, S, E] bool -> [4] float32, how many are True in each quarter of the sequence."""
    by_place = choices.sum(axis=(0, 2), dtype=jnp.float32)
    quarter = jnp.arange(by_place.size) * QUARTERS // by_place.size
    return jax.nn.one_hot(quarter, QUARTERS, axis=0) @ by_place


def update(state: RouterState, stats: RoutingStats, config: RouterConfig) -> RouterState:
    """The router state after a training step, from the step's stacked statistics ([N, ...])."""
    mean_experts = stats.counts.sum() / jnp.maximum(stats.tokens.sum(), 1)
    if config.balance == "bias":
        mean_load = stats.counts.mean(axis=-1, keepdims=True)
        state = state.replace(bias=state.bias + config.bias_rate * jnp.sign(mean_load - stats.counts))
    if config.target_experts and config.kind == "top_p":
        state = _control_threshold(state, config.target_experts - mean_experts, config)
    if config.target_experts and config.kind == "relu":
        direction = jnp.sign(mean_experts - config.target_experts)
        least = min(L1_LEAST, config.l1_initial)
        state = state.replace(l1_weight=jnp.maximum(state.l1_weight * config.l1_factor**direction, least))
    return state


def _control_threshold(state: RouterState, error: jax.Array, config: RouterConfig) -> RouterState:
    """p = p0 + Kp error + Ki sum(error), in [0, 1]. The sum stops where p would leave that range (no wind-up)."""
    settled = config.threshold + config.integral_gain * (state.integral + error)
    integral = jnp.where((settled >= 0) & (settled <= 1), state.integral + error, state.integral)
    threshold = config.threshold + config.proportional_gain * error + config.integral_gain * integral
    return state.replace(threshold=jnp.clip(threshold, 0.0, 1.0), integral=integral)


def metrics(stats: RoutingStats) -> dict[str, jax.Array]:
    """What to watch, by layer, from stacked statistics. Each [N], except load [N, E], histogram [N, K + 1] and quarters [N, 4]."""
    experts = stats.counts.shape[-1]
    chosen = jnp.maximum(stats.counts.sum(axis=-1), 1)
    tokens = jnp.maximum(stats.tokens, 1)
    load = stats.counts / chosen[..., None]
    return {
        "load": load,
        "load_entropy": -jnp.sum(jax.scipy.special.xlogy(load, load), axis=-1) / jnp.log(experts),
        "max_violation": experts * load.max(axis=-1) - 1,
        "dropped": stats.dropped.sum(axis=-1) / chosen,
        "dropped_by_quarter": stats.dropped / jnp.maximum(stats.choices, 1),
        "experts_per_token": stats.counts.sum(axis=-1) / tokens,
        "experts_histogram": stats.histogram / tokens[..., None],
        "router_entropy": stats.entropy_sum / tokens,
        "dead_experts": jnp.sum(experts * load < DEAD_BELOW, axis=-1),
        "logit_max": stats.logit_max,
    }
