"""Training in bfloat16 beside float32: the loss over the same steps of the same text, and speed.

    python benchmarks/precision.py [--config configs/quickstart.py] [--steps 300] [--source SOURCE] [--seeds 0 1 2 3 4 5]

Three runs a seed, from the same weights over the same batches: float32; bfloat16; and float32 once more, from those weights rounded
to bfloat16 once, before the first step. Training amplifies any change of its start, so the third run says what a difference of
bfloat16's size means. A row is the mean training loss over a window of steps, differences with their 95% interval over the seeds.
Steps a second count from the third step on; what a CPU makes of bfloat16 says nothing about a GPU. `--out FILE` keeps the curves
as CSV.

The config is the quickstart's, on a GPU configs/pretrain.py with batches of 8 and --steps as the length of its schedule; the text
is the standard library's unless a source is given. Records are prepared where there are none; they are read here in an order of
this program's own, so that prepared records are all that it needs of data. Takes about three minutes a seed on two cores.
"""

import argparse
import csv
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import header, machine, one_device, row

from slimmoe_jax import config as config_lib
from slimmoe_jax import sharding, state, step
from slimmoe_jax.config import TrainConfig
from slimmoe_jax.data import records
from slimmoe_jax.study import statistics

ROOT = Path(__file__).parent.parent
WARM_UP = 2
RUNS = ("float32", "bfloat16", "rounded start")
FULL_PRECISION = ("highest", "float32")  # values of jax_default_matmul_precision


def base_config(args: argparse.Namespace) -> TrainConfig:
    """The config that the runs share."""
    on_gpu = jax.default_backend() == "gpu"
    config = config_lib.load(args.config or ROOT / "configs" / ("pretrain.py" if on_gpu else "quickstart.py"))
    changes: dict = {"steps": args.steps}
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


class Training:
    """The training step of one precision, compiled once for all seeds."""

    def __init__(self, config: TrainConfig, opened: records.Records):
        self._mesh = one_device()
        self._config, self._opened = config, opened
        self._run = step.jit_train_step(config, self._mesh, opened.end_token)

    def losses(self, seed: int, rounded: bool) -> tuple[np.ndarray, float]:
        """The loss of each step, and steps a second after the first ones; `rounded`: of the initial weights, to bfloat16."""
        current = state.create(dataclasses.replace(self._config, seed=seed), self._mesh)
        if rounded:
            current = current.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), current.params))
        rows, found = batches(self._opened.split("train"), self._config.data.batch_size, seed), []
        with sharding.use(self._mesh):
            for n in range(self._config.steps):
                if n == WARM_UP:
                    jax.block_until_ready(current)
                    started = time.perf_counter()
                current, metrics = self._run(current, jax.device_put(next(rows), sharding.batch_sharding(self._mesh)))
                found.append(metrics["loss"])
            jax.block_until_ready(current)
        return np.array(jax.device_get(found)), (self._config.steps - WARM_UP) / (time.perf_counter() - started)


def check_finite(name: str, curve: np.ndarray) -> None:
    """Stops the program where a run's loss is no number: means of it would say nothing."""
    if not np.isfinite(curve).all():
        raise SystemExit(f"{name}: the loss of step {int(np.argmin(np.isfinite(curve))) + 1} is not finite")


def multiplication() -> str:
    """What a float32 matrix product is on this device."""
    precision = jax.config.jax_default_matmul_precision
    if jax.default_backend() == "gpu" and precision not in FULL_PRECISION:
        return f"TF32 where the device has it (jax_default_matmul_precision is {precision})"
    return f"float32 throughout (jax_default_matmul_precision is {precision})"


def table(curves: dict[str, np.ndarray], windows: int) -> str:
    """A row for each window of steps. A run's curves are [seeds, steps]."""
    lines = [header(["steps", RUNS[0], *(f"{name} - float32" for name in RUNS[1:])])]
    for window in np.array_split(np.arange(curves[RUNS[0]].shape[1]), windows):
        means = {name: found[:, window].mean(axis=1) for name, found in curves.items()}
        cells = [difference(means[name] - means[RUNS[0]]) for name in RUNS[1:]]
        lines.append(row([f"{window[0] + 1} to {window[-1] + 1}", f"{means[RUNS[0]].mean():.4f}", *cells]))
    return "\n".join(lines)


def difference(values: np.ndarray) -> str:
    """The mean over the seeds, and with several of them half the width of its interval."""
    found = statistics.interval(values)
    return f"{found.mean:+.4f}" + (f" ± {found.half:.4f}" if found.number > 1 else "")


def write_curves(path: str, seeds: Sequence[int], curves: dict[str, np.ndarray]) -> None:
    """One line a seed and step."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "step", *curves])
        for place, seed in enumerate(seeds):
            columns = zip(*(found[place] for found in curves.values()), strict=True)
            writer.writerows([seed, n, *map(float, values)] for n, values in enumerate(columns, start=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="(default: configs/quickstart.py, on a GPU configs/pretrain.py)")
    parser.add_argument("--source", help="as data.source (default: the standard library, or that of --config)")
    parser.add_argument("--steps", type=int, default=300, help="of each run, at least 3 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)), help="of weights and batches (default: 0 to 5)")
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
    print(f"seeds {', '.join(map(str, args.seeds))}; float32 matrix products: {multiplication()}\n", flush=True)
    steps = {name: Training(config_lib.override(base, {"precision": name}), opened) for name in ("float32", "bfloat16")}
    curves, rates = {}, {}
    for name in RUNS:
        training = steps.get(name, steps["float32"])
        found = [training.losses(seed, rounded=name == "rounded start") for seed in args.seeds]
        curves[name], rates[name] = np.array([curve for curve, _ in found]), float(np.median([rate for _, rate in found]))
        for seed, curve in zip(args.seeds, curves[name], strict=True):
            check_finite(f"{name}, seed {seed}", curve)
    print(table(curves, args.windows))
    speeds = ", ".join(f"{name} {rates[name]:.2f}" for name in ("float32", "bfloat16"))
    print(f"\nSteps a second: {speeds}." + ("" if on_gpu else " On a CPU bfloat16's speed says nothing about a GPU."))
    if args.out:
        write_curves(args.out, args.seeds, curves)


if __name__ == "__main__":
    main()
