"""The plan of a run, for `--dry-run`: what would be trained, what it costs, and what it needs; and how it runs on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax.numpy as jnp

from slimmoe_jax import attention, experts, metrics
from slimmoe_jax.config import TrainConfig
from slimmoe_jax.progress import short


def plan(config: TrainConfig, devices: int = 1) -> str:
    """Several tables as text. Nothing is compiled or read."""
    model, context = config.model, config.data.context
    counts = metrics.parameter_counts(model)
    total = sum(counts.values())
    rows = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in counts.items() if count]
    sections = [_table("Parameters", [*rows, ("total", f"{total:,}", "100.0%")])]

    flops = metrics.train_flops_per_token(model, context)
    cache = metrics.kv_cache_bytes_per_token(model)
    tokens = config.data.batch_size * context
    cost = [
        ("experts a token", f"{metrics.experts_per_token(model):g} of {model.experts}"),
        ("active matrix parameters a token", f"{metrics.active_parameters(model):,.0f}"),
        ("training FLOPs a token, causal", short(flops["causal"])),
        ("training FLOPs a token, PaLM", short(flops["palm"])),
        ("KV cache, bytes a token (float32)", f"{cache['vgqa']:,}"),
        ("  the same with MHA", f"{cache['mha']:,} ({cache['mha'] / cache['vgqa']:.1f}x)"),
        ("tokens a step", f"{config.data.batch_size} x {context} = {tokens:,}"),
        ("steps", f"{config.steps:,}"),
        ("tokens in all", f"{metrics.train_tokens(config):,}"),
        ("FLOPs in all, causal", short(flops["causal"] * metrics.train_tokens(config))),
    ]
    sections.append(_table("Cost", cost))

    layers = zip(model.layer_kv_heads, model.layer_rotary, strict=True)
    schedule = [(f"layer {n}", str(kv), f"{rotary:g}", _position(rotary)) for n, (kv, rotary) in enumerate(layers)]
    sections.append(_table("Layers: kv heads, rotary fraction", schedule))

    memory = metrics.memory_estimate(config, devices)
    needed = [(part, f"{size / 2**30:.2f} GiB") for part, size in (memory | {"total": sum(memory.values())}).items()]
    sections.append(_table("Memory on each device, estimated", needed))
    return "\n\n".join(sections)


def choices(config: TrainConfig) -> str:
    """What `auto` and precision come to on this machine, in one line. Needs the mesh in use."""
    model = config.model
    kernel = attention.resolve_kernel(model, jnp.dtype(config.precision))
    words = [f"{config.precision}", {"cudnn": "cuDNN attention", "xla": "blockwise attention in XLA"}[kernel]]
    if model.is_moe:
        training, evaluation = (experts.resolve_dispatch(model, train) for train in (True, False))
        words.append(f"{training} dispatch" + (f" ({evaluation} in evaluation)" if evaluation != training else ""))
    return ", ".join(words)


def _position(rotary: float) -> str:
    return {0.0: "NoPE", 1.0: "RoPE"}.get(rotary, "partial")


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned names, right-aligned figures."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return os.linesep.join([title, *lines])
