"""Greedy decoding against transformers' `generate`, and of attention variants against each other.

    python benchmarks/decode.py [--repeats 7] [--layers 4] [--width 256] [--vocabulary 4096]
    python benchmarks/decode.py --variants [--repeats 7] [--prompt 512] [--new 64]

The first is against Mixtral with the same weights, float32 on the CPU, in one process. Our model is configured as Mixtral: gated
experts, uniform kv heads, rotary positions everywhere, renormalised top-2. The sides take turns, each repeat timed from the
prompt to the last token; the figure is new tokens a second. transformers runs with a thread for each core, with one thread, and
with its eager experts; the ratio is to the fastest of these. The greedy tokens must agree, or there is no table. Needs the extra
`test`. Takes about a minute. `--device gpu` runs the sides on JAX's default device and on torch's CUDA device. With
`--dtype bfloat16` the tokens are compared in float32, and the time is that of bfloat16 on both sides.

With --variants one model has four settings of kv heads: MHA (one for each query head), GQA (4), VGQA (the card's schedule, many
at both ends) and MQA (1). Everything else is equal. Prompts are long, so that the cache matters. Prefill and decoding are timed
apart, the settings taking turns. A token's bytes of keys and values are counted by `metrics.kv_cache_bytes_per_token` and from
the cache's arrays, which must agree, or there is no table. Runs on JAX's default device: at the 250M's size and in bfloat16 on a
GPU, smaller elsewhere. Needs neither torch nor transformers. Takes two minutes on two cores.

On a machine with other work, threads that wait for a busy core slow torch many times over: give both sides one core there, by
`taskset -c 0 python benchmarks/decode.py`.
"""

import argparse
import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from common import cores, header, machine, mixtral_config, row, spread  # noqa: E402

from slimmoe_jax import decoding, metrics, model  # noqa: E402
from slimmoe_jax.config import ModelConfig, RouterConfig  # noqa: E402
from slimmoe_jax.conversion import names  # noqa: E402
from slimmoe_jax.routing import RouterState  # noqa: E402
from slimmoe_jax.sampling import Sampling  # noqa: E402

if TYPE_CHECKING:
    import transformers

GREEDY = Sampling(temperature=0.0)
BATCHES = (1, 8)
NO_END = -1  # an end token that never comes, so that every run has all its tokens


def with_weights(config: ModelConfig) -> decoding.Weights:
    """A model with random weights, in float32."""
    network = model.SlimMoE(config)
    params = nn.unbox(jax.jit(lambda key: model.init(network, key))(jax.random.key(0)))
    return decoding.Weights(network, params, RouterState.initial(config), NO_END)


def cast(weights: decoding.Weights, dtype: str) -> decoding.Weights:
    """The model computing in another type."""
    network = model.SlimMoE(weights.model.config, dtype=jnp.dtype(dtype))
    return weights._replace(model=network, params=decoding.cast_once(weights.params, network.dtype))


def build(args: argparse.Namespace) -> tuple[decoding.Weights, ModelConfig]:
    """Our model as Mixtral in float32, its weights large enough that the likeliest token is never a near tie."""
    config = ModelConfig(
        vocab_size=args.vocabulary, layers=args.layers, width=args.width, heads=args.width // 64, head_dim=64, kv_heads=(2,),
        rotary=(1.0,), experts=4, expert_hidden=2 * args.width, gated=True, dropout=0.0, init_std=0.1,
        router=RouterConfig(kind="top_k", max_experts=2, renormalize=True),
    )  # fmt: skip
    return with_weights(config), config


def mixtral(config: ModelConfig, params: dict) -> "transformers.MixtralForCausalLM":
    """The transformers model that carries these weights, in float32 on the CPU."""
    import torch
    import transformers

    network = transformers.MixtralForCausalLM(mixtral_config(config, length=2_048))
    router = {"threshold": np.float32(0), "bias": np.zeros((config.layers, config.experts), np.float32)}
    tensors = names.to_theirs(config, params, router)  # Mixtral's names, but for the selection bias
    tensors = {name: torch.tensor(w) for name, w in tensors.items() if not name.endswith("e_score_correction_bias")}
    network.load_state_dict(tensors, strict=True)
    return network.eval()


def check_equal(tokens: list[np.ndarray], batch: int) -> None:
    """Stops the program where the sides chose different tokens."""
    if any((other != tokens[0]).any() for other in tokens):
        raise SystemExit(f"batch {batch}: the greedy tokens differ; nothing was timed")


def measure(sides: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict[str, list[float]]:
    """New tokens a second of each side, by repeat; the sides take turns, so that a busy spell of the machine meets all of them."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            started = time.perf_counter()
            tokens = run()
            rates[name].append(tokens.size / (time.perf_counter() - started))
    return rates


def against_transformers(args: argparse.Namespace) -> None:
    """The table of the same model on both sides."""
    import torch

    on_gpu = jax.default_backend() == "gpu"
    weights, config = build(args)
    peer = mixtral(config, jax.device_get(weights.params)).to("cuda" if on_gpu else "cpu")
    size = sum(leaf.size for leaf in jax.tree.leaves(weights.params)) / 1e6
    print(machine("jax", "flax", "torch", "transformers", device=jax.devices()[0].device_kind if on_gpu else ""))
    print(f"{config.layers} layers, width {config.width}, vocabulary {config.vocab_size:,}: {size:.1f}M parameters, {args.dtype}")
    print(f"{args.prompt} prompt tokens, {args.new} new tokens, greedy, {args.repeats} alternating repeats\n")

    def ours(prompts: np.ndarray, chunk: int) -> np.ndarray:
        options = dict(new_tokens=args.new, seed=0, chunk=chunk)
        return np.concatenate(list(decoding.generate_tokens(weights, prompts, GREEDY, **options)), axis=1)

    def theirs(prompts: np.ndarray, experts: str, threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        peer.set_experts_implementation(experts)
        tokens = torch.tensor(prompts, device=peer.device)
        with torch.no_grad():
            out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.new, do_sample=False)
        return out[:, args.prompt :].cpu().numpy()

    at_once, streaming = "slimmoe_jax, all at once", "slimmoe_jax, token by token"
    sides = {at_once: functools.partial(ours, chunk=0), streaming: functools.partial(ours, chunk=1)}
    for experts, threads in dict.fromkeys((("grouped_mm", cores()), ("grouped_mm", 1), ("eager", 1))):
        sides[f"transformers, {experts}, {threads} thread(s)"] = functools.partial(theirs, experts=experts, threads=threads)
    prompts = {batch: np.random.default_rng(batch).integers(0, config.vocab_size, (batch, args.prompt)) for batch in BATCHES}
    # On a GPU JAX would multiply float32 in TF32, torch does not.
    with jax.default_matmul_precision("highest") if on_gpu else contextlib.nullcontext():
        for batch in BATCHES:  # compiles and warms up
            check_equal([run(prompts[batch]) for run in sides.values()], batch)
    if args.dtype != "float32":  # in which near ties are many: the tokens were compared before
        weights, peer = cast(weights, args.dtype), peer.to(getattr(torch, args.dtype))
        for batch in BATCHES:
            _ = [run(prompts[batch]) for run in sides.values()]
    print("| batch | side | tokens/s, median | slowest to fastest |\n|---|---|---|---|", flush=True)
    ratios = []
    for batch in BATCHES:
        rates = measure({name: functools.partial(run, prompts[batch]) for name, run in sides.items()}, args.repeats)
        median = {name: statistics.median(values) for name, values in rates.items()}
        for name, values in rates.items():
            print(f"| {batch} | {name} | {median[name]:,.0f} | {min(values):,.0f} to {max(values):,.0f} |", flush=True)
        best = max(median[name] for name in sides if name.startswith("transformers"))
        ratios.append(f"batch {batch}: {median[at_once] / best:.2f} at once, {median[streaming] / best:.2f} token by token")
    print("\nThe greedy tokens of all sides agree. Ratio to the fastest transformers setting: " + "; ".join(ratios) + ".")


# --- variants of attention -------------------------------------------------------------------------------------------


def variants(args: argparse.Namespace) -> dict[str, ModelConfig]:
    """One model with four settings of kv heads. VGQA is the card's schedule, thinned where there are fewer layers."""
    schedule = ModelConfig().kv_heads
    schedule = schedule[:: max(1, len(schedule) // args.layers)] if args.layers < len(schedule) else schedule
    heads = args.width // args.head_dim
    kv_heads = {"MHA": (heads,), "GQA": (4,), "VGQA": schedule, "MQA": (1,)}
    common = dict(
        vocab_size=args.vocabulary, layers=args.layers, width=args.width, heads=heads, head_dim=args.head_dim,
        expert_hidden=2 * args.width, dropout=0.0, router=RouterConfig(kind="top_k", max_experts=2),
    )  # fmt: skip
    return {name: ModelConfig(kv_heads=kv, **common) for name, kv in kv_heads.items()}


def cache_bytes(end: decoding.Decoding) -> float:
    """Bytes of keys and values for each token that the cache has room for, from its arrays."""
    cache = end.cache
    return sum(array.nbytes for array in (*cache.keys, *cache.values)) / cache.positions.size


def check_bytes(name: str, counted: dict[str, int], found: dict[str, float]) -> None:
    """Stops the program where the accounting, of the variant or of MHA beside it, does not match the arrays."""
    if (counted["vgqa"], counted["mha"]) != (found[name], found["MHA"]):
        raise SystemExit(
            f"{name}: metrics count {counted['vgqa']} bytes a token, and {counted['mha']} for MHA; the caches hold {found[name]:g}"
            f" and {found['MHA']:g}; nothing was timed"
        )


def timed(weights: decoding.Weights, prompts: np.ndarray, new: int) -> tuple[float, float, decoding.Decoding]:
    """Seconds of the prefill, seconds of the decoding after it, and where it ended."""
    network, params, router, _ = weights
    room = -(-new // decoding.ROOM) * decoding.ROOM
    started = time.perf_counter()
    inputs = (*decoding.pad_left(prompts), GREEDY, np.uint32(0))
    end = jax.block_until_ready(decoding.prefill(network, params, router, *inputs, room=room, end_token=NO_END))
    filled = time.perf_counter()
    end = decoding.decode(network, params, router, end, GREEDY, np.int32(new), end_token=NO_END)
    jax.block_until_ready(end)
    return filled - started, time.perf_counter() - filled, end


def against_each_other(args: argparse.Namespace) -> None:
    """The table of the variants."""
    configs = variants(args)
    weights = {name: cast(with_weights(config), args.dtype) for name, config in configs.items()}
    on_gpu = jax.default_backend() == "gpu"
    print(machine("jax", "flax", device=jax.devices()[0].device_kind if on_gpu else ""))
    vgqa = configs["VGQA"]
    print(f"{vgqa.layers} layers, width {vgqa.width}, {vgqa.heads} query heads of {vgqa.head_dim}, vocabulary {vgqa.vocab_size:,},")
    print(f"VGQA by layer: {', '.join(map(str, vgqa.layer_kv_heads))}; {args.dtype}")
    print(f"{args.prompt} prompt tokens, {args.new} new tokens, greedy, {args.repeats} alternating repeats\n")
    itemsize, found = jnp.dtype(args.dtype).itemsize, {}
    prompts = {batch: np.random.default_rng(batch).integers(0, vgqa.vocab_size, (batch, args.prompt)) for batch in BATCHES}
    for batch in BATCHES:  # compiles and warms up
        for name, side in weights.items():
            found[name] = cache_bytes(timed(side, prompts[batch], args.new)[2])
            check_bytes(name, metrics.kv_cache_bytes_per_token(configs[name], itemsize), found)
    columns = "batch, attention, parameters, kv bytes a token, of MHA, decoding tokens/s, x MHA, prefill ms, x MHA"
    print(header(columns.split(", ")), flush=True)
    for batch in BATCHES:
        prefill, rates = {name: [] for name in weights}, {name: [] for name in weights}
        for _ in range(args.repeats):
            for name, side in weights.items():
                filling, stepping, _ = timed(side, prompts[batch], args.new)
                prefill[name].append(1e3 * filling)
                rates[name].append(batch * (args.new - 1) / stepping)  # the first token is the prefill's
        for name, config in configs.items():
            size = sum(metrics.parameter_counts(config).values())
            faster = statistics.median(rates[name]) / statistics.median(rates["MHA"])
            longer = statistics.median(prefill[name]) / statistics.median(prefill["MHA"])
            cells = [batch, name, f"{size / 1e6:.1f}M", f"{found[name]:,.0f}", f"{found[name] / found['MHA']:.2f}"]
            cells += [spread(rates[name]), f"{faster:.2f}", spread(prefill[name]), f"{longer:.2f}"]
            print(row(cells), flush=True)
    print("\nThe bytes are the same by metrics.kv_cache_bytes_per_token and in the cache's arrays.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with defaults for the table and the device that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", action="store_true", help="compare settings of kv heads, instead of transformers")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="gpu: JAX's default (default: cpu; with --variants gpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    for name in ("layers", "width", "head-dim", "vocabulary", "prompt", "new"):
        parser.add_argument(f"--{name}", type=int, help="(default: by table and device)")
    args = parser.parse_args(argv)
    args.device = args.device or ("gpu" if args.variants else "cpu")
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    defaults = dict(dtype="float32", layers=4, width=256, head_dim=64, vocabulary=4_096, prompt=32, new=64)
    if args.variants:
        defaults |= dict(layers=8, width=384, head_dim=32, prompt=512)
    if jax.default_backend() == "gpu":
        defaults |= dict(layers=16, width=768, head_dim=64, vocabulary=50_257, new=256)
        if args.variants:
            defaults |= dict(dtype="bfloat16", prompt=2_048)
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    (against_each_other if args.variants else against_transformers)(args)


if __name__ == "__main__":
    main()
