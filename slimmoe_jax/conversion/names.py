"""One table of names, read in both directions: our parameters and router state, and the tensors of `modeling_slimmoe.py`.

PyTorch keeps a matrix as [outputs, inputs], heads flattened; ours have an axis for each thing and inputs first.

Axes: D model, N query heads, K kv heads, H head dimension, E experts, F expert hidden.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import numpy as np

from slimmoe_jax.config import InputError, ModelConfig

Kind = Literal["same", "linear", "experts", "only_expert"]


class Entry(NamedTuple):
    """One tensor of theirs and what it is of ours; `{}` stands for the layer's number."""

    theirs: str
    ours: tuple[str, ...]  # several are stacked along the outputs, in this order
    kind: Kind  # same; linear: [inputs, outputs]; experts: [E, inputs, outputs]; only_expert: that with E = 1, dropped
    inputs: int = 1  # linear: how many of our leading axes are inputs
    when: Callable[[ModelConfig], bool] = lambda config: True


def _selects_by_score(config: ModelConfig) -> bool:
    return config.is_moe and config.router.kind != "relu"


_LARGE = 10**8  # values
_LAYER, _OURS = "model.layers.{}.", "params/layer_{}/"
TABLE = (
    Entry("model.embed_tokens.weight", ("params/embedding",), "same"),
    Entry(_LAYER + "input_layernorm.weight", (_OURS + "attention_norm/scale",), "same"),
    Entry(_LAYER + "self_attn.q_proj.weight", (_OURS + "attention/query",), "linear"),  # [D, N, H]
    Entry(_LAYER + "self_attn.k_proj.weight", (_OURS + "attention/key",), "linear"),  # [D, K, H]
    Entry(_LAYER + "self_attn.v_proj.weight", (_OURS + "attention/value",), "linear"),  # [D, K, H]
    Entry(_LAYER + "self_attn.o_proj.weight", (_OURS + "attention/out",), "linear", inputs=2),  # [N, H, D]
    Entry(_LAYER + "self_attn.q_norm.weight", (_OURS + "attention/query_norm/scale",), "same", when=lambda c: c.qk_norm),
    Entry(_LAYER + "self_attn.k_norm.weight", (_OURS + "attention/key_norm/scale",), "same", when=lambda c: c.qk_norm),
    Entry(_LAYER + "post_attention_layernorm.weight", (_OURS + "experts_norm/scale",), "same"),
    Entry(_LAYER + "mlp.gate.weight", (_OURS + "experts/router",), "linear", when=lambda c: c.is_moe),  # [D, E]
    Entry(_LAYER + "mlp.gate.e_score_correction_bias", ("router/bias/{}",), "same", when=_selects_by_score),  # [E]
    Entry(
        _LAYER + "mlp.gate.threshold", ("router/threshold",), "same", when=lambda c: c.is_moe and c.router.kind == "top_p"
    ),  # [], the same in each layer
    Entry(
        _LAYER + "mlp.experts.gate_up_proj", (_OURS + "experts/gate", _OURS + "experts/up"), "experts",
        when=lambda c: c.is_moe and c.gated,
    ),  # [E, D, F] each
    Entry(_LAYER + "mlp.experts.up_proj", (_OURS + "experts/up",), "experts", when=lambda c: c.is_moe and not c.gated),
    Entry(_LAYER + "mlp.experts.down_proj", (_OURS + "experts/down",), "experts", when=lambda c: c.is_moe),  # [E, F, D]
    Entry(_LAYER + "mlp.gate_proj.weight", (_OURS + "experts/gate",), "only_expert", when=lambda c: not c.is_moe and c.gated),
    Entry(_LAYER + "mlp.up_proj.weight", (_OURS + "experts/up",), "only_expert", when=lambda c: not c.is_moe),
    Entry(_LAYER + "mlp.down_proj.weight", (_OURS + "experts/down",), "only_expert", when=lambda c: not c.is_moe),
    Entry("model.norm.weight", ("params/final_norm/scale",), "same"),
    Entry("lm_head.weight", ("params/head",), "linear", when=lambda c: not c.tie_embeddings),  # [D, V]
)  # fmt: skip


def entries(config: ModelConfig) -> Iterator[Entry]:
    """The table's rows for this model, those of layers once for each."""
    for entry in TABLE:
        if not entry.when(config):
            continue
        layers = range(config.layers) if "{}" in entry.theirs else (0,)
        for layer in layers:
            yield entry._replace(theirs=entry.theirs.format(layer), ours=tuple(name.format(layer) for name in entry.ours))


def to_theirs(config: ModelConfig, params: Any, router: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our weights under their names, float32.

    Args:
      params: the tree of parameters.
      router: `threshold` [] and `bias` [layers, E] of the router state.
    """
    ours = _flat(config, params, router)
    return {entry.theirs: _to_theirs(entry, [np.asarray(ours[name]) for name in entry.ours]) for entry in entries(config)}


def to_ours(config: ModelConfig, tensors: Mapping[str, np.ndarray], like: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `to_theirs`: parameters, and `threshold` and `bias` as far as the tensors hold them.

    Args:
      tensors: exactly those of the model.
      like: the parameters' shapes, a tree.
    Raises:
      InputError: names tensors that are missing, left over, of another shape, or that say different things.
    """
    wanted = {entry.theirs: entry for entry in entries(config)}
    for what, names in (("lacks", wanted.keys() - tensors.keys()), ("has besides", tensors.keys() - wanted.keys())):
        if names:
            raise InputError(
                f"the folder {what} {', '.join(sorted(names)[:3])} ({len(names)} in all): its config.json is of another model"
            )
    shapes = {"params/" + "/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(like).items()}
    ours: dict[str, np.ndarray] = {}
    for name, entry in wanted.items():
        known = [shapes.get(our, tensors[name].shape) for our in entry.ours]
        for our, value in zip(entry.ours, _to_ours(entry, name, tensors[name], known), strict=True):
            if our in ours and not np.array_equal(ours[our], value):
                raise InputError(f"{name} differs from that of another layer, and one value steers all: make them equal")
            ours[our] = value
    params = {tuple(name.split("/")[1:]): value for name, value in ours.items() if name.startswith("params/")}
    router = {name.removeprefix("router/"): value for name, value in ours.items() if name.startswith("router/")}
    biases = [router.pop(f"bias/{layer}") for layer in range(config.layers) if f"bias/{layer}" in router]
    return flax.traverse_util.unflatten_dict(params), router | ({"bias": np.stack(biases)} if biases else {})


def _flat(config: ModelConfig, params: Any, router: Mapping[str, Any]) -> dict[str, Any]:
    flat = {"params/" + "/".join(path): leaf for path, leaf in flax.traverse_util.flatten_dict(params).items()}
    flat["router/threshold"] = router["threshold"]
    return flat | {f"router/bias/{layer}": router["bias"][layer] for layer in range(config.layers)}


def _to_theirs(entry: Entry, arrays: list[np.ndarray]) -> np.ndarray:
    if entry.kind == "linear":
        arrays = [w.reshape(math.prod(w.shape[: entry.inputs]), -1) for w in arrays]
    elif entry.kind == "only_expert":
        arrays = [w[0] for w in arrays]
    if entry.kind != "same":
        arrays = [w.swapaxes(-1, -2) for w in arrays]
    return np.asarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-2), order="C")


def _to_ours(entry: Entry, name: str, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The parts of a tensor, in our shapes."""
    size = sum(math.prod(shape) for shape in shapes)
    if tensor.size != size > _LARGE:  # whose shape is not to be found out by making one
        raise InputError(f"{name} has {tensor.size:,} values, not {size:,}: the folder's config.json is of another model")
    expected = _to_theirs(entry, [np.broadcast_to(np.float32(0), shape) for shape in shapes]).shape
    if tensor.shape != expected:
        raise InputError(f"{name} has the shape {tensor.shape}, not {expected}: the folder's config.json is of another model")
    parts = np.split(tensor, len(shapes), axis=-2) if len(shapes) > 1 else [tensor]
    if entry.kind != "same":
        parts = [part.swapaxes(-1, -2) for part in parts]
    return [np.ascontiguousarray(part).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


# --- other layouts ---------------------------------------------------------------------------------------------------


def uniform_kv(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same function with one number of kv heads in all layers, the least common multiple: heads are repeated.

    A query head n reads kv head n // (N / K); with each kv head repeated r times, it reads a copy of the same.
    """
    heads = math.lcm(*config.layer_kv_heads)
    params = dict(params)
    for layer, kv_heads in enumerate(config.layer_kv_heads):
        block = dict(params[f"layer_{layer}"])
        repeated = {name: np.repeat(np.asarray(block["attention"][name]), heads // kv_heads, axis=1) for name in ("key", "value")}
        params[f"layer_{layer}"] = block | {"attention": {**block["attention"], **repeated}}
    return dataclasses.replace(config, kv_heads=(heads,)), params


def to_mixtral(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their tensors of a model that is a Mixtral (`configs.not_mixtral`), under the names of Mixtral's checkpoints."""
    mixtral = {}
    for name, tensor in tensors.items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("e_score_correction_bias"):
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert in range(config.experts):
                gate, up = np.split(tensor[expert], 2)
                mixtral[name.replace("gate_up_proj", f"{expert}.w1.weight")] = np.ascontiguousarray(gate)
                mixtral[name.replace("gate_up_proj", f"{expert}.w3.weight")] = np.ascontiguousarray(up)
        elif name.endswith("experts.down_proj"):
            for expert in range(config.experts):
                mixtral[name.replace("down_proj", f"{expert}.w2.weight")] = np.ascontiguousarray(tensor[expert])
        else:
            mixtral[name] = tensor
    return mixtral
