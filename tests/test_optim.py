"""The optimiser: schedules by hand-computed values, AdamW against torch, which weights decay, clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slimmoe_jax import optim, validation
from slimmoe_jax.config import InputError, OptimConfig, TrainConfig


def config(steps=100, **fields):
    return TrainConfig(steps=steps, optim=OptimConfig(**{"learning_rate": 1.0, "warmup_steps": 10, "final_fraction": 0.1} | fields))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Update n, counted from 0, has the rate of point n + 1. Cosine: 0.1 + 0.9 (1 + cos(pi (n + 1 - 10) / 90)) / 2.
        ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 54: 0.55, 99: 0.1}),
        # Warm-up to 10, 1.0 until 80, then linear to 0.1 at 100.
        ("wsd", {0: 0.1, 9: 1.0, 45: 1.0, 79: 1.0, 89: 0.55, 99: 0.1}),
    ],
)
def test_schedules_pass_through_known_points(kind, expected):
    rate = optim.schedule(config(schedule=kind))
    for update, value in expected.items():
        np.testing.assert_allclose(rate(update), value, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_schedules_can_start_without_warm_up_and_hold_their_end(kind):
    rate = optim.schedule(config(schedule=kind, warmup_steps=0))
    np.testing.assert_allclose(rate(0), 1.0, atol=2e-3)
    np.testing.assert_allclose(rate(1_000), 0.1, rtol=1e-5)


def test_the_schedule_has_its_own_length():
    """A run of fewer steps is the start of the longer one, not a shorter schedule."""
    long, cut = optim.schedule(config(steps=100)), optim.schedule(config(steps=40, schedule_steps=100))
    np.testing.assert_array_equal([long(n) for n in range(40)], [cut(n) for n in range(40)])


def test_norms_and_nothing_else_escape_decay():
    """A zero gradient leaves Adam nothing to do, so that what moves is decay: w (1 - rate x decay)."""
    settings = config(weight_decay=0.5, warmup_steps=0, final_fraction=1.0)
    params = {"embedding": jnp.ones((3, 2)), "expert": jnp.ones((4, 3, 2)), "scale": jnp.ones(2)}
    optimizer = optim.make(settings)
    updates, _ = optimizer.update({k: jnp.zeros_like(v) for k, v in params.items()}, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["embedding"], 0.5)
    np.testing.assert_allclose(moved["expert"], 0.5)
    np.testing.assert_array_equal(moved["scale"], 1.0)


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_updates_equal_those_of_torch(clip_norm):
    torch = pytest.importorskip("torch")
    settings = config(learning_rate=0.01, clip_norm=clip_norm, weight_decay=0.1)
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal((4, 3), np.float32), rng.standard_normal((30, 4, 3), np.float32)

    params, optimizer = {"w": jnp.asarray(start)}, optim.make(settings)
    state = optimizer.init(params)
    weight = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([weight], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    rate = optim.schedule(settings)
    for n, gradient in enumerate(gradients):
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        weight.grad = torch.tensor(gradient)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([weight], clip_norm)
        adamw.param_groups[0]["lr"] = float(rate(n))
        adamw.step()
    np.testing.assert_allclose(params["w"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_state_is_the_same_tree_whatever_a_resume_may_change():
    params = {"w": jnp.ones((2, 2))}
    changes = [{"clip_norm": 0.0}, {"weight_decay": 0.0}, {"schedule": "wsd"}, {"beta1": 0.0}, {"accumulate": 2}]
    trees = {jax.tree.structure(optim.make(config(**change)).init(params)) for change in [{}, *changes]}
    assert len(trees) == 1


@pytest.mark.parametrize(("warmup", "decay", "fits"), [(50, 0.5, True), (51, 0.5, False), (50, 1.0, False), (90, 0.2, False)])
def test_warm_up_and_decay_of_wsd_must_not_overlap(warmup, decay, fits):
    changed = config(schedule="wsd", warmup_steps=warmup, decay_fraction=decay)
    if fits:
        validation.validate(changed)
        assert float(optim.schedule(changed)(49)) == pytest.approx(1.0)  # the peak, at the border of the two
    else:
        with pytest.raises(InputError, match=f"optim.warmup_steps = {warmup} overlaps with the {round(100 * decay)} steps"):
            validation.validate(changed)


def test_clipping_can_be_turned_off():
    gradient = {"w": jnp.full((2, 2), 1e3)}
    for clip_norm, seen in ((0.0, 2e3), (1.0, 1.0)):
        settings = dataclasses.replace(config().optim, clip_norm=clip_norm, beta1=0.0)
        state = optim.make(dataclasses.replace(config(), optim=settings)).init(gradient)
        _, state = optim.make(dataclasses.replace(config(), optim=settings)).update(gradient, state, gradient)
        first_moment = optax.tree_utils.tree_get(state, "mu")["w"]  # with beta1 = 0 the gradient that Adam saw
        np.testing.assert_allclose(jnp.linalg.norm(first_moment), seen, rtol=1e-5)
