"""Grouped matrix products for GPUs: each group of rows times the matrix of its group, nothing padded and nothing dropped.

Axes: M rows, E groups (experts), D and F the two sides of a group's matrix.

The kernels are Pallas programs that Triton compiles (`jax.experimental.pallas.triton`), for NVIDIA GPUs from Ampere on. As in
MegaBlocks (Gale et al., arXiv 2211.15841) groups may have any size; here a tile of rows starts where its group starts, so that
it has one group only, and its rows past the group's end are masked. Products are summed in float32; how float32 inputs are
multiplied follows `jax_default_matmul_precision`, as everywhere in JAX. Where there is no GPU the kernels are interpreted: right,
and slow. They have been compiled for A100 and H100 without one at hand; on a GPU nothing has been run, and speed is unmeasured.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Blocks(NamedTuple):
    """How a product is cut up: each program computes a tile of it, a slice of the summed dimension at a time.

    Sizes are powers of two, at least 16. The default takes 96 KiB of shared memory in bfloat16.
    """

    rows: int = 128  # of a tile
    columns: int = 128  # of a tile
    inner_bytes: int = 128  # of the summed dimension: 64 values of bfloat16, 32 of float32
    warps: int = 8
    stages: int = 3  # slices that are loaded ahead

    def fitted(self, rows: int, columns: int, inner: int, dtype: jnp.dtype) -> tuple[int, int, int]:
        """Rows, columns and inner values of a block, no larger than a product of these sizes needs."""

        def fit(block: int, size: int) -> int:
            return min(block, max(16, pl.next_power_of_2(size)))

        return fit(self.rows, rows), fit(self.columns, columns), fit(self.inner_bytes // dtype.itemsize, inner)

    def compiler_params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


DEFAULT_BLOCKS = Blocks()
Ref = Any  # an array as a kernel sees it
Saved = tuple[jax.Array, jax.Array, jax.Array]  # rows, weights, group sizes


class Span(NamedTuple):
    """A block's places along one axis, and which of them count; the others may be past the array's end."""

    places: pl.Slice | slice
    inside: jax.Array  # [block] bool

    @classmethod
    def of(cls, start: jax.Array, block: int, end: jax.Array | int) -> Span:
        return cls(pl.ds(start, block), start + jnp.arange(block) < end)


class Tiles(NamedTuple):
    """Which rows a tile of the product has: `start` up to `end` or a block's length, all of one group."""

    group: jax.Array  # [T] int32, E where the rows are of no group
    start: jax.Array  # [T] int32
    end: jax.Array  # [T] int32, of the group


def grouped_dot(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, blocks: Blocks = DEFAULT_BLOCKS) -> jax.Array:
    """Multiplies each row by the matrix of its group; the rows of a group lie together, groups in order. Differentiable.

    Args:
      rows: [M, D], float32 or bfloat16.
      weights: [E, D, F], of the same type.
      group_sizes: [E] int32, 0 or more each, at most M together.
      blocks: the cut, the same for the product and its two gradients.
    Returns: [M, F] of the type of `rows`; zeros in the rows after the last group's.
    Raises:
      ValueError: the shapes or types do not go together.
    """
    experts, depth, _ = weights.shape
    if rows.shape[1] != depth or group_sizes.shape != (experts,) or rows.dtype != weights.dtype:
        raise ValueError(
            f"rows {rows.dtype}{rows.shape}, weights {weights.dtype}{weights.shape}, group sizes {group_sizes.shape}:"
            " need [M, D], [E, D, F] of the same type, and [E]"
        )
    return _grouped_dot(rows, weights, group_sizes, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_dot(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, blocks: Blocks) -> jax.Array:
    return _product(rows, weights, group_sizes, blocks, transposed=False)


def _grouped_dot_fwd(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, blocks: Blocks) -> tuple[jax.Array, Saved]:
    return _product(rows, weights, group_sizes, blocks, transposed=False), (rows, weights, group_sizes)


def _grouped_dot_bwd(blocks: Blocks, saved: Saved, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, weights, group_sizes = saved
    of_rows = _product(grad, weights, group_sizes, blocks, transposed=True)
    return of_rows, _sum_of_outer_products(rows, grad, group_sizes, blocks), None


_grouped_dot.defvjp(_grouped_dot_fwd, _grouped_dot_bwd)


# --- the product, and its gradient in the rows ------------------------------------------------------------------------


def _product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, blocks: Blocks, transposed: bool) -> jax.Array:
    """[M, D] times [E, D, F] -> [M, F]; transposed: [M, F] times [E, D, F] -> [M, D]."""
    columns = weights.shape[1 if transposed else 2]
    shape = (rows.shape[0], columns)
    block = blocks.fitted(*shape, rows.shape[1], rows.dtype)
    tiles = _tiles(group_sizes, rows.shape[0], block[0])
    return pl.pallas_call(
        functools.partial(_product_kernel, block=block, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct(shape, rows.dtype),
        grid=(pl.cdiv(columns, block[1]), tiles.group.size),  # programs of one tile of rows run together and share it in the cache
        compiler_params=blocks.compiler_params(),
        interpret=_interpret(),
        name="grouped_dot_transposed" if transposed else "grouped_dot",
    )(*tiles, rows, weights)


def _tiles(group_sizes: jax.Array, rows: int, block: int) -> Tiles:
    """Cuts each group into tiles of `block` rows, the last one shorter; the rows after the groups are one group more."""
    sizes = jnp.append(group_sizes, rows - group_sizes.sum())
    count = (rows + sizes.size * (block - 1)) // block  # the most there can be: each group leaves at most block - 1 rows unused
    ends, per_group = jnp.cumsum(sizes), pl.cdiv(sizes, block)
    next_tile = jnp.cumsum(per_group)  # [E + 1] the tile after each group's last
    tile = jnp.arange(count)
    group = jnp.searchsorted(next_tile, tile, side="right", method="compare_all")
    group = jnp.minimum(group, group_sizes.size)  # tiles that are not needed continue the last group, past its end
    start = (ends - sizes)[group] + block * (tile - (next_tile - per_group)[group])
    return Tiles(*(part.astype(jnp.int32) for part in (group, start, ends[group])))


def _product_kernel(
    group_ref: Ref, start_ref: Ref, end_ref: Ref, rows_ref: Ref, weights_ref: Ref, out_ref: Ref,
    *, block: tuple[int, int, int], transposed: bool,
) -> None:  # fmt: skip
    block_rows, block_columns, block_inner = block
    tile = pl.program_id(1)
    group = group_ref[tile]
    rows = Span.of(start_ref[tile], block_rows, end_ref[tile])
    columns = Span.of(pl.program_id(0) * block_columns, block_columns, out_ref.shape[1])

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        inner = Span.of(step * block_inner, block_inner, rows_ref.shape[1])
        left = _load(rows_ref, rows, inner)
        if transposed:
            return total + _dot(left, _load(weights_ref, columns, inner, group), (1, 1))
        return total + _dot(left, _load(weights_ref, inner, columns, group), (1, 0))

    # Rows of no group take no step and stay zeros. A product, as Pallas gives the constants of a `where` the wrong type.
    steps = (group < weights_ref.shape[0]).astype(jnp.int32) * pl.cdiv(rows_ref.shape[1], block_inner)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((block_rows, block_columns), jnp.float32))
    _store(out_ref, rows, columns, total)


# --- the gradient in the weights --------------------------------------------------------------------------------------


def _sum_of_outer_products(rows: jax.Array, grad: jax.Array, group_sizes: jax.Array, blocks: Blocks) -> jax.Array:
    """[M, D] and [M, F] -> [E, D, F]: for each group the sum over its rows."""
    shape = (group_sizes.size, rows.shape[1], grad.shape[1])
    block = blocks.fitted(*shape[1:], rows.shape[0], rows.dtype)
    bounds = jnp.append(0, jnp.cumsum(group_sizes)).astype(jnp.int32)
    return pl.pallas_call(
        functools.partial(_outer_kernel, block=block),
        out_shape=jax.ShapeDtypeStruct(shape, rows.dtype),
        grid=(pl.cdiv(shape[2], block[1]), pl.cdiv(shape[1], block[0]), shape[0]),
        compiler_params=blocks.compiler_params(),
        interpret=_interpret(),
        name="grouped_dot_weights",
    )(bounds, rows, grad)


def _outer_kernel(bounds_ref: Ref, rows_ref: Ref, grad_ref: Ref, out_ref: Ref, *, block: tuple[int, int, int]) -> None:
    block_rows, block_columns, block_inner = block
    group = pl.program_id(2)
    start, end = bounds_ref[group], bounds_ref[group + 1]
    left_columns = Span.of(pl.program_id(1) * block_rows, block_rows, rows_ref.shape[1])
    right_columns = Span.of(pl.program_id(0) * block_columns, block_columns, grad_ref.shape[1])

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        inner = Span.of(start + step * block_inner, block_inner, end)
        return total + _dot(_load(rows_ref, inner, left_columns), _load(grad_ref, inner, right_columns), (0, 0))

    steps = pl.cdiv(end - start, block_inner)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((block_rows, block_columns), jnp.float32))
    _store(out_ref, left_columns, right_columns, total, group)


# --- what the kernels share -------------------------------------------------------------------------------------------


def _interpret() -> bool:
    return jax.default_backend() != "gpu"


def _dot(left: jax.Array, right: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """The product of two matrices over one axis of each, in float32."""
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _load(ref: Ref, rows: Span, columns: Span, *group: jax.Array) -> jax.Array:
    """A block of a matrix, or of one matrix of a stack; zeros outside."""
    return plgpu.load(ref.at[*group, rows.places, columns.places], mask=_inside(rows, columns), other=0)


def _store(ref: Ref, rows: Span, columns: Span, values: jax.Array, *group: jax.Array) -> None:
    plgpu.store(ref.at[*group, rows.places, columns.places], values.astype(ref.dtype), mask=_inside(rows, columns))


def _inside(rows: Span, columns: Span) -> jax.Array:
    return rows.inside[:, None] & columns.inside[None, :]
