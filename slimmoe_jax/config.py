"""Configuration: frozen dataclasses, their validation, and how they are read from Python files and JSON.

A config file is Python with one function, `get_config() -> TrainConfig`. The same tree of dataclasses is written to
`config.json` in each run's folder, and that file is accepted wherever a Python config is. Nothing here imports JAX, so
that the data tools start quickly and mistakes are found before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import re
import typing
from pathlib import Path
from typing import Any, Literal


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one line: what, where, and how to mend it."""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts."""

    kind: Literal["top_k", "top_p", "relu"] = "top_p"  # fixed count, adaptive count by probability mass, or ReLU gates
    max_experts: int = 2  # most experts a token may use
    target_experts: float = 1.5  # mean experts a token that the controller holds (top_p, relu); 0 turns it off
    threshold: float = 0.4  # top_p: the probability mass p at the start, and for good where the controller is off
    proportional_gain: float = 0.01  # top_p: change of p for each expert a token of error
    integral_gain: float = 0.005  # top_p: change of p for each expert a token of error, each step
    renormalize: bool = False  # gates sum to 1 over the chosen experts (Mixtral) or keep their probabilities (OLMoE)
    balance: Literal["aux", "aux_micro", "bias", "none"] = "aux"  # loss on the global batch, on each micro-batch, bias
    balance_weight: float = 0.01  # weight of the auxiliary balance loss
    bias_rate: float = 1e-3  # loss-free balancing: step of each expert's selection bias
    z_weight: float = 1e-3  # weight of the router z-loss; 0 turns it off
    l1_initial: float = 1e-8  # relu: starting weight of the L1 loss on gates
    l1_factor: float = 1.2  # relu: the controller multiplies or divides the L1 weight by this each step


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. The defaults are SlimMoE-250M."""

    vocab_size: int = 50_257  # tokens
    layers: int = 16
    width: int = 768  # model dimension D
    heads: int = 12  # query heads N
    head_dim: int = 64  # H
    kv_heads: tuple[int, ...] = (4, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 4, 4)  # by layer, repeated to fill
    rotary: tuple[float, ...] = (1.0, 1.0, 1.0, 0.0)  # rotated share of head_dim by layer, repeated to fill; 0 is NoPE
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    qk_norm: bool = False  # RMSNorm on each query and key head
    experts: int = 4  # E; 1 is a dense feed-forward layer without a router (then router.max_experts is 1 too)
    expert_hidden: int = 1_536  # F, hidden width of one expert
    gated: bool = False  # down(silu(gate x) * up x) instead of down(silu(up x))
    tie_embeddings: bool = False  # output head is the transposed input embedding
    dropout: float = 0.1  # embedding, residual and expert-hidden dropout
    norm_epsilon: float = 1e-5
    init_std: float = 0.02  # normal initialisation; residual outputs are scaled by 1/sqrt(2 layers)
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # attention kernel; auto: cudnn in bfloat16 on NVIDIA, else xla
    dispatch: Literal["auto", "dense", "capacity", "ragged"] = "auto"  # how tokens reach experts in training
    capacity_factor: float = 1.25  # slots an expert and sequence, relative to an even share of max_experts
    router: RouterConfig = RouterConfig()

    @property
    def layer_kv_heads(self) -> tuple[int, ...]:
        """Key/value heads of each layer."""
        return _fill(self.kv_heads, self.layers)

    @property
    def layer_rotary(self) -> tuple[float, ...]:
        """Rotated fraction of each layer's head dimension."""
        return _fill(self.rotary, self.layers)

    @property
    def is_moe(self) -> bool:
        return self.experts > 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text in, fixed-length records of tokens out."""

    source: str = "stdlib"  # hub:NAME[:SUBSET], a directory, a .parquet/.jsonl[.gz|.zst]/.txt file, stdlib[:sources]
    records: str = ""  # folder of prepared records; empty: data/NAME-HASH below the current directory
    text_field: str = "text"  # column or key that holds a document
    tokenizer: str = "gpt2"  # gpt2, the path of a SentencePiece .model, or sentencepiece (with train_tokenizer)
    train_tokenizer: int = 0  # train a SentencePiece vocabulary of this many pieces on the source; 0: use `tokenizer`
    context: int = 2_048  # tokens a sequence
    batch_size: int = 32  # sequences a step, over all devices and accumulation
    validation_fraction: float = 0.005  # share of documents held out, chosen by a hash of their text
    min_characters: int = 8  # shorter documents are left out and counted
    document_mask: bool = False  # attention and positions restart at each document
    workers: int = 0  # processes that read records; 0 reads in threads


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = 6e-4  # peak
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, linear decay
    schedule_steps: int = 0  # length of the schedule in steps; 0: the config's own number of steps
    warmup_steps: int = 100  # steps of linear warm-up
    decay_fraction: float = 0.2  # wsd: share of the schedule that decays
    final_fraction: float = 0.1  # learning rate at the end, relative to the peak
    weight_decay: float = 0.1  # on matrices; norms have none
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off
    accumulate: int = 1  # micro-batches a step
    z_weight: float = 0.0  # z-loss on the output logits


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis. The product of the three is the number of devices; -1 takes what is left."""

    data: int = -1  # replicas
    fsdp: int = 1  # shards of parameters and optimiser state
    expert: int = 1  # shards of the experts


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1_000  # steps; the last step is always saved
    keep_last: int = 2  # newest checkpoints kept
    keep_best: bool = True  # keep the one with the lowest validation loss as well


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = 1_000  # steps; 0: only at the end
    batches: int = 20  # batches of held-out records each time; 0: all of them
    prompt: str = "The"  # start of the sample that is generated at each evaluation
    sample_tokens: int = 48  # length of that sample, tokens; 0: none
    temperature: float = 0.8  # of the sample; 0: greedy
    ngrams: bool = False  # at the end, compare with unigram and bigram models of the same training records


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on."""

    name: str = "slimmoe"  # names the run's folder when no workdir is given
    workdir: str = ""  # folder of the run; empty: runs/NAME below the current directory
    steps: int = 1_000  # optimiser steps in all, not counted from a resume
    seed: int = 0  # of initialisation, shuffling and dropout
    precision: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are always float32
    remat: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    init_from: str = ""  # run whose weights start this one: RUN (newest), RUN/STEP or RUN/best
    log_every: int = 10  # steps between lines of metrics.jsonl
    compilation_cache: str = "~/.cache/slimmoe_jax/xla"  # folder of compiled programs; empty: none
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()


def _fill(pattern: tuple, layers: int) -> tuple:
    return (pattern * math.ceil(layers / len(pattern)))[:layers]


# --- validation ------------------------------------------------------------------------------------------------------


def validate(config: TrainConfig) -> None:
    """Raises InputError, naming the field, where a value cannot work."""
    _validate_model(config.model)
    _validate_router(config.model)
    _validate_data(config.data)
    _validate_optim(config)
    _positive(config, "steps", "log_every", "checkpoint.every", "checkpoint.keep_last")
    _at_least_zero(config, "eval.every", "eval.batches", "eval.sample_tokens", "eval.temperature")
    for axis in ("data", "fsdp", "expert"):
        size = getattr(config.mesh, axis)
        if size < 1 and not (axis == "data" and size == -1):
            raise InputError(f"mesh.{axis} = {size}: give a number of devices, at least 1 (data may be -1: the rest)")
    if config.model.experts % config.mesh.expert:
        raise InputError(
            f"mesh.expert = {config.mesh.expert} does not divide model.experts = {config.model.experts}: choose a divisor"
        )


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
    _at_least_zero(data, "train_tokenizer", "min_characters", "workers", prefix="data.")
    if not 0 < data.validation_fraction < 1:
        raise InputError(f"data.validation_fraction = {data.validation_fraction}: give a fraction between 0 and 1, such as 0.005")
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
    if config.data.batch_size % optim.accumulate:
        raise InputError(
            f"optim.accumulate = {optim.accumulate} does not divide data.batch_size = {config.data.batch_size}: choose a divisor"
        )


def _get(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def _positive(config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        if not _get(config, name) > 0:
            raise InputError(f"{prefix}{name} = {_get(config, name)}: must be above 0")


def _at_least_zero(config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        if not _get(config, name) >= 0:
            raise InputError(f"{prefix}{name} = {_get(config, name)}: must be 0 or more")


# --- reading and writing ---------------------------------------------------------------------------------------------


def load(path: str | Path) -> TrainConfig:
    """Reads a config: a Python file with `get_config()`, or the `config.json` of a run.

    Raises:
      InputError: the file is missing, is not a config, or holds an unknown field or a value of the wrong type.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise InputError(f"no config at {path}: give a Python file with get_config(), or a run's config.json")
    if path.suffix == ".json":
        return from_json(_read_json(path), str(path))
    if path.suffix != ".py":
        raise InputError(f"{path} is not a config: give a Python file with get_config(), or a run's config.json")
    spec = importlib.util.spec_from_file_location(f"slimmoe_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: get_config() failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: get_config() returned {type(config).__name__}: it must return a TrainConfig")
    return config


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): restore it from the run's checkpoint") from error


def save(config: TrainConfig, path: str | Path) -> None:
    """Writes the resolved config as JSON."""
    Path(path).write_text(json.dumps(to_json(config), indent=2) + "\n")


def to_json(config: Any) -> dict:
    """The config as a tree of dictionaries and lists that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(tree: Any, where: str, cls: type = TrainConfig, prefix: str = "") -> Any:
    """The inverse of `to_json`; fields that are missing take their defaults.

    Raises:
      InputError: names the field that is unknown or of the wrong type, and the file `where`.
    """
    if not isinstance(tree, dict):
        raise InputError(f"{where}: {prefix or 'the config'} must be an object, not {type(tree).__name__}")
    types = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f": did you mean {prefix}{near[0]}?" if near else ""
            raise InputError(f"{where}: unknown field {prefix}{name}{hint}")
        values[name] = _from_json_value(value, types[name], where, prefix + name)
    return cls(**values)


def _from_json_value(value: Any, kind: Any, where: str, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_json(value, where, kind, name + ".")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where}: {name} = {value!r}: must be a list")
        return tuple(_from_json_value(item, typing.get_args(kind)[0], where, name) for item in value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise InputError(f"{where}: {name} = {value!r}: choose from {', '.join(typing.get_args(kind))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where}: {name} = {value!r}: must be {kind.__name__}")
    return value


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs of one type differ: {dotted name: (old value, new value)}."""
    found = {}
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a):
            found.update(differences(a, b, f"{prefix}{field.name}."))
        elif a != b:
            found[prefix + field.name] = (a, b)
    return found


def override(config: Any, values: dict[str, Any]) -> Any:
    """A copy with some fields replaced: `override(config, {"model.layers": 2})`.

    Raises:
      InputError: a name is not a field.
    """
    for dotted, value in values.items():
        head, _, rest = dotted.partition(".")
        if head not in {field.name for field in dataclasses.fields(config)}:
            raise InputError(f"unknown field {dotted}")
        config = dataclasses.replace(config, **{head: override(getattr(config, head), {rest: value}) if rest else value})
    return config


# --- where things live -----------------------------------------------------------------------------------------------


def workdir(config: TrainConfig) -> Path:
    """The run's folder."""
    return Path(config.workdir or f"runs/{config.name}")


def records_dir(data: DataConfig) -> Path:
    """The folder of prepared records. Its default name holds a hash of every field that shapes the records."""
    if data.records:
        return Path(data.records)
    shaping = (data.source, data.text_field, data.tokenizer, data.train_tokenizer, data.context)
    shaping += (data.validation_fraction, data.min_characters)
    digest = hashlib.sha256(json.dumps(shaping).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", data.source.lower().rsplit("/", 1)[-1]).strip("-")[:40]
    return Path("data") / f"{slug}-{data.context}-{digest}"
