"""The training state and how it comes to life, already split over the mesh."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from slimmoe_jax import model as model_lib
from slimmoe_jax import optim, sharding
from slimmoe_jax.config import TrainConfig
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState
from slimmoe_jax.spikes import Window


class TrainState(struct.PyTreeNode):
    """Everything that a step changes. `params` and `router` together are the weights."""

    step: jax.Array  # [] int32, steps done
    params: Any  # float32
    router: RouterState
    opt_state: Any
    key: jax.Array  # [2] uint32, dropout key data; each step folds its number in
    window: Window  # losses and gradient norms of late


def build_model(config: TrainConfig) -> SlimMoE:
    """The model at the config's precision."""
    return SlimMoE(config.model, dtype=jnp.dtype(config.precision), remat=config.remat)


def _initial(config: TrainConfig, model: SlimMoE | None) -> TrainState:
    params_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params = model_lib.init(model or build_model(config), params_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router=RouterState.initial(config.model),
        opt_state=optim.make(config).init(params),
        key=jax.random.key_data(dropout_key),
        window=Window.empty(config.optim.skip_window),
    )


def abstract(config: TrainConfig, mesh: Mesh, model: SlimMoE | None = None) -> TrainState:
    """The state's shapes, types and shardings, without its values."""

    def both() -> tuple[TrainState, TrainState]:
        boxed = _initial(config, model)
        return boxed, nn.unbox(boxed)  # here, since under a mesh only traced values can be unboxed

    boxed, shapes = jax.eval_shape(both)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, sharding.of_tree(boxed, mesh)
    )


def create(config: TrainConfig, mesh: Mesh, model: SlimMoE | None = None) -> TrainState:
    """A fresh state from the config's seed, of `model` in place of the config's if given. No device holds more than its share."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(config, mesh, model))
    with sharding.use(mesh):
        return jax.jit(lambda: nn.unbox(_initial(config, model)), out_shardings=shardings)()
