"""Held-out loss: over whole records, and by position.

Axes: B batch, S sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slimmoe_jax import losses, sharding, step
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Means over held-out targets."""

    loss: float  # nats a token
    tokens: int  # targets scored
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


def score(
    eval_step: Callable[..., Any], params: Any, router: RouterState, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh,
    bytes_per_token: float,
) -> HeldOut:  # fmt: skip
    """Runs `eval_step` (from `step.make_eval_step`, jitted) over batches of held-out records.

    Args:
      bytes_per_token: of the held-out text, to turn nats a token into bits a byte.
    Raises:
      InputError: there is no batch, or nothing in it is to be predicted.
    """
    sums = _run_all(functools.partial(eval_step, params, router), batches, mesh)
    nats, targets = (sum(float(value) for value in column) for column in zip(*jax.device_get(sums), strict=True))
    _check_targets(targets)
    loss = nats / targets
    return HeldOut(loss, int(targets), loss / math.log(2) / bytes_per_token)


def score_by_position(
    position_step: Callable[..., Any], params: Any, router: RouterState, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh,
    bytes_per_token: float, bins: list[tuple[int, int]],
) -> tuple[HeldOut, list[dict[str, float]]]:  # fmt: skip
    """The same by `position_step` (from `make_position_step`, jitted), and a row for each bin of positions that has targets.

    Raises:
      InputError: there is no batch, or nothing in it is to be predicted.
    """
    sums = _run_all(functools.partial(position_step, params, router), batches, mesh)
    nats, targets = (np.array(column, np.float64).sum(axis=0) for column in zip(*jax.device_get(sums), strict=True))
    _check_targets(targets.sum())
    loss = float(nats.sum() / targets.sum())
    rows = []
    for first, last in bins:
        scored = int(targets[first : last + 1].sum())
        if scored:
            rows.append({"first": first, "last": last, "targets": scored, "loss": float(nats[first : last + 1].sum() / scored)})
    return HeldOut(loss, int(targets.sum()), loss / math.log(2) / bytes_per_token), rows


def _check_targets(number: float) -> None:
    if not number:
        raise InputError("the records of the validation split that were read have no targets: read more batches")


def _run_all(function: Callable[..., Any], batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> list[Any]:
    """The function's result of each batch. One batch is made ready while another is computed, and no more: progress is real."""
    found: list[Any] = []
    for batch in batches:
        found.append(function(sharding.put_batch(batch, mesh)))
        jax.block_until_ready(found[-2:-1])
    if not found:
        raise InputError("the validation split is empty: prepare the records with a larger data.validation_fraction")
    return found


def make_position_step(config: TrainConfig, model: SlimMoE, end_token: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The function (params, router, batch) -> (sums of nats [S], numbers of targets [S]) by position.

    A target's position is the number of tokens that the model could have attended to before the one that it reads: where
    attention is kept within documents, it counts from the document's start.
    """

    def position_step(params: Any, router: RouterState, batch: step.Batch) -> tuple[jax.Array, jax.Array]:
        inputs = step.inputs_of(batch, end_token if config.data.document_mask else None)
        tokens, positions = inputs["tokens"], inputs.get("positions")
        out = model.apply({"params": params}, tokens, router, positions=positions, segments=inputs.get("segments"))
        nll = losses.token_nll(out.hidden, out.head, inputs["targets"])
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        zeros = jnp.zeros(tokens.shape[1], jnp.float32)
        return zeros.at[positions].add(nll * inputs["weights"]), zeros.at[positions].add(inputs["weights"])

    return position_step


def position_bins(length: int, kind: Literal["powers", "equal"]) -> list[tuple[int, int]]:
    """Bins [first, last] of positions 0 to length - 1: 0, 1, 2-3, 4-7, ..., or up to 16 of equal width."""
    width = math.ceil(length / 16)
    starts = [0, *(2**n for n in range(length.bit_length()))] if kind == "powers" else list(range(0, length, width))
    starts = [start for start in starts if start < length]
    return [(first, after - 1) for first, after in zip(starts, [*starts[1:], length], strict=True)]
