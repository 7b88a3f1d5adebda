"""Whether a config's values can work, alone and together. Each refusal is one line that names the field."""

from __future__ import annotations

import os
import struct
import sys
import typing
from pathlib import Path
from typing import Any

from slimmoe_jax import config as config_lib
from slimmoe_jax.config import DataConfig, InputError, ModelConfig, TrackerName, TrainConfig, flat, get, parts, shown
from slimmoe_jax.terminal import printable

# The most that each whole number may be. No machine has these sizes: they are there so that a slip of the keyboard is one line at
# once, and neither a plan without end nor an overflow on the way.
_STEPS, _SIZE = 10**9, 2**24
MOST = {
    **dict.fromkeys(("steps", "log_every", "checkpoint.every", "eval.every", "eval.batches"), _STEPS),
    **dict.fromkeys(("optim.schedule_steps", "optim.warmup_steps", "optim.skip_limit"), _STEPS),
    "optim.skip_window": 2**20,  # an array of this length is part of the state
    "seed": 2**32 - 1,  # Grain's largest
    "watchdog": 10**8,  # seconds, 3 years
    "model.vocab_size": _SIZE,
    "model.layers": 10_000,
    "model.width": 2**20,
    "model.heads": 2**16,
    "model.kv_heads": 2**16,
    "model.head_dim": 2**16,
    "model.experts": 2**16,
    "model.expert_hidden": _SIZE,
    "model.router.max_experts": 2**16,
    "data.train_tokenizer": _SIZE,
    "data.context": _SIZE,
    "data.batch_size": 2**20,
    "optim.accumulate": 2**20,
    "data.train_records": 10**12,
    "data.min_characters": 2**30,
    "data.max_row_bytes": 2**40,
    "data.workers": 1_024,  # processes
    **dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.expert"), 2**20),
    "checkpoint.keep_last": 10**6,
    "eval.sample_tokens": 10**6,
}
MOST_PARAMETERS = 10**13
MOST_TOKENS = 2**31 - 1  # of a step, which counts them in int32
# float32 holds nothing larger, and 0 in place of what is smaller.
FLOAT32_LARGEST, FLOAT32_LEAST = 3.4e38, 1.2e-38

# Texts that are files or folders, or the name of one.
_PATHS = ("name", "workdir", "init_from", "compilation_cache", "data.source", "data.records", "data.tokenizer", "data.mix")


def validate(config: TrainConfig) -> None:
    """Raises InputError, naming the field, where a value cannot work."""
    _validate_trackers(config)
    _validate_types(config)
    _validate_texts(config)
    _validate_seed(config)
    check_numbers(config)
    _validate_model(config.model)
    _validate_router(config.model)
    _validate_data(config.data)
    _validate_optim(config)
    _positive(config, "steps", "log_every", "checkpoint.every", "checkpoint.keep_last", "optim.skip_window", "optim.skip_limit")
    _at_least_zero(config, "watchdog", "optim.skip_sigma")
    _validate_size(config)
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
            raise InputError(f"mesh.{axis} = {shown(size)}: give a number of devices, at least 1 (data may be -1: the rest)")
    if config.model.experts % config.mesh.expert:
        raise InputError(
            f"mesh.expert = {config.mesh.expert} does not divide model.experts = {config.model.experts}: choose a divisor"
        )


def _validate_trackers(config: TrainConfig) -> None:
    known = ", ".join(typing.get_args(TrackerName))
    if isinstance(config.trackers, str):
        raise InputError(f'trackers = "{config.trackers}" is a text: give a tuple, such as ("tensorboard",); there are {known}')
    for name in config.trackers if isinstance(config.trackers, tuple) else ():
        if name not in typing.get_args(TrackerName):
            raise InputError(f"trackers = {name}: choose from {known}")


def _validate_types(config: TrainConfig) -> None:
    """What Python made is of the fields' types, and each float is a number."""
    for name, (_, value) in config_lib.differences(config_lib.typed(config), config).items():
        raise InputError(f"{name} = {shown(value)}: must be a tuple")


def check_numbers(config: TrainConfig) -> None:
    """Refuses numbers that no machine could hold, whatever else the config says."""
    for name, value in flat(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) > MOST.get(name, abs(number)):
                wanted = f"give at most {MOST[name]:,}" if number > 0 else "must not be below 0"
                raise InputError(f"{name} = {shown(number)}: {wanted}")
            if isinstance(number, float) and not in_float32(number):
                raise InputError(
                    f"{name} = {number} is beyond float32: give 0, or a number from {FLOAT32_LEAST} to {FLOAT32_LARGEST}"
                )


def in_float32(value: Any) -> bool:
    """Whether float32 holds a number; not so NaN, an infinity, or what overflows or is rounded to 0."""
    return bool(value == 0) or FLOAT32_LEAST <= abs(value) <= FLOAT32_LARGEST


def _validate_seed(config: TrainConfig) -> None:
    """Each source has a seed of its own: the next number."""
    further = len(config.data.mix)
    most = MOST["seed"] - further
    if not 0 <= config.seed <= most:
        why = f" ({further} fewer than without data.mix, each of whose sources takes the next seed)" if further else ""
        raise InputError(f"seed = {shown(config.seed)}: give a whole number from 0 to {most}{why}")


def _validate_size(config: TrainConfig) -> None:
    model, data = config.model, config.data
    attention = 2 * model.head_dim * (model.heads + max(model.kv_heads))
    experts = model.experts * (1 + model.expert_hidden * (3 if model.gated else 2))
    parameters = 2 * model.vocab_size * model.width + model.layers * model.width * (attention + experts)
    if parameters > MOST_PARAMETERS:
        raise InputError(
            f"the model has some {parameters:.1e} parameters, {16 * parameters / 1e12:,.0f} TB with gradients and Adam's moments:"
            " lower model.layers, model.width, model.experts, model.expert_hidden or model.vocab_size"
        )
    if data.batch_size * data.context > MOST_TOKENS:
        raise InputError(
            f"data.batch_size x data.context = {data.batch_size} x {data.context} is {data.batch_size * data.context:,} tokens per"
            f" step: at most {MOST_TOKENS:,} are counted; lower one of them"
        )


def _validate_texts(config: TrainConfig) -> None:
    for name, value in flat(config).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                check_text(name, text, path=name in _PATHS)
    sources = [("data.source" if n == 0 else "data.mix", part.source) for n, part in enumerate(parts(config.data))]
    paths = [(name, get(config, name)) for name in ("workdir", "init_from", "compilation_cache", "data.records", "data.tokenizer")]
    for name, path in sources + paths:
        if path.startswith("~") and os.path.expanduser(path) == path:
            raise InputError(f"{name} = {path}: there is no such user's home folder: write the path in full")
    check_folder("workdir", config_lib.workdir(config))
    if config.init_from:
        check_folder("init_from", config.init_from)


def check_text(name: str, text: str, path: bool = False) -> None:
    """Refuses a text that no tokenizer or file system takes.

    Args:
      name: of the field or flag.
      path: the text is a path, or has one at its end.

    Raises:
      InputError: it is not valid UTF-8, holds a NUL character, or is a path with a name that is too long.
    """
    mend = _encoding_hint() or "give it in UTF-8 (the terminal may use another encoding)"
    start = printable(text if len(text) <= 80 else f"{text[:77]}...")
    if "\0" in text:
        raise InputError(f"{name} = {start} has a NUL character: take it out")
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        mend = "rename the file or folder, or give another" if path and not _encoding_hint() else mend
        raise InputError(f"{name} = {start} is not valid UTF-8: {mend}") from error
    if not path:
        return
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise InputError(f"{name} = {start} cannot be the name of a file here: {mend}") from error
    longest = max(map(len, encoded.split(b"/")))
    if longest > 255 or len(encoded) > 4_000:  # bytes; Linux takes 255 and 4,096
        raise InputError(f"{name} = {start} has {len(encoded)} bytes, {longest} of them in one name: choose a shorter path")


def check_folder(name: str, folder: str | Path) -> None:
    """Refuses the folder of a run, relative to the current one, where Orbax can write or read no checkpoint. See `check_text`."""
    check_text(name, str(folder), path=True)
    if Path(folder).is_absolute():
        whole = str(folder)
    else:
        try:
            here = os.getcwd()
        except FileNotFoundError as error:
            raise InputError("the current folder is gone: change to one that exists") from error
        check_text("the current folder", here, path=True)
        whole = os.path.join(here, folder)
    if os.fsencode(whole) != whole.encode():  # Python would write to one folder, and TensorStore, which takes UTF-8, to another
        raise InputError(f"{name} = {folder} cannot hold checkpoints: {_encoding_hint()}")


def _encoding_hint() -> str:
    """What to do where Python reads command lines and names of files in another encoding than UTF-8; empty where it does not."""
    known = sys.getfilesystemencoding()
    return "" if known == "utf-8" else f"this terminal's encoding is {known}, not UTF-8: set LC_ALL=C.UTF-8 or PYTHONUTF8=1"


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
    if not 0 <= model.dropout < 1 or round(model.dropout * 2**32) == 2**32:  # as `dropout` counts it
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
    _positive(data, "context", "batch_size", "max_row_bytes", prefix="data.")
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
        if not 0 <= getattr(optim, name) < 1 or _rounded(getattr(optim, name)) == 1:
            raise InputError(f"optim.{name} = {getattr(optim, name)}: give a value from 0 to below 1")
    if optim.learning_rate * optim.final_fraction > FLOAT32_LARGEST:
        raise InputError(f"optim.final_fraction = {optim.final_fraction} of optim.learning_rate overflows: lower it")
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


def _rounded(value: float) -> float:
    """As float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _positive(config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        if not get(config, name) > 0:
            raise InputError(f"{prefix}{name} = {shown(get(config, name))}: must be above 0")


def _at_least_zero(config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        if not get(config, name) >= 0:
            raise InputError(f"{prefix}{name} = {shown(get(config, name))}: must be 0 or more")


def check_batch(data: DataConfig, records: int) -> None:
    """Refuses a batch of more records than there are to train on."""
    if data.batch_size > records:
        raise InputError(
            f"data.batch_size = {data.batch_size} is more than the {records} training records: lower it, or give more text"
        )
