"""Causal grouped-query attention alone, forward and backward: our blocks of queries, JAX's XLA kernel, and cuDNN's on a GPU.

    python benchmarks/attention.py [--repeats 9]

JAX's kernel is timed as it is and recomputed in the backward pass (as a flash kernel does; else each layer would keep its square).
Kernels take turns; before that their gradients must agree, or there is no table. A GPU computes in bfloat16 at the 250M's sizes, a
CPU in float32 at smaller ones. Memory is the compiler's temporaries. Takes about a minute on two cores.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from common import header, machine, row, spread

from slimmoe_jax import blockwise

# B batch, S sequence, N query heads, K kv heads, H head dimension
SIZES = {"cpu": ((8, 256, 4, 2, 32), (1, 2_048, 12, 2, 64)), "gpu": ((32, 2_048, 12, 1, 64), (32, 2_048, 12, 4, 64))}


def kernels(on_gpu: bool) -> dict[str, Callable]:
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    found = {"blocks of queries": blockwise.causal_attention, "JAX's XLA": theirs, "JAX's XLA, recomputed": jax.checkpoint(theirs)}
    if on_gpu:
        found["cuDNN"] = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return found


def inputs(size: tuple[int, ...], dtype: jnp.dtype) -> list[jax.Array]:
    """Queries, keys, values and the gradient of the output."""
    batch, length, heads, kv_heads, width = size
    shapes = [(batch, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(jax.random.key(n), shape, dtype) for n, shape in enumerate(shapes)]


def compiled(kernel: Callable, arguments: list[jax.Array]) -> Callable:
    """The function of queries, keys, values and the output's gradient that returns the gradients of the first three."""

    def gradients(query, key, value, grad):
        _, back = jax.vjp(kernel, query, key, value)
        return back(grad)

    return jax.jit(gradients).lower(*arguments).compile()


def check(results: dict[str, tuple], tolerance: float) -> None:
    """Stops where the kernels' gradients differ."""
    (first, expected), *others = results.items()
    for name, grads in others:
        for got, wanted in zip(grads, expected, strict=True):
            got, wanted = (np.asarray(x, np.float32) for x in (got, wanted))
            if not np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max():
                raise SystemExit(f"the gradients of {name} and {first} differ; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="turns of each kernel (default: %(default)s)")
    args = parser.parse_args()
    backend = jax.default_backend()
    on_gpu = backend == "gpu"
    dtype, tolerance = (jnp.bfloat16, 3e-2) if on_gpu else (jnp.float32, 1e-4)
    print(machine("jax", device=jax.devices()[0].device_kind if on_gpu else "") + f"; {jnp.dtype(dtype).name}\n")
    print(header(["batch", "length", "heads", "kernel", "forward and backward, ms", "x the first", "temporaries, MiB"]))
    for size in SIZES[backend]:
        arguments = inputs(size, dtype)
        programs = {name: compiled(kernel, arguments) for name, kernel in kernels(on_gpu).items()}
        check({name: program(*arguments) for name, program in programs.items()}, tolerance)
        times: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(args.repeats):
            for name, program in programs.items():
                started = time.perf_counter()
                jax.block_until_ready(program(*arguments))
                times[name].append(1e3 * (time.perf_counter() - started))
        batch, length, heads, kv_heads, width = size
        first = np.median(next(iter(times.values())))
        for name, values in times.items():
            memory = programs[name].memory_analysis().temp_size_in_bytes / 2**20
            shape = [batch, length, f"{heads} over {kv_heads}, of {width}"]
            print(row([*shape, name, spread(values, ".1f"), f"{np.median(values) / first:.2f}", f"{memory:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
