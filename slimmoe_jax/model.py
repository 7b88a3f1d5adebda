"""SlimMoE: a decoder of pre-norm blocks, each with variable grouped-query attention and a mixture of experts.

Axes: B batch, S sequence, L cache length, D model, E experts, F expert hidden, V vocabulary, N layers.

The model is a pure function of parameters, router state, tokens and a dropout key. Layers are unrolled in Python,
because they differ in kv heads and rotary fraction. Axis names are logical; `sharding` maps them to a mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from slimmoe_jax import attention, experts, routing
from slimmoe_jax.attention import KVCache
from slimmoe_jax.config import ModelConfig
from slimmoe_jax.dropout import Dropout
from slimmoe_jax.embedding import lookup
from slimmoe_jax.experts import ExpertWeights
from slimmoe_jax.norm import RMSNorm
from slimmoe_jax.routing import RouterState, Routing, RoutingStats


class Output(struct.PyTreeNode):
    """What the model returns. Logits are left to the caller, since training never holds them all."""

    hidden: jax.Array  # [B, S, D] after the last norm
    head: jax.Array  # [D, V] float32; logits are formed in the type of `hidden`
    stats: RoutingStats | None  # stacked [N, ...]; None for a dense model
    chosen: jax.Array | None  # [N, B, S, E] bool, the experts of each token; None for a dense model
    cache: KVCache | None

    def logits(self) -> jax.Array:
        """[B, S, V] float32."""
        head = self.head.astype(self.hidden.dtype)
        return jnp.einsum("BSD,DV->BSV", self.hidden, head, preferred_element_type=jnp.float32)


class FeedForward(nn.Module):
    """A mixture of experts, or one dense feed-forward layer where there is one expert."""

    config: ModelConfig
    method: experts.Dispatch
    route: Callable[..., Routing] = routing.route

    @nn.compact
    def __call__(
        self, x: jax.Array, threshold: jax.Array, bias: jax.Array, segments: jax.Array | None, valid: jax.Array | None, train: bool
    ) -> tuple[jax.Array, RoutingStats | None, jax.Array | None]:
        """[B, S, D] -> [B, S, D], the layer's routing statistics, and who was chosen, [B, S, E]."""
        c = self.config
        if c.is_moe:
            # The router works in float32 at full precision: a rounded score flips choices.
            init = nn.with_logical_partitioning(nn.initializers.normal(c.init_std), ("embed", None))
            router = self.param("router", init, (c.width, c.experts))
            with jax.named_scope("router"):
                logits = jax.checkpoint(_router_logits)(x, router)  # keeps x as it is, not in float32
                routed = self.route(logits, c.router, threshold, bias, valid)
            gates, mask = routed.gates, routed.mask
        else:
            gates, mask = jnp.ones((*x.shape[:2], 1), jnp.float32), jnp.ones((*x.shape[:2], 1), bool)
        dropout = Dropout(c.dropout, train).draw()
        sent = mask if valid is None else mask & valid[..., None]  # padding takes no slot and no time
        y, dropped = experts.apply_experts(
            x, gates, sent, self._weights(), method=self.method, config=c, segments=segments, dropout=dropout
        )
        if not c.is_moe:
            return y, None, None
        return y, routed.stats.replace(choices=routing.by_quarter(sent), dropped=routing.by_quarter(dropped)), mask

    def _weights(self) -> ExpertWeights:
        c = self.config
        inner = nn.initializers.normal(c.init_std)
        residual = nn.initializers.normal(c.init_std / (2 * c.layers) ** 0.5)

        def weight(name: str, init: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
            return self.param(name, nn.with_logical_partitioning(init, axes), shape)

        into, out_of = (c.experts, c.width, c.expert_hidden), (c.experts, c.expert_hidden, c.width)
        return ExpertWeights(
            up=weight("up", inner, into, ("expert", "embed", "mlp")),
            down=weight("down", residual, out_of, ("expert", "mlp", "embed")),
            gate=weight("gate", inner, into, ("expert", "embed", "mlp")) if c.gated else None,
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)), with dropout on both."""

    config: ModelConfig
    layer: int
    kernel: attention.Kernel
    method: experts.Dispatch
    train: bool
    attention_type: type[attention.Attention]
    route: Callable[..., Routing]

    @nn.compact
    def __call__(
        self, x: jax.Array, state: RouterState, positions: jax.Array, mask: jax.Array | None, segments: jax.Array | None,
        valid: jax.Array | None, cached: tuple[jax.Array, jax.Array] | None, start: jax.Array | int,
    ) -> tuple[jax.Array, RoutingStats | None, jax.Array | None, tuple[jax.Array, jax.Array]]:  # fmt: skip
        c = self.config
        dropout = Dropout(c.dropout, self.train)
        y, keys_values = self.attention_type(
            c, c.layer_kv_heads[self.layer], c.layer_rotary[self.layer], self.kernel, name="attention"
        )(RMSNorm(c.norm_epsilon, name="attention_norm")(x), positions, mask, cached, start)
        x = x + dropout(y)
        y, stats, chosen = FeedForward(c, self.method, self.route, name="experts")(
            RMSNorm(c.norm_epsilon, name="experts_norm")(x), state.threshold, state.bias[self.layer], segments, valid, self.train
        )
        return nn.with_logical_constraint(x + dropout(y), ("batch", None, None)), stats, chosen, keys_values


class SlimMoE(nn.Module):
    """The language model.

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters are float32 always. Norms, rotation, softmax and router stay in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
      attention_type: the attention of every layer; a subclass stands in for it.
      route: the router, from scores to a `Routing`; a function with the signature of `routing.route` stands in for it.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    attention_type: type[attention.Attention] = attention.Attention
    route: Callable[..., Routing] = routing.route

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        state: RouterState,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        valid: jax.Array | None = None,
        cache: KVCache | None = None,
        train: bool = False,
    ) -> Output:
        """Runs the model; with `train`, dropout needs a key: `apply(..., rngs={"dropout": key})`.

        Args:
          tokens: [B, S] int32.
          state: router state, the one that training left behind when not training.
          positions: [B, S] int32; counted from 0 unless given. With a cache, -1 marks padding, which nothing attends to.
          segments: [B, S] int32; a token attends only within its own segment. Not together with a cache.
          valid: [B, S] bool; padding, False, is left out of the routing statistics.
          cache: keys and values so far, which S more tokens are appended to. The caller sees to it that they fit.
        """
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        embedding = self.param("embedding", nn.with_logical_partitioning(normal, ("vocab", "embed")), (c.vocab_size, c.width))
        if c.tie_embeddings:
            head = embedding.T
        else:
            head = self.param("head", nn.with_logical_partitioning(normal, ("embed", "vocab")), (c.width, c.vocab_size))
        if positions is None:
            positions = jnp.arange(tokens.shape[1]) + (0 if cache is None else cache.length)
            positions = jnp.broadcast_to(positions, tokens.shape)
        mask, cache = _attention_mask(positions, segments, cache)

        x = lookup(embedding, tokens).astype(self.dtype)  # in this order, so that the gradient is summed in float32
        x = Dropout(c.dropout, train)(nn.with_logical_constraint(x, ("batch", None, None)))
        block = nn.remat(Block) if self.remat and train else Block
        kernel = attention.resolve_kernel(c, self.dtype)
        method = experts.resolve_dispatch(c, train)
        all_stats, all_chosen, keys, values = [], [], [], []
        for layer in range(c.layers):
            cached = None if cache is None else (cache.keys[layer], cache.values[layer])
            start = 0 if cache is None else cache.length
            parts = (kernel, method, train, self.attention_type, self.route)
            x, stats, chosen, (k, v) = block(c, layer, *parts, name=f"layer_{layer}")(
                x, state, jnp.maximum(positions, 0), mask, segments, valid, cached, start
            )
            all_stats.append(stats)
            all_chosen.append(chosen)
            keys.append(k)
            values.append(v)
        if cache is not None:
            cache = cache.replace(keys=tuple(keys), values=tuple(values), length=cache.length + tokens.shape[1])
        return Output(
            hidden=RMSNorm(c.norm_epsilon, name="final_norm")(x),
            head=head,
            stats=jax.tree.map(lambda *layers: jnp.stack(layers), *all_stats) if c.is_moe else None,
            chosen=jnp.stack(all_chosen) if c.is_moe else None,
            cache=cache,
        )


def _router_logits(x: jax.Array, router: jax.Array) -> jax.Array:
    """[B, S, D] and [D, E] -> [B, S, E] float32."""
    return jnp.einsum("BSD,DE->BSE", x.astype(jnp.float32), router, precision="highest")


def _attention_mask(
    positions: jax.Array, segments: jax.Array | None, cache: KVCache | None
) -> tuple[jax.Array | None, KVCache | None]:
    """The mask beyond plain causality, and the cache with the new tokens' positions entered."""
    if cache is not None:
        entered = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions.astype(jnp.int32), cache.length, axis=1)
        slots, queries = entered[:, None, None, :], positions[:, None, :, None]
        return (slots >= 0) & (slots <= queries), cache.replace(positions=entered)
    if segments is not None:
        return segments[:, None, :, None] == segments[:, None, None, :], None
    return None, None


def init(model: SlimMoE, key: jax.Array) -> Any:
    """Fresh parameters, float32, boxed with their logical axes (`flax.linen.unbox` takes the boxes off)."""
    state = RouterState.initial(model.config)
    return model.init(key, jnp.zeros((1, 8), jnp.int32), state)["params"]
