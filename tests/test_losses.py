"""Losses against their formulae; the tiled cross-entropy against the plain one, in value, gradient and memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import losses
from slimmoe_jax.config import ModelConfig, RouterConfig
from slimmoe_jax.routing import RouterState, RoutingStats

B, S, D, V = 2, 12, 8, 50


def make_inputs(seed=0, scale=1.0):
    """Hidden states, head, targets, and weights with zeros."""
    rng = np.random.default_rng(seed)
    hidden = scale * rng.standard_normal((B, S, D), np.float32)
    weights = rng.uniform(0.5, 2, (B, S)).astype(np.float32) * (rng.uniform(size=(B, S)) < 0.7)
    return hidden, rng.standard_normal((D, V), np.float32), rng.integers(0, V, (B, S)), weights.astype(np.float32)


def plain_cross_entropy(hidden, head, targets, weights, z_weight=0.0):
    """The textbook: all logits at once, differentiated by JAX."""
    logits = jnp.einsum("BSD,DV->BSV", hidden.astype(jnp.float32), head.astype(jnp.float32))
    log_z = jnp.log(jnp.exp(logits).sum(-1))
    target = jnp.sum(jnp.where(jnp.arange(V)[None, None] == targets[..., None], logits, 0), axis=-1)
    return jnp.sum(weights * (log_z - target + z_weight * log_z**2))


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("tile_tokens", [1, 7, 8, 16, 1_000])
def test_tiled_equals_plain(tile_tokens, z_weight):
    """Any tile size, below one position of the batch and not dividing the sequence too, gives the plain value and gradients."""
    hidden, head, targets, weights = make_inputs()
    plain = jax.value_and_grad(plain_cross_entropy, argnums=(0, 1, 3))
    tiled = jax.value_and_grad(losses.cross_entropy, argnums=(0, 1, 3))
    value, grads = jax.jit(lambda *a: plain(*a, z_weight))(hidden, head, targets, weights)
    got, got_grads = jax.jit(lambda *a: tiled(*a, z_weight, tile_tokens))(hidden, head, targets, weights)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got_grads, grads)
    assert not got_grads[0][weights == 0].any(), "a token of weight 0 has no gradient"
    forward_only = jax.jit(lambda *a: losses.cross_entropy(*a, z_weight, tile_tokens))(hidden, head, targets, weights)
    np.testing.assert_allclose(forward_only, value, rtol=1e-5)


def test_gradient_scales_with_the_cotangent():
    """Dividing the loss by a number of tokens divides the gradients, although they are formed in the forward pass."""
    hidden, head, targets, weights = make_inputs()

    def grad(scale):
        return jax.grad(lambda h, w: losses.cross_entropy(h, w, targets, weights) / scale, argnums=(0, 1))(hidden, head)

    once, tenth = jax.jit(lambda: (grad(1.0), grad(10.0)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / 10, b, rtol=1e-5, atol=1e-7), once, tenth)


@pytest.mark.parametrize(("length", "tile_tokens", "tiles"), [(12, 24, 1), (12, 23, 2), (12, 8, 3), (12, 1, 12), (7, 8, 7)])
def test_tiles_divide_the_sequence(length, tile_tokens, tiles):
    """The fewest tiles that divide the sequence and fit; a prime length falls back to single positions."""
    assert losses._tiles(jnp.zeros((2, length, 1)), tile_tokens) == tiles


def test_token_nll_equals_log_softmax():
    """Evaluation's negative log-likelihood is minus the target's log-softmax, token by token, in order."""
    hidden, head, targets, _ = make_inputs()
    nll = jax.jit(losses.token_nll, static_argnums=3)(hidden, head, targets, 8)
    logits = hidden.astype(np.float64) @ head
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(nll, -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_never_exist_at_once(monkeypatch, gradient):
    """No array of the traced program is as large as all logits; the plain formula makes one."""
    hidden, head, targets, weights = make_inputs()

    def largest(loss):
        loss = jax.grad(loss, argnums=(0, 1)) if gradient else loss
        shapes = re.findall(r"\w+\[([\d,]+)\]", str(jax.make_jaxpr(loss)(hidden, head, targets, weights)))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    monkeypatch.setattr(losses, "VOCABULARY_MULTIPLE", 64)  # 128 would more than double this small vocabulary
    assert largest(lambda *a: losses.cross_entropy(*a, 0.1, 8)) < B * S * V // 2
    assert largest(plain_cross_entropy) >= B * S * V


def test_huge_logits_stay_finite():
    """Logits in the thousands overflow a plain exponential, not this loss; a certain and right model has loss 0."""
    hidden, head, targets, _ = make_inputs(scale=1_000)
    loss, grads = jax.jit(jax.value_and_grad(losses.cross_entropy, argnums=(0, 1)))(hidden, head, targets, np.ones((B, S)))
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in grads)
    best = np.argmax(hidden @ head, axis=-1)
    assert jax.jit(losses.cross_entropy)(hidden, head, best, np.ones((B, S))) < 1e-3
    assert not np.isfinite(jax.jit(plain_cross_entropy)(hidden, head, targets, np.ones((B, S))))


def test_bfloat16_stays_close():
    """bfloat16 inputs keep a float32 loss within rounding and gradients of their own type."""
    hidden, head, targets, weights = make_inputs()
    step = jax.jit(jax.value_and_grad(losses.cross_entropy, argnums=(0, 1)))
    value, grads = step(hidden, head, targets, weights)
    low_value, low_grads = step(jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16), targets, weights)
    assert low_value.dtype == jnp.float32
    np.testing.assert_allclose(low_value, value, rtol=5e-3)
    for low, exact in zip(low_grads, grads, strict=True):
        assert low.dtype == jnp.bfloat16
        assert jnp.linalg.norm(low - exact) < 0.02 * jnp.linalg.norm(exact)


# --- router losses ---------------------------------------------------------------------------------------------------


def make_stats():
    """Two layers of four experts; the second is one-sided."""
    zeros = np.zeros(2, np.float32)
    return RoutingStats(
        tokens=np.float32([10, 10]),
        counts=np.float32([[5, 5, 5, 5], [10, 10, 0, 0]]),
        score_sum=np.float32([[2.5, 2.5, 2.5, 2.5], [6, 3, 0.5, 0.5]]),
        z_sum=np.float32([40, 20]),
        entropy_sum=zeros, histogram=np.zeros((2, 3), np.float32), choices=zeros, dropped=zeros, logit_max=zeros,
    )  # fmt: skip


def test_balance_loss_is_the_formula():
    """E sum f P, the mean over layers: at an even load the experts a token, 2, and 4 x (0.6 + 0.3) when one-sided."""
    np.testing.assert_allclose(jax.jit(losses.balance_loss)(make_stats()), (2 + 3.6) / 2, rtol=1e-6)


def test_relu_l1_is_the_formula():
    """The mean sum of gates, 1 a layer here; balanced, a gate weighs by its expert's load over the mean load."""
    assert float(losses.relu_l1_loss(make_stats(), balanced=False)) == pytest.approx(1)
    assert float(losses.relu_l1_loss(make_stats(), balanced=True)) == pytest.approx((1 + 2 * 0.9) / 2)


def test_router_z_loss_is_the_formula():
    """The mean over tokens, then over layers."""
    assert float(losses.router_z_loss(make_stats())) == pytest.approx((4 + 2) / 2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RouterConfig(kind="top_k", balance_weight=0.1, z_weight=0.01), {"balance_loss": 0.28, "router_z_loss": 0.03}),
        (RouterConfig(balance="aux_micro", balance_weight=0.1, z_weight=0.0), {"balance_loss": 0.28}),
        (RouterConfig(balance="bias", z_weight=0.01), {"router_z_loss": 0.03}),
        (RouterConfig(balance="none", z_weight=0.0), {}),
        (RouterConfig(kind="relu", l1_initial=0.5, z_weight=0.0), {"l1_loss": 0.7}),
        (RouterConfig(kind="relu", balance="none", l1_initial=0.5, z_weight=0.0), {"l1_loss": 0.5}),
    ],
)
def test_config_decides_the_losses(config, expected):
    """Each loss is there when asked for, at its weight."""
    state = RouterState.initial(ModelConfig(layers=2, router=config))
    got = losses.router_losses(make_stats(), state, config)
    assert {name: float(loss) for name, loss in got.items()} == pytest.approx(expected)


def test_a_batch_of_padding_has_finite_losses():
    """No tokens, no division by zero."""
    empty = jax.tree.map(np.zeros_like, make_stats())
    for loss in (losses.balance_loss, losses.router_z_loss, lambda s: losses.relu_l1_loss(s, balanced=True)):
        assert float(loss(empty)) == 0
