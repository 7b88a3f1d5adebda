"""Configuration: frozen dataclasses, and how they are read from Python files and JSON. `validation` checks their values.

A config file is Python with one function, `get_config() -> TrainConfig`. The same tree of dataclasses is written to
`config.json` in each run's folder, and that file is accepted wherever a Python config is. Nothing here imports JAX, so
that the data tools start quickly and mistakes are found before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import traceback
import typing
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from slimmoe_jax import files
from slimmoe_jax.terminal import one_line

C = TypeVar("C")  # a dataclass of the config

RECORDS_FILE = "records.json"  # in a run's folder: where it was trained, and on which records (see `data.loading`)
SHIPPED = Path(__file__).parent / "configs"  # which in a checkout is a link to configs/ at its root

LEAST_WEIGHT = 1e-6  # of a source of `data.mix`: Grain never reads one that weighs much less than the others

TrackerName = Literal["tensorboard", "trackio", "wandb"]
Format = Literal["text", "chat", "multiple_choice"]
_FORMATS = typing.get_args(Format)


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one line: what, where, and how to fix it."""

    def __str__(self) -> str:
        return one_line(super().__str__())  # names in it may come from damaged files


def reason(error: BaseException) -> str:
    """The first line of what an exception says, to stand in the brackets of an InputError."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def shown(value: Any) -> str:
    """A value in an error's line, shortened: it may be whatever a file held."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, or lists too deep in each other
        text = f"{type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    layers: int = 16  # blocks of attention and experts
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
    norm_epsilon: float = 1e-5  # added to the mean square in each RMSNorm
    init_std: float = 0.02  # normal initialisation; residual outputs are scaled by 1/sqrt(2 layers)
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # attention kernel; auto: cudnn in bfloat16 on NVIDIA, else xla
    dispatch: Literal["auto", "dense", "capacity", "ragged", "grouped"] = "auto"  # auto: ragged on a CPU, else capacity
    capacity_factor: float = 1.25  # capacity: slots per expert and sequence, relative to an even share of max_experts
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
    split: str = ""  # of the hub's dataset (empty: train) or of a directory (empty: train where its files name splits, else all)
    format: Format = "text"  # what a row holds; chat and questions are packed
    text_field: str = ""  # column or key of the text or messages; empty: text, or for chat messages or conversations
    choice_style: Literal["cloze", "letters"] = "cloze"  # multiple choice asks for the answer's text, or for its letter
    mix: tuple[str, ...] = ()  # further sources, WEIGHT:[FORMAT:]SOURCE; the weight is in records, beside 1 for `source`
    records: str = ""  # folder of prepared records; empty: data/NAME-HASH below the current directory
    tokenizer: str = "gpt2"  # gpt2, a SentencePiece .model, sentencepiece (with train_tokenizer), inherit (of init_from)
    train_tokenizer: int = 0  # train a SentencePiece vocabulary of this many pieces on the source; 0: use `tokenizer`
    context: int = 2_048  # tokens a sequence
    train_records: int = 0  # train on the first so many records of `source` alone, so that they are repeated; 0: on all
    batch_size: int = 32  # sequences a step, over all devices and accumulation
    validation_fraction: float = 0.005  # share of documents held out, chosen by a hash of their text
    min_characters: int = 8  # shorter documents are left out and counted
    max_row_bytes: int = 2**27  # a longer row (a line of a file, a value of a table) is refused, so that memory stays bounded
    document_mask: bool = False  # attention and positions restart at each document of text
    workers: int = 0  # processes that read records; 0 reads in threads

    @property
    def field(self) -> str | None:
        """The column or key that is read; None where a row is used whole."""
        if self.format == "multiple_choice":
            return None
        return self.text_field or {"text": "text", "chat": "messages"}[self.format]


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
    beta1: float = 0.9  # AdamW: share of the first moment that a step keeps
    beta2: float = 0.95  # AdamW: share of the second moment that a step keeps
    epsilon: float = 1e-8  # AdamW: added to the root of the second moment
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off
    accumulate: int = 1  # micro-batches a step
    z_weight: float = 0.0  # z-loss on the output logits
    skip_sigma: float = 0.0  # leave out a step whose loss or gradient norm is so many sigma above the window's mean; 0: never
    skip_window: int = 128  # steps in that window
    skip_limit: int = 10  # steps left out in a row that end the run, with a dump of the last one


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
    trackers: tuple[TrackerName, ...] = ()  # what shows the run beside metrics.jsonl; each of them needs the extra `track`
    watchdog: int = 1_800  # seconds that a step may take before the run ends with the stacks of its threads; 0: any
    compilation_cache: str = "~/.cache/slimmoe_jax/xla"  # folder of compiled programs; empty: none
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()


def _fill(pattern: tuple[Any, ...], layers: int) -> tuple[Any, ...]:
    return (pattern * math.ceil(layers / len(pattern)))[:layers]


# --- reading and writing ---------------------------------------------------------------------------------------------


def load(path: str | Path) -> TrainConfig:
    """Reads a config: a Python file with `get_config()`, or the `config.json` of a run.

    Raises:
      InputError: the file is missing, is not a config, or holds an unknown field or a value of the wrong type.
    """
    path = find(path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" and path.is_file():
        return as_trained(as_written(path.parent, path.name), path.parent)
    return run_file(path, TrainConfig, ", or a run's config.json")[0]


def find(path: str | Path) -> Path:
    """The path as it is, or, where `configs/...` is not below the current directory, the config that came with the package.

    Raises:
      InputError: it is in neither place; the message lists those that came with the package.
    """
    path = Path(path)
    if path.exists() or path.parts[:1] != ("configs",):
        return path
    if not (SHIPPED.parent / path).is_file():
        names = sorted(str(file.relative_to(SHIPPED.parent)) for file in SHIPPED.rglob("*.py"))
        near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.85)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
        raise InputError(f"no config at {path}, and none of that name came with the package: {hint}")
    return SHIPPED.parent / path


def run_file(path: str | Path, cls: type[C], otherwise: str = "") -> tuple[C, ModuleType]:
    """What `get_config()` of a Python file returns, an instance of `cls`, and the file as a module.

    Args:
      otherwise: what else could have been given, to end an error's line.

    Raises:
      InputError: the file is missing or fails, or returns something else.
    """
    path = find(path)
    if not path.is_file():
        shipped = f"configs/{path.stem}.py" if len(path.parts) == 1 and (SHIPPED / f"{path.stem}.py").is_file() else ""
        hint = f"did you mean {shipped}?" if shipped else f"give a Python file with get_config(){otherwise}"
        raise InputError(f"no config at {path}: {hint}")
    if path.suffix != ".py":
        raise InputError(f"{path} is not a config: give a Python file with get_config(){otherwise}")
    spec = importlib.util.spec_from_file_location(f"slimmoe_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # as for every .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except InputError:
        raise
    except SystemExit as stop:
        raise InputError(f"{path} ended the process with exit code {stop.code}: let get_config() return a {cls.__name__}") from stop
    except Exception as error:
        lines = [error.lineno] if isinstance(error, SyntaxError) else []
        lines += [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f" in line {lines[-1]}" if lines else ""
        why = f"{type(error).__name__}: {reason(error)}{_near_field(error)}"
        raise InputError(f"{path}: get_config() failed{place}: {why}") from error
    if not isinstance(config, cls):
        raise InputError(f"{path}: get_config() returned {type(config).__name__}: it must return a {cls.__name__}")
    if isinstance(config, TrainConfig):
        try:
            config = typed(config)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return config, module


def _near_field(error: Exception) -> str:
    """For a config made with a field that it lacks, the field that may be meant."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    cls = globals().get(found[1]) if found else None
    return _meant(found[2], _types(cls)) if found and cls else ""


def _meant(name: str, fields: Iterable[str], prefix: str = "") -> str:
    """The end of an error's line about an unknown field."""
    near = difflib.get_close_matches(name, fields, n=1)
    return f": did you mean {prefix}{near[0]}?" if near else ""


def _read_json(path: Path) -> Any:
    try:
        return files.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({reason(error)}): restore it from the run's checkpoint") from error


def save(config: TrainConfig, path: str | Path) -> None:
    """Writes the resolved config as JSON."""
    files.write_json(Path(path), to_json(config))


def to_json(config: Any) -> dict[str, Any]:
    """The config as a tree of dictionaries and lists that JSON can hold."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return tree


def from_json(tree: Any, where: str, cls: type = TrainConfig) -> Any:
    """The inverse of `to_json`; fields that are missing take their defaults.

    Raises:
      InputError: names the field that is unknown or of the wrong type, and the file `where`.
    """
    try:
        return _from_tree(tree, cls, "")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _from_tree(tree: Any, cls: type, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise InputError(f"{prefix.rstrip('.') or 'the config'} must be an object, not {type(tree).__name__}")
    return cls(**{name: _checked(value, _field_type(cls, name, prefix), prefix + name) for name, value in tree.items()})


def typed(config: C, prefix: str = "") -> C:
    """A config that Python made, with each value as its field's type has it.

    Raises:
      InputError: names the field whose value is of the wrong type.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return type(config)(
        **{name: _checked(value, _field_type(type(config), name, prefix), prefix + name) for name, value in values.items()}
    )


def _field_type(cls: type, name: str, prefix: str) -> Any:
    types = _types(cls)
    if name not in types:
        raise InputError(f"unknown field {prefix}{name[:80]}{_meant(name, types, prefix)}")
    return types[name]


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(value: Any, kind: Any, name: str) -> Any:
    """The value of a field as its type has it: whole numbers are floats too, lists tuples, and objects dataclasses."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return typed(value, name + ".") if isinstance(value, kind) else _from_tree(value, kind, name + ".")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name} = {shown(value)}: must be a list")
        return tuple(_checked(item, typing.get_args(kind)[0], name) for item in value)
    if typing.get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in typing.get_args(kind):
            raise InputError(f"{name} = {shown(value)}: choose from {', '.join(typing.get_args(kind))}")
        return value
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} = {shown(value)}: must be {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{name} = {value}: must be a finite number")
    return value


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a config and of its parts: {dotted name: value}."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flat(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else {prefix + field.name: value}
    return found


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


def get(config: Any, dotted: str) -> Any:
    """The field of that dotted name."""
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def override(config: C, values: dict[str, Any]) -> C:
    """A copy with some fields replaced: `override(config, {"model.layers": 2})`.

    Raises:
      InputError: a name is not a field, or a value is not of its field's type.
    """
    for dotted, value in values.items():
        config = _replaced(config, dotted.split("."), value, "")
    return config


def _replaced(config: C, path: list[str], value: Any, prefix: str) -> C:
    name, *rest = path
    kind = _field_type(type(config), name, prefix)
    if rest and not dataclasses.is_dataclass(kind):
        raise InputError(f"unknown field {prefix}{'.'.join(path)}: {prefix}{name} has no parts")
    inner = getattr(config, name)
    new = _replaced(inner, rest, value, f"{prefix}{name}.") if rest else _checked(value, kind, prefix + name)
    return dataclasses.replace(config, **{name: new})  # type: ignore[type-var]  # a dataclass of any kind


# --- where things live -----------------------------------------------------------------------------------------------


def workdir(config: TrainConfig) -> Path:
    """The run's folder."""
    return Path(config.workdir or f"runs/{config.name}")


def split_run_path(path: str | Path) -> tuple[Path, str]:
    """RUN, RUN/STEP, RUN/checkpoints/STEP or RUN/best -> the run's folder, and "", the step's digits or "best"."""
    path = Path(path)
    if not (path.name.isdecimal() or path.name == "best") or (path / "checkpoints").is_dir():
        return path, ""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent, path.name


def records_dir(data: DataConfig) -> Path:
    """The folder of prepared records. Its default name holds a hash of every field that shapes the records."""
    if data.records:
        return Path(data.records)
    shaping: list[Any] = [data.source, data.split, data.format, data.field, data.choice_style, data.tokenizer, data.train_tokenizer]
    shaping += [data.context, data.validation_fraction, data.min_characters]
    digest = hashlib.sha256(json.dumps(shaping).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", data.source.lower().rsplit("/", 1)[-1]).strip("-")[:40]
    return Path("data") / f"{slug}-{data.context}-{digest}"


def as_written(run: Path, name: str = "config.json") -> TrainConfig:
    """A run's config with its paths as they were given.

    Raises:
      InputError: it is missing, is not a config, or holds an unknown field or a value of the wrong type.
    """
    config: TrainConfig = from_json(_read_json(run / name), str(run / name))
    return config


def as_trained(config: TrainConfig, run: Path) -> TrainConfig:
    """A run's config as it reads from the current folder: relative paths lead to where they led when the run was trained."""
    folder = trained_in(run)
    return config if folder == Path.cwd() else placed(config, folder)


def trained_in(run: Path) -> Path:
    """The folder in which a run was trained; the current one where it does not say."""
    try:
        return Path(files.parse_json((run / RECORDS_FILE).read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):  # an older run, or none
        return Path.cwd()


def placed(config: TrainConfig, folder: Path) -> TrainConfig:
    """The config with absolute paths in place of those that lead somewhere from `folder`."""
    data = config.data
    data = dataclasses.replace(
        data,
        source=_from(folder, data.source),
        mix=tuple(_weight_of(entry) + _from(folder, entry.removeprefix(_weight_of(entry))) for entry in data.mix),
        tokenizer=_from(folder, data.tokenizer),
        records=_from(folder, str(records_dir(data))) if os.path.exists(folder / records_dir(data)) else data.records,
    )
    earlier, _ = split_run_path(config.init_from)
    init_from = str(folder / config.init_from) if config.init_from and os.path.exists(folder / earlier) else config.init_from
    return dataclasses.replace(config, data=data, init_from=init_from)


def _from(folder: Path, path: str) -> str:
    """A path as it reads in `folder`; what is no path there, or could be none, stays."""
    return str(folder / path) if path and not path.startswith("~") and os.path.exists(folder / path) else path


def _weight_of(entry: str) -> str:
    """What of an entry of `data.mix` stands before its source: `WEIGHT:` or `WEIGHT:FORMAT:`."""
    weight, _, rest = entry.partition(":")
    named, colon, source = rest.partition(":")
    return f"{weight}:{named}:" if colon and source and named in _FORMATS else f"{weight}:"


def parts(data: DataConfig) -> list[DataConfig]:
    """The main source and those of `data.mix`."""
    return [data, *(part for _, part in mixed(data))]


def mixed(data: DataConfig) -> list[tuple[float, DataConfig]]:
    """The sources of `data.mix` with their weights; each has the main source's other settings and a folder of its own.

    Raises:
      InputError: an entry is not WEIGHT:[FORMAT:]SOURCE.
    """
    parts = []
    for entry in data.mix:
        weight, named, *_ = _weight_of(entry).split(":")
        source = entry.removeprefix(_weight_of(entry))
        form: Any = named or data.format
        try:
            share = float(weight)
        except ValueError:
            share = 0.0
        if not source or not 0 < share < math.inf:
            raise InputError(
                f"data.mix = {entry}: write WEIGHT:SOURCE or WEIGHT:FORMAT:SOURCE with a weight above 0, such as 0.25:stdlib"
            )
        if not LEAST_WEIGHT <= share <= 1 / LEAST_WEIGHT:
            raise InputError(f"data.mix = {entry}: give a weight from {LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}")
        same_format = form == data.format
        field = data.text_field if same_format else ""
        split = data.split if same_format and _has_splits(source) else ""
        parts.append(
            (share, dataclasses.replace(data, source=source, format=form, text_field=field, split=split, mix=(), records=""))
        )
    return parts


def _has_splits(source: str) -> bool:
    return source.startswith("hub:") or os.path.isdir(os.path.expanduser(source))


def inherit(config: TrainConfig) -> TrainConfig:
    """The config with `data.tokenizer = inherit` replaced by the tokenizer of the run that `init_from` names.

    Raises:
      InputError: there is no such run, or none is named.
    """
    if config.data.tokenizer != "inherit":
        return config
    if not config.init_from:
        raise InputError("data.tokenizer = inherit takes the tokenizer of another run: name it with --init-from RUN")
    run, _ = split_run_path(config.init_from)
    try:
        name = files.parse_json((run / "tokenizer.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--init-from {config.init_from} holds no run (no readable tokenizer.json in {run}): train that run first, or give "
            "another's folder"
        ) from error
    return override(config, {"data.tokenizer": "gpt2" if name == "gpt2" else str(run / "tokenizer.model")})
