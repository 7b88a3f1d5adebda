"""Digests of arrays: whether a checkpoint came back as it went, and which weights a result is of.

An array's digest is a sum of its words modulo 2^32, each weighted by an odd number that depends on its place: no single flipped
bit leaves it as it is, and a change of many words does so once in four billion. It is computed where the array lies, in integers,
and does not depend on how the array is split over devices. The fingerprint of weights is a sha256.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def _digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[...] of 1, 2 or 4 bytes a value -> the digest, and the number of values that are NaN or infinite, [] uint32 each.

    One program for both: a process that reads a checkpoint needs both, and compiles it for each shape.
    """
    not_finite = jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * 65_599 + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32), not_finite


def of_tree(tree: Any) -> dict[str, int]:
    """The digest of each leaf by its path."""
    # One after the other: on CPU devices, several programs with collectives under way at once can wait for each other for ever.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): int(jax.device_get(_digest(leaf)[0])) for path, leaf in leaves}


def not_finite(tree: Any) -> dict[str, str]:
    """The leaves with values that are NaN or infinite, by path: how many of how many. They are counted where the arrays lie."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    counts = [int(jax.device_get(_digest(leaf)[1])) for _, leaf in leaves]
    pairs = zip(leaves, counts, strict=True)
    return {jax.tree_util.keystr(path): f"{count:,} of {leaf.size:,} values" for (path, leaf), count in pairs if count}


def fingerprint(params: Any, router: Any) -> str:
    """sha256 over each parameter's name, type, shape and bytes, and the router state's: the same wherever the weights lie."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "router": router}):
        values = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
