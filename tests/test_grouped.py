"""Grouped matrix products against a loop over groups, and what the kernels become for a GPU. Here they are interpreted."""

import dataclasses
import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from slimmoe_jax import experts, grouped, routing, sharding, train
from slimmoe_jax.config import InputError, MeshConfig, ModelConfig, RouterConfig
from slimmoe_jax.experts import ExpertWeights
from slimmoe_jax.grouped import Blocks, grouped_dot

M, D, F, E = 72, 40, 24, 4
SMALL = Blocks(rows=16, columns=16, inner_bytes=64)  # several blocks along each axis, none of which they divide


def product_by_loop(rows, weights, sizes):
    """[M, F] in numpy: group by group, zeros after the last."""
    out, start = np.zeros((rows.shape[0], weights.shape[2]), np.float32), 0
    for matrix, size in zip(weights, sizes, strict=True):
        out[start : start + size] = rows[start : start + size] @ matrix
        start += size
    return out


def gradients_by_einsum(rows, weights, sizes, cotangent):
    """Of sum(product * cotangent), in the rows and in the weights: a sum over groups that are picked out by 0 and 1."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    member = np.zeros((rows.shape[0], len(sizes)), np.float32)
    member[np.arange(owner.size), owner] = 1
    of_rows = np.einsum("ME,MF,EDF->MD", member, cotangent, weights)
    return of_rows, np.einsum("ME,MD,MF->EDF", member, rows, cotangent)


def make_inputs(*shape, seed=0):
    """Rows [M, D], weights [E, D, F] and a cotangent [M, F]."""
    m, d, f, e = shape
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape, np.float32) for shape in ((m, d), (e, d, f), (m, f)))


@jax.jit
def product_and_gradients(rows, weights, sizes, cotangent):
    """In small blocks; compiled once for all sizes of groups."""
    product, back = jax.vjp(lambda rows, weights: grouped_dot(rows, weights, sizes, SMALL), rows, weights)
    return product, *back(cotangent)


def assert_is_the_loop(sizes, inputs):
    rows, weights, cotangent = inputs
    results = product_and_gradients(rows, weights, jnp.array(sizes, jnp.int32), cotangent)
    expected = product_by_loop(rows, weights, sizes), *gradients_by_einsum(rows, weights, sizes, cotangent)
    for name, got, wanted in zip(("product", "of rows", "of weights"), results, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4, err_msg=f"{name}, groups of {sizes}")


@pytest.mark.parametrize(
    "sizes",
    [
        (16, 32, 16, 8),  # tiles end with groups
        (17, 1, 15, 39),  # they do not
        (0, 40, 0, 32),  # empty groups, at the start too
        (0, 0, M, 0),  # all rows in one
        (0, 0, 0, 0),  # none in any
        (5, 0, 30, 2),  # 35 rows of no group
        (1, 1, 1, 1),
    ],
)
def test_product_and_gradients_are_those_of_a_loop(sizes):
    assert_is_the_loop(sizes, make_inputs(M, D, F, E))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.lists(st.integers(0, M), min_size=E, max_size=E).filter(lambda bounds: sum(bounds) > 0), st.integers(0, M))
def test_any_sizes_of_groups(shares, total):
    """Groups in any proportion, with any number of rows left over."""
    sizes = tuple(total * share // sum(shares) for share in shares)
    assert_is_the_loop(sizes, make_inputs(M, D, F, E))


def test_rows_of_no_group_reach_nothing():
    """NaN there: product and gradient are zeros in those rows, and the weights' gradient does not see them."""
    rows, weights, cotangent = make_inputs(M, D, F, E)
    sizes = (20, 0, 7, 11)
    rows[sum(sizes) :] = np.nan
    cotangent[sum(sizes) :] = np.nan
    product, of_rows, of_weights = product_and_gradients(rows, weights, jnp.array(sizes), cotangent)
    assert not product[sum(sizes) :].any() and not of_rows[sum(sizes) :].any()
    assert jnp.isfinite(product).all() and jnp.isfinite(of_rows).all() and jnp.isfinite(of_weights).all()


@pytest.mark.parametrize("shape", [(300, 130, 70, 3), (1, 3, 5, 2)], ids=str)
def test_blocks_fit_themselves_to_the_product(shape):
    """The default blocks, of a product that needs several of them and of one much smaller than any."""
    rows, weights, cotangent = make_inputs(*shape)
    sizes = (shape[0] - shape[0] // 3, *(0,) * (shape[3] - 2), shape[0] // 3)
    product, back = jax.vjp(lambda *operands: grouped_dot(*operands, jnp.array(sizes)), rows, weights)
    np.testing.assert_allclose(product, product_by_loop(rows, weights, sizes), atol=1e-4)
    for got, wanted in zip(back(jnp.asarray(cotangent)), gradients_by_einsum(rows, weights, sizes, cotangent), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_bfloat16_is_summed_in_float32():
    """Against float32 products of the same bfloat16 numbers only the result is rounded, to half a unit in its 8th bit."""
    rows, weights, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in make_inputs(M, D, F, E))
    sizes = jnp.array((30, 0, 25, 10))
    low = product_and_gradients(rows, weights, sizes, cotangent)
    exact = product_and_gradients(*(x.astype(jnp.float32) for x in (rows, weights)), sizes, cotangent.astype(jnp.float32))
    for got, wanted in zip(low, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-5)


def test_long_sums_of_bfloat16_do_not_stall():
    """300 ones in each summed dimension: in bfloat16 the sum would stay at 256."""
    ones = [jnp.ones(shape, jnp.bfloat16) for shape in ((304, 304), (1, 304, 304), (304, 304))]
    for result in product_and_gradients(ones[0], ones[1], jnp.array([304]), ones[2]):
        np.testing.assert_array_equal(result.astype(jnp.float32), 304)


@pytest.mark.parametrize(
    ("rows", "weights", "sizes"),
    [((8, 3), (2, 4, 5), 2), ((8, 4), (2, 4, 5), 3), ((8, 4), (2, 4, 5), 2)],
    ids=["depth", "groups", "types"],
)
def test_operands_that_do_not_go_together_are_refused(rows, weights, sizes):
    with pytest.raises(ValueError, match=r"need \[M, D\], \[E, D, F\] of the same type"):
        grouped_dot(jnp.zeros(rows), jnp.zeros(weights, jnp.bfloat16), jnp.zeros(sizes, jnp.int32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_lower_for_cuda(monkeypatch, capsys, dtype):
    """At the 250M's sizes, product and both gradients become Triton kernels: what Triton has no equivalent for is refused here.

    Whether they fit a GPU's shared memory, and how fast they are, only a GPU tells.
    """
    monkeypatch.setattr(grouped, "_interpret", lambda: False)
    monkeypatch.setattr(grouped.pl, "pallas_call", functools.partial(grouped.pl.pallas_call, debug=True))  # prints each kernel

    def step(rows, weights, sizes, cotangent):
        product, back = jax.vjp(lambda rows, weights: grouped_dot(rows, weights, sizes), rows, weights)
        return product, back(cotangent)

    shapes = ((131_072, 768), dtype), ((4, 768, 1_536), dtype), ((4,), jnp.int32), ((131_072, 1_536), dtype)
    # From JAX 0.11.2 on, kernels are lowered for a named GPU, and where there is none it has to be told which.
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        traced = jax.jit(step).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("grouped_dot", "grouped_dot_transposed", "grouped_dot_weights"):
        assert re.search(rf'custom_call.*triton.*"{kernel}"', program)
    kernels = capsys.readouterr().out
    assert kernels.count("tt.func") == 3
    assert '"tt.func"' not in kernels  # MLIR's generic form, in quotes, is printed for a module that does not verify


@pytest.mark.parametrize("gated", [False, True])
def test_experts_equal_all_experts(gated):
    """A layer of 130 top-2 tokens, so of several tiles an expert: values and gradients of `dense`."""
    router = RouterConfig(kind="top_k", max_experts=2)
    config = ModelConfig(width=D, experts=E, expert_hidden=F, gated=gated, router=router)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 65, D), np.float32)
    scores = rng.standard_normal((2, 65, E), np.float32) + np.array([2, 0, 0, -9], np.float32)  # the last expert has no token
    up, gate, down = (rng.standard_normal(shape, np.float32) / 5 for shape in ((E, D, F), (E, D, F), (E, F, D)))
    weights = ExpertWeights(up, down, gate if gated else None)
    cotangent = rng.standard_normal(x.shape, np.float32)  # given: one that depends on y, of some tens, would multiply its rounding

    def loss(x, scores, weights, method):
        routed = routing.route(scores, router, jnp.float32(1), jnp.zeros(E))
        y, _ = experts.apply_experts(x, routed.gates, routed.mask, weights, method=method, config=config)
        return jnp.sum(y * cotangent), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="method")
    for got, wanted in zip(*(jax.tree.leaves(run(x, scores, weights, method=m)) for m in ("grouped", "dense")), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_several_devices_are_refused_in_training_and_use_ragged_otherwise():
    """With 8 devices: one line that names the field, before anything is read or compiled."""
    config = dataclasses.replace(ModelConfig(), dispatch="grouped")
    with sharding.use(sharding.make_mesh(MeshConfig())):
        with pytest.raises(InputError, match="model.dispatch = grouped trains on one device, and the mesh has 8"):
            experts.resolve_dispatch(config, train=True)
        assert experts.resolve_dispatch(config, train=False) == "ragged"
    with pytest.raises(InputError, match="model.dispatch = grouped"):
        train.main(["--config", "configs/quickstart.py", "--model.dispatch", "grouped", "--dry-run"])


@pytest.mark.parametrize(("backend", "devices", "method"), [("gpu", 1, "grouped"), ("gpu", 8, "ragged"), ("cpu", 1, "ragged")])
def test_outside_training_the_kernels_run_where_they_can(monkeypatch, backend, devices, method):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mesh = jax.make_mesh((devices, 1, 1), ("data", "fsdp", "expert"), devices=jax.devices()[:devices])
    with sharding.use(mesh):
        assert experts.resolve_dispatch(dataclasses.replace(ModelConfig(), dispatch="grouped"), train=False) == method
