"""The mesh, what each logical axis means on it, and how a process's rows become a global batch.

One device is a mesh of one. Batches are split over all three axes; `fsdp` also splits parameters and optimiser state
along the model dimension, `expert` splits the experts, and tokens travel to them between devices (GShard, arXiv
2006.16668). Nothing that a run computes depends on the mesh: the same seed gives the same losses, to rounding, on 1
and on 8 devices.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slimmoe_jax import host
from slimmoe_jax.config import InputError, MeshConfig, TrainConfig

# Logical axis -> mesh axes. Axes that are not named here are not split.
RULES = (
    ("batch", ("data", "fsdp", "expert")),
    ("group", ("data", "fsdp")),  # sequences, where the expert axis holds experts instead
    ("embed", "fsdp"),
    ("expert", "expert"),
    ("vocab", None),
    ("heads", None),
    ("kv_heads", None),
    ("head_dim", None),
    ("mlp", None),
)


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices.

    Raises:
      InputError: the axes do not multiply to the number of devices, or there are none.
    """
    host.check_devices()
    devices = jax.device_count()
    data = devices // (config.fsdp * config.expert) if config.data == -1 else config.data
    if data * config.fsdp * config.expert != devices:
        raise InputError(
            f"mesh.data x mesh.fsdp x mesh.expert = {config.data} x {config.fsdp} x {config.expert} does not fit"
            f" {devices} device(s): their product must be {devices}"
        )
    shape = (data, config.fsdp, config.expert)
    return jax.make_mesh(shape, ("data", "fsdp", "expert"), axis_types=(AxisType.Auto,) * 3)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises InputError where a micro-batch does not divide among the devices, or the model among the shards."""
    micro_batch = config.data.batch_size // config.optim.accumulate
    if micro_batch % mesh.size:
        raise InputError(
            f"data.batch_size / optim.accumulate = {micro_batch} sequences do not divide among {mesh.size} devices:"
            " make it a multiple"
        )
    if config.model.width % config.mesh.fsdp:
        raise InputError(f"mesh.fsdp = {config.mesh.fsdp} does not divide model.width = {config.model.width}: choose a divisor")


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Inside, logical constraints of the model files refer to this mesh. Needed wherever a step is traced."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def of_tree(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of a tree whose leaves carry logical axes, unboxed."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def cache_programs(folder: str) -> None:
    """Keeps compiled programs in a folder, so that the next start is quick; an empty name keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows -> global arrays, split over all devices. Starts the copy and returns."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # between processes JAX takes this for a transfer that nobody asked for
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def put_whole(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch that each process holds all rows of -> global arrays, split over all devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__) for name, rows in batch.items()}


def fetch(tree: Any) -> Any:
    """Arrays -> numpy, whole in each process, wherever their parts lie. All processes call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.device_get(multihost_utils.process_allgather(tree, tiled=True))


def padded_rows(rows: int, mesh: Mesh) -> int:
    """The smallest number of rows from `rows` up that divides among the devices."""
    return math.ceil(rows / mesh.size) * mesh.size
