"""Whether a config's values can work, alone and together. Each refusal is one line that names the field."""

from __future__ import annotations

import typing
from typing import Any

from slimmoe_jax.config import DataConfig, InputError, ModelConfig, TrackerName, TrainConfig, get, parts


def validate(config: TrainConfig) -> None:
    """Raises InputError, naming the field, where a value cannot work."""
    _validate_model(config.model)
    _validate_router(config.model)
    _validate_data(config.data)
    _validate_optim(config)
    _positive(config, "steps", "log_every", "checkpoint.every", "checkpoint.keep_last", "optim.skip_window", "optim.skip_limit")
    _at_least_zero(config, "watchdog", "optim.skip_sigma")
    _validate_trackers(config)
    if config.eval.ngrams and config.data.format != "text":
        raise InputError(
            f"eval.ngrams compares with models of running text, not of data.format = {config.data.format}: turn it off"
        )
    _at_least_zero(config, "eval.every", "eval.batches", "eval.sample_tokens", "eval.temperature")
    if config.eval.sample_tokens and not config.eval.prompt:
        raise InputError("eval.prompt is empty: give the sample a beginning, or set eval.sample_tokens = 0 for no sample")
    for axis in ("data", "fsdp", "expert"):
        size = getattr(config.mesh, axis)
        if size < 1 and not (axis == "data" and size == -1):
            raise InputError(f"mesh.{axis} = {size}: give a number of devices, at least 1 (data may be -1: the rest)")
    if config.model.experts % config.mesh.expert:
        raise InputError(
            f"mesh.expert = {config.mesh.expert} does not divide model.experts = {config.model.experts}: choose a divisor"
        )


def _validate_trackers(config: TrainConfig) -> None:
    known = ", ".join(typing.get_args(TrackerName))
    if isinstance(config.trackers, str):
        raise InputError(f'trackers = "{config.trackers}" is a text: give a tuple, such as ("tensorboard",); there are {known}')
    for name in config.trackers:
        if name not in typing.get_args(TrackerName):
            raise InputError(f"trackers = {name}: choose from {known}")


def _validate_model(model: ModelConfig) -> None:
    _positive(
        model,
        *("vocab_size", "layers", "width", "heads", "head_dim", "experts", "expert_hidden"),
        *("rope_theta", "norm_epsilon", "init_std", "capacity_factor"),
        prefix="model.",
    )
    for name in ("kv_heads", "rotary"):
        pattern = getattr(model, name)
        if not pattern or model.layers % len(pattern):
            raise InputError(
                f"model.{name} has {len(pattern)} entries, which do not repeat evenly over model.layers = {model.layers}:"
                f" give 1, {model.layers}, or a divisor of it"
            )
    for layer, kv_heads in enumerate(model.layer_kv_heads):
        if kv_heads < 1 or model.heads % kv_heads:
            raise InputError(
                f"model.kv_heads = {kv_heads} in layer {layer} does not divide model.heads = {model.heads}: choose from"
                f" {[k for k in range(1, model.heads + 1) if model.heads % k == 0]}"
            )
    for layer, fraction in enumerate(model.layer_rotary):
        if not 0 <= fraction <= 1:
            raise InputError(f"model.rotary = {fraction} in layer {layer}: give a fraction from 0 (NoPE) to 1 (RoPE)")
    if model.head_dim % 2 and any(model.layer_rotary):
        raise InputError(f"model.head_dim = {model.head_dim} is odd: rotary positions need an even one")
    if not 0 <= model.dropout < 1:
        raise InputError(f"model.dropout = {model.dropout}: give a probability below 1")


def _validate_router(model: ModelConfig) -> None:
    router = model.router
    _positive(router, "max_experts", "l1_initial", prefix="model.router.")
    _at_least_zero(
        router,
        *("target_experts", "proportional_gain", "integral_gain", "balance_weight", "bias_rate", "z_weight"),
        prefix="model.router.",
    )
    if router.max_experts > model.experts:
        raise InputError(
            f"model.router.max_experts = {router.max_experts} is more than model.experts = {model.experts}:"
            " lower the one or raise the other"
        )
    if not model.is_moe:
        return
    if router.kind != "top_k" and router.target_experts > router.max_experts:
        raise InputError(
            f"model.router.target_experts = {router.target_experts} is more than model.router.max_experts ="
            f" {router.max_experts}: a mean cannot exceed the maximum"
        )
    if router.kind == "top_p" and 0 < router.target_experts < 1:
        raise InputError(
            f"model.router.target_experts = {router.target_experts}: top_p gives each token at least one expert;"
            " give 1 or more, or 0 for no control"
        )
    if not 0 < router.threshold <= 1:
        raise InputError(f"model.router.threshold = {router.threshold}: give a probability above 0, at most 1")
    if router.l1_factor < 1:
        raise InputError(f"model.router.l1_factor = {router.l1_factor}: give a factor of at least 1")
    if router.kind == "relu" and router.balance == "bias":
        raise InputError("model.router.balance = bias selects by score, which relu does not: choose aux, aux_micro or none")
    if router.renormalize and router.max_experts == 1:
        raise InputError(
            "model.router.renormalize with model.router.max_experts = 1 makes every gate 1, and the router learns nothing:"
            " turn one of them off"
        )


def _validate_data(data: DataConfig) -> None:
    _positive(data, "context", "batch_size", prefix="data.")
    _at_least_zero(data, "train_tokenizer", "train_records", "min_characters", "workers", prefix="data.")
    if not 0 < data.validation_fraction < 1:
        raise InputError(f"data.validation_fraction = {data.validation_fraction}: give a fraction between 0 and 1, such as 0.005")
    formats = {part.format for part in parts(data)}
    if data.document_mask and "text" not in formats:
        raise InputError(f"data.document_mask is for records of text: {data.format} is packed in segments anyway")
    if data.tokenizer == "sentencepiece" and not data.train_tokenizer:
        raise InputError(
            "data.tokenizer = sentencepiece needs data.train_tokenizer (a number of pieces), or the path of a .model file"
        )
    if data.train_tokenizer and data.tokenizer != "sentencepiece":
        raise InputError(
            f"data.train_tokenizer = {data.train_tokenizer} trains a new vocabulary, but data.tokenizer ="
            f" {data.tokenizer}: set data.tokenizer to sentencepiece, or data.train_tokenizer to 0"
        )


def _validate_optim(config: TrainConfig) -> None:
    optim = config.optim
    _positive(optim, "learning_rate", "epsilon", "accumulate", prefix="optim.")
    _at_least_zero(
        optim,
        "schedule_steps",
        "warmup_steps",
        "weight_decay",
        "clip_norm",
        "z_weight",
        "final_fraction",
        prefix="optim.",
    )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            raise InputError(f"optim.{name} = {getattr(optim, name)}: give a value from 0 to below 1")
    if not 0 < optim.decay_fraction <= 1:
        raise InputError(f"optim.decay_fraction = {optim.decay_fraction}: give a fraction above 0, at most 1")
    schedule_steps = optim.schedule_steps or config.steps
    if optim.warmup_steps >= schedule_steps:
        raise InputError(
            f"optim.warmup_steps = {optim.warmup_steps} leaves nothing of the {schedule_steps} steps of the schedule:"
            " lower it, or raise optim.schedule_steps"
        )
    decay_steps = round(optim.decay_fraction * schedule_steps)
    if optim.schedule == "wsd" and optim.warmup_steps + decay_steps > schedule_steps:
        raise InputError(
            f"optim.warmup_steps = {optim.warmup_steps} overlaps with the {decay_steps} steps that optim.decay_fraction ="
            f" {optim.decay_fraction} takes of the schedule's {schedule_steps}: lower one of them, or raise optim.schedule_steps"
        )
    if config.data.batch_size % optim.accumulate:
        raise InputError(
            f"optim.accumulate = {optim.accumulate} does not divide data.batch_size = {config.data.batch_size}: choose a divisor"
        )


def _positive(config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        if not get(config, name) > 0:
            raise InputError(f"{prefix}{name} = {get(config, name)}: must be above 0")


def _at_least_zero(config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        if not get(config, name) >= 0:
            raise InputError(f"{prefix}{name} = {get(config, name)}: must be 0 or more")
