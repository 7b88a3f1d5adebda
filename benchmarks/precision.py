"""Training in bfloat16 beside float32: the loss over the same steps of the same text, and speed.

    python benchmarks/precision.py [--config configs/quickstart.py] [--steps 300] [--source SOURCE] [--seed 0]

Four runs: float32; bfloat16 from the same weights over the same batches; float32 from other weights over the same batches; float32
from other weights over other batches. A row is the mean training loss over a window of steps. What bfloat16 changes is to be read
beside what the weights' seed changes on the same text; another text moves the loss of a window for reasons of its own. Steps a
second count from the third step on; what a CPU makes of bfloat16 says nothing about a GPU. `--out FILE` keeps the curves as CSV.

The config is the quickstart's, on a GPU configs/pretrain.py with batches of 8 and --steps as the length of its schedule; the text
is the standard library's unless a source is given. Records are prepared where there are none; they are read here in an order of
this program's own, so that prepared records are all that it needs of data. Takes about seven minutes on two cores.
"""

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from common import header, machine, one_device, row

from slimmoe_jax import config as config_lib
from slimmoe_jax import sharding, state, step
from slimmoe_jax.config import TrainConfig
from slimmoe_jax.data import records

ROOT = Path(__file__).parent.parent
WARM_UP = 2
FULL_PRECISION = ("highest", "float32")  # values of jax_default_matmul_precision


def base_config(args: argparse.Namespace) -> TrainConfig:
    """The config that the runs share."""
    on_gpu = jax.default_backend() == "gpu"
    config = config_lib.load(args.config or ROOT / "configs" / ("pretrain.py" if on_gpu else "quickstart.py"))
    changes: dict = {"steps": args.steps, "seed": args.seed}
    if args.source or not args.config:
        changes["data.source"] = args.source or "stdlib:sources"
    if on_gpu and not args.config:
        changes |= {"data.batch_size": 8, "optim.accumulate": 1}
        changes |= {"optim.schedule_steps": args.steps, "optim.warmup_steps": args.steps // 10}
    return config_lib.override(config, changes)


def open_records(config: TrainConfig) -> records.Records:
    """The config's records, prepared first where there are none."""
    directory = config_lib.records_dir(config.data)
    if not (directory / "manifest.json").exists():
        from slimmoe_jax.data import loading  # only where text is to be prepared

        loading.open_all(config.data, config.model)
    return records.open_records(directory, config.data.context, config.model)


def batches(split: records.Split, batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, each epoch in a new order."""
    order = np.random.default_rng(seed)
    while True:
        numbers = order.permutation(len(split))
        for first in range(0, len(split) - batch_size + 1, batch_size):
            yield split.batch(numbers[first : first + batch_size])


def train(config: TrainConfig, opened: records.Records, order: int) -> tuple[np.ndarray, float]:
    """The loss of each step, and steps a second after the first ones. `order` is the seed of the batches."""
    mesh = one_device()
    current = state.create(config, mesh)
    run = step.jit_train_step(config, mesh, opened.end_token)
    rows, losses = batches(opened.split("train"), config.data.batch_size, order), []
    with sharding.use(mesh):
        for n in range(config.steps):
            if n == WARM_UP:
                jax.block_until_ready(current)
                started = time.perf_counter()
            current, metrics = run(current, jax.device_put(next(rows), sharding.batch_sharding(mesh)))
            losses.append(metrics["loss"])
        jax.block_until_ready(current)
    return np.array(jax.device_get(losses)), (config.steps - WARM_UP) / (time.perf_counter() - started)


def check_finite(curves: dict[str, np.ndarray]) -> None:
    """Stops the program where a run's loss is no number: means of it would say nothing."""
    for name, curve in curves.items():
        if not np.isfinite(curve).all():
            raise SystemExit(f"{name}: the loss of step {int(np.argmin(np.isfinite(curve))) + 1} is not finite")


def multiplication() -> str:
    """What a float32 matrix product is on this device."""
    precision = jax.config.jax_default_matmul_precision
    if jax.default_backend() == "gpu" and precision not in FULL_PRECISION:
        return f"TF32 where the device has it (jax_default_matmul_precision is {precision})"
    return f"float32 throughout (jax_default_matmul_precision is {precision})"


def write_curves(path: str, curves: dict[str, np.ndarray]) -> None:
    """One line a step."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        writer.writerows([n, *map(float, values)] for n, values in enumerate(zip(*curves.values(), strict=True), start=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="(default: configs/quickstart.py, on a GPU configs/pretrain.py)")
    parser.add_argument("--source", help="as data.source (default: the standard library, or that of --config)")
    parser.add_argument("--steps", type=int, default=300, help="of each run, at least 3 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches; the others are the next (default: 0)")
    parser.add_argument("--windows", type=int, default=6, help="rows of the table (default: %(default)s)")
    parser.add_argument("--out", help="CSV file for the loss of each step")
    args = parser.parse_args(argv)
    if not 1 <= args.windows <= args.steps or args.steps <= WARM_UP:
        parser.error(f"give more than {WARM_UP} steps, and no more windows than steps")
    base = base_config(args)
    opened = open_records(base)
    on_gpu = jax.default_backend() == "gpu"
    print(machine("jax", "flax", device=jax.devices()[0].device_kind if on_gpu else ""))
    print(f"{base.name}, {base.data.source}, {base.data.batch_size} sequences of {base.data.context} tokens a step")
    print(f"float32 matrix products: {multiplication()}\n", flush=True)
    seed = args.seed
    runs = {  # precision, seeds of the weights and of the batches
        "float32": ("float32", seed, seed),
        "bfloat16": ("bfloat16", seed, seed),
        "other weights": ("float32", seed + 1, seed),
        "other weights and text": ("float32", seed + 1, seed + 1),
    }
    curves, rates = {}, {}
    for name, (precision, weights, order) in runs.items():
        config = config_lib.override(base, {"precision": precision, "seed": weights})
        curves[name], rates[name] = train(config, opened, order)
    check_finite(curves)
    print(header(["steps", *curves, *(f"{name} - float32" for name in list(curves)[1:])]))
    for window in np.array_split(np.arange(args.steps), args.windows):
        means = [float(curve[window].mean()) for curve in curves.values()]
        cells = [f"{mean:.4f}" for mean in means] + [f"{mean - means[0]:+.4f}" for mean in means[1:]]
        print(row([f"{window[0] + 1} to {window[-1] + 1}", *cells]))
    speeds = ", ".join(f"{name} {rates[name]:.2f}" for name in ("float32", "bfloat16"))
    print(f"\nSteps a second: {speeds}." + ("" if on_gpu else " On a CPU bfloat16's speed says nothing about a GPU."))
    if args.out:
        write_curves(args.out, curves)


if __name__ == "__main__":
    main()
