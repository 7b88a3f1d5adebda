"""Cost against size: time, memory and compile time of a training step, beside the growth that the accounting predicts.

    python benchmarks/growth.py [--axes layers width experts context batch] [--doublings 2] [--repeats 9]

From one base model, one size at a time starts at half the base's (experts: at the base's) and doubles; the others stay. A row is
one whole training step (forward, backward, clipping, AdamW) on random tokens, its median and spread over the repeats after two
steps to warm up, and each "x" is the ratio to the row before. The values of a size take turns, step by step, so that a busy spell
of the machine meets all of them.

- time, beside `metrics.train_flops_per_token` times tokens: of attention's square the share that the kernel computes, half (causal)
  for a flash kernel, somewhat more for blocks of queries;
- memory, the compiler's temporaries and arguments (parameters, moments, batch), beside the sum of `metrics.memory_estimate`; on
  a GPU also the device's own peak, for which each row runs in a process of its own, one after another;
- compile: tracing and compiling, without a cache.

Width doubles the heads and the experts' hidden layer with it; experts are always chosen by top-2. On a GPU the base is
SlimMoE-250M with 2 kv heads in each layer, which is the card's number of parameters, in bfloat16; elsewhere it is a model of the
quickstart's size in float32. Takes about three minutes on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU the rows' processes need the memory, not this one

import jax  # noqa: E402
import numpy as np  # noqa: E402
from common import header, machine, one_device, row, spread  # noqa: E402

from slimmoe_jax import attention, blockwise, host, metrics, sharding, state, step  # noqa: E402
from slimmoe_jax import config as config_lib  # noqa: E402
from slimmoe_jax.config import DataConfig, ModelConfig, RouterConfig, TrainConfig  # noqa: E402

AXES = ("layers", "width", "experts", "context", "batch")
WARM_UP = 2


def base_config(gpu: bool) -> TrainConfig:
    """What the sizes are varied around."""
    shared = dict(kv_heads=(2,), dropout=0.0, router=RouterConfig(kind="top_k", max_experts=2))
    if gpu:
        model, data = ModelConfig(**shared), DataConfig(context=2_048, batch_size=8)
        return TrainConfig(model=model, data=data, precision="bfloat16")
    model = ModelConfig(vocab_size=4_096, layers=4, width=128, heads=4, head_dim=32, expert_hidden=256, **shared)
    return TrainConfig(model=model, data=DataConfig(context=256, batch_size=4))


def start_of(base: TrainConfig, axis: str) -> int:
    """The smallest value of a size."""
    sizes = {"context": base.data.context, "batch": base.data.batch_size}
    return base.model.experts if axis == "experts" else sizes.get(axis, getattr(base.model, axis, 0)) // 2


def sized(base: TrainConfig, axis: str, value: int) -> TrainConfig:
    """The base with one size changed."""
    changes = {
        "layers": {"model.layers": value},
        "width": {"model.width": value, "model.heads": value // base.model.head_dim, "model.expert_hidden": 2 * value},
        "experts": {"model.experts": value},
        "context": {"data.context": value},
        "batch": {"data.batch_size": value},
    }
    return config_lib.override(base, changes[axis])


def step_flops(config: TrainConfig) -> float:
    """FLOPs of a training step as the attention kernel in use computes it."""
    length, flops = config.data.context, metrics.train_flops_per_token(config.model, config.data.context)
    half = flops["palm"] - flops["causal"]  # of attention's square
    if attention.resolve_kernel(config.model, np.dtype(config.precision)) == "cudnn":
        share = 0.5
    else:
        share = sum((end - first) * end for first, end in blockwise.blocks(length)) / length**2
    return (flops["causal"] - half + 2 * half * share) * config.data.batch_size * length


def step_memory(config: TrainConfig) -> float:
    """Bytes of a training step by arithmetic."""
    return sum(metrics.memory_estimate(config).values())


class Training:
    """A training step, compiled, and the state that it goes on from."""

    def __init__(self, config: TrainConfig):
        mesh = one_device()
        like = state.abstract(config, mesh)
        shape = (config.data.batch_size, config.data.context + 1)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
        self._batch = jax.device_put({"tokens": tokens}, sharding.batch_sharding(mesh))
        with sharding.use(mesh):
            run = step.jit_train_step(config, mesh, end_token=0)
            started = time.perf_counter()
            self._run = run.lower(like, self._batch).compile()
            self.compile_seconds = time.perf_counter() - started
        self._state = state.create(config, mesh)
        self.seconds: list[float] = []  # of each step

    def step(self) -> None:
        """Takes one step and notes its time."""
        started = time.perf_counter()
        self._state, found = jax.block_until_ready(self._run(self._state, self._batch))
        self.seconds.append(time.perf_counter() - started)
        if found["skipped"] or not np.isfinite(found["loss"]):
            raise SystemExit("a step's loss is not finite; what was timed is no training")

    def figures(self) -> dict[str, Any]:
        """Seconds of each timed step and of compilation, bytes by the compiler, and the device's peak where it counts one."""
        memory, (device,) = self._run.memory_analysis(), self._state.step.devices()
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        return {"seconds": self.seconds[WARM_UP:], "compile": self.compile_seconds, "memory": size, "peak": peak}


def measure(configs: list[TrainConfig], repeats: int) -> list[dict[str, Any]]:
    """The figures of each; they take turns."""
    trainings = [Training(config) for config in configs]
    for _ in range(WARM_UP + repeats):
        for training in trainings:
            training.step()
    return [training.figures() for training in trainings]


def measure_apart(configs: list[TrainConfig], repeats: int) -> list[dict[str, Any] | None]:
    """The same, each in a process of its own: a device's peak is that of the process's whole life. None: it does not fit."""
    found = []
    for config in configs:
        command = [sys.executable, __file__, "--repeats", str(repeats), "--measure", json.dumps(config_lib.to_json(config))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"a row's process failed with exit code {done.returncode}; its error is above")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def measure_one(config: str, repeats: int) -> dict[str, Any] | None:
    """What such a process does. None where the device's memory does not hold the step."""
    try:
        (figures,) = measure([config_lib.from_json(json.loads(config), "--measure")], repeats)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return figures


def times(new: float, old: float | None) -> str:
    return "" if old is None else f"{new / old:.2f}"


def rows_of(base: TrainConfig, axis: str, doublings: int, repeats: int, apart: bool) -> None:
    """Prints the rows of one size."""
    values = [start_of(base, axis) << n for n in range(doublings + 1)]
    configs = [sized(base, axis, value) for value in values]
    median = memory = flops = estimate = None  # of the row before
    for value, config, found in zip(values, configs, (measure_apart if apart else measure)(configs, repeats), strict=True):
        if found is None:
            print(row([axis, f"{value:,}", "does not fit", *[""] * 7]), flush=True)
            break  # the next is larger still
        milliseconds = [1e3 * seconds for seconds in found["seconds"]]
        new = (statistics.median(milliseconds), found["memory"], step_flops(config), step_memory(config))
        cells = [axis, f"{value:,}", spread(milliseconds, ",.1f"), times(new[0], median), times(new[2], flops)]
        cells += [f"{new[1] / 2**20:,.0f} MiB", times(new[1], memory), times(new[3], estimate), f"{found['compile']:.1f}"]
        print(row(cells + ([f"{found['peak'] / 2**20:,.0f} MiB"] if apart else [])), flush=True)
        median, memory, flops, estimate = new


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES, help="sizes to vary (default: all)")
    parser.add_argument("--doublings", type=int, default=2, help="of each size (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps a row (default: %(default)s)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a config as JSON: what a row's own process is given
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure_one(args.measure, args.repeats)))
        return
    gpu = jax.default_backend() == "gpu"
    base = base_config(gpu)
    model, data = base.model, base.data
    print(machine("jax", "flax", device=jax.devices()[0].device_kind if gpu else ""))
    kernel = attention.resolve_kernel(model, np.dtype(base.precision))
    print(f"base: {model.layers} layers, width {model.width}, {model.experts} experts (top-2), vocabulary {model.vocab_size:,},")
    print(f"batch {data.batch_size}, context {data.context}, {base.precision}, {kernel} attention, {args.repeats} steps a row\n")
    names = ["what", "value", "step, ms", "x", "theory x", "memory", "x", "theory x", "compile, s"]
    print(header(names + (["device peak"] if gpu else [])), flush=True)
    for axis in args.axes:
        rows_of(base, axis, args.doublings, args.repeats, apart=gpu)


if __name__ == "__main__":
    host.prepare()  # as training does
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are part of the table
    main()
