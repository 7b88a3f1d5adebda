"""A full training step (forward, backward, clipping, AdamW, all losses): tokens a second, MFU, memory, compile time, parts.

    python benchmarks/train_step.py                                            # a GPU: SlimMoE-250M, bfloat16; else the quickstart
    python benchmarks/train_step.py --batches 8 16 32 --dispatch capacity ragged grouped --dropout 0 0.1
    python benchmarks/train_step.py --dense                                    # beside a dense model of as many FLOPs
    python benchmarks/train_step.py --breakdown                                # where the time goes, from a profile
    python benchmarks/train_step.py --records DIR                              # beside input read from prepared records
    python benchmarks/train_step.py --xla-flags=--xla_gpu_enable_triton_gemm=false --xla-flags=--xla_gpu_autotune_level=0

Options with several values are tried in all combinations, each in a fresh process, after an untimed warm-up; a step's time is that
of a train loop which never waits for the device but at the end of every --group steps. MFU counts FLOPs of the experts that tokens
did use, in two conventions (see `slimmoe_jax.metrics`). Compile time is tracing and compiling, with an empty cache and again from
the cache. The peak of memory is the device's where it keeps one, else the process's.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import header, machine, on_gpu, row, zipf_tokens

from slimmoe_jax import config as config_lib
from slimmoe_jax import host
from slimmoe_jax.config import ModelConfig, TrainConfig

ROOT = Path(__file__).parent.parent
CONFIGS = {"quickstart": "quickstart.py", "250m": "pretrain.py"}
SPEC = "TRAIN_STEP_SPEC"  # tells a process which row it is
# What part of the model an operation belongs to, by the scopes in its name; the first that fits.
PARTS = (
    ("optimizer", r"\boptimizer\b"),
    ("head and loss", r"\bcross_entropy\b"),
    ("attention", r"\battention\b"),
    ("router", r"\brouter\b"),
    ("experts", r"\bexperts\b"),
    ("rest", r""),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination."""

    size: str
    batch: int
    context: int  # 0: the config's
    layers: int  # 0: the config's
    precision: str
    dispatch: str
    attention: str
    dropout: float
    remat: bool
    dense: bool = False  # the model with as many FLOPs and one expert
    records: str = ""
    xla_flags: str = ""
    returns_memory: bool = False  # without `host.prepare`

    @property
    def config(self) -> TrainConfig:
        config = config_lib.load(ROOT / "configs" / CONFIGS[self.size])
        model = config.model
        changes = {"data.batch_size": self.batch, "precision": self.precision, "remat": self.remat, "optim.accumulate": 1}
        changes |= {"model.dispatch": self.dispatch, "model.attention": self.attention, "model.dropout": self.dropout}
        changes |= {"model.layers": self.layers or model.layers, "data.context": self.context or config.data.context}
        if self.dense:
            changes |= {"model.experts": 1, "model.expert_hidden": model.expert_hidden * model.router.max_experts}
            changes |= {"model.router.max_experts": 1, "model.router.kind": "top_k", "model.dispatch": "auto"}
        else:  # a token uses two experts, whatever a controller would make of it
            changes |= {"model.router.kind": "top_k", "model.router.max_experts": 2}
        return config_lib.override(config, changes)


# --- one row, in a process of its own --------------------------------------------------------------------------------


def measure(spec: Row, steps: int, warmup: int, group: int, breakdown: bool) -> dict:
    """Trains, and returns what the table shows."""
    import jax

    from slimmoe_jax import attention, experts, metrics, sharding, state, step

    config = spec.config
    mesh = sharding.make_mesh(config.mesh)
    current = state.create(config, mesh)
    run = step.jit_train_step(config, mesh, end_token=0)
    feed = real_batches(config, spec.records) if spec.records else synthetic_batches(config)
    with sharding.use(mesh), tempfile.TemporaryDirectory() as cache:
        batch = sharding.put_batch(next(feed), mesh)
        compiled, seconds = compile_twice(run, (current, batch), cache)
        times, losses = [], []
        for number in range(-(-warmup // group) + -(-steps // group)):
            started = time.perf_counter()
            for _ in range(group):
                current, last = compiled(current, batch)
                batch = sharding.put_batch(next(feed), mesh)
                losses.append(last["loss"])
            jax.block_until_ready(current)
            if number >= -(-warmup // group):
                times.append((time.perf_counter() - started) / group)
        shares = profile(compiled, current, batch) if breakdown else {}
    if not np.isfinite(jax.device_get(losses)).all():
        raise SystemExit("the loss is not finite: nothing that was timed counts")
    used = float(np.mean(last["experts_per_token"])) if config.model.is_moe else None
    flops = metrics.train_flops_per_token(config.model, config.data.context, used)
    peak = metrics.device_peak(config.precision)
    rate = config.data.batch_size * config.data.context / statistics.median(times)
    return {
        "tokens_per_second": rate,
        "milliseconds": [1e3 * seconds for seconds in times],
        "flops_per_second": {name: rate * value / jax.device_count() for name, value in flops.items()},
        "peak_bytes": peak_bytes(jax),
        "compile_seconds": seconds,
        "parts": shares,
        "chosen": f"{attention.resolve_kernel(config.model, jax.numpy.dtype(config.precision))} attention,"
        f" {experts.resolve_dispatch(config.model, train=True)} experts",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "peak": {"flops": peak.flops, "name": peak.name},
    }


def compile_twice(run, arguments: tuple, cache: str) -> tuple:
    """The compiled step, and seconds to trace and compile it: {"cold", "cached"}."""
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    seconds = {}
    for name in ("cold", "cached"):
        jax.clear_caches()
        started = time.perf_counter()
        compiled = run.lower(*arguments).compile()
        seconds[name] = time.perf_counter() - started
    return compiled, seconds


def synthetic_batches(config: TrainConfig) -> Iterator[dict[str, np.ndarray]]:
    return itertools.cycle([{"tokens": tokens} for tokens in zipf_tokens(config, 16)])


def real_batches(config: TrainConfig, folder: str) -> Iterator[dict[str, np.ndarray]]:
    """What training reads from prepared records, numbers of records left out."""
    from slimmoe_jax.data import records

    split = records.open_records(folder, config.data.context).split("train")
    for batch in records.batches(split, config.data.batch_size, seed=0, workers=config.data.workers):
        yield {name: rows for name, rows in batch.items() if name != "records"}


def peak_bytes(jax) -> int:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def profile(compiled, current, batch, steps: int = 3) -> dict[str, float]:
    """The share of each part of the model in the time of all operations."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                current, _ = compiled(current, batch)
            jax.block_until_ready(current)
        (found,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(found)).planes
        seconds = operation_seconds(planes)
    return shares_of_parts(seconds, operation_names(compiled.as_text()))


def operation_seconds(planes) -> collections.Counter:
    """Seconds that each operation of the program took, by its name in the program."""
    seconds = collections.Counter()
    for event in (event for plane in planes for line in plane.lines for event in line.events):
        operation = dict(event.stats).get("hlo_op")
        if operation:
            seconds[operation] += event.duration_ns / 1e9
    return seconds


def operation_names(program: str) -> dict[str, str]:
    """Operation -> the scopes in which it was traced, from the text of a compiled program."""
    found = {}
    for line in program.splitlines():
        match = re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', line)
        if match:
            found[match[1]] = match[2]
    return found


def shares_of_parts(seconds: collections.Counter, names: dict[str, str]) -> dict[str, float]:
    totals = dict.fromkeys((part for part, _ in PARTS), 0.0)
    for operation, value in seconds.items():
        scope = names.get(operation, "")
        totals[next(part for part, pattern in PARTS if re.search(pattern, scope))] += value
    whole = sum(totals.values())
    return {part: value / whole for part, value in totals.items()} if whole else {}


# --- the table -------------------------------------------------------------------------------------------------------


def rows(args: argparse.Namespace) -> list[Row]:
    """All combinations that were asked for."""
    options = (args.batches, args.precision, args.dispatch, args.attention, args.dropout, args.remat)
    found = []
    for batch, precision, dispatch, attention, dropout, remat in itertools.product(*options):
        base = Row(args.size, batch, args.context, args.layers, precision, dispatch, attention, dropout, bool(remat))
        found.append(base)
        found += [dataclasses.replace(base, dense=True)] if args.dense else []
        found += [dataclasses.replace(base, records=str(Path(args.records).absolute()))] if args.records else []
        found += [dataclasses.replace(base, xla_flags=flags) for flags in args.xla_flags]
        found += [dataclasses.replace(base, returns_memory=True)] if args.return_memory else []
    return list(dict.fromkeys(found))


def run_row(spec: Row, args: argparse.Namespace) -> dict | None:
    """The row's figures; None where it does not run, which is said."""
    numbers = {"steps": args.steps, "warmup": args.warmup, "group": args.group, "breakdown": args.breakdown}
    flags = spec.xla_flags
    if args.breakdown:  # a captured graph would hide which operation a kernel belongs to
        flags += " --xla_gpu_enable_command_buffer=" if on_gpu() else ""
    environment = os.environ | {SPEC: json.dumps({"row": dataclasses.asdict(spec)} | numbers)}
    environment |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    environment |= {"JAX_TRACEBACK_FILTERING": "off"}  # an error's last line is then its message
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"{label(spec)}: does not run: {said[:300]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def label(spec: Row) -> str:
    words = [f"batch {spec.batch}", spec.precision, f"dropout {spec.dropout:g}"]
    words += [] if spec.dense else [f"dispatch {spec.dispatch}"]
    words += [f"attention {spec.attention}"]
    words += ["dense, as many FLOPs"] if spec.dense else []
    words += ["remat"] if spec.remat else []
    words += ["records"] if spec.records else []
    words += ["freed memory returned"] if spec.returns_memory else []
    return ", ".join([*words, spec.xla_flags] if spec.xla_flags else words)


def cells(spec: Row, result: dict, peak: float) -> list[str]:
    """What the table shows; MFU is of `peak`, FLOP/s, the same for all rows (a CPU's is measured, and not twice the same)."""
    times = result["milliseconds"]
    compile_seconds = result["compile_seconds"]
    return [
        label(spec),
        result["chosen"],
        f"{result['tokens_per_second']:,.0f}",
        f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})",
        " / ".join(f"{result['flops_per_second'][name] / peak:.1%}" for name in ("causal", "palm")),
        f"{result['peak_bytes'] / 2**30:.2f}",
        f"{compile_seconds['cold']:.1f} / {compile_seconds['cached']:.1f}",
    ]


def main() -> None:
    gpu = on_gpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=CONFIGS, default="250m" if gpu else "quickstart", help="(default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[32 if gpu else 8], help="sequences a step (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, default=0, help="tokens a sequence; 0: the config's")
    parser.add_argument("--layers", type=int, default=0, help="0: the config's")
    parser.add_argument("--precision", nargs="+", default=["bfloat16" if gpu else "float32"], help="(default: %(default)s)")
    for name in ("dispatch", "attention"):
        known = typing.get_args(typing.get_type_hints(ModelConfig)[name])
        parser.add_argument(f"--{name}", nargs="+", default=["auto"], choices=known)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0])
    parser.add_argument("--remat", type=int, nargs="+", choices=(0, 1), default=[0])
    parser.add_argument("--dense", action="store_true", help="beside each, the dense model of as many FLOPs")
    parser.add_argument("--records", default="", help="beside each, the same on batches read from this folder of prepared records")
    parser.add_argument("--xla-flags", action="append", default=[], help="beside each, the same with these; once for each set")
    parser.add_argument("--return-memory", action="store_true", help="on a CPU, beside each, the same without keeping freed memory")
    parser.add_argument("--breakdown", action="store_true", help="shares of the parts, from a profile")
    for name, default in (("steps", 50 if gpu else 20), ("warmup", 20 if gpu else 5), ("group", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    args = parser.parse_args()
    peak = None
    for spec in rows(args):
        result = run_row(spec, args)
        if result is None:
            continue
        if peak is None:
            peak = result["peak"]
            print(machine("jax", "flax", device=result["device"] if gpu else ""))
            print(f"{args.size}, context {spec.config.data.context}, {args.steps} steps; MFU of {peak['name']}\n")
            names = ["what", "chosen", "tokens/s", "step, ms", "MFU causal / PaLM", "peak, GiB", "compile cold / cached, s"]
            print(header(names + [part for part, _ in PARTS if args.breakdown]))
        print(row(cells(spec, result, peak["flops"]) + [f"{share:.1%}" for share in result["parts"].values()]), flush=True)
    if peak is None:
        raise SystemExit("no row ran")


def run_spec() -> None:
    spec = json.loads(os.environ[SPEC])
    which = Row(**spec.pop("row"))
    if not which.returns_memory:
        host.prepare()  # as training does
    print(json.dumps(measure(which, **spec)), flush=True)


if __name__ == "__main__":
    run_spec() if SPEC in os.environ else main()
