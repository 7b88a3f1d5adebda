"""What the benchmarks share: the machine in words, and tables in Markdown."""

import importlib.metadata
import os
import platform
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from slimmoe_jax.config import ModelConfig, TrainConfig


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine(*packages: str, device: str = "") -> str:
    """The processor, or the device given, and the versions of Python and of packages, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{names[0] if names else platform.machine()}, {cores()} of {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{device or processor}, Python {platform.python_version()}, {versions}"


def on_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, found out without starting one's driver in this process."""
    return shutil.which("nvidia-smi") is not None


def zipf_tokens(config: TrainConfig, batches: int) -> np.ndarray:
    """[batches, B, S + 1] int32, as frequent as words are (Zipf): the embedding's gradient then has the collisions of training."""
    frequency = 1 / np.arange(1, config.model.vocab_size + 1)
    shape = (batches, config.data.batch_size, config.data.context + 1)
    return np.random.default_rng(0).choice(config.model.vocab_size, shape, p=frequency / frequency.sum()).astype(np.int32)


def one_device():
    """A mesh of the first device alone, so that a figure means the same on a machine with several."""
    import jax  # not at the top: what measures data alone needs no JAX

    axes = ("data", "fsdp", "expert")
    return jax.make_mesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1])


def mixtral_config(model: ModelConfig, length: int, **options):
    """The transformers.MixtralConfig of a model of ours that is configured as Mixtral is, for sequences up to `length`."""
    import transformers

    return transformers.MixtralConfig(
        vocab_size=model.vocab_size, hidden_size=model.width, intermediate_size=model.expert_hidden,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads[0],
        head_dim=model.head_dim, rms_norm_eps=model.norm_epsilon, max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta}, tie_word_embeddings=False,
        num_local_experts=model.experts, num_experts_per_tok=model.router.max_experts, attn_implementation="sdpa",
        pad_token_id=None, bos_token_id=None, eos_token_id=None, **options,
    )  # fmt: skip


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def header(names: Sequence[str]) -> str:
    return row(names) + "\n" + "|---" * len(names) + "|"


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """The median, and in brackets the lowest and highest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
