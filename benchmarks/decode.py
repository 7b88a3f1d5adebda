"""Greedy decoding against transformers' `generate`: Mixtral with the same weights, float32 on the CPU, in one process.

    python benchmarks/decode.py [--repeats 7] [--layers 4] [--width 256] [--vocabulary 4096]

Our model is configured as Mixtral: gated experts, uniform kv heads, rotary positions everywhere, renormalised top-2. The sides take
turns, each repeat timed from the prompt to the last token; the figure is new tokens a second. transformers runs with a thread for
each core, with one thread, and with its eager experts; the ratio is to the fastest of these. The greedy tokens must agree, or there
is no table. Needs the extra `test`. Takes about a minute.

On a machine with other work, threads that wait for a busy core slow torch many times over: give both sides one core there, by
`taskset -c 0 python benchmarks/decode.py`.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from common import cores, machine  # noqa: E402

from slimmoe_jax import generate, model  # noqa: E402
from slimmoe_jax.config import ModelConfig, RouterConfig  # noqa: E402
from slimmoe_jax.conversion import names  # noqa: E402
from slimmoe_jax.routing import RouterState  # noqa: E402
from slimmoe_jax.sampling import Sampling  # noqa: E402


class NoEnd:
    """What decoding asks of a tokenizer: an end token, here one that never comes, so that every run has all its tokens."""

    end_token = -1


def build(args: argparse.Namespace) -> tuple[generate.Weights, ModelConfig]:
    """Our model with random weights, large enough that the likeliest token is never a near tie."""
    config = ModelConfig(
        vocab_size=args.vocabulary, layers=args.layers, width=args.width, heads=args.width // 64, head_dim=64, kv_heads=(2,),
        rotary=(1.0,), experts=4, expert_hidden=2 * args.width, gated=True, dropout=0.0, init_std=0.1,
        router=RouterConfig(kind="top_k", max_experts=2, renormalize=True),
    )  # fmt: skip
    network = model.SlimMoE(config)
    params = nn.unbox(jax.jit(lambda key: model.init(network, key))(jax.random.key(0)))
    return generate.Weights(network, params, RouterState.initial(config), NoEnd()), config


def mixtral(config: ModelConfig, params: dict) -> transformers.MixtralForCausalLM:
    """The transformers model that carries these weights."""
    hf_config = transformers.MixtralConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.expert_hidden,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads[0],
        head_dim=config.head_dim, rms_norm_eps=config.norm_epsilon, max_position_embeddings=2_048,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, tie_word_embeddings=False,
        num_local_experts=config.experts, num_experts_per_tok=config.router.max_experts, attn_implementation="sdpa",
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    network = transformers.MixtralForCausalLM(hf_config)
    router = {"threshold": np.float32(0), "bias": np.zeros((config.layers, config.experts), np.float32)}
    tensors = names.to_theirs(config, params, router)  # Mixtral's names, but for the selection bias
    tensors = {name: torch.tensor(w) for name, w in tensors.items() if not name.endswith("e_score_correction_bias")}
    network.load_state_dict(tensors, strict=True)
    return network.eval()


def measure(sides: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict[str, list[float]]:
    """New tokens a second of each side, by repeat; the sides take turns, so that a busy spell of the machine meets all of them."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            started = time.perf_counter()
            tokens = run()
            rates[name].append(tokens.size / (time.perf_counter() - started))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("repeats", 7), ("layers", 4), ("width", 256), ("vocabulary", 4_096), ("prompt", 32), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    args = parser.parse_args()
    weights, config = build(args)
    peer = mixtral(config, jax.device_get(weights.params))
    size = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    print(machine("jax", "flax", "torch", "transformers"))
    print(f"{config.layers} layers, width {config.width}, vocabulary {config.vocab_size:,}: {size / 1e6:.1f}M parameters, float32")
    print(f"{args.prompt} prompt tokens, {args.new} new tokens, greedy, {args.repeats} alternating repeats\n")
    print("| batch | side | tokens/s, median | slowest to fastest |\n|---|---|---|---|", flush=True)

    def ours(prompts: np.ndarray, chunk: int) -> np.ndarray:
        options = dict(new_tokens=args.new, seed=0, chunk=chunk)
        return np.concatenate(list(generate.generate_tokens(weights, prompts, Sampling(temperature=0.0), **options)), axis=1)

    def theirs(prompts: np.ndarray, experts: str, threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        peer.set_experts_implementation(experts)
        tokens = torch.tensor(prompts)
        with torch.no_grad():
            out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.new, do_sample=False)
        return out[:, args.prompt :].numpy()

    ratios = []
    for batch in (1, 8):
        prompts = np.random.default_rng(batch).integers(0, config.vocab_size, (batch, args.prompt))
        at_once, streaming = "slimmoe_jax, all at once", "slimmoe_jax, token by token"
        sides = {at_once: functools.partial(ours, prompts, 0), streaming: functools.partial(ours, prompts, 1)}
        for experts, threads in dict.fromkeys((("grouped_mm", cores()), ("grouped_mm", 1), ("eager", 1))):
            sides[f"transformers, {experts}, {threads} thread(s)"] = functools.partial(theirs, prompts, experts, threads)
        tokens = [run() for run in sides.values()]  # compiles and warms up
        if any((other != tokens[0]).any() for other in tokens):
            raise SystemExit(f"batch {batch}: the greedy tokens differ; nothing was timed")
        rates = measure(sides, args.repeats)
        median = {name: statistics.median(values) for name, values in rates.items()}
        for name, values in rates.items():
            print(f"| {batch} | {name} | {median[name]:,.0f} | {min(values):,.0f} to {max(values):,.0f} |", flush=True)
        best = max(median[name] for name in sides if name.startswith("transformers"))
        ratios.append(f"batch {batch}: {median[at_once] / best:.2f} at once, {median[streaming] / best:.2f} token by token")
    print("\nThe greedy tokens of all sides agree. Ratio to the fastest transformers setting: " + "; ".join(ratios) + ".")


if __name__ == "__main__":
    main()
