"""One training step and one evaluation step, as pure functions to be jitted.

Axes: B batch, S sequence, A micro-batches, N layers.

The auxiliary balance loss depends on expert counts over the global batch. Devices add up by themselves under `jit`.
Over accumulated micro-batches the loss is differentiated through a scan whose body is recomputed: the counts of all
micro-batches are known before any gradient is formed, so that accumulation gives exactly the gradient of the undivided
batch, for one more forward pass. Where no loss couples micro-batches, plain accumulation is used and nothing is
recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from slimmoe_jax import losses, optim, routing, sharding, spikes
from slimmoe_jax import state as state_lib
from slimmoe_jax.config import TrainConfig
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState, RoutingStats
from slimmoe_jax.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Sums = tuple[jax.Array, RoutingStats | None]  # cross-entropy, routing statistics

WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}  # bits


def inputs_of(batch: Batch, end_token: int | None) -> dict[str, jax.Array]:
    """Splits records into inputs and targets, and marks segments where attention and positions are to stay within them.

    Args:
      batch: "tokens" [B, S + 1] int32; of packed records "segments", 0 for padding, and "targets", both [B, S + 1] int32, and of
        mixtures "text" [B] int32, 1 for a record of text among packed ones; optionally "weight" [B] float32, 0 for a row that only
        fills the batch.
      end_token: the token that closes a document, where documents of text are to be segments; None lets attention cross them.
    Returns: tokens, targets [B, S] int32, weights [B, S] float32, and with segments positions, segments and valid [B, S].
    """
    tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    inputs = {"tokens": tokens, "targets": targets, "weights": jnp.ones(targets.shape, jnp.float32)}
    if "segments" in batch:
        segments = batch["segments"][:, :-1]
        within = batch["segments"][:, 1:] == segments  # nothing is predicted across a border
        if end_token is not None and "text" in batch:
            segments = jnp.where(batch["text"][:, None] > 0, 1 + _documents(tokens, end_token), segments)
        inputs["weights"] = jnp.where(within, batch["targets"][:, 1:], 0).astype(jnp.float32)
        inputs |= {"segments": segments, "valid": segments > 0}
    elif end_token is not None:
        inputs |= {"segments": _documents(tokens, end_token), "valid": jnp.ones(tokens.shape, bool)}
    if "segments" in inputs:
        starts = jnp.pad(inputs["segments"][:, 1:] != inputs["segments"][:, :-1], ((0, 0), (1, 0)))
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        inputs["positions"] = place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    if "weight" in batch:
        inputs["weights"] *= batch["weight"][:, None]
    return inputs


def _documents(tokens: jax.Array, end_token: int) -> jax.Array:
    """The number of each token's document in its record [B, S], from 0; the end token closes a document."""
    return jnp.cumsum(jnp.pad(tokens == end_token, ((0, 0), (1, 0)))[:, :-1], axis=1)


def make_train_step(
    config: TrainConfig, model: SlimMoE, optimizer: optax.GradientTransformation, end_token: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function (state, batch) -> (state, metrics).

    A step whose loss or gradient is not finite changes nothing but the step's number. With `optim.skip_sigma`, one whose loss or
    gradient norm is a spike changes no weight and no moment either.
    """
    router_config, accumulate = config.model.router, config.optim.accumulate
    learning_rate = optim.schedule(config)

    def micro_sums(params: Any, router: RouterState, micro: Batch, key: jax.Array) -> Sums:
        """Sum of cross-entropy and stacked routing statistics of one micro-batch."""
        out = model.apply(
            {"params": params}, micro["tokens"], router, train=True, rngs={"dropout": key},
            positions=micro.get("positions"), segments=micro.get("segments"), valid=micro.get("valid"),
        )  # fmt: skip
        nll = losses.cross_entropy(out.hidden, out.head, micro["targets"], micro["weights"], config.optim.z_weight)
        return nll, out.stats

    def total_loss(nll: jax.Array, stats: RoutingStats | None, router: RouterState, tokens: jax.Array) -> tuple[jax.Array, Metrics]:
        """Mean cross-entropy plus the routers' losses, and the parts by name."""
        parts = {"loss": nll / tokens}
        if stats is not None:
            parts |= losses.router_losses(stats, router, router_config)
        return sum(parts.values(), jnp.zeros(())), parts

    def whole(params: Any, router: RouterState, micros: Batch, keys: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """The loss of all micro-batches at once; with one of them, nothing is recomputed."""
        if accumulate == 1:
            nll, stats = micro_sums(params, router, jax.tree.map(lambda x: x[0], micros), keys[0])
        else:
            body = jax.checkpoint(lambda total, xs: (_add(total, micro_sums(params, router, *xs)), None))
            (nll, stats), _ = jax.lax.scan(body, _zeros(micro_sums, params, router, micros, keys), (micros, keys))
        loss, parts = total_loss(nll, stats, router, tokens)
        return loss, (parts, stats)

    def one_by_one(params: Any, router: RouterState, micros: Batch, keys: jax.Array, tokens: jax.Array) -> Any:
        """Value and gradient summed over micro-batches, each balanced, if at all, by itself."""

        def micro_loss(params: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            nll, stats = micro_sums(params, router, micro, key)
            loss, parts = total_loss(nll, stats, router, tokens / accumulate)
            return loss / accumulate, (jax.tree.map(lambda x: x / accumulate, parts), stats)

        def body(total: Any, xs: Any) -> tuple[Any, None]:
            return _add(total, jax.value_and_grad(micro_loss, has_aux=True)(params, *xs)), None

        start = _zeros(lambda p, r, m, k: jax.value_and_grad(micro_loss, has_aux=True)(p, m, k), params, router, micros, keys)
        return jax.lax.scan(body, start, (micros, keys))[0]

    coupled = config.model.is_moe and router_config.balance == "aux"
    value_and_grad = jax.value_and_grad(whole, has_aux=True) if coupled or accumulate == 1 else one_by_one

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        inputs = inputs_of(batch, end_token if config.data.document_mask else None)
        micros = jax.tree.map(lambda x: _split(x, accumulate), inputs)
        keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), accumulate)
        tokens = jnp.maximum(inputs["weights"].sum(), 1)
        (loss, (parts, stats)), grads = value_and_grad(state.params, state.router, micros, keys, tokens)

        router = state.router if stats is None else routing.update(state.router, stats, router_config)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            new = (optax.apply_updates(state.params, updates), opt_state, router)
        # Selection, not multiplication by 0: 0 x NaN is NaN.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        sigmas = spikes.sigmas(state.window, parts["loss"], norm)
        spike = jnp.maximum(*sigmas) > config.optim.skip_sigma if config.optim.skip_sigma else jnp.bool_(False)
        old = (state.params, state.opt_state, state.router)
        params, opt_state, router = _select(finite & ~spike, new, old)
        window = _select(finite, spikes.push(state.window, parts["loss"], norm, sigmas[0]), state.window)

        metrics = parts | {"grad_norm": norm, "learning_rate": learning_rate(state.step)}
        metrics |= {"skipped": ~finite | spike, "loss_sigma": sigmas[0], "spike_score": spikes.score(window)}
        if stats is not None:
            metrics |= routing.metrics(stats) | {
                "threshold": state.router.threshold,
                "l1_weight": state.router.l1_weight,
            }
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, router=router, window=window)
        return state, metrics

    return train_step


def jit_train_step(
    config: TrainConfig, mesh: Mesh, end_token: int, model: SlimMoE | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The training step of the config, or of `model` in place of the config's, to be compiled as training compiles it.

    The state is donated and stays where it lies on the mesh; each process has the metrics.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, state_lib.abstract(config, mesh, model))
    return jax.jit(
        make_train_step(config, model or state_lib.build_model(config), optim.make(config), end_token),
        donate_argnums=0,
        out_shardings=(layout, sharding.replicated(mesh)),
        compiler_options=compiler_options(),
    )


def compiler_options() -> dict[str, int]:
    """What XLA is told, against its own choice, when it compiles a training step for this process's devices.

    Where a processor has vectors of 512 bits, XLA prefers 256, since older processors slow down at 512. Whether XLA still knows
    the option is tried first, so that a later XLA without it trains as well.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if jax.default_backend() != "cpu" or not cpuinfo.exists() or " avx512f " not in cpuinfo.read_text():
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=WIDE_VECTORS).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return WIDE_VECTORS


def make_eval_step(
    config: TrainConfig, model: SlimMoE, end_token: int
) -> Callable[[Any, RouterState, Batch], tuple[jax.Array, jax.Array]]:
    """The function (params, router, batch) -> (sum of nats, number of targets). No dropout, no dropped tokens."""

    def eval_step(params: Any, router: RouterState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs = inputs_of(batch, end_token if config.data.document_mask else None)
        out = model.apply(
            {"params": params}, inputs["tokens"], router,
            positions=inputs.get("positions"), segments=inputs.get("segments"),
        )  # fmt: skip
        nll = losses.token_nll(out.hidden, out.head, inputs["targets"])
        return jnp.sum(nll * inputs["weights"]), inputs["weights"].sum()

    return eval_step


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [A, B / A, ...]; micro-batch a takes rows a, a + A, ..., so that each device keeps its own rows."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _add(a: Any, b: Any) -> Any:
    """Adds two trees; routing statistics know how to add themselves."""
    is_stats = lambda x: isinstance(x, routing.RoutingStats)  # noqa: E731
    return jax.tree.map(lambda x, y: x + y, a, b, is_leaf=is_stats)


def _zeros(function: Callable[..., Any], params: Any, router: RouterState, micros: Batch, keys: jax.Array) -> Any:
    """Zeros like what `function` returns for one micro-batch."""
    first = jax.tree.map(lambda x: x[0], micros)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, params, router, first, keys[0]))
