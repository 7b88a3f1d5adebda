"""Time of one expert layer by dispatch: forward, and forward with backward, on this machine's first device.

    python benchmarks/dispatch.py [--tokens 65536] [--width 768] [--hidden 1536] [--experts 4] [--dtype bfloat16] [--gated]

Tokens choose 2 experts each, evenly and at random, or with `--mean 1.5` one or two; routing is not timed. `capacity` works by
sequence, of `--length` tokens, with the default slots for 2 experts per token, so that it drops some choices; the others drop none.
The dispatches take turns, each repeat is the mean of several calls in a row. The default sizes on a GPU are those of a layer of the
250M at 32 sequences of 2,048; elsewhere they are small, and `grouped`, whose kernels are interpreted there, is left out.
"""

import argparse
import time
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from common import header, machine, row, spread

from slimmoe_jax import experts
from slimmoe_jax.config import ModelConfig, RouterConfig
from slimmoe_jax.experts import ExpertWeights

SIZES = {
    "gpu": dict(tokens=65_536, length=2_048, width=768, hidden=1_536, experts=4, dtype="bfloat16"),
    "cpu": dict(tokens=2_048, length=256, width=128, hidden=256, experts=4, dtype="float32"),
}
CHOICES = 2  # most experts per token


def make_inputs(args: argparse.Namespace) -> tuple[jax.Array, jax.Array, jax.Array, ExpertWeights]:
    """Tokens [B, S, D], gates and choices [B, S, E], and the weights of a layer, normal and small."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    batch, dtype = (args.tokens // args.length, args.length), jnp.dtype(args.dtype)
    up, down = (args.experts, args.width, args.hidden), (args.experts, args.hidden, args.width)
    x = jax.random.normal(next(keys), (*batch, args.width), dtype)
    scores = jax.random.normal(next(keys), (*batch, args.experts))
    mask = scores >= jax.lax.top_k(scores, CHOICES)[0][..., -1:]
    stacks = [0.02 * jax.random.normal(next(keys), shape, dtype) for shape in (up, down, up)]
    alone = jax.random.uniform(next(keys), (*batch, 1)) >= args.mean - 1
    mask &= ~alone | (scores == scores.max(axis=-1, keepdims=True))
    gates = jax.nn.softmax(scores) * mask
    return x, gates, mask, ExpertWeights(stacks[0], stacks[1], stacks[2] if args.gated else None)


def make_passes(config: ModelConfig, method: experts.Dispatch, inputs: tuple) -> dict[str, Callable[[], jax.Array]]:
    """The two passes of a layer, compiled and run once."""
    x, gates, mask, weights = inputs

    def forward(x: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        return experts.apply_experts(x, gates, mask, weights, method=method, config=config)[0]

    def both(x: jax.Array, gates: jax.Array, weights: ExpertWeights) -> tuple:
        y, back = jax.vjp(forward, x, gates, weights)
        return y, back(x)  # any array of this shape will do for the gradient that comes from above

    compiled = {"forward": jax.jit(forward), "forward and backward": jax.jit(both)}
    passes = {name: lambda run=run: run(x, gates, weights) for name, run in compiled.items()}
    jax.block_until_ready([run() for run in passes.values()])
    return passes


def milliseconds(run: Callable[[], jax.Array], calls: int) -> float:
    """Of one call, the mean of several in a row."""
    started = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return 1_000 * (time.perf_counter() - started) / calls


def main() -> None:
    backend = jax.default_backend()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (SIZES.get(backend, SIZES["cpu"]) | dict(repeats=7, calls=10)).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="(default: %(default)s)")
    parser.add_argument("--mean", type=float, default=2.0, help="experts per token, 1 to 2 (default: 2)")
    parser.add_argument("--gated", action="store_true", help="gated experts: three products instead of two")
    args = parser.parse_args()
    if args.tokens % args.length:
        parser.error(f"--length {args.length} does not divide --tokens {args.tokens}")

    router = RouterConfig(kind="top_k", max_experts=CHOICES)
    config = ModelConfig(width=args.width, experts=args.experts, expert_hidden=args.hidden, gated=args.gated, router=router)
    methods = [m for m in typing.get_args(experts.Dispatch) if m != "grouped" or backend == "gpu"]
    inputs = make_inputs(args)
    passes = {method: make_passes(config, method, inputs) for method in methods}
    times = {(method, name): [] for method in methods for name in passes[method]}
    for _ in range(args.repeats):
        for method, name in times:
            times[method, name].append(milliseconds(passes[method][name], args.calls))

    print(machine("jax", "jaxlib", device=jax.devices()[0].device_kind if backend != "cpu" else ""))
    print(
        f"{args.tokens:,} tokens in sequences of {args.length:,}, width {args.width}, {args.experts} experts of {args.hidden}"
        f"{', gated' if args.gated else ''}, {args.mean:g} per token, {args.dtype}; ms, median of {args.repeats} (range)\n"
    )
    print(header(["dispatch", *passes["dense"]]))
    for method in methods:
        print(row([method, *(spread(times[method, name], ",.2f") for name in passes[method])]))
    if "grouped" not in methods:
        print(row(["grouped", *["not timed: interpreted without a GPU"] * 2]))


if __name__ == "__main__":
    main()
