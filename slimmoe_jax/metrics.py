"""What a model costs, what a device can do, and the record that a run leaves.

Counts follow from the config alone. FLOPs are of training, forward and backward; attention is counted in two
conventions: `palm` as if it were full (PaLM, arXiv 2204.02311, appendix B), `causal` half of that.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimmoe_jax import blockwise, files
from slimmoe_jax.config import InputError, ModelConfig, TrainConfig
from slimmoe_jax.progress import say

# Dense peaks in FLOP/s from the vendors' data sheets: device kind -> (bfloat16, float32 as JAX runs it: TF32 where there is one).
PEAKS = {
    "NVIDIA H200": (989e12, 494e12),
    "NVIDIA H100": (989e12, 494e12),
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA L40S": (362e12, 183e12),
    "NVIDIA L4": (121e12, 60e12),
    "NVIDIA GeForce RTX 4090": (165e12, 82.6e12),
    "NVIDIA GeForce RTX 3090": (71e12, 35.6e12),
    "NVIDIA A10": (125e12, 62.5e12),
    "Tesla T4": (65e12, 8.1e12),
    "Tesla V100": (125e12, 15.7e12),
}


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters by part of the model. A dense model's feed-forward layers count as experts."""
    d, h = model.width, model.head_dim
    kv = sum(model.layer_kv_heads)
    matrices = 3 if model.gated else 2
    return {
        "input embedding": model.vocab_size * d,
        "output head": 0 if model.tie_embeddings else model.vocab_size * d,
        "attention query, out": model.layers * 2 * d * model.heads * h,
        "attention key, value": 2 * d * h * kv,
        "experts": model.layers * model.experts * matrices * d * model.expert_hidden,
        "routers": model.layers * d * model.experts if model.is_moe else 0,
        "norms": d * (2 * model.layers + 1) + (2 * h * model.layers if model.qk_norm else 0),
    }


def experts_per_token(model: ModelConfig) -> float:
    """Experts that a token uses: the controller's target where there is one, else the most it may."""
    if not model.is_moe:
        return 1.0
    steered = model.router.kind != "top_k" and model.router.target_experts > 0
    return model.router.target_experts if steered else float(model.router.max_experts)


def active_parameters(model: ModelConfig, experts: float | None = None) -> float:
    """Matrix parameters that multiply each token: output head, attention, router and the experts it uses."""
    counts = parameter_counts(model)
    used = experts_per_token(model) if experts is None else experts
    head = model.vocab_size * model.width
    attention = counts["attention query, out"] + counts["attention key, value"]
    return head + attention + counts["routers"] + counts["experts"] * used / model.experts


def train_flops_per_token(model: ModelConfig, context: int, experts: float | None = None) -> dict[str, float]:
    """FLOPs of one training step for each token, in the two conventions."""
    matrices = 6 * active_parameters(model, experts)
    attention = 12 * model.layers * model.heads * model.head_dim * context
    return {"causal": matrices + attention / 2, "palm": matrices + attention}


def train_tokens(config: TrainConfig) -> int:
    """Tokens of a whole training."""
    return config.steps * config.data.batch_size * config.data.context


def kv_cache_bytes_per_token(model: ModelConfig, itemsize: int = 4) -> dict[str, int]:
    """Bytes of keys and values a token, of this model and of the same one with a kv head for each query head."""
    one = 2 * model.head_dim * itemsize
    return {"vgqa": one * sum(model.layer_kv_heads), "mha": one * model.layers * model.heads}


def memory_estimate(config: TrainConfig, devices: int = 1) -> dict[str, float]:
    """Bytes on each device for a training step, by arithmetic; the compiler's own figure differs by its reuse of buffers."""
    model, item = config.model, 4 if config.precision == "float32" else 2
    shards = max(1, config.mesh.fsdp)
    parameters = sum(parameter_counts(model).values())
    tokens = config.data.batch_size * config.data.context / config.optim.accumulate / devices
    d, heads = model.width, model.heads * model.head_dim
    kv = 2 * model.head_dim * sum(model.layer_kv_heads) / model.layers
    slots = min(model.experts, model.capacity_factor * model.router.max_experts) if model.is_moe else 1
    hidden = (2 if model.gated else 1) * model.expert_hidden  # before the activation
    choices = model.router.max_experts if model.is_moe else 0  # outputs that the gates weigh
    # Kept of a layer: the residual stream twice, both norms, attention's output; queries and what attention made of them.
    layer = 5 * d + 2 * heads + kv + slots * hidden + choices * d
    flash = config.precision == "bfloat16" and model.attention != "xla"
    block = max(end - first for first, end in blockwise.blocks(config.data.context))
    queries = tokens * block / config.data.context  # of a block, in all sequences
    scores = 0 if flash else 3 * 4 * queries * model.heads * config.data.context
    layers = 1 + model.layers * d / layer if config.remat else model.layers
    tile = min(tokens, 8_192) * model.vocab_size * 4 * 2
    return {
        "parameters": 4 * parameters / shards,
        "gradients": 4 * parameters / shards,
        "Adam moments": 8 * parameters / shards,
        "activations": tokens * layer * layers * item,
        "attention scores of a block": scores,
        "logits of a tile": tile + 2 * 4 * model.vocab_size * d,
    }


@dataclasses.dataclass(frozen=True)
class Peak:
    """What MFU is a fraction of."""

    flops: float  # FLOP/s of one device
    name: str  # which figure this is


def device_peak(precision: str) -> Peak:
    """The peak of this process's kind of device: a data sheet's, or a measured matrix product where none is known."""
    known = known_peak(jax.devices()[0].device_kind, precision)
    if known:
        return known
    flops = _measured_peak(jnp.dtype(precision))
    return Peak(flops, f"{flops / 1e9:.0f} GFLOP/s, {precision} matrix product measured on this {jax.default_backend()}")


def known_peak(kind: str, precision: str) -> Peak | None:
    """The data sheet's peak of a kind of device, None where it is not known."""
    for name, (bfloat16, float32) in PEAKS.items():
        if kind.startswith(name):
            flops = bfloat16 if precision == "bfloat16" else float32
            label = "bfloat16" if precision == "bfloat16" else "float32 (TF32 where it has it)"
            return Peak(flops, f"{flops / 1e12:.0f} TFLOP/s, {name} {label}, dense")
    return None


def _measured_peak(dtype: jnp.dtype, size: int = 1024) -> float:
    """The best of the matrix products of a quarter of a second, FLOP/s: a few alone meet what else the machine starts just then."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a: a @ a).lower(x).compile()
    best, end = math.inf, time.perf_counter() + 0.25
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory() -> int | None:
    """Bytes held at most so far: on this process's first device, or, where that is the CPU, by the process. None where unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    if sys.platform == "linux":  # where getrusage counts the program too that started this one
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    if sys.platform != "darwin":
        return None
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class JsonlWriter:
    """Appends to `metrics.jsonl`. A resumed run takes back the lines past its checkpoint, so no step is written twice."""

    def __init__(self, path: str | Path, resume_step: int):
        """Keeps the lines of steps up to `resume_step`; a line torn by a kill is dropped.

        Damaged lines are moved to `metrics.jsonl.damaged`, which a remark says.
        """
        self.path = Path(path)
        log = _Log.read(self.path) if self.path.exists() else _Log([], [])
        if log.damaged:
            aside = self.path.with_name(self.path.name + ".damaged")
            with aside.open("ab") as file:
                file.write(b"".join(line + b"\n" for _, line in log.damaged))
            say(f"{self.path}: {log.damage()} moved to {aside}")
        with files.replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for row, line in log.rows if row["step"] <= resume_step))
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({key: to_python(value) for key, value in row.items()}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass(frozen=True)
class _Log:
    """The lines of a metrics file, without their ends. A torn last line, such as a kill leaves, is in neither list."""

    rows: list[tuple[dict[str, Any], bytes]]  # by rising step
    damaged: list[tuple[int, bytes]]  # their numbers in the file, from 1

    @classmethod
    def read(cls, path: Path) -> _Log:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions, or move it away") from error
        torn = lines.pop()
        parsed = [(_row(line), line) for line in lines]
        if row := _row(torn):
            parsed.append((row, torn))
        numbers = [number for number, (row, _) in enumerate(parsed) if row]
        rising = _longest_rising([parsed[number][0]["step"] for number in numbers])  # type: ignore[index]
        kept = {numbers[place] for place in rising}
        rows = [(row, line) for number, (row, line) in enumerate(parsed) if row and number in kept]
        return cls(rows, [(number + 1, line) for number, (_, line) in enumerate(parsed) if number not in kept])

    def damage(self) -> str:
        """How many lines are damaged, and where."""
        number, first = len(self.damaged), self.damaged[0][0]
        return f"1 damaged line (line {first}) is" if number == 1 else f"{number} damaged lines (the first is line {first}) are"


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds: an object with a step; None where it is damaged."""
    try:
        row = files.parse_json(line.decode())
        json.dumps(row, allow_nan=False)
    except ValueError:  # no JSON, or a NaN or infinity, which JSON has no word for
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and 0 <= step < 2**63 else None


def _longest_rising(steps: list[int]) -> list[int]:
    """The places of the longest rising subsequence: of steps that were written twice the later, and none that is out of order."""
    ends: list[int] = []  # of the sequence of each length that ends lowest
    places: list[int] = []
    before: list[int] = []
    for place, step in enumerate(steps):
        length = bisect.bisect_left(ends, step)
        ends[length : length + 1], places[length : length + 1] = [step], [place]
        before.append(places[length - 1] if length else -1)
    found = []
    place = places[-1] if places else -1
    while place >= 0:
        found.append(place)
        place = before[place]
    return found[::-1]


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, by rising step; a torn last line is left out, and so are damaged lines, with a remark.

    Raises:
      InputError: the file cannot be read.
    """
    log = _Log.read(Path(path))
    if log.damaged:
        _remark(f"{path}: {log.damage()} left out")
    return [row for row, _ in log.rows]


@functools.cache
def _remark(line: str) -> None:
    """Says a line once, however often a file is read."""
    say(line)


def last_row(path: str | Path) -> dict[str, Any] | None:
    """The newest complete row of a metrics file that may be being written; None where there is none. Reads as little as it can."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for power in itertools.count(16):
                file.seek(max(0, size - 2**power))
                row = next((row for line in reversed(file.read().split(b"\n")) if (row := _row(line))), None)
                if row or 2**power >= size:
                    return row
    except OSError:
        pass
    return None


def to_python(value: Any) -> Any:
    """Arrays to numbers and lists of 6 significant digits; a number that is not finite to None, which JSON can hold."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = np.asarray(value).tolist()
    if isinstance(value, dict):
        return {key: to_python(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_python(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
