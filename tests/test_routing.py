"""Routing against loops over tokens; the controllers in closed loop; metrics at their extremes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import losses, routing
from slimmoe_jax.config import ModelConfig, RouterConfig
from slimmoe_jax.routing import RouterState, RoutingStats

E = 4
CONFIGS = {
    "top_k": RouterConfig(kind="top_k", max_experts=2),
    "top_k of 1": RouterConfig(kind="top_k", max_experts=1),
    "top_p": RouterConfig(kind="top_p", max_experts=3, threshold=0.6),
    "relu": RouterConfig(kind="relu", max_experts=3),
    "renormalised": RouterConfig(kind="top_p", max_experts=3, threshold=0.6, renormalize=True),
}
NO_BIAS = np.zeros(E, np.float32)
THRESHOLD = np.float32(0.6)
jit_route = jax.jit(routing.route, static_argnames="config")
jit_update = jax.jit(routing.update, static_argnames="config")


def random_logits(shape=(3, 8, E), spread=1.5, seed=0):
    return spread * np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_stats(layers, **fields):
    """Stacked statistics, 1 where not given."""
    given = {name: np.asarray(value, np.float32) for name, value in fields.items()}
    return RoutingStats(*[np.ones(layers, np.float32)] * 9).replace(**given)


def stack_one(stats):
    return jax.tree.map(lambda s: s[None], stats)


def route_one(logits, config, threshold, bias):
    """A token's gates [E] and mask [E]: tries every set of experts, in Python."""
    if config.kind == "relu":
        scores, order_by = np.maximum(logits, 0), logits
        allowed = [e for e in range(E) if logits[e] > 0]
    else:
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        order_by, allowed = scores + bias, range(E)
    count = min(config.max_experts, len(allowed))
    sets = [list(s) for k in range(count + 1) for s in itertools.combinations(allowed, k)]
    # A set of the best: nobody outside has a better score than somebody inside.
    sets = [s for s in sets if all(order_by[i] > order_by[o] for i in s for o in range(E) if o not in s)]
    if config.kind == "top_p":
        enough = [s for s in sets if s and scores[s].sum() > threshold]
        best = min(enough, key=len) if enough else max(sets, key=len)
    else:
        best = max(sets, key=len)
    mask = np.isin(np.arange(E), best)
    gates = np.where(mask, scores, 0)
    return (gates / gates.sum() if config.renormalize else gates), mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bias", [NO_BIAS, np.array([0.3, 0.0, -0.3, 0.1], np.float32)], ids=["", "bias"])
def test_gates_and_mask_equal_brute_force(name, bias):
    """Selection is by score plus bias, gates by score; relu knows no bias; top-p takes the smallest sufficient set."""
    config, logits = CONFIGS[name], random_logits()
    bias = NO_BIAS if config.kind == "relu" else bias
    routed = jax.device_get(jit_route(logits, config, THRESHOLD, bias))
    counts = set()
    for index in np.ndindex(*logits.shape[:-1]):
        gates, mask = route_one(logits[index].astype(np.float64), config, THRESHOLD, bias)
        np.testing.assert_array_equal(routed.mask[index], mask)
        np.testing.assert_allclose(routed.gates[index], gates, atol=1e-6)
        counts.add(int(mask.sum()))
    assert len(counts) == {"top_k": 1, "top_p": 3, "relu": 4}[config.kind], "the logits should bring about every count of experts"


def test_threshold_is_the_one_given():
    """top_p follows the threshold given, not the config's starting value; the best expert always stays."""
    logits, config = np.log(np.float32([0.5, 0.3, 0.15, 0.05])), RouterConfig(kind="top_p", max_experts=3)
    for threshold, expected in ((0.0, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 3)):
        assert np.sum(jit_route(logits, config, np.float32(threshold), NO_BIAS).mask) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_equal_loops(name):
    """Every statistic is a sum over valid tokens; padding takes part in none, however large its logits."""
    config = CONFIGS[name]
    valid = np.arange(8) < np.array([[8], [5], [0]])
    logits = np.where(valid[..., None], random_logits(), 50 * random_logits(seed=9))
    routed = jax.device_get(jit_route(logits, config, THRESHOLD, NO_BIAS, valid))
    expected = {name: np.zeros(np.shape(field)) for name, field in vars(routed.stats).items()}
    for index in zip(*np.nonzero(valid), strict=True):
        x, mask = logits[index].astype(np.float64), routed.mask[index]
        p = np.exp(x) / np.exp(x).sum()
        expected["tokens"] += 1
        expected["counts"] += mask
        expected["score_sum"] += np.maximum(x, 0) if config.kind == "relu" else p
        expected["z_sum"] += np.log(np.exp(x).sum()) ** 2
        expected["entropy_sum"] += -(p * np.log(p)).sum()
        expected["histogram"][mask.sum()] += 1
        expected["logit_max"] = max(expected["logit_max"], np.abs(x).max())
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(routed.stats, name), value, rtol=1e-5, err_msg=name)


def test_statistics_of_halves_add_up():
    """Micro-batches and devices sum to the global batch; the largest logit is a maximum."""
    config, logits = CONFIGS["top_p"], random_logits((4, 8, E))
    whole, first, second = (jit_route(part, config, THRESHOLD, NO_BIAS).stats for part in (logits, logits[:2], logits[2:]))
    assert float(first.logit_max) != float(second.logit_max)
    total = jax.jit(RoutingStats.__add__)(first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), total, whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_independent(name):
    """Changing one token leaves the gates of all others bit for bit: no router looks sideways or ahead."""
    config, logits = CONFIGS[name], random_logits()
    changed = logits.copy()
    changed[1, 3] *= -1
    gates, others = (np.array(jit_route(x, config, THRESHOLD, NO_BIAS).gates) for x in (logits, changed))
    assert (gates[1, 3] != others[1, 3]).any()
    gates[1, 3] = others[1, 3]
    np.testing.assert_array_equal(gates, others)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_reaches_the_router_through_gates(name):
    """The gates' gradient in the logits equals finite differences and is not zero, at one expert a token too."""
    config, logits = CONFIGS[name], random_logits((6, E))
    weight = np.arange(6 * E, dtype=np.float32).reshape(6, E) / 10

    @jax.jit
    def loss(logits):
        return jnp.sum(weight * routing.route(logits, config, THRESHOLD, NO_BIAS).gates)

    grad = np.asarray(jax.jit(jax.grad(loss))(logits))
    direction = random_logits((6, E), spread=1e-3, seed=5)
    masks = [jit_route(logits + sign * direction, config, THRESHOLD, NO_BIAS).mask for sign in (-1, 1)]
    np.testing.assert_array_equal(*masks, err_msg="the step should be too small to change who is chosen")
    numeric = (loss(logits + direction) - loss(logits - direction)) / 2
    assert abs(numeric) > 1e-4
    np.testing.assert_allclose(np.sum(grad * direction), numeric, rtol=2e-2)


def test_gradient_does_not_reach_the_bias_or_counts():
    """The selection bias is moved by its own rule; to the balance loss counts are constants and scores are not."""
    config, logits = CONFIGS["top_k"], random_logits((6, E))

    def loss(bias, logits, counts):
        stats = stack_one(routing.route(logits, config, THRESHOLD, bias).stats)
        return losses.balance_loss(stats.replace(counts=stats.counts + counts)) + stats.z_sum.sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    by_bias, by_logits, by_counts = grad(NO_BIAS, logits, np.zeros((1, E), np.float32))
    np.testing.assert_array_equal(by_bias, 0)
    np.testing.assert_array_equal(by_counts, 0)
    assert np.abs(by_logits).max() > 1e-3


# --- controllers -----------------------------------------------------------------------------------------------------


def simulate(config, spread_at, steps, layers=2, tokens=1_024, skew=0.0):
    """Fresh random logits each step: the last state, and by step the mean experts a token, threshold and counts."""
    model = ModelConfig(layers=layers, experts=E, kv_heads=(1,), rotary=(1.0,), router=config)

    def step(state, at):
        key, spread = at
        logits = spread * jax.random.normal(key, (layers, tokens, E)) + jnp.broadcast_to(offset, (layers, tokens, E))
        stats = jax.vmap(lambda x, b: routing.route(x, config, state.threshold, b).stats)(logits, state.bias)
        new = routing.update(state, stats, config)
        return new, (stats.counts.sum() / stats.tokens.sum(), state.threshold, stats.counts)

    offset = skew * np.arange(E, dtype=np.float32)
    spreads = np.float32([spread_at(step) for step in range(steps)])
    keys = jax.random.split(jax.random.key(0), steps)
    state, history = jax.jit(lambda xs: jax.lax.scan(step, RouterState.initial(model), xs))((keys, spreads))
    return jax.device_get((state, *history))


CONTROLLED = RouterConfig(kind="top_p", max_experts=2, target_experts=1.5)


@pytest.mark.parametrize("spread", [0.02, 0.05, 0.5, 2.0])
def test_threshold_controller_reaches_the_target(spread):
    """From flat to peaked routers, the mean number of experts comes to 1.5 within 300 steps and stays."""
    _, mean, _, _ = simulate(CONTROLLED, lambda _: spread, 400)
    smooth = np.convolve(mean, np.ones(10) / 10, "valid")
    assert abs(mean[:10].mean() - 1.5) > 0.1 or spread == 0.5, "the start should be off the target"
    np.testing.assert_allclose(smooth[300:], 1.5, atol=0.05)
    if spread >= 0.05:
        assert mean[300:].std() < 0.05, "no limit cycle"


def test_threshold_controller_follows_drift():
    """A router that sharpens fivefold over 800 steps stays near the target, which no fixed threshold would do."""
    _, mean, threshold, _ = simulate(CONTROLLED, lambda step: 0.3 + 1.2 * step / 800, 800)
    assert threshold[-1] > threshold[100] + 0.2
    np.testing.assert_allclose(mean[100:], 1.5, atol=0.15)


@pytest.mark.parametrize(("used", "end"), [(2.0, 0.0), (1.0, 1.0)])
def test_threshold_controller_does_not_wind_up(used, end):
    """However long no threshold reaches the target, control comes back at once: the sum stopped at the edge."""
    state = RouterState.initial(ModelConfig(router=CONTROLLED))
    stuck, freed = (make_stats(1, counts=np.full((1, E), mean / E), tokens=[1]) for mean in (used, 3 - used))
    for _ in range(1_000):
        state = jit_update(state, stuck, CONTROLLED)
    assert float(state.threshold) == pytest.approx(end, abs=0.01)
    for _ in range(50):
        state = jit_update(state, freed, CONTROLLED)
    moved = 50 * 0.5 * CONTROLLED.integral_gain  # 50 steps of an error of half an expert
    assert abs(float(state.threshold) - end) == pytest.approx(moved, abs=0.02)


def test_threshold_stays_without_a_target():
    """A target of 0 turns the control off: p is the config's for good."""
    config = dataclasses.replace(CONTROLLED, target_experts=0.0, threshold=0.7)
    _, mean, threshold, _ = simulate(config, lambda _: 0.5, 20)
    np.testing.assert_array_equal(threshold, np.float32(0.7))
    assert abs(mean[-1] - 1.5) > 0.2


def test_bias_balances_skewed_logits():
    """Loss-free balancing: on skewed logits the load starts lopsided and comes to even, each layer by itself."""
    config = RouterConfig(kind="top_k", max_experts=1, balance="bias", bias_rate=5e-3)
    state, _, _, counts = simulate(config, lambda _: 0.5, 400, skew=0.4)
    load = counts / counts.sum(axis=-1, keepdims=True)  # [steps, N, E]
    assert E * load[0].max() - 1 > 0.5
    assert (E * load[-50:].mean(axis=0).max(axis=-1) - 1 < 0.1).all()
    assert (np.diff(state.bias, axis=-1) < 0).all(), "the favoured experts should be held back"


@pytest.mark.parametrize("kind", ["top_k", "top_p", "relu"])
def test_bias_moves_by_its_rate_in_its_own_layer(kind):
    """b += rate x sign(mean load - load), and only where the balance is by bias."""
    stats = make_stats(2, counts=[[9, 1, 5, 5], [5, 5, 5, 5]], tokens=[20, 20])
    state = RouterState.initial(ModelConfig(layers=2, router=RouterConfig(kind=kind)))
    moved = routing.update(state, stats, RouterConfig(kind=kind, balance="bias", bias_rate=0.5))
    np.testing.assert_allclose(moved.bias, [[-0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(routing.update(state, stats, RouterConfig(kind=kind)).bias, 0)


def test_relu_controller_reaches_the_target():
    """Where a heavier L1 loss closes gates, its weight settles at the one that leaves the target number open."""
    config = RouterConfig(kind="relu", max_experts=E, target_experts=1.5, l1_initial=1e-8)
    logits = random_logits((2_048, E), spread=3)

    def step(state, _):
        stats = routing.route(logits - jnp.log1p(state.l1_weight / 1e-5), config, state.threshold, state.bias[0]).stats
        return routing.update(state, stack_one(stats), config), stats.counts.sum() / stats.tokens

    start = RouterState.initial(ModelConfig(layers=1, router=config))
    mean = np.asarray(jax.jit(lambda: jax.lax.scan(step, start, length=150))()[1])
    assert mean[0] > 1.9
    np.testing.assert_allclose(mean[-20:], 1.5, atol=0.1)


def test_relu_controller_multiplies_and_divides():
    """Too many experts multiply the L1 weight by the factor, too few divide it, no target leaves it."""
    config = RouterConfig(kind="relu", target_experts=1.5, l1_initial=1e-4, l1_factor=1.2)
    state = RouterState.initial(ModelConfig(layers=1, router=config))
    stats = make_stats(1, tokens=[10])
    for used, expected in ((20.0, 1.2e-4), (10.0, 1e-4 / 1.2), (15.0, 1e-4)):
        moved = jit_update(state, stats.replace(counts=np.full((1, E), used / E, np.float32)), config)
        assert float(moved.l1_weight) == pytest.approx(expected)
        assert float(moved.threshold) == float(state.threshold)
    off = routing.update(state, stats, dataclasses.replace(config, target_experts=0.0))
    assert float(off.l1_weight) == pytest.approx(1e-4)


def test_the_l1_weight_comes_back_after_long_below_its_target():
    """A thousand steps of too few experts would leave 1e-8 / 1.2^1000, which is 0; it waits at 1e-12, and ten steps undo ten."""
    config = RouterConfig(kind="relu", target_experts=1.5, l1_initial=1e-8, l1_factor=1.2)
    state, stats = RouterState.initial(ModelConfig(layers=1, router=config)), make_stats(1, tokens=[10])
    few, many = (stats.replace(counts=np.full((1, E), used / E, np.float32)) for used in (10.0, 20.0))
    for _ in range(1000):
        state = jit_update(state, few, config)
    assert float(state.l1_weight) == pytest.approx(1e-12)
    for _ in range(10):
        state = jit_update(state, many, config)
    assert float(state.l1_weight) == pytest.approx(1e-12 * 1.2**10, rel=1e-4)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_at_their_extremes():
    """Even load: entropy 1, violation 0, none dead. One expert for all: entropy 0, violation E - 1, E - 1 dead."""
    stats = make_stats(
        2,
        tokens=[100, 100],
        counts=[[50] * 4, [100, 0, 0, 0]],
        entropy_sum=[100 * np.log(4), 0],
        histogram=[[0, 0, 100], [0, 100, 0]],
        choices=[[50] * 4, [40, 60, 0, 0]],
        dropped=[[0, 0, 5, 15], [0] * 4],
        logit_max=[3, 7],
    )
    m = jax.jit(routing.metrics)(stats)
    expected = {
        "load": [[0.25] * 4, [1, 0, 0, 0]],
        "load_entropy": [1, 0],
        "max_violation": [0, E - 1],
        "dropped": [0.1, 0],
        "dropped_by_quarter": [[0, 0, 0.1, 0.3], [0] * 4],
        "experts_per_token": [2, 1],
        "experts_histogram": [[0, 0, 1], [0, 1, 0]],
        "router_entropy": [np.log(4), 0],
        "dead_experts": [0, E - 1],
        "logit_max": [3, 7],
    }
    assert m.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(m[name], value, atol=1e-6, err_msg=name)


def test_choices_are_counted_by_quarter_of_the_sequence():
    """Ten places are quarters of 3, 2, 3 and 2; three places leave one empty."""
    mask = np.zeros((2, 10, E), bool)
    mask[0, :, 0] = mask[1, 7:, 1] = True
    np.testing.assert_array_equal(routing.by_quarter(mask), [3, 2, 3 + 1, 2 + 2])
    np.testing.assert_array_equal(routing.by_quarter(np.ones((1, 3, 1), bool)), [1, 1, 1, 0])


def test_metrics_of_nothing_are_finite():
    """A batch of padding alone, and a ReLU router with every gate shut, divide by no zero."""
    for valid in (False, True):
        stats = jit_route(-np.ones((5, E), np.float32), CONFIGS["relu"], THRESHOLD, NO_BIAS, np.full(5, valid)).stats
        assert all(np.isfinite(value).all() for value in jax.jit(routing.metrics)(stack_one(stats)).values())
