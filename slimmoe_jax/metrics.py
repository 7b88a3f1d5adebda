"""What a model costs, what a device can do, and the record that a run leaves.

Counts follow from the config alone. FLOPs are of training, forward and backward; attention is counted in two
conventions: `palm` as if it were full (PaLM, arXiv 2204.02311, appendix B), `causal` half of that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimmoe_jax import blockwise, files
from slimmoe_jax.config import ModelConfig, TrainConfig

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
    if sys.platform not in ("linux", "darwin"):
        return None
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


class JsonlWriter:
    """Appends to `metrics.jsonl`. A resumed run takes back the lines past its checkpoint, so no step is written twice."""

    def __init__(self, path: str | Path, resume_step: int):
        """Keeps the complete lines of steps up to `resume_step`; a line torn by a kill is dropped."""
        self.path = Path(path)
        kept = [json.dumps(row) for row in read_jsonl(self.path) if row["step"] <= resume_step] if self.path.exists() else []
        with files.replacing(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self._file = self.path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({key: to_python(value) for key, value in row.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The complete rows of a metrics file; a torn last line is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def last_row(path: str | Path) -> dict[str, Any] | None:
    """The newest complete row of a metrics file that may be being written; None where there is none. Reads its end alone."""
    try:
        with Path(path).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            row: dict[str, Any] = json.loads(line)
            return row
        except ValueError:
            continue
    return None


def to_python(value: Any) -> Any:
    """Arrays to numbers and lists of 6 significant digits; a number that is not finite to None, which JSON can hold."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = np.asarray(value).tolist()
    if isinstance(value, list):
        return [to_python(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
