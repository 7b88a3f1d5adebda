"""Expert dispatch against a mixture of experts written as loops: outputs, gradients, and which tokens are dropped."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import dropout, experts, routing, sharding
from slimmoe_jax.config import ModelConfig, RouterConfig
from slimmoe_jax.experts import ExpertWeights

E, D, F = 4, 6, 5
ROUTERS = {
    "top_k": RouterConfig(kind="top_k", max_experts=2, renormalize=True),
    "top_p": RouterConfig(kind="top_p", max_experts=3, threshold=0.8),
    "relu": RouterConfig(kind="relu", max_experts=3),
}


def make_config(router, capacity_factor=8.0, gated=False):
    return ModelConfig(width=D, experts=E, expert_hidden=F, gated=gated, capacity_factor=capacity_factor, router=ROUTERS[router])


def make_inputs(gated, length=12, batch=2, seed=0):
    """Tokens [B, S, D], router weights [D, E] and expert weights, of a size that keeps outputs near 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    x, router, up, down = normal(batch, length, D), normal(D, E), normal(E, D, F), normal(E, F, D)
    gate = normal(E, D, F) / D**0.5 if gated else None
    return x, router, ExpertWeights(up / D**0.5, down / F**0.5, gate)


def route(x, router, config):
    """Gates and mask, the thresholds and biases at their start."""
    routed = routing.route(x @ router, config.router, jnp.float32(config.router.threshold), jnp.zeros(E))
    return routed.gates, routed.mask


def silu(z):
    return z / (1 + jnp.exp(-z))


def moe_by_loops(x, gates, mask, weights, slots):
    """Token by token, expert by expert; an expert takes at most `slots` tokens of a sequence. Outputs and drops."""
    rows, dropped = [], np.zeros(mask.shape, bool)
    for b in range(x.shape[0]):
        taken = [0] * E
        for s in range(x.shape[1]):
            y = jnp.zeros(D)
            for e in np.flatnonzero(mask[b, s]):
                if taken[e] == slots:
                    dropped[b, s, e] = True
                    continue
                taken[e] += 1
                up = x[b, s] @ weights.up[e]
                hidden = silu(up) if weights.gate is None else silu(x[b, s] @ weights.gate[e]) * up
                y += gates[b, s, e] * (hidden @ weights.down[e])
            rows.append(y)
    return jnp.stack(rows).reshape(x.shape), dropped


def outputs_and_gradients(x, router, weights, config, moe):
    """moe(x, gates, mask, weights) and the gradient of a curved sum of it in tokens, router and experts."""

    def loss(x, router, weights):
        y, dropped = moe(x, *route(x, router, config), weights)
        return jnp.sum(jnp.sin(y)), (y, dropped)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, router, weights)


def by_loops(x, router, weights, config, slots):
    mask = np.asarray(jax.jit(lambda: route(x, router, config)[1])())
    drops = []

    def moe(x, gates, _, weights):
        y, dropped = moe_by_loops(x, gates, mask, weights, slots)
        drops.append(dropped)
        return y, jnp.zeros(())

    grads, (y, _) = jax.jit(lambda *a: outputs_and_gradients(*a, config, moe))(x, router, weights)
    return grads, y, drops[0], mask


def by_dispatch(x, router, weights, config, method):
    def moe(x, gates, mask, weights):
        return experts.apply_experts(x, gates, mask, weights, method=method, config=config)

    grads, (y, dropped) = jax.jit(lambda *a: outputs_and_gradients(*a, config, moe))(x, router, weights)
    return grads, y, np.asarray(dropped)


def assert_trees_close(a, b, atol):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=atol, rtol=1e-5), a, b)


@pytest.mark.parametrize(("router", "gated"), [("top_k", True), ("top_p", False), ("relu", False), ("relu", True)])
def test_dispatches_equal_loops(router, gated):
    """With room for all, the four dispatches have the loops' outputs and gradients, and drop nothing."""
    config = make_config(router, gated=gated)
    inputs = make_inputs(gated)
    grads, y, _, mask = by_loops(*inputs, config, slots=None)
    assert len(set(mask.sum(-1).flatten())) >= (1 if router == "top_k" else 3)
    for method in ("dense", "capacity", "ragged", "grouped"):
        got_grads, got, dropped = by_dispatch(*inputs, config, method)
        np.testing.assert_allclose(got, y, atol=1e-5, rtol=1e-5, err_msg=method)
        assert_trees_close(got_grads, grads, atol=2e-5)  # beside entries of 20 and more: sums in another order
        assert not dropped.any()


def test_full_experts_drop_their_later_tokens():
    """An expert keeps the first C tokens that chose it; later ones lose that part of output and gradient, no other."""
    config = make_config("top_k", capacity_factor=0.25)
    inputs = make_inputs(gated=False, length=32)
    slots = experts.capacity(config, 32)
    assert slots == 8
    grads, y, expected, mask = by_loops(*inputs, config, slots)
    got_grads, got, dropped = by_dispatch(*inputs, config, "capacity")
    np.testing.assert_array_equal(dropped, expected)
    assert dropped.sum() == np.maximum(mask.sum(axis=1) - slots, 0).sum() > 10
    np.testing.assert_allclose(got, y, atol=1e-5)
    assert_trees_close(got_grads, grads, atol=1e-5)
    lost = dropped.sum(-1) == mask.sum(-1)  # every choice of the token was dropped
    assert lost.any()
    np.testing.assert_array_equal(np.asarray(got)[lost], 0)


def test_drops_are_causal_and_stay_in_their_sequence():
    """Whatever later tokens and other sequences ask for, an earlier token keeps its slots: bit for bit the same output."""
    config = make_config("top_p", capacity_factor=0.3)
    x, router, weights = make_inputs(gated=False, length=32)
    apply = jax.jit(lambda x: experts.apply_experts(x, *route(x, router, config), weights, method="capacity", config=config))
    y, dropped = apply(x)
    assert dropped.any()
    changed = x.copy()
    changed[0, 20:] = changed[0, 19]
    changed[1] *= -1
    other, other_dropped = apply(changed)
    assert (other_dropped[0, 20:] != dropped[0, 20:]).any()
    np.testing.assert_array_equal(other[0, :20], y[0, :20])
    np.testing.assert_array_equal(other_dropped[0, :20], dropped[0, :20])


def test_no_choice_of_a_segment_depends_on_another_segment():
    """Two packed examples: whatever the first one asks for, the second keeps its slots, bit for bit the same output."""
    config = make_config("top_p", capacity_factor=0.3)
    x, router, weights = make_inputs(gated=False, length=32)
    segments = np.repeat([[1] * 20 + [2] * 12], 2, axis=0)

    @jax.jit
    def apply(x):
        return experts.apply_experts(x, *route(x, router, config), weights, method="capacity", config=config, segments=segments)

    y, dropped = apply(x)
    changed = x.copy()
    changed[:, :20] = changed[:, :1]  # all of it wants the same experts
    other, other_dropped = apply(changed)
    assert dropped[:, 20:].any() and (other_dropped[:, :20] != dropped[:, :20]).any()
    np.testing.assert_array_equal(other[:, 20:], y[:, 20:])
    np.testing.assert_array_equal(other_dropped[:, 20:], dropped[:, 20:])


@pytest.mark.parametrize("lengths", [[32], [1, 31], [20, 12], [5, 9, 1, 17], [8] * 4, [1] * 32])
def test_a_segment_has_the_slots_that_its_places_are_worth(lengths):
    """By hand: of C slots, segment [a, b) of S places has those from floor(C a / S) to floor(C b / S), earlier tokens first."""
    config = make_config("top_k", capacity_factor=0.5)
    x, router, weights = make_inputs(gated=False, length=32)
    segments = np.repeat(np.arange(len(lengths)), lengths)
    gates, mask = route(x, router, config)
    dropped = experts.apply_experts(
        x, gates, mask, weights, method="capacity", config=config, segments=jnp.asarray(np.stack([segments] * 2))
    )[1]  # fmt: skip
    slots, expected, start = experts.capacity(config, 32), np.zeros(mask.shape, bool), 0
    for length in lengths:
        end = start + length
        room = slots * end // 32 - slots * start // 32
        asked = np.cumsum(mask[:, start:end], axis=1)
        expected[:, start:end] = np.asarray(mask[:, start:end]) & (asked > room)
        start = end
    np.testing.assert_array_equal(dropped, expected)
    assert expected.any()


def test_dispatches_drop_the_same_hidden_activations():
    """A token and an expert decide what dropout takes, not the row that a dispatch gives them: outputs and gradients agree."""
    config, seed = make_config("top_p"), jnp.array([1, 2], jnp.uint32)
    x, router, weights = make_inputs(gated=True)

    def run(method, rate):
        def moe(*a):
            return experts.apply_experts(*a, method=method, config=config, dropout=dropout.Draw(seed, rate))

        grads, (y, _) = jax.jit(lambda *a: outputs_and_gradients(*a, config, moe))(x, router, weights)
        return grads, y

    grads, y = run("dense", 0.3)
    assert jnp.abs(y - run("dense", 0.0)[1]).max() > 0.1
    for method in ("capacity", "ragged", "grouped"):
        got_grads, got = run(method, 0.3)
        np.testing.assert_allclose(got, y, atol=1e-5, rtol=1e-5, err_msg=method)
        assert_trees_close(got_grads, grads, atol=2e-5)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("method", ["ragged", "capacity"])
def test_devices_compute_what_one_computes(method, mesh):
    """Sequences split over eight devices, with dropout: outputs and gradients of one device; `ragged` gathers no row."""
    config, seed = make_config("top_p"), jnp.array([1, 2], jnp.uint32)
    x, router, weights = make_inputs(gated=False, batch=8)

    def moe(*a):
        return experts.apply_experts(*a, method=method, config=config, dropout=dropout.Draw(seed, 0.3))

    def run(*a):
        grads, (y, _) = outputs_and_gradients(*a, config, moe)
        return grads, y

    one = jax.jit(run)(x, router, weights)
    devices = jax.make_mesh(mesh, ("data", "fsdp", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with sharding.use(devices):
        rows = jax.device_put(x, sharding.batch_sharding(devices))
        several = jax.jit(run)(rows, router, weights)
    assert_trees_close(several, one, atol=2e-5)


@pytest.mark.parametrize("method", ["capacity", "ragged", "grouped"])
def test_rows_move_without_scatter(method):
    """Neither pass scatters floats: a plain indexed read, whose gradient does, is noticed by the same search."""
    config = make_config("top_k")
    x, router, weights = make_inputs(gated=True)
    scatter = re.compile(r":b?f(?:loat)?(?:16|32)\[[\d,]*\] = scatter")

    def step(x, router, weights):
        def moe(*a):
            return experts.apply_experts(*a, method=method, config=config)

        return outputs_and_gradients(x, router, weights, config, moe)

    assert not scatter.search(str(jax.make_jaxpr(step)(x, router, weights)))
    assert scatter.search(str(jax.make_jaxpr(jax.grad(lambda x: jnp.take(x, jnp.arange(2), axis=0).sum()))(x)))


@pytest.mark.parametrize("method", ["dense", "capacity", "ragged", "grouped"])
def test_dropout_acts_on_hidden_activations(method):
    """Dropout sees [..., F] after the activation: doubling there doubles the output."""
    config = make_config("top_k")
    x, router, weights = jax.tree.map(jnp.asarray, make_inputs(gated=False))
    shapes = []

    def double(hidden, rows):
        shapes.append(hidden.shape)
        assert rows.shape == hidden.shape[:-1] or rows.shape[0] in (1, hidden.shape[0])
        return 2 * hidden

    def apply(**options):
        return experts.apply_experts(x, *route(x, router, config), weights, method=method, config=config, **options)[0]

    plain, doubled = jax.jit(lambda: (apply(), apply(dropout=jax.tree_util.Partial(double))))()
    assert shapes[0][-1] == F
    np.testing.assert_allclose(doubled, 2 * plain, atol=1e-5)


def test_capacity_rounds_up_to_eights():
    """Slots are the even share times the factor, rounded up to a multiple of 8, never more than the sequence."""
    config = dataclasses.replace(make_config("top_k"), capacity_factor=1.25)  # 2 of 4 experts: half the tokens each
    for length, slots in ((2_048, 1_280), (100, 64), (102, 64), (103, 72), (16, 16), (12, 8), (10, 8), (8, 8), (5, 5), (1, 1)):
        assert experts.capacity(config, length) == slots
    assert experts.capacity(dataclasses.replace(config, capacity_factor=100.0), 64) == 64


@pytest.mark.parametrize(
    ("dispatch", "training", "otherwise"),
    [("auto", "ragged", "dense"), ("capacity", "capacity", "dense"), ("dense", "dense", "dense"), ("ragged",) * 3]
    + [("grouped", "grouped", "ragged")],  # which would be interpreted here
)
def test_nothing_is_dropped_outside_training(dispatch, training, otherwise):
    """Only training uses slots, and on a CPU only where it is asked to; a dense model has nothing to dispatch."""
    config = dataclasses.replace(make_config("top_k"), dispatch=dispatch)
    assert experts.resolve_dispatch(config, train=True) == training
    assert experts.resolve_dispatch(config, train=False) == otherwise
    assert experts.resolve_dispatch(dataclasses.replace(config, experts=1), train=True) == "dense"


def test_auto_keeps_slots_where_no_dropless_dispatch_has_been_timed(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert experts.resolve_dispatch(make_config("top_k"), train=True) == "capacity"


def test_bfloat16_stays_close():
    """In bfloat16 each dispatch keeps the type of its input and stays within rounding of float32."""
    config = make_config("top_p")
    x, router, weights = make_inputs(gated=True)
    gates, mask = route(x, router, config)
    low = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), (x, weights))
    for method in ("dense", "capacity", "ragged", "grouped"):
        apply = jax.jit(lambda x, w, method=method: experts.apply_experts(x, gates, mask, w, method=method, config=config)[0])
        y, exact = apply(*low), apply(x, weights)
        assert y.dtype == jnp.bfloat16
        assert jnp.abs(y - exact).max() < 0.03 * jnp.abs(exact).max()
