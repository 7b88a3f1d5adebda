"""Expert dispatch: four ways to send tokens through the experts that they chose, behind one function.

Axes: B batch, S sequence, D model, E experts, F expert hidden, K most experts a token, C slots an expert and sequence,
P = S K (token, choice) pairs, M rows of the expert buffer, R rows that an expert computes: B C, or B S in `dense`.

- `dense`: every expert computes every token; unchosen results have gate 0. The oracle, and exact at any batch size.
- `capacity`: each expert takes at most C tokens of a sequence, earlier tokens first, so that shapes are static. Where a sequence
  has segments, each has a share of the C slots by its length, so that no segment's choices depend on another's. A choice that
  finds its expert full is dropped: the token keeps its residual, and the drop is counted.
- `ragged`: pairs sorted by expert, grouped matrix products over groups of any length; nothing is dropped.
- `grouped`: the same with this package's own products for GPUs, for a mesh of one device.

All four compute the same where nothing is dropped, dropout included: what is dropped of a hidden activation depends on its token
and expert, not on the row that it stands in.

Rows move only by gathers. The gradient of a gather is a scatter, which is slow where rows collide; here the inverse
index is known, so the gradient is written as a gather as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimmoe_jax import row_blocks
from slimmoe_jax.config import InputError, ModelConfig
from slimmoe_jax.grouped import grouped_dot
from slimmoe_jax.products import weigh
from slimmoe_jax.row_blocks import ExpertWeights as ExpertWeights

BY_SEQUENCE = ("batch", None, None, None)  # of [B, E, C, D]
BY_EXPERT = ("expert", "group", None, None)  # of [E, B, C, D]

Dispatch = Literal["dense", "capacity", "ragged", "grouped"]
# Of hidden activations [.., F] and their rows' numbers [..] uint32: a pytree, such as `dropout.Draw`.
HiddenDropout = Callable[[jax.Array, jax.Array], jax.Array]


class Plan(NamedTuple):
    """Where each pair goes. An index one past the end means nowhere; reading there gives zeros."""

    slot_of_pair: jax.Array  # [S, K] int32 into M
    pair_of_slot: jax.Array  # [M] int32 into P
    group_sizes: jax.Array  # [E] int32, pairs that chose each expert


def resolve_dispatch(config: ModelConfig, train: bool) -> Dispatch:
    """Resolves `auto` to a concrete dispatch, and gives way where the one asked for cannot run.

    `auto` trains dropless (`ragged`) on a CPU, where that costs no more than `capacity` does (docs/performance.md), and with
    `capacity` elsewhere, where no dropless dispatch has been timed. Outside training nothing is ever dropped: `auto` and `capacity`
    become `dense`. There `grouped` becomes `ragged`, which computes the same, where its kernels would be interpreted or the mesh
    in use has several devices: the partitioner cannot split a kernel, each device would compute the whole batch.

    Raises:
      InputError: training with `grouped` under a mesh of several devices.
    """
    if not config.is_moe:
        return "dense"
    method = config.dispatch
    if method == "auto":
        method = "ragged" if train and jax.default_backend() == "cpu" else "capacity"
    if method == "grouped":
        devices = jax.sharding.get_abstract_mesh().size
        if train and devices > 1:
            raise InputError(f"model.dispatch = grouped trains on one device, and the mesh has {devices}: use auto or ragged")
        return "grouped" if train or (devices <= 1 and jax.default_backend() == "gpu") else "ragged"
    return "dense" if method == "capacity" and not train else method


def capacity(config: ModelConfig, length: int) -> int:
    """C: slots an expert has for a sequence of `length` tokens, a multiple of 8 where that is below the length."""
    even_share = config.router.max_experts * length / config.experts
    return min(length, 8 * math.ceil(config.capacity_factor * even_share / 8))


def apply_experts(
    x: jax.Array,
    gates: jax.Array,
    mask: jax.Array,
    weights: ExpertWeights,
    *,
    method: Dispatch,
    config: ModelConfig,
    segments: jax.Array | None = None,
    dropout: HiddenDropout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sends each token through its experts and sums their outputs by gate.

    Args:
      x: [B, S, D].
      gates: [B, S, E] float32.
      mask: [B, S, E] bool, at most `config.router.max_experts` True a token.
      segments: [B, S] int32; `capacity` shares its slots among the segments of a sequence, each a run of equal numbers.
      dropout: applied to the experts' hidden activations, each by itself. The row of token t (counted over the batch) and expert e
        is t E + e.
    Returns: [B, S, D], and the choices [B, S, E] that were dropped for want of a slot.
    """
    if method == "dense":
        return _dense(x, gates, weights, dropout), jnp.zeros_like(mask)
    if method == "capacity":
        return _capacity(x, gates, mask, weights, config, segments, dropout)
    return _on_each_device(_sorted(method, config, dropout), x, gates, mask, weights), jnp.zeros_like(mask)


def _dense(x: jax.Array, gates: jax.Array, weights: ExpertWeights, dropout: HiddenDropout | None) -> jax.Array:
    # Experts are a batch axis, since a CPU would otherwise transpose all weights, in decoding for each token. Rows are one axis,
    # since a gradient that contracts two costs it a transposed copy of the hidden layer.
    experts, width = weights.up.shape[:2]
    rows = jnp.broadcast_to(x.reshape(-1, width), (experts, x.size // width, width))
    numbers = _numbers(jnp.arange(rows.shape[1], dtype=jnp.uint32)[None, :], jnp.arange(experts)[:, None], experts)
    of_row = gates.reshape(-1, experts).T[..., None].astype(x.dtype)

    def down(hidden: jax.Array, gate: jax.Array | None, of_row: jax.Array) -> jax.Array:
        # Weighting the hidden layer instead of the output spares an array [E, R, D].
        return weigh("ERF,EFD->RD", _dropped(_activate(hidden, gate), numbers, dropout) * of_row, weights.down)

    hidden = weigh("ERD,EDF->ERF", rows, weights.up)
    gate = None if weights.gate is None else weigh("ERD,EDF->ERF", rows, weights.gate)
    return _lean(down)(hidden, gate, of_row).reshape(x.shape)


def _capacity(
    x: jax.Array,
    gates: jax.Array,
    mask: jax.Array,
    weights: ExpertWeights,
    config: ModelConfig,
    segments: jax.Array | None,
    dropout: HiddenDropout | None,
) -> tuple[jax.Array, jax.Array]:
    batch, length, width = x.shape
    experts, slots = config.experts, capacity(config, length)
    choices = _choices(mask, config.router.max_experts)
    plan = jax.vmap(lambda c, s: _slotted_plan(c, slots, s))(choices, segments)
    token = plan.pair_of_slot // choices.shape[-1] + length * jnp.arange(batch)[:, None]
    token = token.reshape(batch, experts, slots).swapaxes(0, 1).reshape(experts, batch * slots)
    numbers = _numbers(token, jnp.arange(experts)[:, None], experts)

    def up(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = jax.vmap(_rows_of_tokens)(x, plan).reshape(batch, experts, slots, width)
        rows = _exchange(rows, BY_SEQUENCE, BY_EXPERT)
        # One axis of rows: on a CPU, a gradient that contracts two costs a transposed copy of the hidden layer.
        hidden = weigh("ERD,EDF->ERF", rows.reshape(experts, batch * slots, width), weight)
        return nn.with_logical_constraint(hidden, ("expert", "group", None))

    def down(hidden: jax.Array, gate: jax.Array | None) -> jax.Array:
        out = weigh("ERF,EFD->ERD", _dropped(_activate(hidden, gate), numbers, dropout), weights.down)
        return out.reshape(experts, batch, slots, width)

    hidden = _lean(up)(x, weights.up)
    out = _lean(down)(hidden, None if weights.gate is None else _lean(up)(x, weights.gate))
    out = _exchange(out, BY_EXPERT, BY_SEQUENCE).reshape(batch, experts * slots, width)
    out = jax.vmap(_rows_of_pairs)(out, plan)
    full = plan.slot_of_pair == experts * slots
    return _combine(out, _gate_of_choice(gates, choices)), jnp.any(choices & full[:, :, None, :], axis=-1)


def _exchange(rows: jax.Array, now: tuple[str | None, ...], then: tuple[str | None, ...]) -> jax.Array:
    """Swaps the first two axes, sequences and experts, and says where rows lie before and after.

    Over an expert axis of the mesh that is an exchange of rows, forward and backward. Untold, the partitioner replicates them.
    """
    rows = nn.with_logical_constraint(rows, now)
    return nn.with_logical_constraint(rows.swapaxes(0, 1), then)


def _sorted(method: Dispatch, config: ModelConfig, dropout: HiddenDropout | None) -> Callable[..., jax.Array]:
    """The dispatches by pairs sorted by expert, as a function of arrays alone."""
    by_blocks = method == "ragged" and jax.default_backend() == "cpu"  # where XLA's ragged product takes several times as long
    spare = row_blocks.block_rows(config.width, config.expert_hidden) if by_blocks else 0

    def apply(x: jax.Array, gates: jax.Array, mask: jax.Array, first_token: jax.Array, weights: ExpertWeights) -> jax.Array:
        batch, length, width = x.shape
        choices = _choices(mask, config.router.max_experts)
        plan = _packed_plan(choices.reshape(batch * length, *choices.shape[2:]), spare)
        token = plan.pair_of_slot // choices.shape[-1] + first_token
        expert = jnp.sum(jnp.arange(token.size)[:, None] >= jnp.cumsum(plan.group_sizes)[None, :], axis=-1)
        numbers = _numbers(token, expert, config.experts)
        tokens = x.reshape(-1, width)
        if by_blocks:
            layout = row_blocks.Layout(plan, numbers)
            out = row_blocks.expert_rows(_rows_of_tokens, _activate, tokens, weights, layout, dropout)
        else:
            out = _by_grouped_products(tokens, weights, plan, numbers, dropout, method)
        return _combine(_rows_of_pairs(out, plan).reshape(batch, length, -1, width), _gate_of_choice(gates, choices))

    return apply


def _by_grouped_products(
    tokens: jax.Array, weights: ExpertWeights, plan: Plan, numbers: jax.Array, dropout: HiddenDropout | None, method: Dispatch
) -> jax.Array:
    """Tokens [T, D] -> what the experts make of their rows, [M, D]."""
    product = grouped_dot if method == "grouped" else jax.lax.ragged_dot

    def up(x: jax.Array, weight: jax.Array) -> jax.Array:
        return product(_rows_of_tokens(x, plan), weight.astype(x.dtype), plan.group_sizes)

    def down(hidden: jax.Array, gate: jax.Array | None) -> jax.Array:
        return product(_dropped(_activate(hidden, gate), numbers, dropout), weights.down.astype(hidden.dtype), plan.group_sizes)

    hidden = _lean(up)(tokens, weights.up)
    return _lean(down)(hidden, None if weights.gate is None else _lean(up)(tokens, weights.gate))


def _on_each_device(
    apply: Callable[..., jax.Array], x: jax.Array, gates: jax.Array, mask: jax.Array, weights: ExpertWeights
) -> jax.Array:
    """Runs `apply(x, gates, mask, number of the first token, weights)` on each device for its own sequences, with all weights.

    The partitioner cannot split a sort of all tokens. Gathering the weights of a layer moves no more than exchanging rows would
    where experts are small beside the batch, as here.
    """
    devices = jax.sharding.get_abstract_mesh().size
    batch, length = x.shape[:2]
    if devices <= 1 or batch % devices:
        return apply(x, gates, mask, 0, weights)
    first_token = jnp.arange(devices) * (batch // devices * length)
    rows, whole = nn.logical_to_mesh_axes(("batch",)), nn.logical_to_mesh_axes(())
    each = jax.shard_map(
        lambda x, gates, mask, first, weights: apply(x, gates, mask, first[0], weights),
        in_specs=(rows, rows, rows, rows, whole),
        out_specs=rows,
        check_vma=False,  # the products' gradients are of a device's own rows; the transpose of `whole` adds them up
    )
    return each(x, gates, mask, first_token, weights)


def _numbers(token: jax.Array, expert: jax.Array, experts: int) -> jax.Array:
    """The numbers uint32 by which dropout knows rows: of a token and an expert, whatever the dispatch and the mesh."""
    return token.astype(jnp.uint32) * jnp.uint32(experts) + expert.astype(jnp.uint32)


def _lean(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function that ends in a matrix product, keeping what it is given for the backward pass and not the product's operand.

    The gather or the activation before the product runs again there. The product does not: its gradients want its operands only.
    """
    return jax.checkpoint(product)


def _dropped(active: jax.Array, numbers: jax.Array, dropout: HiddenDropout | None) -> jax.Array:
    return active if dropout is None else dropout(active, numbers)


def _activate(hidden: jax.Array, gate: jax.Array | None) -> jax.Array:
    return _silu(hidden) if gate is None else _silu(gate) * hidden


@jax.custom_vjp
def _silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x), with a gradient that forms the sigmoid anew: shared, it would be one more array of the hidden layer's size."""
    return jax.nn.silu(x)


def _silu_bwd(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    sigmoid = jax.nn.sigmoid(jax.lax.optimization_barrier(x))  # without the barrier XLA shares it after all
    return (grad * sigmoid * (1 + x * (1 - sigmoid)),)


_silu.defvjp(lambda x: (_silu(x), x), _silu_bwd)


def _combine(outputs: jax.Array, gate_of_choice: jax.Array) -> jax.Array:
    """[B, S, K, D] and [B, S, K] -> [B, S, D]."""
    return jnp.einsum("BSKD,BSK->BSD", outputs, gate_of_choice.astype(outputs.dtype))


def _choices(mask: jax.Array, most: int) -> jax.Array:
    """[.., E] bool -> [.., E, K] bool, whether an expert is a token's k-th choice, in the order of the experts."""
    place = jnp.cumsum(mask, axis=-1) - 1
    return mask[..., None] & jax.nn.one_hot(place, most, dtype=bool)


def _gate_of_choice(gates: jax.Array, choices: jax.Array) -> jax.Array:
    """[.., E] and [.., E, K] -> [.., K], 0 where there is no such choice: a product, so that its gradient is no scatter."""
    return jnp.einsum("...E,...EK->...K", gates, choices.astype(gates.dtype))


def _packed_plan(choices: jax.Array, spare: int) -> Plan:
    """Gives the pairs of choices [S, E, K] slots without gaps, expert by expert, in token order within each, and `spare` more."""
    mask = choices.any(axis=-1)
    group_sizes = mask.sum(axis=0)
    first = jnp.cumsum(group_sizes) - group_sizes
    slot = first[None, :] + jnp.cumsum(mask, axis=0) - 1
    return _plan(choices, mask, slot, choices.shape[0] * choices.shape[2] + spare)


def _slotted_plan(choices: jax.Array, slots: int, segments: jax.Array | None) -> Plan:
    """Gives the pairs of choices [S, E, K] slots among each expert's `slots`, in token order, as long as there are any.

    A segment of `segments` [S] has the slots that its places in the sequence are worth, whatever the other segments ask for.
    """
    length, experts, _ = choices.shape
    mask = choices.any(axis=-1)
    before = jnp.cumsum(mask, axis=0) - mask  # [S, E] choices of the same expert by earlier tokens
    slot = jnp.arange(experts)[None, :] * slots
    if segments is None:
        return _plan(choices, mask & (before < slots), slot + before, experts * slots)
    start, end = _bounds(segments)
    before -= jnp.take(before, start, axis=0)
    first, after = ((slots * place // length)[:, None] for place in (start, end))
    return _plan(choices, mask & (before < after - first), slot + first + before, experts * slots)


def _bounds(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each place the first place of its segment, and the one after the last, each [S]."""
    place = jnp.arange(segments.size)
    new = jnp.pad(segments[1:] != segments[:-1], (1, 0), constant_values=True)
    last = jnp.pad(new[1:], (0, 1), constant_values=True)
    start = jax.lax.cummax(jnp.where(new, place, 0))
    return start, jax.lax.cummin(jnp.where(last, place + 1, segments.size), reverse=True)


def _plan(choices: jax.Array, taken: jax.Array, slot: jax.Array, total: int) -> Plan:
    """The plan that gives the pair of a token and an expert the slot `slot` [S, E] below `total` where `taken` [S, E]."""
    pairs = choices.shape[0] * choices.shape[2]
    slot_of_pair = jnp.where(choices, jnp.where(taken, slot, total)[..., None], total).min(axis=1)
    pair_of_slot = jnp.full(total, pairs).at[slot_of_pair.reshape(-1)].set(jnp.arange(pairs), mode="drop", unique_indices=True)
    return Plan(slot_of_pair, pair_of_slot, choices.any(axis=-1).sum(axis=0))


def _read(rows: jax.Array, index: jax.Array) -> jax.Array:
    """rows[index], zeros where the index is past the end."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _rows_of_tokens(x: jax.Array, plan: Plan) -> jax.Array:
    """Tokens [S, D] -> expert rows [M, D]: each slot reads the token of its pair."""
    choices = plan.slot_of_pair.shape[1]
    return _read(x, plan.pair_of_slot // choices)  # the past-the-end pair, S K, becomes the past-the-end token, S


def _rows_of_tokens_bwd(plan: Plan, grad: jax.Array) -> tuple[jax.Array, None]:
    return _read(grad, plan.slot_of_pair).sum(axis=1), None


_rows_of_tokens.defvjp(lambda x, plan: (_rows_of_tokens(x, plan), plan), _rows_of_tokens_bwd)


@jax.custom_vjp
def _rows_of_pairs(rows: jax.Array, plan: Plan) -> jax.Array:
    """Expert rows [M, D] -> choices of tokens [S, K, D]: each pair reads its slot."""
    return _read(rows, plan.slot_of_pair)


def _rows_of_pairs_bwd(plan: Plan, grad: jax.Array) -> tuple[jax.Array, None]:
    return _read(grad.reshape(-1, grad.shape[-1]), plan.pair_of_slot), None


_rows_of_pairs.defvjp(lambda rows, plan: (_rows_of_pairs(rows, plan), plan), _rows_of_pairs_bwd)
