"""Variable grouped-query attention (VGQA): kv heads by layer, rotary fraction by layer, a cache for decoding.

Axes: B batch, S sequence, L cache length, D model, N query heads, K kv heads, H head dimension, R rotated part of H, M = N H.

Grouped-query attention (Ainslie et al., arXiv 2305.13245) shares each key/value head among N/K query heads; "variable"
means that K differs by layer, as in DeciLM. Rotary positions (Su et al., arXiv 2104.09864) turn the first R dimensions
of each head; R = H is RoPE, R = 0 is NoPE (Kazemnejad et al., arXiv 2305.19466), between the two is partial rotation.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from slimmoe_jax import blockwise
from slimmoe_jax.config import InputError, ModelConfig
from slimmoe_jax.norm import RMSNorm
from slimmoe_jax.products import weigh

Kernel = Literal["xla", "cudnn"]


class KVCache(struct.PyTreeNode):
    """Keys and values of the tokens seen so far, one pair a layer, and the position that each slot holds.

    A slot with position -1 is empty or holds padding; nothing attends to it. So a batch may be padded on the left.
    """

    keys: tuple[jax.Array, ...]  # a layer: [B, L, K, H]
    values: tuple[jax.Array, ...]  # a layer: [B, L, K, H]
    positions: jax.Array  # [B, L] int32
    length: jax.Array  # [] int32, slots in use

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype: jnp.dtype = jnp.float32) -> KVCache:
        """A cache for `batch` sequences of at most `length` tokens, padding included."""
        shapes = [(batch, length, kv_heads, config.head_dim) for kv_heads in config.layer_kv_heads]
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for shape in shapes),
            values=tuple(jnp.zeros(shape, dtype) for shape in shapes),
            positions=jnp.full((batch, length), -1, jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )


def resolve_kernel(config: ModelConfig, dtype: jnp.dtype) -> Kernel:
    """The attention kernel that `config.attention` means on this machine.

    Raises:
      InputError: cuDNN was asked for where it cannot run.
    """
    on_cuda = any(device.platform == "gpu" and "NVIDIA" in device.device_kind for device in jax.devices())
    fits = on_cuda and dtype == jnp.bfloat16 and config.head_dim % 8 == 0
    if config.attention == "auto":
        return "cudnn" if fits else "xla"
    if config.attention == "cudnn" and not fits:
        raise InputError(
            "model.attention = cudnn needs an NVIDIA GPU, precision = bfloat16 and a model.head_dim that 8 divides:"
            " use xla or auto here"
        )
    return config.attention


def rotary_dim(head_dim: int, fraction: float) -> int:
    """R: the number of dimensions of a head that are rotated, always even."""
    return 2 * round(fraction * head_dim / 2)


def rotate(x: jax.Array, positions: jax.Array, dim: int, theta: float) -> jax.Array:
    """Rotary position embedding of the first `dim` dimensions, in the half-split layout of Llama.

    Args:
      x: [B, S, N or K, H].
      positions: [B, S] int32.
    Returns: like x.
    """
    if dim == 0:
        return x
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)  # [R/2]
    angle = jnp.einsum("BS,R->BSR", positions.astype(jnp.float32), frequency)[:, :, None, :]  # [B, S, 1, R/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = jnp.split(x.astype(jnp.float32), [dim // 2, dim], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """One layer of VGQA: causal, grouped queries, rotary on the first `rotary` share of each head, no biases."""

    config: ModelConfig
    kv_heads: int
    rotary: float
    kernel: Kernel = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None = None,
        cached: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attends within x, or to a cache that x's keys and values are first written to.

        Args:
          x: [B, S, D].
          positions: [B, S] int32, what the rotation sees.
          mask: [B, 1, S, S] bool, True where attention is allowed beyond being causal; with a cache it is
            [B, 1, S, L] and is all that decides.
          cached: this layer's keys and values, each [B, L, K, H].
          start: first slot of the cache that x takes.
        Returns: [B, S, D], and the keys and values: x's own, or the updated cache.
        """
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        residual = nn.initializers.normal(c.init_std / (2 * c.layers) ** 0.5)
        query = self._weight("query", normal, (c.width, c.heads, c.head_dim), ("embed", "heads", "head_dim"))
        key = self._weight("key", normal, (c.width, self.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))
        value = self._weight("value", normal, (c.width, self.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"))
        out = self._weight("out", residual, (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"))

        q = weigh("BSD,DNH->BSNH", x, query)
        k = weigh("BSD,DKH->BSKH", x, key)
        v = weigh("BSD,DKH->BSKH", x, value)
        if c.qk_norm:
            q = RMSNorm(c.norm_epsilon, name="query_norm")(q)
            k = RMSNorm(c.norm_epsilon, name="key_norm")(k)
        dim = rotary_dim(c.head_dim, self.rotary)
        q, k = rotate(q, positions, dim, c.rope_theta), rotate(k, positions, dim, c.rope_theta)

        # K and V are not repeated: all kernels take N query heads over K key/value heads as they are.
        if cached is not None:  # a short query against a long cache is outside what the causal kernels take
            k = jax.lax.dynamic_update_slice_in_dim(cached[0], k.astype(cached[0].dtype), start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cached[1], v.astype(cached[1].dtype), start, axis=1)
            y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
        elif self.kernel == "cudnn":
            y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
        else:
            y = blockwise.causal_attention(q, k, v, mask)
        # One axis is contracted: with two, a CPU copies the weights transposed, in decoding for each token.
        return weigh("BSM,MD->BSD", y.reshape(*x.shape[:2], -1), out.reshape(-1, c.width)), (k, v)

    def _weight(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> jax.Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape)
