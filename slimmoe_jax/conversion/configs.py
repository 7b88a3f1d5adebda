"""Our configs as `config.json` of a Hugging Face folder, and back."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

import numpy as np

from slimmoe_jax import config as config_lib
from slimmoe_jax.attention import rotary_dim
from slimmoe_jax.config import InputError, ModelConfig, TrainConfig
from slimmoe_jax.data.tokenizers import Tokenizer

AUTO_MAP = {
    "AutoConfig": "configuration_slimmoe.SlimMoEConfig",
    "AutoModel": "modeling_slimmoe.SlimMoEModel",
    "AutoModelForCausalLM": "modeling_slimmoe.SlimMoEForCausalLM",
}
MOST_LAYERS = 10_000  # more are a damaged config
# Their name -> our field, where the two mean the same.
SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "expert_hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "head_dim": "head_dim",
    "use_qk_norm": "qk_norm",
    "gated_experts": "gated",
    "num_experts": "experts",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
    "dropout": "dropout",
}
ROUTER_SAME = {"router_type": "kind", "num_experts_per_tok": "max_experts", "norm_topk_prob": "renormalize"}


def to_hf(config: TrainConfig, tokenizer: Tokenizer, router: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config.json` for `SlimMoEConfig`.

    Args:
      router: `threshold` and `l1_weight` of the router state.
      dtype: of the tensors, as torch calls it.
    """
    model = config.model
    common_kv = _commonest(model.layer_kv_heads)
    common_rotary = _commonest(model.layer_rotary)
    layers = {}
    for layer, (kv_heads, rotary) in enumerate(zip(model.layer_kv_heads, model.layer_rotary, strict=True)):
        differing: dict[str, float] = {"num_key_value_heads": kv_heads} if kv_heads != common_kv else {}
        differing |= {"rotary_fraction": rotary} if rotary != common_rotary else {}
        if differing:
            layers[str(layer)] = differing
    return {
        "architectures": ["SlimMoEForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "slimmoe",
        **{theirs: getattr(model, ours) for theirs, ours in SAME.items()},
        "hidden_act": "silu",
        "num_key_value_heads": common_kv,
        "rotary_fraction": common_rotary,
        **({"per_layer_config": layers} if layers else {}),
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        **{theirs: getattr(model.router, ours) for theirs, ours in ROUTER_SAME.items()},
        "router_threshold": float(router["threshold"]),
        "output_router_logits": False,
        "router_aux_loss_coef": _aux_weight(model, float(router["l1_weight"])),
        "max_position_embeddings": config.data.context,
        "bos_token_id": None,
        "eos_token_id": tokenizer.end_token,
        "use_cache": True,
        "dtype": dtype,
    }


def from_hf(tree: dict[str, Any], where: str) -> tuple[ModelConfig, int]:
    """The architecture and the context that a `config.json` of `SlimMoEConfig` describes.

    Raises:
      InputError: it describes something else.
    """
    if tree.get("model_type") != "slimmoe":
        raise InputError(
            f"{where} is of a {tree.get('model_type')} model: give a folder that this command wrote, or one saved from it"
        )
    try:
        if tree.get("hidden_act", "silu") != "silu" or tree["rope_parameters"].get("rope_type", "default") != "default":
            raise InputError(f"{where} has another activation than silu, or scaled rotary positions: these do not exist here")
        values = {ours: tree[theirs] for theirs, ours in SAME.items()}
        router = {ours: tree[theirs] for theirs, ours in ROUTER_SAME.items()}
        layers = {int(layer): differing for layer, differing in (tree.get("per_layer_config") or {}).items()}
        values["rope_theta"] = float(tree["rope_parameters"]["rope_theta"])
        number = tree["num_hidden_layers"]
        if not 0 < number <= MOST_LAYERS:
            raise ValueError(f"num_hidden_layers = {number}")
        for theirs, ours in (("num_key_value_heads", "kv_heads"), ("rotary_fraction", "rotary")):
            values[ours] = [layers.get(layer, {}).get(theirs, tree[theirs]) for layer in range(number)]
        router["threshold"] = float(tree["router_threshold"])
        context = int(tree["max_position_embeddings"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{where} is no complete config of SlimMoE ({type(error).__name__}: {error}): restore it") from error
    balance = {"balance_weight": tree["router_aux_loss_coef"]} if tree.get("router_aux_loss_coef") else {"balance": "none"}
    router |= balance if router["kind"] != "relu" else {"l1_initial": tree.get("router_aux_loss_coef") or 1e-8}
    return config_lib.from_json(values | {"router": router}, where, ModelConfig), context


def public(config: TrainConfig) -> TrainConfig:
    """The config without where things lie on this machine; files and runs keep their names, by which they can be recognised."""
    data = dataclasses.replace(
        config.data,
        source=without_folders(config.data.source),
        mix=tuple(without_folders(entry) for entry in config.data.mix),
        tokenizer=without_folders(config.data.tokenizer),
        records="",
    )
    return dataclasses.replace(
        config,
        data=data,
        init_from=run_name(config.init_from),
        workdir="",
        compilation_cache=TrainConfig().compilation_cache,
    )


def run_name(path: str) -> str:
    """RUN or RUN/STEP without the folders above it; empty stays empty."""
    run, step = config_lib.split_run_path(path)
    return f"{run.name}/{step}" if step else run.name


def without_folders(name: str) -> str:
    """A source or a path without the folders above it: `0.25:text:/home/me/corpus.jsonl` becomes `0.25:text:corpus.jsonl`."""
    return re.sub(r"(^|:)[/~][^:]*/(?=[^/:])", r"\1", name)


def _commonest(values: tuple[Any, ...]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]


def _aux_weight(model: ModelConfig, l1_weight: float) -> float:
    """The weight of the auxiliary loss in training: of the balance, or of the ReLU router's gates."""
    if not model.is_moe:
        return 0.0
    if model.router.kind == "relu":
        return l1_weight
    return model.router.balance_weight if model.router.balance in ("aux", "aux_micro") else 0.0


# --- Mixtral ---------------------------------------------------------------------------------------------------------


def not_mixtral(model: ModelConfig, bias: np.ndarray) -> list[str]:
    """What keeps a model from being a Mixtral, as fields with what they would have to be; empty where it is one."""
    router = model.router
    wrong = {
        "model.experts = 1 (2 or more)": not model.is_moe,
        "model.gated = False (True)": not model.gated,
        f"model.router.kind = {router.kind} (top_k)": router.kind != "top_k",
        "model.router.renormalize = False (True)": not router.renormalize,
        f"model.kv_heads = {model.layer_kv_heads} (one number; --uniform-kv makes it so)": len(set(model.layer_kv_heads)) > 1,
        f"model.rotary = {model.layer_rotary} (1 in all layers)": any(
            rotary_dim(model.head_dim, fraction) != model.head_dim for fraction in model.layer_rotary
        ),
        "model.qk_norm = True (False)": model.qk_norm,
        "the routers' selection bias is not zero (it is 0 without model.router.balance = bias)": bool(np.any(bias)),
    }
    return [what for what, holds in wrong.items() if holds]


def to_mixtral(config: TrainConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """`config.json` for `MixtralConfig`."""
    model = config.model
    theirs = {name: ours for name, ours in SAME.items() if name not in ("use_qk_norm", "gated_experts", "num_experts", "dropout")}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{name: getattr(model, ours) for name, ours in theirs.items()},
        "hidden_act": "silu",
        "num_key_value_heads": model.layer_kv_heads[0],
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.router.max_experts,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "max_position_embeddings": config.data.context,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": _aux_weight(model, 0.0),
        "bos_token_id": None,
        "eos_token_id": tokenizer.end_token,
        "use_cache": True,
        "dtype": dtype,
    }
