"""The model as a whole: its size, dispatch, cached decoding, causality, dropout and loss."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import losses, model, routing
from slimmoe_jax.attention import KVCache
from slimmoe_jax.config import ModelConfig, RouterConfig

CONFIG = ModelConfig(
    vocab_size=50, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(0.5, 0.0), expert_hidden=24,
    dropout=0.0, init_std=0.2, capacity_factor=2.0,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (3, 24), 0, 50)
ROUTERS = [
    RouterConfig(kind="top_k", renormalize=True),
    RouterConfig(kind="top_p", threshold=0.5),
    RouterConfig(kind="relu", max_experts=4),
]


@pytest.fixture(scope="module")
def params():
    return nn.unbox(model.init(model.SlimMoE(CONFIG), jax.random.key(0)))


@functools.partial(jax.jit, static_argnames=("config", "train"))
def run(params, config, tokens=TOKENS, train=False, dropout=None, **keywords):
    rngs = None if dropout is None else {"dropout": dropout}
    state = routing.RouterState.initial(config)
    return model.SlimMoE(config).apply({"params": params}, tokens, state, train=train, rngs=rngs, **keywords)


def test_the_card_model_has_250_284_288_parameters():
    """2 x 50257 x 768 embeddings, 16 layers of experts, routers, attention and norms, 32 kv heads of 98,304 in all."""
    shapes = jax.eval_shape(lambda key: model.init(model.SlimMoE(ModelConfig()), key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes))) == 250_284_288


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r.kind)
def test_dispatches_agree_in_value_and_gradient_when_nothing_drops(params, router):
    def loss(params, dispatch):
        config = dataclasses.replace(CONFIG, router=router, dispatch=dispatch, capacity_factor=4.0)
        out = run(params, config, train=True)
        total = losses.cross_entropy(out.hidden, out.head, TOKENS, jnp.ones(TOKENS.shape)) / TOKENS.size
        return total + losses.balance_loss(out.stats), out.stats.dropped.sum()

    dense = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (value, _), grads = dense(params, "dense")
    for dispatch in ("capacity", "ragged", "grouped"):
        (other, dropped), other_grads = dense(params, dispatch)
        assert dropped == 0 and abs(other - value) < 1e-5
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_capacity_drops_later_tokens_counts_them_and_evaluation_drops_none(params):
    config = dataclasses.replace(CONFIG, dispatch="capacity", capacity_factor=0.1, router=ROUTERS[0])  # 8 slots of 24
    full, tight = run(params, dataclasses.replace(config, dispatch="dense"), train=True), run(params, config, train=True)
    dropped = np.asarray(tight.stats.dropped)  # by layer and quarter of the sequence
    assert (dropped[:, 0] == 0).all() and (dropped[:, 3] > dropped[:, 1]).all(), "later tokens are dropped"
    np.testing.assert_array_equal(tight.stats.choices.sum(axis=1), tight.stats.counts.sum(axis=1))
    counted = np.asarray(tight.stats.counts[0]).sum() - dropped[0].sum()
    assert counted <= 3 * 4 * 8, "no expert takes more than its 8 slots a sequence"
    np.testing.assert_allclose(tight.hidden[:, 0], full.hidden[:, 0], atol=1e-5)  # first tokens always fit
    np.testing.assert_allclose(run(params, config).hidden, full.hidden, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r.kind)
def test_token_by_token_decoding_equals_the_full_forward(params, router):
    config = dataclasses.replace(CONFIG, router=router)
    cache = KVCache.empty(config, 3, 24)
    logits = []
    for t in range(24):
        out = run(params, config, TOKENS[:, t : t + 1], cache=cache)
        cache = out.cache
        logits.append(out.logits())
    np.testing.assert_allclose(jnp.concatenate(logits, 1), run(params, config).logits(), atol=1e-4)


def test_left_padding_changes_nothing(params):
    short = TOKENS[:1, :10]
    padded = jnp.concatenate([jnp.zeros((1, 6), jnp.int32), short], axis=1)
    positions = jnp.concatenate([jnp.full((1, 6), -1), jnp.arange(10)[None]], axis=1)
    out = run(params, CONFIG, padded, positions=positions, cache=KVCache.empty(CONFIG, 1, 16))
    np.testing.assert_allclose(out.logits()[:, 6:], run(params, CONFIG, short).logits(), atol=1e-4)


@pytest.mark.parametrize("dispatch", ["dense", "capacity", "ragged", "grouped"])
def test_no_output_depends_on_a_later_token(params, dispatch):
    """Drops included: the capacity is tight, and whoever is dropped is decided by earlier tokens alone."""
    config = dataclasses.replace(CONFIG, dispatch=dispatch, capacity_factor=0.3)
    other = TOKENS.at[:, 12:].set((TOKENS[:, 12:] + 7) % 50)
    a, b = run(params, config, train=True), run(params, config, other, train=True)
    np.testing.assert_allclose(a.hidden[:, :12], b.hidden[:, :12], atol=1e-5)
    assert jnp.abs(a.hidden[:, 12:] - b.hidden[:, 12:]).max() > 0.1


def test_packed_segments_equal_the_documents_alone(params):
    first, second = TOKENS[:1, :10], TOKENS[1:2, :14]
    segments = jnp.array([[0] * 10 + [1] * 14])
    positions = jnp.concatenate([jnp.arange(10), jnp.arange(14)])[None]
    packed = run(params, CONFIG, jnp.concatenate([first, second], 1), positions=positions, segments=segments).logits()
    alone = jnp.concatenate([run(params, CONFIG, first).logits(), run(params, CONFIG, second).logits()], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-4)


def test_dropout_follows_its_key_and_is_off_in_evaluation(params):
    config = dataclasses.replace(CONFIG, dropout=0.3)
    keyed = [run(params, config, train=True, dropout=jax.random.key(k)).hidden for k in (1, 1, 2)]
    np.testing.assert_array_equal(keyed[0], keyed[1])
    assert jnp.abs(keyed[0] - keyed[2]).max() > 0.1
    np.testing.assert_array_equal(run(params, config).hidden, run(params, CONFIG).hidden)


@pytest.mark.parametrize("tile", [7, 24, 1000])
def test_tiled_cross_entropy_equals_the_plain_formula(tile):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (3, 24, 32)), jax.random.normal(keys[1], (32, 50))
    weights = (jax.random.uniform(keys[2], (3, 24)) > 0.3).astype(jnp.float32)

    def plain(hidden, head):
        log_probabilities = jax.nn.log_softmax(hidden @ head)
        nll = -jnp.take_along_axis(log_probabilities, TOKENS[..., None], -1)[..., 0]
        return jnp.sum(weights * (nll + 1e-2 * jax.nn.logsumexp(hidden @ head, -1) ** 2))

    def tiled(hidden, head):
        return losses.cross_entropy(hidden, head, TOKENS, weights, 1e-2, tile)

    with jax.numpy_rank_promotion("allow"):
        expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    actual = jax.value_and_grad(tiled, argnums=(0, 1))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_the_controller_holds_the_mean_number_of_experts():
    """From near-uniform scores and from spread ones, within 300 steps."""
    for spread in (0.05, 1.0):
        config = ModelConfig(layers=1, router=RouterConfig())
        state = routing.RouterState.initial(config)
        logits = spread * jax.random.normal(jax.random.key(0), (1, 4096, 4))

        @jax.jit
        def step(state, logits=logits, config=config):
            stats = routing.route(logits, config.router, state.threshold, state.bias[0]).stats
            stats = jax.tree.map(lambda x: x[None], stats)
            return routing.update(state, stats, config.router), routing.metrics(stats)["experts_per_token"][0]

        means = []
        for _ in range(300):
            state, mean = step(state)
            means.append(float(mean))
        assert abs(np.mean(means[-50:]) - 1.5) < 0.05
