"""Attention against loops and complex numbers; causality by gradient; what the kernels may be asked for."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import attention
from slimmoe_jax.attention import Attention, KVCache
from slimmoe_jax.config import InputError, ModelConfig

CONFIG = ModelConfig(layers=2, width=24, heads=4, head_dim=8, kv_heads=(2,), rotary=(1.0,), init_std=0.4, rope_theta=100.0)
B, S, D, N, H = 2, 7, CONFIG.width, CONFIG.heads, CONFIG.head_dim
POSITIONS = jnp.broadcast_to(jnp.arange(S), (B, S))


def inputs(seed=0, length=S):
    return jax.random.normal(jax.random.key(seed), (B, length, D))


def init(layer, x):
    """Parameters without their boxes, norm scales random."""
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x, POSITIONS[:, : x.shape[1]])["params"])
    rng = np.random.default_rng(2)
    for name in ("query_norm", "key_norm"):
        if name in params:
            params[name] = {"scale": jnp.asarray(1 + 0.5 * rng.standard_normal(H, np.float32))}
    return params


def run(layer, params, *args):
    return jax.jit(layer.apply)({"params": params}, *args)


def complex_rotation(x, position, dim, theta):
    """Turns a head [H]: dimensions (j, j + dim/2) are one complex number, multiplied by exp(i position theta^(-2j/dim))."""
    x = np.array(x, np.float64)
    half = dim // 2
    for j in range(half):
        turned = complex(x[j], x[j + half]) * np.exp(1j * position * theta ** (-2 * j / dim))
        x[j], x[j + half] = turned.real, turned.imag
    return x


def attention_by_loops(x, params, kv_heads, dim, positions, config, segments=None):
    """Grouped-query attention in float64, one query at a time."""
    w = {name: np.asarray(p, np.float64) for name, p in params.items() if not name.endswith("norm")}

    def head(vector, weight, norm, position):
        h = vector @ weight
        if norm in params:
            scale = np.asarray(params[norm]["scale"], np.float64)
            h = h / np.sqrt(np.mean(h**2) + config.norm_epsilon) * scale
        return complex_rotation(h, position, dim, config.rope_theta)

    y = np.zeros((*x.shape[:2], config.width))
    for b in range(x.shape[0]):
        row = np.asarray(x[b], np.float64)
        for t in range(x.shape[1]):
            seen = [u for u in range(t + 1) if segments is None or segments[b, u] == segments[b, t]]
            for n in range(config.heads):
                k = n // (config.heads // kv_heads)
                q = head(row[t], w["query"][:, n], "query_norm", positions[b, t])
                scores = [q @ head(row[u], w["key"][:, k], "key_norm", positions[b, u]) / np.sqrt(config.head_dim) for u in seen]
                p = np.exp(scores - np.max(scores))
                mixed = sum(pu * (row[u] @ w["value"][:, k]) for pu, u in zip(p / p.sum(), seen, strict=True))
                y[b, t] += mixed @ w["out"][n]
    return y


@pytest.mark.parametrize(("kv_heads", "rotary", "qk_norm"), [(1, 1.0, False), (2, 0.5, False), (4, 0.0, False), (2, 1.0, True)])
def test_equals_loops(kv_heads, rotary, qk_norm):
    """Every number of kv heads, with full, half and no rotation, and with normalised queries and keys."""
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    layer, x = Attention(config, kv_heads, rotary), inputs()
    params = init(layer, x)
    assert params["key"].shape == params["value"].shape == (D, kv_heads, H)
    y, (k, v) = run(layer, params, x, POSITIONS)
    assert k.shape == v.shape == (B, S, kv_heads, H)
    expected = attention_by_loops(x, params, kv_heads, int(rotary * H), POSITIONS, config)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_mask_by_segment_equals_loops():
    """The mask comes on top of causality: with segments a token sees its own document's past alone."""
    segments = np.array([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
    layer, x = Attention(CONFIG, 2, 1.0), inputs()
    params = init(layer, x)
    mask = jnp.asarray(segments[:, None, :, None] == segments[:, None, None, :])
    y, _ = run(layer, params, x, POSITIONS, mask)
    expected = attention_by_loops(x, params, 2, H, POSITIONS, CONFIG, segments)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 2, 4, 8])
def test_rotation_is_complex_multiplication(dim):
    """The first `dim` dimensions turn as complex numbers and the rest stay as they are."""
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, H))
    positions = jnp.array([[0, 5, 1000]])
    turned = attention.rotate(x, positions, dim, theta=100.0)
    for s in range(3):
        for n in range(2):
            expected = complex_rotation(x[0, s, n], int(positions[0, s]), dim, 100.0)
            np.testing.assert_allclose(turned[0, s, n], expected, atol=2e-4)
    np.testing.assert_array_equal(turned[..., dim:], x[..., dim:])


def test_rotated_products_depend_on_distance_only():
    """<rotate(q, m), rotate(k, n)> is a function of m - n, and not a constant one."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, H))

    def product(m, n):
        def at(x, position):
            return attention.rotate(x, jnp.array([[position]]), 4, theta=100.0)

        return float(jnp.sum(at(q, m) * at(k, n)))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert abs(product(7, 3) - product(3, 7)) > 1e-2


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.1, 6), (0.25, 16), (0.5, 32), (1.0, 64)])
def test_rotary_dim_is_even(fraction, expected):
    """A tenth of 64 dimensions is 6.4: 6 are rotated."""
    assert attention.rotary_dim(64, fraction) == expected


def test_positions_matter_with_rotation_alone():
    """NoPE ignores positions altogether; RoPE ignores a common shift of them, not a stretch."""
    x = inputs()
    for rotary, ignores_stretch in ((0.0, True), (0.5, False)):
        layer = Attention(CONFIG, 2, rotary)
        params = init(layer, x)
        plain, shifted, stretched = (run(layer, params, x, p)[0] for p in (POSITIONS, POSITIONS + 40, POSITIONS * 3))
        np.testing.assert_allclose(plain, shifted, atol=1e-5)
        assert bool(jnp.abs(plain - stretched).max() < 1e-5) == ignores_stretch


def test_gradient_is_causal():
    """Output t has a gradient in every input up to t, and exactly none in a later one."""
    layer = Attention(CONFIG, 1, 1.0)
    x = inputs()
    params = init(layer, x)
    jacobian = jax.jit(jax.jacobian(lambda row: layer.apply({"params": params}, row[None], POSITIONS[:1])[0][0]))(x[0])
    size = np.abs(np.asarray(jacobian)).max(axis=(1, 3))  # [S, S] output by input
    np.testing.assert_array_equal(size > 0, np.tril(np.ones((S, S), bool)))


def test_cache_rows_are_written_where_told():
    """New keys and values land at `start`, earlier slots stay, and the mask alone decides what is seen."""
    layer, x = Attention(CONFIG, 2, 1.0), inputs()
    params = init(layer, x)
    y, (k, v) = run(layer, params, x, POSITIONS)
    filler = jnp.full((B, 10, 2, H), 9.0)
    cached = filler.at[:, :4].set(k[:, :4]), filler.at[:, :4].set(v[:, :4])
    mask = (jnp.arange(10)[None, :] <= jnp.arange(4, S)[:, None])[None, None]
    mask = jnp.broadcast_to(mask, (B, 1, 3, 10))
    out, (keys, values) = run(layer, params, x[:, 4:], POSITIONS[:, 4:], mask, cached, 4)
    np.testing.assert_allclose(out, y[:, 4:], atol=1e-5)
    np.testing.assert_allclose(keys, filler.at[:, :S].set(k), atol=1e-5)
    np.testing.assert_allclose(values, filler.at[:, :S].set(v), atol=1e-5)


def test_keys_and_values_are_not_repeated():
    """A decoding step over a cache of one kv head makes nothing as large as that cache copied for each query head."""
    length = 256
    layer = Attention(CONFIG, 1, 1.0)
    x, positions = inputs(length=1), POSITIONS[:, :1]
    params = init(layer, x)
    cached = (jnp.zeros((B, length, 1, H)),) * 2
    mask = jnp.ones((B, 1, 1, length), bool)
    repeated = B * length * N * H

    def largest(function):
        shapes = re.findall(r"\w+\[([\d,]+)\]", str(jax.make_jaxpr(function)(x, cached)))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(lambda x, cached: layer.apply({"params": params}, x, positions, mask, cached, 9)) < repeated
    assert largest(lambda x, cached: jnp.repeat(cached[0], N, axis=2)) >= repeated


def test_empty_cache_follows_the_kv_schedule():
    """A layer's cache has that layer's kv heads, in the asked type, and every slot is empty."""
    config = dataclasses.replace(CONFIG, layers=3, kv_heads=(4, 1, 2))
    cache = KVCache.empty(config, batch=2, length=5, dtype=jnp.bfloat16)
    expected = [(2, 5, 4, H), (2, 5, 1, H), (2, 5, 2, H)]
    assert [k.shape for k in cache.keys] == [v.shape for v in cache.values] == expected
    assert {k.dtype for k in cache.keys + cache.values} == {jnp.dtype(jnp.bfloat16)}
    assert bool((cache.positions == -1).all()) and int(cache.length) == 0


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="about machines without an NVIDIA GPU")
def test_kernel_without_a_gpu():
    """auto falls back to xla; asking for cudnn says which field to change."""
    assert attention.resolve_kernel(dataclasses.replace(CONFIG, attention="auto"), jnp.bfloat16) == "xla"
    with pytest.raises(InputError, match="model.attention = cudnn"):
        attention.resolve_kernel(dataclasses.replace(CONFIG, attention="cudnn"), jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kv_heads", [1, 4, 12])
def test_cudnn_equals_xla(kv_heads):
    """cuDNN in bfloat16 agrees with XLA in float32 within bfloat16's rounding, outputs and gradients."""
    config = ModelConfig(init_std=0.05)
    x = jax.random.normal(jax.random.key(0), (2, 256, config.width))
    positions = jnp.broadcast_to(jnp.arange(256), (2, 256))
    exact = Attention(config, kv_heads, 1.0)
    params = nn.unbox(exact.init(jax.random.key(1), x, positions)["params"])
    assert attention.resolve_kernel(config, jnp.bfloat16) == "cudnn"

    def results(layer, x):
        y, grads = jax.value_and_grad(lambda p: jnp.sum(jnp.sin(layer.apply({"params": p}, x, positions)[0].astype(jnp.float32))))(
            params
        )
        return layer.apply({"params": params}, x, positions)[0], grads

    def distance(a, b):
        return max(
            float(jnp.linalg.norm(u.astype(jnp.float32) - w) / jnp.linalg.norm(w))
            for u, w in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    reference = results(exact, x)
    rounded = results(Attention(config, kv_heads, 1.0, "xla", jnp.bfloat16), x.astype(jnp.bfloat16))
    fused = results(Attention(config, kv_heads, 1.0, "cudnn", jnp.bfloat16), x.astype(jnp.bfloat16))
    assert distance(fused, reference) < max(2 * distance(rounded, reference), 0.02)
